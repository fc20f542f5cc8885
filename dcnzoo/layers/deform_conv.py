"""Deformable convolution v1 and v2: torchvision's operator with the convolution that predicts its offsets."""

import math

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn

from ._geometry import check_groups, check_map, check_positive, conv_padding, pair

torch.fx.wrap('check_map')


class DeformConv2d(nn.Module):
    """Deformable convolution `v1 <https://arxiv.org/abs/1703.06211>`_ and `v2 <https://arxiv.org/abs/1811.11168>`_.

    A drop-in for `torch.nn.Conv2d`. For each output pixel the offsets of the kernel's taps, and in v2 a factor between
    0 and 1 for each, are predicted from the input by a convolution of the same geometry, which starts at zero. So v1
    starts as the ordinary convolution with its weight and bias, and v2 as that with half of the weight, since every
    factor is the sigmoid of 0.

    What is float16 or bfloat16, by autocast too, is cast to float32 for the operator and its result back: torchvision
    has no kernels for bfloat16, and coordinates in half precision are off by up to a pixel. In an export to ONNX the
    layer is the standard's DeformConv of opset 19.

    State_dict keys and layouts are those of mmcv's ModulatedDeformConv2dPack; the published DCNv2 code's name of the
    predicting convolution, `conv_offset_mask`, loads as well.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel, an int or a (height, width) pair like stride, padding and dilation.
        stride: Step of the output grid in pixels of the input.
        padding: Rows and columns of zeros around the input, or 'same' or 'valid' as for `torch.nn.Conv2d`.
        dilation: Distance of the kernel's taps in pixels.
        groups: Number of groups of channels that are convolved apart.
        bias: Whether there is a bias.
        offset_groups: Number of groups of the input's channels that share offsets.
        modulated: Predict a factor for each tap as well, as v2 does.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: A size is neither an int nor a pair of ints.
        ValueError: A number is out of range, or `groups` or `offset_groups` does not divide the channels.
    """

    modulated: torch.jit.Final[bool]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, groups=groups, offset_groups=offset_groups)
        check_groups(in_channels, out_channels, groups)
        if in_channels % offset_groups != 0:
            raise ValueError(f'offset_groups must divide the {in_channels} channels in, got {offset_groups}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair('kernel_size', kernel_size, 1)
        self.stride = pair('stride', stride, 1)
        self.dilation = pair('dilation', dilation, 1)
        self.padding, (self.pad_bottom, self.pad_right) = conv_padding(
            padding, self.kernel_size, self.stride, self.dilation
        )
        self.groups = groups
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **dd))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **dd))
        else:
            self.register_parameter('bias', None)
        points = offset_groups * math.prod(self.kernel_size)
        self.conv_offset = nn.Conv2d(
            in_channels,
            (3 if modulated else 2) * points,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            **dd,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias as `torch.nn.Conv2d` does, and what predicts offsets with zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ('weight', 'bias'):
            published = f'{prefix}conv_offset_mask.{name}'
            if published in state_dict:
                state_dict[f'{prefix}conv_offset.{name}'] = state_dict.pop(published)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, '
            f'offset_groups={self.offset_groups}, modulated={self.modulated}'
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) to (N, out_channels, Ho, Wo), Ho and Wo as for any convolution."""
        check_map(x, 'N, C, H, W', self.in_channels)
        if self.pad_bottom + self.pad_right > 0:
            x = F.pad(x, [0, self.pad_right, 0, self.pad_bottom])
        offset = self.conv_offset(x)
        mask = torch.jit.annotate(Tensor | None, None)
        if self.modulated:
            points = offset.shape[1] // 3
            offset, mask = offset[:, : 2 * points], offset[:, 2 * points :].sigmoid()
        return _deform_conv2d(
            x, offset, mask, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


@torch.fx.wrap
def _deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """`torchvision.ops.deform_conv2d` in a dtype that it has kernels for, or the standard's operator in ONNX."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    operands = x.to(dtype), offset.to(dtype), weight.to(dtype)
    bias = bias.to(dtype) if bias is not None else None
    mask = mask.to(dtype) if mask is not None else None
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips such a branch only where it stands alone)
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return _onnx_deform_conv(*operands, bias, mask, stride, padding, dilation, groups).to(x.dtype)
    return torchvision.ops.deform_conv2d(*operands, bias, stride, padding, dilation, mask).to(x.dtype)


def _onnx_deform_conv(x, offset, weight, bias, mask, stride, padding, dilation, groups) -> Tensor:
    kernel_h, kernel_w = weight.shape[2:]
    attributes = dict(
        kernel_shape=[kernel_h, kernel_w],
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        offset_group=offset.shape[1] // (2 * kernel_h * kernel_w),
    )
    shape = x.shape[0], weight.shape[0], offset.shape[2], offset.shape[3]
    inputs = x, weight, offset, bias, mask
    return torch.onnx.ops.symbolic('DeformConv', inputs, attributes, dtype=x.dtype, shape=shape, version=19)
