"""Losses and gradients that are not finite: such updates are skipped and named, or the run goes back."""

import csv
import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from dcnzoo.train.guard import Buffers, first_layer_not_finite
from dcnzoo.train.loop import Trainer

from .conftest import settings
from .ranks import Ranks, run_training


def poison(when, layer='stages.1.blocks.0.mlp', backward=False):
    """Makes a layer's output, or the gradient of it, NaN in the batches for which `when(state)` is true."""
    original, hooks = Trainer.train_batch, []

    def spoil(module, inputs, output):
        if not backward:
            return output * torch.nan
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return None

    def train_batch(self, *arguments):
        while hooks:
            hooks.pop().remove()
        if when(self):
            module = self.network.plain.get_submodule(layer)
            hooks.append(module.register_forward_hook(spoil))
        return original(self, *arguments)

    Trainer.train_batch = train_batch
    return original


@pytest.fixture
def poisoned(monkeypatch):
    monkeypatch.setattr(Trainer, 'train_batch', Trainer.train_batch)  # to be undone
    return poison


def summary(output):
    return json.loads((output / 'summary.json').read_text())


@pytest.mark.parametrize('backward', [False, True], ids=['loss', 'gradient'])
def test_an_update_that_is_not_finite_is_skipped_and_named(photos, tmp_path, train, poisoned, backward):
    poisoned(lambda trainer: (trainer.state.epoch, trainer.state.batch) == (0, 1), backward=backward)
    output = tmp_path / 'run'
    status, _, errors = train(settings(photos, output, ema__decay=0.9))
    assert status == 0
    assert (summary(output)['skipped_updates'], summary(output)['steps']) == (1, 7)
    message = (output / 'nonfinite.txt').read_text()
    assert errors == [
        f'warning: {message.strip()}',
        f'warning: 1 updates were skipped as not finite; {output}/nonfinite.txt names their batches',
    ]
    assert message.startswith('update skipped at epoch 1, batch 2 of 4: ')
    if backward:
        assert 'parameters are not finite, the first is that of stages.1.blocks.0.mlp' in message
    else:
        assert 'the loss is nan in batch 2 of process 0, from stages.1.blocks.0.mlp on (' in message
        assert message.count('.jpg') == 8
    for name in ('last', 'last/raw'):
        assert all(value.isfinite().all() for value in load_file(output / name / 'model.safetensors').values())
    with (output / 'metrics.csv').open() as file:
        assert all(float(row['train_loss']) < 10 for row in csv.DictReader(file))


def test_after_too_many_the_run_goes_back(photos, tmp_path, train, poisoned):
    """Not to the newest checkpoint, from which all updates failed, but to the one before; and with half the rate."""
    poisoned(lambda trainer: trainer.state.rollbacks == 0 and trainer.state.epoch == 1)
    output = tmp_path / 'run'
    arguments = settings(photos, output, run__checkpoint_every=2, health__skip=1, schedule__name='none')
    status, text, errors = train(arguments)
    assert status == 0, errors
    assert f'went back to {output}/checkpoints/epoch_0000_batch_00000002 (1 of 3), learning rate times 0.5' in text
    assert (summary(output)['rollbacks'], summary(output)['epochs'], summary(output)['steps']) == (1, 2, 8)
    with (output / 'metrics.csv').open() as file:
        assert [float(row['lr']) for row in csv.DictReader(file)] == [0.0015, 0.0015]


def test_after_too_many_the_run_stops_if_it_is_to(photos, tmp_path, train, poisoned):
    poisoned(lambda trainer: trainer.state.epoch == 1)
    arguments = settings(photos, tmp_path / 'run', health__skip=1, health__then='stop')
    status, _, errors = train(arguments)
    assert status == 1
    assert errors[-1].startswith('error: 2 updates in a row had no finite loss or gradients; the last: the loss is nan')
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['epoch_0001_batch_00000000']


def train_with_poison_on_rank_1(arguments):
    poison(lambda trainer: trainer.accelerator.process_index == 1 and trainer.state.batch == 2)
    return run_training(arguments)


def test_all_processes_skip_what_is_not_finite_on_one(photos, tmp_path):
    arguments = settings(photos, tmp_path / 'run', data__batch_size=4, schedule__epochs=1)
    ranks = Ranks(tmp_path / 'logs', 2, ([str(each) for each in arguments],), train_with_poison_on_rank_1)
    assert ranks.wait() == [0, 0], ranks.text()
    assert (summary(tmp_path / 'run')['skipped_updates'], summary(tmp_path / 'run')['steps']) == (1, 3)
    assert 'batch 3 of 4: the loss is nan in batch 3 of process 1' in (tmp_path / 'run' / 'nonfinite.txt').read_text()


def test_buffers_are_taken_back():
    norm = torch.nn.BatchNorm2d(3)
    buffers = Buffers(norm)
    buffers.keep()
    norm(torch.full((2, 3, 4, 4), torch.nan))
    assert norm.running_mean.isnan().all()
    buffers.restore()
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert norm.num_batches_tracked == 0


def test_the_innermost_layer_is_named():
    model = timm.create_model('test_dcnv4').eval()
    with torch.no_grad():
        model.stages[2].blocks[0].norm1.weight.fill_(torch.inf)
    found = first_layer_not_finite(model, lambda: model(torch.randn(1, 3, 64, 64)))
    assert found == 'stages.2.blocks.0.norm1'
    assert (
        first_layer_not_finite(timm.create_model('test_dcnv4'), lambda: model.stem(torch.randn(1, 3, 64, 64))) is None
    )
