"""The CUDA kernels of multi-scale deformable attention without a GPU, held to the float64 reference."""

import pytest
import torch

from tests.gpu.test_emulation import DTYPES, operators  # noqa: F401
from tests.ops.attention import CASES, Case, answer, check, shapes_of

PLAIN = Case('plain')


def run(operators, case, value, locations, weights, grad_output, deterministic=False):  # noqa: F811
    arguments = value, locations, weights, shapes_of(case)
    output = operators.deform_attn(*arguments)
    return output, *operators.deform_attn_backward(grad_output, *arguments, deterministic)


@pytest.mark.parametrize('deterministic', [False, True], ids=['default', 'deterministic'])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_output_and_gradients(operators, case, dtype, deterministic):  # noqa: F811
    operands = case.operands(dtype)
    check(run(operators, case, *operands, deterministic), answer(case.shapes, *operands), dtype)


@pytest.mark.parametrize('dtype', DTYPES[2:], ids=str)
def test_float32_beside_a_half_value(operators, dtype):  # noqa: F811
    value, locations, weights, grad_output = PLAIN.operands(torch.float32)
    operands = value.to(dtype), locations, weights, grad_output.to(dtype)
    results = run(operators, PLAIN, *operands)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    check(results, answer(PLAIN.shapes, *operands), dtype)


def misalign(tensor):
    return torch.cat((tensor.new_full((1,), float('nan')), tensor.flatten()))[1:].view_as(tensor)


def embed(tensor):
    wide = torch.nn.functional.pad(tensor, (8, 16), value=float('nan'))
    return wide[..., 8 : 8 + tensor.shape[-1]]


@pytest.mark.parametrize(
    'layout',
    [misalign, embed, lambda t: t[:1].expand_as(t), lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)],
    ids=['misaligned', 'embedded', 'expanded', 'transposed'],
)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_layouts(operators, dtype, layout):  # noqa: F811
    operands = [layout(operand) for operand in PLAIN.operands(dtype)]
    check(run(operators, PLAIN, *operands), answer(PLAIN.shapes, *operands), dtype)


@pytest.mark.parametrize('deterministic', [False, True], ids=['default', 'deterministic'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_numbers_that_are_not_finite_stay_where_they_are(operators, dtype, deterministic):  # noqa: F811
    value, locations, weights, grad_output = PLAIN.operands(dtype)
    locations[:, ::2, 1], weights[:, ::2, 1] = float('nan'), float('inf')
    results = run(operators, PLAIN, value, locations, weights, grad_output, deterministic)
    assert all(result.isfinite().all() for result in results)
    check(results, answer(PLAIN.shapes, value, locations, weights, grad_output), dtype)
    value[0, 5, 1, 3], grad_output[1, 3, 20] = float('nan'), float('inf')
    results = run(operators, PLAIN, value, locations, weights, grad_output, deterministic)
    expected = answer(PLAIN.shapes, value, locations, weights, grad_output)
    assert all(
        torch.equal(result.isfinite(), wanted.isfinite()) for result, wanted in zip(results, expected, strict=True)
    )


def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(operators):  # noqa: F811
    """The emulation runs a block's threads in another order each time."""
    operands = Case('crowded', shapes=((2, 3),), queries=40).operands(torch.float32)
    case = Case('crowded', shapes=((2, 3),))
    first, second = (run(operators, case, *operands, deterministic=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_too_many_levels_are_named(operators):  # noqa: F811
    case = Case('deep', shapes=((1, 1),) * 33)
    with pytest.raises(RuntimeError, match='the CUDA kernels take at most 32 levels, got 33'):
        run(operators, case, *case.operands(torch.float32))
