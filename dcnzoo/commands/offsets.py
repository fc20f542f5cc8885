"""Draws where one unit of a model samples the image, and its effective receptive field, as a PNG."""

import argparse
import sys
from pathlib import Path

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('image', metavar='IMAGE', help='an image')
    parser.add_argument(
        '--model',
        default='dcnv4_tiny',
        metavar='NAME|DIR',
        help='a name in timm, a folder that training left (runs/X/best), or hf-hub:ORG/NAME; by default dcnv4_tiny',
    )
    parser.add_argument(
        '--point',
        nargs=2,
        type=float,
        metavar=('X', 'Y'),
        help="the unit's place in pixels of the prepared image, which is what is drawn; by default its centre",
    )
    parser.add_argument(
        '--stage',
        type=int,
        metavar='N',
        help='the unit is of the last layer of this stage, from 0; by default the last',
    )
    parser.add_argument('--layers', type=int, default=3, metavar='N', help='layers followed back (default 3)')
    parser.add_argument('--png', default='offsets.png', metavar='FILE', help='what to write (default offsets.png)')
    parser.add_argument('--untrained', action='store_true', help='draw with initial weights')
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError('drawing needs matplotlib: pip install matplotlib') from error
    from .. import visualize

    device = resolve_device(args.device)
    pretrained = not args.untrained and has_weights(args.model)
    model = load_model(args.model, pretrained=pretrained).to(device)
    transform = image_transform(model)
    tensor = transform(read_image(Path(args.image), image_mode(model)))
    normalize = transform.transforms[-1]
    if not pretrained:
        print('dcnzoo offsets: initial weights, not trained ones: offsets and masks may all be zero', file=sys.stderr)
    picture = visualize.to_image(tensor, normalize.mean, normalize.std)
    point = tuple(args.point) if args.point else None
    try:
        figure = visualize.sampling_offsets(
            model, tensor[None].to(device), point, stage=args.stage, layers=args.layers, picture=picture
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    try:
        figure.savefig(args.png, format='png', dpi=150)
    except OSError as error:
        raise CommandError(f'cannot write {args.png}: {error.strerror or error}') from error
    print(args.png)
    return 0
