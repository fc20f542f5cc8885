"""The DCNv4 module: projections around the aggregation of `dcnzoo.ops.dcnv4`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dcnv4
from .linear import Linear


class DCNv4(nn.Module):
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
        super().__init__()
        for name, number in (('channels', channels), ('group', group), ('dw_dilation', dw_dilation)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f'{name} must be a positive int, got {number!r}')
        if channels % group != 0:
            raise ValueError(f'group must divide the {channels} channels, got {group}')
        if dw_kernel_size is not None and (not isinstance(dw_kernel_size, int) or dw_kernel_size % 2 != 1):
            raise ValueError(f'dw_kernel_size must be a positive odd int or None, got {dw_kernel_size!r}')
        self.channels = channels
        self.kernel_size = _pair('kernel_size', kernel_size, 1)
        self.stride = _pair('stride', stride, 1)
        self.pad = _pair('pad', pad, 0)
        self.dilation = _pair('dilation', dilation, 1)
        self.group = group
        self.offset_scale = float(offset_scale)
        self.dw_kernel_size = dw_kernel_size
        self.center_feature_scale = center_feature_scale
        self.remove_center = bool(remove_center)
        self.without_pointwise = without_pointwise
        kernel_h, kernel_w = self.kernel_size
        if self.remove_center and (kernel_h != kernel_w or kernel_h % 2 == 0 or kernel_h == 1):
            raise ValueError(
                f'remove_center needs an odd square kernel_size of at least 3, got kernel_size {kernel_size!r}'
            )

        # Where the windows' centres lie: rows and columns that the input lacks or has in excess at each border.
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((p - s // 2, p - s + s // 2) for p, s in zip(self.pad, spans, strict=True))
        self.centered = top == bottom == left == right == 0
        self.center_pad = tuple(max(border, 0) for border in (left, right, top, bottom))
        self.center_crop = tuple(max(-border, 0) for border in (left, right, top, bottom))

        points = kernel_h * kernel_w - int(self.remove_center)
        if dw_kernel_size is not None:
            self.offset_mask_dw = nn.Conv2d(
                channels,
                channels,
                dw_kernel_size,
                stride=self.stride if self.centered else 1,
                padding=dw_dilation * (dw_kernel_size // 2),
                dilation=dw_dilation,
                groups=channels,
                **dd,
            )
        self.offset_mask = Linear(channels, -(-3 * group * points // 8) * 8, **dd)
        self.value_proj = nn.Identity() if without_pointwise else Linear(channels, channels, **dd)
        self.output_proj = nn.Identity() if without_pointwise else Linear(channels, channels, bias=output_bias, **dd)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.empty(group, channels, **dd))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.empty(group, **dd))
        else:
            self.register_parameter('center_feature_scale_proj_weight', None)
            self.register_parameter('center_feature_scale_proj_bias', None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as published: offsets, modulation and gates' logits of zero, Xavier projections."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        if not self.without_pointwise:
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def extra_repr(self) -> str:
        return (
            f'{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}, '
            f'dilation={self.dilation}, group={self.group}, offset_scale={self.offset_scale}'
        )

    def _at_centers(self, x: Tensor) -> Tensor:
        """The pixels at the windows' centres, zero outside the map: (N, H, W, C) -> (N, Ho, Wo, C)."""
        if not self.centered:
            left, right, top, bottom = self.center_crop
            x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
            left, right, top, bottom = self.center_pad
            x = F.pad(x, [0, 0, left, right, top, bottom])
        return x[:, :: self.stride[0], :: self.stride[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, Ho, Wo, C), Ho and Wo as for any convolution."""
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

        if self.center_feature_scale_proj_weight is not None:
            gate = F.linear(out, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias).sigmoid()
            out = out.unflatten(-1, (self.group, -1))
            center = self._at_centers(value).unflatten(-1, (self.group, -1))
            out = (out + gate.unsqueeze(-1) * (center - out)).flatten(-2)
        return self.output_proj(out)


def _pair(name: str, size: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(type(number) is int for number in pair):
        raise TypeError(f'{name} must be an int or a (height, width) pair of ints, got {size!r}')
    if min(pair) < least:
        raise ValueError(f'{name} must be at least {least}, got {size!r}')
    return pair[0], pair[1]
