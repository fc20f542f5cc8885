"""Multi-scale deformable attention on every backend: against the float64 reference, edges, errors, transformations."""

import warnings

import onnx
import onnxruntime
import pytest
import torch

from dcnzoo import ops
from dcnzoo.ops import available_backends, deform_attn, use_backend
from tests.ops.attention import CASES, Case, answer, check, definition, run, shapes_of
from tests.ops.cases import error

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PLAIN = Case('plain')


@pytest.fixture(params=available_backends('cpu'))
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_output_and_gradients(backend, case, dtype):
    operands = case.operands(dtype)
    results = run(case.shapes, *operands)
    assert results[0].is_contiguous() and all(result.dtype == dtype for result in results)
    check(results, answer(case.shapes, *operands), dtype)


@pytest.mark.parametrize('name', ['plain', 'one_row', 'far'])
def test_the_published_definition(backend, name):
    case = next(case for case in CASES if case.name == name)
    value, locations, weights, grad_output = case.operands()
    results = run(case.shapes, value, locations, weights, grad_output)
    operands = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = definition(operands[0], case.shapes, *operands[1:])
    check(results, (output.detach(), *torch.autograd.grad(output, operands, grad_output)), torch.float64)


@pytest.mark.parametrize('dtype', DTYPES[2:], ids=str)
@pytest.mark.parametrize('which', [(1, 2), (1,), (2,)], ids=['both', 'locations', 'weights'])
def test_float32_beside_a_half_value(backend, dtype, which):
    operands = [
        operand.float() if i in which else operand.to(dtype) for i, operand in enumerate(PLAIN.operands(torch.float32))
    ]
    results = run(PLAIN.shapes, *operands)
    assert [result.dtype for result in results] == [dtype, *(operand.dtype for operand in operands[:3])]
    check(results, answer(PLAIN.shapes, *operands), dtype)


@pytest.mark.parametrize('dtype', DTYPES[:2], ids=str)
def test_locations_on_the_edges(backend, dtype):
    """Exactly on -1, 0, the last pixel and one beyond it, between, huge, and not finite; sizes are powers of two."""
    height, width = 4, 8
    pixels = torch.tensor([-1.5, -1, -0.75, -0.5, 0, 0.5, 1, 2.25, 3, 3.5, 4, 6.5, 7, 7.5, 7.75, 8, 9]).double()
    odd = torch.tensor([1e9, -1e9, 1e37, -1e37, float('nan'), float('inf'), -float('inf')]).double()
    x, y = torch.cat(((pixels + 0.5) / width, odd)), torch.cat(((pixels + 0.5) / height, odd))
    locations = torch.stack(torch.meshgrid(x, y, indexing='ij'), -1).view(1, len(x), 1, 1, len(y), 2)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, height * width, 1, 5, generator=generator).double()
    weights = torch.full(locations.shape[:-1], 1.5).double()
    grad_output = torch.randn(1, len(x), 5, generator=generator).double()
    operands = [tensor.to(dtype) for tensor in (value, locations, weights, grad_output)]
    results = run([(height, width)], *operands)
    check(results, answer([(height, width)], *operands), dtype)
    nowhere = ~locations.isfinite().all(-1)
    assert all(result.isfinite().all() for result in results)
    assert not results[2][nowhere].any() and not results[3][nowhere].any()


def test_a_weight_outside_may_be_anything(backend):
    value, locations, weights, grad_output = PLAIN.operands(torch.float32)
    locations[0, 3, 1, 0, 2], weights[0, 3, 1, 0, 2] = float('nan'), float('inf')
    locations[1, 5, 2, 1, 0], weights[1, 5, 2, 1, 0] = 1e6, float('nan')
    results = run(PLAIN.shapes, value, locations, weights, grad_output)
    assert all(result.isfinite().all() for result in results)
    check(results, answer(PLAIN.shapes, value, locations, weights, grad_output), torch.float32)


@pytest.mark.parametrize('number', [float('nan'), float('inf')], ids=['nan', 'inf'])
@pytest.mark.parametrize('which', range(4), ids=['value', 'locations', 'weights', 'grad_output'])
def test_a_number_that_is_not_finite_stays_where_it_is(backend, which, number):
    """Pixels off the map contribute exactly nothing: no NaN is read or written and multiplied by a zero weight."""
    operands = PLAIN.operands()
    if which == 0:
        operands[0][:, 0], operands[0][:, -1], operands[0][:, 20] = number, number, number
    else:
        operands[which][1, 2, 1:3] = number
    expected = answer(PLAIN.shapes, *operands)
    assert which == 1 or not all(result.isfinite().all() for result in expected)
    check(run(PLAIN.shapes, *operands), expected, torch.float64)


def _layouts(tensor):
    yield 'part', torch.cat((tensor, tensor), -1)[..., tensor.shape[-1] :]
    yield 'every_other', tensor.repeat_interleave(2, -1)[..., ::2]
    yield 'storage_offset', torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view_as(tensor)
    yield 'transposed', tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield 'expanded', tensor[:1].expand_as(tensor)


@pytest.mark.parametrize('layout', range(5))
def test_strided_operands(backend, layout):
    for dtype in (torch.float32, torch.bfloat16):
        operands = [list(_layouts(operand))[layout][1] for operand in PLAIN.operands(dtype)]
        results = run(PLAIN.shapes, *operands)
        assert all(result.is_contiguous() for result in results)
        check(results, answer(PLAIN.shapes, *operands), dtype)


def test_shapes_as_a_tensor(backend):
    value, locations, weights, _ = PLAIN.operands(torch.float32)
    expected = deform_attn(value, PLAIN.shapes, locations, weights)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(deform_attn(value, torch.tensor(PLAIN.shapes, dtype=dtype), locations, weights), expected)


Z = torch.zeros
BAD = [
    ('value_type', {'value': [1.0]}, TypeError, 'value must be a tensor, got list'),
    ('value', {'value': Z(2, 60, 48)}, ValueError, r'value must have 4 dimensions .* got shape \(2, 60, 48\)'),
    ('value_dtype', {'value': Z(2, 60, 3, 16).int()}, TypeError, 'value must be float64.*int32'),
    ('value_pixels', {'value': Z(2, 61, 3, 16)}, ValueError, r'all levels \[\(6, 8\), \(3, 4\)\].*got 61'),
    ('value_empty', {'value': Z(2, 60, 3, 0)}, ValueError, 'at least one head and channel'),
    ('shapes_type', {'spatial_shapes': 48}, TypeError, 'spatial_shapes must be a sequence of .* pairs.*got int'),
    ('shapes_pairs', {'spatial_shapes': [(6, 8), 12]}, TypeError, 'pairs of ints, got 12 among them'),
    ('shapes_float', {'spatial_shapes': Z(2, 2)}, TypeError, 'tensor of integers, got torch.float32'),
    ('shapes_flat', {'spatial_shapes': Z(4).long()}, ValueError, r'shape \(levels, 2\), got \(4,\)'),
    ('shapes_empty', {'spatial_shapes': []}, ValueError, r'at least one level.*got \[\]'),
    ('shapes_zero', {'spatial_shapes': [(60, 1), (0, 4)]}, ValueError, 'at least one pixel'),
    ('locations', {'sampling_locations': Z(2, 7, 3, 2, 4)}, ValueError, 'sampling_locations must have 6 dimensions'),
    (
        'locations_shape',
        {'sampling_locations': Z(2, 7, 3, 1, 4, 2)},
        ValueError,
        r'\(2, 7, 3, 2, 4, 2\).*2 level\(s\), got \(2, 7, 3, 1, 4, 2\)',
    ),
    (
        'no_points',
        {'sampling_locations': Z(2, 7, 3, 2, 0, 2), 'attention_weights': Z(2, 7, 3, 2, 0)},
        ValueError,
        'at least one point',
    ),
    (
        'locations_dtype',
        {'sampling_locations': Z(2, 7, 3, 2, 4, 2).half()},
        TypeError,
        "value's dtype torch.float32, got",
    ),
    (
        'locations_device',
        {'sampling_locations': torch.empty(2, 7, 3, 2, 4, 2, device='meta')},
        ValueError,
        "sampling_locations must be on value's device cpu, got meta",
    ),
    ('weights_shape', {'attention_weights': Z(2, 7, 3, 2, 5)}, ValueError, r'\(2, 7, 3, 2, 4\).*got \(2, 7, 3, 2, 5\)'),
    (
        'weights_dtype',
        {'attention_weights': Z(2, 7, 3, 2, 4).double()},
        TypeError,
        'attention_weights must have.*float64',
    ),
]


@pytest.mark.parametrize(('changes', 'kind', 'message'), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_arguments_are_named(changes, kind, message):
    arguments = {
        'value': Z(2, 60, 3, 16),
        'spatial_shapes': PLAIN.shapes,
        'sampling_locations': Z(2, 7, 3, 2, 4, 2),
        'attention_weights': Z(2, 7, 3, 2, 4),
        **changes,
    }
    with pytest.raises(kind, match=message):
        deform_attn(**arguments)


def test_opcheck(backend):
    if backend == 'reference':
        pytest.skip('the composition is not a registered operator')
    value, locations, weights, grad_output = Case('small', depth=4, queries=2).operands(torch.float32)
    operands = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    shapes = shapes_of(PLAIN)
    torch.library.opcheck(ops._library.operator('deform_attn', backend), (*operands, shapes))
    torch.library.opcheck(
        ops._library.operator('deform_attn_backward', backend), (grad_output, *operands, shapes, False)
    )


def test_gradcheck(backend):
    case = Case('small', shapes=((2, 3), (1, 2)), batch=1, heads=2, depth=2, queries=2, points=2)
    operands = [tensor.requires_grad_() for tensor in case.operands()[:3]]

    def function(value, locations, weights):
        return deform_attn(value, case.shapes, locations, weights)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


def test_the_registered_operator_on_the_reference():
    """What serves where nothing was compiled: its backward is written out, not autograd's."""
    value, locations, weights, grad_output = PLAIN.operands()
    actual = ops.reference.deform_attn_backward(grad_output, value, locations, weights, shapes_of(PLAIN))
    check(
        (deform_attn(value, PLAIN.shapes, locations, weights), *actual),
        answer(PLAIN.shapes, value, locations, weights, grad_output),
        torch.float64,
    )


def test_autocast_leaves_operands_as_they_come(backend):
    value, locations, weights, _ = PLAIN.operands(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        single = deform_attn(value, PLAIN.shapes, locations, weights)
        mixed = deform_attn(value.bfloat16(), PLAIN.shapes, locations, weights)
    assert single.dtype == torch.float32 and mixed.dtype == torch.bfloat16


def test_meta_tensors():
    value, locations, weights, _ = PLAIN.operands(device='meta')
    out = deform_attn(value, PLAIN.shapes, locations, weights)
    assert out.device.type == 'meta' and out.shape == (2, 7, 48)


class Module(torch.nn.Module):
    def __init__(self, shapes=PLAIN.shapes):
        super().__init__()
        self.shapes = shapes

    def forward(self, value, locations, weights):
        return deform_attn(value, self.shapes, locations, weights)


def test_compile(backend):
    torch._dynamo.reset()

    def function(image, locations, weights):
        """Levels whose sizes follow from an image's, as in a detector."""
        shapes = [image.shape[2:], (image.shape[2] // 2, image.shape[3] // 2)]
        value = torch.cat((image.flatten(2), image[:, :, ::2, ::2].flatten(2)), 2).transpose(1, 2).unflatten(2, (3, 16))
        return deform_attn(value, [tuple(shape) for shape in shapes], locations, weights)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend='aot_eager')
    torch._dynamo.utils.counters.clear()
    for height, width in ((6, 8), (4, 6), (10, 14)):
        image = torch.randn(2, 48, height, width, requires_grad=True)
        _, locations, weights, grad_output = PLAIN.operands(torch.float32)
        operands = image, locations.requires_grad_(), weights.requires_grad_()
        grads = torch.autograd.grad(compiled(*operands), operands, grad_output)
        expected = torch.autograd.grad(function(*operands), operands, grad_output)
        assert error(compiled(*operands), function(*operands)) < 1e-6
        assert all(error(*pair) < 1e-6 for pair in zip(grads, expected, strict=True))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def test_fx(backend):
    traced = torch.fx.symbolic_trace(Module())
    assert [node.target for node in traced.graph.nodes if node.op == 'call_function'] == [deform_attn]
    operands = PLAIN.operands(torch.float32)[:3]
    assert torch.equal(traced(*operands), Module()(*operands))


def test_export_gives_standard_operators():
    operands = PLAIN.operands(torch.float32)[:3]
    queries = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(Module(), operands, dynamic_shapes=({0: torch.export.Dim.AUTO}, queries, queries))
    assert not [node for node in program.graph.nodes if 'dcnzoo' in str(node.target)]
    others = Case('other', batch=3, queries=5).operands(torch.float32)[:3]
    assert error(program.module()(*others), Module()(*others)) < 1e-6


@pytest.mark.parametrize('dynamo', [False, True], ids=['traced', 'dynamo'])
def test_onnx(dynamo, tmp_path):
    axes = {0: 'batch'}, {0: 'batch', 1: 'queries'}, {0: 'batch', 1: 'queries'}
    names = ['value', 'locations', 'weights']
    shapes = {'dynamic_shapes': axes}
    if not dynamo:
        shapes = {'dynamic_axes': dict(zip([*names, 'output'], (*axes, axes[1]), strict=True))}
    path = tmp_path / 'attention.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracing exporter is deprecated, and still what others call
        torch.onnx.export(
            Module(), PLAIN.operands(torch.float32)[:3], path, input_names=names, output_names=['output'],
            opset_version=18, dynamo=dynamo, **shapes,
        )  # fmt: skip
    assert {node.domain for node in onnx.load(path).graph.node} == {''}
    session = onnxruntime.InferenceSession(path)
    for batch, queries in ((2, 7), (1, 5)):
        operands = Case('run', batch=batch, queries=queries).operands(torch.float32)[:3]
        feed = {name: operand.numpy() for name, operand in zip(names, operands, strict=True)}
        assert error(torch.from_numpy(session.run(None, feed)[0]), Module()(*operands)) < 2e-6


@pytest.mark.parametrize('in_dims', [(0, 0, 0), (0, None, 1), (None, 2, None)])
def test_vmap(backend, in_dims):
    operands = PLAIN.operands(torch.float32)[:3]
    stacks = [
        tensor if dim is None else torch.stack([tensor + i / 8 for i in range(3)], dim)
        for tensor, dim in zip(operands, in_dims, strict=True)
    ]
    mapped = torch.func.vmap(Module(), in_dims=in_dims)(*stacks)
    for i in range(3):
        single = [tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(stacks, in_dims, strict=True)]
        assert error(mapped[i], Module()(*single)) < 1e-6


def test_forward_mode(backend):
    operands, tangents = (tuple(PLAIN.operands()[:3]) for _ in range(2))
    with use_backend('reference'):
        expected = torch.func.jvp(Module(), operands, tangents)[1]
    assert expected.any()
    assert error(torch.func.jvp(Module(), operands, tangents)[1], expected) < 1e-12
