"""When a run stops: signals, whenever they come and however often; and other processes that end."""

import errno
import os
import signal
import time

import pytest

from dcnzoo.train import timing
from dcnzoo.train.loop import Trainer
from dcnzoo.train.main import explain
from dcnzoo.train.samples import Samples
from dcnzoo.train.timing import StopSignal

from .conftest import settings
from .ranks import Ranks


def test_a_signal_is_noted_and_its_echo_too(monkeypatch):
    """Launchers hand on what the terminal or the scheduler has sent already; an impatient user does not wait."""
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    with stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.number == signal.SIGTERM
        monkeypatch.setattr(timing, 'IMPATIENCE', 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ('number', 'validation', 'position'),
    [
        (signal.SIGINT, 1, 'epoch 1, batch 4 of 4'),
        (signal.SIGTERM, 3, 'the end of the last epoch'),
    ],
    ids=['in a validation', 'in the final evaluation'],
)
def test_a_signal_during(photos, tmp_path, train, monkeypatch, number, validation, position):
    """It ends with one line, and resumed it goes on to the same end."""
    original, done = Trainer.validation_batches, []

    def interrupted(self):
        done.append(self)
        if len(done) == validation:
            os.kill(os.getpid(), number)
        return original(self)

    monkeypatch.setattr(Trainer, 'validation_batches', interrupted)
    output = tmp_path / 'run'
    status, _, errors = train(settings(photos, output))
    newest = sorted((output / 'checkpoints').iterdir())[-1]
    assert (status, len(errors)) == (128 + number, 1)
    assert errors[0] == (
        f'{signal.Signals(number).name}: stopped at {position}, saved {newest}; continue with --resume auto'
    )
    assert not (output / 'summary.json').exists()
    status, _, errors = train([*settings(photos, output), '--resume', 'auto'])
    assert (status, errors) == (0, [])
    assert (output / 'summary.json').exists()


def test_a_loading_process_that_is_killed(photos, tmp_path, train, monkeypatch):
    original = Samples.__getitem__

    def die(self, index):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, index)

    monkeypatch.setattr(Samples, '__getitem__', die)
    status, _, errors = train(settings(photos, tmp_path / 'run', data__workers=1))
    assert (status, len(errors)) == (1, 1), errors
    assert errors[0].startswith('error: DataLoader worker (pid')
    assert errors[0].endswith('--data.workers 0 does without.')
    assert (tmp_path / 'run' / 'checkpoints' / 'epoch_0001_batch_00000000').exists()


def test_a_process_that_is_killed_ends_the_others(photos, tmp_path):
    arguments = settings(photos, tmp_path / 'run', data__batch_size=4, schedule__epochs=1000)
    ranks = Ranks(tmp_path / 'logs', 2, arguments)
    while not (tmp_path / 'run' / 'metrics.csv').exists():
        time.sleep(0.05)
        assert ranks.processes[0].is_alive(), ranks.text()
    ranks.processes[1].kill()
    assert ranks.wait() == [1, -signal.SIGKILL], ranks.text()
    errors = [line for line in ranks.text().splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert errors[0].startswith('error: another process of the run is lost, continue with --resume auto: ')
    assert 'Traceback' not in ranks.text()


def test_what_is_not_our_fault():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert explain(full) == (
        'No space left on device; the checkpoints before are untouched, continue with --resume auto'
    )
    caught = RuntimeError('Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nRuntimeError: no shards')
    assert explain(caught) == 'loading images failed: RuntimeError: no shards (--data.workers 0 shows where)'
    assert explain(RuntimeError('mat1 and mat2 shapes cannot be multiplied')) is None
    assert explain(FileNotFoundError(errno.ENOENT, 'No such file')) is None
