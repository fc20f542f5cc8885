"""What offsets and modulation of deformable layers do."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcnzoo.ops.reference import sampling_points

from .checkpoint import append_text, write_text

COLUMNS = ('epoch', 'step', 'stage', 'layers', 'offset_mean', 'offset_max', 'outside', 'mask_min', 'mask_max')


@torch.no_grad()
def measure_deformation(model: nn.Module, images: Tensor) -> list[dict]:
    """Measures where the deformable layers of a network sample.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), as the network takes them.

    Returns:
        One row per stage, that is per size of the map: the number of layers; the mean and largest length of an offset
        in pixels of the map; the share of sampling points outside of the map; the range of the modulation. No rows if
        the network has no such layers.
    """
    with _Watch() as watch:
        model.forward(images)  # not __call__: a compiled model would see the mode
    rows = []
    for size, layers in watch.layers.items():
        columns = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        row = {'stage': f'1/{round(images.shape[-2] / size)}', 'layers': len(layers)}
        for name, values in columns.items():
            reduce = {'max': torch.max, 'min': torch.min}.get(name.rpartition('_')[2], torch.mean)
            row[name] = reduce(values).item()
        rows.append(row)
    return rows


class _Watch(TorchDispatchMode):
    """Measures each call of the aggregation, whichever layer makes it, by the height of the map."""

    def __init__(self):
        super().__init__()
        self.layers: dict[int, list[dict[str, Tensor]]] = {}
        self.watched = (torch.ops.dcnzoo.dcnv4.default, torch.ops.dcnzoo.dcnv4_triton.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.watched:
            self.layers.setdefault(args[0].shape[1], []).append(self.measure(*args))
        return func(*args, **(kwargs or {}))

    def measure(self, value: Tensor, offset_mask: Tensor, *geometry) -> dict[str, Tensor]:
        *grid, softmax = geometry
        x, y, mask = sampling_points(offset_mask.float(), *grid)
        x0, y0, _ = sampling_points(torch.zeros_like(offset_mask[:1], dtype=torch.float32), *grid)
        length = torch.hypot(x - x0, y - y0)
        height, width = value.shape[1:3]
        outside = (x <= -1) | (x >= width) | (y <= -1) | (y >= height)
        mask = mask.softmax(-1) if softmax else mask
        return {
            'offset_mean': length.mean(),
            'offset_max': length.max(),
            'outside': outside.float().mean(),
            'mask_min': mask.min(),
            'mask_max': mask.max(),
        }


class HealthLog:
    """health.csv: one row per measurement and stage, appended as they come.

    Args:
        path: of the file.
        step: rows of later updates are dropped, as a resumed run makes them anew, and so is one that is cut short.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = []
        if path.exists():
            with path.open(newline='') as file:
                kept = [row for row in csv.DictReader(file) if None not in row.values() and int(row['step']) <= step]
        write_text(path, self._lines(kept, head=True))

    def append(self, rows: list[dict]) -> None:
        append_text(self.path, self._lines(rows))

    def _lines(self, rows: list[dict], head: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
