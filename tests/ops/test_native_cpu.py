"""What is particular to the compiled CPU operator: its instruction sets, its addressing, and its split over threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcnzoo.ops import available_backends, dcnv4, use_backend
from tests.ops.cases import CASES, Case, answer, check, run

pytestmark = pytest.mark.skipif(
    'native' not in available_backends('cpu'), reason='the CPU library was not built (there is no C++ compiler)'
)
ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def native():
    with use_backend('native'):
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_with_capability(name: str, code: str) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own, where the kernels use the instruction set of that name."""
    return subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, 'DCNZOO_CPU_CAPABILITY': name, 'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )


def check_all_cases() -> None:
    """All cases and types, twice: the second time from numbers that are not finite here and there."""
    torch.set_num_threads(1)
    for case in CASES:
        for dtype in DTYPES:
            value, offset_mask, grad_output = case.operands(dtype)
            check(
                run(case.geometry, value, offset_mask, grad_output),
                answer(case.geometry, value, offset_mask, grad_output),
                dtype,
            )
            value[..., ::5, :] = float('nan')
            value[:, ::7] = float('-inf')
            with torch.no_grad(), use_backend('reference'):
                expected = dcnv4(value.double(), offset_mask.double(), **case.geometry)
            output = dcnv4(value, offset_mask, **case.geometry)
            # The reference's coordinates are rounded otherwise, and a point on a pixel may fall to another cell.
            if dtype == torch.float64:
                assert torch.equal(output.isfinite(), expected.isfinite()), case.name


@pytest.mark.parametrize('capability', ['default', 'avx2', 'avx512'])
def test_every_instruction_set(capability):
    done = run_with_capability(capability, 'from tests.ops import test_native_cpu as t; t.check_all_cases()')
    if 'which this processor lacks' in done.stderr:
        pytest.skip(f'this processor has no {capability}')
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_named():
    code = (
        'import torch\nfrom dcnzoo.ops import dcnv4\ndcnv4(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 27), groups=1)'
    )
    done = run_with_capability('sse9', code)
    assert done.returncode != 0
    assert 'DCNZOO_CPU_CAPABILITY must be default, avx2 or avx512, got sse9' in done.stderr


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    'case',
    [
        Case('one_plane', batch=1, height=13, arguments={'groups': 1}),
        Case('three_planes', batch=3, arguments={'groups': 1, 'softmax': True}),
        Case('many_planes', batch=3, channels=64, arguments={'groups': 4}),
        Case('one_row', batch=1, height=1, width=40, arguments={'groups': 1}),
    ],
    ids=lambda case: case.name,
)
def test_bits_do_not_depend_on_threads_or_batch(case, dtype, threads):
    operands = case.operands(dtype)
    threads(1)
    expected = run(case.geometry, *operands)
    for count in (2, 3, 16):
        threads(count)
        assert all(map(torch.equal, run(case.geometry, *operands), expected))
    images = [run(case.geometry, *(tensor[i : i + 1] for tensor in operands)) for i in range(case.batch)]
    assert all(
        torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*images, strict=True), expected, strict=True)
    )


def test_rows_more_than_two_gibibytes_apart():
    """A view into memory of which most is never touched: its bytes are too far apart for 32-bit addresses."""
    distance = 2**30 + 64
    storage = torch.empty(3 * distance, dtype=torch.float16)
    value = storage.as_strided((1, 3, 5, 16), (3 * distance, distance, 16, 1))
    value.copy_(torch.randn(1, 3, 5, 16))
    offset_mask, grad_output = torch.randn(1, 3, 5, 27).half(), torch.randn(1, 3, 5, 16).half()
    geometry = {'groups': 1}
    with use_backend('native'):
        results = run(geometry, value, offset_mask, grad_output)
    check(results, answer(geometry, value.clone(), offset_mask, grad_output), torch.float16)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_rows_longer_than_float32_counts(dtype):
    """Beyond 2^24 pixels float32 has no odd coordinates; windows are placed far apart to keep the output small."""
    width, stride = 2**24 + 32, 2**21
    value = torch.randn(1, 1, width, 1).to(dtype)
    out = (width + 2 - 3) // stride + 1
    offset_mask = torch.randn(1, 1, out, 27).to(dtype)
    output = dcnv4(value, offset_mask, groups=1, stride=(1, stride))
    with use_backend('reference'):
        expected = dcnv4(value.float(), offset_mask.float(), groups=1, stride=(1, stride))
    torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=2e-3)


def test_more_than_two_to_the_31_elements():
    """Sixteen gigabytes of address space at most, of which the windows touch a few pages."""
    height, width, channels, stride = 2**11, 2**11, 2**10, 2**10
    try:
        value = torch.empty(1, height, width, channels, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f'this machine does not lend that much memory: {error}')
    assert value.numel() > 2**31
    windows = torch.cat([torch.arange(at - 1, at + 2).clamp(0, height - 1) for at in range(0, height, stride)])
    value[:, windows[:, None], windows] = torch.randn(1, len(windows), len(windows), channels).half()
    offset_mask = torch.zeros(1, 2, 2, 27 * 64).half()
    offset_mask.unflatten(-1, (64, 27))[..., 18:] = 1
    output = dcnv4(value, offset_mask, groups=64, stride=stride)
    near = value[:, windows[:, None], windows].float().unflatten(1, (2, 3)).unflatten(3, (2, 3))
    near[:, 0, 0], near[:, :, :, 0, 0] = 0, 0  # the first window reaches over the edge, where its copy was clamped
    torch.testing.assert_close(output.float(), near.sum((2, 4)), rtol=2e-3, atol=2e-2)
