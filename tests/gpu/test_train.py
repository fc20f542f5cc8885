"""Trainings on GPUs: mixed precision, deterministic numbers, and through accelerate sharded weights."""

import json
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import LAUNCH, REPOSITORY, make_photos, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='this machine has no GPU that torch can use'),
]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp('photos'), train=32)


def launch(photos, output, *launcher, **changes):
    """Trains by `accelerate launch`; returns the summary and standard output."""
    changes = {'run__cpu': 'false', 'data__workers': 2, **changes}
    command = [*LAUNCH, *launcher, 'train', *settings(photos, output, **changes)]
    environment = {name: value for name, value in os.environ.items() if name != 'ACCELERATE_USE_CPU'}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((output / 'summary.json').read_text()), done.stdout


@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
def test_precision(photos, tmp_path, precision):
    summary, text = launch(photos, tmp_path / 'run', '--num_processes', '1', run__precision=precision, ema__decay=0.9)
    assert summary['precision'] == precision
    assert summary['skipped_updates'] == 0
    assert '1 x cuda' in text


def test_the_same_numbers_twice(photos, tmp_path):
    for name in ('first', 'second'):
        launch(photos, tmp_path / name, '--num_processes', '1', run__deterministic='true', augment__random_erasing=0.5)
    first, second = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('first', 'second'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fsdp2(photos, tmp_path):
    """Weights are shared between all GPUs of the machine; the checkpoint that it leaves is a whole one, and resumes."""
    count = torch.cuda.device_count()
    launcher = ['--config_file', 'configs/accelerate/fsdp2.yaml', '--num_processes', str(count)]
    changes = {'run__checkpoint_every': 1, 'run__precision': 'bf16'}
    summary, _ = launch(photos, tmp_path / 'run', *launcher, **changes)
    assert summary['processes'] == count
    weights = load_file(tmp_path / 'run' / 'best' / 'model.safetensors')
    assert sum(value.numel() for value in weights.values()) >= summary['parameters']
    summary, text = launch(photos, tmp_path / 'run', *launcher, **changes, schedule__epochs=3, resume='auto')
    assert summary['epochs'] == 3
    assert 'resumed' in text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_batch_norm_over_two_gpus(photos, tmp_path):
    summary, _ = launch(photos, tmp_path / 'run', '--multi_gpu', '--num_processes', '2', model__sync_bn='true')
    assert summary['processes'] == 2
