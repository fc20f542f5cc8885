"""The images: data sets by timm's names, checked before training; loaders; what happens to a batch on the device."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .config import AugmentConfig, Config, DataConfig
from .errors import TrainError, nearest
from .samples import RepeatedSampler, Samples, StreamedSamples, collate
from .shards import INFO, ShardReader

READERS = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
VAL_SYNONYMS = ('val', 'valid', 'validation', 'eval', 'test')


@dataclass
class Splits:
    """The opened data set: its two splits, and the names of its classes in the order of their indices, if known."""

    train: Dataset
    val: Dataset
    classes: list[str] | None


def open_splits(data: DataConfig, in_chans: int = 3, seed: int = 0) -> Splits:
    """Opens both splits and checks that they hold the same classes and no class is empty.

    Raises:
        TrainError: if the data set is unknown, a folder is missing or empty, or the splits' classes differ.
    """
    prefix = _check_name(data)
    mode = 'L' if in_chans == 1 else 'RGB'
    if prefix:
        common = {'root': data.root, 'download': data.download, 'batch_size': data.batch_size, 'seed': seed}
        if data.target_key:
            common['target_key'] = data.target_key
        train = _create(data.dataset, split=data.train_split, is_training=True, input_img_mode=mode, **common)
        val = _create(data.dataset, split=data.val_split, is_training=False, input_img_mode=mode, **common)
        return Splits(train, val, _class_names(train))

    if (Path(data.root).expanduser() / INFO).is_file():
        train, val = (
            ImageDataset(data.root, reader=ShardReader(data.root, split), input_img_mode=mode)
            for split in (data.train_split, data.val_split)
        )
        return Splits(train, val, _class_names(train))

    folders = [_locate_split(data.root, data.train_split, ()), _locate_split(data.root, data.val_split, VAL_SYNONYMS)]
    train, val = (_create('', root=str(folder), search_split=False, input_img_mode=mode) for folder in folders)
    for dataset, folder in zip((train, val), folders, strict=True):
        _check_folder(dataset, folder)
    _check_same_classes(_class_names(train), _class_names(val), *folders)
    return Splits(train, val, _class_names(train))


def _check_name(data: DataConfig) -> str:
    """The reader's prefix of a data set's name; nothing for an image folder."""
    prefix, slash, name = data.dataset.partition('/')
    if data.dataset and (prefix.lower() not in READERS or not (slash and name)):
        raise TrainError(
            f'data.dataset: unknown data set {data.dataset!r}{nearest(prefix, READERS)}; leave it empty for an image '
            f'folder, or name one of {", ".join(f"{reader}/NAME" for reader in READERS)}'
        )
    if prefix.lower() in ('', 'wds') and data.root is None:
        raise TrainError('data.root is missing: give the folder of the images with --data.root DIR')
    return prefix.lower()


def _create(name: str, **kwargs: Any) -> Dataset:
    """timm's create_dataset, whose complaints end the run with one line."""
    try:
        if name.lower().startswith('wds/'):
            from .streams import open_stream  # and webdataset, which is optional

            return open_stream(name, **kwargs)
        return create_dataset(name, **kwargs)
    except ModuleNotFoundError as error:
        raise TrainError(f'data.dataset {name!r} needs the package {error.name}: pip install {error.name}') from None
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        where = f'data.dataset {name!r}' if name else f'data.root {kwargs["root"]}'
        raise TrainError(f'{where} cannot be opened: {error or type(error).__name__}') from None


def _locate_split(root: str, split: str, synonyms: Sequence[str]) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise TrainError(f'data.root: no folder {folder}')
    names = [split, *(synonyms if split in synonyms else ())]
    for name in names:
        for path in (folder / name, folder / f'{name}.tar'):
            if path.exists():
                return path
    there = ', '.join(sorted(path.name for path in folder.iterdir())[:10]) or 'nothing'
    raise TrainError(f'data.root: {folder} has no split {split!r}{nearest(split, there.split(", "))}; it holds {there}')


def _check_folder(dataset: Dataset, folder: Path) -> None:
    """timm takes the folders that hold images for the classes: an empty one would shift the labels behind it."""
    if not folder.is_dir():
        return
    filled = {Path(name).parts[0] for name in dataset.filenames() if len(Path(name).parts) > 1}
    if '' in dataset.reader.class_to_idx:
        raise TrainError(f'{folder} holds images outside of class folders: expected {folder / "CLASS"}/*.jpg')
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')]
    empty = sorted(set(folders) - filled)
    if empty:
        raise TrainError(f'no images in the class folder {folder / empty[0]}' + _more(len(empty) - 1))


def _check_same_classes(train: list[str], val: list[str], train_folder: Path, val_folder: Path) -> None:
    sides = (train, val, train_folder, val_folder), (val, train, val_folder, train_folder)
    for ours, others, folder, other in sides:
        extra = [name for name in ours if name not in set(others)]
        if extra:
            raise TrainError(f'{folder} has the class {extra[0]!r}, {other} does not' + _more(len(extra) - 1))


def _more(count: int) -> str:
    return f' (and {count} more like it)' if count else ''


def _class_names(dataset: Dataset) -> list[str] | None:
    reader = getattr(dataset, 'reader', dataset)
    index = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # the latter of a tar
    if index:
        return [str(name) for name, _ in sorted(index.items(), key=lambda item: item[1])]
    classes = getattr(dataset, 'classes', None)
    return [str(name) for name in classes] if classes else None


def class_counts(dataset: Dataset, num_classes: int) -> list[int]:
    """Images per class, from the labels alone.

    Raises:
        TrainError: if the data set does not tell them without reading its images.
    """
    reader = getattr(dataset, 'reader', dataset)
    if hasattr(reader, 'iter_targets'):
        targets = list(reader.iter_targets())
    elif hasattr(reader, 'samples'):
        targets = [target for _, target, *_ in reader.samples]
    elif hasattr(reader, 'targets'):
        targets = list(reader.targets)
    else:
        raise TrainError('loss.class_weight: the data set does not tell its labels; give loss.class_weights instead')
    flat = [label for target in targets for label in ([target] if isinstance(target, (int, np.integer)) else target)]
    return np.bincount(np.asarray(flat, dtype=np.int64), minlength=num_classes).tolist()


def unreadable_limit(splits: Splits, config: Config) -> int:
    """How many unreadable images a run bears: never as many as there are to train on."""
    streamed = isinstance(splits.train, IterableDataset)
    return config.data.max_unreadable if streamed else min(config.data.max_unreadable, len(splits.train) - 1)


def stream_complaint(splits: Splits, config: Config, processes: int) -> str | None:
    """Why an epoch of a stream of shards would not be every image once, if it would not.

    Shards are dealt to the workers of all processes, and each passes as many images as any other, in whole batches.
    """
    if not isinstance(splits.train, IterableDataset):
        return None
    reader, workers = splits.train.reader, processes * max(1, config.data.workers)
    lengths = getattr(getattr(reader, 'split_info', None), 'shard_lengths', None) or ()
    equal = len(set(lengths)) == 1 and len(lengths) % workers == 0
    hugging_face = type(reader).__name__ == 'ReaderHfids'
    resharded = hugging_face and reader.download  # into one shard per worker
    images = reader.num_samples
    whole = images % (workers * config.data.batch_size) == 0
    if whole and (workers == 1 or equal or resharded):
        return None
    what = f'{len(lengths)} shards of {min(lengths)} to {max(lengths)} images' if lengths else f'{images} images'
    at_random = 'hfds/ for hfids/' if hugging_face else 'an empty data.dataset'
    return (
        f'{what} {"may" if whole and not lengths else "do"} not divide among {workers} workers and batches of '
        f'{config.data.batch_size}: an epoch of this stream repeats some images and leaves others out; read at random '
        f'({at_random}), it would not'
    )


def build_loaders(
    splits: Splits, config: Config, data_config: dict, pin_memory: bool, num_classes: int = 0, processes: int = 1
) -> tuple[DataLoader, DataLoader]:
    """Loaders of (uint8 images (B, C, H, W), targets, complaints) for training, shuffled, and validation.

    Targets are class indices (B,), or (B, num_classes) where images have several labels.

    Args:
        splits: the opened data set.
        config: the run's configuration.
        data_config: timm's description of the network's input (input_size, interpolation, mean, std, crop_pct, ...).
        pin_memory: True if the batches go to a GPU: accelerate then copies one batch ahead, without waiting for it.
        num_classes: outputs of the classifier; needed for several labels.
        processes: that share the loaders.
    """
    data, augment, val_shape = config.data, config.augment, tuple(data_config['input_size'])
    train_size = data.train_image_size or val_shape[1:]
    train_shape = (val_shape[0], *((train_size, train_size) if isinstance(train_size, int) else train_size))
    pixels = {'mean': data_config['mean'], 'std': data_config['std'], 'normalize': False}
    evaluate = {key: data_config[key] for key in ('interpolation', 'crop_pct', 'crop_mode')}
    try:
        val_transform = create_transform(val_shape, **pixels, **evaluate)
        if augment.crop_mode == 'none':
            train_transform = create_transform(train_shape, **pixels, **evaluate)
        else:
            train_transform = _train_transform(augment, train_shape, pixels, evaluate['interpolation'])
    except (AssertionError, KeyError, ValueError, RuntimeError) as error:
        raise TrainError(f'augment: {error or type(error).__name__}') from None

    if data.workers:
        atexit.register(_end_loading)
    loaders = []
    sides = (splits.train, train_transform, train_shape, True), (splits.val, val_transform, val_shape, False)
    for dataset, transform, shape, train in sides:
        streamed = isinstance(dataset, IterableDataset)
        batch_size = data.batch_size if train else data.val_batch_size or data.batch_size
        labels = num_classes if data.multi_label else None
        sampler = None
        if streamed:
            samples = StreamedSamples(dataset, transform, shape, config.run.seed, train, labels)
            samples.set_loader_cfg(num_workers=data.workers)
        else:
            attempts = unreadable_limit(splits, config) + 1 if train else 1
            versions = augment.splits if train else 0
            samples = Samples(dataset, transform, shape, config.run.seed, attempts, versions, labels)
            if train and augment.repeats > 1:
                sampler = RepeatedSampler(len(samples), augment.repeats, config.run.seed, batch_size, processes)
        loaders.append(
            DataLoader(
                samples,
                batch_size=batch_size,
                shuffle=train and not streamed and sampler is None,
                sampler=sampler,
                drop_last=train,
                num_workers=data.workers,
                prefetch_factor=data.prefetch if data.workers else None,
                collate_fn=collate,
                pin_memory=pin_memory,
                persistent_workers=data.workers > 0,
                worker_init_fn=_leave_signals_to_the_trainer,
            )
        )
    return tuple(loaders)


def _train_transform(
    augment: AugmentConfig, shape: tuple[int, ...], pixels: dict, interpolation: str
) -> Callable | tuple[Callable, Callable, Callable]:
    return create_transform(
        shape,
        **pixels,
        is_training=True,
        train_crop_mode=augment.crop_mode,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation or interpolation,
        separate=augment.splits > 1,
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _end_loading() -> None:
    """Ends what is left of the loading processes: Python would send them SIGTERM, and wait."""
    if hasattr(signal, 'SIGCHLD'):  # PyTorch's handler would report them as failed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class BatchTransform:
    """What happens to a batch on its device: to float, normalized, and in training erased and mixed.

    Args:
        data_config: timm's description of the network's input.
        augment: the augmentation, or None for validation.
        num_classes: outputs of the classifier.
        device: where the batches are.
        channels_last: memory order of the images.
        multi_label: whether targets are (B, K), of several labels each.
    """

    def __init__(
        self,
        data_config: dict,
        augment: AugmentConfig | None,
        num_classes: int,
        device: torch.device,
        channels_last: bool,
        multi_label: bool = False,
    ):
        self.mean = 255 * torch.tensor(data_config['mean'], device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(data_config['std'], device=device).view(1, -1, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.erase = self.mix = None
        if augment and augment.random_erasing:
            self.erase = RandomErasing(
                augment.random_erasing, mode=augment.erasing_mode, num_splits=augment.splits, device=device
            )
        self.mix_off_epoch = augment.mix_off_epoch if augment else None
        if augment and (augment.mixup or augment.cutmix):
            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mix_prob,
                switch_prob=augment.mix_switch_prob,
                mode=augment.mix_mode,
                label_smoothing=augment.label_smoothing,
                num_classes=num_classes,
                multi_label=multi_label,
            )

    def set_epoch(self, epoch: int) -> None:
        """Ends mixing with augment.mix_off_epoch."""
        if self.mix is not None and self.mix_off_epoch is not None:
            self.mix.mixup_enabled = epoch < self.mix_off_epoch

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) uint8 and their targets to normalized images and, where these are mixed, targets (B, K)."""
        images = images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.memory_format)
        if self.erase is not None:
            images = self.erase(images)
        return (images, targets) if self.mix is None else self.mix(images, targets)


@dataclass
class Data:
    """What a run reads: the data set, its loaders as prepared, and what happens to their batches on the device."""

    splits: Splits
    train_loader: DataLoader
    val_loader: DataLoader
    train_transform: BatchTransform
    val_transform: BatchTransform

    def train_batches(self, epoch: int, skip: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """An epoch's batches on the device, in its order, without the first `skip`."""
        loader = self.train_loader
        self.train_transform.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(epoch)
            yield from skip_first_batches(loader, skip) if skip else loader
        else:  # a stream, shared out by its reader
            for index, (images, targets, complaints) in enumerate(loader):
                if index >= skip:
                    yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True), complaints

    def files(self, epoch: int, batch: int) -> list[str]:
        """The images of a batch that this process trained on, by reading the epoch's order anew; none of a stream."""
        loader = self.train_loader
        if not isinstance(loader, DataLoaderShard):
            return []
        loader.set_epoch(epoch)
        indices = next(indices for number, indices in enumerate(loader.batch_sampler) if number == batch)
        return [loader.dataset.name(index) for index in indices]
