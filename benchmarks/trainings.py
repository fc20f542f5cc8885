"""Trainings whose results are compared: each a process of the trainer, some at a time if asked for.

Runs that an earlier comparison left in the same folder are continued, finished ones only read.
"""

import csv
import json
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar('Result')


def train(config: str, name: str, seed: int, arguments: Iterable[object], options: Namespace) -> tuple[dict, dict]:
    """Runs the trainer, with its messages in a file beside its output.

    Returns:
        The run's summary and the last row of its metrics.
    """
    folder = options.runs / f'{name}_seed{seed}'
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, '-m', 'dcnzoo.train', '--config', config, '--data.root', options.data),
        *('--run.output', folder, '--resume', 'auto', '--run.seed', seed, '--run.trackers', '[]'),
        *(['--schedule.epochs', options.epochs] if options.epochs else []),
        *(['--schedule.warmup_epochs', 0] if options.epochs and options.epochs < 5 else []),
        *(['--run.cpu', 'true'] if options.device == 'cpu' else []),
        *arguments,
    ]
    log = folder.with_suffix('.log')
    with log.open('w') as file:
        status = subprocess.run([str(word) for word in command], stdout=file, stderr=subprocess.STDOUT).returncode
    if status != 0:
        raise SystemExit(f'training {name} with seed {seed} failed, see {log}')
    with (folder / 'metrics.csv').open() as file:
        *_, last = csv.DictReader(file)
    return json.loads((folder / 'summary.json').read_text()), last


def every(choices: Iterable, options: Namespace, run: Callable[[object, int], Result]) -> list[Result]:
    """Results of `run(choice, seed)`, all choices with the first seed, then all with the next."""
    jobs = [(choice, seed) for seed in options.seeds for choice in choices]
    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(lambda job: run(*job), jobs))


def spread(numbers: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f'{statistics.mean(numbers):.2f} +- {deviation:.2f}'
