"""Whole models beside timm's: images a second of inference and of training steps."""

import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F

from . import report
from .timing import Timing, measure, time_calls

PEERS = ['convnext_tiny', 'swin_tiny_patch4_window7_224', 'resnet50']
SIZE = 224


@dataclass(frozen=True)
class Result:
    model: str
    mode: str
    threads: int
    images_per_second: float
    seconds: Timing


def make_call(
    name: str, options: Namespace, dtype: torch.dtype, compiled: bool, training: bool
) -> Callable[[], object]:
    """One forward pass without gradients, or one step of plain SGD; half types by autocast."""
    torch.manual_seed(0)
    device = options.device
    model = timm.create_model(name).to(device).train(training)
    images = torch.randn(options.batch, 3, SIZE, SIZE, device=device)
    if device == 'cuda':
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    targets = torch.randint(1000, (options.batch,), device=device)
    autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)
    forward = torch.compile(model) if compiled else model
    if not training:

        def infer() -> object:
            with torch.inference_mode(), autocast():
                return forward(images)

        return infer

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(forward(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run(options: Namespace, training: bool) -> None:
    names = list(dict.fromkeys([options.model, *(options.peers or PEERS)]))
    missing = {name: 'timm has no such model' for name in names if not timm.is_model(name)}
    names = [name for name in names if name not in missing]
    modes = [
        (f'{dtype}, {"compiled" if compiled else "eager"}', getattr(torch, dtype), compiled)
        for dtype in options.dtypes
        for compiled in ([False, True] if options.compile else [False])
    ]
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for mode, dtype, compiled in modes:
            calls = {
                name: functools.partial(
                    time_calls, make_call(name, options, dtype, compiled, training), device=options.device
                )
                for name in names
            }
            timings = measure(calls, options.rounds, options.seconds)
            results += [
                Result(name, mode, threads, options.batch / timing.median, timing) for name, timing in timings.items()
            ]
            show(results, options, mode, threads, training, missing)
    kind = 'train' if training else 'model'
    path = report.save(
        options.name or f'{kind}_{options.device}_batch{options.batch}',
        options.device,
        {'batch': options.batch, 'size': SIZE, 'threads': options.threads, 'rounds': options.rounds},
        results,
        options.output,
        missing=missing,
    )
    panels = {
        f'{mode}, {threads} thread(s)' if options.device == 'cpu' else mode: {
            result.model: result.images_per_second
            for result in results
            if (result.mode, result.threads) == (mode, threads)
        }
        for threads in options.threads
        for mode, _, _ in modes
    }
    title = f'{"Training" if training else "Inference"}, batch {options.batch}, {SIZE} x {SIZE}'
    report.chart(path.with_suffix('.png'), title, 'images a second', panels)


def show(
    results: list[Result], options: Namespace, mode: str, threads: int, training: bool, missing: dict[str, str]
) -> None:
    chosen = [result for result in results if (result.mode, result.threads) == (mode, threads)]
    ours = chosen[0].images_per_second
    rows = [
        [
            result.model,
            f'{result.images_per_second:.1f}',
            f'{1e3 * result.seconds.median:.1f}',
            f'{1e3 * result.seconds.lower:.1f} - {1e3 * result.seconds.upper:.1f}',
            f'{1e3 * result.seconds.shortest:.1f}',
            f'{ours / result.images_per_second:.2f}',
        ]
        for result in chosen
    ]
    report.table(
        f'{"training step" if training else "inference"}, {mode}, batch {options.batch}, {SIZE} x {SIZE}, '
        + (f'{threads} thread(s)' if options.device == 'cpu' else torch.cuda.get_device_name()),
        ['', 'images/s', 'ms (median)', 'quartiles', 'shortest', f'{options.model} is x times as fast'],
        rows,
        report.caption(missing),
    )
