"""The specification: every operator in plain PyTorch, for any dtype and device, differentiable twice.

The fast paths are tested against these functions, exporters see them instead of a custom operator, and they serve
where no fast path was built. They favour being read over being fast.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def dcnv4(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> Tensor:
    """DCNv4 aggregation (arXiv 2401.06197) by four gathers, one per bilinear corner.

    See `dcnzoo.ops.dcnv4` for the meaning of the arguments; here they are taken as checked. Half types are computed in
    float32.
    """
    dtype = _arithmetic(value.dtype)
    x, y, mask = sampling_points(
        offset_mask.to(dtype), groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        offset_scale, remove_center,
    )  # fmt: skip
    if softmax:
        mask = mask.softmax(-1)
    maps = _split_groups(value.to(dtype), groups)
    out = _sample(maps, x, y, mask, value.shape[1], value.shape[2], offset_mask.shape[:3])
    return out.flatten(3).to(value.dtype)


def dcnv4_backward(
    grad_output: Tensor,
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `dcnv4`, written out because a kernel below autograd cannot call autograd."""
    dtype = _arithmetic(value.dtype)
    n, height, width, channels = value.shape
    x, y, raw_mask = sampling_points(
        offset_mask.to(dtype), groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        offset_scale, remove_center,
    )  # fmt: skip
    normalised = raw_mask.softmax(-1) if softmax else raw_mask
    grad = _split_channels(grad_output.to(dtype), groups)
    grad_maps, grad_x, grad_y, grad_mask = _sample_backward(
        grad, _split_groups(value.to(dtype), groups), x, y, normalised, height, width
    )
    if softmax:
        grad_mask = normalised * (grad_mask - (normalised * grad_mask).sum(-1, keepdim=True))
    grad_offset = torch.stack((grad_x, grad_y), -1) * offset_scale
    packed = torch.cat((grad_offset.flatten(4), grad_mask), -1).flatten(3)
    grad_offset_mask = torch.nn.functional.pad(packed, (0, offset_mask.shape[3] - packed.shape[3]))
    grad_value = grad_maps.transpose(1, 2).reshape(n, height, width, channels)
    return grad_value.to(value.dtype), grad_offset_mask.to(offset_mask.dtype).contiguous()


def dcnv4_nd(
    value: Tensor,
    offset_mask: Tensor,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> Tensor:
    """`dcnv4` over maps (N, *size, C) of any number of dimensions d, by 2^d gathers.

    Per group offset_mask has K d-tuples (dx, dy, ...), points in x-outermost order, then K scalars. Sizes are given as
    shapes are, x last; the arguments are taken as checked. Half types are computed in float32.
    """
    dtype = _arithmetic(value.dtype)
    sizes, out_sizes = value.shape[1:-1], offset_mask.shape[1:-1]
    taps = list(itertools.product(*map(range, reversed(kernel_size))))
    if remove_center:
        taps.remove(tuple(kernel // 2 for kernel in reversed(kernel_size)))
    points, dims = len(taps), len(sizes)
    packed = offset_mask[..., : (dims + 1) * groups * points].to(dtype)
    packed = packed.reshape(value.shape[0], math.prod(out_sizes), 1, groups, (dims + 1) * points)
    offset, mask = packed[..., : dims * points].unflatten(-1, (points, dims)), packed[..., dims * points :]
    if softmax:
        mask = mask.softmax(-1)

    coordinates = []
    windows = torch.meshgrid(
        *(torch.arange(size, dtype=dtype, device=value.device) for size in out_sizes), indexing='ij'
    )
    for axis in range(dims):
        i = dims - 1 - axis  # offsets and taps begin with x
        center = (dilation[axis] * (kernel_size[axis] - 1)) >> 1
        window = windows[axis] * stride[axis] + (center - padding[axis] - center * offset_scale)
        tap = torch.tensor([tap[i] * dilation[axis] for tap in taps], dtype=dtype, device=value.device)
        coordinates.append(window.reshape(-1, 1, 1, 1) + (tap + offset[..., i]) * offset_scale)

    inside = torch.ones((), dtype=torch.bool, device=value.device)
    for coordinate, size in zip(coordinates, sizes, strict=True):
        inside = inside & (coordinate > -1) & (coordinate < size)
    coordinates = [torch.where(inside, coordinate, 0) for coordinate in coordinates]
    lows = [coordinate.detach().floor() for coordinate in coordinates]
    mask = torch.where(inside, mask, 0)
    maps = value.to(dtype).reshape(value.shape[0], math.prod(sizes), groups, value.shape[-1] // groups).transpose(1, 2)
    out = torch.zeros((), dtype=dtype, device=value.device)
    for corner in itertools.product((0, 1), repeat=dims):
        index, seen, weight = 0, inside, mask
        for high, coordinate, low, size in zip(corner, coordinates, lows, sizes, strict=True):
            pixel, fraction = low.long() + high, coordinate - low
            index, seen = index * size + pixel, seen & (pixel >= 0) & (pixel < size)
            weight = weight * (fraction if high else 1 - fraction)
        samples = _gather(maps, torch.where(seen, index, 0), seen, packed.shape[:3])
        out = out + (samples * weight.unsqueeze(-1)).sum(-2)
    return out.reshape(value.shape[0], *out_sizes, value.shape[-1]).to(value.dtype)


def deform_attn(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: Sequence[int]
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159), level by level, each like `dcnv4`.

    See `dcnzoo.ops.deform_attn` for the meaning of the arguments; here they are taken as checked, and spatial_shapes is
    flat: height and width of the first level, of the second, and so on. Half types are computed in float32.
    """
    dtype = _arithmetic(value.dtype)
    shape = (*sampling_locations.shape[:2], 1)
    out = torch.zeros((), dtype=dtype, device=value.device)
    for level, height, width, pixels in _levels(spatial_shapes):
        maps = value[:, pixels].to(dtype).transpose(1, 2)
        x, y = _level_points(sampling_locations[:, :, :, level].to(dtype), height, width)
        weights = attention_weights[:, :, None, :, level].to(dtype)
        out = out + _sample(maps, x, y, weights, height, width, shape)
    return out.flatten(2).to(value.dtype)


def deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    spatial_shapes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `deform_attn`, written out because a kernel below autograd cannot call autograd."""
    dtype = _arithmetic(value.dtype)
    grad = grad_output.to(dtype).unflatten(2, value.shape[2:]).unsqueeze(2)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    grad_locations = torch.empty_like(sampling_locations, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(attention_weights, memory_format=torch.contiguous_format)
    for level, height, width, pixels in _levels(spatial_shapes):
        maps = value[:, pixels].to(dtype).transpose(1, 2)
        x, y = _level_points(sampling_locations[:, :, :, level].to(dtype), height, width)
        weights = attention_weights[:, :, None, :, level].to(dtype)
        grad_maps, grad_x, grad_y, grad_mask = _sample_backward(grad, maps, x, y, weights, height, width)
        grad_value[:, pixels] = grad_maps.transpose(1, 2).to(value.dtype)
        grad_locations[:, :, :, level] = torch.stack((grad_x * width, grad_y * height), -1).squeeze(2)
        grad_weights[:, :, :, level] = grad_mask.squeeze(2)
    return grad_value, grad_locations, grad_weights


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Dynamic convolution: each sample's patches times its mixture of the expert kernels.

    See `dcnzoo.ops.dynamic_conv2d` for the meaning of the arguments; here they are taken as checked. Half types are
    computed in float32.
    """
    dtype = _arithmetic(x.dtype)
    n = x.shape[0]
    out_h, out_w = (
        (size + 2 * pad - (distance * (kernel - 1) + 1)) // step + 1
        for size, kernel, step, pad, distance in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    )
    columns = x.shape[1] // groups * kernel_size[0] * kernel_size[1]
    out_channels = weight.shape[1] // columns
    patches = torch.nn.functional.unfold(x.to(dtype), kernel_size, dilation, padding, stride)
    patches = patches.reshape(n, groups, columns, out_h * out_w)
    kernels = (routing.to(dtype) @ weight.to(dtype)).reshape(n, groups, out_channels // groups, columns)
    out = (kernels @ patches).reshape(n, out_channels, out_h, out_w)
    if bias is not None:
        out = out + (routing.to(dtype) @ bias.to(dtype)).reshape(n, out_channels, 1, 1)
    return out.to(x.dtype)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def sampling_points(
    offset_mask, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, offset_scale,
    remove_center,
):  # fmt: skip
    """Coordinates x, y in pixels and modulation of every sampling point, each (N, Ho, Wo, groups, K)."""
    n, out_h, out_w, _ = offset_mask.shape
    dtype, device = offset_mask.dtype, offset_mask.device
    taps = [
        (i, j)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (remove_center and i == kernel_w // 2 and j == kernel_h // 2)
    ]
    packed = offset_mask[..., : 3 * groups * len(taps)].reshape(n, out_h, out_w, groups, 3 * len(taps))
    offset = packed[..., : 2 * len(taps)].unflatten(-1, (len(taps), 2))

    # The scale acts around the window's centre, on the grid as well as on the offsets.
    center_x = (dilation_w * (kernel_w - 1)) >> 1
    center_y = (dilation_h * (kernel_h - 1)) >> 1
    tap_x = torch.tensor([i * dilation_w for i, _ in taps], dtype=dtype, device=device)
    tap_y = torch.tensor([j * dilation_h for _, j in taps], dtype=dtype, device=device)
    window_x = torch.arange(out_w, dtype=dtype, device=device) * stride_w + (center_x - pad_w - center_x * offset_scale)
    window_y = torch.arange(out_h, dtype=dtype, device=device) * stride_h + (center_y - pad_h - center_y * offset_scale)
    x = window_x.view(1, 1, out_w, 1, 1) + (tap_x + offset[..., 0]) * offset_scale
    y = window_y.view(1, out_h, 1, 1, 1) + (tap_y + offset[..., 1]) * offset_scale
    return x, y, packed[..., 2 * len(taps) :]


def _levels(spatial_shapes: Sequence[int]) -> Iterator[tuple[int, int, int, slice]]:
    """Number, height, width and pixels of each level, which lie one behind the other."""
    start = 0
    for level, (height, width) in enumerate(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)):
        yield level, height, width, slice(start, start + height * width)
        start = start + height * width


def _level_points(locations: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Coordinates in pixels, (N, queries, 1, heads, points), of locations (N, queries, heads, points, 2) in [0, 1]."""
    x, y = locations.unsqueeze(2).unbind(-1)
    return x * width - 0.5, y * height - 0.5


def _sample(maps, x, y, mask, height, width, shape) -> Tensor:
    """Sums of bilinear samples of maps (N, groups, height * width, D) at points (N, Ho, Wo, groups, K), times mask.

    The shape (N, Ho, Wo) is an input's own: ONNX's tracing exporter mistakes that of a computed tensor for a constant.

    Returns:
        (N, Ho, Wo, groups, D).
    """
    inside, x, y, mask = _keep_inside(x, y, mask, height, width)
    out = torch.zeros((), dtype=maps.dtype, device=maps.device)
    for index, seen, weight_x, weight_y, _, _ in _corners(inside, x, y, height, width):
        corner = _gather(maps, index, seen, shape)
        out = out + (corner * (weight_x * weight_y * mask).unsqueeze(-1)).sum(-2)
    return out


def _sample_backward(grad, maps, x, y, mask, height, width) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `_sample` with respect to maps, x, y and mask, from that of its output.

    The dot product of the output's gradient with each corner gives the gradients of mask and coordinates as scalar
    combinations; the map's gradient is scattered back through the same corners.
    """
    inside, x, y, mask = _keep_inside(x, y, mask, height, width)
    grad = grad.unsqueeze(-2)
    grad_maps = torch.zeros_like(maps)
    grad_x, grad_y, grad_mask = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(mask)
    for index, seen, weight_x, weight_y, slope_x, slope_y in _corners(inside, x, y, height, width):
        dot = (grad * _gather(maps, index, seen, x.shape[:3])).sum(-1)
        grad_x = grad_x + dot * slope_x * weight_y * mask
        grad_y = grad_y + dot * weight_x * slope_y * mask
        grad_mask = grad_mask + dot * weight_x * weight_y
        share = torch.where(seen.unsqueeze(-1), grad * (weight_x * weight_y * mask).unsqueeze(-1), 0)
        grad_maps = grad_maps.scatter_add(2, *_flatten_points(index, share))
    # A gradient that is not finite must not reach points that are nowhere.
    return grad_maps, *(torch.where(inside, part, 0) for part in (grad_x, grad_y, grad_mask))


def _keep_inside(x, y, mask, height, width):
    """Drops points outside (-1, width) x (-1, height) or not finite, before a NaN of theirs meets any arithmetic."""
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    return inside, torch.where(inside, x, 0), torch.where(inside, y, 0), torch.where(inside, mask, 0)


def _corners(inside, x, y, height, width):
    """Yields each bilinear corner: its pixel, whether it is on the map, its weights along x and y, and their slopes."""
    x0, y0 = x.detach().floor(), y.detach().floor()
    fraction_x, fraction_y = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    for below in (0, 1):
        for right in (0, 1):
            column, row = x0 + right, y0 + below
            seen = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            yield (
                torch.where(seen, row * width + column, 0),
                seen,
                fraction_x if right else 1 - fraction_x,
                fraction_y if below else 1 - fraction_y,
                1 if right else -1,
                1 if below else -1,
            )


def _split_channels(tensor: Tensor, groups: int) -> Tensor:
    return tensor.unflatten(3, (groups, tensor.shape[3] // groups))


def _split_groups(value: Tensor, groups: int) -> Tensor:
    """(N, H, W, C) -> (N, groups, H * W, D)."""
    return _split_channels(value, groups).flatten(1, 2).transpose(1, 2)


def _flatten_points(index: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """(N, Ho, Wo, groups, K) and (..., D) -> two of (N, groups, Ho * Wo * K, D)."""
    index = index.permute(0, 3, 1, 2, 4).flatten(2).unsqueeze(-1).expand(-1, -1, -1, share.shape[-1])
    return index, share.permute(0, 3, 1, 2, 4, 5).flatten(2, 4)


def _gather(maps: Tensor, index: Tensor, seen: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Channels of the pixels in index, (N, Ho, Wo, groups, K, D), zero where they are not seen."""
    groups, points, width = index.shape[3], index.shape[4], maps.shape[-1]
    index = index.permute(0, 3, 1, 2, 4).flatten(2).unsqueeze(-1).expand(-1, -1, -1, width)
    n, out_h, out_w = shape
    corner = maps.gather(2, index).reshape(n, groups, out_h, out_w, points, width).permute(0, 2, 3, 1, 4, 5)
    return torch.where(seen.unsqueeze(-1), corner, 0)
