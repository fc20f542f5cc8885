"""InternImage: stages of deformable blocks, on DCNv3.

Papers:
* `InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions`
  - https://arxiv.org/abs/2211.05778

The models and their weights were published at https://github.com/OpenGVLab/InternImage under the MIT license. With
DCNv4 as its operator the architecture is FlashInternImage, in `dcnv4.py`.

Between the convolutions that change the resolution everything is (N, H, W, C): the stages take and give (N, C, H, W)
tensors whose memory is channels_last, so that no value is ever moved for the sake of a layout.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    DropPath,
    LayerNorm,
    LayerNorm2d,
    LayerScale,
    calculate_drop_path_rates,
    get_act_layer,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DCNv3, DCNv4, Mlp
from ._backbone import Backbone
from ._builder import build_model_with_cfg
from ._clip_projector import ClipFusion, ClipHead

__all__ = ['InternImage']


class Stem(nn.Module):
    """Two convolutions of stride 2, each with a LayerNorm: (N, in_chs, H, W) -> (N, out_chs, ceil(H/4), ceil(W/4)).

    Args:
        in_chs: Channels of the image.
        out_chs: Channels of the output; the first convolution has half of them.
        act_layer: Activation between the convolutions.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_chs: int, out_chs: int, act_layer: type[nn.Module] = nn.GELU, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm2d(out_chs // 2, **dd)
        self.act = act_layer()
        self.conv2 = nn.Conv2d(out_chs // 2, out_chs, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm2d(out_chs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class Downsample(nn.Module):
    """A 3x3 convolution without bias and a LayerNorm: (N, in_chs, H, W) -> (N, out_chs, ceil(H/s), ceil(W/s)).

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride s.
        dilation: Dilation of the convolution.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 2, dilation: int = 1, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False, **dd)
        self.norm = LayerNorm2d(out_chs, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class InternImageBlock(nn.Module):
    """A deformable operator and an MLP, each a residual branch, on (N, H, W, C).

    Args:
        op_layer: Makes the operator's module, `dcnzoo.layers.DCNv3` or `DCNv4`.
        dim: Channels.
        groups: Groups of the operator.
        dilation: Factor on the distance of the operator's sampling points, its offsets included.
        mlp_ratio: Hidden channels of the MLP per channel.
        offset_scale: Factor on the operator's offsets and grid.
        layer_scale: Initial value of a learned scale per channel of each branch; None for none.
        post_norm: Norms behind the operator and the MLP instead of before.
        res_post_norm: Norms behind as well as before.
        output_norm: Another norm behind both branches.
        center_feature_scale: Gate between what is sampled and its centre.
        dw_kernel_size: Size of the depthwise convolution that offsets are predicted from; None for the operator's own.
        dcn_output_bias: Bias of the operator's output projection.
        mlp_fc2_bias: Bias of the MLP's second layer.
        act_layer: Activation of the MLP.
        drop_path: Stochastic depth rate of the branches.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        op_layer: Callable[..., nn.Module],
        dim: int,
        groups: int,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        offset_scale: float = 1.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        output_norm: bool = False,
        center_feature_scale: bool = False,
        dw_kernel_size: int | None = None,
        dcn_output_bias: bool = True,
        mlp_fc2_bias: bool = True,
        act_layer: type[nn.Module] = nn.GELU,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = LayerNorm(dim, **dd)
        # Trained offsets are in units of the grid: where a stage keeps a finer map than it was trained on, it is the
        # scale of grid and offsets that has to grow, not the grid's dilation alone.
        self.dcn = op_layer(
            channels=dim,
            group=groups,
            offset_scale=offset_scale * dilation,
            dw_kernel_size=dw_kernel_size,
            dw_dilation=dilation,
            center_feature_scale=center_feature_scale,
            output_bias=dcn_output_bias,
            **dd,
        )
        self.res_post_norm1 = LayerNorm(dim, **dd) if res_post_norm else nn.Identity()
        self.ls1 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, mlp_fc2_bias, **dd)
        self.res_post_norm2 = LayerNorm(dim, **dd) if res_post_norm else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale, **dd) if layer_scale is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

        self.output_norm = LayerNorm(dim, **dd) if output_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path1(self.ls1(self.norm1(self.dcn(x))))
            x = x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))
        else:
            x = x + self.drop_path1(self.ls1(self.res_post_norm1(self.dcn(self.norm1(x)))))
            x = x + self.drop_path2(self.ls2(self.res_post_norm2(self.mlp(self.norm2(x)))))
        return self.output_norm(x)


class InternImageStage(nn.Module):
    """Blocks at one resolution, with the convolution that leads to it: (N, in_chs, H, W) -> (N, out_chs, H/s, W/s).

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the blocks and of the output.
        depth: Number of blocks.
        downsample: Whether a convolution comes first.
        stride: Stride s of that convolution.
        dilation: Dilation of that convolution and of the blocks.
        norm: Whether a norm follows the last block.
        output_norm_ids: Blocks that end in a norm of their own.
        drop_path_rates: Stochastic depth rate of each block.
        block: Makes a block from its channels and what varies over blocks.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        depth: int,
        downsample: bool,
        stride: int,
        dilation: tuple[int, int],
        norm: bool,
        output_norm_ids: Sequence[int],
        drop_path_rates: Sequence[float],
        block: Callable[..., nn.Module],
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = Downsample(in_chs, out_chs, stride, dilation[0], **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                block(
                    dim=out_chs,
                    dilation=dilation[1],
                    output_norm=i in output_norm_ids,
                    drop_path=drop_path_rates[i],
                    **dd,
                )
                for i in range(depth)
            )
        )
        self.norm = LayerNorm(out_chs, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        return x.permute(0, 3, 1, 2)


class InternImage(Backbone):
    """A stem, stages of deformable blocks, and a head.

    Args:
        in_chans: Channels of the image.
        num_classes: Number of classes, 0 for no classifier.
        global_pool: Pooling before the classifier, a name of `timm.layers.SelectAdaptivePool2d` or '' for none.
        output_stride: Stride of the last stage, 8, 16 or 32; below 32 the stages behind are dilated instead.
        channels: Channels of the first stage; each further one has twice as many.
        depths: Number of blocks of each stage.
        groups: Groups of each stage's operator.
        mlp_ratio: Hidden channels of the MLPs per channel.
        offset_scale: Factor on the operator's offsets and grid.
        layer_scale: Initial value of a learned scale per channel of each residual branch; None for none.
        post_norm: Norms behind operator and MLP instead of before, and none behind the stages.
        res_post_norm: Norms behind as well as before.
        level2_post_norm_block_ids: Blocks of the third stage with another norm at their end; None for none.
        center_feature_scale: Gate between what an operator samples and its centre; brings the stages' norms.
        dw_kernel_size: Size of the depthwise convolutions that offsets are predicted from; None for the operator's own.
        dcn_output_bias: Bias of the operators' output projections.
        mlp_fc2_bias: Bias of the MLPs' second layers.
        use_clip_projector: Fuse the last two stages and pool by attention, in place of a 1x1 convolution and averaging.
        act_layer: Activation of stem, MLPs and head, by name or class.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0.
        op_layer: Makes the operator's module, `dcnzoo.layers.DCNv3` or `DCNv4`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Arguments do not fit together or are out of range.
    """

    use_clip_projector: torch.jit.Final[bool]

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        output_stride: int = 32,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        offset_scale: float = 1.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        center_feature_scale: bool = False,
        dw_kernel_size: int | None = None,
        dcn_output_bias: bool = True,
        mlp_fc2_bias: bool = True,
        use_clip_projector: bool = False,
        act_layer: str | type[nn.Module] = 'gelu',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        op_layer: Callable[..., nn.Module] = DCNv3,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        output_norm_ids = level2_post_norm_block_ids or ()
        _check_arguments(in_chans, num_classes, channels, depths, groups, mlp_ratio, drop_path_rate, output_norm_ids)
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}')
        if post_norm and res_post_norm:
            raise ValueError('post_norm and res_post_norm exclude each other, got both')
        if use_clip_projector and output_stride != 32:
            raise ValueError(f'use_clip_projector needs output_stride 32, got {output_stride}')
        if use_clip_projector and len(depths) < 2:
            raise ValueError(f'use_clip_projector needs two stages or more, got depths {depths}')

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_stages = len(depths)
        self.output_norm_ids = tuple(output_norm_ids)
        self.use_clip_projector = use_clip_projector
        self.feature_info = []
        act_layer = _activation(act_layer)

        self.stem = Stem(in_chans, channels, act_layer, **dd)
        block = partial(
            InternImageBlock,
            op_layer,
            mlp_ratio=mlp_ratio,
            offset_scale=offset_scale,
            layer_scale=layer_scale,
            post_norm=post_norm,
            res_post_norm=res_post_norm,
            center_feature_scale=center_feature_scale,
            dw_kernel_size=dw_kernel_size,
            dcn_output_bias=dcn_output_bias,
            mlp_fc2_bias=mlp_fc2_bias,
            act_layer=act_layer,
        )
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        chs, reduction, dilation = channels, 4, 1
        for i, depth in enumerate(depths):
            in_chs, chs = chs, channels * 2**i
            stride, in_dilation = 1, dilation
            if i > 0 and reduction < output_stride:
                stride = 2
                reduction *= stride
            elif i > 0:
                dilation *= 2
            stages.append(
                InternImageStage(
                    in_chs,
                    chs,
                    depth,
                    downsample=i > 0,
                    stride=stride,
                    dilation=(in_dilation, dilation),
                    norm=not post_norm or center_feature_scale,
                    output_norm_ids=output_norm_ids if i == 2 else (),
                    drop_path_rates=drop_path_rates[i],
                    block=partial(block, groups=groups[i]),
                    **dd,
                )
            )
            self.feature_info += [dict(num_chs=chs, reduction=reduction, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        if use_clip_projector:
            self.num_features = 1024
            self.conv_head = ClipFusion((chs // 2, chs), self.num_features, **dd)
            self.head = ClipHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        else:
            self.num_features = int(chs * 1.5)
            self.conv_head = ConvNormAct(chs, self.num_features, act_layer=act_layer, **dd)
            self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self._pooled_features()
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """Patterns that order the parameters from image to classifier, for layer decay.

        As published the blocks are the layers: the stem goes with the first block, the convolution that leads to a
        stage and the norm before it with the stage's first block, and the head with the last block.
        """
        if coarse:
            return dict(stem=r'^stem', blocks=r'^stages\.(\d+)')
        between = ((rf'^stages\.{i - 1}\.norm|^stages\.{i}\.downsample', (i, 0)) for i in range(1, self.num_stages))
        return dict(blocks=[(r'^stem', (0, 0)), *between, (r'^stages\.(\d+)\.blocks\.(\d+)', None), (r'.', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes the stages recompute their blocks in the backward pass instead of keeping what they computed."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The final linear layer, or an identity where there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and the pooling where one is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(device=self.stem.conv1.weight.device, dtype=self.stem.conv1.weight.dtype)
        self.head_hidden_size = self._pooled_features()

    def _pooled_features(self) -> int:
        if self.use_clip_projector:
            return self.head.num_features
        return self.num_features * self.head.global_pool.feat_mult()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes away what the stages asked for do not need.

        Args:
            indices: Stages to keep the outputs of: the last n for an int, those listed for a list.
            prune_norm: Take away what is behind the last stage, head included, even where all stages are kept.
            prune_head: The same.

        Returns:
            The stages' indices.
        """
        take_indices, max_index = feature_take_indices(self.num_stages, indices)
        if prune_norm or prune_head or max_index < self.num_stages - 1:
            self.stages = self.stages[: max_index + 1]
            self.num_stages = max_index + 1
            self.use_clip_projector = False
            self.conv_head = nn.Identity()
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head = ClassifierHead(self.num_features, 0, pool_type='').train(self.training)
            self.reset_classifier(0, '')
        return take_indices

    def _forward_stages(self, x: Tensor, stop: int) -> list[Tensor]:
        x = self.stem(x)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < stop:
                x = stage(x)
                maps.append(x)
        return maps

    def _forward_neck(self, maps: list[Tensor]) -> Tensor:
        if self.use_clip_projector:
            return self.conv_head(maps[-2], maps[-1])
        else:
            return self.conv_head(maps[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map and classifies; with `pre_logits` only pools."""
        return self.head(x, pre_logits=pre_logits)


def _activation(act_layer: str | type[nn.Module]) -> type[nn.Module]:
    try:
        return get_act_layer(act_layer)
    except KeyError as error:
        raise ValueError(f'act_layer must be a class or a name that timm knows, got {act_layer!r}') from error


def _check_arguments(
    in_chans, num_classes, channels, depths, groups, mlp_ratio, drop_path_rate, output_norm_ids
) -> None:
    for name, number, least in (('in_chans', in_chans, 1), ('num_classes', num_classes, 0), ('channels', channels, 2)):
        if not isinstance(number, Integral) or number < least:
            raise ValueError(f'{name} must be an int of at least {least}, got {number!r}')
    for name, numbers in (('depths', depths), ('groups', groups)):
        if not isinstance(numbers, Sequence) or any(not isinstance(i, Integral) or i < 1 for i in numbers):
            raise ValueError(f'{name} must be positive, one number per stage, got {numbers!r}')
    if len(depths) == 0 or len(depths) != len(groups):
        raise ValueError(f'depths and groups must be equally long, got {tuple(depths)} and {tuple(groups)}')
    if not mlp_ratio > 0:
        raise ValueError(f'mlp_ratio must be positive, got {mlp_ratio!r}')
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
    blocks = range(depths[2]) if len(depths) > 2 else ()
    if not isinstance(output_norm_ids, Sequence) or not all(i in blocks for i in output_norm_ids):
        raise ValueError(f'level2_post_norm_block_ids must be blocks of the third stage, got {output_norm_ids}')


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (DCNv3, DCNv4)):
        module.reset_parameters()  # after its linear layers, which `apply` visits first


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Maps the keys of published checkpoints to those of the model; others pass unchanged.

    There are two published layouts: that of the pickles, wrapped as {'model': ...}, and that of the safetensors files,
    with a prefix 'model.' and another name for the layer scales.
    """
    state_dict = state_dict.get('model', state_dict)
    if 'model.patch_embed.conv1.weight' in state_dict:
        state_dict = {key.removeprefix('model.'): value for key, value in state_dict.items()}
    if 'patch_embed.conv1.weight' not in state_dict:
        return state_dict

    def next_stage(match: re.Match) -> str:  # published stages end in the downsampling, here they begin with it
        return f'stages.{int(match[1]) + 1}.downsample'

    def output_norm(match: re.Match) -> str:
        index = int(match[1])
        if index >= len(model.output_norm_ids):
            return match[0]
        return f'stages.2.blocks.{model.output_norm_ids[index]}.output_norm.'

    renamings = (
        (r'^patch_embed\.', 'stem.'),
        (r'^levels\.(\d+)\.downsample', next_stage),
        (r'^levels\.2\.post_norms\.(\d+)\.0\.', output_norm),
        (r'^levels\.', 'stages.'),
        (r'(norm\w*)\.[01]\.', r'\1.'),
        (r'\.(?:gamma|layer_scale)([12])$', r'.ls\1.gamma'),
        (r'^conv_head\.0\.', 'conv_head.conv.'),
        (r'^conv_head\.1\.0\.', 'conv_head.bn.'),
        (r'^dcnv3_head_x3\.', 'conv_head.fine.'),
        (r'^dcnv3_head_x4\.0\.', 'conv_head.coarse.'),
        (r'^clip_projector\.norm1_', 'head.global_pool.norm_'),
        (r'^clip_projector\.cross_dcn\.([qkv])_bias$', r'head.global_pool.\1.bias'),
        (r'^clip_projector\.cross_dcn\.', 'head.global_pool.'),
        (r'^fc_norm\.', 'head.norm.'),
        (r'^head\.(weight|bias)$', r'head.fc.\1'),
    )
    out_dict = {}
    for key, value in state_dict.items():
        for pattern, replacement in renamings:
            key = re.sub(pattern, replacement, key)
        out_dict[key] = value
    return out_dict


def _create_internimage(variant: str, pretrained: bool = False, **kwargs) -> InternImage:
    return build_model_with_cfg(
        InternImage,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


def _every_sixth_block(depths: Sequence[int]) -> tuple[int, ...]:
    """The blocks of the third stage that end in another norm in huge and giant, at whatever depth."""
    return tuple(range(5, depths[2], 6)) if len(depths) > 2 else ()


def _cfg(published: str = '', size: int = 224, **kwargs) -> dict:
    # those with a classifier of ImageNet-1k have a repository of safetensors each, the others are files of one
    place = dict(hf_hub_id=f'OpenGVLab/{published}', hf_hub_filename='model.safetensors') if published else {}
    if published.endswith('.pth'):
        place = dict(hf_hub_id='OpenGVLab/InternImage', hf_hub_filename=published)
    return {
        'url': '',
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': (size // 32, size // 32),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'mit',
        'origin_url': 'https://github.com/OpenGVLab/InternImage',
        'paper_ids': 'arXiv:2211.05778',
        'paper_name': 'InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions',
        **place,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'internimage_tiny.opengvlab_in1k': _cfg('internimage_t_1k_224'),
        'internimage_small.opengvlab_in1k': _cfg('internimage_s_1k_224'),
        'internimage_base.opengvlab_in1k': _cfg('internimage_b_1k_224'),
        'internimage_large.opengvlab_in22k_ft_in1k_384': _cfg('internimage_l_22kto1k_384', size=384),
        'internimage_large.opengvlab_in22k_384': _cfg('internimage_l_22k_192to384.pth', size=384, num_classes=21841),
        'internimage_xlarge.opengvlab_in22k_ft_in1k_384': _cfg('internimage_xl_22kto1k_384', size=384),
        'internimage_xlarge.opengvlab_in22k_384': _cfg('internimage_xl_22k_192to384.pth', size=384, num_classes=21841),
        'internimage_huge.opengvlab_joint_in22k_ft_in1k_640': _cfg('internimage_h_22kto1k_640', size=640),
        'internimage_huge.opengvlab_joint_in22k_384': _cfg(
            'internimage_h_jointto22k_384.pth', size=384, num_classes=21841
        ),
        'internimage_giant.opengvlab_joint_in22k_ft_in1k_512': _cfg('internimage_g_22kto1k_512', size=512),
        'internimage_giant.opengvlab_joint_in22k_384': _cfg(
            'internimage_g_pretrainto22k_384.pth', size=384, num_classes=21841
        ),
        'test_internimage.untrained': _cfg(size=160),
    }
)


@register_model
def internimage_tiny(pretrained: bool = False, **kwargs) -> InternImage:
    """InternImage-T."""
    model_args = dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32))
    return _create_internimage('internimage_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_small(pretrained: bool = False, **kwargs) -> InternImage:
    """InternImage-S."""
    model_args = dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), layer_scale=1e-5, post_norm=True)
    return _create_internimage('internimage_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_base(pretrained: bool = False, **kwargs) -> InternImage:
    """InternImage-B."""
    model_args = dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), layer_scale=1e-5, post_norm=True)
    return _create_internimage('internimage_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_large(pretrained: bool = False, **kwargs) -> InternImage:
    """InternImage-L."""
    model_args = dict(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        offset_scale=2.0,
        layer_scale=1e-5,
        post_norm=True,
    )
    return _create_internimage('internimage_large', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_xlarge(pretrained: bool = False, **kwargs) -> InternImage:
    """InternImage-XL."""
    model_args = dict(
        channels=192,
        depths=(5, 5, 24, 5),
        groups=(12, 24, 48, 96),
        offset_scale=2.0,
        layer_scale=1e-5,
        post_norm=True,
    )
    return _create_internimage('internimage_xlarge', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_huge(pretrained: bool = False, depths: Sequence[int] = (6, 6, 32, 6), **kwargs) -> InternImage:
    """InternImage-H."""
    model_args = dict(
        channels=320,
        depths=depths,
        groups=(10, 20, 40, 80),
        res_post_norm=True,
        level2_post_norm_block_ids=_every_sixth_block(depths),
        center_feature_scale=True,
        dw_kernel_size=5,
        use_clip_projector=True,
    )
    return _create_internimage('internimage_huge', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def internimage_giant(pretrained: bool = False, depths: Sequence[int] = (2, 2, 48, 4), **kwargs) -> InternImage:
    """InternImage-G."""
    model_args = dict(
        channels=512,
        depths=depths,
        groups=(16, 32, 64, 128),
        post_norm=True,
        level2_post_norm_block_ids=_every_sixth_block(depths),
        center_feature_scale=True,
        dw_kernel_size=5,
        use_clip_projector=True,
    )
    return _create_internimage('internimage_giant', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_internimage(pretrained: bool = False, **kwargs) -> InternImage:
    """A miniature for tests."""
    model_args = dict(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), mlp_ratio=2.0)
    return _create_internimage('test_internimage', pretrained=pretrained, **dict(model_args, **kwargs))
