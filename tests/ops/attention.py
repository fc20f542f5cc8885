"""Cases of multi-scale deformable attention shared by the tests of all backends, and the float64 answer."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dcnzoo.ops import deform_attn, use_backend
from tests.ops.cases import TOLERANCE, error

NAMES = 'output', 'grad_value', 'grad_locations', 'grad_weights'


@dataclass(frozen=True)
class Case:
    """One call of the operator."""

    name: str
    shapes: tuple[tuple[int, int], ...] = ((6, 8), (3, 4))
    batch: int = 2
    heads: int = 3
    depth: int = 16
    queries: int = 7
    points: int = 4
    margin: float = 0.2  # how far locations lie outside [0, 1]

    def operands(self, dtype=torch.float64, device='cpu', seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random value, sampling_locations, attention_weights and output gradient."""
        generator = torch.Generator().manual_seed(seed)
        pixels = sum(height * width for height, width in self.shapes)
        places = self.batch, self.queries, self.heads, len(self.shapes), self.points
        value = torch.randn(self.batch, pixels, self.heads, self.depth, generator=generator, dtype=torch.float64)
        locations = torch.rand(*places, 2, generator=generator, dtype=torch.float64)
        locations = locations * (1 + 2 * self.margin) - self.margin
        weights = torch.randn(places, generator=generator, dtype=torch.float64)
        grad = torch.randn(self.batch, self.queries, self.heads * self.depth, generator=generator, dtype=torch.float64)
        return tuple(tensor.to(dtype=dtype, device=device) for tensor in (value, locations, weights, grad))


CASES = [
    Case('plain'),
    Case('one_level', shapes=((5, 7),)),
    Case('four_levels', shapes=((8, 12), (4, 6), (2, 3), (1, 2)), batch=1, heads=8, depth=32),
    Case('one_pixel', shapes=((1, 1), (1, 1))),
    Case('one_row', shapes=((1, 9), (7, 1))),
    Case('empty_batch', batch=0),
    Case('no_queries', queries=0),
    Case('one_point', points=1),
    Case('seven_points', points=7, heads=1),
    Case('many_points', points=40, batch=1, heads=1, queries=3),
    Case('many_heads', heads=40, depth=2, batch=1, queries=3),
    Case('depth_1', depth=1),
    Case('depth_3', depth=3),
    Case('depth_24', depth=24),
    Case('depth_32', depth=32),
    Case('depth_33', depth=33),
    Case('depth_64', depth=64),
    Case('depth_100', depth=100, heads=1),
    Case('far', margin=3.0),
]


def shapes_of(case: 'Case') -> list[int]:
    return [size for shape in case.shapes for size in shape]


def definition(value: Tensor, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The published definition: `grid_sample` level by level."""
    n, _, heads, depth = value.shape
    levels = value.split([height * width for height, width in shapes], 1)
    total = 0
    for i, (level, (height, width)) in enumerate(zip(levels, shapes, strict=True)):
        maps = level.permute(0, 2, 3, 1).reshape(n * heads, depth, height, width)
        grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        total = total + (samples * weights[:, :, :, i].transpose(1, 2).flatten(0, 1).unsqueeze(1)).sum(-1)
    return total.view(n, heads * depth, -1).transpose(1, 2)


def run(shapes, value: Tensor, locations: Tensor, weights: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Output and the three gradients by the backend in force."""
    operands = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = deform_attn(operands[0], shapes, *operands[1:])
    return output.detach(), *torch.autograd.grad(output, operands, grad_output)


def answer(shapes, *operands: Tensor) -> tuple[Tensor, ...]:
    """The same by the reference in float64, from operands of any dtype."""
    with use_backend('reference'):
        return run(shapes, *(operand.double() for operand in operands))


def check(results, expected, dtype: torch.dtype) -> None:
    for name, actual, wanted in zip(NAMES, results, expected, strict=True):
        if wanted.numel():
            assert error(actual, wanted) <= TOLERANCE[dtype], f'{name}: {error(actual, wanted):.2e}'
