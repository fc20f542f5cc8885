"""Makes a model's folder of a checkpoint: model.safetensors, config.json and a model card. That both give the same
outputs is checked; a checkpoint that is not one of the model is reported key by key, and nothing is written."""

import argparse
from pathlib import Path

import timm
import torch

from ..convert import convert
from ._arguments import add_card_arguments
from ._errors import CommandError
from ._images import read_image
from ._models import check_registered, class_names, image_mode, image_transform, nearest
from .list import model_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'source',
        metavar='SRC',
        help='a file or folder, a URL, or hf-hub:ORG/NAME[@REVISION][/FILE]; safetensors, or pickles of tensors',
    )
    parser.add_argument('--model', required=True, metavar='NAME', help='the model, as dcnzoo list names it')
    parser.add_argument('--output', required=True, metavar='DIR', help='a new folder')
    parser.add_argument(
        '--verify', metavar='IMAGE', help='compare outputs on this image, not on noise, and show classes'
    )
    parser.add_argument('--classes', metavar='FILE', help='names of the classes in order, one per line')
    add_card_arguments(parser)


def run(args: argparse.Namespace) -> int:
    architecture = args.model.partition('.')[0]
    if architecture not in model_names('*'):
        raise CommandError(f'dcnzoo has no model {architecture!r}{nearest(architecture, model_names("*"))}')
    check_registered(args.model)
    image = None if args.verify is None else Path(args.verify)
    conversion = convert(
        args.source,
        args.model,
        args.output,
        classes=None if args.classes is None else _read_lines(Path(args.classes)),
        license=args.license,
        metrics=dict(args.metric),
        prepare=None
        if image is None
        else lambda model: image_transform(model)(read_image(image, image_mode(model)))[None],
    )
    for name, fact in conversion.origin.items():
        print(f'{name}: {fact}')
    compared = 'feature maps' if conversion.backbone else 'logits'
    print(f'{compared} of checkpoint and result differ by {conversion.difference:.1g}')
    if image is not None and not conversion.backbone:
        names = class_names(timm.create_model(f'local-dir:{conversion.folder}', device='meta'))
        top = torch.topk(conversion.outputs[0][0].float().softmax(-1), min(5, len(names)))
        for probability, index in zip(*(part.tolist() for part in top), strict=True):
            print(f'{image}: {names[index]} {probability:.1%}')
    kind = 'a backbone, without classifier' if conversion.backbone else f'{conversion.model.num_classes} classes'
    print(f'wrote {conversion.folder} ({kind}); timm loads it as local-dir:{conversion.folder}')
    return 0


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f'--classes {path}: {getattr(error, "strerror", None) or error}') from error
