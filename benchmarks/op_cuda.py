"""The operator on a GPU beside its peers and its floors, on the paper's shapes and the zoo's own.

Kernel times come from replays of CUDA graphs that hold several calls on rotating operands: neither launch gaps nor a
warm cache distort them. The floor of a row is the larger of two times: to move the tensors through device memory once,
at the bandwidth of a copy measured here, and to bring the corners of all samples through the L1 caches.
"""

import importlib
import itertools
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dcnzoo.ops import available_backends, dcnv4, use_backend

from . import report
from .peers import Missing, Operands, composition
from .shapes import PAPER, Shape, zoo

L1_BYTES_PER_CLOCK = 128  # of one multiprocessor
DIRECTIONS = ('forward', 'backward')
Call = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """Microseconds a call: the median and quartiles over the replays."""

    peer: str
    direction: str
    dtype: str
    shape: str
    median: float
    lower: float
    upper: float
    floor: float
    floor_memory: float
    floor_l1: float


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    seconds = statistics.median(replay([lambda: target.copy_(source)], replays=9))
    return 2 * source.numel() * source.element_size() / seconds


def l1_bandwidth() -> float:
    """Bytes a second that all L1 caches bring together, at the clock that the device reports as its highest."""
    properties = torch.cuda.get_device_properties('cuda')
    clock = getattr(properties, 'clock_rate', None)  # in kHz; since torch 2.8
    hertz = 1e3 * clock if clock else 1e6 * torch.cuda.clock_rate()
    return properties.multi_processor_count * L1_BYTES_PER_CLOCK * hertz


def floors(shape: Shape, size: int, backward: bool, memory: float, l1: float) -> tuple[float, float]:
    """Microseconds for the traffic through device memory, and for the reads of the samples' corners through L1."""
    pixels = shape.batch * shape.height * shape.width
    moved = 3 * shape.channels + 2 * shape.packed if backward else 2 * shape.channels + shape.packed
    return 1e6 * size * pixels * moved / memory, 1e6 * 36 * size * pixels * shape.channels / l1


def replay(calls: list[Call], replays: int, rounds: int = 1) -> list[float]:
    """Seconds a call, once for each replay of a graph with all calls, `rounds` times over."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 / (rounds * len(calls)) for begin, end in itertools.pairwise(events)]


def operands_of(shape: Shape, dtype: torch.dtype, copies: int) -> list[Operands]:
    first = Operands.of(shape, dtype)
    tensors = [tensor.cuda() for tensor in (first.value, first.offset_mask, first.grad_output)]
    return [Operands(shape, *(tensor.clone() for tensor in tensors)) for _ in range(copies)]


def on_backend(backend: str) -> Callable[[Operands, str, bool], Call]:
    def make(operands: Operands, direction: str, deterministic: bool = False) -> Call:
        if backend not in available_backends('cuda'):
            raise Missing(f'the {backend} backend is not available on this GPU')
        groups = operands.shape.groups
        if direction == 'forward':

            def forward():
                with use_backend(backend):
                    return dcnv4(operands.value, operands.offset_mask, groups=groups)

            return forward
        geometry = (groups, 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, False)
        if backend == 'native':
            return lambda: torch.ops.dcnzoo.dcnv4_backward(
                operands.grad_output, operands.value, operands.offset_mask, *geometry, deterministic
            )
        return gradients(lambda value, offsets: dcnv4(value, offsets, groups=groups), operands, backend)

    return make


def gradients(function: Callable, operands: Operands, backend: str | None = None) -> Call:
    """Only the backward of a function, over a graph recorded once."""
    inputs = [tensor.detach().requires_grad_() for tensor in (operands.value, operands.offset_mask)]
    if backend is None:
        output = function(*inputs)
    else:
        with use_backend(backend):
            output = function(*inputs)
    return lambda: torch.autograd.grad(output, inputs, operands.grad_output, retain_graph=True)


def published(operands: Operands, direction: str) -> Call:
    """The published operator, where its package `DCNv4` is installed."""
    try:
        functions = importlib.import_module('DCNv4.functions.dcnv4_func')
    except ImportError as error:
        raise Missing(f'the package DCNv4 does not import: {error}') from error
    shape = operands.shape
    width = shape.channels // shape.groups
    sizes = shape.batch, shape.height, shape.width, shape.groups, width
    spec = functions.findspec if direction == 'forward' else functions.find_spec_bwd
    geometry = (3, 3, 1, 1, 1, 1, 1, 1, shape.groups, width, 1.0, 256)
    inputs = operands.value, operands.offset_mask
    if direction == 'forward':
        return lambda: functions.ext.dcnv4_forward(*inputs, *geometry, False, *spec(*sizes), False)
    return lambda: functions.ext.dcnv4_backward(*inputs, *geometry, operands.grad_output, False, *spec(*sizes), False)


def grid_sample(operands: Operands, direction: str) -> Call:
    with torch.device('cuda'):
        call = composition(operands, backward=False)
    if direction != 'forward':
        raise Missing('its backward allocates too much to be recorded beside the others')
    return call


def depthwise(size: int) -> Callable[[Operands, str], Call]:
    def make(operands: Operands, direction: str) -> Call:
        channels = operands.shape.channels
        value = operands.value.permute(0, 3, 1, 2)
        weight = torch.randn(channels, 1, size, size, device='cuda', dtype=value.dtype)
        if direction == 'forward':
            return lambda: F.conv2d(value, weight, padding=size // 2, groups=channels)
        inputs = [value.detach().requires_grad_(), weight.requires_grad_()]
        output = F.conv2d(*inputs, padding=size // 2, groups=channels)
        grad_output = operands.grad_output.permute(0, 3, 1, 2)
        return lambda: torch.autograd.grad(output, inputs, grad_output, retain_graph=True)

    return make


def deterministic(operands: Operands, direction: str) -> Call:
    if direction == 'forward':
        raise Missing('the forward is deterministic in any case')
    return on_backend('native')(operands, direction, True)


OURS = 'dcnzoo'
PEERS: dict[str, Callable[[Operands, str], Call]] = {
    OURS: on_backend('native'),
    'dcnzoo-deterministic': deterministic,
    'dcnzoo-triton': on_backend('triton'),
    'published': published,
    'composition': grid_sample,
    'depthwise3': depthwise(3),
    'depthwise7': depthwise(7),
}


def time_peer(name: str, shape: Shape, dtype: torch.dtype, direction: str, options: Namespace) -> list[float]:
    """Seconds a call of one peer on one shape, over operands that together are larger than the L2 cache."""
    size = torch.empty(0, dtype=dtype).element_size()
    pixels = shape.batch * shape.height * shape.width
    bytes_of_one = size * pixels * (3 * shape.channels + 2 * shape.packed)
    cache = torch.cuda.get_device_properties('cuda').L2_cache_size
    copies = max(2, min(32, -(-3 * cache // bytes_of_one)))
    calls = [PEERS[name](operands, direction) for operands in operands_of(shape, dtype, copies)]
    (once, *_) = replay(calls, 1)
    return replay(calls, max(5, options.rounds), max(1, round(options.seconds / (once * copies * options.rounds))))


def run(options: Namespace) -> None:
    """Measures the peers on all shapes, prints one table a direction and type, and keeps JSON and a chart."""
    names = list(dict.fromkeys([OURS, *(options.peers or PEERS)]))
    if unknown := set(names) - set(PEERS):
        raise SystemExit(f'--peers: no such peer as {", ".join(sorted(unknown))}; there are {", ".join(PEERS)}')
    dtypes = [getattr(torch, name) for name in options.dtypes]
    memory, l1 = copy_bandwidth(), l1_bandwidth()
    shapes = [*PAPER, *zoo(options.batch)]
    results, missing = [], {}
    for dtype in dtypes:
        for direction in DIRECTIONS:
            for shape in shapes:
                bounds = floors(shape, dtype.itemsize, direction == 'backward', memory, l1)
                for name in names:
                    try:
                        times = time_peer(name, shape, dtype, direction, options)
                    except Missing as reason:
                        missing[f'{name}, {direction}'] = str(reason)
                        continue
                    lower, median, upper = (1e6 * time for time in statistics.quantiles(times, n=4, method='inclusive'))
                    bound = max(bounds) if direction == 'forward' else bounds[0]
                    results.append(
                        Result(name, direction, str(dtype), shape.name, median, lower, upper, bound, *bounds)
                    )
                    torch.cuda.empty_cache()
            show(results, names, shapes, direction, str(dtype), missing)
    device = torch.cuda.get_device_name().replace(' ', '_').lower()
    settings = {'batch': options.batch, 'rounds': options.rounds, 'seconds': options.seconds}
    limits = {'copy_bytes_per_second': memory, 'l1_bytes_per_second': l1}
    path = report.save(
        options.name or f'op_{device}', 'cuda', settings, results, options.output, missing=missing, limits=limits
    )
    panels = {
        f'{direction}, {options.dtypes[0]}': {
            name: sum(r.median for r in results if (r.peer, r.direction, r.dtype) == (name, direction, str(dtypes[0])))
            for name in names
            if f'{name}, {direction}' not in missing
        }
        for direction in DIRECTIONS
    }
    report.chart(path.with_suffix('.png'), 'All shapes', 'microseconds', panels, logarithmic=True)


def show(
    results: list[Result], names: list[str], shapes: list[Shape], direction: str, dtype: str, missing: dict[str, str]
) -> None:
    rows = []
    for shape in shapes:
        times = {r.peer: r for r in results if (r.direction, r.dtype, r.shape) == (direction, dtype, shape.name)}
        if OURS not in times:
            continue
        ours = times[OURS]
        peers = [
            f'{times[name].median:.1f} ({times[name].median / ours.median:.2f})' if name in times else '-'
            for name in names[1:]
        ]
        spread = f'{ours.lower:.1f} - {ours.upper:.1f}'
        rows.append(
            [shape.name, f'{ours.floor:.1f}', f'{ours.median:.1f}', spread, f'{ours.median / ours.floor:.2f}', *peers]
        )
    columns = ['', 'floor', OURS, 'quartiles', 'to floor', *names[1:]]
    title = f'{direction}, {dtype}, microseconds (in brackets: times dcnzoo)'
    report.table(title, columns, rows, report.caption(missing))
