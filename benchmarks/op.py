"""The operator on a CPU beside its peers, over the layers of dcnv4_tiny."""

import contextlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import report
from .peers import CAPABILITIES, PEERS, Missing, Operands, Process, native
from .shapes import Shape, zoo
from .timing import Timing, measure, time_calls

OURS = 'dcnzoo'
HALVES = {'bfloat16': torch.bfloat16, 'float16': torch.float16}
OWN = {
    OURS: 'float32, the best instruction set of the processor',
    **{f'{OURS}-{name}': f'{name}, the same' for name in (*HALVES, 'float64')},
    **{f'{OURS}-{name}': f'float32, DCNZOO_CPU_CAPABILITY={name}' for name in CAPABILITIES},
}
NAMES = [*OWN, *PEERS]
DIRECTIONS = {'forward': False, 'forward+backward': True}


@dataclass(frozen=True)
class Result:
    peer: str
    direction: str
    threads: int
    shape: str
    count: int
    seconds: Timing


def floor(shape: Shape, flops: float) -> float:
    """Seconds that a float32 forward cannot go below: 36 multiplications and additions an output."""
    return 2 * 36 * shape.batch * shape.height * shape.width * shape.channels / flops


def peak() -> float:
    """Float32 operations a second of a matrix product in the caches."""
    matrix = torch.randn(320, 320)
    return 2 * 320**3 / min(time_calls(lambda: matrix @ matrix, 300, 'cpu'))


def make_call(name: str, shape: Shape, backward: bool, processes: dict[str, Process]) -> Callable[[int], list[float]]:
    if name in processes:
        return processes[name].call(shape, torch.float32, backward)
    if name in OWN:
        _, _, dtype = name.partition('-')
        call = native(Operands.of(shape, getattr(torch, dtype or 'float32')), backward)
    else:
        call = PEERS[name](Operands.of(shape), backward)
    call()
    return partial(time_calls, call, device='cpu')


def run(options: Namespace) -> None:
    names = list(dict.fromkeys([OURS, *(options.peers or NAMES)]))
    results: list[Result] = []
    missing: dict[tuple[str, str], str] = {}
    peaks: dict[int, float] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        peaks[threads] = peak()
        with contextlib.ExitStack() as stack:
            processes = {}
            for capability in CAPABILITIES:
                if (name := f'{OURS}-{capability}') in names:
                    processes[name] = Process(capability, threads)
                    stack.callback(processes[name].close)
            for direction, backward in DIRECTIONS.items():
                for shape in zoo(options.batch):
                    calls = {}
                    for name in names:
                        try:
                            calls[name] = make_call(name, shape, backward, processes)
                            calls[name](1)
                        except Missing as reason:
                            missing[name, direction] = str(reason)
                            calls.pop(name, None)
                    with torch.inference_mode(not backward):
                        timings = measure(calls, options.rounds, options.seconds)
                    results += [
                        Result(name, direction, threads, shape.name, shape.count, timing)
                        for name, timing in timings.items()
                    ]
                show(results, direction, threads, options.batch, peaks[threads], missing)
    show_scaling(results, options.threads)
    path = report.save(
        options.name or f'op_cpu_batch{options.batch}',
        'cpu',
        {'batch': options.batch, 'threads': options.threads, 'rounds': options.rounds},
        results,
        options.output,
        missing={', '.join(key): reason for key, reason in missing.items()},
        operations_per_second=peaks,
    )
    panels = {
        direction: {
            name: 1e3 * total(results, name, direction, options.threads[0], 'median')
            for name in names
            if (name, direction) not in missing
        }
        for direction in DIRECTIONS
    }
    report.chart(
        path.with_suffix('.png'),
        f'All layers of dcnv4_tiny, batch {options.batch}, {options.threads[0]} thread(s)',
        'ms',
        panels,
        logarithmic=True,
    )


def total(results: list[Result], peer: str, direction: str, threads: int, statistic: str) -> float:
    """Seconds over all layers of the network."""
    return sum(
        result.count * getattr(result.seconds, statistic)
        for result in results
        if (result.peer, result.direction, result.threads) == (peer, direction, threads)
    )


def show(
    results: list[Result],
    direction: str,
    threads: int,
    batch: int,
    flops: float,
    missing: dict[tuple[str, str], str],
) -> None:
    shapes = zoo(batch)
    chosen = [result for result in results if (result.direction, result.threads) == (direction, threads)]
    ours = total(chosen, OURS, direction, threads, 'median')
    rows = []
    for name in dict.fromkeys(result.peer for result in chosen):
        timings = [result.seconds for result in chosen if result.peer == name]
        sums = [total(chosen, name, direction, threads, key) for key in ('median', 'lower', 'upper', 'shortest')]
        rows.append(
            [
                name,
                *(f'{1e3 * timing.median:.3f}' for timing in timings),
                f'{1e3 * sums[0]:.2f}',
                f'{1e3 * sums[1]:.2f} - {1e3 * sums[2]:.2f}',
                f'{1e3 * sums[3]:.2f}',
                f'{sums[0] / ours:.2f}',
            ]
        )
    if direction == 'forward':
        seconds = [floor(shape, flops) for shape in shapes]
        whole = sum(shape.count * each for shape, each in zip(shapes, seconds, strict=True))
        each = [f'{1e3 * second:.3f}' for second in seconds]
        rows.append(['floor: arithmetic', *each, f'{1e3 * whole:.2f}', '', '', f'{whole / ours:.2f}'])
    report.table(
        f'{direction}, batch {batch}, {threads} thread(s), milliseconds (median)',
        [
            '',
            *(f'{shape.count} x {shape.name}' for shape in shapes),
            'all layers',
            'quartiles',
            'shortest',
            'to dcnzoo',
        ],
        rows,
    )


def show_scaling(results: list[Result], threads: list[int]) -> None:
    if len(threads) < 2:
        return
    rows = []
    for direction in DIRECTIONS:
        for statistic in ('median', 'shortest'):
            seconds = [total(results, OURS, direction, count, statistic) for count in threads]
            rows.append([f'{direction}, {statistic}', *(f'{seconds[0] / each:.2f}' for each in seconds)])
    report.table(f'{OURS}: speed over that of {threads[0]} thread(s)', ['', *map(str, threads)], rows)
