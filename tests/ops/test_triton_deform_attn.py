"""Multi-scale deformable attention in Triton: run by the interpreter, and compiled for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcnzoo.ops import available_backends, use_backend
from tests.ops.attention import Case, answer, check, run, shapes_of

triton = pytest.importorskip('triton')
from dcnzoo.ops import _triton_deform_attn  # noqa: E402
from tests.ops.test_triton import DEVICE, Compiler, compiled  # noqa: E402

KERNELS = '_forward_kernel', '_backward_kernel', '_ordered_kernel'
CASE = Case('detr', depth=32, heads=8)
# Interpreted, a kernel takes seconds: most cases are left to `slow`.
SELECTIONS = {
    'some': 'triton and ((test_output and float32 and (plain or depth_33)) or edges or weights-nan) or deterministic',
    'all': 'triton or deterministic',
}


@compiled
@pytest.mark.parametrize('selection', ['some', pytest.param('all', marks=pytest.mark.slow)])
def test_under_the_interpreter(selection):
    folder = Path(__file__).parent
    files = [folder / 'test_deform_attn.py', Path(__file__)]
    if selection == 'all':
        files.append(folder / 'test_deform_attn_properties.py')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', *files, '-k', SELECTIONS[selection]],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r'\d+ passed', result.stdout)


@pytest.mark.skipif(
    'triton' not in available_backends(DEVICE), reason='runs on a GPU, and in test_under_the_interpreter'
)
def test_deterministic_gradients():
    case = Case('tiny', shapes=((2, 2), (1, 2)), batch=1, heads=1, depth=5, queries=2, points=2)
    operands = case.operands(torch.float32, DEVICE)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with use_backend('triton'):
            first, second = run(case.shapes, *operands), run(case.shapes, *operands)
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(map(torch.equal, first, second))
    check(first, answer(case.shapes, *operands), torch.float32)


@compiled
@pytest.mark.parametrize('target', [('cuda', 90, 32), ('cuda', 80, 32), ('hip', 'gfx942', 64)], ids=str)
def test_kernels_compile(monkeypatch, target):
    from triton.backends.compiler import GPUTarget

    binaries = {}
    for name in KERNELS:
        kernel = Compiler(getattr(_triton_deform_attn, name), GPUTarget(*target), binaries)
        monkeypatch.setattr(_triton_deform_attn, name, kernel)
    for dtype in (torch.float16, torch.float32) if target[1] == 90 else (torch.bfloat16,):
        value, locations, weights, grad_output = CASE.operands(dtype)
        arguments = value, locations, weights, shapes_of(CASE)
        _triton_deform_attn.deform_attn(*arguments)
        _triton_deform_attn.deform_attn_backward(grad_output, *arguments, True)
        assert set(binaries) == set(KERNELS)
        _triton_deform_attn.deform_attn_backward(grad_output, *arguments, False)
    assert all(binaries.values())
