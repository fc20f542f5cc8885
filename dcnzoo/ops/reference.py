"""The specification: every operator in plain PyTorch, for any dtype and device, differentiable twice.

The fast paths are tested against these functions, exporters see them instead of a custom operator, and they serve
where no fast path was built. They favour being read over being fast.
"""

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
    n, height, width, channels = value.shape
    _, out_h, out_w, _ = offset_mask.shape
    points = kernel_h * kernel_w - int(remove_center)
    dtype = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    device = value.device

    packed = offset_mask[..., : 3 * groups * points].to(dtype).reshape(n, out_h, out_w, groups, 3 * points)
    offset = packed[..., : 2 * points].reshape(n, out_h, out_w, groups, points, 2)
    mask = packed[..., 2 * points :]
    if softmax:
        mask = mask.softmax(-1)

    # Grid positions in pixels, points x-outermost; the scale acts around the window's centre.
    center_x = (dilation_w * (kernel_w - 1)) >> 1
    center_y = (dilation_h * (kernel_h - 1)) >> 1
    taps = [
        (i, j)
        for i in range(kernel_w)
        for j in range(kernel_h)
        if not (remove_center and i == kernel_w // 2 and j == kernel_h // 2)
    ]
    tap_x = torch.tensor([i * dilation_w for i, _ in taps], dtype=dtype, device=device)
    tap_y = torch.tensor([j * dilation_h for _, j in taps], dtype=dtype, device=device)
    window_x = torch.arange(out_w, dtype=dtype, device=device) * stride_w + (center_x - pad_w - center_x * offset_scale)
    window_y = torch.arange(out_h, dtype=dtype, device=device) * stride_h + (center_y - pad_h - center_y * offset_scale)
    x = window_x.view(1, 1, out_w, 1, 1) + (tap_x + offset[..., 0]) * offset_scale
    y = window_y.view(1, out_h, 1, 1, 1) + (tap_y + offset[..., 1]) * offset_scale

    # A point outside the open rectangle (-1, width) x (-1, height), or not finite, counts as nothing: its coordinates
    # and its mask are replaced before they meet any arithmetic, so that no NaN reaches a value or a gradient.
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)
    x = torch.where(inside, x, 0)
    y = torch.where(inside, y, 0)
    mask = torch.where(inside, mask, 0)

    x0, y0 = x.detach().floor(), y.detach().floor()
    fraction_x, fraction_y = x - x0, y - y0
    x0, y0 = x0.long(), y0.long()
    flat = value.to(dtype).reshape(n, height * width, groups, channels // groups).transpose(1, 2)

    out = 0
    for right in (0, 1):
        for below in (0, 1):
            column, row = x0 + right, y0 + below
            seen = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            index = torch.where(seen, row * width + column, 0)
            weight = (fraction_x if right else 1 - fraction_x) * (fraction_y if below else 1 - fraction_y) * mask
            index = index.permute(0, 3, 1, 2, 4).reshape(n, groups, out_h * out_w * points, 1)
            corner = flat.gather(2, index.expand(-1, -1, -1, channels // groups))
            corner = corner.reshape(n, groups, out_h, out_w, points, channels // groups).permute(0, 2, 3, 1, 4, 5)
            corner = torch.where(seen.unsqueeze(-1), corner, 0)
            out = out + (corner * weight.unsqueeze(-1)).sum(-2)
    return out.reshape(n, out_h, out_w, channels).to(value.dtype)
