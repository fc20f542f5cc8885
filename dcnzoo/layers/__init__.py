"""Modules with parameters on top of the operators."""

from .dcnv3 import DCNv3
from .dcnv4 import DCNv4, DCNv4Conv2d
from .dcnv4_nd import DCNv4_1d, DCNv4_3d
from .deform_attn import MultiScaleDeformableAttention
from .deform_conv import DeformConv2d
from .dynamic_conv import CondConv2d, DynamicConv2d
from .linear import Linear, Mlp
from .replace import ConvReplacement, ReplaceReport, replace_conv

__all__ = [
    'CondConv2d',
    'ConvReplacement',
    'DCNv3',
    'DCNv4',
    'DCNv4Conv2d',
    'DCNv4_1d',
    'DCNv4_3d',
    'DeformConv2d',
    'DynamicConv2d',
    'Linear',
    'Mlp',
    'MultiScaleDeformableAttention',
    'ReplaceReport',
    'replace_conv',
]
