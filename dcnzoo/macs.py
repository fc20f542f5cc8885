"""Multiply-accumulates (MACs) of a model, those of the package's own operators among them."""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def _dcnv4_flops(value, offset_mask, groups, kernel_h, kernel_w, *geometry, out_shape, **_):
    *_, remove_center, _ = geometry
    points = kernel_h * kernel_w - int(remove_center)
    return 2 * 4 * points * math.prod(out_shape)  # four corners per point


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Counts the MACs of one image, (C, H, W); a model on the meta device does, and computes nothing."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.dcnzoo.dcnv4: _dcnv4_flops})
    with counter, torch.no_grad():
        model(torch.empty(1, *input_size, device=device))
    return counter.get_total_flops() // 2
