"""What experts are worth: one network and recipe trained with 1 and with 4 experts, several seeds each.

The networks do the same convolutions; only the choice of their kernels differs. Runs share the machine, as many at a
time as asked for, since none fills a GPU.
"""

import csv
import json
import statistics
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import report

CONFIG = 'parameternet_flowers'


@dataclass(frozen=True)
class Result:
    """One run: top-1 in percent after the last epoch and of the best, the loss after the last, and the cost."""

    experts: int
    seed: int
    last_top1: float
    best_top1: float
    last_val_loss: float
    last_train_loss: float
    parameters: int
    train_seconds: float


def train(experts: int, seed: int, options: Namespace) -> Result:
    """Runs the trainer, with its messages in a file beside its output."""
    folder = options.runs / f'experts{experts}_seed{seed}'
    folder.parent.mkdir(parents=True, exist_ok=True)
    arguments = [
        *('--config', CONFIG, '--data.root', options.data, '--run.output', folder, '--run.overwrite', 'true'),
        *('--run.seed', seed, '--model.kwargs.num_experts', experts, '--run.trackers', '[]'),
        *(['--schedule.epochs', options.epochs] if options.epochs else []),
        *(['--run.cpu', 'true'] if options.device == 'cpu' else []),
    ]
    log = folder.with_suffix('.log')
    with log.open('w') as file:
        command = [sys.executable, '-m', 'dcnzoo.train', *map(str, arguments)]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status != 0:
        raise SystemExit(f'training with {experts} experts and seed {seed} failed, see {log}')
    summary = json.loads((folder / 'summary.json').read_text())
    with (folder / 'metrics.csv').open() as file:
        *_, last = csv.DictReader(file)
    return Result(
        experts,
        seed,
        float(last['val_top1']),
        summary['val_top1'],
        float(last['val_loss']),
        float(last['train_loss']),
        summary['parameters'],
        summary['train_seconds'],
    )


def run(options: Namespace) -> None:
    jobs = [(experts, seed) for seed in options.seeds for experts in options.experts]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = sorted(pool.map(lambda job: train(*job, options), jobs), key=lambda result: result.experts)
    rows = []
    for experts in options.experts:
        chosen = [result for result in results if result.experts == experts]
        rows.append(
            [
                str(experts),
                f'{chosen[0].parameters / 1e6:.2f} M',
                ' '.join(f'{result.last_top1:.1f}' for result in chosen),
                *(
                    spread([getattr(result, name) for result in chosen])
                    for name in ('last_top1', 'best_top1', 'last_val_loss', 'last_train_loss')
                ),
            ]
        )
    columns = ['experts', 'parameters', 'top-1 per seed', 'top-1', 'best top-1', 'validation loss', 'training loss']
    report.table(f'{CONFIG}, {len(options.seeds)} seeds, mean and standard deviation', columns, rows)
    settings = {'config': CONFIG, 'seeds': options.seeds, 'experts': options.experts, 'epochs': options.epochs}
    report.save(options.name or 'experts', options.device, settings, results, options.output)


def spread(numbers: list[float]) -> str:
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f'{statistics.mean(numbers):.2f} +- {deviation:.2f}'
