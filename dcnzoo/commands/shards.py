"""Writes an image folder as webdataset shards with `_info.json`, for training on many images or from slow disks.

FOLDER/SPLIT/CLASS/*.jpg becomes OUTPUT/SPLIT-00000.tar ...; files are copied as they are. Train on them with
`--data.root OUTPUT`, which reads them at random, or as a stream with `--data.dataset wds/OUTPUT --data.root OUTPUT`.
"""

import argparse
from pathlib import Path

from ._errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='FOLDER', type=Path, help='image folder: FOLDER/SPLIT/CLASS/*.jpg')
    parser.add_argument('output', metavar='OUTPUT', type=Path, help='a new folder')
    parser.add_argument('--splits', nargs='+', default=['train', 'val'], metavar='NAME', help='default: train val')
    parser.add_argument(
        '--images', type=int, default=10000, metavar='N', help='images per shard at most (default 10000)'
    )
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the order (default 0)')


def run(args: argparse.Namespace) -> int:
    from ..train.errors import TrainError
    from ..train.shards import write_shards

    if args.images < 1:
        raise CommandError(f'--images should be at least 1, got {args.images}')
    if args.output.exists() and any(args.output.iterdir()):
        raise CommandError(f'{args.output} is not empty; name another folder or remove it')
    try:
        counts = write_shards(args.folder, args.output, args.splits, args.images, args.seed)
    except TrainError as error:
        raise CommandError(str(error)) from error
    for split, count in counts.items():
        shards = len(list(args.output.glob(f'{split}-*.tar')))
        print(f'{count} images of {split} in {shards} shards in {args.output}')
    return 0
