"""Makes ultralytics know the blocks by their names.

ultralytics resolves the names of a YAML file within `parse_model`, and only the classes that it lists there get input
channels, scaled widths and repeats. So each row with one of our names is parsed as the stock module that takes the same
arguments, by a copy of `parse_model` in whose namespace that module's name stands for a `_StandIn` that builds the
block instead. What changes in ultralytics itself is `tasks.parse_model`, `tasks.initialize_weights`,
`tasks.BaseModel.__setstate__` and `dist.generate_ddp_file`.
"""

import difflib
import functools
import sys
import types
from collections.abc import Iterable
from pathlib import Path

import torch
import ultralytics
from timm.layers import Format
from timm.models import FeatureInfo
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import dist

from . import blocks

# The blocks by their names in YAML files.
BLOCKS: dict[str, type[nn.Module]] = {
    'C2f_DCNv4': blocks.C2f_DCNv4,
    'C2f_DynamicConv': blocks.C2f_GhostModule_DynamicConv,  # as the YAML files that circulate call it
    'C2f_GhostModule_DynamicConv': blocks.C2f_GhostModule_DynamicConv,
    'C3k2_DCNv4': blocks.C3k2_DCNv4,
    'C3k2_DynamicConv': blocks.C3k2_DynamicConv,
    'C3k_DCNv4': blocks.C3k_DCNv4,
    'C3k_DynamicConv': blocks.C3k_DynamicConv,
    'DCNv4Conv': blocks.DCNv4Conv,
    'DynamicConv': blocks.DynamicConv,
    'TimmBackbone': blocks.TimmBackbone,
}

# The stock module that takes a block's arguments. Not Conv for convolutions: parse_model sets an attribute of it.
_PARSED_AS = {
    'C2f': 'C2f',
    'C3k2': 'C3k2',
    'C3k': 'C3',
    'DCNv4Conv': 'Focus',
    'DynamicConv': 'Focus',
    'TimmBackbone': 'TorchVision',
}


class RegistrationError(RuntimeError):
    """The installed ultralytics cannot be taught the blocks."""


def register() -> None:
    """Makes the blocks known to ultralytics; a second call changes nothing.

    Importing `dcnzoo.integrations.ultralytics` does it, so that checkpoints with the blocks load by themselves.

    Raises:
        RegistrationError: The installed version of ultralytics parses models in another way.
    """
    if hasattr(tasks.parse_model, 'stock'):
        return
    try:
        parse_model = _extend(tasks.parse_model)
        _try_out(parse_model)
        initialize_weights = _sparing_backbones(tasks.initialize_weights)
    except Exception as error:
        raise RegistrationError(
            f'dcnzoo does not know how to add blocks to ultralytics {ultralytics.__version__}, only to 8.3.240 and '
            f'newer, tried up to 8.4.190 ({type(error).__name__}: {error})'
        ) from error
    tasks.parse_model = parse_model
    tasks.initialize_weights = initialize_weights
    tasks.BaseModel.__setstate__ = _having_weights(tasks.BaseModel.__setstate__)
    dist.generate_ddp_file = _registering(dist.generate_ddp_file)
    torch.serialization.add_safe_globals(_known_to_checkpoints())


def check_block(name: str) -> None:
    """Raises ValueError, with names alike, where neither dcnzoo nor ultralytics has a block of that name."""
    known = {*BLOCKS, *_module_names(tasks), *(f'nn.{key}' for key in _module_names(nn))}
    if not isinstance(name, str) or (name not in known and not name.startswith('torchvision.ops.')):
        raise ValueError(f'there is no block {name!r}{nearest(name, known)}')


def _module_names(namespace: types.ModuleType) -> list[str]:
    """The modules that a namespace imports; what ultralytics' parser has beside it are whole models."""
    values = {key: value for key, value in vars(namespace).items() if isinstance(value, type)}
    return [
        key for key, value in values.items() if issubclass(value, nn.Module) and value.__module__ != namespace.__name__
    ]


def nearest(name: object, names: Iterable[str]) -> str:
    """'; did you mean a or b?' with the names most like one, or nothing."""
    close = difflib.get_close_matches(str(name), sorted(names), n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


class _Tag:
    """Says which block a row stands for, from among its arguments."""

    def __init__(self, block: str, row: str):
        self.block = block
        self.row = row

    def __repr__(self) -> str:
        return self.block


class _StandIn(type):
    """A subclass of a stock module that, called, makes the block of the tag among the arguments, or the stock module.

    It calls itself as what it made last: parse_model prints that and keeps it as the layer's type.
    """

    def __new__(mcs, stock: type[nn.Module]):
        return super().__new__(mcs, stock.__name__, (stock,), {})

    def __init__(cls, stock: type[nn.Module]):
        super().__init__(stock.__name__, (stock,), {})
        cls.stock = cls.made = stock

    def __call__(cls, *args):
        tag = next((arg for arg in args if isinstance(arg, _Tag)), None)
        if tag is None:
            cls.made = cls.stock
            return cls.stock(*args)
        cls.made = BLOCKS[tag.block]
        arguments = [arg for arg in args if arg is not tag]
        try:
            return cls.made(*arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{tag.row}: {tag.block}{tuple(arguments)}: {error}') from error

    def __repr__(cls) -> str:
        return repr(cls.made)


def _extend(stock: types.FunctionType) -> types.FunctionType:
    """A `parse_model` that knows the blocks."""

    @functools.wraps(stock)
    def parse_model(d, ch, verbose=True):
        config = dict(d)
        for section in ('backbone', 'head'):
            config[section] = [_as_stock(row, f'row {i} of the {section}') for i, row in enumerate(d[section])]
        namespace = dict(stock.__globals__)
        for name in set(_PARSED_AS.values()):
            namespace[name] = _StandIn(namespace[name])
        parse = types.FunctionType(stock.__code__, namespace, stock.__name__, stock.__defaults__, stock.__closure__)
        return parse(config, ch, verbose)

    parse_model.stock = stock
    return parse_model


def _as_stock(row: list, where: str) -> list:
    """A row of the stock module, tagged, in place of one with a block's name; the others as they are."""
    source, repeats, name, args = row
    try:
        check_block(name)
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
    if name not in BLOCKS:
        return row
    stock = _PARSED_AS.get(name) or _PARSED_AS[name.partition('_')[0]]
    if stock == 'C3k2' and len(args) == 1:
        args = [*args, False]  # at larger scales parse_model overwrites this argument, which must not be the tag
    return [source, repeats, stock, [*args, _Tag(name, where)]]


def _try_out(parse_model: types.FunctionType) -> None:
    """Parses a miniature with every kind of row, and raises where what came out is not what the YAML says."""
    config = {
        'nc': 1,
        'scale': 'm',
        'scales': {'m': [0.5, 0.5, 1024]},
        'backbone': [
            [-1, 1, 'DynamicConv', [16, 3, 2]],
            [-1, 4, 'C2f_DCNv4', [32, True]],
            [-1, 2, 'C3k_DCNv4', [32]],
            [-1, 4, 'C3k2_DCNv4', [64]],
            [-1, 2, 'C2f', [32]],
        ],
        'head': [[[1, 3, 4], 1, 'Detect', ['nc']]],
    }
    with torch.device('meta'):
        (conv, c2f, c3k, c3k2, plain, detect), _ = parse_model(config, ch=3, verbose=False)
    found = {
        'input channels': (conv.cond_conv.in_channels, c2f.cv1.conv.in_channels, c3k2.cv1.conv.in_channels),
        'scaled widths': (conv.cond_conv.out_channels, c2f.cv2.conv.out_channels, c3k2.cv2.conv.out_channels),
        'repeats': (len(c2f.m), len(c3k.m), len(c3k2.m), len(plain.m)),
        'types': (type(c2f), type(c3k), type(c3k2), type(c3k2.m[0]), type(plain)),
        'legacy head': detect.legacy,
    }
    expected = {
        'input channels': (3, 8, 16),
        'scaled widths': (8, 16, 32),
        'repeats': (2, 1, 2, 1),
        'types': (blocks.C2f_DCNv4, blocks.C3k_DCNv4, blocks.C3k2_DCNv4, blocks.C3k_DCNv4, tasks.C2f),
        'legacy head': False,
    }
    for what, value in expected.items():
        if found[what] != value:
            raise RuntimeError(f'{what} of a parsed model are {found[what]}, not {value}')


def _sparing_backbones(stock: types.FunctionType) -> types.FunctionType:
    """An `initialize_weights` that leaves timm's modules as they are, rather than set the eps of their BatchNorm2d."""

    @functools.wraps(stock)
    def initialize_weights(model):
        spared = {block: block.m for block in model.modules() if isinstance(block, blocks.TimmBackbone)}
        for block in spared:
            block.m = nn.Identity()
        stock(model)
        for block, inner in spared.items():
            block.m = inner

    return initialize_weights


def _having_weights(stock: types.FunctionType) -> types.FunctionType:
    """A `__setstate__` for models out of checkpoints: built again from their YAML, they get their weights from there.

    A model just made, or copied, keeps asking for the published ones in its YAML, by which a trainer builds it anew.
    """

    @functools.wraps(stock)
    def __setstate__(self, state):
        stock(self, state)
        backbones = [module for module in self.modules() if isinstance(module, blocks.TimmBackbone)]
        if 'yaml' in state and any(backbone.loaded for backbone in backbones):
            self.yaml = blocks.without_fetching(self.yaml)

    return __setstate__


def _registering(stock: types.FunctionType) -> types.FunctionType:
    """A `generate_ddp_file` whose file, run by the processes of a distributed training, imports this package first."""

    @functools.wraps(stock)
    def generate_ddp_file(trainer):
        path = stock(trainer)
        header = f'import sys\nsys.path = {sys.path!r}\nimport {__package__}\n'
        Path(path).write_text(header + Path(path).read_text(encoding='utf-8'), encoding='utf-8')
        return path

    return generate_ddp_file


def _known_to_checkpoints() -> list[type]:
    """The classes that checkpoints with our blocks name, for loading that admits no others.

    The hundreds of timm, for backbones, slow such loading down and are there only where ultralytics is told to load so.
    """
    packages = ('dcnzoo.integrations.ultralytics.', 'dcnzoo.layers.', 'dcnzoo.models.')
    if getattr(ultralytics.utils, 'SAFE_LOAD', False):
        packages += ('timm.layers.', 'timm.models.')
    kinds = (nn.Module, FeatureInfo, Format)
    modules = [module for name, module in sys.modules.items() if name.startswith(packages)]
    values = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [value for value in values if issubclass(value, kinds) and value.__module__.startswith(packages)]
