"""Published key layouts, and the outputs that belong to weights and images made from names and seeds."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

_FOLDER = Path(__file__).parent
KEYS: dict[str, dict[str, list[int]]] = json.loads((_FOLDER / 'keys.json').read_text())
OUTPUTS = load_file(_FOLDER / 'models.safetensors')


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
