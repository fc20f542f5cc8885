"""DCNv3 on the operator beside the composition that was published for machines without its CUDA kernels.

Over the layers of internimage_tiny: what lies between the projections, a softmax and the aggregation, and whole layers.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnzoo.layers import DCNv3
from dcnzoo.ops import dcnv4

from . import report
from .op import DIRECTIONS
from .peers import POINTS, Operands, with_gradients
from .shapes import Shape, zoo
from .timing import Timing, measure, time_calls

OURS, PEER = 'dcnzoo', 'composition'
PARTS = ('operator', 'layer')


@dataclass(frozen=True)
class Result:
    peer: str
    part: str
    direction: str
    threads: int
    shape: str
    count: int
    seconds: Timing


def composition(value: Tensor, offset: Tensor, mask: Tensor, groups: int) -> Tensor:
    """The published steps: pad, compute the locations in units of the padded map, softmax, sample and sum.

    Args:
        value: (N, H, W, C).
        offset: (N, H, W, groups * 9 * 2).
        mask: Logits, (N, H, W, groups * 9).
        groups: Groups of channels.
    """
    n, height, width, channels = value.shape
    padded = F.pad(value, [0, 0, 1, 1, 1, 1])
    rows, columns = height + 2, width + 2
    sizes = torch.tensor([columns, rows], dtype=value.dtype)
    y, x = torch.meshgrid(
        torch.linspace(1.5, rows - 1.5, height), torch.linspace(1.5, columns - 1.5, width), indexing='ij'
    )
    centers = torch.stack((x, y), -1).view(1, height, width, 1, 2) / sizes
    x, y = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3), indexing='ij')
    taps = torch.stack((x, y), -1).view(POINTS, 2).repeat(groups, 1) / sizes
    locations = (centers + taps).repeat(n, 1, 1, 1, 1).flatten(3) + offset / sizes.repeat(groups * POINTS)
    grid = (2 * locations - 1).view(n, height * width, groups, POINTS, 2).transpose(1, 2).flatten(0, 1)
    maps = padded.view(n, rows * columns, channels).transpose(1, 2).reshape(n * groups, -1, rows, columns)
    samples = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    shares = mask.view(n, height * width, groups, POINTS).softmax(-1).transpose(1, 2).reshape(n * groups, 1, -1, POINTS)
    output = (samples * shares).sum(-1).view(n, channels, height * width)
    return output.transpose(1, 2).reshape(n, height, width, channels).contiguous()


class Composition(DCNv3):
    """The published layer: offsets and logits by a projection each, and the composition."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        return self.output_proj(composition(self.input_proj(x), self.offset(features), self.mask(features), self.group))


def make_calls(part: str, shape: Shape, backward: bool) -> dict[str, Callable[[], object]]:
    """A call of each peer on the same numbers, after a look at whether they agree."""
    operands = Operands.of(shape)
    if part == 'operator':
        offset, mask = (tensor.flatten(3).contiguous() for tensor in operands.unpacked())
        functions = {
            OURS: lambda value, packed: dcnv4(value, packed, groups=shape.groups, softmax=True),
            PEER: lambda value, offset, mask: composition(value, offset, mask, shape.groups),
        }
        inputs = {OURS: [operands.value, operands.offset_mask], PEER: [operands.value, offset, mask]}
    else:
        layer, peer = DCNv3(shape.channels, group=shape.groups), Composition(shape.channels, group=shape.groups)
        for prediction in (layer.offset, layer.mask):
            torch.nn.init.normal_(prediction.weight, std=shape.channels**-0.5)
        peer.load_state_dict(layer.state_dict())
        functions = {OURS: layer, PEER: peer}
        inputs = {OURS: [operands.value], PEER: [operands.value]}
    expected, actual = (functions[name](*inputs[name]).detach() for name in (PEER, OURS))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    if not backward:
        return {name: partial(function, *inputs[name]) for name, function in functions.items()}
    if part == 'operator':
        return {name: with_gradients(functions[name], inputs[name], operands.grad_output) for name in functions}
    x = operands.value.clone().requires_grad_()
    return {name: partial(train, layer, x, operands.grad_output) for name, layer in functions.items()}


def train(layer: DCNv3, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad_output)


def run(options: Namespace) -> None:
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for direction, backward in DIRECTIONS.items():
            for part in PARTS:
                for shape in zoo(options.batch):
                    calls = make_calls(part, shape, backward)
                    timers = {name: partial(time_calls, call, device='cpu') for name, call in calls.items()}
                    with torch.inference_mode(not backward):
                        timings = measure(timers, options.rounds, options.seconds)
                    results += [
                        Result(name, part, direction, threads, shape.name, shape.count, timing)
                        for name, timing in timings.items()
                    ]
            show([result for result in results if (result.direction, result.threads) == (direction, threads)], options)
    settings = {'batch': options.batch, 'threads': options.threads, 'rounds': options.rounds}
    report.save(options.name or f'dcnv3_cpu_batch{options.batch}', 'cpu', settings, results, options.output)


def show(results: list[Result], options: Namespace) -> None:
    rows = []
    for part in PARTS:
        chosen = [result for result in results if result.part == part]
        pairs = [
            (mine, other)
            for mine in chosen
            for other in chosen
            if (mine.peer, other.peer) == (OURS, PEER) and mine.shape == other.shape
        ]
        rows += [row(f'{part}, {mine.count} x {mine.shape}', [(mine, other)]) for mine, other in pairs]
        rows.append(row(f'{part}, all layers', pairs))
    first = results[0]
    report.table(
        f'{first.direction}, batch {options.batch}, {first.threads} thread(s), milliseconds (median)',
        ['', OURS, PEER, f'{PEER} / {OURS}', 'of the shortest'],
        rows,
    )


def row(label: str, pairs: list[tuple[Result, Result]]) -> list[str]:
    """Milliseconds of both peers over layers, by the median, and the ratios by the median and the shortest."""
    sums = {
        key: [sum(pair[i].count * getattr(pair[i].seconds, key) for pair in pairs) for i in (0, 1)]
        for key in ('median', 'shortest')
    }
    ratios = [theirs / ours for ours, theirs in sums.values()]
    return [label, *(f'{1e3 * seconds:.2f}' for seconds in sums['median']), *(f'{ratio:.1f}' for ratio in ratios)]
