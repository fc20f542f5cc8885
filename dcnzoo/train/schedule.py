"""The learning rate over a run: timm's schedules, and what rollbacks make of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from .config import Config
from .errors import TrainError


def scaled(lr: float, config: Config, processes: int) -> float:
    """A learning rate of the configuration for the run's global batch."""
    base = config.optim.lr_base_batch
    return lr * config.data.batch_size * config.optim.accumulate * processes / base if base else lr


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, batches: int, processes: int) -> Scheduler | None:
    """timm's schedule, counted in batches; plateau, which looks at the metric, in epochs; None if there is none.

    Raises:
        TrainError: if the schedule is unknown, or does not take these arguments.
    """
    schedule, per_epoch = config.schedule, config.schedule.name == 'plateau'
    try:
        return create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=schedule.epochs - schedule.cooldown_epochs,
            cooldown_epochs=schedule.cooldown_epochs,
            warmup_epochs=schedule.warmup,
            warmup_lr=scaled(schedule.warmup_lr, config, processes),
            min_lr=scaled(schedule.min_lr, config, processes),
            decay_epochs=schedule.decay_epochs,
            decay_milestones=schedule.decay_milestones,
            decay_rate=schedule.decay_rate,
            patience_epochs=schedule.patience_epochs,
            step_on_epochs=per_epoch,
            updates_per_epoch=batches,
            **schedule.kwargs,
        )[0]
    except (ValueError, AssertionError, TypeError) as error:
        raise TrainError(f'schedule.name: cannot create {schedule.name!r}: {error}', usage=True) from None


class LearningRate:
    """The learning rates of an optimizer's groups: those of a schedule, times a factor.

    Args:
        optimizer: as prepared.
        scheduler: of timm, or None for constant rates.
        batches: per epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Scheduler | None, batches: int):
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.batches = batches
        self.factor = 1.0
        # Without a schedule, which would apply the factors of the groups.
        self.constant = [group['lr'] * group.get('lr_scale', 1.0) for group in optimizer.param_groups]

    @property
    def remembers(self) -> bool:
        """Whether the schedule depends on what it has seen, as plateau does; the others follow from the position."""
        return self.scheduler is not None and self.scheduler.t_in_epochs

    def move_to(self, epoch: float) -> None:
        """Sets the rates for a point in time, in epochs."""
        if self.scheduler is None:
            for group, lr in zip(self.optimizer.param_groups, self.constant, strict=True):
                group['lr'] = lr
        elif not self.remembers:
            self.scheduler.step_update(round(epoch * self.batches))

    def finish_epoch(self, epoch: int, metric: float | None) -> None:
        """Shows a schedule that remembers the result of the epoch with this number, the first being 1."""
        if self.remembers:
            self.scheduler.step(epoch, metric)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the optimizer the rates with the factor in them, for one step."""
        scheduled = [group['lr'] for group in self.optimizer.param_groups]
        for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
            group['lr'] = lr * self.factor
        yield
        for group, lr in zip(self.optimizer.param_groups, scheduled, strict=True):
            group['lr'] = lr

    @property
    def highest(self) -> float:
        """The largest rate among the groups: with layer decay, that of the last layer."""
        return max(group['lr'] for group in self.optimizer.param_groups) * self.factor
