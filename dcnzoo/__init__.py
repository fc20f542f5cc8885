"""dcnzoo: timm-compatible deformable and dynamic convolution backbones.

Importing the package registers its models with timm: `timm.create_model('dcnv4_tiny')`.
"""

from . import layers, models, ops
from ._version import __version__

__all__ = ['__version__', 'layers', 'models', 'ops']
