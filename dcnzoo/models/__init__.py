"""The architectures, registered with timm on import."""

from . import dcnv4, internimage, parameternet

__all__ = ['dcnv4', 'internimage', 'parameternet']
