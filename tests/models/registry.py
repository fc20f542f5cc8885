"""The models under test, found in timm's registry: an architecture joins the tests by being registered."""

import functools
import math

import timm
import torch
from timm.models import model_entrypoint

import dcnzoo  # noqa: F401  (registers the models)

SMALL = 5e6
MEDIUM = 36e6
LARGE = 400e6


@functools.cache
def parameter_count(name: str) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def models(at_most: float = float('inf')) -> list[str]:
    """Names of dcnzoo's models with at most so many parameters, smallest first."""
    names = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith('dcnzoo.')]
    return sorted((name for name in names if parameter_count(name) <= at_most), key=parameter_count)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Adds noise to every parameter, so that branches that start at zero take part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.2 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.1
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def create(name: str, **kwargs) -> torch.nn.Module:
    """A model with noise on its parameters, in eval mode."""
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **kwargs)).eval()
