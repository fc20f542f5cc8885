"""What experts are worth: one network and recipe trained with 1 and with 4 experts, several seeds each.

The networks do the same convolutions; only the choice of their kernels differs. Runs share the machine, as many at a
time as asked for, since none fills a GPU.
"""

from argparse import Namespace
from dataclasses import dataclass

from . import report
from .trainings import every, spread, train

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


def measure(experts: int, seed: int, options: Namespace) -> Result:
    arguments = ['--model.kwargs.num_experts', experts]
    summary, last = train(CONFIG, f'experts{experts}', seed, arguments, options)
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
    results = every(options.experts, options, lambda experts, seed: measure(experts, seed, options))
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
    report.save(options.name or f'experts_{options.device}', options.device, settings, results, options.output)
