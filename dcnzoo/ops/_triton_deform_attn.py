"""Multi-scale deformable attention in Triton, for CUDA, ROCm and XPU.

One row of a program's tile is one query of one head; a row's channels are read at once. Sizes of the maps are read from
a small tensor, so that one compiled kernel serves images of every size.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import ARITHMETIC, INTERPRETED, OPTIONS, device_index, find_cell, scatter

_ROWS = 512 if INTERPRETED else 32  # of a tile; interpreted programs are slow whatever their size
_UNSPECIALIZED = ('pairs', 'pixels')


@triton.jit
def _rows(pairs, ROWS: tl.constexpr):
    """Image and pair (query, head) of every row of the program's tile, and which of them exist."""
    blocks = tl.cdiv(pairs, ROWS)
    pair = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    return (tl.program_id(0) // blocks).to(tl.int64), pair, pair < pairs


@triton.jit
def _place(locations, weights, sample, height, width, real, T: tl.constexpr):
    """Which rows have their sample near the map, its coordinates there, and its weight; 0 in the others."""
    x = tl.load(locations + 2 * sample, mask=real, other=0.0).to(T) * width.to(T) - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=real, other=0.0).to(T) * height.to(T) - 0.5
    weight = tl.load(weights + sample, mask=real, other=0.0).to(T)
    inside = real & (x > -1) & (x < width) & (y > -1) & (y < height)
    return inside, tl.where(inside, x, 0.0), tl.where(inside, y, 0.0), tl.where(inside, weight, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    value, locations, weights, shapes, out, pairs, value_n, value_s, value_m,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    n, pair, real = _rows(pairs, ROWS)
    d = tl.arange(0, LANES)[None, :]
    there = d < DEPTH
    head = value + n * value_n + ((pair % HEADS).to(INDEX) * value_m)[:, None] + d
    samples = (n * pairs + pair) * (LEVELS * POINTS)
    total = tl.zeros((ROWS, LANES), T)
    for level in tl.range(0, LEVELS):
        height, width = tl.load(shapes + 3 * level), tl.load(shapes + 3 * level + 1)
        maps = head + tl.load(shapes + 3 * level + 2).to(INDEX) * value_s
        for point in tl.range(0, POINTS):
            inside, x, y, weight = _place(
                locations, weights, samples + (level * POINTS + point), height, width, real, T
            )
            left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
            below = width.to(INDEX) * value_s
            corner = maps + ((top * width + left) * value_s)[:, None]
            v00 = tl.load(corner, mask=on00[:, None] & there, other=0.0).to(T)
            v01 = tl.load(corner + value_s, mask=on01[:, None] & there, other=0.0).to(T)
            v10 = tl.load(corner + below, mask=on10[:, None] & there, other=0.0).to(T)
            v11 = tl.load(corner + below + value_s, mask=on11[:, None] & there, other=0.0).to(T)
            total += v00 * ((1 - fx) * (1 - fy) * weight)[:, None]
            total += v01 * (fx * (1 - fy) * weight)[:, None]
            total += v10 * ((1 - fx) * fy * weight)[:, None]
            total += v11 * (fx * fy * weight)[:, None]
    out += ((n * pairs + pair) * DEPTH)[:, None] + d
    tl.store(out, total.to(out.dtype.element_ty), mask=real[:, None] & there)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kernel(
    grad_output, value, locations, weights, shapes, grad_value, grad_locations, grad_weights, pairs, pixels,
    value_n, value_s, value_m,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, SCATTER: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    n, pair, real = _rows(pairs, ROWS)
    d = tl.arange(0, LANES)[None, :]
    there = d < DEPTH
    m = (pair % HEADS).to(INDEX)[:, None]
    head = value + n * value_n + m * value_m + d
    grad_head = grad_value + n * pixels * (HEADS * DEPTH)
    channels = m * DEPTH + d
    grad = grad_output + ((n * pairs + pair) * DEPTH)[:, None] + d
    grad = tl.load(grad, mask=real[:, None] & there, other=0.0).to(T)
    samples = (n * pairs + pair) * (LEVELS * POINTS)
    ELEMENT: tl.constexpr = grad_weights.dtype.element_ty
    for level in tl.range(0, LEVELS):
        height, width = tl.load(shapes + 3 * level), tl.load(shapes + 3 * level + 1)
        start = tl.load(shapes + 3 * level + 2).to(INDEX)
        for point in tl.range(0, POINTS):
            sample = samples + (level * POINTS + point)
            inside, x, y, weight = _place(locations, weights, sample, height, width, real, T)
            left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
            on00, on01, on10, on11 = (
                on00[:, None] & there, on01[:, None] & there, on10[:, None] & there, on11[:, None] & there,
            )  # fmt: skip
            below = width.to(INDEX) * value_s
            corner = head + ((start + top * width + left) * value_s)[:, None]
            dot00 = tl.sum(grad * tl.load(corner, mask=on00, other=0.0).to(T), 1)
            dot01 = tl.sum(grad * tl.load(corner + value_s, mask=on01, other=0.0).to(T), 1)
            dot10 = tl.sum(grad * tl.load(corner + below, mask=on10, other=0.0).to(T), 1)
            dot11 = tl.sum(grad * tl.load(corner + below + value_s, mask=on11, other=0.0).to(T), 1)
            if SCATTER:
                level_grad = grad_head + start * (HEADS * DEPTH)
                scatter(
                    level_grad, grad, weight, left, top, fx, fy, on00, on01, on10, on11, width, channels, HEADS * DEPTH
                )
            grad_x = ((dot01 - dot00) * (1 - fy) + (dot11 - dot10) * fy) * (weight * width.to(T))
            grad_y = ((dot10 - dot00) * (1 - fx) + (dot11 - dot01) * fx) * (weight * height.to(T))
            grad_weight = (dot00 * (1 - fx) + dot01 * fx) * (1 - fy) + (dot10 * (1 - fx) + dot11 * fx) * fy
            # A gradient that is not finite must not reach samples that are nowhere.
            tl.store(grad_locations + 2 * sample, tl.where(inside, grad_x, 0.0).to(ELEMENT), mask=real)
            tl.store(grad_locations + 2 * sample + 1, tl.where(inside, grad_y, 0.0).to(ELEMENT), mask=real)
            tl.store(grad_weights + sample, tl.where(inside, grad_weight, 0.0).to(ELEMENT), mask=real)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _ordered_kernel(
    grad_output, locations, weights, shapes, grad_value, pairs, pixels, bands,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
    LANES: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradient of value in an order that does not change: a program owns some pixels of one head of an image.

    It goes through all queries in turn and adds what falls into its pixels, without atomic additions.
    """
    block = tl.program_id(0)
    band = (block % bands).to(tl.int64)
    first, last = band * pixels // bands, (band + 1) * pixels // bands
    m = block // bands % HEADS
    n = (block // bands // HEADS).to(tl.int64)
    one = tl.arange(0, 1)
    d = tl.arange(0, LANES)[None, :]
    there = d < DEPTH
    grad_head = grad_value + n * pixels * (HEADS * DEPTH) + m * DEPTH + d
    for query in tl.range(0, pairs // HEADS):
        pair = n * pairs + query * HEADS + m
        grad = tl.load(grad_output + pair * DEPTH + d, mask=there, other=0.0).to(T)
        for k in tl.range(0, LEVELS * POINTS):
            level = k // POINTS
            height, width = tl.load(shapes + 3 * level), tl.load(shapes + 3 * level + 1)
            start = tl.load(shapes + 3 * level + 2)
            sample = one + pair * (LEVELS * POINTS) + k
            inside, x, y, weight = _place(locations, weights, sample, height, width, one == 0, T)
            left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
            p00 = start + top * width + left
            p10 = p00 + width
            on00, on01 = on00 & (p00 >= first) & (p00 < last), on01 & (p00 + 1 >= first) & (p00 + 1 < last)
            on10, on11 = on10 & (p10 >= first) & (p10 < last), on11 & (p10 + 1 >= first) & (p10 + 1 < last)
            if tl.max((on00 | on01 | on10 | on11).to(tl.int32), 0) > 0:
                c00, c10 = grad_head + p00[:, None] * (HEADS * DEPTH), grad_head + p10[:, None] * (HEADS * DEPTH)
                c01, c11 = c00 + HEADS * DEPTH, c10 + HEADS * DEPTH
                m00, m01, m10, m11 = (
                    on00[:, None] & there, on01[:, None] & there, on10[:, None] & there, on11[:, None] & there,
                )  # fmt: skip
                s00 = tl.load(c00, mask=m00, other=0.0) + grad * ((1 - fx) * (1 - fy) * weight)[:, None]
                s01 = tl.load(c01, mask=m01, other=0.0) + grad * (fx * (1 - fy) * weight)[:, None]
                s10 = tl.load(c10, mask=m10, other=0.0) + grad * ((1 - fx) * fy * weight)[:, None]
                s11 = tl.load(c11, mask=m11, other=0.0) + grad * (fx * fy * weight)[:, None]
                tl.store(c00, s00, mask=m00)
                tl.store(c01, s01, mask=m01)
                tl.store(c10, s10, mask=m10)
                tl.store(c11, s11, mask=m11)
                tl.debug_barrier()  # the next sample may read what another thread has written


def deform_attn(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor, spatial_shapes: Sequence[int]
) -> Tensor:
    """Multi-scale deformable attention; arguments are those of `dcnzoo.ops.reference.deform_attn`, taken as checked."""
    value, locations, weights = _prepared(value, sampling_locations, attention_weights)
    n, queries, heads = locations.shape[:3]
    out = value.new_empty(n, queries, heads * value.shape[3])
    if out.numel() > 0:
        rows = _rows_of_tile(value)
        with torch.accelerator.device_index(device_index(value)):
            _forward_kernel[(n * triton.cdiv(queries * heads, rows),)](
                value, locations, weights, _levels(spatial_shapes, value.device), out, queries * heads,
                *value.stride()[:3], **_constants(value, locations), ROWS=rows, **OPTIONS,
            )  # fmt: skip
    return out


def deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    spatial_shapes: Sequence[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `deform_attn` with respect to its three tensors.

    Additions to value's gradient are atomic and their order varies, unless `deterministic` is set: then every part of
    the maps has one program that adds in a fixed order, which takes many times as long.
    """
    value, locations, weights = _prepared(value, sampling_locations, attention_weights)
    grad_output = grad_output.contiguous()
    n, queries, heads = locations.shape[:3]
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    dtype = torch.float32 if value.element_size() == 2 else value.dtype
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    if grad_output.numel() > 0:
        shapes, constants = _levels(spatial_shapes, value.device), _constants(value, locations)
        rows, pixels = _rows_of_tile(value), value.shape[1]
        with torch.accelerator.device_index(device_index(value)):
            _backward_kernel[(n * triton.cdiv(queries * heads, rows),)](
                grad_output, value, locations, weights, shapes, grad_value, grad_locations, grad_weights,
                queries * heads, pixels, *value.stride()[:3], **constants, ROWS=rows, SCATTER=not deterministic,
                **OPTIONS,
            )  # fmt: skip
            if deterministic:
                bands = min(pixels, triton.cdiv(1024, n * heads))
                _ordered_kernel[(n * heads * bands,)](
                    grad_output, locations, weights, shapes, grad_value, queries * heads, pixels, bands,
                    **constants, num_warps=1, **OPTIONS,
                )  # fmt: skip
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _prepared(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value if value.stride(3) == 1 else value.contiguous(), locations.contiguous(), weights.contiguous()


def _levels(spatial_shapes: Sequence[int], device: torch.device) -> Tensor:
    """Height, width and first pixel of each level."""
    rows, start = [], 0
    for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True):
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32 if start < 2**31 else torch.int64, device=device)


def _constants(value: Tensor, locations: Tensor) -> dict:
    """What kernels are compiled for."""
    span = max(
        sum(size * stride for size, stride in zip(value.shape[1:], value.stride()[1:], strict=True)), value[0].numel()
    )
    return {
        'HEADS': value.shape[2],
        'DEPTH': value.shape[3],
        'LEVELS': locations.shape[3],
        'POINTS': locations.shape[4],
        'LANES': triton.next_power_of_2(value.shape[3]),
        'INDEX': tl.int32 if span < 2**31 else tl.int64,
        'T': ARITHMETIC[value.dtype],
    }


def _rows_of_tile(value: Tensor) -> int:
    """For loads of 16 bytes a thread of four warps."""
    lanes = triton.next_power_of_2(value.shape[3])
    return max(1, min(_ROWS, 64 * _ROWS // value.element_size() // lanes))
