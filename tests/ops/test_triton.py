"""The Triton backend: compiled for GPUs that are not here, run by Triton's interpreter, and what is its own alone."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcnzoo.ops import available_backends, use_backend
from tests.ops.cases import CASES, Case, answer, check, error, run

triton = pytest.importorskip('triton')
from dcnzoo.ops import _triton_dcnv4 as _triton  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
KERNELS = '_forward_kernel', '_backward_kernel', '_window_kernel', '_ordered_kernel'
NAMED = {case.name: case for case in CASES}
TYPES = {
    torch.float16: 'fp16',
    torch.bfloat16: 'bf16',
    torch.float32: 'fp32',
    torch.float64: 'fp64',
    torch.int32: 'i32',
}

runs = pytest.mark.skipif(
    'triton' not in available_backends(DEVICE), reason='runs on a GPU, and in test_under_the_interpreter'
)
compiled = pytest.mark.skipif(INTERPRETED, reason='the interpreter does not compile')


@pytest.fixture
def triton_backend():
    with use_backend('triton'):
        yield


# Some of the cases are left to `slow`: interpreted, a kernel takes seconds.
_NAMES = 'pairs even kernel_7 scaled_dilated remove_center_5 one_pixel_no_padding one_channel width_33 much empty'
SELECTIONS = {
    'own': ('test_triton.py', ''),
    'cases': ('test_dcnv4.py', f'triton and test_output and float32 and ({" or ".join(_NAMES.split())})'),
    'types': ('test_dcnv4.py', 'triton and test_output and not float32 and (stride_2_odd or width_3- or width_33)'),
    'edges': (
        'test_dcnv4.py',
        'triton and (edge or infinite or finite or strided or packed or compile or float32_off)',
    ),
    'properties': ('test_properties.py', 'triton'),
    'all': ('test_dcnv4.py', 'triton'),
}


@compiled
@pytest.mark.parametrize(
    'selection', [pytest.param(name, marks=[pytest.mark.slow] * (name == 'all')) for name in SELECTIONS]
)
def test_under_the_interpreter(selection):
    file, expression = SELECTIONS[selection]
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', Path(__file__).with_name(file), '-k', expression],
        env={**os.environ, 'TRITON_INTERPRET': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r'\d+ passed', result.stdout)


class Compiler:
    """Takes a kernel's place and compiles for a GPU what would have been launched on it."""

    def __init__(self, kernel, target, binaries: dict):
        self.kernel, self.target, self.binaries = kernel, target, binaries

    def __getitem__(self, grid):
        assert all(0 < size < 2**31 for size in grid)
        return self._compile

    def _compile(self, *arguments, num_warps=4, enable_fp_fusion=True, **constants):
        names = self.kernel.arg_names
        assert list(constants) and len(arguments) + len(constants) == len(names)
        signature = dict.fromkeys(names, 'constexpr')
        divisible = {}
        for i, argument in enumerate(arguments):
            tensor = isinstance(argument, torch.Tensor)
            signature[names[i]] = f'*{TYPES[argument.dtype]}' if tensor else 'i32' if argument < 2**31 else 'i64'
            if tensor or argument % 16 == 0:
                divisible[(i,)] = [['tt.divisibility', 16]]
        indexed = {(names.index(name),): constant for name, constant in constants.items()}
        source = triton.compiler.ASTSource(self.kernel, signature, indexed, divisible)
        binary = triton.compile(
            source, target=self.target, options={'num_warps': num_warps, 'enable_fp_fusion': enable_fp_fusion}
        )
        self.binaries[self.kernel.__name__] = binary.asm


@pytest.fixture
def compile_for(monkeypatch):
    from triton.backends.compiler import GPUTarget

    def compile_for(case, dtype, architecture, deterministic=False):
        target = (
            GPUTarget('cuda', architecture, 32) if isinstance(architecture, int) else GPUTarget('hip', architecture, 64)
        )
        binaries = {}
        for name in KERNELS:
            monkeypatch.setattr(_triton, name, Compiler(getattr(_triton, name), target, binaries))
        value, offset_mask, grad_output = case.operands(dtype)
        geometry = case.geometry
        pairs = [geometry[name] for name in ('kernel_size', 'stride', 'padding', 'dilation') for _ in range(2)]
        flags = geometry.get('remove_center', False), geometry.get('softmax', False)
        arguments = geometry['groups'], *pairs, geometry.get('offset_scale', 1.0), *flags
        _triton.dcnv4(value, offset_mask, *arguments)
        _triton.dcnv4_backward(grad_output, value, offset_mask, *arguments, deterministic)
        return binaries

    yield compile_for
    monkeypatch.undo()


ZOO = Case('width_16', 1, 8, 8, 64, {'groups': 4}, tail=4)
WIDE = Case('width_32', 1, 8, 8, 128, {'groups': 4}, tail=4)
DCNV3 = Case('softmax', 1, 8, 8, 64, {'groups': 4, 'softmax': True, 'remove_center': True}, tail=4)
KERNEL_5 = Case('kernel_5', 1, 8, 8, 64, {'groups': 4, 'kernel_size': 5, 'padding': 2, 'softmax': True})
PLAIN = Case('plain', tail=2)


@compiled
@pytest.mark.parametrize(
    ('case', 'dtype', 'architecture'),
    [(ZOO, torch.float16, 90), (WIDE, torch.float16, 90), (DCNV3, torch.bfloat16, 80)],
    ids=lambda argument: getattr(argument, 'name', str(argument)),
)
def test_kernels_of_the_zoo_compile_without_spills(compile_for, case, dtype, architecture, tmp_path):
    binaries = compile_for(case, dtype, architecture)
    assert set(binaries) == {'_forward_kernel', '_backward_kernel', '_window_kernel'}
    cuobjdump = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    for name, asm in binaries.items():
        cubin = tmp_path / name
        cubin.write_bytes(asm['cubin'])
        usage = subprocess.run([cuobjdump, '-res-usage', cubin], capture_output=True, text=True, check=True).stdout
        registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
        assert stack == 0 and registers <= 192, f'{name}: {usage}'
    ptx = binaries['_forward_kernel']['ptx']
    assert len(re.findall(r'ld\.global\.v4\.b32', ptx)) == 4 * (9 - case.geometry.get('remove_center', False))


@compiled
@pytest.mark.parametrize(
    ('case', 'dtype', 'architecture', 'deterministic'),
    [
        (ZOO, torch.float16, 'gfx942', False),
        (KERNEL_5, torch.bfloat16, 90, False),
        (PLAIN, torch.float32, 90, False),
        (DCNV3, torch.float64, 90, True),
    ],
    ids=lambda argument: getattr(argument, 'name', str(argument)),
)
def test_kernels_compile(compile_for, case, dtype, architecture, deterministic):
    binaries = compile_for(case, dtype, architecture, deterministic)
    extra = {'_ordered_kernel'} if deterministic else {'_window_kernel'} if architecture == 'gfx942' else set()
    assert set(binaries) == {'_forward_kernel', '_backward_kernel', *extra}


@runs
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(
    'arguments', [{}, {'softmax': True, 'stride': 2, 'offset_scale': 0.7}], ids=['plain', 'softmax']
)
def test_deterministic_backward(triton_backend, arguments, dtype, monkeypatch):
    case = Case('small', 1, 4, 3, 10, {'groups': 1, **arguments})
    operands = case.operands(dtype, DEVICE)
    monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: True)
    results = run(case.geometry, *operands)
    check(results, answer(case.geometry, *operands), dtype)
    if DEVICE == 'cuda':
        for _ in range(3):
            assert all(map(torch.equal, run(case.geometry, *operands), results))


@runs
@pytest.mark.parametrize(
    ('dtype', 'spread', 'depth', 'arguments'),
    [
        (torch.float16, 0.5, 16, {}),
        (torch.bfloat16, 4.0, 16, {'softmax': True, 'remove_center': True}),
        (torch.float16, 4.0, 33, {'offset_scale': 0.37, 'dilation': (1, 2)}),
        (torch.bfloat16, 1.5, 20, {'kernel_size': (2, 4), 'padding': (1, 2)}),
    ],
)
def test_windows_add_up_to_what_scattering_gives(triton_backend, dtype, spread, depth, arguments, monkeypatch):
    case = Case('window', 1, 10, 9, depth, {'groups': 1, **arguments}, spread)
    operands = case.operands(dtype, DEVICE)
    asked = []
    margins = _triton._window_margins
    monkeypatch.setattr(_triton, '_window_margins', lambda *a: asked.append(margins(*a)) or asked[-1])
    _, grad_value, grad_offset_mask = run(case.geometry, *operands)
    assert asked != [None]
    monkeypatch.setattr(_triton, '_window_margins', lambda *_: None)
    _, scattered, same = run(case.geometry, *operands)
    assert error(grad_value, scattered.double()) < (1e-3 if dtype == torch.float16 else 8e-3)
    assert error(grad_offset_mask, same.double()) < 1e-3


@runs
def test_windows_leave_numbers_alone_that_half_a_float_cannot_hold(triton_backend):
    """Infinite gradients, and masks beyond float16 in float32, neither spread over a window nor overflow."""
    case = Case('window', 2, 7, 9, 16, {'groups': 1})
    value, offset_mask, grad_output = case.operands(torch.float16, DEVICE)
    value, grad_output = value * 1e-3, grad_output * 1e-3
    offset_mask = offset_mask.float()
    grad_output[0, 2, 3, 5], grad_output[1, 0, 0, 9] = float('inf'), float('nan')
    offset_mask[0, 5, 5, 18:27] = 1e5
    results = run(case.geometry, value, offset_mask, grad_output)
    expected = answer(case.geometry, value, offset_mask, grad_output)
    assert 0 < (~expected[1].isfinite()).sum() < 80
    check(results, expected, torch.float16)


@compiled
def test_window_margins_keep_near_points_within_the_window():
    """The arithmetic behind the window: no near point of any of 8 x 8 output pixels leaves it, for any geometry."""
    value, found = torch.empty(1, 40, 40, 32, dtype=torch.float16), 0
    for kernel, stride, pad, dilation, scale in itertools.product(
        (1, 2, 3, 4), (1, 2), (0, 1, 3), (1, 2), (0.3, 0.5, 1.0, 1.7, 2.0)
    ):
        constants = _triton._constants(
            value, 2, kernel, kernel, stride, stride, pad, pad, dilation, dilation, scale, False, False
        )
        margins = _triton._window_margins(value, constants)
        if margins is None:
            continue
        found += 1
        origin, margin = constants['ORIGIN_W'], margins[1]
        assert margin >= 1 and margins[0] == margin
        for first in (0, 8, 24):
            left = (first * stride + origin - margin) // 1
            least = first * stride + origin - margin
            most = (first + 7) * stride + origin + (kernel - 1) * dilation * scale + margin
            assert left <= least and most - left <= 15
    assert found > 50


@runs
@pytest.mark.parametrize('name', ['stride_2_odd', 'width_3'])
def test_tiles_of_the_size_used_on_gpus(triton_backend, name, monkeypatch):
    monkeypatch.setattr(_triton, '_ROWS', 64)
    case = NAMED[name]
    operands = case.operands(torch.float32, DEVICE)
    check(run(case.geometry, *operands), answer(case.geometry, *operands), torch.float32)


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_kernels_of_many_points_with_softmax(triton_backend, dtype):
    case = Case('kernel_5', 1, 5, 6, 16, {'kernel_size': 5, 'padding': 2, 'softmax': True})
    operands = case.operands(dtype, DEVICE)
    check(run(case.geometry, *operands), answer(case.geometry, *operands), dtype)


@runs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_rows_that_lie_more_than_2_31_numbers_apart(triton_backend, dtype):
    case = Case('far_apart', 1, 4, 4, 16, {'groups': 1})
    operands = list(case.operands(dtype, DEVICE))
    step = 2**30
    for i, operand in enumerate(operands[:2]):
        # Memory that is not touched is not taken.
        far = torch.empty(3 * step + 4 * operand.shape[3], dtype=dtype, device=DEVICE)
        operands[i] = far.as_strided(operand.shape, (0, step, operand.shape[3], 1)).copy_(operand)
    check(run(case.geometry, *operands), answer(case.geometry, *operands), dtype)


@compiled
def test_programs_cover_every_pixel_and_group_once():
    for groups, depth, size in itertools.product(
        (1, 2, 3, 4, 7, 24, 32), (1, 3, 8, 16, 32, 33, 64, 100, 300), (2, 4, 8)
    ):
        tile = _triton._tile(groups, depth, size)
        assert all(side >= 1 and side & (side - 1) == 0 for side in tile.values())
        assert depth <= tile['LANES'] < 2 * depth + 1
        rows = tile['TILE_H'] * tile['TILE_W'] * tile['TILE_G']
        assert rows <= 64 and (rows * tile['LANES'] * size <= 2048 or rows == 1)
        for height, width in ((1, 1), (7, 9), (56, 56)):
            programs = _triton._programs(torch.empty(3, height, width, 1), groups, tile)
            covered = programs * tile['TILE_H'] * tile['TILE_W'] * tile['TILE_G']
            assert covered >= 3 * height * width * groups
