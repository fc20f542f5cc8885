"""The DCNv4 module along sequences and through volumes."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import dcnv4_1d, dcnv4_3d
from ._geometry import check_map, check_positive, check_scale, sizes

torch.fx.wrap('check_map')


class _DCNv4Nd(nn.Module):
    """What `DCNv4_1d` and `DCNv4_3d` share: the projections of `DCNv4` around an operator."""

    dims: ClassVar[int]
    layout: ClassVar[str]
    operator: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        pad: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        remove_center: bool = False,
        output_bias: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_positive(channels=channels, group=group)
        if channels % group != 0:
            raise ValueError(f'group must divide the {channels} channels, got {group}')
        self.channels = channels
        self.kernel_size = sizes('kernel_size', kernel_size, 1, self.dims)
        self.stride = sizes('stride', stride, 1, self.dims)
        self.pad = sizes('pad', pad, 0, self.dims)
        self.dilation = sizes('dilation', dilation, 1, self.dims)
        self.group = group
        self.offset_scale = check_scale(offset_scale)
        self.remove_center = bool(remove_center)
        if remove_center and (
            len(set(self.kernel_size)) > 1 or self.kernel_size[0] % 2 == 0 or max(self.kernel_size) == 1
        ):
            raise ValueError(f'remove_center needs one odd kernel_size of at least 3, got {kernel_size!r}')

        # Where the windows' centres lie: what the input lacks or, negative, has in excess at each end, last axis first.
        self.center_pad = [0, 0]
        for kernel, border, distance in zip(self.kernel_size[::-1], self.pad[::-1], self.dilation[::-1], strict=True):
            span = distance * (kernel - 1)
            self.center_pad += [border - span // 2, border - span + span // 2]

        points = math.prod(self.kernel_size) - int(self.remove_center)
        self.offset_mask = nn.Linear(channels, (self.dims + 1) * group * points, **dd)
        self.value_proj = nn.Linear(channels, channels, **dd)
        self.output_proj = nn.Linear(channels, channels, bias=output_bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as `DCNv4` does: offsets and modulation of zero, Xavier projections."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        return (
            f'{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}, '
            f'dilation={self.dilation}, group={self.group}, offset_scale={self.offset_scale}'
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, *size, C) to (N, *out, C), sizes as for any convolution."""
        check_map(x, self.layout, self.channels)
        centers = F.pad(x, self.center_pad)[(slice(None), *(slice(None, None, step) for step in self.stride))]
        out = self.operator(
            self.value_proj(x),
            self.offset_mask(centers),
            groups=self.group,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.pad,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )
        return self.output_proj(out)


class DCNv4_1d(_DCNv4Nd):
    """`DCNv4` along sequences, (N, L, C) -> (N, Lo, C), on every backend of `dcnzoo.ops.dcnv4`.

    Args:
        channels: Channels of input and output.
        kernel_size: Points of the sampling grid.
        stride: Step of the output grid.
        pad: Elements by which the grid starts outside the input.
        dilation: Distance of the grid's points.
        group: Number of groups of channels that share offsets.
        offset_scale: Factor on offsets and grid around the window's centre.
        remove_center: Leave out the grid's central point (odd kernels only).
        output_bias: Whether the output projection has a bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is not an int, or `offset_scale` not a number.
        ValueError: `group` does not divide `channels`, or a number is out of range.
    """

    dims = 1
    layout = 'N, L, C'
    operator = staticmethod(dcnv4_1d)


class DCNv4_3d(_DCNv4Nd):
    """`DCNv4` through volumes, (N, D, H, W, C) -> (N, Do, Ho, Wo, C), on the reference in plain PyTorch.

    The arguments are those of `DCNv4_1d`, but that sizes are ints or (depth, height, width) triples.

    Raises:
        TypeError: A size is neither an int nor a triple of ints, or `offset_scale` is not a number.
        ValueError: `group` does not divide `channels`, or a number is out of range.
    """

    dims = 3
    layout = 'N, D, H, W, C'
    operator = staticmethod(dcnv4_3d)
