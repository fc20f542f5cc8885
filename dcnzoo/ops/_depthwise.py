"""Depthwise convolution with kernels of each sample's own, by the compiled library on a CPU.

PyTorch convolves so only with the samples side by side as channels, which moves every value of channels_last maps
before and after. Contiguous maps it takes as they are, but it prepares longer for a small one than it convolves, and of
large ones it makes copies, for which the system may hand out fresh pages each time.
"""

import torch
from torch import Tensor

from ._library import chosen_backend, missing
from ._linear import is_plain_call

_SMALL_MAP = 1 << 17  # values, up to which preparing is what counts
_SMALL_TRAINED_MAP = 1 << 15  # the same where gradients follow
_LARGE_MAPS = 1 << 21  # values, from which PyTorch's copies of contiguous maps are what counts
_VECTOR = 8  # channels, below which there is nothing to do side by side

_convolve = torch.ops.dcnzoo.depthwise.default
_convolve_planes = torch.ops.dcnzoo.depthwise_planes.default
_backward = torch.ops.dcnzoo.depthwise_backward.default


def serves_depthwise(x: Tensor, kernels: Tensor, groups: int) -> bool:
    """Whether `depthwise` takes these: a kernel for every channel, where the library is there and chosen.

    Args:
        x: Maps, (N, C, H, W).
        kernels: The samples' kernels, (N, K), or anything of their dtype and device.
        groups: Number of groups of channels that are convolved apart.
    """
    return (
        is_plain_call(x, kernels)  # first: while a graph is recorded, sizes are not to be compared
        and not torch.jit.is_tracing()
        and groups == x.shape[1]
        and x.numel() > 0
        and _gains(x, kernels)
        and chosen_backend(x.device) in (None, 'native')
        and missing('native') is None
    )


def _gains(x: Tensor, kernels: Tensor) -> bool:
    """Whether it is faster than PyTorch's convolution."""
    trained = _is_recorded(x, kernels)
    if x.shape[0] > 1:
        return _is_channels_last(x) or (x.is_contiguous() and not trained and x.numel() >= _LARGE_MAPS)
    if trained and _is_channels_last(x):
        return True
    packed = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    packed = packed and x.stride(0) == x.numel()  # of a map that stands for many, a convolution's output is contiguous
    return packed and x.shape[1] >= _VECTOR and x.numel() <= (_SMALL_TRAINED_MAP if trained else _SMALL_MAP)


def depthwise(
    x: Tensor, kernels: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Convolves every channel of every sample with a kernel of its own; `serves_depthwise` says where.

    Args:
        x: Maps, (N, C, H, W), contiguous or channels_last.
        kernels: Kernels, (N, C * kh * kw).
        kernel_size: Size of the kernels.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the maps.
        dilation: Distance of the kernel's taps in pixels.

    Returns:
        The output, (N, C, Ho, Wo), laid out as x.
    """
    window = (*kernel_size, *stride, *padding, *dilation)
    recorded = _is_recorded(x, kernels)
    if x.is_contiguous() and not recorded:
        return _convolve_planes(x, kernels, *window)
    pixels = x.permute(0, 2, 3, 1)
    out = _Depthwise.apply(pixels, kernels, window) if recorded else _convolve(pixels, kernels, *window)
    out = out.permute(0, 3, 1, 2)
    return out if _is_channels_last(x) else out.clone(memory_format=torch.contiguous_format)


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _is_recorded(x: Tensor, kernels: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, kernels, window):
        ctx.save_for_backward(pixels, kernels)
        ctx.window = window
        return _convolve(pixels, kernels, *window)

    @staticmethod
    def backward(ctx, grad):
        operands = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *_backward(grad, *operands, *ctx.window), None
        wanted = [operand for operand, needed in zip(operands, ctx.needs_input_grad, strict=False) if needed]
        found = torch.autograd.grad(_compose(*operands, *ctx.window), wanted, grad, create_graph=True)
        found = iter(found)
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None


def _compose(pixels, kernels, kernel_h, kernel_w, *geometry) -> Tensor:
    """The same of operations that can be differentiated as often as one likes."""
    n, height, width, channels = pixels.shape
    stride, padding, dilation = geometry[:2], geometry[2:4], geometry[4:]
    maps = pixels.permute(0, 3, 1, 2).reshape(1, n * channels, height, width)
    kernels = kernels.view(n * channels, 1, kernel_h, kernel_w)
    out = torch.nn.functional.conv2d(maps, kernels, None, stride, padding, dilation, n * channels)
    return out.view(n, channels, *out.shape[2:]).permute(0, 2, 3, 1)
