"""Numbers that are not finite: such updates are left out and named, and after too many the run goes back."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .checkpoint import append_text
from .config import HealthConfig
from .data import Data
from .errors import TrainError
from .launch import is_sharded
from .report import Report
from .state import State

ADVICE = 'lower optim.lr or set optim.clip_grad; the checkpoints before are kept'


class Diverged(Exception):
    """Too many updates in a row were left out."""


class Guard:
    """Leaves updates out, names what was wrong with them, and knows the checkpoint to go back to.

    Args:
        accelerator: of the run.
        health: how much the run bears.
        model: the network, unwrapped.
        data: names the images of a batch.
        report: shows each update that is left out.
        path: of the file that names them all.
    """

    def __init__(
        self, accelerator: Accelerator, health: HealthConfig, model: nn.Module, data: Data, report: Report, path: Path
    ):
        self.accelerator = accelerator
        self.health = health
        self.model = model
        self.data = data
        self.report = report
        self.path = path
        self.buffers = Buffers(model)
        self.skips = 0  # in a row
        self.saved: Path | None = None  # the newest checkpoint, as long as no update has succeeded after it
        self.proven: Path | None = None  # the newest after which one has: what a diverged run goes back to

    def begin_update(self) -> None:
        """Keeps what a forward pass changes, before the first batch of an update."""
        self.buffers.keep()

    def is_finite(self, losses: list[Tensor], norm: Tensor) -> bool:
        """Whether the losses of an update and the norm of its gradients are finite, on all processes."""
        finite = torch.stack(losses).isfinite().all()
        # the scaler of fp16 seeks its scale by gradients that overflow, and leaves those updates out itself
        if self.accelerator.scaler is None:
            finite = finite & norm.isfinite()
        return not self.accelerator.reduce((~finite).float()).item()

    def succeed(self) -> None:
        """Takes note of an update that was made."""
        self.skips = 0
        if self.saved is not None:
            self.saved, self.proven = None, self.saved

    def skip(self, state: State, losses: list[Tensor], forward: Callable[[], object]) -> None:
        """Leaves an update out, and names the batch and the layer in nonfinite.txt and on stderr.

        Args:
            state: after the last batch of the update.
            losses: of its batches.
            forward: runs the network on the last of them once more, as it was.

        Raises:
            Diverged: if more updates in a row than health.skip had to be left out.
        """
        cause = next((each for each in gather_object([self._find_cause(state, losses, forward)]) if each), None)
        if cause is None:
            names = gradients_not_finite(self.model)
            cause = 'the norm of the gradients is beyond the largest number'
            if names:
                cause = f'gradients of {len(names)} parameters are not finite, the first is that of {names[0]}'
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
            append_text(self.path, f'{message}\n')
        if self.skips > self.health.skip:
            raise Diverged(f'{self.skips} updates in a row had no finite loss or gradients; the last: {cause}')

    def _find_cause(self, state: State, losses: list[Tensor], forward: Callable[[], object]) -> str | None:
        """Which batch of this process had a loss that is not finite, of which images, and in which layer it began."""
        first = state.batch - len(losses)
        broken = [first + number for number, loss in enumerate(losses) if not loss.isfinite()]
        if not broken:
            return None
        layer = ''
        if broken[-1] == state.batch - 1 and not is_sharded(self.accelerator):  # the one that can be run again
            layer = f', from {first_layer_not_finite(self.model, forward) or "the loss itself"} on'
        names = self.data.files(state.epoch, broken[0])
        files = f' ({", ".join(names)})' if names else ''
        value, rank = losses[broken[0] - first].item(), self.accelerator.process_index
        return f'the loss is {value} in batch {broken[0] + 1} of process {rank}{layer}{files}'

    def way_back(self, error: Diverged, rollbacks: int) -> Path:
        """The last checkpoint that led to a good update.

        Args:
            error: that makes the run go back.
            rollbacks: how often it has gone back, this time included.

        Raises:
            TrainError: if the configuration does not want that, or there is no such checkpoint.
        """
        if self.health.then == 'stop' or rollbacks > self.health.rollbacks:
            raise TrainError(f'{error}; {ADVICE}')
        if self.proven is None or not self.proven.exists():
            raise TrainError(f'{error}; there is no checkpoint to go back to; {ADVICE}')
        return self.proven

    def start_from(self, folder: Path, before: Path | None = None) -> None:
        """Takes note of the checkpoint that was loaded, and of the one before it to go back to."""
        self.saved, self.proven, self.skips = folder, before or self.proven, 0


class Buffers:
    """Takes back what a skipped update did to a module's buffers, the statistics of batch norms for instance."""

    def __init__(self, model: nn.Module):
        self.buffers = list(model.buffers())
        self.kept = [torch.empty_like(buffer) for buffer in self.buffers]

    def keep(self) -> None:
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            buffer.copy_(kept)


@torch.no_grad()
def first_layer_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the first module whose output is not finite while `forward` runs the model; None if all are."""
    found = []

    def hook(name: str) -> Callable:
        def check(module: nn.Module, inputs: tuple, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return check

    hooks = [module.register_forward_hook(hook(name or 'model')) for name, module in model.named_modules()]
    try:
        forward()
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


def gradients_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite, those nearest to the loss first."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    return [name for name, gradient in reversed(named) if not gradient.isfinite().all()]
