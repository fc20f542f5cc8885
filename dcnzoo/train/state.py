"""Where a run is: all that it counts, as JSON content, in every checkpoint."""

import time
from dataclasses import dataclass, field


@dataclass
class State:
    """With the weights, the optimizer and the average this decides what comes next: random choices are drawn from the
    seed and the position, so that an interrupted run, resumed, ends as one that was not.
    """

    epoch: int = 0
    batch: int = 0
    """batches of this epoch that are done, on each process"""
    batches: int = 0
    """batches per epoch, when it was saved, as the two that follow"""
    processes: int = 1
    batch_size: int = 1
    """images per batch and process"""
    step: int = 0
    """updates of the weights"""
    skipped: int = 0
    """updates left out, as their loss or gradients were not finite"""
    skipped_batches: int = 0
    """batches of this epoch that were left out so"""
    rollbacks: int = 0
    loss_sums: list[float] = field(default_factory=lambda: [0.0])
    """over the batches of this epoch, per process"""
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    best: dict | None = None
    """the row of the history with the best validation"""
    history: list[dict] = field(default_factory=list)
    """one row per epoch: the columns of metrics.csv"""
    unreadable: list[str] = field(default_factory=list)
    """images that could not be read, each once, with the reason"""

    def begin_epoch(self) -> None:
        """Moves to the start of the next epoch."""
        self.epoch, self.batch, self.skipped_batches = self.epoch + 1, 0, 0
        self.loss_sums, self.epoch_seconds = [0.0] * self.processes, 0.0

    def count_seconds(self, started: float) -> float:
        """Counts the time since a reading of time.monotonic(), and returns the present one."""
        now = time.monotonic()
        self.seconds += now - started
        self.epoch_seconds += now - started
        return now

    def divide(self, processes: int, batch_size: int, batches: int, accumulate: int) -> list[str]:
        """Moves to the same place of an epoch that is divided into other batches, or a little before it.

        Args:
            processes: that train from now on.
            batch_size: images per batch and process from now on.
            batches: per epoch from now on.
            accumulate: batches per update; updates start at multiples of it.

        Returns:
            What changes, in words.
        """
        before = {'processes': self.processes, 'images per batch': self.batch_size, 'batches per epoch': self.batches}
        now = {'processes': processes, 'images per batch': batch_size, 'batches per epoch': batches}
        changes = [f'{before[name]} {name} before, {now[name]} now' for name in now if before[name] != now[name]]
        if changes or (self.batch % accumulate and self.batch < self.batches):
            batch = min(batches, self.batch * self.processes * self.batch_size // (processes * batch_size))
            batch = batches if self.batch == self.batches else batch - batch % accumulate
            mean = sum(self.loss_sums) / len(self.loss_sums) / max(1, self.batch - self.skipped_batches)
            self.loss_sums, self.skipped_batches = [mean * batch] * processes, 0
            self.batch, self.batches, self.processes, self.batch_size = batch, batches, processes, batch_size
        return changes
