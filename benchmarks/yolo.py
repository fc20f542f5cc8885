"""YOLO models with our blocks beside the stock ones: inference of an image, and a training step per image."""

import functools
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import report
from .timing import Timing, measure

BASES = 'yolo11n', 'yolov8n'


@dataclass(frozen=True)
class Result:
    model: str
    params: int
    inference: Timing
    training: Timing


def configurations() -> dict[str, dict]:
    """The stock models and all their variants, by name."""
    from dcnzoo.integrations.ultralytics import VARIANTS, model_config

    found = {}
    for base in BASES:
        for variant in (None, *VARIANTS):
            try:
                config = model_config(base, variant)
            except ValueError:  # the variant replaces a module that this base lacks
                continue
            found[config.name] = config
    return found


def clock(device: str) -> float:
    """Seconds of this process on a CPU, which other work on the machine hardly disturbs; on a GPU those that pass."""
    if device == 'cuda':
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def time_images(function: Callable[[], object], images: int, device: str, count: int) -> list[float]:
    """Times `count` calls, each of so many images: seconds an image."""
    seconds = []
    for _ in range(count):
        begin = clock(device)
        function()
        seconds.append((clock(device) - begin) / images)
    return seconds


def make_calls(config: dict, options: Namespace) -> tuple[int, Callable, Callable]:
    """Parameters, inference of one image by the fused model, and a training step of plain SGD on a batch."""
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    device, batch, size = options.device, options.batch, options.imgsz
    fused = DetectionModel(dict(config), verbose=False).eval().fuse(verbose=False).to(device)
    model = DetectionModel(dict(config), verbose=False).train().to(device)
    model.args = DEFAULT_CFG
    image = torch.rand(1, 3, size, size, device=device)
    targets = {
        'img': torch.rand(batch, 3, size, size, device=device),
        'cls': torch.arange(4.0 * batch, device=device).remainder(80).unsqueeze(1),
        'bboxes': torch.rand(4 * batch, 4, device=device) * 0.2 + 0.3,
        'batch_idx': torch.arange(batch, device=device).repeat_interleave(4).float(),
    }
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4, momentum=0.9)

    def infer() -> object:
        with torch.inference_mode():
            return fused(image)

    def step() -> None:
        loss, _ = model(targets)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    timed = (
        functools.partial(time_images, function, images, device) for function, images in ((infer, 1), (step, batch))
    )
    return sum(p.numel() for p in model.parameters()), *timed


def run(options: Namespace) -> None:
    torch.set_num_threads(options.threads[0])
    calls = {name: make_calls(config, options) for name, config in configurations().items()}
    inference, training = (
        measure({name: call[index] for name, call in calls.items()}, options.rounds, options.seconds)
        for index in (1, 2)
    )
    results = [Result(name, calls[name][0], inference[name], training[name]) for name in calls]
    report.table(
        f'YOLO, {options.imgsz} x {options.imgsz}, training in batches of {options.batch}, {options.device}, '
        f'{options.threads[0]} thread(s), medians',
        ['', 'params (M)', 'inference, ms an image', 'training, s an image'],
        [
            [
                result.model,
                f'{result.params / 1e6:.2f}',
                f'{1e3 * result.inference.median:.0f}',
                f'{result.training.median:.3f}',
            ]
            for result in results
        ],
        'On a CPU the time that the process spends, not the time that passes' if options.device == 'cpu' else None,
    )
    settings = {'imgsz': options.imgsz, 'batch': options.batch, 'threads': options.threads, 'rounds': options.rounds}
    report.save(options.name or f'yolo_{options.device}', options.device, settings, results, options.output)
