"""What dcnv4_atto learns from few photos beside networks of its size: one recipe, equal epochs, several seeds each."""

import statistics
from argparse import Namespace
from dataclasses import dataclass

from . import report
from .trainings import every, spread, train

CONFIG = 'flowers_atto'
TAKE_NO_DROP_PATH = ('ghostnetv2_100',)
NETWORKS = ['dcnv4_atto', 'convnext_atto', 'edgenext_small', 'ghostnetv2_100', 'mobilenetv3_large_100', 'resnet10t']


@dataclass(frozen=True)
class Result:
    """One run: top-1 in percent after the last epoch and of the best, and the cost."""

    network: str
    seed: int
    last_top1: float
    best_top1: float
    parameters: int
    train_seconds: float
    images_per_second: float


def measure(network: str, seed: int, options: Namespace) -> Result:
    arguments = ['--model.name', network, '--health.every', 0]
    if options.epochs:  # the last sixth without mixing, as in the recipe
        arguments += ['--augment.mix_off_epoch', options.epochs * 5 // 6]
    if network in TAKE_NO_DROP_PATH:
        arguments += ['--model.drop_path_rate', 'null']
    summary, last = train(CONFIG, network, seed, arguments, options)
    costs = (summary[name] for name in ('parameters', 'train_seconds', 'images_per_second'))
    return Result(network, seed, float(last['val_top1']), summary['val_top1'], *costs)


def run(options: Namespace) -> None:
    networks = options.peers or NETWORKS
    results = every(networks, options, lambda network, seed: measure(network, seed, options))
    rows = []
    for network in networks:
        chosen = [result for result in results if result.network == network]
        rows.append(
            [
                network,
                f'{chosen[0].parameters / 1e6:.2f} M',
                ' '.join(f'{result.last_top1:.1f}' for result in chosen),
                spread([result.last_top1 for result in chosen]),
                spread([result.best_top1 for result in chosen]),
                f'{statistics.mean(result.train_seconds for result in chosen):.0f}',
                f'{statistics.mean(result.images_per_second for result in chosen):.0f}',
            ]
        )
    columns = ['network', 'parameters', 'top-1 per seed', 'top-1', 'best top-1', 'seconds', 'images per second']
    report.table(f'{CONFIG}, {len(options.seeds)} seeds, mean and standard deviation', columns, rows)
    settings = {'config': CONFIG, 'seeds': options.seeds, 'networks': networks, 'epochs': options.epochs}
    report.save(options.name or f'accuracy_{options.device}', options.device, settings, results, options.output)
