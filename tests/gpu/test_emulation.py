"""The CUDA kernels without a GPU: their very sources run on the host and are held to the float64 reference."""

import pytest
import torch

from tests.gpu import emulated
from tests.ops.cases import CASES, Case, answer, check, error, pair

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope='module')
def operators():
    torch.ops.load_library(emulated.build())
    return torch.ops.dcnzoo_emulated


def run(operators, geometry, value, offset_mask, grad_output, deterministic=False):
    pairs = (pair(geometry[name]) for name in ('kernel_size', 'stride', 'padding', 'dilation'))
    arguments = (
        geometry['groups'],
        *(size for sizes in pairs for size in sizes),
        float(geometry.get('offset_scale', 1.0)),
        geometry.get('remove_center', False),
        geometry.get('softmax', False),
    )
    output = operators.dcnv4(value, offset_mask, *arguments)
    return output, *operators.dcnv4_backward(grad_output, value, offset_mask, *arguments, deterministic)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', [case for case in CASES if case.name != 'stage_1'], ids=lambda case: case.name)
def test_output_and_gradients(operators, case, dtype):
    operands = case.operands(dtype)
    check(run(operators, case.geometry, *operands), answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', [case for case in CASES if case.channels < 16], ids=lambda case: case.name)
def test_deterministic_gradients_of_narrow_groups(operators, case, dtype):
    """Gathered, while they are scattered otherwise; wider groups are gathered in any case."""
    operands = case.operands(dtype)
    check(run(operators, case.geometry, *operands, deterministic=True), answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('vectors', [64, 65, 96])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_groups_that_take_a_warp_several_rounds(operators, dtype, vectors):
    """A lane takes one vector of 16 bytes at a time, or two where all lanes can."""
    channels = 2 * vectors * 16 // dtype.itemsize
    case = Case('wide', batch=1, height=3, width=3, channels=channels, arguments={'groups': 2})
    operands = case.operands(dtype)
    check(run(operators, case.geometry, *operands), answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('softmax', [False, True])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_scattered_gradients_of_wide_groups(operators, dtype, softmax):
    """The map is too large to gather; offsets are exact, since float32 coordinates are coarse that far out."""
    arguments = {'kernel_size': (1, 3), 'padding': (0, 1), 'softmax': softmax, 'groups': 1}
    case = Case('long_row', batch=1, height=1, width=16400, channels=16, arguments=arguments)
    value, offset_mask, grad_output = case.operands()
    offset_mask[..., :6] = (offset_mask[..., :6] * 64).round() / 64
    operands = [operand.to(dtype) for operand in (value, offset_mask, grad_output)]
    operands[1][..., :6] = (operands[1][..., :6] * 64).round() / 64
    check(run(operators, case.geometry, *operands), answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('dtype', DTYPES[2:], ids=str)
def test_float32_offsets_beside_a_half_value(operators, dtype):
    case = Case('width_16', channels=32)
    value, offset_mask, grad_output = case.operands()
    operands = value.to(dtype), offset_mask.float(), grad_output.to(dtype)
    results = run(operators, case.geometry, *operands)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32]
    check(results, answer(case.geometry, *operands), dtype)


def expand(tensor):
    return tensor[:1].expand_as(tensor)


def embed(tensor):
    """A view of some channels of a wider tensor."""
    wide = torch.full((*tensor.shape[:3], tensor.shape[3] + 24), float('nan'), dtype=tensor.dtype)
    wide[..., 8 : 8 + tensor.shape[3]] = tensor
    return wide[..., 8 : 8 + tensor.shape[3]]


def misalign(tensor):
    storage = torch.full((tensor.numel() + 1,), float('nan'), dtype=tensor.dtype)
    return storage[1:].view_as(tensor).copy_(tensor)


def channels_first(tensor):
    return tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.mark.parametrize('layout', [expand, embed, misalign, channels_first])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_layouts(operators, dtype, layout):
    case = Case('width_16', channels=64, arguments={'groups': 4}, tail=4)
    operands = [layout(operand) for operand in case.operands(dtype)]
    results = run(operators, case.geometry, *operands)
    assert all(result.is_contiguous() for result in results)
    check(results, answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_points_that_are_not_finite_are_not_read(operators, dtype):
    case = Case('width_16', channels=32)
    value, offset_mask, grad_output = case.operands(dtype)
    bad = torch.tensor([float('nan'), float('inf'), -float('inf')]).to(dtype)
    offset_mask[:, ::2, :, :18] = bad.repeat(6)
    offset_mask[:, ::2, :, 18:27] = float('nan')  # the modulation of points that count as nothing
    results = run(operators, case.geometry, value, offset_mask, grad_output)
    assert all(result.isfinite().all() for result in results)
    check(results, answer(case.geometry, value, offset_mask, grad_output), dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('poison', [float('nan'), float('inf')], ids=['nan', 'inf'])
def test_a_bad_number_reaches_no_pixel_that_does_not_meet_it(operators, dtype, poison):
    case = Case('width_16', height=17, width=19, channels=32, spread=0.7)
    value, offset_mask, grad_output = case.operands(dtype)
    value[0, 3, 4, 5] = poison
    grad_output[1, 9, 9, 20] = poison
    expected = answer(case.geometry, value, offset_mask, grad_output)
    results = run(operators, case.geometry, value, offset_mask, grad_output)
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual.isfinite(), wanted.isfinite())
        assert error(actual, wanted) < 0.02
    assert not expected[1].isfinite().all() and not expected[0].isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.float32], ids=str)
def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(operators, dtype):
    """The emulation runs a block's threads in another order each time."""
    case = Case('width_16', height=17, width=18, channels=32)
    operands = case.operands(dtype)
    first, second = (run(operators, case.geometry, *operands, deterministic=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
