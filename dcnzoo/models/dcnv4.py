"""FlashInternImage: InternImage on DCNv4.

Papers:
* `Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision Applications`
  - https://arxiv.org/abs/2401.06197

The sizes tiny to large and their weights were published at https://github.com/OpenGVLab/DCNv4 under the MIT license;
atto and nano are dcnzoo's own.
"""

from collections.abc import Callable

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import DCNv4
from ._builder import build_model_with_cfg
from .internimage import InternImage, checkpoint_filter_fn

__all__ = ['FlashInternImage']


class FlashInternImage(InternImage):
    """InternImage with DCNv4 as its operator, which predicts offsets without a depthwise convolution by default.

    Args:
        dcn_output_bias: Bias of the operators' output projections.
        mlp_fc2_bias: Bias of the MLPs' second layers.
        op_layer: Makes the operator's module.
        kwargs: Further arguments of `InternImage`.
    """

    def __init__(
        self,
        *,
        dcn_output_bias: bool = False,
        mlp_fc2_bias: bool = False,
        op_layer: Callable[..., nn.Module] = DCNv4,
        **kwargs,
    ):
        super().__init__(dcn_output_bias=dcn_output_bias, mlp_fc2_bias=mlp_fc2_bias, op_layer=op_layer, **kwargs)


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
