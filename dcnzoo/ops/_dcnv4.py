"""DCNv4 aggregation: the public function, its checks, and its registration with PyTorch."""

import math

import torch
from torch import Tensor
from torch._jit_internal import BroadcastingList2
from torch.overrides import handle_torch_function, has_torch_function

from . import reference
from ._library import chosen_backend, exporting, operator
from ._registration import register

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# No `*` behind the tensors: torch.jit.script refuses keyword-only arguments that have defaults.
def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_size: BroadcastingList2[int] = 3,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 1,
    dilation: BroadcastingList2[int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Deformable aggregation of DCNv4, `Efficient Deformable ConvNets <https://arxiv.org/abs/2401.06197>`_.

    Each output pixel of each group of channels is a sum of K bilinear samples of the value map, K the number of kernel
    points, at learned positions and with learned, unbounded weights. Points outside the map, or at positions that are
    not finite, count as zero.

    All but the two tensors are passed by keyword; sizes are ints or (height, width) pairs.

    `torch.func.vmap` works as it is, and `torch.func.jvp` by the reference; `torch.func.grad` and others that go
    backwards need `use_backend('reference')`.

    Args:
        value: Value map, (N, H, W, C), float64, float32, float16 or bfloat16. Any strides; fastest where the channels
            are contiguous.
        offset_mask: Offsets in pixels and modulation scalars, (N, Ho, Wo, P) with P >= 3 * groups * K, in value's
            dtype, or float32 beside a half value. Per group: K pairs (dx, dy), points in x-outermost order, then K
            scalars. What lies behind the last group is ignored.
        groups: Number of groups of C / groups channels that share offsets.
        kernel_size: Points of the kernel's grid.
        stride: Step of the output grid in pixels of the value map.
        padding: Rows and columns by which the grid starts outside the map.
        dilation: Distance of the grid's points in pixels.
        offset_scale: Factor on offsets and grid around the window's centre.
        remove_center: Leave out the central point (odd square kernels only).
        softmax: Normalise each group's K scalars with a softmax first, as DCNv3 does.

    Returns:
        The aggregated map, (N, Ho, Wo, C), contiguous, in value's dtype.

    Raises:
        ValueError: A shape, device, size or group count does not fit.
        TypeError: A dtype or the type of an argument does not fit.
        RuntimeError: The backend asked for with `use_backend` is not available on value's device.
    """
    if torch.jit.is_scripting():
        return torch.ops.dcnzoo.dcnv4(
            value,
            offset_mask,
            groups,
            kernel_size[0],
            kernel_size[1],
            stride[0],
            stride[1],
            padding[0],
            padding[1],
            dilation[0],
            dilation[1],
            offset_scale,
            remove_center,
            softmax,
        )
    else:
        return _dcnv4(
            value, offset_mask, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center, softmax
        )


def _dcnv4(value, offset_mask, groups, kernel_size, stride, padding, dilation, offset_scale, remove_center, softmax):
    if has_torch_function((value, offset_mask)):
        return handle_torch_function(
            dcnv4,
            (value, offset_mask),
            value,
            offset_mask,
            groups=groups,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            offset_scale=offset_scale,
            remove_center=remove_center,
            softmax=softmax,
        )
    geometry = (
        *_pair('kernel_size', kernel_size, 1),
        *_pair('stride', stride, 1),
        *_pair('padding', padding, 0),
        *_pair('dilation', dilation, 1),
    )
    _check(value, offset_mask, groups, geometry, offset_scale, remove_center, softmax)
    arguments = (value, offset_mask, groups, *geometry, float(offset_scale), bool(remove_center), bool(softmax))
    backend = chosen_backend(value.device)
    if backend == 'reference' or exporting():
        return reference.dcnv4(*arguments)
    return operator('dcnv4', backend)(*arguments)


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Length of the output along one axis, as for any convolution."""
    return (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1


def _is_int(number: object) -> bool:
    return type(number) is int or (isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool))


def _pair(name: str, size: object, least: int) -> tuple[int, int]:
    if type(size) is int and size >= least:  # nearly always; the checks below take a tenth of a small map's time
        return size, size
    pair = (size, size) if _is_int(size) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not (_is_int(pair[0]) and _is_int(pair[1])):
        raise TypeError(f'{name} must be an int or a (height, width) pair of ints, got {size!r}')
    if pair[0] < least or pair[1] < least:
        raise ValueError(f'{name} must be at least {least}, got {size!r}')
    return pair[0], pair[1]


def _check(value, offset_mask, groups, geometry, offset_scale, remove_center, softmax):
    """Raises ValueError or TypeError for arguments that do not fit; the kernels' own checks are only a last guard."""
    for name, tensor in (('value', value), ('offset_mask', offset_mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if value.dtype not in _DTYPES:
        raise TypeError(f'value must be float64, float32, float16 or bfloat16, got {value.dtype}')
    half = value.dtype in (torch.float16, torch.bfloat16)
    if offset_mask.dtype != value.dtype and not (half and offset_mask.dtype == torch.float32):
        raise TypeError(
            f"offset_mask must have value's dtype {value.dtype}{' or float32' if half else ''}, got {offset_mask.dtype}"
        )
    if offset_mask.device != value.device:
        raise ValueError(f"offset_mask must be on value's device {value.device}, got {offset_mask.device}")
    if not _is_int(groups):
        raise TypeError(f'groups must be an int, got {groups!r}')
    if not isinstance(offset_scale, (int, float)) or isinstance(offset_scale, bool):
        raise TypeError(f'offset_scale must be a number, got {offset_scale!r}')
    if not -math.inf < offset_scale < math.inf:  # math.isfinite cannot be traced
        raise ValueError(f'offset_scale must be finite, got {offset_scale!r}')
    for name, flag in (('remove_center', remove_center), ('softmax', softmax)):
        if not isinstance(flag, (bool, int)) or flag not in (0, 1):
            raise TypeError(f'{name} must be a bool, got {flag!r}')
    for name, tensor, axes in (('value', value, '(N, H, W, C)'), ('offset_mask', offset_mask, '(N, Ho, Wo, P)')):
        if tensor.ndim != 4:
            raise ValueError(f'{name} must have 4 dimensions {axes}, got shape {tuple(tensor.shape)}')

    n, height, width, channels = value.shape
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = geometry
    if height < 1 or width < 1 or channels < 1:
        raise ValueError(f'value must have at least one row, column and channel, got shape {tuple(value.shape)}')
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must be positive and divide value's {channels} channels, got {groups}")
    if remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h == 1):
        raise ValueError(
            f'remove_center needs an odd square kernel_size of at least 3, got kernel_size ({kernel_h}, {kernel_w})'
        )
    out_h = output_size(height, kernel_h, stride_h, pad_h, dilation_h)
    out_w = output_size(width, kernel_w, stride_w, pad_w, dilation_w)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f'kernel_size ({kernel_h}, {kernel_w}) with dilation ({dilation_h}, {dilation_w}) and padding '
            f'({pad_h}, {pad_w}) does not fit into a value map of {height} x {width} pixels'
        )
    if tuple(offset_mask.shape[:3]) != (n, out_h, out_w):
        raise ValueError(
            f'offset_mask must have shape (N, Ho, Wo, P) = ({n}, {out_h}, {out_w}, P) for a value of shape '
            f'{tuple(value.shape)}, got {tuple(offset_mask.shape)}'
        )
    points = kernel_h * kernel_w - int(remove_center)
    if offset_mask.shape[3] < 3 * groups * points:
        raise ValueError(
            f'offset_mask needs at least 3 * groups * points = 3 * {groups} * {points} = {3 * groups * points} '
            f'channels, got {offset_mask.shape[3]}'
        )


def _fake(value, offset_mask, *geometry):
    return value.new_empty((*offset_mask.shape[:3], value.shape[3]))


register('dcnv4', tensors=2, fake=_fake)
