"""FlashInternImage: InternImage's architecture on DCNv4.

Papers:
* `Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications`
  - https://arxiv.org/abs/2401.06197
* `InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions`
  - https://arxiv.org/abs/2211.05778

The sizes tiny to large and their weights were published at https://github.com/OpenGVLab/DCNv4 under the MIT license;
atto and nano are dcnzoo's own.

Between the convolutions that change the resolution everything is (N, H, W, C): the stages take and give (N, C, H, W)
tensors whose memory is channels_last, so that no value is ever moved for the sake of a layout.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

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

from ..layers import DCNv4, Mlp
from ._builder import build_model_with_cfg
from ._clip_projector import ClipFusion, ClipHead

__all__ = ['FlashInternImage']


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
        op_layer: Makes the operator's module; takes the argument names of `dcnzoo.layers.DCNv4`.
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
        dw_kernel_size: Size of the depthwise convolution that offsets are predicted from; None for none.
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
        dcn_output_bias: bool = False,
        mlp_fc2_bias: bool = False,
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


class FlashInternImage(nn.Module):
    """InternImage's stages of deformable blocks, with DCNv4 as their operator.

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
        dw_kernel_size: Size of the depthwise convolutions that offsets are predicted from; None for none.
        dcn_output_bias: Bias of the operators' output projections.
        mlp_fc2_bias: Bias of the MLPs' second layers.
        use_clip_projector: Fuse the last two stages and pool by attention, in place of a 1x1 convolution and averaging.
        act_layer: Activation, by name or class.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0.
        op_layer: Makes the operator's module.
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
        dcn_output_bias: bool = False,
        mlp_fc2_bias: bool = False,
        use_clip_projector: bool = False,
        act_layer: str | type[nn.Module] = 'gelu',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        op_layer: Callable[..., nn.Module] = DCNv4,
        device=None,
        dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride!r}')
        if len(depths) != len(groups):
            raise ValueError(f'depths and groups must be equally long, got {tuple(depths)} and {tuple(groups)}')
        if post_norm and res_post_norm:
            raise ValueError('post_norm and res_post_norm exclude each other, got both')
        if use_clip_projector and output_stride != 32:
            raise ValueError(f'use_clip_projector needs output_stride 32, got {output_stride}')
        output_norm_ids = tuple(level2_post_norm_block_ids or ())
        if output_norm_ids and (len(depths) < 3 or not all(0 <= i < depths[2] for i in output_norm_ids)):
            raise ValueError(f'level2_post_norm_block_ids must be blocks of the third stage, got {output_norm_ids}')

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.output_norm_ids = output_norm_ids
        self.use_clip_projector = use_clip_projector
        self.feature_info = []
        act_layer = get_act_layer(act_layer)

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
        """Patterns that order the parameters from image to classifier, for layer decay."""
        return dict(
            stem=r'^stem',
            blocks=r'^stages\.(\d+)'
            if coarse
            else [
                (r'^stages\.(\d+)\.downsample', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^stages\.(\d+)\.norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond biases and other vectors."""
        return set()

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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the network and collects the outputs of stages.

        Args:
            x: Images, (N, in_chans, H, W).
            indices: Stages to collect: the last n for an int, those listed for a list, all for None.
            norm: Has no effect, each stage's output is as normalised as the next stage finds it.
            stop_early: Leave out what follows the last stage collected.
            output_fmt: Layout of the maps collected, 'NCHW' or 'NHWC'.
            intermediates_only: Return the list alone.

        Returns:
            What `forward_features` gives (the last stage run, with `stop_early`) and the list of maps.

        Raises:
            ValueError: `output_fmt` is another layout.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        previous = x
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            previous, x = x, stage(x)
            if i in take_indices:
                intermediates.append(x if output_fmt == 'NCHW' else x.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self._forward_conv_head(previous, x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes away what the stages asked for do not need.

        Args:
            indices: Stages to keep the outputs of: the last n for an int, those listed for a list.
            prune_norm: Take away the layer between the last stage and the pooling.
            prune_head: Take away the classifier and the pooling.

        Returns:
            The stages' indices.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_conv_head = prune_norm or max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_conv_head:
            self.use_clip_projector = False
            self.conv_head = nn.Identity()
            self.num_features = self.feature_info[max_index]['num_chs']
            self.head = ClassifierHead(self.num_features, 0, pool_type='').train(self.training)
        if prune_conv_head or prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def _forward_conv_head(self, previous: Tensor, x: Tensor) -> Tensor:
        if self.use_clip_projector:
            return self.conv_head(previous, x)
        else:
            return self.conv_head(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Maps images (N, in_chans, H, W) to the map that is pooled, (N, num_features, H', W')."""
        x = self.stem(x)
        previous = x
        for stage in self.stages:
            previous, x = x, stage(x)
        return self._forward_conv_head(previous, x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map and classifies; with `pre_logits` only pools."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DCNv4):
        module.reset_parameters()  # after its linear layers, which `apply` visits first


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Maps the keys of published checkpoints to those of the model; others pass unchanged."""
    state_dict = state_dict.get('model', state_dict)
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
        (r'\.gamma([12])$', r'.ls\1.gamma'),
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


def _create_dcnv4(variant: str, pretrained: bool = False, **kwargs) -> FlashInternImage:
    return build_model_with_cfg(
        FlashInternImage,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


def _cfg(url: str = '', **kwargs) -> dict:
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'paper_ids': 'arXiv:2401.06197',
        'paper_name': 'Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications',
        **kwargs,
    }


def _published(filename: str, **kwargs) -> dict:
    return _cfg(
        hf_hub_id='OpenGVLab/DCNv4',
        hf_hub_filename=filename,
        license='mit',
        origin_url='https://github.com/OpenGVLab/DCNv4',
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        'dcnv4_atto.untrained': _cfg(),
        'dcnv4_nano.untrained': _cfg(),
        'dcnv4_tiny.opengvlab_in1k': _published('flash_intern_image_t_1k_224.pth'),
        'dcnv4_small.opengvlab_in1k': _published('flash_intern_image_s_1k_224.pth'),
        'dcnv4_base.opengvlab_in1k': _published('flash_intern_image_b_1k_224.pth'),
        'dcnv4_large.opengvlab_in22k_ft_in1k_384': _published(
            'flash_internimage_l_22kto1k_384.pth', input_size=(3, 384, 384), pool_size=(12, 12)
        ),
        'test_dcnv4.untrained': _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


@register_model
def dcnv4_atto(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """DCNv4 atto: dcnzoo's smallest for real use."""
    model_args = dict(channels=32, depths=(2, 2, 6, 2), groups=(2, 4, 8, 16))
    return _create_dcnv4('dcnv4_atto', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dcnv4_nano(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """DCNv4 nano: dcnzoo's own, half of tiny."""
    model_args = dict(channels=64, depths=(2, 2, 8, 2), groups=(4, 8, 16, 32))
    return _create_dcnv4('dcnv4_nano', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dcnv4_tiny(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """FlashInternImage-T."""
    model_args = dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32))
    return _create_dcnv4('dcnv4_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dcnv4_small(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """FlashInternImage-S."""
    model_args = dict(
        channels=80,
        depths=(4, 4, 21, 4),
        groups=(5, 10, 20, 40),
        layer_scale=1e-5,
        post_norm=True,
        dw_kernel_size=3,
    )
    return _create_dcnv4('dcnv4_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dcnv4_base(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """FlashInternImage-B."""
    model_args = dict(
        channels=112,
        depths=(4, 4, 21, 4),
        groups=(7, 14, 28, 56),
        offset_scale=0.5,
        layer_scale=1e-5,
        post_norm=True,
        dw_kernel_size=3,
    )
    return _create_dcnv4('dcnv4_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dcnv4_large(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """FlashInternImage-L."""
    model_args = dict(
        channels=160,
        depths=(5, 5, 22, 5),
        groups=(10, 20, 40, 80),
        offset_scale=2.0,
        layer_scale=1e-5,
        post_norm=True,
        dw_kernel_size=3,
        dcn_output_bias=True,
        mlp_fc2_bias=True,
    )
    return _create_dcnv4('dcnv4_large', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_dcnv4(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """A miniature for tests."""
    model_args = dict(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), mlp_ratio=2.0)
    return _create_dcnv4('test_dcnv4', pretrained=pretrained, **dict(model_args, **kwargs))
