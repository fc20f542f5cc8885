"""Figures: what a model sees. Each function returns a matplotlib Figure; nothing opens a window."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .ops import dcnv4
from .ops.reference import sampling_points

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
    axes[0, 0].imshow(_drawable(image), cmap='gray')
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


def _drawable(image: Image.Image) -> Image.Image:
    """The image in a mode whose numbers matplotlib understands; others, palettes for instance, are converted."""
    known = image.mode in ('L', 'RGB', 'RGBA', 'F') or image.mode.startswith('I')
    return image if known else image.convert('RGBA')


@dataclass(frozen=True)
class Sampling:
    """Where one deformable layer sampled its input, as `record_sampling` finds it.

    Attributes:
        name: The module that called the operator.
        stage: The number in the module's name behind `stages`, or None.
        x: Coordinates in pixels of the input map, (Ho, Wo, groups, K).
        y: The same, downwards.
        mask: Weights of the samples, (Ho, Wo, groups, K).
        size: Height and width of the input map.
        output: What was aggregated, (Ho, Wo, C), with its graph where gradients were recorded.
    """

    name: str
    stage: int | None
    x: Tensor
    y: Tensor
    mask: Tensor
    size: tuple[int, int]
    output: Tensor


def record_sampling(model: nn.Module, image: Tensor) -> list[Sampling]:
    """Runs a model on an image and records every call of `dcnzoo.ops.dcnv4`.

    Args:
        model: Any module that calls the operator.
        image: What the model is given, (1, C, H, W).

    Returns:
        The deformable layers in the order in which they ran.

    Raises:
        ValueError: The model has no deformable layers, or the image is not a batch of one.
    """
    _check_image(image)
    running, found = [], []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is dcnv4:
                found.append(_sampling(running[-1] if running else '', result, *args, **(kwargs or {})))
            return result

    def leave(*_):
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        with Recorder():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f'{type(model).__name__} has no deformable layers: nothing in it calls dcnzoo.ops.dcnv4')
    return found


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f'image must be a batch of one image (1, C, H, W), got shape {tuple(image.shape)}')


def _sampling(
    name: str, output: Tensor, value: Tensor, offset_mask: Tensor, groups: int, kernel_size=3, stride=1, padding=1,
    dilation=1, offset_scale=1.0, remove_center=False, softmax=False,
) -> Sampling:  # fmt: skip
    sizes = [
        size
        for pair in (kernel_size, stride, padding, dilation)
        for size in ([pair] * 2 if isinstance(pair, int) else pair)
    ]
    x, y, mask = sampling_points(offset_mask.detach().float(), groups, *sizes, offset_scale, remove_center)
    number = re.search(r'(?:^|\.)stages?[._](\d+)', name)
    return Sampling(
        name=name,
        stage=int(number[1]) if number else None,
        x=x[0],
        y=y[0],
        mask=mask[0].softmax(-1) if softmax else mask[0],
        size=tuple(value.shape[1:3]),
        output=output[0],
    )


@dataclass(frozen=True)
class Points:
    """Points of an image: coordinates in its pixels and weights, (n,) each."""

    x: Tensor
    y: Tensor
    weight: Tensor


def trace_sampling(
    layers: Sequence[Sampling], point: tuple[float, float], size: tuple[int, int], most: int = 4096
) -> list[Points]:
    """Follows what one unit samples back through several layers, to the image.

    The unit at `point` in the last layer samples its input at K points a group. Each of them lies nearest to some unit
    of the layer before, which samples in turn; weights multiply. Only this path is followed: the convolutions between
    layers widen it a little, and identity branches add the unit itself.

    Args:
        layers: Deformable layers in the order in which they run.
        point: (x, y) in pixels of the image.
        size: Height and width of the image.
        most: Points kept at each layer, those of the largest magnitude.

    Returns:
        For each number of layers from one on the points reached by it, in pixels of the image; points outside their map
        are left out.
    """
    reached = Points(*(torch.tensor([float(number)]) for number in (*point, 1.0)))
    traced = []
    for layer in reversed(layers):
        out_size = layer.mask.shape[:2]
        column = ((reached.x + 0.5) * out_size[1] / size[1]).floor().long().clamp(0, out_size[1] - 1)
        row = ((reached.y + 0.5) * out_size[0] / size[0]).floor().long().clamp(0, out_size[0] - 1)
        x, y, mask = (part.cpu()[row, column].flatten(1) for part in (layer.x, layer.y, layer.mask))
        weight = (mask * reached.weight.unsqueeze(1)).flatten()
        x, y = x.flatten(), y.flatten()
        inside = ((x > -1) & (x < layer.size[1]) & (y > -1) & (y < layer.size[0])).nonzero().flatten()
        kept = inside[weight[inside].abs().topk(min(most, len(inside))).indices]
        reached = Points(
            (x[kept] + 0.5) * size[1] / layer.size[1] - 0.5,
            (y[kept] + 0.5) * size[0] / layer.size[0] - 0.5,
            weight[kept],
        )
        traced.append(reached)
    return traced


def effective_receptive_field(output: Tensor, image: Tensor, unit: tuple[int, int]) -> Tensor:
    """How much each pixel of an image moves one unit, `Luo et al. <https://arxiv.org/abs/1701.04128>`_.

    Args:
        output: A map (Ho, Wo, C) computed from the image, with its graph.
        image: What the model was given, (1, C, H, W), which requires a gradient.
        unit: Row and column in the map.

    Returns:
        Magnitude of the gradient of the unit's sum over channels, summed over the image's channels, (H, W).
    """
    (grad,) = torch.autograd.grad(output[unit].sum(), image, retain_graph=True)
    return grad[0].abs().sum(0).detach()


def sampling_offsets(
    model: nn.Module,
    image: Tensor,
    point: tuple[float, float] | None = None,
    stage: int | None = None,
    layers: int = 3,
    picture: Image.Image | None = None,
) -> 'Figure':
    """Draws where one unit of a model samples, layer by layer back to the image, and its effective receptive field.

    Points are as large as their weight, the product of the modulation scalars on their way, and red where that is
    negative.

    Args:
        model: A model with deformable layers, in evaluation mode.
        image: What the model is given, (1, C, H, W).
        point: The unit, as (x, y) in pixels of the image; its centre by default.
        stage: Whose last deformable layer the unit is of, counted from 0 as in the model's names; the last by default.
        layers: How many deformable layers are followed back, at most.
        picture: What to draw upon, of any size and mode; the image itself, stretched to full contrast, by default.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: The image is no batch of one, the model has no deformable layers or no such stage, the point is
            outside the image, or `layers` is not positive.
    """
    from matplotlib.figure import Figure

    _check_image(image)
    height, width = image.shape[-2:]
    point = ((width - 1) / 2, (height - 1) / 2) if point is None else point
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f'point must lie within the image of {width} x {height} pixels, got {point}')
    if type(layers) is not int or layers < 1:
        raise ValueError(f'layers must be an int of at least 1, got {layers!r}')
    image = image.detach().clone().requires_grad_()
    with torch.enable_grad():
        found = record_sampling(model, image)
    if stage is not None:
        stages = sorted({layer.stage for layer in found if layer.stage is not None})
        if stage not in stages:
            raise ValueError(f'stage must be one of {stages}, got {stage}')
        found = found[: max(i for i, layer in enumerate(found) if layer.stage == stage) + 1]
    found = found[-layers:]
    last = found[-1]
    rows, columns = last.output.shape[:2]
    unit = int((point[1] + 0.5) * rows / height), int((point[0] + 0.5) * columns / width)
    traced = trace_sampling(found, point, (height, width))
    field = effective_receptive_field(last.output, image, unit)

    background = image.detach()[0].mean(0).float().cpu().numpy() if picture is None else _drawable(picture)
    figure = Figure(figsize=(4 * (len(traced) + 1), 4.4), layout='constrained')
    axes = figure.subplots(1, len(traced) + 1, squeeze=False)[0]
    for axis, points, layer in zip(axes, traced, reversed(found), strict=False):
        axis.imshow(background, cmap='gray', extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        strength = (
            points.weight.abs() / points.weight.abs().max().clamp(min=1e-12) if len(points.weight) else points.weight
        )
        colors = ['tab:red' if weight < 0 else 'tab:green' for weight in points.weight.tolist()]
        axis.scatter(points.x.numpy(), points.y.numpy(), s=(40 * strength).numpy(), c=colors, alpha=0.6, linewidths=0)
        axis.set_title(f'sampled by {layer.name or type(model).__name__}', fontsize=8)
    axes[-1].imshow(field.float().cpu().sqrt().numpy(), cmap='magma')
    axes[-1].set_title('effective receptive field (square root)', fontsize=8)
    for axis in axes:
        axis.plot(*point, '+', color='white', markeredgecolor='tab:blue', markersize=12, markeredgewidth=2)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axis.set_axis_off()
    figure.suptitle(f'unit ({unit[1]}, {unit[0]}) of {last.name or type(model).__name__}', fontsize=9)
    return figure


def to_image(tensor: Tensor, mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Undoes the normalisation of an image tensor (C, H, W), so that it can be looked at."""
    mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = ((tensor.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.movedim(0, -1).squeeze(-1).numpy())
