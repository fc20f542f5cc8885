"""Writes scikit-learn's handwritten digits as an image folder: the data of `make demo`, made without a download."""

import argparse
from pathlib import Path

from PIL import Image

from ._errors import CommandError

SIZE = 32
VAL, HOLDOUT = 30, 10  # images per class; the rest is for training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='DIR', help='a new folder, to be filled with train/CLASS and val/CLASS')
    parser.add_argument('--holdout', metavar='DIR', help='where images go that are in neither (default: DIR/holdout)')


def run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    counts = export(folder, Path(args.holdout) if args.holdout else folder / 'holdout')
    print(', '.join(f'{count} images in {path}' for path, count in counts.items()))
    return 0


def export(folder: Path, holdout: Path) -> dict[Path, int]:
    """Writes the digits as greyscale PNG files, SIZE pixels a side, in one folder per class.

    The division is fixed: of each class the last images are held out, those before them are for validation, the rest
    for training. scikit-learn's order is that of writing, so that the held-out digits are mostly of other hands.

    Args:
        folder: Gets the subfolders train and val.
        holdout: Gets the images that are in neither.

    Returns:
        The number of images written by folder.

    Raises:
        CommandError: scikit-learn is not installed, a folder to be made exists, or one lies in another.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CommandError('the digits come with scikit-learn: pip install scikit-learn') from error
    splits = {'holdout': holdout, 'val': folder / 'val', 'train': folder / 'train'}
    apart = holdout.resolve()
    if folder.resolve().is_relative_to(apart) or any(
        apart.is_relative_to(splits[split].resolve()) for split in ('val', 'train')
    ):
        raise CommandError(f'--holdout must be apart from {splits["train"]} and {splits["val"]}, got {holdout}')
    for path in splits.values():
        if path.exists():
            raise CommandError(f'{path} is there already; name another folder or remove it')

    digits = load_digits()
    counts = dict.fromkeys(splits.values(), 0)
    for label in range(10):
        images = digits.images[digits.target == label]
        ends = {'holdout': len(images), 'val': len(images) - HOLDOUT, 'train': len(images) - HOLDOUT - VAL}
        starts = {'holdout': ends['val'], 'val': ends['train'], 'train': 0}
        for split, path in splits.items():
            (path / str(label)).mkdir(parents=True)
            for number in range(starts[split], ends[split]):
                pixels = (images[number] * (255 / 16)).round().astype('uint8')
                image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                image.save(path / str(label) / f'{number:03d}.png')
                counts[path] += 1
    return counts
