"""The architectures, registered with timm on import."""

from . import dcnv4, parameternet

__all__ = ['dcnv4', 'parameternet']
