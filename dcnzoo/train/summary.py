"""What remains to be seen of a finished run: summary.json, curves.png and report.html."""

import base64
import csv
import html
import io
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import timm
import torch

import dcnzoo

from .checkpoint import atomic, write_json, write_text
from .report import NAMES, clock

if TYPE_CHECKING:
    from .loop import Trainer

CURVES = (
    ('loss', ('train_loss', 'val_loss')),
    ('learning rate', ('lr',)),
    ('images per second', ('images_per_second',)),
)


def summarize(trainer: 'Trainer', seconds: float) -> dict:
    """Loads the best checkpoint as any user would, validates it, and writes the summary, the curves and the report.

    Args:
        trainer: whose run is finished.
        seconds: that it took, from its start or its resumption.
    """
    accelerator, state, config, output = trainer.accelerator, trainer.state, trainer.config, trainer.output
    accelerator.wait_for_everyone()
    best = timm.create_model(f'local-dir:{(output / "best").resolve()}', pretrained=True).to(accelerator.device)
    if config.model.channels_last:
        best.to(memory_format=torch.channels_last)
    metrics = trainer.validate(best)
    splits, facts = trainer.data.splits, environment()
    summary = {
        'model': trainer.network.config['architecture'],
        'parameters': sum(p.numel() for p in best.parameters()),
        'num_classes': trainer.network.config['num_classes'],
        'input_size': trainer.network.config['pretrained_cfg']['input_size'],
        'train_images': len(splits.train),
        'val_images': len(splits.val),
        'epochs': state.epoch,
        'steps': state.step,
        **{name: round(value, 4) for name, value in metrics.items()},
        'best_epoch': state.best['epoch'],
        'weights': 'ema' if config.ema.decay else 'model',
        'unreadable_images': len(trainer.unreadable.complaints),
        'skipped_updates': state.skipped,
        'rollbacks': state.rollbacks,
        'train_seconds': round(state.seconds, 1),
        'wall_seconds': round(seconds, 1),
        'images_per_second': round(sum(row['images_per_second'] for row in state.history) / len(state.history), 1),
        'processes': accelerator.num_processes,
        'device': facts['device'],
        'precision': accelerator.mixed_precision,
        'seed': config.run.seed,
        'environment': facts,
    }
    name, metric = NAMES[trainer.report.metric], metrics[trainer.report.metric]
    if accelerator.is_main_process:
        write_json(output / 'summary.json', summary)
        title = f'{summary["model"]}: {name} {metric:.2f} %'
        draw_curves(output / 'curves.png', state.history, trainer.report.metric, title)
        write_report(output, summary, state.history, config.to_yaml())
        if unreadable := summary['unreadable_images']:
            names = output / 'unreadable.txt'
            trainer.report.warn(f'{unreadable} images could not be read; {names} names them')
        if state.skipped:
            names = output / 'nonfinite.txt'
            trainer.report.warn(f'{state.skipped} updates were skipped as not finite; {names} names their batches')
    trainer.report.say(
        f'best checkpoint {output / "best"}: {name} {metric:.2f} % on {len(splits.val)} validation images '
        f'(epoch {summary["best_epoch"]}); {clock(state.seconds)} of training'
    )
    return summary


def environment() -> dict[str, str]:
    """Versions, machine and commit."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {module.__name__: module.__version__ for module in (torch, timm, accelerate, dcnzoo)}
    return {
        'python': platform.python_version(),
        **versions,
        'system': platform.platform(),
        'device': device,
        **commit(),
    }


def commit() -> dict[str, str]:
    """The commit of the clone that this package is part of, if it is, and whether files differ from it."""
    folder = Path(dcnzoo.__file__).parents[1]
    if not (folder / '.git').exists():
        return {}
    try:
        git = ['git', '-C', str(folder)]
        done = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {'commit': done.stdout.strip() + (' with changes' if changed.stdout.strip() else '')}


def draw_curves(path: Path, history: list[dict], metric: str, title: str) -> None:
    """Draws losses, the metric, learning rate and throughput over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = [CURVES[0], (f'{metric.removeprefix("val_")} (%)', (metric,)), *CURVES[1:]]
    figure = Figure(figsize=(4 * len(plots), 3.6), layout='constrained')
    for axes, (name, columns) in zip(figure.subplots(1, len(plots)), plots, strict=True):
        for column in columns:
            points = [(row['epoch'], row[column]) for row in history if row[column] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=column, marker='.' if len(points) < 30 else None)
        axes.set(xlabel='epoch', title=name)
        axes.grid(alpha=0.3)
        if len(columns) > 1:
            axes.legend()
    figure.suptitle(title)
    with atomic(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)


def write_report(output: Path, summary: dict, history: list[dict], config: str) -> None:
    """Writes report.html, one file with the curves in it, from what the run has left in its folder."""
    picture = base64.b64encode((output / 'curves.png').read_bytes()).decode()
    facts = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    health = output / 'health.csv'
    sections = [
        ('Results', _table(['', ''], facts.items())),
        ('Curves', f'<img alt="curves" src="data:image/png;base64,{picture}">'),
        ('Epochs', _table(list(history[0]), [[_short(value) for value in row.values()] for row in history])),
        ('Deformable layers', _last_rows(health) if health.exists() else ''),
        ('Environment', _table(['', ''], summary['environment'].items())),
        ('Configuration', f'<pre>{html.escape(config)}</pre>'),
    ]
    body = '\n'.join(f'<h2>{title}</h2>\n{content}' for title, content in sections if content)
    title = html.escape(f'{summary["model"]} in {output}')
    style = 'body{font-family:sans-serif}td,th{padding:.2em .8em;text-align:right}'
    page = (
        f'<!doctype html>\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{style} img{{max-width:100%}}</style>'
    )
    write_text(output / 'report.html', f'{page}\n<h1>{title}</h1>\n{body}\n')


def _last_rows(path: Path) -> str:
    """The last measurement of each stage; nothing if there is none."""
    with path.open(newline='') as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return ''
    last = [row for row in rows if row['step'] == rows[-1]['step']]
    return _table(list(rows[0]), [[_short(value) for value in row.values()] for row in last])


def _short(value: object) -> str:
    try:
        return '' if value in (None, '') else f'{float(value):.5g}'
    except ValueError:
        return str(value)


def _table(head: list[str], rows) -> str:
    text = io.StringIO()
    lines = [(head, 'th')] if any(head) else []
    for cells, tag in (*lines, *((row, 'td') for row in rows)):
        text.write(f'<tr>{"".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)}</tr>\n')
    return f'<table>\n{text.getvalue()}</table>'
