"""DCNv4 aggregation along sequences and through volumes."""

import math

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import reference
from ._dcnv4 import _DTYPES, _is_int, dcnv4, output_size
from ._library import chosen_backend


def dcnv4_1d(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """`dcnv4` along sequences: it is served by the two-dimensional operator, on every backend, as a map of one row.

    Args:
        value: (N, L, C), float64, float32, float16 or bfloat16.
        offset_mask: (N, Lo, P) with P >= 2 * groups * K, in value's dtype, or float32 beside a half value. Per group K
            offsets, then K modulation scalars. What lies behind the last group is ignored.
        groups: Number of groups of C / groups channels that share offsets.
        kernel_size: Points of the kernel's grid.
        stride: Step of the output grid.
        padding: Elements by which the grid starts outside the sequence.
        dilation: Distance of the grid's points.
        offset_scale: Factor on offsets and grid around the window's centre.
        remove_center: Leave out the central point (odd kernels of at least 3 only).
        softmax: Normalise each group's K scalars with a softmax first.

    Returns:
        (N, Lo, C), contiguous, in value's dtype.

    Raises:
        ValueError: A shape, device, size or group count does not fit.
        TypeError: A dtype or the type of an argument does not fit.
        RuntimeError: The backend asked for with `use_backend` is not available on value's device.
    """
    if has_torch_function((value, offset_mask)):
        return handle_torch_function(
            dcnv4_1d, (value, offset_mask), value, offset_mask, groups, kernel_size, stride, padding, dilation,
            offset_scale, remove_center, softmax,
        )  # fmt: skip
    (kernel,), (step,), (pad,), (distance,) = sizes = _sizes(1, kernel_size, stride, padding, dilation)
    points = _check(value, offset_mask, groups, sizes, offset_scale, remove_center)
    packed = offset_mask[..., : 2 * groups * points].unflatten(-1, (groups, 2 * points))
    offset, mask = packed.split(points, -1)
    if remove_center:
        # The operator leaves out the centre of square kernels only: here it stays, and counts as nothing.
        nothing = offset.new_zeros(()).expand(*offset.shape[:-1], 1)
        offset = torch.cat((offset[..., : kernel // 2], nothing, offset[..., kernel // 2 :]), -1)
        nothing = nothing - math.inf if softmax else nothing
        mask = torch.cat((mask[..., : kernel // 2], nothing, mask[..., kernel // 2 :]), -1)
    offset = torch.stack((offset, torch.zeros_like(offset)), -1).flatten(-2)
    row = torch.cat((offset, mask), -1).flatten(-2)
    out = dcnv4(
        value.unsqueeze(1),
        row.unsqueeze(1),
        groups=groups,
        kernel_size=(1, kernel),
        stride=(1, step),
        padding=(0, pad),
        dilation=(1, distance),
        offset_scale=offset_scale,
        softmax=softmax,
    )
    return out.squeeze(1)


def dcnv4_3d(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_size: int | tuple[int, int, int] = 3,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """`dcnv4` through volumes, by trilinear samples: the reference serves it on every device, there is no kernel.

    Sizes are ints or (depth, height, width) triples.

    Args:
        value: (N, D, H, W, C), float64, float32, float16 or bfloat16.
        offset_mask: (N, Do, Ho, Wo, P) with P >= 4 * groups * K, in value's dtype, or float32 beside a half value. Per
            group K triples (dx, dy, dz), points with x outermost and z innermost, then K modulation scalars. What lies
            behind the last group is ignored.
        groups: Number of groups of C / groups channels that share offsets.
        kernel_size: Points of the kernel's grid.
        stride: Step of the output grid in voxels of the value map.
        padding: Voxels by which the grid starts outside the map.
        dilation: Distance of the grid's points in voxels.
        offset_scale: Factor on offsets and grid around the window's centre.
        remove_center: Leave out the central point (odd cubic kernels of at least 3 only).
        softmax: Normalise each group's K scalars with a softmax first.

    Returns:
        (N, Do, Ho, Wo, C), contiguous, in value's dtype.

    Raises:
        ValueError: A shape, device, size or group count does not fit.
        TypeError: A dtype or the type of an argument does not fit.
        RuntimeError: A backend other than the reference is asked for with `use_backend`.
    """
    if has_torch_function((value, offset_mask)):
        return handle_torch_function(
            dcnv4_3d, (value, offset_mask), value, offset_mask, groups, kernel_size, stride, padding, dilation,
            offset_scale, remove_center, softmax,
        )  # fmt: skip
    sizes = _sizes(3, kernel_size, stride, padding, dilation)
    _check(value, offset_mask, groups, sizes, offset_scale, remove_center)
    if chosen_backend(value.device) not in (None, 'reference'):
        raise RuntimeError('dcnv4_3d has no other backend than the reference')
    return reference.dcnv4_nd(
        value, offset_mask, groups, *sizes, float(offset_scale), bool(remove_center), bool(softmax)
    )


def _sizes(dims: int, *sizes: object) -> tuple[tuple[int, ...], ...]:
    """kernel_size, stride, padding and dilation as tuples."""
    tuples = []
    for name, size, least in zip(('kernel_size', 'stride', 'padding', 'dilation'), sizes, (1, 1, 0, 1), strict=True):
        numbers = (size,) * dims if _is_int(size) else size
        if not isinstance(numbers, (tuple, list)) or len(numbers) != dims or not all(map(_is_int, numbers)):
            raise TypeError(f'{name} must be an int{f" or {dims} of them" if dims > 1 else ""}, got {size!r}')
        if min(numbers) < least:
            raise ValueError(f'{name} must be at least {least}, got {size!r}')
        tuples.append(tuple(numbers))
    return tuple(tuples)


def _check(value, offset_mask, groups, sizes, offset_scale, remove_center) -> int:
    """Raises ValueError or TypeError for arguments that do not fit; returns the number of points."""
    kernel_size = sizes[0]
    dims = len(kernel_size)
    axes = ('L', 'Lo') if dims == 1 else ('D, H, W', 'Do, Ho, Wo')
    for name, tensor, inner in (('value', value, f'{axes[0]}, C'), ('offset_mask', offset_mask, f'{axes[1]}, P')):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
        if tensor.ndim != dims + 2:
            raise ValueError(f'{name} must have {dims + 2} dimensions (N, {inner}), got shape {tuple(tensor.shape)}')
    if value.dtype not in _DTYPES:
        raise TypeError(f'value must be float64, float32, float16 or bfloat16, got {value.dtype}')
    half = value.dtype in (torch.float16, torch.bfloat16)
    if offset_mask.dtype != value.dtype and not (half and offset_mask.dtype == torch.float32):
        raise TypeError(f"offset_mask must have value's dtype, or float32 beside a half value, got {offset_mask.dtype}")
    if offset_mask.device != value.device:
        raise ValueError(f"offset_mask must be on value's device {value.device}, got {offset_mask.device}")
    if not isinstance(offset_scale, (int, float)) or isinstance(offset_scale, bool):
        raise TypeError(f'offset_scale must be a number, got {offset_scale!r}')
    if not _is_int(groups):
        raise TypeError(f'groups must be an int, got {groups!r}')
    if min(value.shape[1:]) < 1 or groups < 1 or value.shape[-1] % groups != 0:
        raise ValueError(
            f'value must have elements, and groups must divide its channels, got shape {tuple(value.shape)} and groups '
            f'{groups}'
        )
    if remove_center and (len(set(kernel_size)) > 1 or kernel_size[0] % 2 == 0 or kernel_size[0] == 1):
        raise ValueError(f'remove_center needs odd and equal sizes of the kernel of at least 3, got {kernel_size}')
    out = tuple(output_size(*numbers) for numbers in zip(value.shape[1:-1], *sizes, strict=True))
    if min(out) < 1:
        raise ValueError(f'kernel_size {kernel_size} does not fit into a value of shape {tuple(value.shape)}')
    points = math.prod(kernel_size) - int(remove_center)
    least = (dims + 1) * groups * points
    if tuple(offset_mask.shape[:-1]) != (value.shape[0], *out) or offset_mask.shape[-1] < least:
        raise ValueError(
            f'offset_mask must have shape {(value.shape[0], *out)} and at least {least} channels for a value of shape '
            f'{tuple(value.shape)}, got {tuple(offset_mask.shape)}'
        )
    return points
