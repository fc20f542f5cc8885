"""The DCNv3 module: projections around the aggregation of `dcnzoo.ops.dcnv4`, with its softmax."""

import torch
from torch import Tensor, nn

from ..ops import dcnv4, linear
from ._aggregation import DeformableAggregation
from ._geometry import check_map, pair
from .linear import Linear

torch.fx.wrap('check_map')

ACTIVATIONS = {'GELU': nn.GELU, 'ReLU': nn.ReLU, 'SiLU': nn.SiLU}


class ToChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class DCNv3(DeformableAggregation):
    """Deformable convolution v3, `InternImage <https://arxiv.org/abs/2211.05778>`_.

    Values are a projection of the input; offsets and modulation scalars are predicted, per output pixel and group, by
    a depthwise convolution, norm, activation and one projection, and the scalars of a group's points pass a softmax;
    what is sampled is projected once more. Argument names, their order and state_dict keys are those of the published
    module, the layout of the maps is (N, H, W, C).

    Args:
        channels: Channels of input and output.
        kernel_size: Points of the sampling grid, an int or a (height, width) pair like the three sizes further down.
        dw_kernel_size: Odd size of the depthwise convolution; None for that of the sampling grid, or the next odd one.
        stride: Step of the output grid in pixels of the input.
        pad: Rows and columns by which the grid starts outside the input.
        dilation: Distance of the grid's points in pixels.
        group: Number of groups of channels that share offsets. Fastest where a group has 16 or 32 channels.
        offset_scale: Factor on offsets and grid around the window's centre.
        act_layer: Activation behind the depthwise convolution, 'GELU', 'ReLU' or 'SiLU'.
        norm_layer: Norm before it, 'LN' for LayerNorm or 'BN' for BatchNorm.
        center_feature_scale: Blend what was sampled with the projected input by a predicted gate per group.
        remove_center: Leave out the grid's central point (odd square kernels only).
        output_bias: Whether the output projection has a bias.
        dw_dilation: Dilation of the depthwise convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: `group` does not divide `channels`, or a size or name is out of range.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | tuple[int, int] = 3,
        dw_kernel_size: int | None = None,
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = 'GELU',
        norm_layer: str = 'LN',
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        dw_dilation: int = 1,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        if dw_kernel_size is None:
            size = max(pair('kernel_size', kernel_size, 1))
            dw_kernel_size = size + 1 - size % 2
        super().__init__(
            channels,
            kernel_size,
            stride,
            pad,
            dilation,
            group,
            offset_scale,
            center_feature_scale,
            remove_center,
            dw_kernel_size,
            dw_dilation,
            **dd,
        )
        if act_layer not in ACTIVATIONS:
            raise ValueError(f'act_layer must be one of {", ".join(map(repr, ACTIVATIONS))}, got {act_layer!r}')
        if norm_layer not in ('LN', 'BN'):
            raise ValueError(f"norm_layer must be 'LN' or 'BN', got {norm_layer!r}")
        if norm_layer == 'LN':
            norm = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6, **dd))
        else:
            norm = nn.Sequential(nn.BatchNorm2d(channels, **dd), ToChannelsLast())
        self.dw_conv = nn.Sequential(self._make_depthwise(dw_kernel_size, **dd), norm, ACTIVATIONS[act_layer]())
        self.offset = Linear(channels, 2 * group * self.points, **dd)
        self.mask = Linear(channels, group * self.points, **dd)
        self.input_proj = Linear(channels, channels, **dd)
        self.output_proj = Linear(channels, channels, bias=output_bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as published: offsets and logits of scalars and gates of zero, Xavier projections."""
        super().reset_parameters()
        for prediction in (self.offset, self.mask):
            nn.init.zeros_(prediction.weight)
            nn.init.zeros_(prediction.bias)
        for projection in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def _predict(self, features: Tensor) -> Tensor:
        """Offsets and logits of the scalars in the operator's packed layout, by one product.

        The two layers stay the parameters, as published. Their weights are packed in each call, which costs little
        beside packing what they predict, and averages of weights or optimizers never meet another layout.
        """
        weight = self._pack(self.offset.weight, self.mask.weight)
        bias = self._pack(self.offset.bias, self.mask.bias)
        return linear(features, weight, bias)

    def _pack(self, offset: Tensor, mask: Tensor) -> Tensor:
        """Per group first the rows of its offsets, then those of its scalars."""
        groups = (self.group, -1)
        return torch.cat((offset.unflatten(0, groups), mask.unflatten(0, groups)), 1).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, Ho, Wo, C), Ho and Wo as for any convolution."""
        check_map(x, 'N, H, W, C', self.channels)
        value = self.input_proj(x)
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        if not self.centered:
            features = self._at_centers(features)
        out = dcnv4(
            value,
            self._predict(features),
            groups=self.group,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.pad,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=True,
        )
        return self.output_proj(self._blend_centers(out, value, features))
