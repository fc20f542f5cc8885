"""What the modules of DCNv3 and DCNv4 share: the geometry of the sampling windows, and the gate at their centres."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from ._geometry import check_positive, check_scale, pair


class DeformableAggregation(nn.Module):
    """Base of the modules around the aggregation, on maps (N, H, W, C).

    Offsets and gates are predicted per output pixel from the features at its window's centre, whatever the stride and
    padding are.

    Args:
        channels: Channels of input and output.
        kernel_size: Points of the sampling grid, an int or a (height, width) pair like the three sizes that follow.
        stride: Step of the output grid in pixels of the input.
        pad: Rows and columns by which the grid starts outside the input.
        dilation: Distance of the grid's points in pixels.
        group: Number of groups of channels that share offsets.
        offset_scale: Factor on offsets and grid around the window's centre.
        center_feature_scale: Blend what was sampled with the projected input by a predicted gate per group.
        remove_center: Leave out the grid's central point (odd square kernels only).
        dw_kernel_size: Odd size of the depthwise convolution that offsets are predicted from; None for none.
        dw_dilation: Dilation of the depthwise convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints, or `offset_scale` is not a number.
        ValueError: `group` does not divide `channels`, or a number is out of range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        pad: int | tuple[int, int],
        dilation: int | tuple[int, int],
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
        dw_kernel_size: int | None,
        dw_dilation: int,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_positive(channels=channels, group=group, dw_dilation=dw_dilation)
        if channels % group != 0:
            raise ValueError(f'group must divide the {channels} channels, got {group}')
        if dw_kernel_size is not None and (
            type(dw_kernel_size) is not int or dw_kernel_size < 1 or dw_kernel_size % 2 == 0
        ):
            raise ValueError(f'dw_kernel_size must be a positive odd int or None, got {dw_kernel_size!r}')
        self.channels = channels
        self.kernel_size = pair('kernel_size', kernel_size, 1)
        self.stride = pair('stride', stride, 1)
        self.pad = pair('pad', pad, 0)
        self.dilation = pair('dilation', dilation, 1)
        self.group = group
        self.offset_scale = check_scale(offset_scale)
        self.center_feature_scale = center_feature_scale
        self.remove_center = bool(remove_center)
        self.dw_kernel_size = dw_kernel_size
        self.dw_dilation = dw_dilation
        kernel_h, kernel_w = self.kernel_size
        if self.remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h == 1):
            raise ValueError(
                f'remove_center needs an odd square kernel_size of at least 3, got kernel_size {kernel_size!r}'
            )
        self.points = kernel_h * kernel_w - int(self.remove_center)

        # Where the windows' centres lie: rows and columns that the input lacks or has in excess at each border.
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((p - s // 2, p - s + s // 2) for p, s in zip(self.pad, spans, strict=True))
        self.centered = top == bottom == left == right == 0
        self.center_pad = tuple(max(border, 0) for border in (left, right, top, bottom))
        self.center_crop = tuple(max(-border, 0) for border in (left, right, top, bottom))

        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(group, channels, **dd))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(group, **dd))
        else:
            self.register_parameter('center_feature_scale_proj_weight', None)
            self.register_parameter('center_feature_scale_proj_bias', None)

    def reset_parameters(self) -> None:
        """Initialises the gates' logits with zero, as published."""
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def extra_repr(self) -> str:
        return (
            f'{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}, '
            f'dilation={self.dilation}, group={self.group}, offset_scale={self.offset_scale}'
        )

    def _make_depthwise(self, kernel_size: int, device=None, dtype=None) -> nn.Conv2d:
        """The depthwise convolution before the prediction, which already skips what the stride leaves out if it can."""
        return nn.Conv2d(
            self.channels,
            self.channels,
            kernel_size,
            stride=self.stride if self.centered else 1,
            padding=self.dw_dilation * (kernel_size // 2),
            dilation=self.dw_dilation,
            groups=self.channels,
            device=device,
            dtype=dtype,
        )

    def _at_centers(self, x: Tensor) -> Tensor:
        """The pixels at the windows' centres, zero outside the map: (N, H, W, C) -> (N, Ho, Wo, C)."""
        if not self.centered:
            left, right, top, bottom = self.center_crop
            x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
            left, right, top, bottom = self.center_pad
            x = F.pad(x, [0, 0, left, right, top, bottom])
        return x[:, :: self.stride[0], :: self.stride[1]]

    def _blend_centers(self, out: Tensor, value: Tensor, features: Tensor) -> Tensor:
        """Blends the aggregate with the value at the centre, by gates that (N, Ho, Wo, C) features predict."""
        weight = self.center_feature_scale_proj_weight
        if weight is None:
            return out
        gate = linear(features, weight, self.center_feature_scale_proj_bias).sigmoid().unsqueeze(-1)
        out = out.unflatten(-1, (self.group, -1))
        center = self._at_centers(value).unflatten(-1, (self.group, -1))
        return (out + gate * (center - out)).flatten(-2)
