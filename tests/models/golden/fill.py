"""Weights made from key names and images made from seeds, so that no weight file has to travel.

Beside this file: `keys.json`, the key layouts of published checkpoints with their shapes, and `models.safetensors`, the
outputs that the published definitions give in float64 for weights and images made here.
"""

import zlib

import numpy as np
import torch


def value_for(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one entry, a function of its key and shape alone."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    n = rng.standard_normal(shape)
    if name.endswith('num_batches_tracked'):
        return np.zeros(shape, dtype=np.int64)
    if name.endswith('running_var'):
        return 1 + 0.1 * np.abs(n)
    if name.endswith('running_mean'):
        return 0.1 * n
    if 'gamma' in name.rsplit('.', 1)[-1]:
        return 0.5 + 0.1 * n
    if name.endswith('routing.weight'):
        return 0.3 * n / np.sqrt(shape[1])
    if name.endswith('cond_conv.weight'):
        return 2.3 * n * shape[1] ** -0.25 / np.sqrt(shape[0])
    if name.endswith('offset_mask.weight'):  # small offsets: large ones make the networks chaotic
        return 0.2 * n / np.sqrt(shape[1])
    if len(shape) >= 2:
        return n / np.sqrt(int(np.prod(shape[1:])))
    if name.endswith('weight'):
        return 1 + 0.1 * n
    return 0.1 * n


def fill(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A float64 state_dict for keys and shapes."""
    return {name: torch.from_numpy(np.asarray(value_for(name, tuple(shape)))) for name, shape in shapes.items()}


def image(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal images in float64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))
