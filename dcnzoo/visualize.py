"""Figures: what a model sees. Each function returns a matplotlib Figure; nothing opens a window."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def feature_maps(image: Image.Image, features: Sequence[Tensor], titles: Sequence[str], channels: int = 7) -> 'Figure':
    """Draws feature maps: a row per stage, first the mean magnitude over channels, then those that vary most.

    Args:
        image: What the model was given.
        features: Per stage a map (C, H, W).
        titles: A title per stage.
        channels: Single channels shown per stage.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: The numbers of maps and titles differ, or a map does not have three dimensions.
    """
    from matplotlib.figure import Figure

    if len(features) != len(titles):
        raise ValueError(f'titles must name each of the {len(features)} feature maps, got {len(titles)}')
    figure = Figure(figsize=(1.5 * (channels + 2), 1.7 * len(features)), layout='constrained')
    axes = figure.subplots(len(features), channels + 2, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0, 0].imshow(image, cmap='gray')
    axes[0, 0].set_title('input', fontsize=8)
    for row, feature, title in zip(axes, features, titles, strict=True):
        if feature.ndim != 3:
            raise ValueError(f'features must be maps (C, H, W), got one of shape {tuple(feature.shape)}')
        feature = feature.detach().float().cpu()
        row[1].imshow(feature.abs().mean(0).numpy(), cmap='magma')
        row[1].set_title(f'{title}\nmean magnitude', fontsize=8)
        liveliest = feature.flatten(1).std(1, correction=0).topk(min(channels, len(feature))).indices
        for axis, channel in zip(row[2:], liveliest.tolist(), strict=False):
            axis.imshow(feature[channel].numpy(), cmap='viridis')
            axis.set_title(f'channel {channel}', fontsize=8)
    return figure


def to_image(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undoes the normalisation of an image tensor (C, H, W), so that it can be looked at."""
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = ((tensor.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.movedim(0, -1).squeeze(-1).numpy())
