"""The ways to start a run, as processes: launchers, several processes, signals, and errors on the terminal."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from dcnzoo.train.cores import count_cores

from .conftest import finish, settings, start


def wait_for(path, process, seconds=120):
    """Waits until a path is there, while the process runs."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.05)


@pytest.mark.parametrize(
    'command',
    ['accelerate launch train', 'accelerate launch -m train', 'accelerate launch -m dcnzoo.train'],
)
def test_accelerate(command, photos, tmp_path):
    status, text, errors = finish(start(command, settings(photos, tmp_path / 'run', schedule__epochs=1)))
    assert status == 0, errors
    assert 'test_dcnv4' in text
    assert 'epoch 1/1' in text
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['processes'] == 1


@pytest.mark.skipif(count_cores() < 2, reason='needs two cores')
@pytest.mark.parametrize(
    ('command', 'environment', 'options', 'threads'),
    [
        ('accelerate launch train', {}, [], count_cores()),
        ('accelerate launch train', {'OMP_NUM_THREADS': '1'}, [], 1),
        ('accelerate launch train', {}, ['--run.threads', 1], 1),
        ('accelerate launch train', {}, ['--data.workers', 100], count_cores() - count_cores() // 2),
        ('accelerate launch, one thread', {}, [], 1),
        ('accelerate launch, two', {}, [], count_cores() // 2),
        ('torchrun, two', {}, [], count_cores() // 2),
    ],
)
def test_threads_on_a_cpu(command, environment, options, threads, photos, tmp_path, monkeypatch):
    """Launchers give a process one thread of their own accord, which nobody means who did not say so."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    arguments = settings(photos, tmp_path / 'run', data__batch_size=4)
    status, text, errors = finish(start(command, [*arguments, '--dry-run', *options], environment=environment))
    assert status == 0, errors
    assert f' x cpu, {threads} threads each' in text


@pytest.mark.parametrize(
    ('command', 'expected'), [('python -m train', 2), ('python -m dcnzoo.train', 2), ('accelerate launch train', 1)]
)
def test_a_wrong_key_is_one_line(command, expected, photos, tmp_path):
    file = tmp_path / 'wrong.yaml'
    file.write_text('optim: {lrr: 1}\nmodel: {name: test_dcnv4}\n')
    status, text, errors = finish(start(command, ['--config', file, '--data.root', photos]))
    assert (status, text) == (expected, '')
    assert errors == [f"error: unknown setting optim.lrr in {file} (did you mean 'optim.lr'?)"]


def test_two_processes(photos, tmp_path):
    """Two gloo ranks train one model on all images, validate each image once, stop together and resume."""
    arguments = settings(
        photos, tmp_path / 'run', data__batch_size=4, run__checkpoint_every=1, run__keep=100, run__processes=2
    )
    status, text, errors = finish(start('accelerate launch, two', arguments))
    assert status == 0, errors
    assert text.count('epoch 2/2') == 1  # one process speaks
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert (summary['processes'], summary['steps'], summary['val_images']) == (2, 8, 15)  # 36 images, 2 x 4 at a time
    assert summary['val_top1'] * 15 / 100 == pytest.approx(round(summary['val_top1'] * 15 / 100), abs=1e-3)

    kept = 'epoch_0000_batch_00000003'
    shutil.copytree(tmp_path / 'run' / 'checkpoints' / kept, tmp_path / 'again' / 'checkpoints' / kept)
    arguments[arguments.index(str(tmp_path / 'run'))] = tmp_path / 'again'
    status, text, errors = finish(start('torchrun, two', [*arguments, '--resume', 'auto']))
    assert status == 0, errors
    first, second = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('run', 'again'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fewer_processes_than_asked_for(photos, tmp_path):
    """accelerate starts one where --cpu is given."""
    status, _, errors = finish(start('accelerate launch, one for two', settings(photos, tmp_path / 'run')))
    assert status == 1
    assert errors == [
        'error: 2 processes were asked for, but 1 started: several on CPU need ACCELERATE_USE_CPU=true '
        'accelerate launch --multi_gpu --num_processes 2'
    ]


@pytest.mark.parametrize(
    ('command', 'number', 'whole_group'),
    [('python -m train', signal.SIGINT, True), ('python -m dcnzoo.train', signal.SIGTERM, False)],
)
def test_a_signal_leaves_a_checkpoint_to_resume(command, number, whole_group, photos, tmp_path, train):
    """Ctrl-C reaches the loaders' processes, too; a scheduler's SIGTERM only the trainer."""
    output = tmp_path / 'run'
    arguments = settings(photos, output, schedule__epochs=1000, data__workers=1)
    process = start(command, arguments, start_new_session=True)
    wait_for(output / 'metrics.csv', process)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    status, _, errors = finish(process)
    assert status == 128 + number
    assert len(errors) == 1, errors
    assert errors[0].startswith(f'{number.name}: stopped at epoch ')
    newest = sorted((output / 'checkpoints').iterdir())[-1]
    assert f'saved {newest}; continue with --resume auto' in errors[0]
    assert not (output / 'summary.json').exists()
    epochs = int(newest.name[6:10]) + 1
    status, text, errors = train([*arguments, '--schedule.epochs', epochs, '--resume', 'auto'])
    assert (status, errors) == (0, [])
    assert f'resumed {newest}' in text
    assert json.loads((output / 'summary.json').read_text())['epochs'] == epochs


def test_a_signal_that_comes_twice(photos, tmp_path):
    """To all processes of a job, as schedulers send it, and from the launcher that hands it on: it stops them once."""
    output = tmp_path / 'run'
    arguments = settings(photos, output, data__batch_size=4, schedule__epochs=1000)
    process = start('torchrun, two', arguments, start_new_session=True)
    wait_for(output / 'metrics.csv', process)
    os.killpg(process.pid, signal.SIGTERM)
    status, _, errors = finish(process)
    assert status != 0
    stops = [line for line in errors if line.startswith('SIGTERM: stopped at epoch ')]
    assert len(stops) == 1, errors
    assert sorted((output / 'checkpoints').iterdir())[-1].name in stops[0]


def test_a_killed_run_resumes(photos, tmp_path, train):
    """Without a warning: what was half written then is not taken for a checkpoint."""
    output = tmp_path / 'run'
    arguments = settings(photos, output, schedule__epochs=1000, run__checkpoint_every=1)
    process = start('python -m train', arguments)
    wait_for(output / 'checkpoints' / 'epoch_0001_batch_00000001', process)
    process.kill()
    process.communicate()
    newest = sorted(path for path in (output / 'checkpoints').iterdir() if path.name[0] != '.')[-1]
    status, text, errors = train([*arguments, '--schedule.epochs', int(newest.name[6:10]) + 1, '--resume', 'auto'])
    assert (status, errors) == (0, [])
    assert f'resumed {newest}' in text
