import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from dcnzoo.train.config import AugmentConfig, Config, DataConfig
from dcnzoo.train.data import (
    BatchTransform,
    Splits,
    build_loaders,
    open_splits,
    stream_complaint,
    unreadable_limit,
)
from dcnzoo.train.errors import TrainError
from dcnzoo.train.model import input_config
from dcnzoo.train.samples import Samples, StreamedSamples

from .conftest import CLASSES, settings

INPUT = {
    'input_size': (3, 32, 32),
    'interpolation': 'bilinear',
    'mean': (0.5, 0.5, 0.5),
    'std': (0.25, 0.25, 0.25),
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


def loaders(photos, workers=0, train_image_size=None, **augment):
    data = DataConfig(root=str(photos), batch_size=6, workers=workers, train_image_size=train_image_size)
    config = Config(data=data, augment=AugmentConfig(**augment))
    return build_loaders(open_splits(config.data), config, INPUT, pin_memory=False)


def test_splits(photos):
    splits = open_splits(DataConfig(root=str(photos)))
    assert (len(splits.train), len(splits.val), splits.classes) == (36, 15, list(CLASSES))


@pytest.mark.parametrize('name', ['valid', 'validation', 'test'])
def test_other_names_of_the_validation_split(own_photos, name):
    (own_photos / 'val').rename(own_photos / name)
    assert len(open_splits(DataConfig(root=str(own_photos))).val) == 15


def test_torchvision_by_timms_name(photos):
    data = DataConfig(root=str(photos), dataset='torch/image_folder', batch_size=6, workers=0)
    splits = open_splits(data)
    assert splits.classes == list(CLASSES)
    train, val = build_loaders(splits, Config(data=data), INPUT, pin_memory=False)
    assert next(iter(train))[0].shape == (6, 3, 32, 32)
    assert sum(len(targets) for _, targets, _ in val) == 15


def test_tar(own_photos):
    for split in ('train', 'val'):
        shutil.make_archive(own_photos / split, 'tar', own_photos / split)
        shutil.rmtree(own_photos / split)
    splits = open_splits(DataConfig(root=str(own_photos)))
    assert (len(splits.train), splits.classes) == (36, list(CLASSES))


def spoil_empty(root):
    (root / 'train' / 'violet').mkdir()


def spoil_mismatch(root):
    (root / 'val' / 'red').rename(root / 'val' / 'rot')


def spoil_missing(root):
    shutil.rmtree(root / 'val' / 'red')


def spoil_split(root):
    shutil.rmtree(root / 'val')


def spoil_images(root):
    for path in (root / 'train').rglob('*.jpg'):
        path.unlink()


def spoil_flat(root):
    for path in (root / 'train').rglob('*.jpg'):
        path.rename(root / 'train' / f'{path.parent.name}_{path.name}')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (spoil_empty, r'no images in the class folder .*train/violet'),
        (spoil_mismatch, r"train has the class 'red', .*val does not"),
        (spoil_missing, r"train has the class 'red', .*val does not"),
        (spoil_split, r"has no split 'val'; it holds train"),
        (spoil_images, r'Found 0 images in subfolders of .*train'),
        (spoil_flat, r'train holds images outside of class folders'),
    ],
)
def test_spoilt_folders(own_photos, spoil, message):
    spoil(own_photos)
    with pytest.raises(TrainError, match=message):
        open_splits(DataConfig(root=str(own_photos)))


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (DataConfig(), r'data\.root is missing'),
        (DataConfig(root='nowhere'), r'data\.root: no folder nowhere'),
        (DataConfig(root='.', dataset='torhc/cifar10'), r"unknown data set 'torhc/cifar10' \(did you mean 'torch'\?\)"),
        (
            DataConfig(root='.', dataset='torch/cifar11'),
            r"'torch/cifar11' cannot be opened: Unknown torchvision dataset",
        ),
        (DataConfig(root='.', dataset='imagenet'), r"unknown data set 'imagenet'"),
        (DataConfig(root='.', dataset='torch/cifar10'), r"'torch/cifar10' cannot be opened: Dataset not found"),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(TrainError, match=message):
        open_splits(data)


def test_augmentation_depends_on_seed_epoch_and_image_alone(photos):
    """Not on workers, on order or on what was drawn before."""
    augment = {'auto_augment': 'rand-m9-mstd0.5-inc1', 'vflip': 0.5}
    here, there = loaders(photos, **augment)[0], loaders(photos, workers=2, **augment)[0]
    torch.rand(7)
    for epoch in (0, 3):
        for loader in (here, there):
            loader.dataset.set_epoch(epoch)
        expected = dict(enumerate(image for image, _, _ in (here.dataset[i] for i in range(36))))
        for dataset in (here.dataset, there.dataset):
            order = DataLoader(dataset, batch_size=6, sampler=range(35, -1, -1), num_workers=2)
            images = torch.cat([batch[0] for batch in order]).flip(0)
            assert all(torch.equal(images[i], expected[i]) for i in range(36))
    again = here.dataset[5][0]
    here.dataset.set_epoch(4)
    assert not torch.equal(here.dataset[5][0], again)


def test_workers_that_live_on_see_the_next_epoch(photos):
    train = loaders(photos, workers=1)[0]
    sums = []
    for epoch in (0, 1, 0):
        train.dataset.set_epoch(epoch)
        sums.append(sum(images.sum().item() for images, _, _ in train))
    assert sums[0] == sums[2] != sums[1]


def damage(photos):
    """A text in the clothes of an image, a JPEG cut short, a PNG with a broken header, and an empty file."""
    files = sorted((photos / 'train' / 'red').glob('*.jpg'))[:4]
    files[0].write_text('this is no image')
    files[1].write_bytes(files[1].read_bytes()[:-300])
    Image.new('RGB', (40, 36)).save(photos / 'train' / 'red' / 'x.png')
    files[2].write_bytes((photos / 'train' / 'red' / 'x.png').read_bytes()[:20])
    (photos / 'train' / 'red' / 'x.png').unlink()
    files[3].write_bytes(b'')
    return files


@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_images_are_replaced_and_named(own_photos, workers):
    damaged = damage(own_photos)
    train, _ = loaders(own_photos, workers)
    batches = list(train)
    assert [len(images) for images, _, _ in batches] == [6] * 6
    assert all((targets >= 0).all() for _, targets, _ in batches)
    complaints = {complaint for _, _, each in batches for complaint in each}
    assert {complaint.split(': ')[0] for complaint in complaints} == {str(path) for path in damaged}
    assert all(complaint.split(': ')[1] for complaint in complaints)


def test_unreadable_images_do_not_count_in_validation(own_photos):
    bad = own_photos / 'val' / 'blue' / '0.jpg'
    bad.write_text('')
    batches = list(loaders(own_photos)[1])
    targets = torch.cat([targets for _, targets, _ in batches])
    assert targets.tolist().count(-1) == 1
    assert next(complaint for _, _, each in batches for complaint in each).startswith(f'{bad}: ')


def test_limit_of_unreadable_images(photos):
    splits = open_splits(DataConfig(root=str(photos)))
    assert unreadable_limit(splits, Config(data=DataConfig(max_unreadable=5))) == 5
    assert unreadable_limit(splits, Config(data=DataConfig(max_unreadable=50))) == 35  # one has to be left


def test_grey_images(photos):
    samples = Samples(open_splits(DataConfig(root=str(photos)), in_chans=1).train, lambda image: image, (1, 32, 32), 0)
    assert samples[0][0].mode == 'L'


class Stream(IterableDataset):
    """As timm's readers of streams behave."""

    def __init__(self):
        self.epoch = self.workers = None

    def __len__(self):
        return 8

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers):
        self.workers = num_workers

    def __iter__(self):
        for index in range(8):
            yield self.transform(Image.new('RGB', (40, 40), (index, self.epoch, 0))), index % 2


@pytest.mark.parametrize(
    'crop_mode, top, middle',
    [
        (None, 'gggggggg', 'gggggggg'),
        ('center', 'gggggggg', 'gggggggg'),
        ('squash', 'rrggggbb', 'rrggggbb'),
        ('border', '........', 'rrggggbb'),
    ],
)
def test_what_validation_crops(crop_mode, top, middle, own_photos):
    """Of a picture twice as wide as high: its middle, all of it squeezed, or all of it between borders."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16, 0] = picture[:, 16:48, 1] = picture[:, 48:, 2] = 255
    (own_photos / 'val' / 'blue' / '0.jpg').unlink()
    Image.fromarray(picture).save(own_photos / 'val' / 'blue' / '0.png')
    data = DataConfig(root=str(own_photos), workers=0, image_size=32, crop_pct=1.0, crop_mode=crop_mode)
    data_config = input_config(timm.create_model('test_dcnv4'), data, 3)
    _, val = build_loaders(open_splits(data), Config(data=data), data_config, pin_memory=False)
    image = next(iter(val))[0][0]
    colours = {(255, 0, 0): 'r', (0, 255, 0): 'g', (0, 0, 255): 'b'}
    rows = (''.join(colours.get(tuple(pixel), '.') for pixel in image[:, y, 2::4].T.tolist()) for y in (0, 16))
    assert tuple(rows) == (top, middle)


@pytest.mark.parametrize('crop_mode', ['rrc', 'none'])
def test_smaller_training_crops(photos, crop_mode):
    train, val = loaders(photos, train_image_size=(24, 16), crop_mode=crop_mode)
    assert next(iter(train))[0].shape == (6, 3, 24, 16)
    assert next(iter(val))[0].shape == (6, 3, 32, 32)


def test_streams():
    config = Config(data=DataConfig(batch_size=3, workers=0), augment=AugmentConfig(crop_mode='none'))
    train, val = build_loaders(Splits(Stream(), Stream(), ['a', 'b']), config, INPUT, pin_memory=False)
    assert isinstance(train.dataset, StreamedSamples)
    assert train.dataset.dataset.workers == 0
    train.dataset.set_epoch(5)
    val.dataset.set_epoch(0)
    images, targets, complaints = next(iter(train))
    assert (images[:, 0, 0, 0].tolist(), images[0, 1, 0, 0].item()) == ([0, 1, 2], 5)
    assert (targets.tolist(), complaints) == ([0, 1, 0], [])
    assert sum(len(targets) for _, targets, _ in val) == 8


class Files(Stream):
    """As a stream whose images were left undecoded: four, of which the first and the last cannot be read."""

    def __iter__(self):
        for number in range(4):
            file = io.BytesIO()
            Image.new('RGB', (40, 40), (number, 0, 0)).save(file, 'png')
            content = file.getvalue()[: 30 if number in (0, 3) else None]
            yield self.transform({'bytes': content, 'path': f'{number}.png'}), number


def test_unreadable_images_of_a_stream():
    """In training others take their places; in validation they do not count."""
    data = DataConfig(batch_size=4, workers=0)
    config = Config(data=data, augment=AugmentConfig(crop_mode='none'))
    for loader, numbers in zip(
        build_loaders(Splits(Files(), Files(), None), config, INPUT, pin_memory=False),
        ([1, 1, 2, 2], [-1, 1, 2, -1]),
        strict=True,
    ):
        ((images, targets, complaints),) = loader
        assert images.shape == (4, 3, 32, 32)
        assert targets.tolist() == numbers
        assert [complaint.split(': ')[0] for complaint in complaints] == ['0.png', '3.png']


@pytest.mark.parametrize('name', ['hfds', 'hfids'])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f'timm.data.readers.reader_{name}', raising=False)
    monkeypatch.setitem(sys.modules, 'datasets', None)  # as if it were not installed
    with pytest.raises(TrainError, match=rf"'{name}/me/photos' needs the package datasets: pip install datasets"):
        open_splits(DataConfig(dataset=f'{name}/me/photos'))


@pytest.mark.parametrize('name', ['hfds', 'hfids'])
def test_datasets_of_hugging_face(own_photos, tmp_path, name):
    """Of a folder with a damaged image, at random and as a stream: every image once, the damaged one named."""
    pytest.importorskip('datasets')
    bad = own_photos / 'train' / 'red' / '3.jpg'
    bad.write_text('no image')
    data = DataConfig(
        root=str(tmp_path / 'cache'), dataset=f'{name}/{own_photos}', val_split='validation', batch_size=6, workers=0,
        download=True,
    )  # fmt: skip
    splits = open_splits(data)
    assert (len(splits.train), splits.classes) == (36, list(CLASSES))
    config = Config(data=data, augment=AugmentConfig(crop_mode='none'))
    train, val = build_loaders(splits, config, INPUT, pin_memory=False)
    train.dataset.set_epoch(1)
    val.dataset.set_epoch(0)
    batches = list(train)
    assert [len(images) for images, *_ in batches] == [6] * 6
    complaints = [complaint for *_, each in batches for complaint in each]
    assert len(complaints) == 1 and str(bad) in complaints[0], complaints
    assert sorted(target for _, targets, _ in val for target in targets.tolist()) == [0] * 5 + [1] * 5 + [2] * 5


def test_an_epoch_of_a_stream_does_not_depend_on_those_before(photos, tmp_path):
    """Neither its order nor its augmentation."""
    pytest.importorskip('datasets')
    data = DataConfig(
        root=str(tmp_path / 'cache'), dataset=f'hfids/{photos}', val_split='validation', batch_size=6, workers=0,
        download=True,
    )  # fmt: skip

    def epochs(*numbers):
        train, _ = build_loaders(open_splits(data), Config(data=data), INPUT, pin_memory=False)
        for number in numbers:
            train.dataset.set_epoch(number)
            images = torch.cat([images for images, *_ in train])
        return images

    assert torch.equal(epochs(0, 1), epochs(1))
    assert not torch.equal(epochs(1), epochs(0))


@pytest.mark.parametrize('batch_size, workers, download, complaint', [
    (6, 0, True, None),
    (6, 2, True, None),
    (6, 2, False, '36 images may not divide among 2 workers and batches of 6'),
    (8, 0, True, '36 images do not divide among 1 workers and batches of 8'),
])  # fmt: skip
def test_an_epoch_that_is_not_every_image_once(photos, tmp_path, batch_size, workers, download, complaint):
    """As timm fills the last batch of each worker, and deals out the files of a stream as they are."""
    pytest.importorskip('datasets')
    data = DataConfig(
        root=str(tmp_path / 'cache'), dataset=f'hfids/{photos}', val_split='validation', batch_size=batch_size,
        workers=workers, download=True,
    )  # fmt: skip
    splits = open_splits(data)
    splits.train.reader.download = download
    said = stream_complaint(splits, Config(data=data), processes=1)
    assert said is None if complaint is None else said.startswith(complaint)


def test_batch_transform():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 1])
    destination = {'num_classes': 3, 'device': torch.device('cpu'), 'channels_last': True}
    normalized, same = BatchTransform(INPUT, None, **destination)(images, targets)
    torch.testing.assert_close(normalized, (images / 255 - 0.5) / 0.25)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert same is targets

    erased, _ = BatchTransform(INPUT, AugmentConfig(random_erasing=1.0, erasing_mode='const'), **destination)(
        images, targets
    )
    assert ((erased != normalized).flatten(1).any(1)).all()
    mixed, soft = BatchTransform(INPUT, AugmentConfig(cutmix=1.0, mixup=0.8), **destination)(images, targets)
    assert soft.shape == (4, 3)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    assert not torch.equal(mixed, normalized)
    mix = BatchTransform(INPUT, AugmentConfig(mixup=0.8, mix_off_epoch=2), **destination)
    for epoch, mixes in enumerate((True, True, False, False)):
        mix.set_epoch(epoch)
        assert torch.equal(mix(images, targets)[0], normalized) != mixes
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    mix = BatchTransform(INPUT, AugmentConfig(mixup=0.8), multi_label=True, **destination)
    assert mix(images, labels)[1].shape == labels.shape


def test_unknown_policy(photos):
    with pytest.raises(TrainError, match='augment'):
        loaders(photos, auto_augment='rnad-m9')


def test_a_run_ends_though_its_loaders_still_wait_to_be_collected(photos, tmp_path):
    program = 'import gc, sys; gc.disable(); from dcnzoo.train.main import main; sys.exit(main(sys.argv[1:]))'
    arguments = settings(photos, tmp_path / 'run', data__workers=1, schedule__epochs=1)
    result = subprocess.run([sys.executable, '-c', program, *arguments], stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert 'Traceback' not in result.stderr, result.stderr
