"""The operator on every backend: values and gradients against the float64 reference, edges, errors, transformations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import forward_ad

from dcnzoo import ops
from dcnzoo.ops import available_backends, dcnv4, use_backend
from tests.ops.cases import CASES, Case, answer, check, error, run

GOLDEN = Path(__file__).parent / 'golden'
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PLAIN = Case('plain', tail=2)


@pytest.fixture(params=available_backends('cpu'))
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_output_and_gradients(backend, case, dtype):
    operands = case.operands(dtype)
    check(run(case.geometry, *operands), answer(case.geometry, *operands), dtype)


@pytest.mark.parametrize('number', range(5))
@pytest.mark.parametrize('dtype', DTYPES[:2], ids=str)
def test_published_outputs(backend, number, dtype):
    geometry = json.loads((GOLDEN / 'dcnv4_op.json').read_text())[str(number)]
    tensors = load_file(GOLDEN / 'dcnv4_op.safetensors')
    operands = [tensors[f'{number}.{name}'].to(dtype) for name in ('value', 'offset_mask', 'grad_out')]
    expected = [tensors[f'{number}.{name}'] for name in ('out', 'grad_value', 'grad_offset_mask')]
    check(run(geometry, *operands), expected, dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_float32_offsets_beside_a_half_value(backend, dtype):
    value, offset_mask, grad_output = PLAIN.operands()
    operands = value.to(dtype), offset_mask.float(), grad_output.to(dtype)
    results = run(PLAIN.geometry, *operands)
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32]
    check(results, answer(PLAIN.geometry, *operands), dtype)


@pytest.mark.parametrize('dtype', DTYPES[:2], ids=str)
def test_coordinates_on_the_edges(backend, dtype):
    """Points exactly on -1, 0, the last pixel and one beyond it, just inside, huge, subnormal, and not finite."""
    size = 5
    edges = torch.tensor(
        [
            -1,
            -1 + 1e-6,
            -0.5,
            0,
            1e-40,
            size - 1,
            size - 1e-6,
            size,
            1e9,
            -1e9,
            3e38,
            float('nan'),
            float('inf'),
            -float('inf'),
        ],
        dtype=torch.float64,
    )
    y, x = torch.meshgrid(edges, edges, indexing='ij')
    count = len(edges)
    value, grad_output = torch.randn(1, size, size, 4).double(), torch.randn(1, count, count, 4).double()
    # A 1 x 1 kernel with stride 1 and enough padding has one point an output pixel, at (ho - pad, wo - pad).
    pad = 5
    assert count <= size + 2 * pad
    grid = torch.arange(size + 2 * pad, dtype=torch.float64) - pad
    out = size + 2 * pad
    offset_mask = torch.zeros(1, out, out, 3, dtype=torch.float64)
    offset_mask[..., 2] = 1.5
    offset_mask[0, :count, :count, 0] = x - grid[:count]
    offset_mask[0, :count, :count, 1] = y - grid[:count, None]
    grad_output = torch.randn(1, out, out, 4).double()
    geometry = {'groups': 1, 'kernel_size': 1, 'padding': pad}
    operands = [tensor.to(dtype) for tensor in (value, offset_mask, grad_output)]
    results = run(geometry, *operands)
    check(results, answer(geometry, *operands), dtype)  # float32 too holds every coordinate within reach exactly
    unreal = ~(x.isfinite() & y.isfinite())
    output, _, grad_offset_mask = results
    assert torch.equal(output[0, :count, :count][unreal], torch.zeros_like(output[0, :count, :count][unreal]))
    assert not grad_offset_mask[0, :count, :count][unreal].any()
    assert all(result.isfinite().all() for result in results)


def test_an_infinite_mask_at_a_point_outside_counts_as_nothing(backend):
    value, offset_mask, grad_output = PLAIN.operands(torch.float32)
    groups = offset_mask[..., :54].unflatten(-1, (2, 27))
    groups[0, 2, 3, 0, 0], groups[0, 2, 3, 0, 18] = float('nan'), float('inf')
    groups[1, 4, 5, 1, 3], groups[1, 4, 5, 1, 19] = 1e6, float('nan')
    assert not offset_mask.isfinite().all()
    results = run(PLAIN.geometry, value, offset_mask, grad_output)
    assert all(result.isfinite().all() for result in results)
    check(results, answer(PLAIN.geometry, value, offset_mask, grad_output), torch.float32)


def test_a_value_that_is_not_finite_stays_where_it_is(backend):
    """Corners off the map contribute exactly nothing: no NaN is read and multiplied by a zero weight."""
    value, offset_mask, grad_output = PLAIN.operands(torch.float32)
    value[:, 0, 0], value[:, -1, -1] = float('nan'), float('inf')
    check(
        run(PLAIN.geometry, value, offset_mask, grad_output),
        answer(PLAIN.geometry, value, offset_mask, grad_output),
        torch.float32,
    )


def _views(tensor):
    yield 'channels_first', tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    yield 'part_of_a_row', torch.cat((tensor, tensor), -1)[..., tensor.shape[3] :]
    yield 'every_other_channel', tensor.repeat_interleave(2, -1)[..., ::2]
    yield 'storage_offset', torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view_as(tensor)
    yield 'transposed', tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield 'expanded', tensor[:1].expand(tensor.shape[0], -1, -1, -1)


@pytest.mark.parametrize('view', range(6))
def test_strided_operands(backend, view):
    for dtype in (torch.float32, torch.bfloat16):
        operands = [list(_views(operand))[view][1] for operand in PLAIN.operands(dtype)]
        results = run(PLAIN.geometry, *operands)
        assert results[0].is_contiguous()
        check(results, answer(PLAIN.geometry, *operands), dtype)


def test_one_packed_projection(backend):
    """Value and offset_mask as views of one tensor, and a gradient that is one number expanded."""
    packed = torch.randn(2, 7, 9, 32 + 56)
    value, offset_mask = packed.split((32, 56), -1)
    grad_output = torch.ones(()).expand(2, 7, 9, 32)
    check(
        run(PLAIN.geometry, value, offset_mask, grad_output),
        answer(PLAIN.geometry, value, offset_mask, grad_output),
        torch.float32,
    )


GOOD = {'groups': 2}
BAD = [
    ('value', {'value': torch.zeros(7, 9, 32)}, ValueError, r'value must have 4 dimensions .* got shape \(7, 9, 32\)'),
    ('value_type', {'value': [1.0]}, TypeError, 'value must be a tensor, got list'),
    ('value_dtype', {'value': torch.zeros(2, 7, 9, 32, dtype=torch.int32)}, TypeError, 'value must be float64.*int32'),
    ('value_empty', {'value': torch.zeros(2, 0, 9, 32)}, ValueError, r'at least one row.*\(2, 0, 9, 32\)'),
    ('offset_mask', {'offset_mask': torch.zeros(2, 7, 56)}, ValueError, 'offset_mask must have 4 dimensions'),
    (
        'offset_mask_dtype',
        {'offset_mask': torch.zeros(2, 7, 9, 56).half()},
        TypeError,
        'offset_mask must have.*float32, got torch.float16',
    ),
    (
        'offset_mask_double',
        {'value': torch.zeros(2, 7, 9, 32).half(), 'offset_mask': torch.zeros(2, 7, 9, 56).double()},
        TypeError,
        'offset_mask must have.*float16 or float32, got torch.float64',
    ),
    (
        'offset_mask_device',
        {'offset_mask': torch.zeros(2, 7, 9, 56, device='meta')},
        ValueError,
        "offset_mask must be on value's device cpu, got meta",
    ),
    ('offset_mask_size', {'offset_mask': torch.zeros(2, 9, 7, 56)}, ValueError, r'\(2, 7, 9, P\).*got \(2, 9, 7, 56\)'),
    (
        'offset_mask_width',
        {'offset_mask': torch.zeros(2, 7, 9, 53)},
        ValueError,
        'at least 3 . groups . points = 3 . 2 . 9 = 54 channels, got 53',
    ),
    ('groups', {'groups': 5}, ValueError, "groups must be positive and divide value's 32 channels, got 5"),
    ('groups_zero', {'groups': 0}, ValueError, 'groups must be positive'),
    ('groups_type', {'groups': 2.0}, TypeError, 'groups must be an int, got 2.0'),
    ('kernel_size', {'kernel_size': 0}, ValueError, 'kernel_size must be at least 1, got 0'),
    (
        'kernel_size_type',
        {'kernel_size': (3, 3, 3)},
        TypeError,
        r'kernel_size must be an int or a \(height, width\) pair',
    ),
    ('kernel_too_large', {'kernel_size': 12}, ValueError, 'does not fit into a value map of 7 x 9'),
    ('stride', {'stride': (1, 0)}, ValueError, r'stride must be at least 1, got \(1, 0\)'),
    ('padding', {'padding': -1}, ValueError, 'padding must be at least 0, got -1'),
    ('dilation', {'dilation': '2'}, TypeError, "dilation must be an int.*got '2'"),
    ('offset_scale', {'offset_scale': '1'}, TypeError, "offset_scale must be a number, got '1'"),
    ('offset_scale_nan', {'offset_scale': float('nan')}, ValueError, 'offset_scale must be finite, got nan'),
    (
        'remove_center',
        {'remove_center': True, 'kernel_size': 4},
        ValueError,
        r'odd square kernel_size.*got kernel_size \(4, 4\)',
    ),
    ('softmax', {'softmax': 'yes'}, TypeError, "softmax must be a bool, got 'yes'"),
    ('remove_center_number', {'remove_center': 2}, TypeError, 'remove_center must be a bool, got 2'),
]


@pytest.mark.parametrize(('changes', 'kind', 'message'), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_arguments_are_named(changes, kind, message):
    arguments = {'value': torch.zeros(2, 7, 9, 32), 'offset_mask': torch.zeros(2, 7, 9, 56), **GOOD, **changes}
    with pytest.raises(kind, match=message):
        dcnv4(**arguments)


def test_opcheck(backend):
    if backend == 'reference':
        pytest.skip('the composition is not a registered operator')
    value, offset_mask, grad_output = PLAIN.operands(torch.float32)
    geometry = (2, 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, False)
    value.requires_grad_(), offset_mask.requires_grad_()
    torch.library.opcheck(ops._library.operator('dcnv4', backend), (value, offset_mask, *geometry))
    torch.library.opcheck(
        ops._library.operator('dcnv4_backward', backend), (grad_output, value, offset_mask, *geometry, False)
    )


def test_gradcheck(backend):
    case = Case('small', 1, 3, 4, 4, tail=1)
    value, offset_mask, _ = case.operands()
    value.requires_grad_(), offset_mask.requires_grad_()

    def function(value, offset_mask):
        return dcnv4(value, offset_mask, **case.geometry)

    assert torch.autograd.gradcheck(function, (value, offset_mask))
    assert torch.autograd.gradgradcheck(function, (value, offset_mask))


def test_autocast_leaves_operands_as_they_come(backend):
    value, offset_mask, _ = PLAIN.operands(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        single = dcnv4(value, offset_mask, groups=2)
        mixed = dcnv4(value.bfloat16(), offset_mask, groups=2)
    assert single.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    assert torch.equal(single, dcnv4(value, offset_mask, groups=2))


def test_meta_tensors():
    out = dcnv4(torch.empty(2, 7, 9, 32, device='meta'), torch.empty(2, 4, 5, 56, device='meta'), groups=2, stride=2)
    assert out.device.type == 'meta' and out.shape == (2, 4, 5, 32)


class Module(torch.nn.Module):
    def forward(self, value, offset_mask):
        return dcnv4(value, offset_mask, groups=2, kernel_size=(3, 3), padding=1, offset_scale=0.5)


@pytest.mark.parametrize('dynamic', [False, True])
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Module(), fullgraph=True, dynamic=dynamic, backend='aot_eager')
    torch._dynamo.utils.counters.clear()
    for size in ((7, 9), (5, 6), (12, 10)):
        case = Case('compiled', 2, *size, arguments={'offset_scale': 0.5})
        value, offset_mask, grad_output = case.operands(torch.float32)
        value.requires_grad_(), offset_mask.requires_grad_()
        output = compiled(value, offset_mask)
        grads = torch.autograd.grad(output, (value, offset_mask), grad_output)
        check((output.detach(), *grads), answer(case.geometry, value, offset_mask, grad_output), torch.float32)
    if dynamic:
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_export_gives_standard_operators_with_dynamic_shapes():
    auto = dict.fromkeys(range(3), torch.export.Dim.AUTO)
    program = torch.export.export(Module(), tuple(PLAIN.operands(torch.float32)[:2]), dynamic_shapes=(auto, auto))
    assert not [node for node in program.graph.nodes if 'dcnzoo' in str(node.target)]
    value, offset_mask, _ = Case('other', 3, 5, 6, tail=2).operands(torch.float32)
    assert error(program.module()(value, offset_mask), Module()(value, offset_mask)) < 1e-6


def test_script_and_fx(backend):
    operands = PLAIN.operands(torch.float32)[:2]
    expected = Module()(*operands)
    scripted = torch.jit.script(Module())
    assert error(scripted(*operands), expected) < 1e-6
    traced = torch.fx.symbolic_trace(Module())
    assert [node.target for node in traced.graph.nodes if node.op == 'call_function'] == [dcnv4]
    assert torch.equal(traced(*operands), expected)
    assert error(torch.jit.script(traced)(*operands), expected) < 1e-6


@pytest.mark.parametrize('in_dims', [(0, 0), (0, None), (None, 1), (2, 3)])
def test_vmap(backend, in_dims):
    value, offset_mask = torch.randn(2, 7, 9, 32), torch.randn(2, 7, 9, 56)
    stacks = [
        tensor if dim is None else torch.stack([tensor + i for i in range(3)], dim)
        for tensor, dim in zip((value, offset_mask), in_dims, strict=True)
    ]
    mapped = torch.func.vmap(lambda *operands: dcnv4(*operands, groups=2), in_dims=in_dims)(*stacks)
    for i in range(3):
        operands = [
            tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(stacks, in_dims, strict=True)
        ]
        assert error(mapped[i], dcnv4(*operands, groups=2)) < 1e-6


def test_vmap_over_nothing(backend):
    value, offset_mask = torch.randn(0, 2, 7, 9, 32), torch.randn(2, 7, 9, 56)
    mapped = torch.func.vmap(lambda *operands: dcnv4(*operands, groups=2), in_dims=(0, None))(value, offset_mask)
    assert mapped.shape == (0, 2, 7, 9, 32)


def test_forward_mode(backend):
    operands, tangents = (PLAIN.operands()[:2] for _ in range(2))

    def function(value, offset_mask):
        return dcnv4(value, offset_mask, **PLAIN.geometry)

    with use_backend('reference'):
        expected = torch.func.jvp(function, operands, tangents)
    for result, right in zip(torch.func.jvp(function, operands, tangents), expected, strict=True):
        assert right.any()
        assert error(result, right) < 1e-12
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, operands, tangents))
        assert error(forward_ad.unpack_dual(dual).tangent, expected[1]) < 1e-12


def test_function_transforms_on_the_reference():
    def loss(value, offset_mask):
        return dcnv4(value, offset_mask, groups=2).square().sum()

    value, offset_mask = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 5, 54)
    with use_backend('reference'):
        mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(value, offset_mask)
    for i in range(3):
        operands = value[i].requires_grad_(), offset_mask[i].requires_grad_()
        for gradient, expected in zip(mapped, torch.autograd.grad(loss(*operands), operands), strict=True):
            assert error(gradient[i], expected) < 1e-6
