"""Modules with parameters on top of the operators."""

from .dcnv4 import DCNv4
from .dynamic_conv import CondConv2d, DynamicConv2d
from .linear import Linear, Mlp

__all__ = ['CondConv2d', 'DCNv4', 'DynamicConv2d', 'Linear', 'Mlp']
