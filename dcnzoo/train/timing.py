"""When a run stops, and when it saves: agreed upon by all processes."""

import signal
import time

import torch
from accelerate import Accelerator

from .config import RunConfig

IMPATIENCE = 2.0  # seconds


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered, for the run to stop between steps.

    Launchers hand a signal on that the terminal or the scheduler has sent to the run already. So a second one changes
    nothing, but for a SIGINT that comes later than by such a way: then the user does not want to wait.
    """

    def __init__(self):
        self.number = 0
        self.noted_at = 0.0

    def __enter__(self) -> 'StopSignal':
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.noted_at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.noted_at > IMPATIENCE:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Timing:
    """Tells a run when to stop and when to save.

    Args:
        accelerator: of the run.
        run: whose checkpoint_every, checkpoint_minutes and log_every count.
    """

    def __init__(self, accelerator: Accelerator, run: RunConfig):
        self.accelerator = accelerator
        self.run = run
        self.signal = StopSignal()
        self.saved_at = time.monotonic()

    def stop(self, step: int) -> int:
        """The signal to stop for after an update, agreed upon by all processes, or 0.

        On GPUs, where the question costs a synchronization, several processes ask only when they log.
        """
        if self.accelerator.device.type == 'cpu' or step % self.run.log_every == 0:
            return self.stop_now()
        return self.signal.number if self.accelerator.num_processes == 1 else 0

    def stop_now(self) -> int:
        """The signal to stop for, agreed upon by all processes, or 0."""
        if self.accelerator.num_processes == 1:
            return self.signal.number
        noted = torch.tensor([self.signal.number], device=self.accelerator.device)
        return int(self.accelerator.gather(noted).max())

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after an update, by run.checkpoint_every or by the main process's clock."""
        every, minutes = self.run.checkpoint_every, self.run.checkpoint_minutes
        due = bool(every) and step % every == 0
        if minutes:
            late = time.monotonic() - self.saved_at > 60 * minutes and self.accelerator.is_main_process
            clock = torch.tensor(float(late), device=self.accelerator.device)
            due |= bool(self.accelerator.reduce(clock).item())
        return due

    def saved(self) -> None:
        self.saved_at = time.monotonic()
