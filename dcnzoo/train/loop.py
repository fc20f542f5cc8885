"""Epochs, updates, validation and interruption of one run."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import ClassificationEvaluator
from timm.utils import adaptive_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from .checkpoint import Checkpoints, list_checkpoints
from .config import Config
from .data import Data
from .errors import Interrupted, TrainError
from .evaluate import build_evaluator, evaluate, metrics_of
from .guard import Diverged, Guard
from .health import HealthLog, evaluating, measure_deformation
from .launch import is_sharded
from .model import Network
from .report import Report
from .samples import seed_all
from .schedule import LearningRate
from .state import State
from .timing import Timing
from .unreadable import Unreadable

STEP_DRAWS = 1  # keeps the random numbers of a step apart from those of an image at the same place
MEASURED_IMAGES = 16
SETTINGS = ('weight_decay', 'momentum', 'betas', 'eps', 'lr_scale')  # of an optimizer's group, beside what it learned


class Trainer:
    """Trains a prepared network. Everything is handed in; `fit` runs to the end or raises.

    Args:
        accelerator: that prepared network, optimizer and loaders.
        config: the run's configuration.
        data: what is read.
        network: what is trained.
        optimizer: as prepared.
        rate: its learning rate.
        unreadable: collects the images that cannot be read.
        checkpoints: saves the run.
        report: shows the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        *,
        data: Data,
        network: Network,
        optimizer: torch.optim.Optimizer,
        rate: LearningRate,
        unreadable: Unreadable,
        checkpoints: Checkpoints,
        report: Report,
    ):
        self.accelerator = accelerator
        self.config = config
        self.data = data
        self.network = network
        self.optimizer = optimizer
        second_order = getattr(optimizer.optimizer, 'is_second_order', False)  # it differentiates the gradients
        self.backward_options = {'create_graph': True} if second_order else {}
        self.rate = rate
        self.unreadable = unreadable
        self.checkpoints = checkpoints
        self.report = report
        self.output = Path(config.run.output)
        self.timing = Timing(accelerator, config.run)
        self.guard = Guard(accelerator, config.health, network.plain, data, report, self.output / 'nonfinite.txt')
        self.state = State(
            batches=len(data.train_loader),
            processes=accelerator.num_processes,
            batch_size=config.data.batch_size,
            loss_sums=[0.0] * accelerator.num_processes,
        )

    def resume(self, folder: Path) -> None:
        """Takes up a checkpoint; with another batch size or number of processes at the nearest batch before."""
        self.load(folder)
        state, config, batches = self.state, self.config, len(self.data.train_loader)
        changes = state.divide(self.accelerator.num_processes, config.data.batch_size, batches, config.optim.accumulate)
        if changes:
            self.report.say(f'resumed otherwise than it was saved: {"; ".join(changes)}')
        if not (self.output / 'best' / 'model.safetensors').exists():
            state.best = None  # another folder, or removed: the best is sought anew
            if state.epoch >= config.schedule.epochs:
                raise TrainError(f'--resume: {folder} has no epochs left of {config.schedule.epochs}')
        older = [path for path in list_checkpoints(folder.resolve().parents[1]) if path.name < folder.name]
        self.guard.start_from(folder, older[-1] if older else None)
        self.report.say(f'resumed {folder} at epoch {state.epoch + 1}, batch {state.batch} of {batches}')

    def load(self, folder: Path) -> None:
        configured = [{key: group[key] for key in SETTINGS if key in group} for group in self.optimizer.param_groups]
        self.state = State(**self.checkpoints.load(folder))
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)  # which may be others than those of the checkpoint
        self.rate.factor = self.config.health.rollback_lr**self.state.rollbacks
        self.unreadable.complaints = list(dict.fromkeys([*self.state.unreadable, *self.unreadable.complaints]))

    def fit(self) -> None:
        """Trains until the last epoch is validated and saved.

        Raises:
            Interrupted: after a signal that `timing.signal` has noted, with the state saved.
            TrainError: if the loss stays not finite, too many images are unreadable, or a file cannot be written.
        """
        schedule, run = self.config.schedule, self.config.run
        self.report.start(self.state.epoch, self.state.batch)
        self.begin_health_log()
        with self.report:
            while self.state.epoch < schedule.epochs:
                try:
                    self.train_epoch()
                except Diverged as error:
                    self.roll_back(error)
                    continue
                last = self.state.epoch + 1 == schedule.epochs
                validated = last or (self.state.epoch + 1) % run.val_every == 0
                self.finish_epoch(self.validate(self.network.published) if validated else {})
                if self.timing.stop(self.state.step):
                    self.save_and_stop()

    def train_epoch(self) -> None:
        """Trains from the state's position to the end of its epoch.

        Raises:
            Diverged: if more updates in a row than health.skip had no finite loss or gradients.
        """
        state, accumulate, rank = self.state, self.config.optim.accumulate, self.accelerator.process_index
        loss_sum = self.zeros() + state.loss_sums[rank]
        self.network.train()
        started = time.monotonic()
        losses = []  # of the batches of this update
        for images, targets, complaints in self.data.train_batches(state.epoch, state.batch, self.accelerator.device):
            self.unreadable.note(complaints)
            self.rate.move_to(state.epoch + state.batch / state.batches)
            # the last group of an epoch may have fewer batches than the others
            group = min(accumulate, state.batches - state.batch // accumulate * accumulate)
            update = (state.batch + 1) % accumulate == 0 or state.batch + 1 == state.batches
            if not losses:
                self.guard.begin_update()
            losses.append(self.train_batch(images, targets, group, update))
            state.batch += 1
            self.report.batch(state.epoch, state.batch)
            if not update:
                continue
            if self.update(losses, images, targets):
                loss_sum += torch.stack(losses).sum()
                self.log_update(losses[-1], images)
            stop, due = self.timing.stop(state.step), self.timing.save_due(state.step)
            if stop or (due and not self.guard.skips):
                state.loss_sums[rank] = loss_sum.item()
                started = state.count_seconds(started)
                self.save_and_stop() if stop else self.save()
            losses = []
        state.loss_sums[rank] = loss_sum.item()
        state.count_seconds(started)

    def seed_step(self, batch: int) -> None:
        """Draws of a step follow from its position; after a rollback they are others."""
        state = self.state
        retry = (state.rollbacks,) if state.rollbacks else ()
        seed_all(self.config.run.seed, state.epoch, batch, self.accelerator.process_index, STEP_DRAWS, *retry)

    def train_batch(self, images: Tensor, targets: Tensor, group: int, update: bool) -> Tensor:
        """Adds a batch's gradients to those of its group.

        Args:
            images: (B, C, H, W) uint8.
            targets: (B,) class indices, or (B, K) where there are several labels.
            group: batches that are averaged into this update.
            update: whether this batch completes them.

        Returns:
            The loss, detached.
        """
        self.seed_step(self.state.batch)
        images, targets = self.data.train_transform(images, targets)
        with nullcontext() if update else self.accelerator.no_sync(self.network.model):
            with self.accelerator.autocast():
                loss = self.network.task(images, targets)['loss']
            self.accelerator.backward(loss / group, **self.backward_options)
        return loss.detach()

    def update(self, losses: list[Tensor], images: Tensor, targets: Tensor) -> bool:
        """Updates the weights, unless the loss or the gradients are not finite on some process.

        Args:
            losses: of the batches whose gradients were averaged.
            images: the last of these batches.
            targets: its targets.

        Returns:
            Whether the weights were updated.

        Raises:
            Diverged: if more updates in a row than health.skip had to be left out.
        """
        accelerator, state, network = self.accelerator, self.state, self.network
        accelerator.unscale_gradients(self.optimizer)
        norm = get_total_norm(
            [parameter.grad for parameter in network.model.parameters() if parameter.grad is not None]
        )
        if hasattr(norm, 'full_tensor'):  # of sharded parameters
            norm = norm.full_tensor()
        if not self.guard.is_finite(losses, norm):
            try:
                self.guard.skip(state, losses, lambda: self.forward_again(images, targets))
            finally:
                self.optimizer.zero_grad()
            return False
        self.clip_gradients(norm)
        with self.rate.applied():
            self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        if network.ema is not None:
            network.ema.update(network.plain, step=state.step)
        self.guard.succeed()
        return True

    def clip_gradients(self, norm: Tensor) -> None:
        optim, parameters = self.config.optim, list(self.network.model.parameters())
        if optim.clip_grad is None:
            return
        if optim.clip_mode == 'norm':
            clip_grads_with_norm_(parameters, optim.clip_grad, norm)
        elif optim.clip_mode == 'value':
            clip_grad_value_(parameters, optim.clip_grad)
        else:
            adaptive_clip_grad(parameters, optim.clip_grad)

    def forward_again(self, images: Tensor, targets: Tensor) -> None:
        """Runs the network on the last batch as it was trained on."""
        self.seed_step(self.state.batch - 1)
        images, _ = self.data.train_transform(images, targets)
        with self.accelerator.autocast():
            self.network.plain.forward(images)

    def roll_back(self, error: Diverged) -> None:
        """Goes back to the last checkpoint that led to a good update, with other draws and a lower learning rate.

        Raises:
            TrainError: if the configuration does not want that, or there is no such checkpoint.
        """
        rollbacks = self.state.rollbacks + 1
        folder = self.guard.way_back(error, rollbacks)
        self.accelerator.wait_for_everyone()
        self.load(folder)
        self.state.rollbacks = rollbacks
        self.rate.factor = self.config.health.rollback_lr**rollbacks
        self.guard.start_from(folder)
        self.begin_health_log()
        limit = self.config.health.rollbacks
        self.report.say(f'went back to {folder} ({rollbacks} of {limit}), learning rate times {self.rate.factor:g}')

    def log_update(self, loss: Tensor, images: Tensor) -> None:
        """Feeds the trackers, and measures the deformable layers, where it is time."""
        state, every = self.state, self.config.health.every
        if state.step % self.config.run.log_every == 0 or state.batch == state.batches:
            self.report.step(state.step, self.accelerator.reduce(loss, 'mean').item(), self.rate.highest)
        if every and state.step % every == 0:
            self.measure_health(images)

    def begin_health_log(self) -> None:
        if self.report.main and self.config.health.every:
            self.health_log = HealthLog(self.output / 'health.csv', self.state.step)

    def measure_health(self, images: Tensor) -> None:
        """Measures the deformable layers on some images of the main process, as they came from the loader."""
        if not (self.report.main or is_sharded(self.accelerator)):
            return
        model = self.network.plain
        images, _ = self.data.val_transform(images[:MEASURED_IMAGES], torch.zeros(0))
        with evaluating(model), self.accelerator.autocast():
            rows = measure_deformation(model, images)
        position = {'epoch': self.state.epoch + 1, 'step': self.state.step}
        if self.report.main:
            self.health_log.append([{**position, **row} for row in rows])
            self.report.health(self.state.step, rows)

    def validate(self, model: nn.Module, evaluator: ClassificationEvaluator | None = None) -> dict[str, float]:
        """Metrics over the whole validation split, exact for any number of processes.

        Raises:
            Interrupted: after a signal, with the state before this validation saved.
        """
        if self.accelerator.num_processes > 1:  # statistics of batch norms differ: those of the main process are saved
            distribute_bn(model, self.accelerator.num_processes)
        if evaluator is None:
            evaluator = build_evaluator(self.config.data.multi_label, self.accelerator.device)
        evaluate(self.accelerator, model, self.validation_batches(), self.data.val_transform, evaluator)
        if self.timing.stop_now():
            self.save_and_stop()
        return metrics_of(evaluator, self.accelerator)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share; where a forward pass takes all processes, as many batches as any has, if empty ones."""
        sharded, count = is_sharded(self.accelerator), 0
        for images, targets, complaints in self.data.val_loader:
            self.unreadable.note(complaints)
            count += 1
            yield images, targets
            if self.timing.signal.number and not sharded:
                return
        for _ in range(max(gather_object([count])) - count if sharded else 0):
            yield images[:0], targets[:0]

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Records the epoch, publishes best and last, saves, and moves the state to the next epoch."""
        state, config = self.state, self.config
        self.unreadable.share()
        loss = self.accelerator.reduce(self.zeros(1) + state.loss_sums[self.accelerator.process_index], 'mean')
        images = state.batches * config.data.batch_size * self.accelerator.num_processes
        trained = state.batches - state.skipped_batches
        row = {
            'epoch': state.epoch + 1,
            'step': state.step,
            'lr': self.rate.highest,
            'train_loss': loss.item() / trained if trained else None,
            **dict.fromkeys(self.report.metrics),
            **metrics,
            'images_per_second': images / state.epoch_seconds,
            'seconds': state.seconds,
        }
        state.history.append(row)
        if metrics and (state.best is None or self.rank(row) > self.rank(state.best)):
            state.best = row
            self.checkpoints.publish('best', self.network.model)
        self.checkpoints.publish('last', self.network.model)
        self.rate.finish_epoch(state.epoch + 1, row[self.report.metric])
        state.begin_epoch()
        self.report.epoch(row, state.history, state.best)
        self.save()

    def rank(self, row: dict) -> tuple[float, float]:
        """Orders the rows of the history from worse to better."""
        return row[self.report.metric], -row['val_loss']

    def zeros(self, *shape: int) -> Tensor:
        """For sums over an epoch, in double precision where the device has it."""
        device = self.accelerator.device
        return torch.zeros(shape, dtype=torch.float32 if device.type == 'mps' else torch.float64, device=device)

    def save(self) -> Path:
        """Saves the state, with what the processes count apart brought together."""
        self.unreadable.share()
        self.state.unreadable = self.unreadable.complaints
        rank = self.accelerator.process_index
        self.state.loss_sums = gather_object([self.state.loss_sums[rank]])
        self.guard.saved = self.checkpoints.save(asdict(self.state), self.guard.proven)
        self.timing.saved()
        return self.guard.saved

    def save_and_stop(self) -> None:
        """Saves the state and raises Interrupted."""
        number = self.timing.stop_now()
        folder = self.save()
        position = f'epoch {self.state.epoch + 1}, batch {self.state.batch} of {self.state.batches}'
        if self.state.epoch == self.config.schedule.epochs:
            position = 'the end of the last epoch'
        raise Interrupted(f'stopped at {position}, saved {folder}; continue with --resume auto', number)
