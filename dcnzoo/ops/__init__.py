"""Operators as functions: tensors in, tensors out."""

from . import reference
from ._dcnv4 import dcnv4
from ._dynamic_conv import dynamic_conv2d
from ._library import available_backends, missing, use_backend

__all__ = ['available_backends', 'dcnv4', 'dynamic_conv2d', 'missing', 'reference', 'use_backend']
