"""dcnzoo's operators in Hugging Face transformers.

    from dcnzoo.integrations.transformers import use_deform_attn

    model = use_deform_attn(AutoModelForObjectDetection.from_pretrained('SenseTime/deformable-detr'))

Deformable DETR, RT-DETR and most of their family call a layer without parameters, `MultiScaleDeformableAttention`,
which is replaced. Mask2Former, OneFormer, RT-DETRv2, D-FINE and DEIMv2 call a function of their modeling file, which is
replaced in that file, hence for every model of that architecture in the process. Weights, names and results stay as
they are.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import MultiScaleDeformableAttention


def use_deform_attn(model: nn.Module) -> nn.Module:
    """Makes the deformable attention of a transformers model run on `dcnzoo.ops.deform_attn`.

    Args:
        model: A model of transformers, or a module that holds one. It is changed in place.

    Returns:
        The model.

    Raises:
        ValueError: The model has no multi-scale deformable attention of transformers.
    """
    found = False
    for module in list(model.modules()):
        if not type(module).__module__.startswith('transformers.models.'):
            continue
        file = sys.modules[type(module).__module__]
        for name, child in module.named_children():
            if type(child).__name__ == 'MultiScaleDeformableAttention':
                setattr(module, name, MultiScaleDeformableAttention().train(child.training))
                found = True
        if type(module).__name__.endswith('MultiscaleDeformableAttention'):
            for name, replace in _FUNCTIONS.items():
                if hasattr(file, name):
                    _replace(file, name, replace)
                    found = True
            if hasattr(module, 'ms_deformable_attn_core'):  # D-FINE keeps the function it found when it was built
                module.ms_deformable_attn_core = file.multi_scale_deformable_attention_v2
    if not found:
        raise ValueError(f'{type(model).__name__} has no multi-scale deformable attention of transformers')
    return model


def _replace(file, name: str, replace: Callable[[Callable], Callable]) -> None:
    original = getattr(file, name)
    if not hasattr(original, '_dcnzoo'):
        setattr(file, name, replace(original))
        getattr(file, name)._dcnzoo = True


_LAYER = MultiScaleDeformableAttention()


def _attend(value: Tensor, shapes, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    return _LAYER(value, None, shapes, None, sampling_locations, attention_weights)


def _first_version(original: Callable) -> Callable:
    @functools.wraps(original)
    def multi_scale_deformable_attention(
        value: Tensor, value_spatial_shapes, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        return _attend(value, value_spatial_shapes, sampling_locations, attention_weights)

    return multi_scale_deformable_attention


def _second_version(original: Callable) -> Callable:
    """Levels may have different numbers of points, all in one dimension: (N, queries, M, sum of them, 2)."""

    @functools.wraps(original)
    def multi_scale_deformable_attention_v2(
        value: Tensor,
        value_spatial_shapes,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int],
        method: str = 'default',
    ) -> Tensor:
        if method != 'default':  # 'discrete' does not interpolate
            return original(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
        if len(set(num_points_list)) == 1:
            per_level = (len(num_points_list), num_points_list[0])
            return _attend(
                value,
                value_spatial_shapes,
                sampling_locations.unflatten(3, per_level),
                attention_weights.unflatten(3, per_level),
            )
        sizes = [height * width for height, width in value_spatial_shapes]
        levels = zip(
            value.split(sizes, 1),
            value_spatial_shapes,
            sampling_locations.split(list(num_points_list), 3),
            attention_weights.split(list(num_points_list), 3),
            strict=True,
        )
        return torch.stack(
            [_attend(part, [shape], where.unsqueeze(3), weights.unsqueeze(3)) for part, shape, where, weights in levels]
        ).sum(0)

    return multi_scale_deformable_attention_v2


_FUNCTIONS = {
    'multi_scale_deformable_attention': _first_version,
    'multi_scale_deformable_attention_v2': _second_version,
}
