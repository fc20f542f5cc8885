"""Multi-scale deformable attention beside transformers' own layer, over the calls of detectors on 640 x 640 images."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dcnzoo.ops import deform_attn

from . import report
from .op import DIRECTIONS
from .peers import Call, Missing, with_gradients
from .timing import Timing, measure, time_calls

OURS, PEER = 'dcnzoo', 'transformers'


@dataclass(frozen=True)
class Shape:
    """One call: the levels are square maps, and a query for each of their pixels where `queries` is None."""

    name: str
    sides: tuple[int, ...]
    queries: int | None = None
    heads: int = 8
    depth: int = 32
    points: int = 4

    def operands(self, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, locations scattered around random reference points as trained networks do, weights, and a gradient."""
        generator = torch.Generator().manual_seed(0)
        pixels = sum(side * side for side in self.sides)
        places = batch, self.queries or pixels, self.heads, len(self.sides), self.points
        value = torch.randn(batch, pixels, self.heads, self.depth, generator=generator)
        references = torch.rand(batch, places[1], 1, 1, 1, 2, generator=generator)
        spread = torch.tensor([2 / side for side in self.sides]).view(-1, 1, 1)
        locations = references + spread * torch.randn(*places, 2, generator=generator)
        weights = torch.randn(places, generator=generator).flatten(3).softmax(-1).view(places)
        grad_output = torch.randn(batch, places[1], self.heads * self.depth, generator=generator)
        return tuple(tensor.to(device, dtype) for tensor in (value, locations, weights, grad_output))


SHAPES = [
    Shape('Deformable DETR encoder', (80, 40, 20, 10)),
    Shape('Deformable DETR decoder', (80, 40, 20, 10), queries=300),
    Shape('RT-DETR decoder', (80, 40, 20), queries=300),
    Shape('Mask2Former encoder', (80, 40, 20)),
]


@dataclass(frozen=True)
class Result:
    peer: str
    direction: str
    threads: int
    dtype: str
    shape: str
    seconds: Timing


def ours(shape: Shape) -> Callable[..., Tensor]:
    sizes = [(side, side) for side in shape.sides]
    return lambda value, locations, weights: deform_attn(value, sizes, locations, weights)


def theirs(shape: Shape) -> Callable[..., Tensor]:
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError as error:
        raise Missing(f'{error.name} is not installed') from error
    layer, sizes = MultiScaleDeformableAttention(), [(side, side) for side in shape.sides]
    return lambda value, locations, weights: layer(value, None, sizes, None, locations, weights, 64)


PEERS = {OURS: ours, PEER: theirs}


def make_call(peer: str, shape: Shape, batch: int, dtype: torch.dtype, device: str, backward: bool) -> Call:
    *inputs, grad_output = shape.operands(batch, dtype, device)
    function = PEERS[peer](shape)
    return with_gradients(function, inputs, grad_output) if backward else lambda: function(*inputs)


def run(options: Namespace) -> None:
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for direction, backward in DIRECTIONS.items():
                measured = []
                for shape in SHAPES:
                    calls = {
                        peer: make_call(peer, shape, options.batch, getattr(torch, dtype), options.device, backward)
                        for peer in PEERS
                    }
                    timers = {peer: partial(time_calls, call, device=options.device) for peer, call in calls.items()}
                    with torch.inference_mode(not backward):
                        timings = measure(timers, options.rounds, options.seconds)
                    measured += [
                        Result(peer, direction, threads, dtype, shape.name, timing) for peer, timing in timings.items()
                    ]
                show(measured, options.batch)
                results += measured
    settings = {'batch': options.batch, 'threads': options.threads, 'rounds': options.rounds}
    name = options.name or f'deform_attn_{options.device}_batch{options.batch}'
    path = report.save(name, options.device, settings, results, options.output)
    first = [result for result in results if (result.threads, result.dtype) == (options.threads[0], options.dtypes[0])]
    report.chart(
        path.with_suffix('.png'),
        f'Deformable attention, batch {options.batch}, {options.threads[0]} thread(s), {options.dtypes[0]}',
        'ms',
        {
            direction: {
                f'{result.shape}, {result.peer}': 1e3 * result.seconds.median
                for result in first
                if result.direction == direction
            }
            for direction in DIRECTIONS
        },
        logarithmic=True,
    )


def show(results: list[Result], batch: int) -> None:
    rows = []
    for mine in (result for result in results if result.peer == OURS):
        other = next(result for result in results if (result.peer, result.shape) == (PEER, mine.shape))
        rows.append(
            [
                mine.shape,
                *(f'{1e3 * result.seconds.median:.2f}' for result in (mine, other)),
                f'{other.seconds.median / mine.seconds.median:.1f}',
                f'{other.seconds.shortest / mine.seconds.shortest:.1f}',
            ]
        )
    first = results[0]
    report.table(
        f'{first.direction}, {first.dtype}, batch {batch}, {first.threads} thread(s), milliseconds (median)',
        ['', OURS, PEER, f'{PEER} / {OURS}', 'of the shortest'],
        rows,
    )
