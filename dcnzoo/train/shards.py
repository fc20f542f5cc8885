"""Image folders as shards: few large tar files in webdataset's form, read at random or as a stream.

DIR/_info.json           splits and their shards, as timm's reader `wds/` wants it, and the names of the classes
DIR/train-00000.tar ...  KEY.jpg and KEY.cls, the class index, for each image; in random order
DIR/train.index.npz      where each image lies, for reading at random

Read at random (`--data.root DIR`), each image of an epoch is seen once on any number of processes and workers, and a
resumed run continues anywhere. As a stream (`--data.dataset wds/DIR`), files are read from end to end.
"""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timm.data.readers.reader import Reader

from .checkpoint import atomic, write_json
from .errors import TrainError

INFO = '_info.json'
IMAGES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.ppm', '.tif', '.tiff')


def write_shards(folder: Path, output: Path, splits: list[str], size: int, seed: int = 0) -> dict[str, int]:
    """Writes the splits of an image folder, FOLDER/SPLIT/CLASS/*.jpg, as shards.

    Files are copied as they are, without decoding. All shards of a split hold the same number of images, or one more.

    Args:
        folder: of the splits.
        output: a new folder.
        splits: their names.
        size: images per shard at most.
        seed: of the order.

    Returns:
        The number of images per split.

    Raises:
        TrainError: if a split is missing or empty, its classes are not those of the first, or a file cannot be written.
    """
    classes, info = None, {}
    for split in splits:
        if not (folder / split).is_dir():
            raise TrainError(f'{folder} has no split {split!r}')
        here = sorted(path.name for path in (folder / split).iterdir() if path.is_dir())
        classes = classes or here
        if here != classes:
            odd = sorted(set(here) ^ set(classes))
            raise TrainError(f'the classes of {folder / split} are not those of {folder / splits[0]}: {odd[0]!r}')
        files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / split / name).rglob('*'))
            if path.suffix.lower() in IMAGES
        ]
        if not files:
            raise TrainError(f'no images in {folder / split}')
        random.Random(seed).shuffle(files)
        count = -(-len(files) // size)
        parts = [files[number::count] for number in range(count)]
        names = [f'{split}-{number:05d}.tar' for number in range(count)]
        for name, part in zip(names, parts, strict=True):
            _write_shard(output / name, part)
        lengths = [len(part) for part in parts]
        info[split] = {'name': split, 'num_samples': len(files), 'filenames': names, 'shard_lengths': lengths}
        _write_index(output / f'{split}.index.npz', [output / name for name in names])
    write_json(output / INFO, {'splits': info, 'classes': classes})  # last: without it there is no data set
    return {split: each['num_samples'] for split, each in info.items()}


def _write_shard(path: Path, files: list[tuple[Path, int]]) -> None:
    with atomic(path) as draft, tarfile.open(draft, 'w') as tar:
        for number, (file, label) in enumerate(files):
            key = f'{path.stem.rpartition("-")[2]}_{number:06d}'
            for suffix, content in ((file.suffix.lower(), file.read_bytes()), ('.cls', str(label).encode())):
                member = tarfile.TarInfo(key + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_index(path: Path, shards: list[Path]) -> None:
    with atomic(path) as draft, draft.open('wb') as file:
        np.savez(file, **_scan(shards))


def _scan(shards: list[Path]) -> dict[str, np.ndarray]:
    """Shard, offset, size, label and key of each image, from the headers of the tar files."""
    rows = [(number, *row) for number, shard in enumerate(shards) for row in _scan_shard(shard)]
    columns = zip(*rows, strict=True)
    names = (('shard', np.int32), ('offset', np.int64), ('size', np.int64), ('label', np.int64), ('key', np.str_))
    return {name: np.array(column, dtype=dtype) for (name, dtype), column in zip(names, columns, strict=True)}


def _scan_shard(shard: Path) -> Iterator[tuple[int, int, int, str]]:
    images, labels = {}, {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition('.')
            if suffix == 'cls':
                labels[key] = int(tar.extractfile(member).read())
            elif f'.{suffix.lower()}' in IMAGES:
                images[key] = (member.offset_data, member.size, member.name)
    for key, (offset, size, name) in images.items():
        if key in labels:
            yield offset, size, labels[key], name


class ShardReader(Reader):
    """Reads images of shards at random, for timm's data sets.

    Args:
        root: folder with `_info.json`.
        split: name of the split.

    Raises:
        TrainError: if there is no such split, or its files are not as `_info.json` says.
    """

    def __init__(self, root: str | Path, split: str):
        super().__init__()
        self.root = Path(root).expanduser()
        try:
            info = json.loads((self.root / INFO).read_text(encoding='utf-8'))
            entry = info['splits'][split]
            self.shards = [self.root / name for name in entry['filenames']]
            index = self.root / f'{split}.index.npz'
            self.index = dict(np.load(index)) if index.is_file() else _scan(self.shards)
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            raise TrainError(
                f'data.root: the split {split!r} of the shards in {root} cannot be read: {error}'
            ) from None
        if len(self.index['label']) != entry['num_samples']:
            found = len(self.index['label'])
            raise TrainError(
                f'data.root: {root} should have {entry["num_samples"]} images in {split!r}, but has {found}'
            )
        missing = [shard for shard in self.shards if not shard.is_file()]
        if missing:
            raise TrainError(f'data.root: {missing[0]} is missing')
        classes = info.get('classes') or [str(label) for label in range(int(self.index['label'].max()) + 1)]
        self.class_to_idx = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.index['label'])

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        shard, offset, size = (int(self.index[name][index]) for name in ('shard', 'offset', 'size'))
        with self.shards[shard].open('rb') as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), int(self.index['label'][index])

    def iter_targets(self) -> Iterator[int]:
        yield from self.index['label'].tolist()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name, shard = str(self.index['key'][index]), self.shards[int(self.index['shard'][index])]
        return name if basename else f'{shard if absolute else shard.name}/{name}'
