"""Images to train on, and short trainings."""

import os
import subprocess
import sys

import pytest
import torch

from . import data

SIZE = 64 if data.PHOTOS.is_dir() else 96  # boxes drawn on noise are small beside what photos show

# Not AdamW: ultralytics' checkpoints hold the optimizer in half precision, where the squares of small gradients are
# zero, and the first step after an interruption is then thousands of times too long.
SETTINGS = dict(
    imgsz=SIZE, batch=4, device='cpu', workers=0, plots=False, verbose=False, optimizer='Adamax', lr0=2e-3, nbs=4
) | dict(warmup_epochs=0, mosaic=0, close_mosaic=0)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """The `data` argument of training for a task."""
    made = {}

    def images(task='detect'):
        if task not in made:
            made[task] = data.make(tmp_path_factory.mktemp(task), task)
        return made[task]

    return images


class Interrupted(Exception):
    """Ends a training early."""


@pytest.fixture(scope='session')
def train(images, tmp_path_factory):
    """Trains a model for a short epoch; returns it, with the loss of all batches before and after in `losses`.

    With `interrupt` two more epochs follow in another run, resumed from what the first left, with their losses.
    """
    from ultralytics import YOLO

    def train(config, task='detect', interrupt=False, **settings):
        losses, batches = [], []

        def note_loss(trainer):
            if not batches:
                batches.extend(map(trainer.preprocess_batch, trainer.train_loader))
            with torch.no_grad():
                losses.append(sum(trainer.model(batch)[0].sum().item() for batch in batches))

        def load(source):
            model = YOLO(source)
            model.losses = losses
            model.add_callback('on_train_start', note_loss)
            model.add_callback('on_train_epoch_end', note_loss)
            return model

        def stop(trainer):
            raise Interrupted

        model = load(config)
        folder = tmp_path_factory.mktemp('runs')
        settings = {'data': images(task), 'project': str(folder), 'name': 'run', **SETTINGS, **settings}
        if not interrupt:
            model.train(**{'epochs': 1, **settings})
            return model
        model.add_callback('on_model_save', stop)
        with pytest.raises(Interrupted):
            model.train(**settings, epochs=3)
        resumed = load(folder / 'run' / 'weights' / 'last.pt')
        resumed.train(resume=True)
        return resumed

    return train


@pytest.fixture(scope='session')
def fresh():
    """Runs code in a new process, where nobody has imported dcnzoo; returns what it prints."""

    def fresh(code, *arguments, **environment):
        done = subprocess.run(
            [sys.executable, '-c', code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=1200,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return fresh
