"""Multi-scale deformable attention as a layer without parameters, called as detectors' kernel layers are."""

import torch
from torch import Tensor, nn

from ..ops import deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """The sampling of multi-scale deformable attention, `Deformable DETR <https://arxiv.org/abs/2010.04159>`_.

    Its call is that of the kernel layer of the same name in transformers, whose projections are around it; see
    `dcnzoo.integrations.transformers`. `dcnzoo.ops.deform_attn` is the same as a function.
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: list[tuple[int, int]] | None,
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """Samples the levels of value for each query.

        Args:
            value: (N, S, M, D), the pixels of all levels.
            value_spatial_shapes: (height, width) of each level, an integer tensor (L, 2).
            value_spatial_shapes_list: The same as pairs of ints, which is what is read where it is given.
            level_start_index: Ignored, since it follows from the shapes.
            sampling_locations: (N, queries, M, L, points, 2) as (x, y) in [0, 1]. Beside a value of full precision
                these and the weights may be narrower, as autocast leaves them: they are widened.
            attention_weights: (N, queries, M, L, points).
            im2col_step: Ignored; it is a size of the published kernel's work.

        Returns:
            (N, queries, M * D).

        Raises:
            ValueError: A shape or device does not fit.
            TypeError: A dtype or the type of an argument does not fit.
        """
        shapes = value_spatial_shapes if value_spatial_shapes_list is None else value_spatial_shapes_list
        return _attend(value, shapes, sampling_locations, attention_weights)


@torch.fx.wrap
def _attend(
    value: Tensor,
    shapes: Tensor | list[tuple[int, int]] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    if value.dtype in (torch.float32, torch.float64):
        sampling_locations = sampling_locations.to(value.dtype)
        attention_weights = attention_weights.to(value.dtype)
    return deform_attn(value, shapes, sampling_locations, attention_weights)
