"""ParameterNet: GhostNet with dynamic convolutions.

Papers:
* `ParameterNet: Parameters Are All You Need for Large-scale Visual Pretraining of Mobile Networks`
  - https://arxiv.org/abs/2306.14525
* `GhostNet: More Features from Cheap Operations` - https://arxiv.org/abs/1911.11907

The architectures were published at https://github.com/huawei-noah/Efficient-AI-Backbones under the Apache-2.0 license,
without weights.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    Linear,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_act_layer,
    make_divisible,
)
from timm.models import (
    adapt_input_conv,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DynamicConv2d
from ._backbone import Backbone
from ._builder import build_model_with_cfg

# Whole in the graphs that timm records, as a layer computes one sample otherwise than its parts would.
register_notrace_module(DynamicConv2d)

__all__ = ['ParameterNet']


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, the others from those by a depthwise one.

    Args:
        conv_layer: Makes a convolution.
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        dilation: Dilation of the depthwise convolution.
        act_layer: Activation behind both convolutions.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        conv_layer: Callable[..., nn.Module],
        in_chs: int,
        out_chs: int,
        dilation: int = 1,
        act_layer: type[nn.Module] = nn.Hardswish,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.out_chs = out_chs
        half = math.ceil(out_chs / 2)
        self.primary_conv = nn.Sequential(
            conv_layer(in_chs, half, 1, padding=0, **dd),
            nn.BatchNorm2d(half, **dd),
            act_layer(),
        )
        self.cheap_operation = nn.Sequential(
            conv_layer(half, half, 3, padding=dilation, dilation=dilation, groups=half, **dd),
            nn.BatchNorm2d(half, **dd),
            act_layer(),
        )

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        x = torch.cat((primary, self.cheap_operation(primary)), 1)
        return x[:, : self.out_chs]


class GhostBottleneck(nn.Module):
    """Two ghost modules with what is between them, as a residual branch: (N, in_chs, H, W) -> (N, out_chs, H/s, W/s).

    Args:
        conv_layer: Makes a convolution.
        in_chs: Channels of the input.
        mid_chs: Channels between the ghost modules.
        out_chs: Channels of the output.
        kernel_size: Size of the depthwise convolutions that downsample.
        stride: Stride s.
        dilation: Dilation of the depthwise convolutions up to the one that downsamples, and behind it.
        downsample: Whether there are convolutions that downsample, be it with a stride of 1.
        se_ratio: Channels of the squeeze-and-excitation's bottleneck per channel; 0 for none.
        act_layer: Activation of the first ghost module.
        drop_path: Stochastic depth rate of the branch.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        conv_layer: Callable[..., nn.Module],
        in_chs: int,
        mid_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        downsample: bool = False,
        se_ratio: float = 0.0,
        act_layer: type[nn.Module] = nn.Hardswish,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        depthwise = dict(
            kernel_size=kernel_size, stride=stride, padding=dilation[0] * (kernel_size // 2), dilation=dilation[0]
        )
        self.ghost1 = GhostModule(conv_layer, in_chs, mid_chs, dilation[0], act_layer, **dd)
        if downsample:
            self.conv_dw = nn.Conv2d(mid_chs, mid_chs, groups=mid_chs, bias=False, **depthwise, **dd)
            self.bn_dw = nn.BatchNorm2d(mid_chs, **dd)
        else:
            self.conv_dw = nn.Identity()
            self.bn_dw = nn.Identity()
        if se_ratio > 0:
            round_fn = partial(make_divisible, divisor=4)
            self.se = SqueezeExcite(
                mid_chs, se_ratio, act_layer=act_layer, gate_layer='hard_sigmoid', rd_round_fn=round_fn, **dd
            )
        else:
            self.se = nn.Identity()
        self.ghost2 = GhostModule(conv_layer, mid_chs, out_chs, dilation[1], nn.Identity, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if downsample or in_chs != out_chs:
            self.shortcut = nn.Sequential(
                conv_layer(in_chs, in_chs, groups=in_chs, **depthwise, **dd),
                nn.BatchNorm2d(in_chs, **dd),
                conv_layer(in_chs, out_chs, 1, padding=0, **dd),
                nn.BatchNorm2d(out_chs, **dd),
            )
        else:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.ghost1(x)
        x = self.bn_dw(self.conv_dw(x))
        x = self.se(x)
        x = self.ghost2(x)
        return self.drop_path(x) + shortcut


class ConvBnAct(nn.Module):
    """A 1x1 convolution, BatchNorm and activation: (N, in_chs, H, W) -> (N, out_chs, H, W).

    Args:
        conv_layer: Makes a convolution.
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        act_layer: Activation.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        conv_layer: Callable[..., nn.Module],
        in_chs: int,
        out_chs: int,
        act_layer: type[nn.Module] = nn.Hardswish,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = conv_layer(in_chs, out_chs, 1, padding=0, **dd)
        self.bn1 = nn.BatchNorm2d(out_chs, **dd)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv(x)))


# Stages of GhostNet: kernel size, channels inside, channels, squeeze-and-excitation, stride of each block, for width 1.
GHOSTNET = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    (
        (5, 960, 160, 0, 1),
        (5, 960, 160, 0.25, 1),
        (5, 960, 160, 0, 1),
        (5, 960, 160, 0.25, 1),
    ),
)
# The layout published for 600M: a block more in three stages, and squeeze-and-excitation in all of the last.
GHOSTNET_600M = (
    *GHOSTNET[:4],
    ((5, 120, 40, 0.25, 1),) * 2,
    GHOSTNET[5],
    (
        *((3, 200, 80, 0, 1),) * 3,
        (3, 480, 112, 0.25, 1),
        *((3, 672, 112, 0.25, 1),) * 2,
    ),
    GHOSTNET[7],
    ((5, 960, 160, 0.25, 1),) * 5,
)


class ParameterNet(Backbone):
    """GhostNet whose convolutions, but for the downsampling ones and the head's, are dynamic.

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling before the head, a name of `timm.layers.SelectAdaptivePool2d` or '' for none.
        output_stride: Stride of the last stage, 8, 16 or 32; below 32 the stages behind are dilated instead.
        cfgs: Stages: kernel size, channels inside, channels, ratio of squeeze-and-excitation and stride of each block.
        width: Factor on the channels.
        num_experts: Experts of each dynamic convolution; 0 for the same network of plain convolutions.
        routing: What predicts the experts' shares, 'linear' or 'mlp'.
        routing_activation: 'sigmoid' or 'softmax' over the shares.
        temperature: Divides the logits of the shares.
        head_chs: Channels of the hidden layer before the classifier.
        act_layer: Activation, by name or class.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int = 32,
        cfgs: Sequence[Sequence[tuple[int, int, int, float, int]]] = GHOSTNET,
        width: float = 1.0,
        num_experts: int = 4,
        routing: str = 'linear',
        routing_activation: str = 'sigmoid',
        temperature: float = 1.0,
        head_chs: int = 1280,
        act_layer: str | type[nn.Module] = 'hard_swish',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}')
        if not isinstance(num_experts, int) or num_experts < 0:
            raise ValueError(f'num_experts must be a positive int, or 0 for plain convolutions, got {num_experts!r}')
        if not width > 0:
            raise ValueError(f'width must be positive, got {width!r}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []
        act_layer = get_act_layer(act_layer)
        if num_experts == 0:
            conv_layer = partial(nn.Conv2d, bias=False)
        else:
            conv_layer = partial(
                DynamicConv2d,
                num_experts=num_experts,
                routing=routing,
                routing_activation=routing_activation,
                temperature=temperature,
            )

        chs = make_divisible(16 * width, 4)
        self.conv_stem = conv_layer(in_chans, chs, 3, stride=2, padding=1, **dd)
        self.bn1 = nn.BatchNorm2d(chs, **dd)
        self.act1 = act_layer()

        drop_path_rates = calculate_drop_path_rates(drop_path_rate, [len(stage) for stage in cfgs], stagewise=True)
        stages = []
        reduction, dilation = 2, 1
        for i, stage in enumerate(cfgs):
            blocks = []
            for (kernel_size, mid, out, se_ratio, stride), drop_path in zip(stage, drop_path_rates[i], strict=True):
                downsample, in_dilation = stride > 1, dilation
                if downsample and reduction * stride > output_stride:
                    dilation, stride = dilation * stride, 1
                reduction *= stride
                in_chs, mid_chs, chs = chs, make_divisible(mid * width, 4), make_divisible(out * width, 4)
                blocks.append(
                    GhostBottleneck(
                        conv_layer,
                        in_chs,
                        mid_chs,
                        chs,
                        kernel_size,
                        stride,
                        (in_dilation, dilation),
                        downsample,
                        se_ratio,
                        act_layer,
                        drop_path,
                        **dd,
                    )
                )
            stages.append(nn.Sequential(*blocks))
            # Features are the last maps before a block that downsamples.
            if i + 1 == len(cfgs) or cfgs[i + 1][0][-1] > 1:
                self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'blocks.{i}'))
        self.num_stages = len(self.feature_info)
        self.stage_ends = [int(info['module'].split('.')[-1]) for info in self.feature_info]
        stages.append(nn.Sequential(ConvBnAct(conv_layer, chs, mid_chs, act_layer, **dd)))
        self.blocks = nn.Sequential(*stages)

        self.num_features = mid_chs
        self.head_hidden_size = head_chs
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        self.conv_head = nn.Conv2d(self.num_features * self.global_pool.feat_mult(), head_chs, 1, **dd)
        self.act2 = act_layer()
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.classifier = Linear(head_chs, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """Patterns that order the parameters from image to classifier, for layer decay."""
        return dict(
            stem=r'^conv_stem|^bn1',
            blocks=[
                (r'^blocks\.(\d+)' if coarse else r'^blocks\.(\d+)\.(\d+)', None),
                (r'^conv_head', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the stages recompute their blocks in the backward pass instead of keeping what they computed."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer, or an identity where there is none."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and the pooling where one is named.

        Raises:
            ValueError: The pooling is of another width than the head was made for.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool = SelectAdaptivePool2d(pool_type=pool_type)
        pooled_chs = self.num_features * pool.feat_mult()
        if isinstance(self.conv_head, nn.Identity):
            self.head_hidden_size = pooled_chs
        elif pooled_chs != self.conv_head.in_channels:
            raise ValueError(
                f'global_pool {pool_type!r} gives {pooled_chs} channels, but the head was made for '
                f'{self.conv_head.in_channels}: name the pooling when the model is created'
            )
        parameter = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool = pool
        self.flatten = nn.Flatten(1) if pool_type else nn.Identity()
        if num_classes > 0:
            self.classifier = Linear(self.head_hidden_size, num_classes, device=parameter.device, dtype=parameter.dtype)
        else:
            self.classifier = nn.Identity()
        for module in (self.global_pool, self.flatten, self.classifier):
            module.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes away what the maps asked for do not need.

        Args:
            indices: Resolutions to keep: the last n for an int, those listed for a list.
            prune_norm: Take away what is behind the last block, head included, even where all blocks are kept.
            prune_head: The same.

        Returns:
            The resolutions' indices.
        """
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        if prune_norm or prune_head or max_index < self.num_stages - 1:
            self.blocks = self.blocks[: self.stage_ends[max_index] + 1]
            self.stage_ends = self.stage_ends[: max_index + 1]
            self.num_stages = max_index + 1
            self.num_features = self.feature_info[max_index]['num_chs']
            self.conv_head = nn.Identity()
            self.act2 = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def _forward_stages(self, x: Tensor, stop: int) -> list[Tensor]:
        x = self.act1(self.bn1(self.conv_stem(x)))
        maps: list[Tensor] = []
        for i, blocks in enumerate(self.blocks):
            if i <= self.stage_ends[stop - 1]:
                if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108 - TorchScript
                    x = checkpoint_seq(blocks, x)
                else:
                    x = blocks(x)
                if i in self.stage_ends:
                    maps.append(x)
        return maps

    def _forward_neck(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1]
        for i, blocks in enumerate(self.blocks):
            if i > self.stage_ends[-1]:
                x = blocks(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map and classifies; with `pre_logits` only pools and takes the hidden layer's output."""
        x = self.global_pool(x)
        x = self.act2(self.conv_head(x))
        x = self.flatten(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Unwraps a checkpoint; its keys are the model's. Fits the stem to the channels of the model's images."""
    for wrapper in ('state_dict', 'model'):
        state_dict = state_dict.get(wrapper, state_dict)
    weight, routing = 'conv_stem.cond_conv.weight', 'conv_stem.routing.weight'
    if weight in state_dict and routing in state_dict and state_dict[routing].shape[1] != model.in_chans:
        # timm fits kernels of four dimensions to images of other channels, the bank of experts takes such kernels too.
        # The routing's average per channel goes the way of the channels.
        experts, channels = state_dict[routing].shape
        state_dict = dict(state_dict)
        state_dict[weight] = state_dict[weight].view(-1, channels, *model.conv_stem.cond_conv.kernel_size)
        averages = state_dict[routing].view(experts, channels, 1, 1)
        state_dict[routing] = adapt_input_conv(model.in_chans, averages, channels).flatten(1)
    return state_dict


def _create_parameternet(variant: str, pretrained: bool = False, **kwargs) -> ParameterNet:
    return build_model_with_cfg(
        ParameterNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **kwargs,
    )


def _cfg(url: str = '', **kwargs) -> dict:
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem.cond_conv',
        'classifier': 'classifier',
        'license': 'apache-2.0',
        'origin_url': 'https://github.com/huawei-noah/Efficient-AI-Backbones',
        'paper_ids': 'arXiv:2306.14525',
        'paper_name': 'ParameterNet: Parameters Are All You Need for Large-scale Visual Pretraining of Mobile Networks',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'parameternet_300m.untrained': _cfg(),
        'parameternet_600m.untrained': _cfg(),
        'test_parameternet.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


@register_model
def parameternet_300m(pretrained: bool = False, **kwargs) -> ParameterNet:
    """ParameterNet-300M."""
    model_args = dict(cfgs=GHOSTNET, width=1.45)
    return _create_parameternet('parameternet_300m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def parameternet_600m(pretrained: bool = False, **kwargs) -> ParameterNet:
    """ParameterNet-600M."""
    model_args = dict(cfgs=GHOSTNET_600M, width=1.9)
    return _create_parameternet('parameternet_600m', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_parameternet(pretrained: bool = False, **kwargs) -> ParameterNet:
    """A miniature for tests."""
    cfgs = (
        ((3, 16, 16, 0, 1),),
        ((3, 48, 24, 0, 2),),
        ((5, 72, 40, 0.25, 2),),
        ((3, 120, 80, 0, 2), (3, 184, 112, 0.25, 1)),
        ((5, 240, 160, 0.25, 2),),
    )
    model_args = dict(cfgs=cfgs, width=0.5, head_chs=64)
    return _create_parameternet('test_parameternet', pretrained=pretrained, **dict(model_args, **kwargs))
