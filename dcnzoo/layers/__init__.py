"""Modules with parameters on top of the operators."""

from .dcnv4 import DCNv4

__all__ = ['DCNv4']
