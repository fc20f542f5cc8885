"""DCNv4, dynamic convolution and whole timm backbones in ultralytics' YOLO models.

Importing this package makes ultralytics know the blocks by name, in YAML files and in checkpoints.
"""

import re

try:
    import ultralytics
except ModuleNotFoundError as error:
    if error.name != 'ultralytics':
        raise
    raise ImportError("dcnzoo.integrations.ultralytics needs ultralytics: pip install 'dcnzoo[yolo]'") from error
if tuple(map(int, re.findall(r'\d+', ultralytics.__version__)[:3])) < (8, 3, 240):
    raise ImportError(
        f'dcnzoo.integrations.ultralytics needs ultralytics 8.3.240 or newer, found {ultralytics.__version__}: '
        "pip install --upgrade 'dcnzoo[yolo]'"
    )

from .blocks import (
    C2f_DCNv4,
    C2f_GhostModule_DynamicConv,
    C3k2_DCNv4,
    C3k2_DynamicConv,
    C3k_DCNv4,
    C3k_DynamicConv,
    DCNv4Conv,
    DynamicConv,
    TimmBackbone,
)
from .checkpoints import adopt
from .configs import VARIANTS, ModelConfig, Row, Variant, model_config
from .registration import BLOCKS, RegistrationError, register

__all__ = [
    'BLOCKS',
    'VARIANTS',
    'C2f_DCNv4',
    'C2f_DynamicConv',
    'C2f_GhostModule_DynamicConv',
    'C3k2_DCNv4',
    'C3k2_DynamicConv',
    'C3k_DCNv4',
    'C3k_DynamicConv',
    'DCNv4Conv',
    'DynamicConv',
    'ModelConfig',
    'RegistrationError',
    'Row',
    'TimmBackbone',
    'Variant',
    'adopt',
    'model_config',
    'register',
]

C2f_DynamicConv = C2f_GhostModule_DynamicConv

register()
