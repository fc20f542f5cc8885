"""DCNv4: projections around the aggregation of `dcnzoo.ops.dcnv4`, as published and in place of a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dcnv4
from ._aggregation import DeformableAggregation
from ._geometry import check_groups, check_map, check_positive, conv_padding, pair
from .linear import Linear

torch.fx.wrap('check_map')


class DCNv4(DeformableAggregation):
    """Deformable convolution v4, `Efficient Deformable ConvNets <https://arxiv.org/abs/2401.06197>`_.

    Values are a projection of the input; offsets and modulation scalars are predicted from it, per output pixel and
    group, at the pixel of the window's centre; what is sampled is projected once more. Argument names and state_dict
    keys are those of the published module, the layout of the maps is (N, H, W, C).

    Args:
        channels: Channels of input and output.
        kernel_size: Points of the sampling grid, an int or a (height, width) pair like the three sizes that follow.
        stride: Step of the output grid in pixels of the input.
        pad: Rows and columns by which the grid starts outside the input.
        dilation: Distance of the grid's points in pixels.
        group: Number of groups of channels that share offsets. Fastest where a group has 16 or 32 channels.
        offset_scale: Factor on offsets and grid around the window's centre.
        dw_kernel_size: Odd size of a depthwise convolution before offsets and scalars are predicted; None for none.
        center_feature_scale: Blend what was sampled with the projected input by a predicted gate per group.
        remove_center: Leave out the grid's central point (odd square kernels only).
        output_bias: Whether the output projection has a bias.
        without_pointwise: Leave out the projections of value and output.
        dw_dilation: Dilation of the depthwise convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: `group` does not divide `channels`, or a size is out of range.
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        pad: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        dw_dilation: int = 1,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
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
        self.without_pointwise = without_pointwise
        if dw_kernel_size is not None:
            self.offset_mask_dw = self._make_depthwise(dw_kernel_size, **dd)
        self.offset_mask = Linear(channels, -(-3 * group * self.points // 8) * 8, **dd)
        self.value_proj = nn.Identity() if without_pointwise else Linear(channels, channels, **dd)
        self.output_proj = nn.Identity() if without_pointwise else Linear(channels, channels, bias=output_bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as published: offsets, modulation and gates' logits of zero, Xavier projections."""
        super().reset_parameters()
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        if not self.without_pointwise:
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, Ho, Wo, C), Ho and Wo as for any convolution."""
        check_map(x, 'N, H, W, C', self.channels)
        value = self.value_proj(x)

        if self.dw_kernel_size is not None:
            centers = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if not self.centered:
                centers = self._at_centers(centers)
        else:
            centers = x if self.centered and self.stride == (1, 1) else self._at_centers(x)
        offset_mask = self.offset_mask(centers)
        if self.without_pointwise:
            # Under autocast the linear layer's output may be narrower than a value that passed no layer.
            offset_mask = offset_mask.to(value.dtype)

        out = dcnv4(
            value,
            offset_mask,
            groups=self.group,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.pad,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        return self.output_proj(self._blend_centers(out, value, out))


class DCNv4Conv2d(nn.Module):
    """DCNv4 with the interface of `torch.nn.Conv2d`, for a ResNet, a U-Net or a detector.

    A projection to the channels of the output, `DCNv4` on them, and another projection. Unlike in the published module
    the points of a window start with equal shares that sum to 1, so that the layer starts as a mean over its window:
    layers in a row that all start at zero, with no shortcut around them, would never learn.

    Faster where the memory of the model is channels_last, which that of the output always is.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        kernel_size: Points of the sampling grid, an int or a (height, width) pair like stride, padding and dilation.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input, or 'same' or 'valid' as for `torch.nn.Conv2d`.
        dilation: Distance of the grid's points in pixels.
        groups: Number of groups of channels that the projections keep apart.
        bias: Whether the output has a bias.
        offset_groups: Number of groups of the output's channels that share offsets, of any width; by default as many as
            make them about 16 channels wide.
        offset_scale: Factor on offsets and grid around the window's centre.
        dw_kernel_size: Odd size of a depthwise convolution before offsets and scalars are predicted; None for none.
        center_feature_scale: Blend what was sampled with the window's centre by a predicted gate per offset group.
        remove_center: Leave out the grid's central point (odd square kernels only).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: A number is out of range, or `groups` or `offset_groups` does not divide the channels.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int | None = None,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_positive(in_chs=in_chs, out_chs=out_chs, groups=groups)
        check_groups(in_chs, out_chs, groups)
        if offset_groups is None:
            divisors = [number for number in range(1, out_chs + 1) if out_chs % number == 0]
            offset_groups = min(divisors, key=lambda number: abs(number - out_chs / 16))
        check_positive(offset_groups=offset_groups)
        if out_chs % offset_groups != 0:
            raise ValueError(f'offset_groups must divide the {out_chs} channels out, got {offset_groups}')
        kernel_size = pair('kernel_size', kernel_size, 1)
        stride = pair('stride', stride, 1)
        dilation = pair('dilation', dilation, 1)
        pad, (self.pad_bottom, self.pad_right) = conv_padding(padding, kernel_size, stride, dilation)
        self.value_proj = nn.Conv2d(in_chs, out_chs, 1, groups=groups, bias=False, **dd)
        self.dcn = DCNv4(
            out_chs,
            kernel_size,
            stride,
            pad,
            dilation,
            offset_groups,
            offset_scale,
            dw_kernel_size,
            center_feature_scale,
            remove_center,
            without_pointwise=True,
            **dd,
        )
        self.output_proj = nn.Conv2d(out_chs, out_chs, 1, groups=groups, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the projections with Xavier's rule, the offsets with zero, and the points with equal shares."""
        self.dcn.reset_parameters()
        group, points = self.dcn.group, self.dcn.points
        with torch.no_grad():
            packed = self.dcn.offset_mask.bias[: 3 * group * points].unflatten(0, (group, 3 * points))
            packed[:, 2 * points :] = 1 / points
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_chs, H, W) to (N, out_chs, Ho, Wo), Ho and Wo as for any convolution."""
        check_map(x, 'N, C, H, W', self.value_proj.in_channels)
        if self.pad_bottom + self.pad_right > 0:
            x = F.pad(x, [0, self.pad_right, 0, self.pad_bottom])
        value = self.value_proj(x).permute(0, 2, 3, 1).contiguous()
        return self.output_proj(self.dcn(value).permute(0, 3, 1, 2))
