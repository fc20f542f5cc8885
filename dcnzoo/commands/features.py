"""Shows the shapes of the feature maps that a model makes of an image, stage by stage, and draws them."""

import argparse
import json
import sys
from pathlib import Path

import torch

from ._errors import CommandError
from ._images import read_image
from ._models import (
    add_device_argument,
    has_weights,
    image_mode,
    image_transform,
    load_model,
    resolve_device,
)
from ._table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('image', metavar='IMAGE', help='an image')
    parser.add_argument(
        '--model',
        default='dcnv4_tiny',
        metavar='NAME|DIR',
        help='a name in timm, a folder that training left (runs/X/best), or hf-hub:ORG/NAME; by default dcnv4_tiny',
    )
    parser.add_argument('--png', metavar='FILE', help='draw the feature maps')
    parser.add_argument('--untrained', action='store_true', help='draw with initial weights')
    parser.add_argument('--json', action='store_true', help='print JSON')
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    # Shapes do not depend on weights: they are fetched for a drawing only.
    pretrained = args.png is not None and not args.untrained and has_weights(args.model)
    if args.png is not None and not pretrained:
        print('dcnzoo features: the maps are drawn with initial weights, not trained ones', file=sys.stderr)
    model = load_model(args.model, pretrained=pretrained, features_only=True).to(device)

    transform = image_transform(model)
    tensor = transform(read_image(Path(args.image), image_mode(model)))
    with torch.inference_mode():
        features = [feature[0] for feature in model(tensor[None].to(device))]
    stages = [
        {'stage': name, 'reduction': reduction, 'shape': list(feature.shape)}
        for name, reduction, feature in zip(
            model.feature_info.module_name(), model.feature_info.reduction(), features, strict=True
        )
    ]
    if args.json:
        print(json.dumps({'model': args.model, 'input': list(tensor.shape), 'stages': stages}, indent=2))
    else:
        table = Table('stage', '>reduction', '>channels', '>height', '>width')
        table.add('input', '1', *map(str, tensor.shape))
        for stage in stages:
            table.add(stage['stage'], str(stage['reduction']), *map(str, stage['shape']))
        table.print()
    if args.png is not None:
        _draw(Path(args.png), transform, tensor, features, [stage['stage'] for stage in stages])
    return 0


def _draw(path: Path, transform, tensor, features, titles) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError('drawing needs matplotlib: pip install matplotlib') from error
    from .. import visualize

    normalize = transform.transforms[-1]
    figure = visualize.feature_maps(visualize.to_image(tensor, normalize.mean, normalize.std), features, titles)
    try:
        figure.savefig(path, format='png', dpi=150)
    except OSError as error:
        raise CommandError(f'cannot write {path}: {error.strerror or error}') from error
