"""Properties of the operator on random shapes, parameters, layouts and coordinates, for every backend at hand.

Coordinates are exact: offsets are multiples of 1/64 and scales of 1/8, so that float32 and float64 agree in which cell
a point lies even on its edges, where the gradient jumps. Scales that are not exact are left to float64 and offsets that
miss the edges. Errors are measured against the sum of the magnitudes of what is added up, so that terms which happen to
cancel raise no false alarm.

`pytest tests/ops/test_properties.py --hypothesis-profile=fuzz` tries 10,000 examples of each property.
"""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcnzoo.ops import dcnv4, use_backend
from tests.ops.cases import TOLERANCE, answer, run
from tests.ops.properties import (
    INFINITY,
    INTERPRETED,
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

LAYOUTS = {
    **LAYOUTS,
    'channels_first': lambda tensor: tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    'cropped': lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 2, 1, 1, 2))[:, 1:-2, 2:-1],
}


@dataclass(frozen=True)
class Problem:
    """One call of the operator, but for the random numbers, which follow from the seed."""

    batch: int
    size: tuple[int, int]
    depth: int
    arguments: dict
    dtype: torch.dtype
    packed_dtype: torch.dtype
    spread: float
    exact: bool
    special: bool
    tail: int
    layouts: tuple[str, str, str]
    deterministic: bool
    seed: int

    @property
    def points(self) -> int:
        return math.prod(self.arguments['kernel_size']) - int(self.arguments['remove_center'])

    @property
    def out_size(self) -> tuple[int, int]:
        names = 'kernel_size', 'stride', 'padding', 'dilation'
        return tuple(
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, kernel, stride, pad, dilation in zip(
                self.size, *(self.arguments[name] for name in names), strict=True
            )
        )

    def operands(self, device: str = 'cpu') -> tuple[Tensor, Tensor, Tensor]:
        """Value, offset_mask and the output's gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        groups, points = self.arguments['groups'], self.points
        channels = groups * self.depth
        value = draw(self.batch, *self.size, channels)
        grad_output = draw(self.batch, *self.out_size, channels)
        packed = draw(self.batch, *self.out_size, groups, 3 * points)
        offset = packed[..., : 2 * points]
        offset *= self.spread
        if self.exact:
            offset.mul_(64).round_().div_(64)
        if self.special:
            self._plant(value, offset, packed[..., 2 * points :], grad_output, generator)
        tail = draw(self.batch, *self.out_size, self.tail)
        offset_mask = torch.cat((packed.flatten(3), tail), -1)
        types = self.dtype, self.packed_dtype, self.dtype
        return tuple(
            LAYOUTS[layout](tensor.to(device, dtype))
            for layout, tensor, dtype in zip(self.layouts, (value, offset_mask, grad_output), types, strict=True)
        )

    def _plant(self, value: Tensor, offset: Tensor, mask: Tensor, grad_output: Tensor, generator) -> None:
        """Puts some points on the map's edges, far away or nowhere, where even their mask must not matter."""
        scale = self.arguments['offset_scale']
        exactly_divisible = scale != 0 and math.frexp(scale)[0] in (0.5, -0.5)
        points = offset.unflatten(-1, (-1, 2))
        for axis, (size, here) in enumerate(zip(self.size[::-1], self._grid(), strict=True)):
            targets = (-1, 0, size - 1, size, size - 1 / 64, 1 / 64 - 1, size / 2, 0.5) if exactly_divisible else ()
            for target in targets:
                edge = (target - here) / (scale or 1)
                chosen = torch.rand(points.shape[:-1], generator=generator) < 0.04
                points[..., axis] = torch.where(chosen, edge.expand_as(points[..., axis]), points[..., axis])
            for number in (NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e9, -1e9, 65504, 1e-40):
                points[..., axis][torch.rand(points.shape[:-1], generator=generator) < 0.01] = number
        nowhere = ~points.isfinite().all(-1)
        if not self.arguments['softmax']:
            chosen = torch.rand(mask.shape, generator=generator)
            mask[nowhere & (chosen < 0.3)] = NAN
            mask[nowhere & (chosen > 0.7)] = INFINITY
        for tensor, number in ((value, NAN), (grad_output, INFINITY)):
            if torch.rand((), generator=generator) < 0.2:
                tensor[torch.rand(tensor.shape[:-1], generator=generator) < 0.05] = number

    def _grid(self) -> list[Tensor]:
        """Coordinates x, y of the sampling points without offsets, broadcastable to (N, Ho, Wo, groups, K)."""
        scale = self.arguments['offset_scale']
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (
            self.arguments[name] for name in ('kernel_size', 'stride', 'padding', 'dilation')
        )
        taps = [(i, j) for i in range(kw) for j in range(kh)]
        if self.arguments['remove_center']:
            taps.remove((kw // 2, kh // 2))
        coordinates = []
        for axis, (kernel, stride, pad, dilation) in enumerate(((kw, sw, pw, dw), (kh, sh, ph, dh))):
            center = (dilation * (kernel - 1)) >> 1
            window = torch.arange(self.out_size[1 - axis], dtype=torch.float64) * stride + center - pad
            tap = torch.tensor([point[axis] * dilation - center for point in taps], dtype=torch.float64)
            grid = window[:, None] + tap * scale
            coordinates.append(grid[None, None, :, None] if axis == 0 else grid[None, :, None, None])
        return coordinates


@st.composite
def problems(draw, dtypes=tuple(TOLERANCE), special=True):
    """Problems of every kind, small enough for the reference; with coordinates on edges and nowhere if `special`."""
    remove_center = draw(st.booleans())
    if remove_center:
        kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5)]))
    else:
        kernel = draw(st.one_of(st.just((3, 3)), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.just((7, 7))))
    stride, dilation = (draw(st.tuples(st.integers(1, 3), st.integers(1, 3))) for _ in range(2))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = tuple(low + draw(st.integers(0, 8)) for low in least)
    dtype = draw(st.sampled_from(dtypes))
    half = dtype in (torch.float16, torch.bfloat16)
    exact = dtype != torch.float64 or draw(st.booleans())
    scale = st.integers(-8, 24).map(lambda eighths: eighths / 8) if exact else st.floats(0.1, 3.0)
    arguments = {
        'groups': draw(st.integers(1, 4)),
        'kernel_size': kernel,
        'stride': stride,
        'padding': padding,
        'dilation': dilation,
        'offset_scale': draw(st.one_of(st.just(1.0), scale)),
        'remove_center': remove_center,
        'softmax': draw(st.booleans()),
    }
    return Problem(
        batch=draw(st.integers(0, 3)),
        size=size,
        depth=draw(st.one_of(st.sampled_from([16, 32, 8, 64]), st.integers(1, 40))),
        arguments=arguments,
        dtype=dtype,
        packed_dtype=torch.float32 if half and draw(st.booleans()) else dtype,
        spread=draw(st.sampled_from([0.5, 2.0, 20.0])),
        exact=exact,
        special=special and exact and draw(st.booleans()),
        tail=draw(st.integers(0, 9)),
        layouts=tuple(draw(st.sampled_from(list(LAYOUTS))) for _ in range(3)),
        deterministic=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def magnitudes(problem: Problem, value: Tensor, offset_mask: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Bounds on the sums of the magnitudes behind each number of output, grad_value, grad_offset and grad_mask."""
    value, offset_mask, grad_output = finite(value).abs(), finite(offset_mask), finite(grad_output).abs()
    groups, points = problem.arguments['groups'], problem.points
    packed = offset_mask[..., : 3 * groups * points].unflatten(-1, (groups, -1)).clone()
    if not problem.arguments['softmax']:
        packed[..., 2 * points :] = packed[..., 2 * points :].abs()
    output, grad_value, _ = answer(problem.arguments, value, packed.flatten(3), grad_output)
    mask = packed[..., 2 * points :]
    if problem.arguments['softmax']:
        mask = mask.softmax(-1)
    dots = grad_output.unflatten(-1, (groups, -1)).sum(-1, keepdim=True) * (value.max() if value.numel() else 0)
    grad_offset = mask.repeat_interleave(2, -1) * dots * abs(problem.arguments['offset_scale'])
    grad_mask = dots * (2 * mask if problem.arguments['softmax'] else torch.ones_like(mask))
    return output, grad_value, grad_offset, grad_mask


def compare(problem: Problem, operands, results) -> None:
    groups, points = problem.arguments['groups'], problem.points

    def parts(output, grad_value, grad_offset_mask):
        packed = grad_offset_mask[..., : 3 * groups * points].unflatten(-1, (groups, -1))
        return output, grad_value, packed[..., : 2 * points], packed[..., 2 * points :]

    output, grad_value, grad_offset_mask = results
    assert output.is_contiguous() and output.dtype == grad_value.dtype == problem.dtype
    assert grad_offset_mask.dtype == problem.packed_dtype
    assert not grad_offset_mask[..., 3 * groups * points :].any()
    names = 'output', 'grad_value', 'grad_offset', 'grad_mask'
    expected = answer(problem.arguments, *operands)
    bounds = magnitudes(problem, *operands)
    for name, actual, wanted, bound in zip(names, parts(*results), parts(*expected), bounds, strict=True):
        assert_near(name, actual, wanted, bound, problem.dtype)


@every_backend
def test_output_and_gradients_are_those_of_the_reference(device, backend):
    @settings(max_examples=examples(0.25 if backend == 'reference' else 1, backend))
    @given(problems())
    def holds(problem):
        operands = problem.operands(device)
        results = run_backend(backend, problem.deterministic, lambda: run(problem.arguments, *operands))
        compare(problem, operands, results)

    holds()


@every_backend
def test_linear_in_value_and_in_mask(device, backend):
    @settings(max_examples=examples(0.2, backend))
    @given(problems(dtypes=(torch.float64,), special=False), st.integers(0, 2**32 - 1))
    def holds(problem, seed):
        value, offset_mask, _ = problem.operands(device)
        generator = torch.Generator().manual_seed(seed)
        other = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(device)
        arguments = {**problem.arguments, 'softmax': False}
        *lead, packed = offset_mask.shape
        kinds = torch.arange(packed, device=device) % (3 * problem.points) >= 2 * problem.points
        masks = torch.randn(*lead, packed, generator=generator, dtype=torch.float64).to(device)
        masks, combined = torch.where(kinds, masks, offset_mask), torch.where(kinds, 3 * offset_mask - 2 * masks, 0)
        combined = torch.where(kinds, combined, offset_mask)
        with use_backend(backend):
            base, by_value = dcnv4(value, offset_mask, **arguments), dcnv4(other, offset_mask, **arguments)
            by_mask = dcnv4(value, masks, **arguments)
            magnitude = torch.where(kinds, combined.abs() + masks.abs(), combined)
            bound = dcnv4(value.abs() + other.abs(), magnitude, **arguments)
            for actual, expected in (
                (dcnv4(3 * value - 2 * other, offset_mask, **arguments), 3 * base - 2 * by_value),
                (dcnv4(value, combined, **arguments), 3 * base - 2 * by_mask),
            ):
                assert (actual - expected).norm() <= 1e-14 * (bound.norm() + base.norm()) * 8

    holds()


@every_backend
def test_without_offsets_and_with_unit_masks_it_is_a_depthwise_box_convolution(device, backend):
    @settings(max_examples=examples(0.1, backend))
    @given(problems(dtypes=(torch.float64, torch.float32), special=False))
    def holds(problem):
        value, offset_mask, grad_output = problem.operands(device)
        arguments = {**problem.arguments, 'offset_scale': 1.0, 'softmax': False}
        kinds = torch.arange(offset_mask.shape[3], device=device) % (3 * problem.points) >= 2 * problem.points
        offset_mask = kinds.to(problem.dtype).expand(offset_mask.shape)
        with use_backend(backend):
            output, grad_value, _ = run(arguments, value, offset_mask, grad_output)
        channels, kernel = value.shape[3], problem.arguments['kernel_size']
        box = torch.ones(channels, 1, *kernel, dtype=torch.float64, device=device)
        if problem.arguments['remove_center']:
            box[:, :, kernel[0] // 2, kernel[1] // 2] = 0
        image = value.double().permute(0, 3, 1, 2).requires_grad_()
        step = {name: problem.arguments[name] for name in ('stride', 'padding', 'dilation')}
        expected = torch.nn.functional.conv2d(image, box, **step, groups=channels)
        (grad_image,) = torch.autograd.grad(expected, image, grad_output.double().permute(0, 3, 1, 2))
        for actual, wanted in ((output, expected), (grad_value, grad_image)):
            difference = (actual.double() - wanted.detach().permute(0, 2, 3, 1)).norm()
            assert difference <= TOLERANCE[problem.dtype] * (value.double().norm() + grad_output.double().norm())

    holds()


@needs_native
@settings(max_examples=examples(0.25))
@given(problems())
def test_images_of_a_batch_do_not_depend_on_each_other(problem):
    operands = problem.operands()
    with use_backend('native'):
        together = run(problem.arguments, *operands)
        for i in range(problem.batch):
            alone = run(problem.arguments, *(operand[i : i + 1] for operand in operands))
            assert_same(alone, [result[i : i + 1] for result in together])


@needs_native
@settings(max_examples=examples(0.25))
@given(problems(), st.integers(1, 6))
def test_the_number_of_threads_does_not_matter(problem, scale):
    """With maps of up to 90 x 90 pixels besides, so that there is something to share out."""
    size = tuple(side * scale for side in problem.size) if problem.arguments['kernel_size'] == (3, 3) else problem.size
    operands = dataclasses.replace(problem, size=size).operands()
    with use_backend('native'):
        assert_independent_of_threads(lambda: run(problem.arguments, *operands))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is not made for threads")
@every_backend
def test_threads_of_python_may_call_at_once(device, backend):
    @settings(max_examples=examples(0.05))
    @given(st.lists(problems(), min_size=4, max_size=4))
    def holds(several):
        def call(problem):
            operands = problem.operands(device)
            with use_backend(backend):
                return operands, run(problem.arguments, *operands)

        with ThreadPoolExecutor(4) as pool:
            for problem, (operands, results) in zip(several * 2, pool.map(call, several * 2), strict=True):
                compare(problem, operands, results)

    holds()
