"""Images with labels for every task: photos where they are at hand, otherwise boxes drawn on noise."""

import os
import shutil
from itertools import cycle
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

PHOTOS = Path(os.environ.get('DCNZOO_TEST_DATA') or 'nowhere') / 'coco_cc'
COLOURS = {'red': (220, 40, 30), 'blue': (30, 60, 220)}
SIZE = 96


def make(folder: Path, task: str, train: int = 96, val: int = 6) -> str:
    """Makes a data set; returns what training takes as `data`."""
    if task == 'detect' and PHOTOS.is_dir():
        return copy_photos(folder, train, val)
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for index in range(count):
            draw(folder, split, index, task, rng)
    if task == 'classify':
        return str(folder)
    extra = {'kpt_shape': [4, 3]} if task == 'pose' else {}
    return describe(folder, dict(enumerate(COLOURS)), **extra)


def copy_photos(folder: Path, train: int, val: int) -> str:
    """The first photos, shrunk, with their labels; over again where they are too few."""
    for split, count in (('train', train), ('val', val)):
        photos = sorted((PHOTOS / 'images' / split).iterdir())
        for index, photo in zip(range(count), cycle(photos), strict=False):
            image, label = (folder / kind / split / f'{index}_{photo.name}' for kind in ('images', 'labels'))
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(photo) as opened:
                opened.thumbnail((160, 160))
                opened.convert('RGB').save(image)
            shutil.copyfile(PHOTOS / 'labels' / split / f'{photo.stem}.txt', label.with_suffix('.txt'))
    return describe(folder, yaml.safe_load((PHOTOS / 'data.yaml').read_text())['names'])


def describe(folder: Path, names: dict[int, str], **extra: object) -> str:
    path = folder / 'data.yaml'
    path.write_text(
        yaml.safe_dump({'path': str(folder), 'train': 'images/train', 'val': 'images/val', 'names': names, **extra})
    )
    return str(path)


def draw(folder: Path, split: str, index: int, task: str, rng: np.random.Generator) -> None:
    """One image with red or blue rectangles, one in each quarter, and their labels; to classify, all of one colour.

    Four, since the loss is per unit of what predictions and boxes agree on, but of at least one unit in all: with a
    single box an untrained network agrees on less, and its loss is small.
    """
    pixels = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
    kinds = rng.integers(len(COLOURS), size=4)
    if task == 'classify':
        kinds[:] = kinds[0]
    labels = []
    for quarter, kind in enumerate(kinds):
        left, top = rng.integers(0, SIZE // 8, 2) + SIZE // 2 * np.array(divmod(quarter, 2))
        width, height = rng.integers(SIZE // 4, SIZE // 8 * 3, 2)
        pixels[top : top + height, left : left + width] = list(COLOURS.values())[kind]
        labels.append([kind, *shape_of(task, *(number / SIZE for number in (left, top, width, height)))])
    if task == 'classify':
        path = folder / split / list(COLOURS)[kinds[0]] / f'{index}.jpg'
    else:
        path = folder / 'images' / split / f'{index}.jpg'
        label = folder / 'labels' / split / f'{index}.txt'
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(''.join(' '.join(map(str, numbers)) + '\n' for numbers in labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def shape_of(task: str, x: float, y: float, w: float, h: float) -> list[float]:
    """A rectangle as the labels of a task describe it."""
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    box = [x + w / 2, y + h / 2, w, h]
    if task in ('segment', 'obb'):
        return corners
    if task == 'pose':
        return box + [value for i in range(4) for value in (*corners[2 * i : 2 * i + 2], 2)]
    return box
