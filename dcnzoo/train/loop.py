"""Epochs, steps and validation of one run.

All that a run counts is in `State`. With the weights, the optimizer and the average it decides what comes next: random
choices are drawn from the seed and the position, so that an interrupted run, resumed, ends as one that was not.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from .checkpoint import Checkpoints, write_text
from .config import Config
from .data import BatchTransform, seed_all
from .errors import Interrupted, TrainError
from .report import Report

STEP_DRAWS = 1  # keeps the random numbers of a step apart from those of an image at the same place


@dataclass
class State:
    """Where a run is: JSON content, saved in every checkpoint."""

    epoch: int = 0
    batch: int = 0
    """batches of this epoch that are done"""
    batches: int = 0
    """batches per epoch, when it was saved"""
    step: int = 0
    """updates of the weights"""
    loss_sum: float = 0.0
    """of the batches of this epoch"""
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    best: dict | None = None
    """the row of the history with the highest top-1, and among those the lowest loss"""
    history: list[dict] = field(default_factory=list)
    """one row per epoch, with report.METRICS"""
    unreadable: list[str] = field(default_factory=list)
    """images that could not be read, each once, with the reason"""


def rank(row: dict) -> tuple[float, float]:
    """Orders the rows of the history from worse to better."""
    return row['val_top1'], -row['val_loss']


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered, for the run to stop between steps; a second one ends at once."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> 'StopSignal':
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        self.number = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.restore()


class Trainer:
    """Trains a prepared model. Everything is handed in; `fit` runs to the end or raises.

    Args:
        accelerator: that prepared model, optimizer and loaders.
        config: the run's configuration.
        model: as prepared.
        ema: timm's average of the unwrapped model, or None.
        optimizer: as prepared.
        scheduler: of timm, or None for a constant learning rate.
        train_loader: of (uint8 images, class indices, complaints).
        val_loader: likewise.
        train_transform: what happens to a training batch on the device.
        val_transform: what happens to a validation batch.
        unreadable_limit: images that may be unreadable, per process.
        checkpoints: saves the run.
        report: shows the run.
        output: the run's folder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        *,
        model: nn.Module,
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scheduler,
        train_loader: DataLoader,
        val_loader: DataLoader,
        train_transform: BatchTransform,
        val_transform: BatchTransform,
        unreadable_limit: int,
        checkpoints: Checkpoints,
        report: Report,
        output: Path,
    ):
        self.accelerator = accelerator
        self.config = config
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.train_transform = train_transform
        self.val_transform = val_transform
        self.unreadable_limit = unreadable_limit
        self.checkpoints = checkpoints
        self.report = report
        self.output = output
        self.state = State(batches=len(train_loader))
        self.stop = StopSignal()

    @property
    def weights(self) -> nn.Module:
        """The module that is validated and published: the average where there is one."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def resume(self, folder: Path) -> None:
        """Takes up a checkpoint; with another batch size or number of processes at the nearest batch before."""
        self.state = State(**self.checkpoints.load(folder))
        before, batches = self.state.batches, len(self.train_loader)
        if before != batches:
            self.report.say(f'{before} batches per epoch before, {batches} now')
        batch = self.state.batch * batches // before
        if batch < batches:  # updates start at multiples of this
            batch -= batch % self.config.optim.accumulate
        if not (self.output / 'best' / 'model.safetensors').exists():
            self.state.best = None  # another folder, or removed: the best is sought anew
            if self.state.epoch >= self.config.schedule.epochs:
                raise TrainError(f'--resume: {folder} has no epochs left of {self.config.schedule.epochs}')
        self.state.loss_sum *= batch / max(1, self.state.batch)
        self.state.batch, self.state.batches = batch, batches
        self.report.say(f'resumed {folder} at epoch {self.state.epoch + 1}, batch {self.state.batch} of {batches}')

    def fit(self) -> None:
        """Trains until the last epoch is validated and saved.

        Raises:
            Interrupted: after a signal, with the state saved.
            TrainError: if the loss is not finite, too many images are unreadable, or a file cannot be written.
        """
        state, schedule, run = self.state, self.config.schedule, self.config.run
        self.report.start(state.epoch, state.batch)
        with self.stop, self.report:
            while state.epoch < schedule.epochs:
                self.train_epoch()
                last = state.epoch + 1 == schedule.epochs
                metrics = self.validate(self.weights) if last or (state.epoch + 1) % run.val_every == 0 else {}
                self.finish_epoch(metrics)
                if self.interruption():
                    self.save_and_stop()

    def train_epoch(self) -> None:
        """Trains from the state's position to the end of its epoch."""
        state = self.state
        accumulate = self.config.optim.accumulate
        if self.train_transform.mix is not None and self.config.augment.mix_off_epoch is not None:
            self.train_transform.mix.mixup_enabled = state.epoch < self.config.augment.mix_off_epoch
        loss_sum = self.zeros() + state.loss_sum
        self.model.train()
        started = time.monotonic()
        for images, targets, complaints in self.batches(state.epoch, skip=state.batch):
            self.note_unreadable(complaints)
            self.schedule_lr(state.epoch + state.batch / state.batches)
            # the last group of an epoch may have fewer batches than the others
            group = min(accumulate, state.batches - state.batch // accumulate * accumulate)
            update = (state.batch + 1) % accumulate == 0 or state.batch + 1 == state.batches
            loss = self.train_batch(images, targets, group, update)
            loss_sum += loss
            state.batch += 1
            state.step += update
            self.report.batch(state.epoch, state.batch)
            if not update:
                continue
            if state.step % self.config.run.log_every == 0 or state.batch == state.batches:
                self.check_loss(loss, state)
            save = self.config.run.checkpoint_every and state.step % self.config.run.checkpoint_every == 0
            stop = self.interruption()
            if save or stop:
                state.loss_sum = loss_sum.item()
                started = self.count_seconds(started)
                self.save_and_stop() if stop else self.checkpoints.save(asdict(state))
        state.loss_sum = loss_sum.item()
        self.count_seconds(started)

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """This epoch's batches on the device, in its order, without the first `skip`."""
        loader = self.train_loader
        loader.dataset.set_epoch(epoch)
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(epoch)
            yield from skip_first_batches(loader, skip) if skip else loader
        else:  # a stream, shared out by its reader
            for index, (images, targets, complaints) in enumerate(loader):
                if index >= skip:
                    yield images.to(self.accelerator.device), targets.to(self.accelerator.device), complaints

    def train_batch(self, images: Tensor, targets: Tensor, group: int, update: bool) -> Tensor:
        """Adds a batch's gradients to those of its group, and updates the weights if it is the group's last.

        Args:
            images: (B, C, H, W) uint8.
            targets: (B,) class indices.
            group: batches that are averaged into this update.
            update: whether this batch completes them.

        Returns:
            The loss, detached.
        """
        accelerator, optim, state = self.accelerator, self.config.optim, self.state
        seed_all(self.config.run.seed, state.epoch, state.batch, accelerator.process_index, STEP_DRAWS)
        images, targets = self.train_transform(images, targets)
        smoothing = self.config.augment.label_smoothing if targets.ndim == 1 else 0.0
        with nullcontext() if update else accelerator.no_sync(self.model):
            with accelerator.autocast():
                loss = F.cross_entropy(self.model(images).float(), targets, label_smoothing=smoothing)
            accelerator.backward(loss / group)
        if update:
            if optim.clip_grad is not None:
                self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(accelerator.unwrap_model(self.model), step=state.step + 1)
        return loss.detach()

    def clip_gradients(self) -> None:
        optim, parameters = self.config.optim, list(self.model.parameters())
        if optim.clip_mode == 'norm':
            self.accelerator.clip_grad_norm_(parameters, optim.clip_grad)
        elif optim.clip_mode == 'value':
            self.accelerator.clip_grad_value_(parameters, optim.clip_grad)
        else:
            self.accelerator.unscale_gradients(self.optimizer)
            adaptive_clip_grad(parameters, optim.clip_grad)

    def schedule_lr(self, epoch: float) -> None:
        """Sets the learning rate for a point in time; timm's schedules have no memory, plateau aside."""
        if self.scheduler is not None and not self.scheduler.t_in_epochs:
            self.scheduler.step_update(round(epoch * self.state.batches))

    @property
    def lr(self) -> float:
        """The largest learning rate among the parameter groups: with layer decay, that of the last layer."""
        return max(group['lr'] * group.get('lr_scale', 1.0) for group in self.optimizer.param_groups)

    def check_loss(self, loss: Tensor, state: State) -> None:
        """Logs the loss of a step, and ends the run if it is not finite: the checkpoints before it are good."""
        value = self.accelerator.reduce(loss, 'mean').item()
        if not math.isfinite(value):
            raise TrainError(
                f'the loss is {value} at epoch {state.epoch + 1}, step {state.step}: lower optim.lr or set '
                f'optim.clip_grad; the checkpoints before are kept'
            )
        self.report.step(state.step, value, self.lr)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracies in percent over the whole validation split.

        Every process counts its own share, and the counts are added once at the end: exact for any number of processes.

        Raises:
            Interrupted: after a signal, with the state before this validation saved.
        """
        model.eval()
        total = self.zeros(4)  # images, loss, top-1, top-5
        for images, targets, complaints in self.val_loader:
            self.note_unreadable(complaints)
            images, targets = images.to(self.accelerator.device), targets.to(self.accelerator.device)
            readable = targets >= 0
            images, targets = self.val_transform(images[readable], targets[readable])
            with self.accelerator.autocast():
                logits = model(images)
            losses = F.cross_entropy(logits.float(), targets, reduction='sum')
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            total += torch.stack([readable.sum(), losses, hits[:, 0].sum(), hits.any(1).sum()])
            if self.stop.number:
                break
        if self.interruption(always=True):
            self.save_and_stop()
        images, loss, top1, top5 = self.accelerator.reduce(total).tolist()
        if images == 0:
            raise TrainError('no validation image could be read')
        return {'val_loss': loss / images, 'val_top1': 100 * top1 / images, 'val_top5': 100 * top5 / images}

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Records the epoch, publishes best and last, saves, and moves the state to the next epoch."""
        state, main = self.state, self.accelerator.is_main_process
        loss = self.accelerator.reduce(self.zeros(1) + state.loss_sum, 'mean')
        images = state.batches * self.config.data.batch_size * self.accelerator.num_processes
        row = {
            'epoch': state.epoch + 1,
            'step': state.step,
            'lr': self.lr,
            'train_loss': loss.item() / state.batches,
            'val_loss': None,
            'val_top1': None,
            'val_top5': None,
            **metrics,
            'images_per_second': images / state.epoch_seconds,
            'seconds': state.seconds,
        }
        state.history.append(row)
        if metrics and (state.best is None or rank(row) > rank(state.best)):
            state.best = row
            if main:
                self.checkpoints.publish('best', self.accelerator.unwrap_model(self.model))
        if main:
            self.checkpoints.publish('last', self.accelerator.unwrap_model(self.model))
        if self.scheduler is not None and self.scheduler.t_in_epochs:
            self.scheduler.step(state.epoch + 1, row['val_top1'])
        state.epoch, state.batch, state.loss_sum, state.epoch_seconds = state.epoch + 1, 0, 0.0, 0.0
        self.report.epoch(row, state.history, state.best['val_top1'] if state.best else math.nan)
        self.checkpoints.save(asdict(state))

    def zeros(self, *shape: int) -> Tensor:
        """For sums over an epoch, in double precision where the device has it."""
        device = self.accelerator.device
        return torch.zeros(shape, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)

    def count_seconds(self, started: float) -> float:
        now = time.monotonic()
        self.state.seconds += now - started
        self.state.epoch_seconds += now - started
        return now

    def interruption(self, always: bool = False) -> int:
        """The signal to stop for, agreed upon by all processes, or 0.

        On GPUs, where the question costs a synchronization, several processes ask only when they log, unless `always`.
        """
        if self.accelerator.num_processes == 1:
            return self.stop.number
        device = self.accelerator.device
        if not (always or device.type == 'cpu' or self.state.step % self.config.run.log_every == 0):
            return 0
        return int(self.accelerator.gather(torch.tensor([self.stop.number], device=device)).max())

    def save_and_stop(self) -> None:
        """Saves the state and raises Interrupted."""
        number = self.interruption(always=True)
        folder = self.checkpoints.save(asdict(self.state))
        position = f'epoch {self.state.epoch + 1}, batch {self.state.batch} of {self.state.batches}'
        raise Interrupted(f'stopped at {position}, saved {folder}; continue with --resume auto', number)

    def note_unreadable(self, complaints: list[str]) -> None:
        """Names each unreadable image once, on stderr and in unreadable.txt.

        Raises:
            TrainError: if there are more of them than the run bears.
        """
        fresh = [complaint for complaint in dict.fromkeys(complaints) if complaint not in self.state.unreadable]
        if not fresh:
            return
        self.state.unreadable += fresh
        rank = self.accelerator.process_index
        names = self.output / (f'unreadable_{rank}.txt' if rank else 'unreadable.txt')
        write_text(names, ''.join(f'{complaint}\n' for complaint in self.state.unreadable))
        if len(self.state.unreadable) > self.unreadable_limit:
            raise TrainError(
                f'more than {self.unreadable_limit} unreadable images (data.max_unreadable); {names} names them, the '
                f'last is {fresh[-1]}',
                local=True,
            )
        for complaint in fresh:
            self.report.warn(f'skipped the unreadable image {complaint}')
