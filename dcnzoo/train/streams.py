"""Webdataset's shards read as a stream: by timm's reader, in an order of our own."""

import os
import random
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError, _decode, wds
from torch.utils.data import get_worker_info

from .errors import TrainError
from .samples import UNREADABLE, describe
from .shards import IMAGES


def open_stream(name: str, download: bool, **kwargs: Any) -> IterableImageDataset:
    """As timm's create_dataset opens `wds/NAME`, with another reader and with all kinds of images."""
    input_key = ';'.join(suffix.removeprefix('.') for suffix in IMAGES)
    return IterableImageDataset(kwargs['root'], reader=ShardStream(name=name, input_key=input_key, **kwargs))


class ShardStream(ReaderWds):
    """timm's reader of webdataset shards; whole shards are dealt to the workers of all processes.

    In training the order follows from the seed, the epoch and the worker alone, so that a resumed run sees it again. In
    validation each worker reads its shards to the end, so that every image comes once. In the place of what cannot be
    read there is a text that names it, without a label.
    """

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        super().set_loader_cfg(num_workers)
        shards, workers = len(self.split_info.filenames), self.global_num_workers
        if self.is_training and shards < workers:
            raise TrainError(f'{shards} shards are too few for {workers} loading processes: lower data.workers')

    def __len__(self) -> int:
        return super().__len__() if self.is_training else self.num_samples

    def __iter__(self) -> Iterator[tuple[Image.Image, Any] | tuple[str, None]]:
        info, epoch = get_worker_info(), self.epoch_count.value
        worker = self.dist_rank * self.num_workers + (info.id if info else 0)
        workers = self.dist_num_replicas * self.num_workers
        shards = [os.path.join(self.root, name) for name in self.split_info.filenames]
        if not self.is_training:
            return self._decode(self._read(shards[worker::workers]))

        random.Random(f'{self.common_seed} {epoch}').shuffle(shards)
        draw = random.Random(f'{self.common_seed} {epoch} {worker}')
        return islice(self._repeat(shards[worker::workers], draw), self._num_samples_per_worker())

    def _repeat(self, shards: list[str], draw: random.Random) -> Iterator[tuple[Image.Image, Any] | tuple[str, None]]:
        shuffle = wds.shuffle(self.sample_shuffle_size, initial=self.sample_initial_size, rng=draw)
        while True:
            empty = True
            for item in self._decode(shuffle(self._read(shards))):
                empty = False
                yield item
            if empty:
                raise TrainError(f'no images in {shards[0]}' + (f' to {shards[-1]}' if len(shards) > 1 else ''))

    def _read(self, shards: list[str]) -> Iterator[dict | str]:
        """The undecoded samples of shards, and a text for each shard that is damaged itself."""
        for shard in shards:
            reasons = []
            yield from wds.tarfile_to_samples(handler=partial(_note, reasons))([{'url': shard}])
            if reasons:
                yield f'{shard}: {reasons[0]}'

    def _decode(self, samples: Iterable[dict | str]) -> Iterator[tuple[Image.Image, Any] | tuple[str, None]]:
        for sample in samples:
            if isinstance(sample, str):
                yield sample, None
                continue
            try:
                decoded = _decode(
                    sample,
                    image_key=self.input_key,
                    image_mode=self.input_img_mode,
                    target_key=self.target_keys or self.target_key,
                    alt_label=self.split_info.alt_label,
                )
            except WdsTargetKeyError:  # of the configuration, not of this image
                raise
            except (*UNREADABLE, KeyError) as error:
                reason = f'no field {error}' if isinstance(error, KeyError) else describe(error)
                yield f'{sample["__url__"]}/{sample["__key__"]}: {reason}', None
            else:
                if decoded is not None:  # its label says that it is to be skipped
                    yield decoded['jpg'], decoded['target']


def _note(reasons: list[str], error: Exception) -> bool:
    """Has webdataset go on; it has added to the arguments of the error what it was reading."""
    if not isinstance(error, (*UNREADABLE, tarfile.TarError)):
        raise error
    reasons.append(describe(error if isinstance(error, OSError) else Exception(error.args[0])))
    return True
