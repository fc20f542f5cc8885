"""How dynamic convolution is computed: compositions of standard operators, and the choice among them.

TorchScript compiles `convolve`, so that a traced or scripted module chooses anew for every input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dcnv4 import output_size
from ._depthwise import depthwise, serves_depthwise
from ._linear import ONEDNN_IS_WIDER, batched_linear, gains


def convolve(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolves a few samples after another where that keeps what it works on in the caches, otherwise all at once."""
    n, few = x.shape[0], x.shape[0]
    if n > 1 and x.device.type == 'cpu' and not _is_recorded():
        few = samples_at_once(x, weight, kernel_size, stride, padding, groups)
    if n <= few:
        return _convolve_together(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)
    outs: list[Tensor] = []
    for part, shares in zip(x.split(few), routing.split(few)):  # noqa: B905 - TorchScript's zip is never strict
        outs.append(_convolve_together(part, weight, shares, bias, kernel_size, stride, padding, dilation, groups))
    return torch.cat(outs)


def _convolve_together(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Mixes the kernels of all samples and convolves with them."""
    biases: Tensor | None = None
    if bias is not None:
        biases = torch.matmul(routing, bias)
    return convolve_mixed(x, torch.matmul(routing, weight), biases, kernel_size, stride, padding, dilation, groups)


def convolve_mixed(
    x: Tensor,
    kernels: Tensor,
    biases: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolves all samples, each with its kernel, by one operation, or by one each where that is faster."""
    n, channels = x.shape[0], x.shape[1]
    taps = kernel_size[0] * kernel_size[1]
    channels_last = _is_channels_last(x)
    out_channels = kernels.shape[1] * groups // (channels * taps)
    grouped = _gains_from_groups(x, out_channels, kernel_size, padding, groups)
    if not torch.jit.is_scripting():  # TorchScript compiles whatever stands behind an `and`
        if serves_depthwise(x, kernels, groups) and out_channels == channels:
            out = depthwise(x, kernels, kernel_size, stride, padding, dilation)
            return out if biases is None else out + biases[:, :, None, None]
        if not grouped and _multiplies_singly(x, kernels, kernel_size, stride, padding, groups):
            return _multiply_singly(x, kernels, biases, stride)

    # PyTorch's convolution of one large sample has faster gradients than its product of matrices. The size comes last:
    # while a graph is recorded, one that is compared with something is no longer free.
    alone = n == 1 and _is_trained(x) and not _is_recorded()
    alone = alone and x.shape[2] * x.shape[3] * kernels.shape[1] >= 1 << 23
    sliced = stride[0] > 1 or stride[1] > 1  # into sizes that a graph with free ones cannot compare with the output's
    alone = alone or (sliced and _is_exported())
    if not grouped and not alone and _is_matrix_product(kernel_size, padding, groups):
        if sliced:
            x = x[:, :, :: stride[0], :: stride[1]]
        height, width = x.shape[2], x.shape[3]
        kernels = kernels.view(n, out_channels, channels)
        if channels_last:
            pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
            if biases is None:
                out = torch.bmm(pixels, kernels.transpose(1, 2))
            else:
                out = torch.baddbmm(biases.unsqueeze(1), pixels, kernels.transpose(1, 2))
            return out.view(n, height, width, out_channels).permute(0, 3, 1, 2)
        if biases is None:
            out = torch.bmm(kernels, x.flatten(2))
        else:
            out = torch.baddbmm(biases.unsqueeze(2), kernels, x.flatten(2))
        return out.view(n, out_channels, height, width)

    if n <= 1:
        if n == 0:  # nothing to convolve, and still a graph for the gradients, which are zeros
            kernels = kernels.sum(0)
        kernel = kernels.view(out_channels, channels // groups, kernel_size[0], kernel_size[1])
        if biases is not None:
            biases = biases.sum(0)
        return F.conv2d(x, kernel, biases, stride, padding, dilation, groups)

    # Samples side by side as channels, each its own groups of one convolution.
    kernels = kernels.view(n * out_channels, channels // groups, kernel_size[0], kernel_size[1])
    if biases is not None:
        biases = biases.view(n * out_channels)
    if channels_last and groups == channels and not grouped:
        # Rows of n * channels values keep a depthwise convolution's fast layout: only whole pixels are moved.
        folded = x.permute(2, 3, 0, 1).reshape(1, x.shape[2], x.shape[3], n * channels).permute(0, 3, 1, 2)
    else:
        folded = x.reshape(1, n * channels, x.shape[2], x.shape[3])
    out = F.conv2d(folded, kernels, biases, stride, padding, dilation, n * groups)
    out = out.view(n, out_channels, out.shape[2], out.shape[3])
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _multiply_singly(x, kernels, biases, stride) -> Tensor:
    """One product per sample of its kernel and its pixels."""
    n, channels = x.shape[0], x.shape[1]
    channels_last = _is_channels_last(x)
    if stride[0] > 1 or stride[1] > 1:
        x = x[:, :, :: stride[0], :: stride[1]]
    height, width = x.shape[2], x.shape[3]
    kernels = kernels.view(n, -1, channels)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)
    out = batched_linear(pixels, kernels) if channels_last else batched_linear(kernels, pixels)
    if biases is not None:
        out = out + biases.unsqueeze(1 if channels_last else 2)
    if channels_last:
        return out.view(n, height, width, -1).permute(0, 3, 1, 2)
    return out.view(n, -1, height, width)


def _multiplies_singly(x, kernels, kernel_size, stride, padding, groups) -> bool:
    """Whether these are products of matrices that `linear` computes faster than PyTorch, which batches all of them."""
    n, threads = x.shape[0], _threads()
    if n < 1 or torch.jit.is_tracing() or not _is_matrix_product(kernel_size, padding, groups):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad):
        return False
    if n > 1 and (kernels.shape[1] < 1 << 17 or _is_channels_last(x)):
        return False  # a batch of products is as fast, and one call
    products = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1]) * kernels.shape[1]
    if n > 1 and threads > 1:  # they share out one product, or more easily a batch of them
        products //= 2 * threads
    return gains(x, kernels, products)


def samples_at_once(
    x: Tensor, weight: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], groups: int
) -> int:
    """How many samples to convolve at a time on a CPU, chosen by measurement with the layers of ParameterNet.

    The fewer, the more of the maps and of the mixed kernels stays in the caches, and from 32 MiB on the allocator asks
    the system for fresh pages each time; the more, the fewer calls and copies. Backwards there is more to hold.
    """
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    taps, kernel = kernel_size[0] * kernel_size[1], weight.shape[1]
    out_channels = kernel * groups // (channels * taps)
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript
        if serves_depthwise(x, weight, groups) and out_channels == channels:
            return n
    values = max(channels * pixels, out_channels * (pixels // (stride[0] * stride[1])))
    channels_last = _is_channels_last(x)
    multiplies = _is_matrix_product(kernel_size, padding, groups)
    copied = channels_last and not multiplies and not _gains_from_groups(x, out_channels, kernel_size, padding, groups)
    if not copied and n * values <= 1 << 23 and n * kernel <= (1 << 23 if _is_trained(x) else 1 << 22):
        return n
    if groups < channels and not multiplies and channels_last:
        return 1  # several would be copied to the other layout
    few = (3 << 19 if _is_trained(x) else 3 << 21) // values
    if multiplies:
        few = min(few, (1 << 21) // kernel)
    few = max(few, 2)
    parts = (n + few - 1) // few
    return (n + parts - 1) // parts


def _gains_from_groups(x: Tensor, out_channels: int, kernel_size: list[int], padding: list[int], groups: int) -> bool:
    """Whether samples as groups of one convolution of contiguous maps, which is timm's way, are fastest on a CPU.

    They are for small depthwise kernels, whose gradients take longer in channels_last, but for large maps, which would
    have to be copied; and for products with output channels that are no multiple of 4, but not for their gradients, and
    only where oneDNN convolves with wider vectors than MKL multiplies.
    """
    if x.shape[0] <= 1 or x.device.type != 'cpu' or x.dtype != torch.float32 or _is_recorded():
        return False
    channels_last, trained = _is_channels_last(x), _is_trained(x)
    if _is_matrix_product(kernel_size, padding, groups):
        return not channels_last and not trained and out_channels % 4 != 0 and _convolves_wider()
    fits = not channels_last or (trained and x.numel() <= 1 << 22)
    return fits and groups == x.shape[1] and kernel_size[0] * kernel_size[1] <= 9


def sum_over_taps(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups):
    """The convolution as one product per tap of the kernel, the same graph for every size of the batch.

    A convolution's number of groups is fixed in exported formats, so that samples cannot become groups there.
    """
    n, channels = x.shape[0], x.shape[1]
    kernel_h, kernel_w = kernel_size
    out_channels = weight.shape[1] * groups // (channels * kernel_h * kernel_w)
    out_h = output_size(x.shape[2], kernel_h, stride[0], padding[0], dilation[0])
    out_w = output_size(x.shape[3], kernel_w, stride[1], padding[1], dilation[1])
    kernels = torch.matmul(routing, weight)
    kernels = kernels.reshape(n, groups, out_channels // groups, channels // groups, kernel_h * kernel_w)
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    out = None
    for tap in range(kernel_h * kernel_w):
        top, left = tap // kernel_w * dilation[0], tap % kernel_w * dilation[1]
        window = _take(_take(x, 2, top, out_h, stride[0]), 3, left, out_w, stride[1])
        window = window.reshape(n, groups, channels // groups, out_h * out_w)
        kernel = kernels[..., tap]
        product = kernel * window if channels == groups else kernel @ window
        out = product if out is None else out + product
    out = out.reshape(n, out_channels, out_h, out_w)
    return out if bias is None else out + torch.matmul(routing, bias).reshape(n, out_channels, 1, 1)


def _take(x, dim, first, size, step):
    """Every step-th index from the first; by a slice, that many would be another formula, not known to be equal."""
    if step == 1:
        return x.narrow(dim, first, size)
    return x.index_select(dim, torch.arange(size, device=x.device) * step + first)


def _is_matrix_product(kernel_size: list[int], padding: list[int], groups: int) -> bool:
    return kernel_size[0] == 1 and kernel_size[1] == 1 and padding[0] == 0 and padding[1] == 0 and groups == 1


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()  # vmap cannot ask for a memory format


def _is_trained(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _convolves_wider() -> bool:
    if torch.jit.is_scripting():  # where it cannot be asked
        return True
    else:
        return ONEDNN_IS_WIDER


def _threads() -> int:
    """Threads of an eager operation; neither TorchScript nor torch.compile can ask."""
    if torch.jit.is_scripting() or _is_recorded():
        return 1
    else:
        return torch.get_num_threads()


def _is_recorded() -> bool:
    """Whether torch.compile or torch.export looks on, who would repeat a loop's body for every turn."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling()


def _is_exported() -> bool:
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_exporting()
