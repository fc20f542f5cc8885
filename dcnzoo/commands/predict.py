"""Classifies images: files, or all images in folders. What cannot be read is reported, the others are classified."""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ._arguments import positive
from ._errors import CommandError
from ._images import find_images, read_image
from ._models import add_device_argument, class_names, image_mode, image_transform, load_model, resolve_device
from ._table import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='an image, or a folder of images')
    parser.add_argument(
        '--model',
        required=True,
        metavar='NAME|DIR',
        help='a name in timm of a model with pretrained weights, a folder that training left (runs/X/best), or '
        'hf-hub:ORG/NAME',
    )
    parser.add_argument(
        '--topk', type=positive, default=1, metavar='K', help='classes per image, best first; by default 1'
    )
    parser.add_argument('--truth', action='store_true', help="compare with each image's class: the name of its folder")
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--batch-size', type=positive, default=32, metavar='N', help='images at a time; by default 32')
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    files = find_images(args.images)
    model = load_model(args.model).to(device)
    if not getattr(model, 'num_classes', 0):
        raise CommandError(f'{args.model} has no classifier')
    truths = _truths(files, class_names(model)) if args.truth else None

    results = []
    for start in range(0, len(files), args.batch_size):
        results += predict(model, files[start : start + args.batch_size], device, args.topk)
    if truths is not None:
        _compare(results, truths)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _print(results, args.truth)
    for result in results:
        if 'error' in result:
            print(f'dcnzoo predict: {result["error"]}', file=sys.stderr)
    return int(any('error' in result for result in results))


@torch.inference_mode()
def predict(model: torch.nn.Module, files: list[Path], device: torch.device, topk: int = 1) -> list[dict]:
    """Classifies a batch of image files.

    Args:
        model: A timm classifier in evaluation mode, on the device.
        files: Image files.
        device: Where the model is.
        topk: Classes per image.

    Returns:
        Per file its name as 'image' and either 'predictions', the most probable classes first, each with its 'label',
        'index' and 'probability'; or 'error', why it could not be read.
    """
    transform, mode, names = image_transform(model), image_mode(model), class_names(model)

    def prepare(file: Path) -> torch.Tensor | CommandError:
        try:
            return transform(read_image(file, mode))
        except CommandError as error:
            return error

    with ThreadPoolExecutor() as pool:
        prepared = list(pool.map(prepare, files))
    images = [image for image in prepared if isinstance(image, torch.Tensor)]
    if images:
        logits = model(torch.stack(images).to(device)).float()
        tops = zip(*(top.tolist() for top in logits.softmax(-1).topk(min(topk, len(names)))), strict=True)

    results = []
    for file, image in zip(files, prepared, strict=True):
        result = {'image': str(file)}
        if isinstance(image, CommandError):
            result['error'] = str(image)
        else:
            result['predictions'] = [
                {'label': names[index], 'index': index, 'probability': probability}
                for probability, index in zip(*next(tops), strict=True)
            ]
        results.append(result)
    return results


def _truths(files: list[Path], names: list[str]) -> list[str]:
    truths = [file.resolve().parent.name for file in files]
    for file, truth in zip(files, truths, strict=True):
        if truth not in names:
            raise CommandError(f'--truth: {file} lies in the folder {truth!r}, which is not a class of the model')
    return truths


def _compare(results: list[dict], truths: list[str]) -> None:
    for result, truth in zip(results, truths, strict=True):
        result['truth'] = truth
        if 'predictions' in result:
            result['correct'] = result['predictions'][0]['label'] == truth


def _print(results: list[dict], truth: bool) -> None:
    table = Table('image', *(['truth'] if truth else []), 'prediction', '>probability', *([''] if truth else []))
    classified = [result for result in results if 'predictions' in result]
    for result in classified:
        for rank, prediction in enumerate(result['predictions']):
            cells = [prediction['label'], f'{prediction["probability"]:.1%}']
            if truth:
                mark = '' if rank else 'right' if result['correct'] else 'wrong'
                cells = ['' if rank else result['truth'], *cells, mark]
            wrong = truth and not rank and not result['correct']
            table.add('' if rank else result['image'], *cells, style='red' if wrong else None)
    if classified:
        table.print()
        if truth:
            right = sum(result['correct'] for result in classified)
            print(f'{right} of {len(classified)} right ({right / len(classified):.1%})')
