"""Lists the models with parameters, multiply-accumulates (MACs) at the default input size, and pretrained weights."""

import argparse
import fnmatch
import json
import math

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

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
    return fnmatch.filter(names, pattern if any(c in pattern for c in '*?[') else f'*{pattern}*')


def _dcnv4_flops(value, offset_mask, groups, kernel_h, kernel_w, *geometry, out_shape, **_):
    *_, remove_center, _ = geometry
    points = kernel_h * kernel_w - int(remove_center)
    return 2 * 4 * points * math.prod(out_shape)  # four corners per point


def describe(name: str) -> dict:
    """Facts about a model of timm's registry, without allocating its weights."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
    size = model.pretrained_cfg['input_size']
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.dcnzoo.dcnv4: _dcnv4_flops})
    with counter, torch.no_grad():
        model(torch.empty(1, *size, device='meta'))
    return {
        'name': name,
        'params': sum(parameter.numel() for parameter in model.parameters()),
        'macs': counter.get_total_flops() // 2,
        'input_size': list(size),
        'pretrained': [tagged.partition('.')[2] for tagged in timm.list_pretrained(f'{name}.*')],
    }
