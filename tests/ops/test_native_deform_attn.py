"""What is particular to the compiled CPU attention: its instruction sets, its counting, and its split over threads."""

import pytest
import torch

from dcnzoo.ops import available_backends, deform_attn, use_backend
from tests.ops.attention import CASES, Case, answer, check, run
from tests.ops.test_native_cpu import DTYPES, native, run_with_capability, threads  # noqa: F401

pytestmark = pytest.mark.skipif(
    'native' not in available_backends('cpu'), reason='the CPU library was not built (there is no C++ compiler)'
)


def check_all_cases() -> None:
    """All cases and types, twice: the second time from numbers that are not finite here and there."""
    torch.set_num_threads(1)
    for case in CASES:
        for dtype in DTYPES:
            operands = case.operands(dtype)
            check(run(case.shapes, *operands), answer(case.shapes, *operands), dtype)
            value, locations, weights, grad_output = operands
            value[:, ::5], locations[:, 1::4, 0], weights[:, 2::4] = float('nan'), float('inf'), float('nan')
            grad_output[:, ::6, 0] = float('-inf')
            results, expected = run(case.shapes, *operands), answer(case.shapes, *operands)
            assert all(map(torch.equal, (r.isfinite() for r in results), (e.isfinite() for e in expected))), case.name


@pytest.mark.parametrize('capability', ['default', 'avx2', 'avx512'])
def test_every_instruction_set(capability):
    done = run_with_capability(capability, 'from tests.ops import test_native_deform_attn as t; t.check_all_cases()')
    if 'which this processor lacks' in done.stderr:
        pytest.skip(f'this processor has no {capability}')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('depth', [32, 20])
def test_bits_do_not_depend_on_threads(dtype, depth, threads):  # noqa: F811
    case = Case('one_head', shapes=((9, 5), (4, 3)), batch=1, heads=1, depth=depth, queries=300)
    operands = case.operands(dtype)
    threads(1)
    expected = run(case.shapes, *operands)
    for count in (2, 3, 16):
        threads(count)
        assert all(map(torch.equal, run(case.shapes, *operands), expected))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_more_pixels_than_float32_counts(dtype):
    height, width = 2, 2**24 + 32
    value = torch.randn(1, height * width, 1, 1).to(dtype)
    x = (torch.tensor([0, 1, 2**24 - 1, width - 2]) + 0.75) / width
    locations = torch.stack((x, torch.full_like(x, 0.5)), -1).view(1, 4, 1, 1, 1, 2)
    weights = torch.ones(1, 4, 1, 1, 1)
    output = deform_attn(value, [(height, width)], locations, weights)
    with use_backend('reference'):
        expected = deform_attn(value.float(), [(height, width)], locations, weights)
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)
