"""Dynamic convolution: the public function, its checks, and the choice among compositions of standard operators."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import BroadcastingList2
from torch.overrides import handle_torch_function, has_torch_function

from ._dcnv4 import _is_int, _pair, output_size
from ._library import chosen_backend, exporting, missing
from ._linear import batched_linear, gains, is_plain_call

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
        return _convolve(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)
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
        return _sum_over_taps(*arguments)
    if tracing:
        return _scripted()(*arguments)
    return _convolve(*arguments)


def serves_routed(x: Tensor, weight: Tensor) -> bool:
    """Whether `routed_conv2d` takes these: one sample, no gradients, where compiled operators are there and chosen."""
    return (
        not torch.is_grad_enabled()
        and is_plain_call(x, weight)
        and x.shape[0] == 1
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and chosen_backend(x.device) in (None, 'native')
        and missing('native') is None
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

    What a single sample is convolved with takes a few microseconds, of which most went into calls.

    Args:
        x: Input, (1, C, H, W).
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
        The output, (1, Cout, Ho, Wo).
    """
    _check_fit(x, kernel_size, stride, padding, dilation)
    kernels = _mixed_kernels(x, *routing, weight, temperature, softmax)
    return _convolve_mixed(x, kernels, None, kernel_size, stride, padding, dilation, groups)


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
    return torch.jit.script(_convolve)


def _convolve(
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
        few = _samples_at_once(x, weight, kernel_size, stride, padding, groups)
    if n <= few:
        return _convolve_together(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups)
    outs: list[Tensor] = []
    for part, shares in zip(x.split(few), routing.split(few)):  # noqa: B905 - TorchScript's zip is never strict
        outs.append(_convolve_together(part, weight, shares, bias, kernel_size, stride, padding, dilation, groups))
    return torch.cat(outs)


def _multiplies_singly(x, kernels, kernel_size, stride, padding, groups) -> bool:
    """Whether these are products of matrices that `linear` computes faster than PyTorch, which batches all of them."""
    n, threads = x.shape[0], _threads()
    if n < 1 or torch.jit.is_tracing() or not _is_matrix_product(kernel_size, padding, groups):
        return False
    products = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1]) * kernels.shape[1]
    if n > 1 and threads > 1:  # they share out one product, or more easily a batch of them
        products //= 2 * threads
    return gains(x, kernels, products)


def _mix(routing: Tensor, weight: Tensor) -> Tensor:
    """The samples' kernels, (N, E) @ (E, K) -> (N, K).

    For one sample BLAS reads the experts, which is all there is to it, with a single thread: give each a part of them.
    """
    if routing.shape[0] == 1 and weight.device.type == 'cpu' and weight.numel() >= 1 << 17:
        parts = math.gcd(_threads(), weight.shape[1])
        if parts > 1:
            experts = weight.view(weight.shape[0], parts, -1).transpose(0, 1)
            return torch.matmul(routing, experts).view(1, -1)
    return torch.matmul(routing, weight)


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


def _samples_at_once(
    x: Tensor, weight: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], groups: int
) -> int:
    """How many samples to convolve at a time on a CPU, chosen by measurement with the layers of ParameterNet.

    The fewer, the more of the maps and of the mixed kernels stays in the caches, and from 32 MiB on the allocator asks
    the system for fresh pages each time; the more, the fewer calls and copies. Backwards there is more to hold.
    """
    n, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    taps, kernel = kernel_size[0] * kernel_size[1], weight.shape[1]
    out_channels = kernel * groups // (channels * taps)
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
    elif taps > 9 and channels_last and _is_trained(x):
        few = 2  # the time of the kernels' gradient grows with the square of the channels
    few = max(few, 2)
    parts = (n + few - 1) // few
    return (n + parts - 1) // parts


def _gains_from_groups(x: Tensor, out_channels: int, kernel_size: list[int], padding: list[int], groups: int) -> bool:
    """Whether samples as groups of one convolution of contiguous maps, which is timm's way, are fastest on a CPU.

    With output channels that are no multiple of 4 oneDNN multiplies matrices there, a sample per thread; with others it
    takes kernels that groups make slow. The gradients of depthwise kernels take it longer in channels_last, but for
    large maps, which would have to be copied.
    """
    if x.shape[0] <= 1 or x.device.type != 'cpu' or x.dtype != torch.float32 or _is_recorded():
        return False
    fits = not _is_channels_last(x) or (_is_trained(x) and x.numel() <= 1 << 22)
    if _is_matrix_product(kernel_size, padding, groups):
        return fits and out_channels % 4 != 0
    return fits and groups == x.shape[1] and kernel_size[0] * kernel_size[1] <= 9


def _is_matrix_product(kernel_size: list[int], padding: list[int], groups: int) -> bool:
    return kernel_size[0] == 1 and kernel_size[1] == 1 and padding[0] == 0 and padding[1] == 0 and groups == 1


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()  # vmap cannot ask for a memory format


def _is_trained(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


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
    biases: Tensor | None = None
    if bias is not None:
        biases = torch.matmul(routing, bias)
    return _convolve_mixed(x, _mix(routing, weight), biases, kernel_size, stride, padding, dilation, groups)


def _convolve_mixed(
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
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles whatever stands behind an `and`
        if not grouped and _multiplies_singly(x, kernels, kernel_size, stride, padding, groups):
            return _multiply_singly(x, kernels, biases, stride)

    if not grouped and _is_matrix_product(kernel_size, padding, groups):
        if stride[0] > 1 or stride[1] > 1:
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


def _sum_over_taps(x, weight, routing, bias, kernel_size, stride, padding, dilation, groups):
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
        window = x[:, :, top : top + (out_h - 1) * stride[0] + 1, left : left + (out_w - 1) * stride[1] + 1]
        window = window[:, :, :: stride[0], :: stride[1]].reshape(n, groups, channels // groups, out_h * out_w)
        kernel = kernels[..., tap]
        product = kernel * window if channels == groups else kernel @ window
        out = product if out is None else out + product
    out = out.reshape(n, out_channels, out_h, out_w)
    return out if bias is None else out + torch.matmul(routing, bias).reshape(n, out_channels, 1, 1)


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
