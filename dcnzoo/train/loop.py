"""Epochs, updates, validation and interruption of one run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from timm.task import ClassificationEvaluator, TrainingTask
from timm.utils import ModelEmaV3, adaptive_clip_grad, distribute_bn
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from .checkpoint import Checkpoints, list_checkpoints
from .config import Config
from .data import BatchTransform, Splits
from .errors import Interrupted, TrainError
from .evaluate import build_evaluator, evaluate, metrics_of
from .health import (
    Buffers,
    Diverged,
    HealthLog,
    evaluating,
    first_layer_not_finite,
    gradients_not_finite,
    measure_deformation,
)
from .launch import SHARDED
from .report import Report
from .samples import seed_all
from .signals import StopSignal
from .state import State
from .unreadable import Unreadable

STEP_DRAWS = 1  # keeps the random numbers of a step apart from those of an image at the same place
MEASURED_IMAGES = 16


class Trainer:
    """Trains a prepared model. Everything is handed in; `fit` runs to the end or raises.

    Args:
        accelerator: that prepared model, optimizer and loaders.
        config: the run's configuration.
        splits: the opened data set.
        model_config: content of config.json, in timm's form.
        model: as prepared.
        task: timm's task with that model: the loss.
        frozen: modules that stay in evaluation mode.
        ema: timm's average of the unwrapped model, or None.
        optimizer: as prepared.
        scheduler: of timm, or None for a constant learning rate.
        train_loader: of (uint8 images, targets, complaints).
        val_loader: likewise.
        train_transform: what happens to a training batch on the device.
        val_transform: what happens to a validation batch.
        unreadable: collects the images that cannot be read.
        checkpoints: saves the run.
        report: shows the run.
        output: the run's folder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        *,
        splits: Splits,
        model_config: dict,
        model: nn.Module,
        task: TrainingTask,
        frozen: list[nn.Module],
        ema: ModelEmaV3 | None,
        optimizer: torch.optim.Optimizer,
        scheduler,
        train_loader: DataLoader,
        val_loader: DataLoader,
        train_transform: BatchTransform,
        val_transform: BatchTransform,
        unreadable: Unreadable,
        checkpoints: Checkpoints,
        report: Report,
        output: Path,
    ):
        self.accelerator = accelerator
        self.config = config
        self.splits = splits
        self.model_config = model_config
        self.model = model
        self.task = task
        self.frozen = frozen
        self.ema = ema
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.train_transform = train_transform
        self.val_transform = val_transform
        self.unreadable = unreadable
        self.checkpoints = checkpoints
        self.report = report
        self.output = output
        self.stop = StopSignal()
        self.sharded = accelerator.distributed_type in SHARDED.values()  # a forward pass takes all processes
        self.buffers = Buffers(accelerator.unwrap_model(model))
        self.skips = 0  # in a row
        self.saved: Path | None = None  # the newest checkpoint, as long as no update has succeeded after it
        self.proven: Path | None = None  # the newest after which one has: what a diverged run goes back to
        self.saved_at = time.monotonic()
        self.state = State(
            batches=len(train_loader),
            processes=accelerator.num_processes,
            batch_size=config.data.batch_size,
            loss_sums=[0.0] * accelerator.num_processes,
        )

    @property
    def weights(self) -> nn.Module:
        """The module that is validated and published: the average where there is one."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module

    def resume(self, folder: Path) -> None:
        """Takes up a checkpoint; with another batch size or number of processes at the nearest batch before."""
        self.load(folder)
        state, config, batches = self.state, self.config, len(self.train_loader)
        changes = state.divide(self.accelerator.num_processes, config.data.batch_size, batches, config.optim.accumulate)
        if changes:
            self.report.say(f'resumed otherwise than it was saved: {"; ".join(changes)}')
        if not (self.output / 'best' / 'model.safetensors').exists():
            state.best = None  # another folder, or removed: the best is sought anew
            if state.epoch >= config.schedule.epochs:
                raise TrainError(f'--resume: {folder} has no epochs left of {config.schedule.epochs}')
        older = [path for path in list_checkpoints(folder.resolve().parents[1]) if path.name < folder.name]
        self.saved, self.proven = folder, older[-1] if older else None
        self.report.say(f'resumed {folder} at epoch {state.epoch + 1}, batch {state.batch} of {batches}')

    def load(self, folder: Path) -> None:
        self.state = State(**self.checkpoints.load(folder))
        self.unreadable.complaints = list(dict.fromkeys([*self.state.unreadable, *self.unreadable.complaints]))

    def fit(self) -> None:
        """Trains until the last epoch is validated and saved.

        Raises:
            Interrupted: after a signal, with the state saved.
            TrainError: if the loss stays not finite, too many images are unreadable, or a file cannot be written.
        """
        schedule, run = self.config.schedule, self.config.run
        self.report.start(self.state.epoch, self.state.batch)
        self.begin_health_log()
        with self.stop, self.report:
            while self.state.epoch < schedule.epochs:
                try:
                    self.train_epoch()
                except Diverged as error:
                    self.roll_back(error)
                    continue
                last = self.state.epoch + 1 == schedule.epochs
                validated = last or (self.state.epoch + 1) % run.val_every == 0
                self.finish_epoch(self.validate(self.weights) if validated else {})
                if self.interruption():
                    self.save_and_stop()

    def train_epoch(self) -> None:
        """Trains from the state's position to the end of its epoch.

        Raises:
            Diverged: if more updates in a row than health.skip had no finite loss or gradients.
        """
        state, accumulate, rank = self.state, self.config.optim.accumulate, self.accelerator.process_index
        if self.train_transform.mix is not None and self.config.augment.mix_off_epoch is not None:
            self.train_transform.mix.mixup_enabled = state.epoch < self.config.augment.mix_off_epoch
        loss_sum = self.zeros() + state.loss_sums[rank]
        self.model.train()
        for module in self.frozen:
            module.eval()
        started = time.monotonic()
        losses = []  # of the batches of this update
        for images, targets, complaints in self.batches(state.epoch, skip=state.batch):
            self.unreadable.note(complaints)
            self.schedule_lr(state.epoch + state.batch / state.batches)
            # the last group of an epoch may have fewer batches than the others
            group = min(accumulate, state.batches - state.batch // accumulate * accumulate)
            update = (state.batch + 1) % accumulate == 0 or state.batch + 1 == state.batches
            if not losses:
                self.buffers.keep()
            losses.append(self.train_batch(images, targets, group, update))
            state.batch += 1
            self.report.batch(state.epoch, state.batch)
            if not update:
                continue
            if self.update(losses, images, targets):
                loss_sum += torch.stack(losses).sum()
                if state.step % self.config.run.log_every == 0 or state.batch == state.batches:
                    self.report.step(state.step, self.accelerator.reduce(losses[-1], 'mean').item(), self.lr)
                if self.config.health.every and state.step % self.config.health.every == 0:
                    self.measure_health(images)
            save = self.config.run.checkpoint_every and state.step % self.config.run.checkpoint_every == 0
            stop, due = self.interruption(), self.checkpoint_due()
            if stop or ((save or due) and not self.skips):
                state.loss_sums[rank] = loss_sum.item()
                started = self.count_seconds(started)
                self.save_and_stop() if stop else self.save()
            losses = []
        state.loss_sums[rank] = loss_sum.item()
        self.count_seconds(started)

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """This epoch's batches on the device, in its order, without the first `skip`."""
        loader, device = self.train_loader, self.accelerator.device
        loader.dataset.set_epoch(epoch)
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(epoch)
            yield from skip_first_batches(loader, skip) if skip else loader
        else:  # a stream, shared out by its reader
            for index, (images, targets, complaints) in enumerate(loader):
                if index >= skip:
                    yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True), complaints

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
        images, targets = self.train_transform(images, targets)
        with nullcontext() if update else self.accelerator.no_sync(self.model):
            with self.accelerator.autocast():
                loss = self.task(images, targets)['loss']
            self.accelerator.backward(loss / group)
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
        accelerator, optim, state = self.accelerator, self.config.optim, self.state
        accelerator.unscale_gradients(self.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if hasattr(norm, 'full_tensor'):  # of sharded parameters
            norm = norm.full_tensor()
        finite = torch.stack(losses).isfinite().all()
        # the scaler of fp16 seeks its scale by gradients that overflow, and leaves those updates out itself
        if accelerator.scaler is None:
            finite = finite & norm.isfinite()
        if accelerator.reduce((~finite).float()).item():
            self.skip_update(losses, images, targets)
            return False
        if optim.clip_grad is not None:
            self.clip_gradients(norm)
        with self.lowered_lr():
            self.optimizer.step()
        self.optimizer.zero_grad()
        state.step += 1
        if self.ema is not None:
            self.ema.update(accelerator.unwrap_model(self.model), step=state.step)
        self.skips = 0
        if self.saved is not None:
            self.saved, self.proven = None, self.saved
        return True

    def clip_gradients(self, norm: Tensor) -> None:
        clip, parameters = self.config.optim.clip_grad, list(self.model.parameters())
        if self.config.optim.clip_mode == 'norm':
            clip_grads_with_norm_(parameters, clip, norm)
        elif self.config.optim.clip_mode == 'value':
            clip_grad_value_(parameters, clip)
        else:
            adaptive_clip_grad(parameters, clip)

    def skip_update(self, losses: list[Tensor], images: Tensor, targets: Tensor) -> None:
        """Leaves an update out, and names the batch and the layer in nonfinite.txt and on stderr."""
        state, limit = self.state, self.config.health.skip
        cause = next((cause for cause in gather_object([self.find_cause(losses, images, targets)]) if cause), None)
        if cause is None:
            names = gradients_not_finite(self.accelerator.unwrap_model(self.model))
            cause = 'the norm of the gradients is beyond the largest number'
            if names:
                cause = f'gradients of {len(names)} parameters are not finite, the first is that of {names[0]}'
        self.optimizer.zero_grad()
        self.buffers.restore()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        state.skipped += 1
        state.skipped_batches += len(losses)
        self.skips += 1
        first = state.batch - len(losses) + 1
        batches = f'batch {first}' if len(losses) == 1 else f'batches {first} to {state.batch}'
        message = f'update skipped at epoch {state.epoch + 1}, {batches} of {state.batches}: {cause}'
        if self.report.main:
            self.report.warn(message)
            with (self.output / 'nonfinite.txt').open('a', encoding='utf-8') as file:
                file.write(f'{message}\n')
        if self.skips > limit:
            raise Diverged(f'{self.skips} updates in a row had no finite loss or gradients; the last: {cause}')

    def find_cause(self, losses: list[Tensor], images: Tensor, targets: Tensor) -> str | None:
        """Which batch of this process had a loss that is not finite, of which images, and in which layer it began."""
        state, accelerator = self.state, self.accelerator
        first = state.batch - len(losses)
        broken = [first + number for number, loss in enumerate(losses) if not loss.isfinite()]
        if not broken:
            return None
        layer = ''
        if broken[-1] == state.batch - 1 and not self.sharded:  # the one that is at hand
            self.seed_step(broken[-1])
            inputs, _ = self.train_transform(images, targets)
            model = accelerator.unwrap_model(self.model)
            with accelerator.autocast():
                layer = first_layer_not_finite(model, lambda: model.forward(inputs)) or 'the loss itself'
            layer = f', from {layer} on'
        loader = self.train_loader
        files = ''
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(state.epoch)  # its order is read once more, from the start
            indices = next(each for number, each in enumerate(loader.batch_sampler) if number == broken[0])
            files = f' ({", ".join(loader.dataset.name(index) for index in indices)})'
        value, rank = losses[broken[0] - first].item(), accelerator.process_index
        return f'the loss is {value} in batch {broken[0] + 1} of process {rank}{layer}{files}'

    def roll_back(self, error: Diverged) -> None:
        """Goes back to the last checkpoint that led to a good update, with other draws and a lower learning rate.

        Raises:
            TrainError: if the configuration does not want that, or there is no such checkpoint.
        """
        health, rollbacks = self.config.health, self.state.rollbacks + 1
        advice = 'lower optim.lr or set optim.clip_grad; the checkpoints before are kept'
        if health.then == 'stop' or rollbacks > health.rollbacks:
            raise TrainError(f'{error}; {advice}')
        if self.proven is None or not self.proven.exists():
            raise TrainError(f'{error}; there is no checkpoint to go back to; {advice}')
        folder = self.proven
        self.accelerator.wait_for_everyone()
        self.load(folder)
        self.state.rollbacks = rollbacks
        self.saved, self.skips = folder, 0
        self.begin_health_log()
        factor = health.rollback_lr**rollbacks
        self.report.say(f'went back to {folder} ({rollbacks} of {health.rollbacks}), learning rate times {factor:g}')

    def schedule_lr(self, epoch: float) -> None:
        """Sets the learning rate for a point in time; timm's schedules have no memory, plateau aside."""
        if self.scheduler is not None and not self.scheduler.t_in_epochs:
            self.scheduler.step_update(round(epoch * self.state.batches))

    @property
    def lr_factor(self) -> float:
        return self.config.health.rollback_lr**self.state.rollbacks

    @contextmanager
    def lowered_lr(self) -> Iterator[None]:
        """The learning rates of the schedule times the factor of the rollbacks."""
        scheduled = [group['lr'] for group in self.optimizer.param_groups]
        for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
            group['lr'] = lr * self.lr_factor
        yield
        for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
            group['lr'] = lr

    @property
    def lr(self) -> float:
        """The largest learning rate among the parameter groups: with layer decay, that of the last layer."""
        return max(group['lr'] for group in self.optimizer.param_groups) * self.lr_factor

    def begin_health_log(self) -> None:
        if self.report.main and self.config.health.every:
            self.health_log = HealthLog(self.output / 'health.csv', self.state.step)

    def measure_health(self, images: Tensor) -> None:
        """Measures the deformable layers on some images of the main process, as they came from the loader."""
        if not (self.report.main or self.sharded):
            return
        model = self.accelerator.unwrap_model(self.model)
        images, _ = self.val_transform(images[:MEASURED_IMAGES], torch.zeros(0))
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
        evaluate(self.accelerator, model, self.validation_batches(), self.val_transform, evaluator)
        if self.interruption(always=True):
            self.save_and_stop()
        return metrics_of(evaluator, self.accelerator)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, complaints in self.val_loader:
            self.unreadable.note(complaints)
            yield images, targets
            if self.stop.number:
                return

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
            'lr': self.lr,
            'train_loss': loss.item() / trained if trained else None,
            **dict.fromkeys(self.report.metrics),
            **metrics,
            'images_per_second': images / state.epoch_seconds,
            'seconds': state.seconds,
        }
        state.history.append(row)
        if metrics and (state.best is None or self.rank(row) > self.rank(state.best)):
            state.best = row
            self.checkpoints.publish('best', self.model)
        self.checkpoints.publish('last', self.model)
        if self.scheduler is not None and self.scheduler.t_in_epochs:
            self.scheduler.step(state.epoch + 1, row[self.report.metric])
        state.epoch, state.batch, state.skipped_batches = state.epoch + 1, 0, 0
        state.loss_sums, state.epoch_seconds = [0.0] * state.processes, 0.0
        self.report.epoch(row, state.history, state.best)
        self.save()

    def rank(self, row: dict) -> tuple[float, float]:
        """Orders the rows of the history from worse to better."""
        return row[self.report.metric], -row['val_loss']

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

    def checkpoint_due(self) -> bool:
        """Whether run.checkpoint_minutes have passed by the main process's clock."""
        minutes = self.config.run.checkpoint_minutes
        if not minutes:
            return False
        due = time.monotonic() - self.saved_at > 60 * minutes and self.accelerator.is_main_process
        return bool(self.accelerator.reduce(torch.tensor(float(due), device=self.accelerator.device)).item())

    def save(self) -> Path:
        """Saves the state, with what the processes count apart brought together."""
        self.unreadable.share()
        self.state.unreadable = self.unreadable.complaints
        rank = self.accelerator.process_index
        self.state.loss_sums = gather_object([self.state.loss_sums[rank]])
        self.saved = self.checkpoints.save(asdict(self.state), self.proven)
        self.saved_at = time.monotonic()
        return self.saved

    def save_and_stop(self) -> None:
        """Saves the state and raises Interrupted."""
        number = self.interruption(always=True)
        folder = self.save()
        position = f'epoch {self.state.epoch + 1}, batch {self.state.batch} of {self.state.batches}'
        raise Interrupted(f'stopped at {position}, saved {folder}; continue with --resume auto', number)
