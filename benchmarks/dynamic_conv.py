"""DynamicConv2d beside timm's CondConv2d, over the layers of parameternet_600m, and the whole network.

The floor of a layer is what no dynamic convolution can leave out, one after another: the routing from the input's
average, mixing the kernels of every sample, and a convolution with kernels that all samples share.
"""

import functools
import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from torch import Tensor, nn

from dcnzoo.layers import DynamicConv2d

from . import report
from .timing import Timing, measure, time_calls

MODEL = 'parameternet_600m'
SIZE = 224
EXPERTS = 4
BATCHES = (1, 8, 64)
MOST_TRAINED = 32  # images on which whole networks train, one after another, within 24 GiB
OURS, PEER, STATIC, FLOOR = 'dcnzoo', 'timm', 'static', 'floor'
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DIRECTIONS = {'forward': False, 'forward+backward': True}


@dataclass(frozen=True)
class Layer:
    """One dynamic convolution of the network, and its input's size."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    size: int

    @property
    def kind(self) -> str:
        if self.kernel_size == (1, 1):
            return '1x1'
        kernel = 'x'.join(map(str, self.kernel_size))
        return f'{kernel} depthwise' if self.groups > 1 else kernel

    @property
    def name(self) -> str:
        stride = f' stride {self.stride[0]}' if self.stride != (1, 1) else ''
        return f'{self.kind}{stride} {self.in_channels} -> {self.out_channels}, {self.size}x{self.size}'


@dataclass(frozen=True)
class Result:
    peer: str
    layer: str
    count: int
    batch: int
    threads: int
    layout: str
    direction: str
    seconds: Timing
    saved_bytes: int = 0
    """what the forward pass keeps for the backward pass"""
    peak_bytes: int = 0
    """the most that a call of the whole network holds at once, what it was given left out"""


def layers() -> Counter[Layer]:
    """The network's dynamic convolutions with how often each occurs."""
    found: Counter[Layer] = Counter()

    def note(module: DynamicConv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        bank = module.cond_conv
        found[
            Layer(
                bank.in_channels,
                bank.out_channels,
                bank.kernel_size,
                bank.stride,
                bank.padding,
                bank.groups,
                inputs[0].shape[-1],
            )
        ] += 1

    with torch.device('meta'), torch.no_grad():
        model = timm.create_model(MODEL).eval()
        for module in model.modules():
            if isinstance(module, DynamicConv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, SIZE, SIZE))
    return found


class TimmDynamicConv2d(nn.Module):
    """The published layer: a routing of one linear layer and timm's CondConv2d."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.cond_conv = CondConv2d(*args, num_experts=EXPERTS, **kwargs)
        self.routing = nn.Linear(self.cond_conv.in_channels, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.cond_conv(x, torch.sigmoid(self.routing(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Floor(nn.Module):
    """Routing, mixing and a static convolution, each on its own."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.conv = static(layer)
        self.routing = nn.Linear(layer.in_channels, EXPERTS)
        self.experts = nn.Parameter(torch.randn(EXPERTS, self.conv.weight.numel()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.routing(x.mean((2, 3))).sigmoid() @ self.experts


def static(layer: Layer) -> nn.Conv2d:
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        groups=layer.groups,
        bias=False,
    )


def make_module(peer: str, layer: Layer) -> nn.Module:
    arguments = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    if peer == OURS:
        return DynamicConv2d(*arguments, groups=layer.groups, num_experts=EXPERTS)
    if peer == PEER:
        return TimmDynamicConv2d(*arguments, groups=layer.groups)
    return static(layer) if peer == STATIC else Floor(layer)


def make_call(module: nn.Module, x: Tensor, backward: bool) -> tuple[Callable[[], object], int]:
    """A call of the module, with gradients to input and parameters or without, and the bytes it keeps for them."""
    if not backward:

        def infer() -> object:
            with torch.inference_mode():
                return module(x)

        return infer, 0

    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = module(x)
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = sum(size for pointer, size in kept.items() if pointer not in known)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad_outputs = [torch.randn_like(output) for output in outputs]

    def train() -> object:
        outputs = module(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, grad_outputs)

    return train, saved


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that the allocator has given out at once during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def make_network(peer: str) -> nn.Module:
    """The whole network with the peer's convolutions."""
    model = timm.create_model(MODEL, num_experts=0 if peer == STATIC else EXPERTS)
    if peer == PEER:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, DynamicConv2d):
                    bank = child.cond_conv
                    setattr(
                        parent,
                        name,
                        TimmDynamicConv2d(
                            bank.in_channels,
                            bank.out_channels,
                            bank.kernel_size,
                            bank.stride,
                            bank.padding,
                            groups=bank.groups,
                        ),
                    )
    return settle(model)


def settle(model: nn.Module) -> nn.Module:
    """Fits the statistics of BatchNorm to noise: untrained maps would fade into subnormal numbers, which are slow."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, SIZE, SIZE))
    for norm in norms:
        norm.momentum = 0.1
    return model


def run(options: Namespace) -> None:
    batches = [options.batch] if options.batch else BATCHES
    threads = options.threads or ([1, 2] if options.device == 'cpu' else [torch.get_num_threads()])
    counts = layers()
    results: list[Result] = []
    settings = {'batches': batches, 'threads': threads, 'layouts': options.layouts, 'rounds': options.rounds}
    name = options.name or f'dynamic_conv_{options.device}'

    def keep() -> None:  # at once: all of it takes half an hour
        report.save(name, options.device, settings, results, options.output)

    for setting in itertools.product(batches, threads, options.layouts, DIRECTIONS):
        batch, count, _, direction = setting
        torch.set_num_threads(count)
        for layer, occurrences in counts.items():
            modules = {peer: make_module(peer, layer) for peer in (OURS, PEER, STATIC, FLOOR)}
            shape = (batch, layer.in_channels, layer.size, layer.size)
            results += measure_modules(modules, shape, layer.name, occurrences, setting, options)
        show_layers(results, counts, setting)
        keep()
        if DIRECTIONS[direction] and batch > MOST_TRAINED:
            continue
        networks = {peer: make_network(peer) for peer in (OURS, PEER, STATIC)}
        results += measure_modules(networks, (batch, 3, SIZE, SIZE), MODEL, 1, setting, options)
        show_network(results, setting)
        keep()


def measure_modules(
    modules: dict[str, nn.Module],
    shape: tuple[int, ...],
    name: str,
    count: int,
    setting: tuple[int, int, str, str],
    options: Namespace,
) -> list[Result]:
    _, _, layout, direction = setting
    x = torch.randn(shape, device=options.device).to(memory_format=LAYOUTS[layout])
    training = DIRECTIONS[direction]
    calls, saved, peaks = {}, {}, dict.fromkeys(modules, 0)
    for peer, module in modules.items():
        module.to(options.device, memory_format=LAYOUTS[layout]).train(training)
        call, saved[peer] = make_call(module, x, training)
        if name == MODEL and options.device == 'cpu':
            peaks[peer] = peak_bytes(call)
        calls[peer] = functools.partial(time_calls, call, device=options.device)
    timings = measure(calls, options.rounds, options.seconds / 10)
    return [Result(peer, name, count, *setting, timing, saved[peer], peaks[peer]) for peer, timing in timings.items()]


def chosen(results: list[Result], setting: tuple[int, int, str, str]) -> list[Result]:
    return [result for result in results if (result.batch, result.threads, result.layout, result.direction) == setting]


def show_layers(results: list[Result], counts: Counter[Layer], setting: tuple[int, int, str, str]) -> None:
    kinds: dict[str, list[str]] = {}
    for layer in counts:
        kinds.setdefault(layer.kind, []).append(layer.name)
    kinds['all layers'] = [layer.name for layer in counts]
    rows = []
    for kind, names in kinds.items():
        part = [result for result in chosen(results, setting) if result.layer in names]
        seconds, shortest = (
            {
                peer: sum(result.count * getattr(result.seconds, key) for result in part if result.peer == peer)
                for peer in (OURS, PEER, STATIC, FLOOR)
            }
            for key in ('median', 'shortest')
        )
        saved = {
            peer: sum(result.count * result.saved_bytes for result in part if result.peer == peer)
            for peer in (OURS, PEER)
        }
        ratios = sorted(
            (theirs.seconds.shortest / ours.seconds.shortest, ours.layer)
            for ours in part
            for theirs in part
            if (ours.peer, theirs.peer) == (OURS, PEER) and ours.layer == theirs.layer
        )
        rows.append(
            [
                kind,
                str(sum(result.count for result in part if result.peer == OURS)),
                *(f'{1e3 * seconds[peer]:.2f}' for peer in (OURS, PEER, STATIC, FLOOR)),
                f'{seconds[PEER] / seconds[OURS]:.2f}',
                f'{shortest[PEER] / shortest[OURS]:.2f}',
                f'{shortest[PEER] / shortest[FLOOR]:.2f}',
                f'{ratios[0][0]:.2f} - {ratios[-1][0]:.2f}',
                f'{saved[OURS] / saved[PEER]:.2f}' if saved[PEER] else '',
            ]
        )
    report.table(
        f'layers of {MODEL}, {describe(setting)}, milliseconds (median)',
        ['', 'layers', OURS, PEER, STATIC, FLOOR, f'{PEER} / {OURS}', 'shortest', f'to {FLOOR}', 'per layer', 'memory'],
        rows,
        f'"shortest" and what follows are of the shortest calls: {PEER} / {OURS}, {PEER} / {FLOOR}, the range of '
        f'{PEER} / {OURS};\n"memory" is what {OURS} keeps for the backward pass over that of {PEER}',
    )


def show_network(results: list[Result], setting: tuple[int, int, str, str]) -> None:
    part = {result.peer: result for result in chosen(results, setting) if result.layer == MODEL}
    static_seconds = part[STATIC].seconds.median
    rows = [
        [
            peer,
            f'{1e3 * result.seconds.median:.1f}',
            f'{1e3 * result.seconds.shortest:.1f}',
            f'{result.seconds.median / static_seconds:.2f}',
            f'{result.seconds.shortest / part[STATIC].seconds.shortest:.2f}',
            f'{result.saved_bytes / 2**20:.0f}' if result.saved_bytes else '',
            f'{result.peak_bytes / 2**20:.0f}' if result.peak_bytes else '',
        ]
        for peer, result in part.items()
    ]
    report.table(
        f'{MODEL}, {describe(setting)}',
        ['', 'ms (median)', 'shortest', 'to static', 'shortest to static', 'kept (MiB)', 'peak (MiB)'],
        rows,
    )


def describe(setting: tuple[int, int, str, str]) -> str:
    batch, threads, layout, direction = setting
    return f'{direction}, {layout}, batch {batch}, {threads} CPU thread(s)'
