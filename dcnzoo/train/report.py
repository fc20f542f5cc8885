"""What the user sees of a run while it goes on: progress, one line per epoch, CSV and trackers."""

import csv
import io
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .checkpoint import write_text
from .config import Config
from .errors import TrainError

SINGLE_LABEL = ('val_loss', 'val_top1', 'val_top5')
MULTI_LABEL = ('val_loss', 'val_map', 'val_micro_f1', 'val_macro_f1', 'val_sample_f1')
NAMES = {'val_top1': 'top-1', 'val_map': 'mAP'}


def begin_trackers(accelerator: Accelerator, config: Config) -> None:
    """Starts the trackers with the run's name and its settings.

    Raises:
        TrainError: if one does not start, for want of a login or of a network for instance.
    """
    if not config.run.trackers:
        return
    name, output = Path(config.run.output).name, Path(config.run.output)
    options = {
        'wandb': {'name': name, 'dir': str(output)},
        'trackio': {'name': name},
        'mlflow': {'run_name': name},
    }
    settings = {
        f'{group}.{setting}': value if isinstance(value, (bool, int, float, str)) else str(value)
        for group, values in asdict(config).items()
        if isinstance(values, dict)
        for setting, value in values.items()
    }
    try:
        accelerator.init_trackers('dcnzoo', config=settings, init_kwargs=options)
    except Exception as error:  # services of others: each fails in its own way
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=' ...')
        trackers = ', '.join(config.run.trackers)
        raise TrainError(f'run.trackers: {trackers} cannot start: {reason}; --run.trackers [] does without') from error


class Report:
    """Shows and logs one run; silent on all processes but the main one.

    Args:
        accelerator: whose trackers are fed.
        output: the run's folder.
        epochs: of the whole run.
        batches: per epoch and process.
        multi_label: whether images have several labels.
    """

    def __init__(self, accelerator: Accelerator, output: Path, epochs: int, batches: int, multi_label: bool = False):
        self.accelerator = accelerator
        self.output = output
        self.epochs = epochs
        self.batches = batches
        self.metrics = MULTI_LABEL if multi_label else SINGLE_LABEL
        self.metric = self.metrics[1]  # by which the best is chosen
        self.main = accelerator.is_main_process
        self.console = Console(quiet=not self.main, soft_wrap=True, highlight=False)
        self.progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('loss {task.fields[loss]}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (self.main and self.console.is_terminal),
            speed_estimate_period=120,
        )
        self.task = self.progress.add_task('', total=epochs * batches, loss='-')
        self.started = time.monotonic()
        self.done_before = 0

    def __enter__(self) -> 'Report':
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, message: str) -> None:
        """Prints a line."""
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Prints a line on stderr, from any process."""
        Console(stderr=True, soft_wrap=True, highlight=False).print(f'warning: {message}', markup=False)

    def start(self, epoch: int, batch: int) -> None:
        """Sets the progress bar to where a resumed run begins."""
        self.done_before = epoch * self.batches + batch
        self.started = time.monotonic()
        self.progress.update(self.task, completed=self.done_before)

    def batch(self, epoch: int, batch: int) -> None:
        """Moves the progress bar: `batch` batches of this epoch are done."""
        self.progress.update(
            self.task, completed=epoch * self.batches + batch, description=f'epoch {epoch + 1}/{self.epochs}'
        )

    def step(self, step: int, loss: float, lr: float) -> None:
        """Feeds the trackers with one step."""
        self.progress.update(self.task, loss=f'{loss:.3f}')
        self.accelerator.log({'train/loss': loss, 'train/lr': lr}, step=step)

    def health(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Feeds the trackers with a measurement of the deformable layers."""
        values = {
            f'{name}/{row["stage"]}': row[name] for row in rows for name in row if name not in ('stage', 'layers')
        }
        self.accelerator.log(values, step=step)

    def epoch(self, row: dict[str, Any], history: list[dict[str, Any]], best: dict[str, Any] | None) -> None:
        """Prints one line for an epoch, feeds the trackers, and writes the CSV from the whole history."""
        done = row['epoch'] * self.batches
        left = (time.monotonic() - self.started) * (self.epochs * self.batches - done) / max(1, done - self.done_before)
        validation = ''
        if row[self.metric] is not None:
            name = NAMES[self.metric]
            validation = (
                f'val loss {row["val_loss"]:.3f}  {name} {row[self.metric]:.2f} % (best {best[self.metric]:.2f} %)  '
            )
        loss = '-' if row['train_loss'] is None else f'{row["train_loss"]:.3f}'
        self.say(
            f'epoch {row["epoch"]}/{self.epochs}  loss {loss}  {validation}lr {row["lr"]:.2e}  '
            f'{row["images_per_second"]:.0f} img/s  {clock(left)} left'
        )
        measured = {name: value for name, value in row.items() if value is not None and name not in ('epoch', 'step')}
        self.accelerator.log({f'epoch/{name}': value for name, value in measured.items()}, step=row['step'])
        if self.main:
            write_text(self.output / 'metrics.csv', to_csv(history))


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f'{hours}:{minute:02d}:{second:02d}' if hours else f'{minute}:{second:02d}'


def to_csv(history: list[dict[str, Any]]) -> str:
    """One row per epoch; a metric that was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
