"""Data at scale: shards, and what each of several ranks sees of them."""

import json
import shutil
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset

from dcnzoo.commands import main as command
from dcnzoo.train.arguments import parse
from dcnzoo.train.config import AugmentConfig, Config, DataConfig
from dcnzoo.train.data import build_loaders, open_splits
from dcnzoo.train.errors import TrainError
from dcnzoo.train.shards import ShardReader, write_shards

from .conftest import CLASSES, settings
from .ranks import Ranks

TRAIN, VAL = 72, 25
INPUT = {
    'input_size': (3, 8, 8),
    'mean': (0.5,) * 3,
    'std': (0.5,) * 3,
    'interpolation': 'bilinear',
    'crop_pct': 1.0,
    'crop_mode': 'center',
}


@pytest.fixture(scope='module')
def numbered(tmp_path_factory):
    """An image folder of two classes whose images are of one colour each, which tells their number; and its shards."""
    root = tmp_path_factory.mktemp('numbered')
    for split, count in (('train', TRAIN), ('val', VAL)):
        for number in range(count):
            path = root / 'photos' / split / ('even', 'odd')[number % 2] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8), (number, 7, 7)).save(path)
    write_shards(root / 'photos', root / 'shards', ['train', 'val'], size=6)
    return root


def see(arguments, folder):
    """What this rank sees of two epochs, the second from its third batch on, and of validation: numbers and labels."""
    from accelerate import skip_first_batches
    from torch.utils.data import IterableDataset

    from dcnzoo.train.launch import build_accelerator

    config = parse(arguments)
    accelerator = build_accelerator(config)
    splits = open_splits(config.data)
    loaders = build_loaders(splits, config, INPUT, False, 2, accelerator.num_processes)
    if not isinstance(splits.train, IterableDataset):
        loaders = accelerator.prepare(*loaders)
    seen = {}
    for name, loader, epoch in (('first', loaders[0], 0), ('second', loaders[0], 1), ('val', loaders[1], 0)):
        loader.dataset.set_epoch(epoch)
        if hasattr(loader, 'set_epoch'):
            loader.set_epoch(epoch)
        if name == 'second' and not isinstance(splits.train, IterableDataset):
            loader = skip_first_batches(loader, 2)
        batches = [(images[:, 0, 0, 0].tolist(), targets.tolist()) for images, targets, _ in loader]
        assert name == 'val' or all(len(numbers) == 4 for numbers, _ in batches)
        seen[name] = [pair for numbers, targets in batches for pair in zip(numbers, targets, strict=True)]
    (folder / f'rank{accelerator.process_index}.json').write_text(json.dumps(seen))


def seen_by(count, tmp_path, **changes):
    changes = {'augment__crop_mode': 'none', 'data__batch_size': 4, **changes}
    arguments = [str(each) for each in settings(changes.pop('data__root'), tmp_path / 'run', **changes)]
    ranks = Ranks(tmp_path, count, (arguments, tmp_path), see)
    assert ranks.wait() == [0] * count, ranks.text()
    return [json.loads((tmp_path / f'rank{rank}.json').read_text()) for rank in range(count)]


@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize('form', ['photos', 'shards'])
def test_every_image_once(numbered, tmp_path, count, form):
    """Over all ranks, per epoch; and after a resumption in an epoch what is left of it."""
    seen = seen_by(count, tmp_path, data__root=numbered / form)
    first, second, val = ([pair for rank in seen for pair in rank[name]] for name in ('first', 'second', 'val'))
    assert sorted(first) == [[number, number % 2] for number in range(TRAIN)]
    assert len(second) == len({number for number, _ in second}) == TRAIN - 2 * 4 * count
    assert sorted(val) == [[number, number % 2] for number in range(VAL)]
    assert seen[0]['first'] != sorted(seen[0]['first'])
    assert len({len(rank['first']) for rank in seen}) == 1


@pytest.mark.parametrize('count', [2, 3])
def test_every_image_of_a_stream_once(numbered, tmp_path, count):
    """In training where shards, ranks and batches divide, in validation always."""
    seen = seen_by(count, tmp_path, data__root=numbered / 'shards', data__dataset='wds/numbered', data__workers=1)
    for epoch in ('first', 'second'):
        numbers = Counter(number for rank in seen for number, _ in rank[epoch])
        assert numbers == Counter(range(TRAIN))
    assert Counter(number for rank in seen for number, _ in rank['val']) == Counter(range(VAL))
    assert seen[0]['first'] != seen[0]['second']


def test_each_version_of_an_image_on_its_own_rank(numbered, tmp_path):
    """Repeated augmentation: an epoch of as many images, of which there are half."""
    seen = seen_by(2, tmp_path, data__root=numbered / 'photos', augment__repeats=2)
    numbers = [[number for number, _ in rank['first']] for rank in seen]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == len(numbers[0]) == TRAIN // 2


def test_form(numbered):
    """As webdataset and timm want it."""
    info = json.loads((numbered / 'shards' / '_info.json').read_text())
    train = info['splits']['train']
    assert (train['num_samples'], len(train['filenames']), set(train['shard_lengths'])) == (TRAIN, 12, {6})
    with tarfile.open(numbered / 'shards' / train['filenames'][0]) as tar:
        names = tar.getnames()
    assert len(names) == 12
    assert [name.rpartition('.')[2] for name in names] == ['png', 'cls'] * 6
    assert [name.rpartition('.')[0] for name in names[::2]] == [name.rpartition('.')[0] for name in names[1::2]]
    stream = create_dataset('wds/x', root=str(numbered / 'shards'), split='val', is_training=False)
    pairs = sorted((image.getpixel((0, 0))[0], target) for image, target in stream)
    assert pairs == [(number, number % 2) for number in range(VAL)]


def test_without_an_index_the_headers_are_read(numbered, tmp_path):
    for path in (numbered / 'shards').iterdir():
        if path.suffix != '.npz':
            (tmp_path / path.name).symlink_to(path)
    with_index, without = ShardReader(numbered / 'shards', 'train'), ShardReader(tmp_path, 'train')
    for index in range(TRAIN):
        assert with_index[index][0].getvalue() == without[index][0].getvalue()
        assert with_index[index][1] == without[index][1]


def break_image(shards, number):
    """Spoils one image of the training shards; returns its name."""
    reader = ShardReader(shards, 'train')
    path = reader.shards[int(reader.index['shard'][number])]
    with path.open('r+b') as file:
        file.seek(int(reader.index['offset'][number]))
        file.write(b'x' * int(reader.index['size'][number]))
    return f'{path}/{reader.index["key"][number]}'


def test_unreadable_images_in_shards(numbered, tmp_path, train):
    write_shards(numbered / 'photos', tmp_path / 'shards', ['train', 'val'], size=20)
    names = [break_image(tmp_path / 'shards', number) for number in (3, 50)]
    arguments = settings(tmp_path / 'shards', tmp_path / 'run', schedule__epochs=1, augment__crop_mode='none')
    status, _, errors = train(arguments)
    assert status == 0
    lines = (tmp_path / 'run' / 'unreadable.txt').read_text().splitlines()
    assert sorted(line.split(': ')[0] for line in lines) == sorted(names)
    assert errors[-1].startswith('warning: 2 images could not be read')

    stream = settings(
        tmp_path / 'shards', tmp_path / 'stream', schedule__epochs=2, augment__crop_mode='none', data__dataset='wds/x',
        model__num_classes=2, data__batch_size=7,
    )  # fmt: skip
    status, _, errors = train(stream)
    assert status == 0
    assert errors[0].startswith('warning: 4 shards of 18 to 18 images do not divide among 1 workers and batches of 7')
    lines = (tmp_path / 'stream' / 'unreadable.txt').read_text().splitlines()
    assert sorted(line.split(': ')[0] for line in lines) == sorted(name.removesuffix('.png') for name in names)
    assert errors[-1].startswith('warning: 2 images could not be read')

    status, _, errors = train([*stream, '--data.max_unreadable', 1, '--run.output', tmp_path / 'limited'])
    assert status == 1
    assert errors[-1].startswith('error: more than 1 unreadable images (data.max_unreadable)')


def validated(shards, rank, ranks, workers):
    """Numbers of the validation images of a stream that a rank has."""
    data = DataConfig(root=str(shards), dataset='wds/x', workers=workers, batch_size=6)
    splits = open_splits(data)
    for dataset in (splits.train, splits.val):
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, ranks
    config = Config(data=data, augment=AugmentConfig(crop_mode='none'))
    _, loader = build_loaders(splits, config, INPUT, pin_memory=False)
    assert len(splits.val) == VAL
    return [number for images, *_ in loader for number in images[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize('ranks, workers', [(1, 2), (2, 2), (4, 0), (7, 1)])
def test_validation_on_a_stream_is_exact(numbered, ranks, workers):
    """With shards that do not divide among the workers, or are fewer."""
    shares = [validated(numbered / 'shards', rank, ranks, workers) for rank in range(ranks)]
    assert sorted(number for numbers in shares for number in numbers) == list(range(VAL))


def first_epoch(shards, workers=0):
    """Complaints of a stream's first epoch, and how many images it has."""
    config = Config(data=DataConfig(root=str(shards), dataset='wds/x', workers=workers, batch_size=6))
    loader, _ = build_loaders(open_splits(config.data), config, INPUT, pin_memory=False)
    batches = list(loader)
    return [complaint for *_, each in batches for complaint in each], sum(len(images) for images, *_ in batches)


def test_a_shard_that_is_cut_off(numbered, tmp_path):
    """Is named, and the image whose label it lost; those of the others take their places."""
    write_shards(numbered / 'photos', tmp_path / 'shards', ['train', 'val'], size=20)
    shard = tmp_path / 'shards' / 'train-00001.tar'
    shard.write_bytes(shard.read_bytes()[:5000])
    complaints, images = first_epoch(tmp_path / 'shards')
    assert sorted(set(complaints)) == [f"{shard}/00001_000002: no field 'cls'", f'{shard}: unexpected end of data']
    assert images == TRAIN


@pytest.mark.parametrize('workers', [0, 1])
def test_no_image_of_a_stream_can_be_read(numbered, tmp_path, workers):
    write_shards(numbered / 'photos', tmp_path / 'shards', ['train', 'val'], size=20)
    for number in range(TRAIN):
        break_image(tmp_path / 'shards', number)
    with pytest.raises(TrainError, match=r'^no image of the stream can be read; the last is .*train-0000'):
        first_epoch(tmp_path / 'shards', workers)


def test_too_few_shards(numbered):
    with pytest.raises(TrainError, match='12 shards are too few for 13 loading processes'):
        validated(numbered / 'shards', 0, 13, 1)


@pytest.fixture(scope='module')
def streamed(numbered, tmp_path_factory):
    """A finished run on a stream, with all its checkpoints, and its arguments."""
    output = tmp_path_factory.mktemp('streamed') / 'run'
    arguments = settings(
        numbered / 'shards', output, data__dataset='wds/x', model__num_classes=2, data__workers=2, data__batch_size=6,
        schedule__epochs=3, run__checkpoint_every=1, run__keep=50,
    )  # fmt: skip
    ranks = Ranks(output.parent / 'logs', 1, arguments)
    assert ranks.wait() == [0], ranks.text()
    return output, arguments


@pytest.mark.parametrize('position', ['epoch_0001_batch_00000000', 'epoch_0001_batch_00000005'])
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(streamed, tmp_path, position):
    """Bit for bit, from the end of an epoch and from within one."""
    output, arguments = streamed
    shutil.copytree(output, tmp_path / 'run')
    checkpoints = tmp_path / 'run' / 'checkpoints'
    assert (checkpoints / position).is_dir()
    for folder in checkpoints.iterdir():
        if folder.name > position:
            shutil.rmtree(folder)
    ranks = Ranks(tmp_path / 'logs', 1, [*arguments, '--run.output', tmp_path / 'run', '--resume', 'auto'])
    assert ranks.wait() == [0], ranks.text()
    assert f'resumed {checkpoints / position}' in ranks.text()
    last = 'checkpoints/epoch_0003_batch_00000000/model.safetensors'
    ours, theirs = load_file(tmp_path / 'run' / last), load_file(output / last)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_name_an_image_once(numbered, tmp_path):
    """In a file that holds what either of them met."""
    write_shards(numbered / 'photos', tmp_path / 'shards', ['train', 'val'], size=20)
    names = [break_image(tmp_path / 'shards', number) for number in (3, 20, 50, 70)]
    arguments = settings(tmp_path / 'shards', tmp_path / 'run', schedule__epochs=2, data__batch_size=4)
    ranks = Ranks(tmp_path / 'logs', 2, arguments)
    assert ranks.wait() == [0, 0], ranks.text()
    lines = (tmp_path / 'run' / 'unreadable.txt').read_text().splitlines()
    assert sorted(line.split(': ')[0] for line in lines) == sorted(names)
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['unreadable_images'] == 4


def test_damaged_shards(numbered, tmp_path, train):
    write_shards(numbered / 'photos', tmp_path / 'shards', ['train', 'val'], size=40)
    (tmp_path / 'shards' / 'train-00001.tar').unlink()
    status, _, errors = train(settings(tmp_path / 'shards', tmp_path / 'run'))
    assert (status, errors) == (1, [f'error: data.root: {tmp_path}/shards/train-00001.tar is missing'])
    status, _, errors = train(settings(tmp_path / 'shards', tmp_path / 'run', data__train_split='trian'))
    assert status == 1
    assert errors[0].startswith("error: data.root: the split 'trian' of the shards in ")


def test_several_labels_from_shards(numbered, tmp_path, train):
    """Binary fields of a json beside each image become a vector; the run is judged by mean average precision."""
    shards = tmp_path / 'shards'
    shards.mkdir()
    info = {}
    for split, count in (('train', 24), ('val', 12)):
        with tarfile.open(shards / f'{split}.tar', 'w') as tar:
            for number in range(count):
                red, green = number % 2, number // 2 % 2
                image = tmp_path / 'image.png'
                Image.new('RGB', (32, 32), (200 * red, 200 * green, 50)).save(image)
                tar.add(image, f'{number}.png')
                (tmp_path / 'labels.json').write_text(json.dumps({'red': red, 'green': green}))
                tar.add(tmp_path / 'labels.json', f'{number}.json')
        info[split] = {'name': split, 'num_samples': count, 'filenames': [f'{split}.tar'], 'shard_lengths': [count]}
    (shards / '_info.json').write_text(json.dumps({'splits': info}))
    arguments = settings(
        shards, tmp_path / 'run', data__dataset='wds/x', data__target_key='red,green', data__multi_label='true',
        schedule__epochs=4, augment__label_smoothing=0, loss__class_weights='[1.0, 2.0]',
    )  # fmt: skip
    status, text, errors = train(arguments)
    assert (status, errors) == (0, []), text
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['num_classes'] == 2
    assert 0 < summary['val_map'] <= 100
    assert 'mAP' in text
    header = (tmp_path / 'run' / 'metrics.csv').read_text().splitlines()[0]
    assert (
        header
        == 'epoch,step,lr,train_loss,val_loss,val_map,val_micro_f1,val_macro_f1,val_sample_f1,images_per_second,seconds'
    )
    status, text, errors = train([*arguments, '--resume', 'auto', '--eval'])
    assert (status, errors) == (0, [])
    evaluated = json.loads((tmp_path / 'run' / 'eval' / 'eval.json').read_text())
    assert evaluated['val_map'] == pytest.approx(summary['val_map'], abs=1e-3)
    assert torch.tensor(evaluated['val_loss']).isfinite()


def test_the_command(photos, tmp_path, capsys, train):
    assert command(['shards', str(photos), str(tmp_path / 'shards'), '--images', '10']) == 0
    assert capsys.readouterr().out.startswith('36 images of train in 4 shards')
    status, text, errors = train(settings(tmp_path / 'shards', tmp_path / 'run', schedule__epochs=1))
    assert (status, errors) == (0, [])
    assert '36 training and 15 validation images' in text
    assert json.loads((tmp_path / 'run' / 'best' / 'config.json').read_text())['label_names'] == list(CLASSES)
    assert command(['shards', str(photos), str(tmp_path / 'shards')]) == 1
    assert 'is not empty' in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'val' / 'red').rename(tmp_path / 'photos' / 'val' / 'rot')
    assert command(['shards', str(tmp_path / 'photos'), str(tmp_path / 'more')]) == 1
    assert 'the classes of' in capsys.readouterr().err
    assert not (tmp_path / 'more' / '_info.json').exists()
