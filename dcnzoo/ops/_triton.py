"""What the operators in Triton share: arithmetic types, options, and the four pixels around a sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ARITHMETIC = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
}
OPTIONS = {'enable_fp_fusion': True}  # which newer versions of Triton leave out unless asked
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def find_cell(x, y, height, width, inside, INDEX: tl.constexpr):
    """The four pixels around a point: the first one's column and row, the way from there, and which are on the map."""
    left, top = tl.floor(x), tl.floor(y)
    column, row = left.to(INDEX), top.to(INDEX)
    on_left, on_right = inside & (column >= 0), inside & (column + 1 < width)
    on_top, on_bottom = row >= 0, row + 1 < height
    return (
        column, row, x - left, y - top,
        on_left & on_top, on_right & on_top, on_left & on_bottom, on_right & on_bottom,
    )  # fmt: skip


@triton.jit
def scatter(grad_value, grad, m, left, top, fx, fy, on00, on01, on10, on11, width, channels, CHANNELS: tl.constexpr):
    """Adds a point's shares to the value map's gradient at the four pixels around it, where they are on the map."""
    below = width.to(left.dtype) * CHANNELS
    cell = grad_value + ((top * width + left)[:, None] * CHANNELS + channels)
    tl.atomic_add(cell, grad * ((1 - fx) * (1 - fy) * m)[:, None], mask=on00, sem='relaxed')
    tl.atomic_add(cell + CHANNELS, grad * (fx * (1 - fy) * m)[:, None], mask=on01, sem='relaxed')
    tl.atomic_add(cell + below, grad * ((1 - fx) * fy * m)[:, None], mask=on10, sem='relaxed')
    tl.atomic_add(cell + below + CHANNELS, grad * (fx * fy * m)[:, None], mask=on11, sem='relaxed')


def device_index(tensor: Tensor) -> int | None:
    return tensor.device.index if tensor.device.type != 'cpu' else None
