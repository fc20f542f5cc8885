"""Properties of multi-scale deformable attention on random shapes, layouts and locations, for every backend at hand.

Where locations are put on the maps' edges, sizes are powers of two and coordinates multiples of 1/64 pixel, so that
float32 and float64 agree in which cell a sample lies. Errors are measured against the sum of the magnitudes of what is
added up.

`pytest tests/ops/test_deform_attn_properties.py --hypothesis-profile=fuzz` tries 10,000 examples of each property.
"""

import functools
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnzoo.ops import deform_attn, use_backend
from tests.ops.attention import NAMES, answer, definition, run
from tests.ops.cases import TOLERANCE
from tests.ops.properties import (
    INFINITY,
    LAYOUTS,
    NAN,
    assert_independent_of_threads,
    assert_near,
    assert_same,
    every_backend,
    examples,
    finite,
    needs_native,
    run_backend,
)


@dataclass(frozen=True)
class Problem:
    """One call of the operator, but for the random numbers, which follow from the seed."""

    batch: int
    shapes: tuple[tuple[int, int], ...]
    heads: int
    depth: int
    queries: int
    points: int
    dtype: torch.dtype
    other_dtype: torch.dtype
    special: bool
    layouts: tuple[str, ...]
    deterministic: bool
    seed: int

    def operands(self, device: str = 'cpu') -> tuple[Tensor, ...]:
        """Value, locations, weights and the output's gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        places = self.batch, self.queries, self.heads, len(self.shapes), self.points
        value = draw(self.batch, sum(height * width for height, width in self.shapes), self.heads, self.depth)
        weights, grad_output = draw(places), draw(self.batch, self.queries, self.heads * self.depth)
        sizes = torch.tensor(self.shapes).flip(1).double().view(-1, 1, 2)
        coordinates = torch.rand(*places, 2, generator=generator).double() * (sizes + 4) - 2.5
        if self.special:
            coordinates = (coordinates * 64).round() / 64
            for edge in (torch.full_like(sizes, -1), torch.zeros_like(sizes), sizes - 1, sizes, sizes - 1 / 64):
                chosen = torch.rand(coordinates.shape, generator=generator) < 0.04
                coordinates = torch.where(chosen, edge.expand_as(coordinates), coordinates)
            for number in (NAN, INFINITY, -INFINITY, 1e30, -1e30):
                coordinates[torch.rand(coordinates.shape, generator=generator) < 0.01] = number
            nowhere = ~coordinates.isfinite().all(-1)
            chosen = torch.rand(places, generator=generator)
            weights[nowhere & (chosen < 0.3)], weights[nowhere & (chosen > 0.7)] = NAN, INFINITY
            for tensor, number in ((value, NAN), (grad_output, INFINITY)):
                if torch.rand((), generator=generator) < 0.2:
                    tensor[torch.rand(tensor.shape, generator=generator) < 0.02] = number
        locations = (coordinates + 0.5) / sizes
        types = self.dtype, self.other_dtype, self.other_dtype, self.dtype
        return tuple(
            LAYOUTS[layout](tensor.to(device, dtype))
            for layout, tensor, dtype in zip(self.layouts, (value, locations, weights, grad_output), types, strict=True)
        )


@st.composite
def problems(draw, dtypes=tuple(TOLERANCE), special=True):
    special = special and draw(st.booleans())
    side = st.sampled_from([1, 2, 4, 8, 16]) if special else st.integers(1, 12)
    dtype = draw(st.sampled_from(dtypes))
    half = dtype in (torch.float16, torch.bfloat16)
    return Problem(
        batch=draw(st.integers(0, 3)),
        shapes=tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=4))),
        heads=draw(st.integers(1, 5)),
        depth=draw(st.one_of(st.sampled_from([8, 16, 32, 64]), st.integers(1, 40))),
        queries=draw(st.integers(0, 9)),
        points=draw(st.one_of(st.just(4), st.integers(1, 9))),
        dtype=dtype,
        other_dtype=torch.float32 if half and draw(st.booleans()) else dtype,
        special=special,
        layouts=tuple(draw(st.sampled_from(list(LAYOUTS))) for _ in range(4)),
        deterministic=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def magnitudes(problem: Problem, *operands: Tensor) -> tuple[Tensor, ...]:
    """Bounds on the sums of the magnitudes behind each number of the results."""
    value, locations, weights, grad_output = operands
    value, weights, grad_output = (finite(tensor).abs() for tensor in (value, weights, grad_output))
    output, grad_value, _, _ = answer(problem.shapes, value, locations, weights, grad_output)
    dots = grad_output.unflatten(2, (problem.heads, problem.depth)).sum(-1) * (value.max() if value.numel() else 0)
    dots = dots[..., None, None].expand_as(weights)
    sizes = torch.tensor(problem.shapes, device=value.device).flip(1).double().view(-1, 1, 2)
    return output, grad_value, (dots * weights).unsqueeze(-1) * sizes, dots


def compare(problem: Problem, operands, results) -> None:
    types = problem.dtype, problem.dtype, problem.other_dtype, problem.other_dtype
    assert results[0].is_contiguous() and tuple(result.dtype for result in results) == types
    expected, bounds = answer(problem.shapes, *operands), magnitudes(problem, *operands)
    for name, actual, wanted, bound in zip(NAMES, results, expected, bounds, strict=True):
        assert_near(name, actual, wanted, bound, problem.dtype)


@every_backend
def test_output_and_gradients_are_those_of_the_reference(device, backend):
    @settings(max_examples=examples(0.25 if backend == 'reference' else 1, backend))
    @given(problems())
    def holds(problem):
        operands = problem.operands(device)
        results = run_backend(backend, problem.deterministic, lambda: run(problem.shapes, *operands))
        compare(problem, operands, results)

    holds()


@every_backend
def test_it_is_the_published_definition(device, backend):
    @settings(max_examples=examples(0.1, backend))
    @given(problems(dtypes=(torch.float64,), special=False))
    def holds(problem):
        value, locations, weights, _ = problem.operands(device)
        with use_backend(backend):
            output = deform_attn(value, problem.shapes, locations, weights)
        if problem.batch and problem.queries:  # grid_sample takes no empty tensors
            expected = definition(value, problem.shapes, locations, weights)
            assert (output - expected).norm() <= 1e-12 * (1 + expected.norm())

    holds()


@needs_native
@settings(max_examples=examples(0.25))
@given(problems(), st.integers(1, 40))
def test_neither_threads_nor_the_rest_of_the_batch_matter(problem, more):
    problem = Problem(**{**problem.__dict__, 'queries': problem.queries * more})
    operands = problem.operands()
    with use_backend('native'):
        together = assert_independent_of_threads(lambda: run(problem.shapes, *operands))
        for i in range(problem.batch):
            alone = run(problem.shapes, *(operand[i : i + 1] for operand in operands))
            assert_same(alone, [result[i : i + 1] for result in together])
