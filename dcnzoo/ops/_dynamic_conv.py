"""Dynamic convolution: the public function, the one of a layer with its routing, and their checks."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import BroadcastingList2
from torch.overrides import handle_torch_function, has_torch_function

from ._dcnv4 import _is_int, _pair, output_size
from ._library import chosen_backend, exporting, missing
from ._linear import is_plain_call
from ._mixed_conv import convolve, convolve_mixed, samples_at_once, sum_over_taps

_AXES = {'x': '(N, C, H, W)', 'weight': '(E, Cout * C / groups * kh * kw)', 'routing': '(N, E)', 'bias': '(E, Cout)'}


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    kernel_size: BroadcastingList2[int] = 3,
    stride: BroadcastingList2[int] = 1,
    padding: BroadcastingList2[int] = 1,
    dilation: BroadcastingList2[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves each sample with its own mixture of expert kernels.

    The kernel of sample n is the sum over experts e of ``routing[n, e] * weight[e]``, as in
    `CondConv <https://arxiv.org/abs/1904.04971>`_ and `ParameterNet <https://arxiv.org/abs/2306.14525>`_.

    All but the first four arguments are passed by keyword; sizes are ints or (height, width) pairs.

    Args:
        x: Input, (N, C, H, W), contiguous or channels_last, of any floating dtype.
        weight: Kernels of the E experts, each flattened, (E, Cout * C / groups * kh * kw).
        routing: Share of each expert in each sample's kernel, (N, E).
        bias: Biases of the experts, (E, Cout), mixed as the kernels are; None for none.
        kernel_size: Size of the kernels.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input; or 'same' for as many as give ceil(H / stride) rows, an
            odd one below; or '' for as many on both sides, which is the same for odd kernels and stride 1. TorchScript
            takes no strings here.
        dilation: Distance of the kernel's taps in pixels.
        groups: Number of groups of channels that are convolved apart.

    Returns:
        The output, (N, Cout, Ho, Wo).

    Raises:
        ValueError: A shape, device, size or group count does not fit.
        TypeError: A dtype or the type of an argument does not fit.
    """
    if torch.jit.is_scripting():
        return convolve(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)
    else:
        return _dynamic_conv2d(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)


def _dynamic_conv2d(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups):
    operands = (x, weight, routing, bias)
    if has_torch_function(operands):
        return handle_torch_function(
            dynamic_conv2d,
            operands,
            *operands,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    kernel_size, stride = _pair('kernel_size', kernel_size, 1), _pair('stride', stride, 1)
    dilation = _pair('dilation', dilation, 1)
    tracing = torch.jit.is_tracing()
    if not tracing:  # a trace knows no sizes to check
        _check(x, weight, routing, bias, kernel_size, groups)
    if padding == 'same':
        x, padding = pad_same(x, kernel_size, stride, dilation), (0, 0)
    else:
        padding = symmetric_padding(kernel_size, stride, dilation) if padding == '' else _pair('padding', padding, 0)
    if not tracing:
        _check_fit(x, kernel_size, stride, padding, dilation)

    arguments = (x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)
    if exporting() and not _is_fixed(x.shape[0]):
        return sum_over_taps(*arguments)
    if tracing:
        return _scripted()(*arguments)
    return convolve(*arguments)


def serves_routed(
    x: Tensor,
    weight: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
) -> bool:
    """Whether `routed_conv2d` takes these: no gradients, where compiled operators are there and chosen.

    And kernels that are small, for several samples, which are convolved at once.
    """
    return (
        not torch.is_grad_enabled()
        and is_plain_call(x, weight)
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and chosen_backend(x.device) in (None, 'native')
        and missing('native') is None
        and (
            x.shape[0] == 1
            or (
                weight.numel() <= _FEW_NUMBERS
                and samples_at_once(x, weight, kernel_size, stride, padding, groups) == x.shape[0]
            )
        )
    )


def routed_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: tuple[Tensor, Tensor | None],
    temperature: float,
    softmax: bool,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """A dynamic convolution with its routing, for inference: `serves_routed` says where.

    Routing and mixing take microseconds there, of which most would go into calls.

    Args:
        x: Input, (N, C, H, W).
        weight: Kernels of the E experts, (E, Cout * C / groups * kh * kw).
        routing: Weight, (E, C), and bias, (E,) or None, of the linear map from x's average to the experts' logits.
        temperature: Divides the logits.
        softmax: Whether the shares of the experts are the logits' softmax, otherwise their sigmoid.
        kernel_size: Size of the kernels.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input.
        dilation: Distance of the kernel's taps in pixels.
        groups: Number of groups of channels that are convolved apart.

    Returns:
        The output, (N, Cout, Ho, Wo).
    """
    _check_fit(x, kernel_size, stride, padding, dilation)
    kernels = _mixed_kernels(x, *routing, weight, temperature, softmax)
    return convolve_mixed(x, kernels, None, kernel_size, stride, padding, dilation, groups)


_FEW_NUMBERS = 1 << 16  # of experts that the library reads anew for every sample
_mixed_kernels = torch.ops.dcnzoo.mixed_kernels.default


def pad_same(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Pads (N, C, H, W) with zeros such that a convolution has ceil(H / stride) rows; an odd row goes below."""
    height, width = x.shape[2], x.shape[3]
    rows = ((height + stride[0] - 1) // stride[0] - 1) * stride[0] + dilation[0] * (kernel_size[0] - 1) + 1 - height
    columns = ((width + stride[1] - 1) // stride[1] - 1) * stride[1] + dilation[1] * (kernel_size[1] - 1) + 1 - width
    rows, columns = max(rows, 0), max(columns, 0)
    return F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


def symmetric_padding(
    kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """timm's padding for '': as much on both sides as keeps the size at stride 1 and odd kernels."""
    height, width = (
        (step - 1 + distance * (size - 1)) // 2
        for size, step, distance in zip(kernel_size, stride, dilation, strict=True)
    )
    return height, width


def _is_fixed(size) -> bool:
    """Whether a size of a tensor is known while a graph is recorded, not a symbol or a traced value."""
    return isinstance(size, int) and not torch.jit.is_tracing()


@functools.cache
def _scripted():
    """The choice of the algorithm, compiled such that a trace keeps it instead of what it chose for its example."""
    return torch.jit.script(convolve)


def _check(x, weight, routing, bias, kernel_size, groups):
    """Raises ValueError or TypeError for tensors that do not fit together."""
    operands = (('x', x), ('weight', weight), ('routing', routing), ('bias', bias))
    for name, tensor in operands if bias is not None else operands[:3]:
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
        if not tensor.is_floating_point():
            raise TypeError(f'{name} must have a floating dtype, got {tensor.dtype}')
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.ndim != (4 if name == 'x' else 2):
            raise ValueError(f'{name} must have shape {_AXES[name]}, got {tuple(tensor.shape)}')

    n, channels, height, width = x.shape
    experts, count = weight.shape
    if not _is_int(groups):
        raise TypeError(f'groups must be an int, got {groups!r}')
    if height < 1 or width < 1 or channels < 1:
        raise ValueError(f'x must have at least one row, column and channel, got shape {tuple(x.shape)}')
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must be positive and divide x's {channels} channels, got {groups}")
    if routing.shape != (n, experts) or experts < 1:
        raise ValueError(
            f'routing must have shape (N, E) = ({n}, {experts}) for {n} samples and {experts} experts, '
            f'got {tuple(routing.shape)}'
        )
    per_channel = channels // groups * kernel_size[0] * kernel_size[1]
    if count < 1 or count % (per_channel * groups) != 0:
        raise ValueError(
            f'weight must have a multiple of C * kh * kw = {channels} * {kernel_size[0]} * {kernel_size[1]} columns '
            f'for x of shape {tuple(x.shape)} and {groups} groups, got shape {tuple(weight.shape)}'
        )
    if bias is not None and bias.shape != (experts, count // per_channel):
        raise ValueError(
            f'bias must have shape (E, Cout) = ({experts}, {count // per_channel}), got {tuple(bias.shape)}'
        )


def _check_fit(x, kernel_size, stride, padding, dilation):
    out_h = output_size(x.shape[2], kernel_size[0], stride[0], padding[0], dilation[0])
    out_w = output_size(x.shape[3], kernel_size[1], stride[1], padding[1], dilation[1])
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f'kernel_size {tuple(kernel_size)} with dilation {tuple(dilation)} and padding {tuple(padding)} does not '
            f'fit into an input of {x.shape[2]} x {x.shape[3]} pixels'
        )
