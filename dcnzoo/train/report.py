"""What the user sees of a run: progress, one line per epoch, CSV, trackers, curves and the summary."""

import csv
import io
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .checkpoint import atomic, write_text

METRICS = ('epoch', 'step', 'lr', 'train_loss', 'val_loss', 'val_top1', 'val_top5', 'images_per_second', 'seconds')


class Report:
    """Shows and logs one run; silent on all processes but the main one.

    Args:
        accelerator: whose trackers are fed.
        output: the run's folder.
        epochs: of the whole run.
        batches: per epoch and process.
    """

    def __init__(self, accelerator: Accelerator, output: Path, epochs: int, batches: int):
        self.accelerator = accelerator
        self.output = output
        self.epochs = epochs
        self.batches = batches
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

    def epoch(self, row: dict[str, Any], history: list[dict[str, Any]], best: float) -> None:
        """Prints one line for an epoch, feeds the trackers, and writes the CSV from the whole history."""
        done = row['epoch'] * self.batches
        left = (time.monotonic() - self.started) * (self.epochs * self.batches - done) / max(1, done - self.done_before)
        validation = ''
        if row['val_top1'] is not None:
            validation = f'val loss {row["val_loss"]:.3f}  top-1 {row["val_top1"]:.2f} % (best {best:.2f} %)  '
        self.say(
            f'epoch {row["epoch"]}/{self.epochs}  loss {row["train_loss"]:.3f}  {validation}lr {row["lr"]:.2e}  '
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
    writer = csv.DictWriter(text, METRICS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def draw_curves(path: Path, history: list[dict[str, Any]], title: str) -> None:
    """Draws loss, top-1 and learning rate over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout='constrained')
    losses, accuracy, rate = figure.subplots(1, 3)
    for axes, name, label in (
        (losses, 'train_loss', 'training'),
        (losses, 'val_loss', 'validation'),
        (accuracy, 'val_top1', 'validation'),
        (rate, 'lr', None),
    ):
        points = [(row['epoch'], row[name]) for row in history if row[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker='.' if len(points) < 30 else None)
    for axes, name in ((losses, 'loss'), (accuracy, 'top-1 (%)'), (rate, 'learning rate')):
        axes.set(xlabel='epoch', title=name)
        axes.grid(alpha=0.3)
    if losses.lines:
        losses.legend()
    figure.suptitle(title)
    with atomic(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)
