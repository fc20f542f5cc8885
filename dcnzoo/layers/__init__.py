"""Modules with parameters on top of the operators."""

from .dcnv4 import DCNv4
from .dcnv4_nd import DCNv4_1d, DCNv4_3d
from .deform_attn import MultiScaleDeformableAttention
from .dynamic_conv import CondConv2d, DynamicConv2d
from .linear import Linear, Mlp

__all__ = [
    'CondConv2d',
    'DCNv4',
    'DCNv4_1d',
    'DCNv4_3d',
    'DynamicConv2d',
    'Linear',
    'Mlp',
    'MultiScaleDeformableAttention',
]
