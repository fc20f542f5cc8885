"""What a run would be, without training: --dry-run."""

import time
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from dcnzoo.macs import count_macs

from .checkpoint import atomic, write_json

if TYPE_CHECKING:
    from .loop import Trainer

POINTS = 1000  # of the curve of the learning rate
LOADED = 4  # batches


def write_plan(trainer: 'Trainer') -> dict:
    """Prints and writes plan/ in the run's folder: plan.json and lr.png.

    Returns:
        The content of plan.json.
    """
    accelerator, config, report, data = trainer.accelerator, trainer.config, trainer.report, trainer.data
    processes, accumulate = accelerator.num_processes, config.optim.accumulate
    model = deepcopy(trainer.network.plain).to('meta')
    size = tuple(trainer.network.config['pretrained_cfg']['input_size'])
    train_size = data.train_loader.dataset.shape
    batches = len(data.train_loader)
    updates = -(-batches // accumulate)
    rates = learning_rates(trainer)
    memory = estimate_memory(model, trainer, train_size)
    started = time.monotonic()
    loaded = sum(len(images) for images, *_ in islice(data.train_loader, LOADED))
    facts = {
        'model': trainer.network.config['architecture'],
        'parameters': sum(p.numel() for p in model.parameters()),
        'trained_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad),
        'macs': count_macs(model.eval(), size),
        'train_images': len(data.splits.train),
        'val_images': len(data.splits.val),
        'batch': config.data.batch_size * processes * accumulate,
        'updates_per_epoch': updates,
        'updates': updates * config.schedule.epochs,
        'highest_lr': max(rate for _, rate in rates),
        'last_lr': rates[-1][1],
        'memory_mib': {name: round(number / 2**20) for name, number in memory.items()},
        'loaded_images_per_second': round(loaded / (time.monotonic() - started), 1),
    }
    folder = trainer.output / 'plan'
    if accelerator.is_main_process:
        write_json(folder / 'plan.json', facts)
        draw_learning_rate(folder / 'lr.png', rates)
    report.say(
        f'{facts["macs"] / 1e9:.2f} GMACs per image; {facts["trained_parameters"] / 1e6:.2f} M parameters are trained'
    )
    report.say(
        f'{facts["updates"]} updates, {updates} per epoch, of {facts["batch"]} images '
        f'({processes} x {config.data.batch_size} x {accumulate})'
    )
    report.say(f'learning rate up to {facts["highest_lr"]:.3g}, at the end {facts["last_lr"]:.3g}')
    parts = ', '.join(f'{name} {number}' for name, number in facts['memory_mib'].items())
    report.say(f'about {sum(facts["memory_mib"].values())} MiB per process: {parts}')
    report.say(f'{facts["loaded_images_per_second"]:.0f} training images per second are loaded, start included')
    report.say(f'written to {folder}; nothing was trained')
    return facts


def learning_rates(trainer: 'Trainer') -> list[tuple[float, float]]:
    """(epoch, largest learning rate) over the whole schedule."""
    epochs, rates = trainer.config.schedule.epochs, []
    for point in range(POINTS + 1):
        epoch = epochs * point / POINTS
        trainer.rate.move_to(min(epoch, epochs - 1 / trainer.state.batches))
        rates.append((epoch, trainer.rate.highest))
    return rates


def estimate_memory(model: nn.Module, trainer: 'Trainer', size: tuple[int, ...]) -> dict[str, int]:
    """Bytes per process of weights, gradients, optimizer, average, and what the backward pass needs of a batch.

    What is counted are the tensors that are kept; what an allocator and workspaces need comes on top, and sharding is
    left out of account.

    Args:
        model: copy of the network on the meta device.
        trainer: of the run.
        size: channels, height and width of a training image.
    """
    config = trainer.config
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    halved = 2 if trainer.accelerator.mixed_precision in ('fp16', 'bf16') else 1
    return {
        'weights': weights,
        'gradients': trained,
        'optimizer': round(trained * states_per_weight(config.optim.name)),
        'average': weights if config.ema.decay else 0,
        'activations': saved_bytes(model.train(), size) * config.data.batch_size // halved,
    }


def states_per_weight(optimizer: str) -> float:
    """Numbers that an optimizer of timm keeps for each weight, found by one step on a small layer."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = create_optimizer_v2(layer, optimizer, lr=0.0)
    layer(torch.ones(1, 64)).square().sum().backward(create_graph=getattr(optimizer, 'is_second_order', False))
    optimizer.step(lambda: None)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() for value in kept) / layer.weight.numel()


def saved_bytes(model: nn.Module, size: tuple[int, ...]) -> int:
    """Bytes that autograd keeps per image, those of weights left out.

    Two images are passed, as batch norm asks for.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # kept alive, so that its address stands for it alone
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.empty(2, *size, device='meta'))
    return sum(storage.nbytes() for storage in kept.values()) // 2


def draw_learning_rate(path: Path, rates: list[tuple[float, float]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout='constrained')
    axes = figure.subplots()
    axes.plot(*zip(*rates, strict=True))
    axes.set(xlabel='epoch', ylabel='learning rate')
    axes.grid(alpha=0.3)
    with atomic(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)
