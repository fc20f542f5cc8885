"""Operators as functions: tensors in, tensors out."""

from . import reference
from ._dcnv4 import dcnv4
from ._dcnv4_nd import dcnv4_1d, dcnv4_3d
from ._deform_attn import deform_attn
from ._dynamic_conv import dynamic_conv2d
from ._library import available_backends, missing, use_backend
from ._linear import linear

__all__ = [
    'available_backends',
    'dcnv4',
    'dcnv4_1d',
    'dcnv4_3d',
    'deform_attn',
    'dynamic_conv2d',
    'linear',
    'missing',
    'reference',
    'use_backend',
]
