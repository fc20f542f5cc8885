"""Lists the models with parameters, multiply-accumulates (MACs) at the default input size, and pretrained weights."""

import argparse
import fnmatch
import json

import timm
import torch

from ..macs import count_macs
from ._errors import CommandError
from ._models import nearest
from ._table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('pattern', nargs='?', metavar='PATTERN', help='part of a name, or a pattern such as "dcnv4_*"')
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    names = model_names(args.pattern)
    if not names:
        raise CommandError(f'no model matches {args.pattern!r}{nearest(args.pattern or "", model_names("*"))}')
    models = [describe(name) for name in names]
    if args.json:
        print(json.dumps(models, indent=2))
        return 0
    table = Table('model', '>params (M)', '>GMACs', '>input', 'pretrained tags')
    for model in models:
        size = 'x'.join(str(side) for side in model['input_size'][1:])
        tags = ', '.join(model['pretrained'])
        table.add(model['name'], f'{model["params"] / 1e6:.1f}', f'{model["macs"] / 1e9:.2f}', size, tags)
    table.print()
    return 0


def model_names(pattern: str | None = None) -> list[str]:
    """Names of this package's models; without a pattern those for use, not the miniatures for tests."""
    names = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('dcnzoo.')]
    if pattern is None:
        return [name for name in names if not name.startswith('test_')]
    pattern = pattern.lower()
    return fnmatch.filter(names, pattern if any(c in pattern for c in '*?[') else f'*{pattern}*')


def describe(name: str) -> dict:
    """Facts about a model of timm's registry, without allocating its weights."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    size = model.pretrained_cfg['input_size']
    return {
        'name': name,
        'params': sum(parameter.numel() for parameter in model.parameters()),
        'macs': count_macs(model, size),
        'input_size': list(size),
        'pretrained': [tagged.partition('.')[2] for tagged in timm.list_pretrained(f'{name}.*')],
    }
