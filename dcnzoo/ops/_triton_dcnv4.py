"""DCNv4 in Triton: a GPU path that needs no compiler at installation, on CUDA, ROCm and XPU.

One row of a program's tile is one output pixel of one group. A program holds a small rectangle of pixels, so that
neighbours share what they read through the cache, times a few groups, so that a row of threads reads whole cache lines.
A layer's geometry is constant in the compiled kernel, which keeps its floats exact; sizes and strides are arguments.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import ARITHMETIC, INTERPRETED, OPTIONS, device_index, find_cell, scatter

_UNSPECIALIZED = ('height', 'width', 'out_h', 'out_w')
_ROWS = 512 if INTERPRETED else 64  # of a tile; interpreted programs are slow whatever their size
# What matrix products are made in; the interpreter takes the bits of a bfloat16 for an integer.
_HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
_UNROLLED = 16  # kernels of more points run in a loop, for the compiler's sake


@triton.jit
def _rows(
    out_h, out_w, GROUPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_G: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Image, row, column and group of every row of the program's tile, and which of them exist."""
    rows = tl.arange(0, TILE_H * TILE_W * TILE_G)
    block = tl.program_id(0)
    blocks_g: tl.constexpr = (GROUPS + TILE_G - 1) // TILE_G
    g = block % blocks_g * TILE_G + rows % TILE_G
    block = block // blocks_g
    blocks_w = tl.cdiv(out_w, TILE_W)
    column = block % blocks_w * TILE_W + rows // TILE_G % TILE_W
    block = block // blocks_w
    blocks_h = tl.cdiv(out_h, TILE_H)
    row = block % blocks_h * TILE_H + rows // (TILE_G * TILE_W)
    n = (block // blocks_h).to(tl.int64)
    return n, row.to(INDEX), column.to(INDEX), g.to(INDEX), (row < out_h) & (column < out_w) & (g < GROUPS)


@triton.jit
def _softmax_terms(scalars, real, POINTS: tl.constexpr, T: tl.constexpr):
    """The two numbers a row that make exp(m - highest) * factor the softmax of its POINTS scalars."""
    points = tl.arange(0, triton.next_power_of_2(POINTS))[None, :]
    m = tl.load(scalars[:, None] + points, mask=real[:, None] & (points < POINTS), other=0.0).to(T)
    m = tl.where(points < POINTS, m, -float('inf'))
    highest = tl.max(m, 1)
    return highest, 1.0 / tl.sum(tl.exp(m - highest[:, None]), 1)


@triton.jit
def _position(
    packed, k, x0, y0, height, width, real,
    KERNEL_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, SCALE: tl.constexpr,
    SKIPPED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Where sampling point k lies: which rows have it near the map, and its coordinates, 0 in the others."""
    cell = k + (k >= SKIPPED)
    dx = tl.load(packed + 2 * k, mask=real, other=0.0).to(T)
    dy = tl.load(packed + 2 * k + 1, mask=real, other=0.0).to(T)
    scale = tl.full((), SCALE, T)
    x = x0 + (dx + cell // KERNEL_H * DILATION_W) * scale
    y = y0 + (dy + cell % KERNEL_H * DILATION_H) * scale
    inside = real & (x > -1) & (x < width) & (y > -1) & (y < height)
    return inside, tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)


@triton.jit
def _modulation(scalars, k, real, highest, factor, SOFTMAX: tl.constexpr, T: tl.constexpr):
    m = tl.load(scalars + k, mask=real, other=0.0).to(T)
    if SOFTMAX:
        m = tl.exp(m - highest) * factor
    return m


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    value, offset_mask, out, height, width, out_h, out_w, value_n, value_h, value_w, packed_n, packed_h, packed_w,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_G: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    n, row, column, g, real = _rows(out_h, out_w, GROUPS, TILE_H, TILE_W, TILE_G, INDEX)
    d = tl.arange(0, LANES)
    channels = g[:, None] * DEPTH + d[None, :]
    packed = offset_mask + n * packed_n + (row * packed_h + column * packed_w + g * (3 * POINTS))
    value += n * value_n
    x0 = (column * STRIDE_W).to(T) + tl.full((), ORIGIN_W, T)
    y0 = (row * STRIDE_H).to(T) + tl.full((), ORIGIN_H, T)
    highest, factor = 0.0, 1.0
    if SOFTMAX:
        highest, factor = _softmax_terms(packed + 2 * POINTS, real, POINTS, T)
    total = tl.zeros((TILE_H * TILE_W * TILE_G, LANES), T)
    for start in tl.range(0, POINTS, UNROLL):
        for step in tl.static_range(UNROLL):
            k = start + step
            inside, x, y = _position(
                packed, k, x0, y0, height, width, real, KERNEL_H, DILATION_H, DILATION_W, SCALE, SKIPPED, T
            )
            m = _modulation(packed + 2 * POINTS, k, real, highest, factor, SOFTMAX, T)
            m = tl.where(inside, m, 0.0)
            left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
            corner = value + ((top * value_h + left * value_w)[:, None] + channels)
            there = d[None, :] < DEPTH
            v00 = tl.load(corner, mask=on00[:, None] & there, other=0.0).to(T)
            v01 = tl.load(corner + value_w, mask=on01[:, None] & there, other=0.0).to(T)
            v10 = tl.load(corner + value_h, mask=on10[:, None] & there, other=0.0).to(T)
            v11 = tl.load(corner + value_h + value_w, mask=on11[:, None] & there, other=0.0).to(T)
            total += v00 * ((1 - fx) * (1 - fy) * m)[:, None]
            total += v01 * (fx * (1 - fy) * m)[:, None]
            total += v10 * ((1 - fx) * fy * m)[:, None]
            total += v11 * (fx * fy * m)[:, None]
    pixel = (n * out_h + row) * out_w + column
    out += pixel[:, None] * (GROUPS * DEPTH) + channels
    tl.store(out, total.to(out.dtype.element_ty), mask=real[:, None] & (d < DEPTH)[None, :])


@triton.jit
def _tap_gradients(
    grad, value, grad_value, packed, k, x0, y0, height, width, value_h, value_w, real, channels, d, highest, factor,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    SCATTER: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of point k's offsets and modulation, before the softmax's own; adds its share to the value map's."""
    inside, x, y = _position(
        packed, k, x0, y0, height, width, real, KERNEL_H, DILATION_H, DILATION_W, SCALE, SKIPPED, T
    )
    p = _modulation(packed + 2 * POINTS, k, real, highest, factor, SOFTMAX, T)
    m = tl.where(inside, p, 0.0)
    left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
    corner = value + ((top * value_h + left * value_w)[:, None] + channels)
    there = (d < DEPTH)[None, :]
    on00, on01, on10, on11 = on00[:, None] & there, on01[:, None] & there, on10[:, None] & there, on11[:, None] & there
    dot00 = tl.sum(grad * tl.load(corner, mask=on00, other=0.0).to(T), 1)
    dot01 = tl.sum(grad * tl.load(corner + value_w, mask=on01, other=0.0).to(T), 1)
    dot10 = tl.sum(grad * tl.load(corner + value_h, mask=on10, other=0.0).to(T), 1)
    dot11 = tl.sum(grad * tl.load(corner + value_h + value_w, mask=on11, other=0.0).to(T), 1)
    if SCATTER:
        scatter(grad_value, grad, m, left, top, fx, fy, on00, on01, on10, on11, width, channels, GROUPS * DEPTH)
    scale = tl.full((), SCALE, T)
    grad_x = ((dot01 - dot00) * (1 - fy) + (dot11 - dot10) * fy) * (m * scale)
    grad_y = ((dot10 - dot00) * (1 - fx) + (dot11 - dot01) * fx) * (m * scale)
    grad_m = (dot00 * (1 - fx) + dot01 * fx) * (1 - fy) + (dot10 * (1 - fx) + dot11 * fx) * fy
    # A gradient that is not finite must not reach points that are nowhere.
    return tl.where(inside, grad_x, 0.0), tl.where(inside, grad_y, 0.0), tl.where(inside, grad_m, 0.0), p


@triton.jit
def _stack(columns, COUNT: tl.constexpr):
    """COUNT tensors of R numbers, a power of two up to 64, as one of (R, COUNT)."""
    for level in tl.static_range(1, 7):
        if COUNT >> level > 0:
            pairs = ()
            for i in tl.static_range(COUNT >> level):
                pairs += (tl.join(columns[i], columns[i + (COUNT >> level)]),)
            columns = pairs
    return columns[0].reshape(columns[0].shape[0], COUNT)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kernel(
    grad_output, value, offset_mask, grad_value, grad_packed, height, width, out_h, out_w,
    grad_n, grad_h, grad_w, value_n, value_h, value_w, packed_n, packed_h, packed_w, packed_channels,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_G: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    SCATTER: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    n, row, column, g, real = _rows(out_h, out_w, GROUPS, TILE_H, TILE_W, TILE_G, INDEX)
    d = tl.arange(0, LANES)
    channels = g[:, None] * DEPTH + d[None, :]
    packed = offset_mask + n * packed_n + (row * packed_h + column * packed_w + g * (3 * POINTS))
    grad = grad_output + n * grad_n + ((row * grad_h + column * grad_w)[:, None] + channels)
    grad = tl.load(grad, mask=real[:, None] & (d < DEPTH)[None, :], other=0.0).to(T)
    value += n * value_n
    grad_value += n * height * width * (GROUPS * DEPTH)
    x0 = (column * STRIDE_W).to(T) + tl.full((), ORIGIN_W, T)
    y0 = (row * STRIDE_H).to(T) + tl.full((), ORIGIN_H, T)
    grad_packed += ((n * out_h + row) * out_w + column) * packed_channels + g * (3 * POINTS)
    ELEMENT: tl.constexpr = grad_packed.dtype.element_ty
    highest, factor, total = 0.0, 1.0, tl.zeros((TILE_H * TILE_W * TILE_G,), T)
    if SOFTMAX:
        highest, factor = _softmax_terms(packed + 2 * POINTS, real, POINTS, T)

    if UNROLL == POINTS:
        # The numbers of a row are collected, so that the tile goes out in whole lines.
        offsets, scalars, shares = (), (), ()
        for k in tl.static_range(POINTS):
            grad_x, grad_y, grad_m, p = _tap_gradients(
                grad, value, grad_value, packed, k, x0, y0, height, width, value_h, value_w, real, channels, d,
                highest, factor, DEPTH, GROUPS, KERNEL_H, POINTS, SKIPPED, DILATION_H, DILATION_W, SCALE, SOFTMAX,
                SCATTER, INDEX, T,
            )  # fmt: skip
            offsets += (grad_x.to(ELEMENT), grad_y.to(ELEMENT))
            scalars += (grad_m,)
            shares += (p,)
            total += p * grad_m
        columns = offsets
        for k in tl.static_range(POINTS):
            if SOFTMAX:
                columns += ((shares[k] * (scalars[k] - total)).to(ELEMENT),)
            else:
                columns += (scalars[k].to(ELEMENT),)
        COLUMNS: tl.constexpr = triton.next_power_of_2(3 * POINTS)
        for _ in tl.static_range(COLUMNS - 3 * POINTS):
            columns += (columns[0],)
        tile = _stack(columns, COLUMNS)
        column_index = tl.arange(0, COLUMNS)[None, :]
        tl.store(grad_packed[:, None] + column_index, tile, mask=real[:, None] & (column_index < 3 * POINTS))
    else:
        if SOFTMAX:
            for k in tl.range(0, POINTS):
                _, _, grad_m, p = _tap_gradients(
                    grad, value, grad_value, packed, k, x0, y0, height, width, value_h, value_w, real, channels, d,
                    highest, factor, DEPTH, GROUPS, KERNEL_H, POINTS, SKIPPED, DILATION_H, DILATION_W, SCALE, SOFTMAX,
                    False, INDEX, T,
                )  # fmt: skip
                total += p * grad_m
        for k in tl.range(0, POINTS):
            grad_x, grad_y, grad_m, p = _tap_gradients(
                grad, value, grad_value, packed, k, x0, y0, height, width, value_h, value_w, real, channels, d,
                highest, factor, DEPTH, GROUPS, KERNEL_H, POINTS, SKIPPED, DILATION_H, DILATION_W, SCALE, SOFTMAX,
                SCATTER, INDEX, T,
            )  # fmt: skip
            if SOFTMAX:
                grad_m = p * (grad_m - total)
            tl.store(grad_packed + 2 * k, grad_x.to(ELEMENT), mask=real)
            tl.store(grad_packed + 2 * k + 1, grad_y.to(ELEMENT), mask=real)
            tl.store(grad_packed + 2 * POINTS + k, grad_m.to(ELEMENT), mask=real)


@triton.jit
def _near(dx, dy, m, finite, MARGIN_H: tl.constexpr, MARGIN_W: tl.constexpr, SCALE: tl.constexpr):
    """Points that cannot leave the program's window, of numbers that half a float can hold; rounding has no say."""
    return (tl.abs(dx) < MARGIN_W / SCALE) & (tl.abs(dy) < MARGIN_H / SCALE) & (tl.abs(m) <= 2048) & finite


@triton.jit
def _scatter_far(
    grad_output, offset_mask, grad_value, count, first_row, first_column, height, width, out_h, out_w,
    grad_h, grad_w, packed_h, packed_w, d,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    MARGIN_H: tl.constexpr, MARGIN_W: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Scatters the shares of the points that are not near, of 8 x 8 output pixels.

    The loop over points runs to `count`, which is POINTS, unknown to the compiler: unrolled, it would take registers
    from the part of the kernel that matters.
    """
    pixel = tl.arange(0, 64)
    row, column = first_row + pixel // 8, first_column + pixel % 8
    real = (row < out_h) & (column < out_w)
    packed = offset_mask + (row * packed_h + column * packed_w)
    there = d < DEPTH
    grad = grad_output + (row * grad_h + column * grad_w)[:, None] + d
    grad = tl.load(grad, mask=real[:, None] & there, other=0.0).to(T)
    finite = tl.sum(grad * 0.0, 1) == 0.0
    x0 = (column * STRIDE_W).to(T) + tl.full((), ORIGIN_W, T)
    y0 = (row * STRIDE_H).to(T) + tl.full((), ORIGIN_H, T)
    highest, factor = 0.0, 1.0
    if SOFTMAX:
        highest, factor = _softmax_terms(packed + 2 * POINTS, real, POINTS, T)
    for k in tl.range(0, count):
        inside, x, y = _position(
            packed, k, x0, y0, height, width, real, KERNEL_H, DILATION_H, DILATION_W, SCALE, SKIPPED, T
        )
        m = _modulation(packed + 2 * POINTS, k, real, highest, factor, SOFTMAX, T)
        dx = tl.load(packed + 2 * k, mask=real, other=0.0).to(T)
        dy = tl.load(packed + 2 * k + 1, mask=real, other=0.0).to(T)
        inside = inside & (_near(dx, dy, m, finite, MARGIN_H, MARGIN_W, SCALE) == 0)
        if tl.max(inside.to(tl.int32), 0) > 0:
            left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
            on00, on01 = on00[:, None] & there, on01[:, None] & there
            on10, on11 = on10[:, None] & there, on11[:, None] & there
            scatter(grad_value, grad, m, left, top, fx, fy, on00, on01, on10, on11, width, d, GROUPS * DEPTH)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _window_kernel(
    grad_output, offset_mask, grad_value, height, width, out_h, out_w,
    grad_n, grad_h, grad_w, packed_n, packed_h, packed_w,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    LANES: tl.constexpr, MARGIN_H: tl.constexpr, MARGIN_W: tl.constexpr, INDEX: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradient of a half value map, summed by matrix products before it meets other programs' shares.

    A program takes 8 x 8 output pixels of one group. What their points touch nearly always lies in a window of 16 x 16
    pixels of the map, over which the bilinear weight of a pixel is a product of two hat functions: one small matrix
    product an output pixel sums them over the points, another one applies the sums to the output's gradient, and one
    atomic addition a pixel of the window is left. The few other points go the way of the general kernel.
    """
    T: tl.constexpr = tl.float32
    block = tl.program_id(0)
    g = (block % GROUPS).to(INDEX)
    block = block // GROUPS
    blocks_w = tl.cdiv(out_w, 8)
    first_column = (block % blocks_w * 8).to(INDEX)
    block = block // blocks_w
    blocks_h = tl.cdiv(out_h, 8)
    first_row = (block % blocks_h * 8).to(INDEX)
    n = (block // blocks_h).to(tl.int64)
    grad_output += n * grad_n + g * DEPTH
    offset_mask += n * packed_n + g * (3 * POINTS)
    grad_value += n * height * width * (GROUPS * DEPTH) + g * DEPTH

    window_x = tl.floor((first_column * STRIDE_W).to(T) + tl.full((), ORIGIN_W - MARGIN_W, T))
    window_y = tl.floor((first_row * STRIDE_H).to(T) + tl.full((), ORIGIN_H - MARGIN_H, T))
    d = tl.arange(0, LANES)[None, :]
    axis = tl.arange(0, 16)
    k = axis[None, :]
    cell = k + (k >= SKIPPED)
    scale = tl.full((), SCALE, T)
    sums = tl.zeros((256, LANES), T)
    rest = 0
    for start in tl.range(0, 64, 16):
        pixel = start + tl.arange(0, 16)
        row, column = first_row + pixel // 8, first_column + pixel % 8
        real = (row < out_h) & (column < out_w)
        packed = offset_mask + (row * packed_h + column * packed_w)[:, None]
        grad = grad_output + (row * grad_h + column * grad_w)[:, None] + d
        grad = tl.load(grad, mask=real[:, None] & (d < DEPTH), other=0.0)
        finite = tl.sum(grad.to(T) * 0.0, 1) == 0.0
        points = real[:, None] & (k < POINTS)
        dx = tl.load(packed + 2 * k, mask=points, other=0.0).to(T)
        dy = tl.load(packed + 2 * k + 1, mask=points, other=0.0).to(T)
        m = tl.load(packed + (2 * POINTS + k), mask=points, other=0.0).to(T)
        if SOFTMAX:
            m = tl.where(k < POINTS, m, -float('inf'))
            m = tl.exp(m - tl.max(m, 1)[:, None])
            m /= tl.sum(m, 1)[:, None]
        x0 = (column * STRIDE_W).to(T) + tl.full((), ORIGIN_W, T)
        y0 = (row * STRIDE_H).to(T) + tl.full((), ORIGIN_H, T)
        x = x0[:, None] + (dx + cell // KERNEL_H * DILATION_W) * scale
        y = y0[:, None] + (dy + cell % KERNEL_H * DILATION_H) * scale
        near = _near(dx, dy, m, finite[:, None], MARGIN_H, MARGIN_W, SCALE)
        rest = tl.maximum(rest, tl.max(tl.max((points & (near == 0)).to(tl.int32), 1), 0))
        inside = points & near & (x > -1) & (x < width) & (y > -1) & (y < height)
        from_left, from_top = tl.where(inside, x - window_x, 0.0), tl.where(inside, y - window_y, 0.0)
        # Along the window first: a thread of the default layout then has few points of its own, and all of the window.
        hat_x = tl.maximum(1 - tl.abs(from_left[None, :, :] - axis[:, None, None]), 0.0)
        hat_y = tl.maximum(1 - tl.abs(from_top[None, :, :] - axis[:, None, None]), 0.0)
        hat_y *= tl.where(inside, m, 0.0)[None, :, :]
        weights = tl.dot(tl.permute(hat_y.to(tl.float16), (1, 0, 2)), tl.permute(hat_x.to(tl.float16), (1, 2, 0)))
        weights = tl.trans(tl.reshape(weights, (16, 256))).to(HALF)
        sums = tl.dot(weights, tl.where(finite[:, None], grad, 0.0).to(HALF), sums)

    place = tl.arange(0, 256)
    row, column = window_y.to(INDEX) + place // 16, window_x.to(INDEX) + place % 16
    touched = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (tl.max(tl.abs(sums), 1) > 0)
    cells = grad_value + (row * width + column)[:, None] * (GROUPS * DEPTH) + d
    tl.atomic_add(cells, sums, mask=touched[:, None] & (d < DEPTH), sem='relaxed')

    if rest > 0:
        _scatter_far(
            grad_output, offset_mask, grad_value, POINTS * rest, first_row, first_column, height, width, out_h, out_w,
            grad_h, grad_w, packed_h, packed_w, d, GROUPS, DEPTH, KERNEL_H, POINTS, SKIPPED, STRIDE_H, STRIDE_W,
            DILATION_H, DILATION_W, ORIGIN_H, ORIGIN_W, SCALE, SOFTMAX, MARGIN_H, MARGIN_W, INDEX, T,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _ordered_kernel(
    grad_output, offset_mask, grad_value, height, width, out_h, out_w, bands,
    grad_n, grad_h, grad_w, packed_n, packed_h, packed_w,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr, POINTS: tl.constexpr, SKIPPED: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ORIGIN_H: tl.constexpr, ORIGIN_W: tl.constexpr, SCALE: tl.constexpr, SOFTMAX: tl.constexpr,
    LANES: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradient of the value map in an order that does not change: a program owns some rows of one group of an image.

    It goes through all output pixels in turn and adds what falls into its rows, without atomic additions.
    """
    block = tl.program_id(0)
    band = (block % bands).to(tl.int64)
    first, last = band * height // bands, (band + 1) * height // bands
    g = (block // bands % GROUPS).to(INDEX)
    n = (block // bands // GROUPS).to(tl.int64)
    one = tl.arange(0, 1)
    d = tl.arange(0, LANES)[None, :]
    there = d < DEPTH
    real = one == 0
    grad_value += n * height * width * (GROUPS * DEPTH) + g * DEPTH
    for pixel in tl.range(0, out_h * out_w):
        row, column = (one + pixel // out_w).to(INDEX), (one + pixel % out_w).to(INDEX)
        packed = offset_mask + n * packed_n + (row * packed_h + column * packed_w + g * (3 * POINTS))
        grad = grad_output + n * grad_n + ((row * grad_h + column * grad_w + g * DEPTH)[:, None] + d)
        grad = tl.load(grad, mask=there, other=0.0).to(T)
        x0 = (column * STRIDE_W).to(T) + tl.full((), ORIGIN_W, T)
        y0 = (row * STRIDE_H).to(T) + tl.full((), ORIGIN_H, T)
        highest, factor = 0.0, 1.0
        if SOFTMAX:
            highest, factor = _softmax_terms(packed + 2 * POINTS, real, POINTS, T)
        for k in tl.range(0, POINTS):
            inside, x, y = _position(
                packed, k, x0, y0, height, width, real, KERNEL_H, DILATION_H, DILATION_W, SCALE, SKIPPED, T
            )
            inside = inside & (y >= first - 1) & (y < last)
            if tl.max(inside.to(tl.int32), 0) > 0:
                m = _modulation(packed + 2 * POINTS, k, real, highest, factor, SOFTMAX, T)
                left, top, fx, fy, on00, on01, on10, on11 = find_cell(x, y, height, width, inside, INDEX)
                above, below = (top >= first) & (top < last), (top + 1 >= first) & (top + 1 < last)
                on00, on01 = (on00 & above)[:, None] & there, (on01 & above)[:, None] & there
                on10, on11 = (on10 & below)[:, None] & there, (on11 & below)[:, None] & there
                c00 = grad_value + ((top * width + left)[:, None] * (GROUPS * DEPTH) + d)
                c01 = c00 + GROUPS * DEPTH
                c10, c11 = c00 + width.to(INDEX) * (GROUPS * DEPTH), c01 + width.to(INDEX) * (GROUPS * DEPTH)
                s00 = tl.load(c00, mask=on00, other=0.0) + grad * ((1 - fx) * (1 - fy) * m)[:, None]
                s01 = tl.load(c01, mask=on01, other=0.0) + grad * (fx * (1 - fy) * m)[:, None]
                s10 = tl.load(c10, mask=on10, other=0.0) + grad * ((1 - fx) * fy * m)[:, None]
                s11 = tl.load(c11, mask=on11, other=0.0) + grad * (fx * fy * m)[:, None]
                tl.store(c00, s00, mask=on00)
                tl.store(c01, s01, mask=on01)
                tl.store(c10, s10, mask=on10)
                tl.store(c11, s11, mask=on11)
                tl.debug_barrier()  # the next point may read what another thread has written


def dcnv4(value: Tensor, offset_mask: Tensor, *arguments) -> Tensor:
    """DCNv4 aggregation; arguments are those of `dcnzoo.ops.reference.dcnv4`, taken as checked."""
    value, offset_mask = _channels_contiguous(value), _channels_contiguous(offset_mask)
    n, out_h, out_w, _ = offset_mask.shape
    _, height, width, channels = value.shape
    out = value.new_empty(n, out_h, out_w, channels)
    constants = _constants(value, *arguments)
    tile = _tile(constants['GROUPS'], constants['DEPTH'], value.element_size())
    if n > 0:
        with torch.accelerator.device_index(device_index(value)):
            _forward_kernel[(_programs(offset_mask, constants['GROUPS'], tile),)](
                value, offset_mask, out, height, width, out_h, out_w, *value.stride()[:3], *offset_mask.stride()[:3],
                **constants, **tile, UNROLL=_unrolled(constants['POINTS']), INDEX=_index_type(value, offset_mask, out),
                T=ARITHMETIC[value.dtype], **OPTIONS,
            )  # fmt: skip
    return out


def dcnv4_backward(grad_output: Tensor, value: Tensor, offset_mask: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Gradients of `dcnv4` with respect to value and offset_mask.

    Additions to the value map's gradient are atomic and their order varies, unless the last argument, `deterministic`,
    is set: then every part of the map has one program that adds in a fixed order, which takes several times as long.
    """
    *arguments, deterministic = arguments
    grad_output, value, offset_mask = map(_channels_contiguous, (grad_output, value, offset_mask))
    n, out_h, out_w, packed_channels = offset_mask.shape
    height, width = value.shape[1:3]
    grad_packed = torch.empty_like(offset_mask, memory_format=torch.contiguous_format)
    constants = _constants(value, *arguments)
    groups, points = constants['GROUPS'], constants['POINTS']
    grad_packed[..., 3 * groups * points :] = 0
    dtype = torch.float32 if value.element_size() == 2 else value.dtype
    grad_value = torch.zeros(value.shape, dtype=dtype, device=value.device)
    if n == 0:
        return grad_value.to(value.dtype), grad_packed

    margins = None if deterministic else _window_margins(value, constants)
    scatter = not deterministic and margins is None
    # Scattering is a matter of single floats, 16 bytes of which a thread adds at once.
    tile = _tile(groups, constants['DEPTH'], grad_value.element_size() if scatter else value.element_size())
    sizes = height, width, out_h, out_w
    grad_strides, packed_strides = grad_output.stride()[:3], offset_mask.stride()[:3]
    common = {
        **constants,
        'LANES': tile['LANES'],
        'INDEX': _index_type(grad_output, value, offset_mask, grad_value, grad_packed),
    }
    with torch.accelerator.device_index(device_index(value)):
        _backward_kernel[(_programs(offset_mask, groups, tile),)](
            grad_output, value, offset_mask, grad_value, grad_packed, *sizes,
            *grad_strides, *value.stride()[:3], *packed_strides, packed_channels,
            **{**common, **tile}, UNROLL=_unrolled(points), SCATTER=scatter,
            T=ARITHMETIC[value.dtype], **OPTIONS,
        )  # fmt: skip
        if deterministic:
            bands = min(height, triton.cdiv(1024, n * groups))
            _ordered_kernel[(n * groups * bands,)](
                grad_output, offset_mask, grad_value, *sizes, bands, *grad_strides, *packed_strides,
                **common, T=ARITHMETIC[value.dtype], num_warps=1, **OPTIONS,
            )  # fmt: skip
        elif margins is not None:
            common['LANES'] = max(16, common['LANES'])
            _window_kernel[(n * groups * triton.cdiv(out_h, 8) * triton.cdiv(out_w, 8),)](
                grad_output, offset_mask, grad_value, *sizes, *grad_strides, *packed_strides,
                **common, MARGIN_H=margins[0], MARGIN_W=margins[1], HALF=_HALVES[value.dtype],
                num_warps=8, **OPTIONS,
            )  # fmt: skip
    return grad_value.to(value.dtype), grad_packed


def _constants(
    value, groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, offset_scale,
    remove_center, softmax,
):  # fmt: skip
    """What kernels are compiled for. ORIGIN is the first window's first point, before offsets."""
    center_h, center_w = (dilation_h * (kernel_h - 1)) >> 1, (dilation_w * (kernel_w - 1)) >> 1
    points = kernel_h * kernel_w - int(remove_center)
    return {
        'GROUPS': groups,
        'DEPTH': value.shape[3] // groups,
        'KERNEL_H': kernel_h,
        'POINTS': points,
        'SKIPPED': kernel_w // 2 * kernel_h + kernel_h // 2 if remove_center else points,
        'STRIDE_H': stride_h,
        'STRIDE_W': stride_w,
        'DILATION_H': dilation_h,
        'DILATION_W': dilation_w,
        'ORIGIN_H': float(center_h - pad_h - center_h * offset_scale),
        'ORIGIN_W': float(center_w - pad_w - center_w * offset_scale),
        'SCALE': float(offset_scale),
        'SOFTMAX': softmax,
    }


def _tile(groups: int, depth: int, element_size: int) -> dict[str, int]:
    """Pixels and groups of a program of four warps, for loads of 16 bytes a thread and lines of 128 bytes."""
    lanes = triton.next_power_of_2(depth)
    rows = max(1, min(_ROWS, 32 * _ROWS // element_size // lanes))
    tile_g = min(rows, triton.next_power_of_2(groups), max(1, 128 // element_size // lanes))
    pixels = rows // tile_g
    tile_h = 1 << (pixels.bit_length() - 1) // 2
    return {'TILE_H': tile_h, 'TILE_W': pixels // tile_h, 'TILE_G': tile_g, 'LANES': lanes}


def _programs(offset_mask: Tensor, groups: int, tile: dict[str, int]) -> int:
    n, out_h, out_w, _ = offset_mask.shape
    blocks = map(triton.cdiv, (out_h, out_w, groups), (tile['TILE_H'], tile['TILE_W'], tile['TILE_G']))
    return n * math.prod(blocks)


def _unrolled(points: int) -> int:
    return points if points <= _UNROLLED else 1


def _window_margins(value: Tensor, constants: dict) -> tuple[float, float] | None:
    """How far offsets may move points of 8 x 8 output pixels within a window of 16 x 16, where that kernel pays."""
    points, kernel_h, scale = constants['POINTS'], constants['KERNEL_H'], constants['SCALE']
    if value.element_size() != 2 or not 16 <= constants['DEPTH'] <= 64 or points > 16 or scale <= 0:
        return None
    margins = []
    for axis, kernel in (('H', kernel_h), ('W', triton.cdiv(points, kernel_h))):
        reach = 7 * constants[f'STRIDE_{axis}'] + (kernel - 1) * constants[f'DILATION_{axis}'] * scale
        fits = (m / 2 for m in range(15, 1, -1) if (constants[f'ORIGIN_{axis}'] - m / 2) % 1 + reach + m <= 15)
        margins.append(next(fits, None))
    return None if None in margins else tuple(margins)


def _index_type(*tensors: Tensor) -> tl.dtype:
    """The type of offsets within one image: int32 where all of them fit."""
    spans = (sum(size * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
