"""A tiny image folder that can be learnt, and ways to train on it: in this process, or by any of the commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from dcnzoo.train.arguments import parse
from dcnzoo.train.main import main
from dcnzoo.train.main import train as run_training

REPOSITORY = Path(__file__).parents[2]
CLASSES = ('blue', 'green', 'red')  # as sorted


def make_photos(root, train=12, val=5):
    """Noise with one strong channel per class: `train` and `val` images of 40x36 pixels each."""
    random = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for channel, name in ((2, 'blue'), (1, 'green'), (0, 'red')):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(root / split / name / f'{number}.jpg')
    return root


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """An image folder of three classes; not to be changed."""
    return make_photos(tmp_path_factory.mktemp('photos'))


@pytest.fixture
def own_photos(tmp_path):
    """An image folder of three classes for one test to spoil."""
    return make_photos(tmp_path / 'photos')


def settings(photos, output, **changes):
    """Arguments for a run of seconds; `optim__lr=1` in `changes` is --optim.lr 1."""
    values = {
        'model.name': 'test_dcnv4',
        'data.root': photos,
        'data.image_size': 32,
        'data.batch_size': 8,
        'data.workers': 0,
        'augment.scale': '[0.6,1.0]',
        'optim.lr': 3e-3,
        'schedule.epochs': 2,
        'schedule.warmup_epochs': 0.5,
        'run.output': output,
        'run.cpu': 'true',
        'run.trackers': '[]',
        **{key.replace('__', '.'): value for key, value in changes.items()},
    }
    return [word for key, value in values.items() for word in (f'--{key}', str(value))]


def forget_accelerator():
    """accelerate keeps one state per process; before every run in this one it has to start anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(scope='session')
def trained(photos, tmp_path_factory):
    """A finished run of two epochs with all its checkpoints; not to be changed."""
    output = tmp_path_factory.mktemp('trained') / 'run'
    forget_accelerator()
    run_training(parse(settings(photos, output, ema__decay=0.5, run__keep=9, run__checkpoint_every=2)))
    return output


@pytest.fixture
def train(capsys):
    """Trains in this process; returns the exit status, standard output and the lines of standard error."""

    def run(arguments):
        capsys.readouterr()
        forget_accelerator()
        status = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err.splitlines()

    return run


LAUNCH = [sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '-q']
COMMANDS = {
    'python -m train': [sys.executable, '-m', 'train'],
    'python -m dcnzoo.train': [sys.executable, '-m', 'dcnzoo.train'],
    'accelerate launch train': [*LAUNCH, '--num_processes', '1', 'train'],
    'accelerate launch -m train': [*LAUNCH, '--num_processes', '1', '-m', 'train'],
    'accelerate launch -m dcnzoo.train': [*LAUNCH, '--num_processes', '1', '-m', 'dcnzoo.train'],
    'accelerate launch, one thread': [*LAUNCH, '--num_processes', '1', '--num_cpu_threads_per_process', '1', 'train'],
    'accelerate launch, one for two': [*LAUNCH, '--num_processes', '2', '--cpu', 'train'],
    'accelerate launch, two': [*LAUNCH, '--num_processes', '2', '--multi_gpu', '--main_process_port', '0', 'train'],
    'torchrun, two': [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '-m',
        'train',
    ],
}


def start(command, arguments, environment=None, **kwargs):
    """Starts one of COMMANDS as a process in the clone, on one thread or in another environment."""
    environment = {'OMP_NUM_THREADS': '1'} if environment is None else environment
    return subprocess.Popen(
        [*COMMANDS[command], *(str(argument) for argument in arguments)],
        cwd=REPOSITORY,
        env={**os.environ, 'ACCELERATE_USE_CPU': 'true', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process, timeout=300):
    """Waits for a process; returns its exit status, standard output and the lines of standard error.

    Those in which `accelerate launch` tells its defaults are left out.
    """
    output, errors = process.communicate(timeout=timeout)
    assert 'Traceback' not in errors or 'torch/distributed' in errors, errors  # torchrun ends with one of its own
    told = ('The following values were not passed', '\t`--', 'To avoid this warning pass in values')
    return process.returncode, output, [line for line in errors.splitlines() if not line.startswith(told)]
