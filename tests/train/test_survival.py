"""A run is killed, its disk fills up, its checkpoints are damaged: in the end nothing is lost and nothing different."""

import csv
import json
import random
import re
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from dcnzoo.train.checkpoint import Checkpoints, find_damage

from .conftest import settings
from .ranks import Ranks, run_training

EVERYTHING = {  # that is random or has a memory
    'model__drop_path_rate': 0.2,
    'data__batch_size': 4,
    'augment__random_erasing': 0.5,
    'augment__mixup': 0.2,
    'ema__decay': 0.9,
    'optim__accumulate': 2,
    'optim__clip_grad': 1.0,
    'schedule__epochs': 3,
    'health__every': 2,
    'run__checkpoint_every': 1,
    'run__keep': 3,
    'run__processes': 2,
}
LAST = 'checkpoints/epoch_0003_batch_00000000'
TIMES = ('seconds', 'epoch_seconds', 'images_per_second')


def without_times(content):
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(each) for each in content] if isinstance(content, list) else content


def table(path):
    with path.open(newline='') as file:
        return without_times(list(csv.DictReader(file)))


def assert_same(ours, theirs):
    """Weights, average, optimizer, state and logs of two finished runs, bit for bit."""
    for name in ('best/model', 'best/raw/model', 'last/model', 'last/raw/model', f'{LAST}/model', f'{LAST}/ema'):
        first, second = (load_file(folder / f'{name}.safetensors') for folder in (ours, theirs))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    first, second = (torch.load(folder / LAST / 'optimizer.bin') for folder in (ours, theirs))
    assert first['param_groups'] == second['param_groups']
    assert first['state'].keys() == second['state'].keys() != set()
    for number, state in first['state'].items():
        assert all(torch.equal(value, second['state'][number][key]) for key, value in state.items())
    first, second = (json.loads((folder / LAST / 'trainer.json').read_text()) for folder in (ours, theirs))
    assert without_times(first) == without_times(second)
    for name in ('metrics.csv', 'health.csv'):
        assert table(ours / name) == table(theirs / name)
    first, second = (json.loads((folder / 'summary.json').read_text()) for folder in (ours, theirs))
    assert first['val_loss'] == second['val_loss']


@pytest.fixture(scope='module')
def uninterrupted(photos, tmp_path_factory):
    """A finished run of 2 ranks, and the seconds that it took from its first checkpoint on."""
    folder = tmp_path_factory.mktemp('survival')
    ranks = Ranks(folder / 'logs', 2, settings(photos, folder / 'run', **EVERYTHING))
    while not (folder / 'run' / 'checkpoints').exists():
        time.sleep(0.01)
        assert ranks.processes[0].is_alive(), ranks.text()
    started = time.monotonic()
    assert ranks.wait() == [0, 0], ranks.text()
    return folder / 'run', time.monotonic() - started


def drill(photos, tmp_path, uninterrupted, kills, seed):
    """Kills a run of 2 ranks again and again, resumes it each time, and lets it finish at last."""
    expected, seconds = uninterrupted
    output, draw, survived = tmp_path / 'run', random.Random(seed), 0
    arguments = [*settings(photos, output, **EVERYTHING), '--resume', 'auto']
    for number in range(kills):
        newest = max(output.glob('checkpoints/epoch_*'), default=None)
        ranks = Ranks(tmp_path / f'life{number}', 2, arguments)
        # from anywhere before the first new checkpoint to a few checkpoints later
        time.sleep(draw.uniform(0, 0.5))
        while draw.random() < 0.9 and ranks.processes[0].is_alive():
            if max(output.glob('checkpoints/epoch_*'), default=None) != newest:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 2.5 * seconds / kills))
        survived += ranks.processes[0].is_alive()
        ranks.kill()
    ranks = Ranks(tmp_path / 'last life', 2, arguments)
    assert ranks.wait() == [0, 0], ranks.text()
    assert_same(output, expected)
    assert not list(output.rglob('*.draft')), 'what was half written is cleared away'
    return survived


def test_killed_three_times(photos, tmp_path, uninterrupted):
    assert drill(photos, tmp_path, uninterrupted, kills=3, seed=0) >= 2


@pytest.mark.slow
def test_killed_twenty_times(photos, tmp_path, uninterrupted):
    assert drill(photos, tmp_path, uninterrupted, kills=20, seed=1) >= 12


def train_until_the_disk_is_full(arguments, output):
    """After the first checkpoint no file may grow beyond 1.3 MB: the weights fit, the optimizer's state does not."""
    original = Checkpoints._begin

    def begin(self, draft):
        if list(output.glob('checkpoints/epoch_*')):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_300_000, resource.RLIM_INFINITY))
        return original(self, draft)

    Checkpoints._begin = begin
    return run_training(arguments)


def test_disk_full(photos, tmp_path, uninterrupted):
    """In the middle of a checkpoint: both ranks end, the checkpoint before serves, nothing else is left."""
    output = tmp_path / 'run'
    arguments = [str(each) for each in settings(photos, output, **EVERYTHING)]
    ranks = Ranks(tmp_path / 'logs', 2, (arguments, output), train_until_the_disk_is_full)
    assert ranks.wait() == [1, 1], ranks.text()
    first = output / 'checkpoints' / 'epoch_0000_batch_00000002'
    assert list((output / 'checkpoints').iterdir()) == [first]
    errors = [line for line in ranks.text().splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, ranks.text()
    assert errors[0].startswith(f'error: cannot write the checkpoint {output}/checkpoints/epoch_0000_batch_00000004: ')
    assert errors[0].endswith(f'; continue from {first} with --resume auto')
    ranks = Ranks(tmp_path / 'more logs', 2, [*arguments, '--resume', 'auto'])
    assert ranks.wait() == [0, 0], ranks.text()
    assert_same(output, uninterrupted[0])


def truncate(folder):
    content = (folder / 'optimizer.bin').read_bytes()
    (folder / 'optimizer.bin').write_bytes(content[: len(content) // 2])
    return r'optimizer\.bin should have \d+ bytes, but has \d+'


def flip(folder):
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[len(content) // 2] ^= 1
    (folder / 'model.safetensors').write_bytes(content)
    return r'model\.safetensors does not match its SHA-256'


def remove(folder):
    (folder / 'ema.safetensors').unlink()
    return r'ema\.safetensors is missing'


def halve_manifest(folder):
    content = (folder / 'manifest.json').read_text()
    (folder / 'manifest.json').write_text(content[: len(content) // 2])
    return r'manifest\.json cannot be read'


def empty_manifest(folder):
    (folder / 'manifest.json').write_text('{}')
    return r'manifest\.json is incomplete'


@pytest.mark.parametrize('damage', [truncate, flip, remove, halve_manifest, empty_manifest])
def test_damage_is_recognised(uninterrupted, tmp_path, damage):
    folder = tmp_path / 'checkpoint'
    shutil.copytree(uninterrupted[0] / LAST, folder)
    assert find_damage(folder) is None
    assert re.match(damage(folder), find_damage(folder))


def copy_checkpoints(run, output):
    shutil.copytree(run / 'checkpoints', output / 'checkpoints')
    shutil.copytree(run / 'best', output / 'best')
    return sorted((output / 'checkpoints').iterdir())


def test_the_checkpoint_before_a_damaged_one_is_used(photos, uninterrupted, tmp_path):
    _, before, newest = copy_checkpoints(uninterrupted[0], tmp_path / 'run')
    flip(newest)
    ranks = Ranks(tmp_path / 'logs', 2, [*settings(photos, tmp_path / 'run', **EVERYTHING), '--resume', 'auto'])
    assert ranks.wait() == [0, 0], ranks.text()
    text = ranks.text()
    assert f'warning: the checkpoint {newest} is damaged: model.safetensors does not match its SHA-256' in text
    assert f'resumed {before} at ' in text
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['epochs'] == 3
    assert find_damage(newest) is None  # written anew


def test_only_damaged_checkpoints(photos, uninterrupted, tmp_path, train):
    for folder in copy_checkpoints(uninterrupted[0], tmp_path / 'run'):
        truncate(folder)
    status, _, errors = train([*settings(photos, tmp_path / 'run', run__overwrite='true'), '--resume', 'auto'])
    assert status == 1
    assert len(errors) == 1
    assert errors[0].endswith('; there is none before')
    assert len(list((tmp_path / 'run' / 'checkpoints').iterdir())) == 3


def test_other_processes_and_another_batch_size(photos, uninterrupted, tmp_path, train):
    """From 2 processes with batches of 4 to one with 6: it says so, and trains what is left of the epoch."""
    before, *newer = copy_checkpoints(uninterrupted[0], tmp_path / 'run')
    for folder in newer:
        shutil.rmtree(folder)
    changes = {**EVERYTHING, 'run__processes': 1, 'data__batch_size': 6}
    status, text, errors = train([*settings(photos, tmp_path / 'run', **changes), '--resume', 'auto'])
    assert (status, errors) == (0, [])
    assert 'resumed otherwise than it was saved: 2 processes before, 1 now; 4 images per batch before, 6 now; ' in text
    assert before.name == 'epoch_0002_batch_00000002'
    # 16 images are done, which is 2 batches of 6 and a little more
    assert f'resumed {before} at epoch 3, batch 2 of 6' in text
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['epochs'] == 3


def test_more_processes(photos, tmp_path, train):
    """From one process with batches of 8 to two with batches of 4, within an epoch: it ends as it would have."""
    changes = {
        'model__name': 'test_convnext', 'optim__name': 'sgd', 'schedule__name': 'none', 'run__checkpoint_every': 1,
        'run__keep': 9,
    }  # fmt: skip
    whole, output, kept = tmp_path / 'whole', tmp_path / 'run', 'epoch_0001_batch_00000002'
    assert train(settings(photos, whole, **changes))[0] == 0
    shutil.copytree(whole / 'checkpoints' / kept, output / 'checkpoints' / kept)
    shutil.copytree(whole / 'best', output / 'best')
    arguments = settings(photos, output, data__batch_size=4, run__processes=2, **changes)
    ranks = Ranks(tmp_path / 'logs', 2, [*arguments, '--resume', 'auto'])
    assert ranks.wait() == [0, 0], ranks.text()
    assert '1 processes before, 2 now; 8 images per batch before, 4 now' in ranks.text()
    assert f'{kept} at epoch 2, batch 2 of 4' in ranks.text()
    ours, theirs = (load_file(folder / 'last' / 'model.safetensors') for folder in (output, whole))
    before = load_file(output / 'checkpoints' / kept / 'model.safetensors')
    assert any((theirs[key] - before[key]).abs().max() > 1e-4 for key in theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_checkpoints_by_the_clock(photos, tmp_path, train):
    """Every thousandth of a second, that is after every update; only the newest are kept."""
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=1, run__checkpoint_minutes=1e-5, run__keep=3)
    assert train(arguments)[0] == 0
    names = [path.name for path in sorted((tmp_path / 'run' / 'checkpoints').iterdir())]
    assert names == ['epoch_0000_batch_00000003', 'epoch_0000_batch_00000004', 'epoch_0001_batch_00000000']
