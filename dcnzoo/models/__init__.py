"""The architectures, registered with timm on import."""

from . import dcnv4

__all__ = ['dcnv4']
