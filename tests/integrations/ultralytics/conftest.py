"""Images to train on, and short trainings."""

import os
import subprocess
import sys

import pytest
import torch

from . import data

SETTINGS = dict(
    imgsz=64, batch=4, device='cpu', workers=0, plots=False, verbose=False, optimizer='AdamW', lr0=2e-3, nbs=4
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


@pytest.fixture(scope='session')
def train(images, tmp_path_factory):
    """Trains a model for a short epoch; returns it, with the loss of one batch before and after in `losses`."""
    from ultralytics import YOLO

    def train(config, task='detect', **settings):
        model = YOLO(config)
        model.losses = []
        batch = {}

        def note_loss(trainer):
            if not batch:
                batch.update(trainer.preprocess_batch(next(iter(trainer.train_loader))))
            with torch.no_grad():
                model.losses.append(trainer.model(batch)[0].sum().item())

        model.add_callback('on_train_start', note_loss)
        model.add_callback('on_train_epoch_end', note_loss)
        folder = tmp_path_factory.mktemp('runs')
        model.train(data=images(task), **{**SETTINGS, 'epochs': 1, 'project': str(folder), 'name': 'run', **settings})
        return model

    return train


@pytest.fixture
def fresh():
    """Runs code in a new process, where nobody has imported dcnzoo; returns what it prints."""

    def fresh(code, *arguments, **environment):
        done = subprocess.run(
            [sys.executable, '-c', code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return fresh
