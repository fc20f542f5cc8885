"""Images one by one: decoded, augmented, and named where they cannot be read; and their order.

Every random choice is a function of the seed and of a position (epoch, image, batch), never of what was drawn before: a
resumed run sees the same images with the same augmentation, and so does another number of workers. Of a stream, the
position is (epoch, process, worker, place), so that its order and augmentation need the same number of both; and the
order of `tfds/` is that of TensorFlow, which no resumed run repeats.
"""

import io
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.target_transforms import MultiLabelTarget
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .errors import TrainError

BYTES = re.compile(r'<_io\.BytesIO object at \w+>')  # what PIL calls a file that is read from an archive
# what PIL and its decoders raise on files that are damaged, cut short, or no images
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def seed_all(*entropy: int) -> None:
    """Seeds Python, NumPy and PyTorch, on all devices, from any number of integers >= 0."""
    torch.manual_seed(seed_cpu(*entropy))


def seed_cpu(*entropy: int) -> int:
    """The same for draws on the CPU alone, and returns PyTorch's seed.

    Where CUDA has not started, `torch.manual_seed` notes the stack for it, which takes longer than to decode an image.
    """
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def target_encoding(dataset: Dataset, num_classes: int | None) -> tuple[Callable, int | Tensor]:
    """How a data set's label becomes a target, and the target that stands for none."""
    if num_classes is None:
        return int, -1
    dense = getattr(getattr(dataset, 'reader', None), 'dense_target', False)
    return MultiLabelTarget(num_classes, dense=dense), torch.full((num_classes,), -1.0)


class Samples(Dataset):
    """Decoded and augmented images of a data set with random access.

    An item is (uint8 image, target, complaints). There is a complaint for each image that could not be read, with the
    file's name and the reason. In training the next readable image then takes its place, so that an epoch keeps its
    length; in validation the target is -1, so that it does not count.

    An index beyond the data set's length is a further version of an image, with its own augmentation.

    Args:
        dataset: a data set of timm or torchvision.
        transform: from a PIL image to a uint8 tensor; or three, for the clean version of an image, for the augmented
            ones, and for what happens to each of them at the end.
        shape: channels, height and width of that tensor.
        seed: of the augmentation.
        attempts: images tried in the place of one.
        splits: versions of the image in an item, if more than 1: (splits, C, H, W).
        num_classes: where an image has several labels, the length of the vector that they become; else None.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable | tuple[Callable, Callable, Callable],
        shape: tuple[int, ...],
        seed: int,
        attempts: int = 1,
        splits: int = 0,
        num_classes: int | None = None,
    ):
        self.dataset = dataset
        self.transform = transform
        self.shape = shape
        self.seed = seed
        self.attempts = attempts
        self.splits = splits
        self.encode, self.missing = target_encoding(dataset, num_classes)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive the epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor, list[str]]:
        seed_cpu(self.seed, int(self.epoch), index)
        complaints = []
        for candidate in range(index, index + self.attempts):
            candidate %= len(self)
            try:
                image, target = self._read(candidate)
            except UNREADABLE as error:
                complaints.append(f'{self.name(candidate)}: {describe(error)}')
            else:
                return self._prepare(image), self.missing if target is None else self.encode(target), complaints
        return torch.zeros(self.shape, dtype=torch.uint8), self.missing, complaints

    def _prepare(self, image: Image.Image) -> Tensor:
        if self.splits < 2:
            return self.transform(image)
        crop, augment, finish = self.transform
        image = crop(image)
        return torch.stack([finish(image), *(finish(augment(image)) for _ in range(self.splits - 1))])

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        reader = getattr(self.dataset, 'reader', None)
        if reader is None:
            image, target = self.dataset[index]
        else:  # timm's own __getitem__ puts the neighbour in the place of an unreadable image without telling
            file, target = reader[index][:2]
            image = Image.open(file)
        return image.convert('L' if self.shape[0] == 1 else 'RGB'), target

    def name(self, index: int) -> str:
        """The file of an image, or its number."""
        named, index = getattr(self.dataset, 'filename', None), index % len(self)
        return (named and named(index, absolute=True)) or f'image {index}'


class RepeatedSampler(Sampler[int]):
    """Each image several times, every time augmented anew (arXiv 1901.09335), in epochs of unchanged length.

    The versions of an image are neighbours in a global batch, and lie on different processes where there are several.

    Args:
        images: of the data set; version v of image i has the index i + v * images.
        repeats: versions of an image.
        seed: of the order.
        batch_size: per process.
        processes: that share the batches in turn.
    """

    def __init__(self, images: int, repeats: int, seed: int, batch_size: int, processes: int):
        self.images = images
        self.repeats = repeats
        self.seed = seed
        self.batch_size = batch_size
        self.processes = processes
        self.epoch = 0

    def __len__(self) -> int:
        return self.images

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        chosen = torch.randperm(self.images, generator=generator)[: -(-self.images // self.repeats)]
        versions = (chosen[:, None] + self.images * torch.arange(self.repeats)).flatten()[: self.images]
        size = self.batch_size * self.processes
        whole = self.images // size * size  # batches are dealt to the processes one after the other, images are to be
        dealt = versions[:whole].view(-1, self.batch_size, self.processes).transpose(1, 2).flatten()
        yield from dealt.tolist()
        yield from versions[whole:].tolist()


class StreamedSamples(IterableDataset):
    """Decoded and augmented images of a data set that is read as a stream, which timm's reader shares out.

    Items are those of `Samples`, those for an image that cannot be read included.

    Args:
        dataset: a data set of timm.
        transform: from a PIL image to a uint8 tensor.
        shape: channels, height and width of that tensor.
        seed: of the augmentation.
        replace: whether another image takes the place of one that cannot be read, as in training.
        num_classes: where an image has several labels, the length of the vector that they become; else None.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        transform: Callable,
        shape: tuple[int, ...],
        seed: int,
        replace: bool = False,
        num_classes: int | None = None,
    ):
        self.mode = leave_undecoded(dataset)
        dataset.transform = self._prepare
        self.dataset = dataset
        self.transform = transform
        self.shape = shape
        self.seed = seed
        self.rank = getattr(getattr(dataset, 'reader', None), 'dist_rank', 0)
        self.replace = replace
        self.encode, self.missing = target_encoding(dataset, num_classes)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive the epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        self.dataset.set_loader_cfg(num_workers=num_workers)

    def __iter__(self) -> Iterator[tuple[Tensor, int | Tensor, list[str]]]:
        item, owed, complaints = None, 0, []
        for image, target in self._seeded():
            if not isinstance(image, str):
                item, copies, owed = (image, self.encode(target)), 1 + owed, 0
            else:
                complaints.append(image)
                if self.replace:  # by the next one
                    owed += 1
                    continue
                item, copies = (torch.zeros(self.shape, dtype=torch.uint8), self.missing), 1
            for _ in range(copies):
                yield *item, list(complaints)
                complaints.clear()
        if owed and item is None:
            raise TrainError(f'no image of the stream can be read; the last is {complaints[-1]}')
        for _ in range(owed):
            yield *item, list(complaints)
            complaints.clear()

    def _seeded(self) -> Iterator[tuple[Tensor | str, Any]]:
        """The data set's images, each transformed with draws of its own place in the stream."""
        info = get_worker_info()
        place = (self.seed, int(self.epoch), self.rank, info.id if info else 0)
        seed_cpu(*place, 0)
        for position, item in enumerate(self.dataset, start=1):
            yield item
            seed_cpu(*place, position)

    def _prepare(self, image: Image.Image | dict | str) -> Tensor | str:
        """The image as a tensor, or why it cannot be read."""
        if isinstance(image, str):
            return image
        if not isinstance(image, dict):
            return self.transform(image)
        try:
            return self.transform(open_undecoded(image).convert(self.mode))
        except UNREADABLE as error:
            return f'{image["path"] or "an image of the stream"}: {describe(error)}'


def leave_undecoded(dataset: IterableDataset) -> str | None:
    """Has a stream of Hugging Face's datasets hand out files instead of images: it would end with the first bad one.

    Returns:
        The mode that its images should have; None for other streams.
    """
    reader = getattr(dataset, 'reader', None)
    if type(reader).__name__ != 'ReaderHfids' or reader.input_key not in (reader.builder.info.features or ()):
        return None
    import datasets

    reader.builder.info.features[reader.input_key] = datasets.Image(decode=False)
    mode, reader.input_img_mode = reader.input_img_mode, None
    return mode


def open_undecoded(image: dict) -> Image.Image:
    """Opens what Hugging Face's datasets have for an image that they did not decode: {'bytes': ..., 'path': ...}."""
    return Image.open(io.BytesIO(image['bytes']) if image['bytes'] else image['path'])


def describe(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    return ' '.join(BYTES.sub('', str(error)).split()) or type(error).__name__


def collate(samples: list[tuple[Tensor, int | Tensor, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    """Where images come in several versions, the clean ones of the whole batch come first."""
    images, targets, complaints = zip(*samples, strict=True)
    images = torch.stack(images)
    targets = torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)
    if images.ndim == 5:
        targets = targets.repeat(images.shape[1], *(1,) * (targets.ndim - 1))
        images = images.transpose(0, 1).flatten(0, 1)
    return images, targets, [complaint for each in complaints for complaint in each]
