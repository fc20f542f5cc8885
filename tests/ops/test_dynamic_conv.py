"""The operator against its reference in float64 and timm's layer: values, gradients, edges, errors, transformations."""

import warnings
from dataclasses import dataclass, field

import onnx
import onnxruntime
import pytest
import torch
from timm.layers import CondConv2d
from torch import Tensor

from dcnzoo.ops import _mixed_conv, dynamic_conv2d, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """One call: the shapes and the arguments."""

    name: str
    batch: int = 3
    in_channels: int = 6
    out_channels: int = 4
    height: int = 9
    width: int = 7
    experts: int = 4
    bias: bool = False
    arguments: dict = field(default_factory=dict)

    @property
    def geometry(self) -> dict:
        return {'kernel_size': 3, 'stride': 1, 'padding': 1, 'dilation': 1, 'groups': 1, **self.arguments}

    def operands(self, dtype=torch.float64, channels_last=False, batch=None, seed=0) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(seed)
        batch = self.batch if batch is None else batch

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        kernel_h, kernel_w = pair(self.geometry['kernel_size'])
        columns = self.out_channels * (self.in_channels // self.geometry['groups']) * kernel_h * kernel_w
        x = draw(batch, self.in_channels, self.height, self.width)
        weight, routing = draw(self.experts, columns), draw(batch, self.experts).sigmoid()
        bias = draw(self.experts, self.out_channels) if self.bias else None
        return [x.to(memory_format=torch.channels_last) if channels_last else x, weight, routing, bias]

    def expected(self, x: Tensor, weight: Tensor, routing: Tensor, bias: Tensor | None) -> Tensor:
        """The reference in float64."""
        sizes = [pair(self.geometry[name]) for name in ('kernel_size', 'stride', 'padding', 'dilation')]
        operands = [None if operand is None else operand.double() for operand in (x, weight, routing, bias)]
        return reference.dynamic_conv2d(*operands, *sizes, self.geometry['groups'])


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


CASES = [
    Case('plain'),
    Case('one_sample', batch=1),
    Case('one_expert', experts=1),
    Case('sixteen_experts', experts=16, batch=5),
    Case('bias', bias=True),
    Case('bias_one_sample', bias=True, batch=1),
    Case('pointwise', arguments={'kernel_size': 1, 'padding': 0}),
    Case('pointwise_bias', bias=True, arguments={'kernel_size': 1, 'padding': 0}),
    Case('pointwise_one_sample', batch=1, bias=True, arguments={'kernel_size': 1, 'padding': 0}),
    Case('pointwise_stride', arguments={'kernel_size': 1, 'padding': 0, 'stride': (2, 3)}),
    Case('pointwise_padded', arguments={'kernel_size': 1, 'padding': 1}),
    Case('pointwise_groups', arguments={'kernel_size': 1, 'padding': 0, 'groups': 2}),
    Case('pointwise_one_pixel', height=1, width=1, arguments={'kernel_size': 1, 'padding': 0}),
    Case('depthwise', out_channels=6, arguments={'groups': 6}),
    Case('depthwise_one_sample', batch=1, out_channels=6, bias=True, arguments={'groups': 6}),
    Case('depthwise_multiplier', out_channels=12, bias=True, arguments={'groups': 6}),
    Case(
        'depthwise_stride',
        out_channels=6,
        arguments={'kernel_size': 5, 'stride': 2, 'padding': 2, 'groups': 6},
    ),
    Case('groups', bias=True, arguments={'groups': 2}),
    Case('stride', arguments={'stride': 2}),
    Case('dilation', arguments={'dilation': (2, 1), 'padding': (2, 1)}),
    Case('pairs', arguments={'kernel_size': (1, 5), 'stride': (2, 1), 'padding': (0, 2)}),
    Case('even', arguments={'kernel_size': (2, 4), 'padding': (1, 0)}),
    Case('no_padding', height=3, width=3, arguments={'padding': 0}),
    Case('one_channel', in_channels=1, out_channels=1),
    Case('many_samples', batch=17, in_channels=3, out_channels=5),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_output_and_gradients(case, dtype, channels_last):
    operands = [None if o is None else o.requires_grad_() for o in case.operands(dtype, channels_last)]
    output = dynamic_conv2d(*operands, **case.geometry)
    assert output.dtype == dtype
    exact = [None if o is None else o.detach().double().requires_grad_() for o in operands]
    expected = case.expected(*exact)
    assert error(output, expected) < TOLERANCE[dtype]

    grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = [o for o in operands if o is not None]
    gradients = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    wanted = torch.autograd.grad(expected, [o for o in exact if o is not None], grad_output)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert error(gradient, want) < TOLERANCE[dtype]


@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('few', [1, 2])
@pytest.mark.parametrize('case', [case for case in CASES if case.batch > 1], ids=lambda case: case.name)
def test_a_few_samples_at_a_time(case, few, channels_last, monkeypatch):
    monkeypatch.setattr(_mixed_conv, 'samples_at_once', lambda *_: few)
    operands = [None if o is None else o.requires_grad_() for o in case.operands(channels_last=channels_last)]
    inputs = [o for o in operands if o is not None]
    output, expected = dynamic_conv2d(*operands, **case.geometry), case.expected(*operands)
    assert error(output, expected) < 1e-12
    gradients, wanted = (torch.autograd.grad(out.square().sum(), inputs) for out in (output, expected))
    for gradient, want in zip(gradients, wanted, strict=True):
        assert error(gradient, want) < 1e-12


POINTWISE = {'kernel_size': 1, 'padding': 0}


@pytest.mark.parametrize(
    ('case', 'inference', 'training'),
    [
        (Case('wide', 5, 512, 1024, 3, 2, arguments=POINTWISE), (5, 5), (5, 5)),
        (Case('wider', 5, 512, 2048, 3, 2, arguments=POINTWISE), (2, 2), (5, 5)),
        (Case('narrow', 10, 64, 64, 56, 56, arguments=POINTWISE), (10, 10), (10, 10)),
        (Case('huge', 6, 64, 64, 160, 160, arguments=POINTWISE), (3, 3), (2, 2)),
        (Case('not in fours', 10, 64, 62, 28, 28, arguments=POINTWISE), (10, 10), (10, 10)),
        (Case('large', 3, 8, 48, 128, 128, arguments={'groups': 4}), (3, 1), (3, 1)),
        (Case('larger', 3, 48, 48, 256, 256, arguments={'groups': 48}), (2, 3), (2, 3)),
        (Case('small', 5, 6, 6, 9, 8, arguments={'groups': 6}), (5, 5), (5, 5)),
        (Case('5x5', 5, 6, 6, 9, 8, arguments={'groups': 6, 'kernel_size': 5, 'padding': 2}), (5, 5), (5, 5)),
    ],
    ids=lambda case: getattr(case, 'name', ''),
)
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
def test_how_many_samples_at_a_time(case, inference, training, channels_last):
    x, weight, routing, bias = case.operands(torch.float32, channels_last)
    sizes = [pair(case.geometry[name]) for name in ('kernel_size', 'stride', 'padding')]
    for expected in (inference, training):
        x.requires_grad_(expected is training)
        assert _mixed_conv.samples_at_once(x, weight, *sizes, case.geometry['groups']) == expected[channels_last]
        output = dynamic_conv2d(x, weight, routing, bias, **case.geometry)
        assert error(output, case.expected(x, weight, routing, bias)) < TOLERANCE[torch.float32]
        assert output.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize('name', ['plain', 'pointwise_bias', 'depthwise_stride', 'one_sample', 'groups'])
def test_second_derivatives(name):
    original = BY_NAME[name]
    arguments = original.arguments | {'groups': min(2, original.geometry['groups'])}
    case = Case(name, min(original.batch, 2), 2, 2, 5, 5, experts=2, bias=True, arguments=arguments)
    operands = [operand.requires_grad_() for operand in case.operands()]

    def function(*operands):
        return dynamic_conv2d(*operands, **case.geometry)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


@pytest.mark.parametrize('case', [BY_NAME['bias'], BY_NAME['pointwise'], BY_NAME['depthwise_stride']], ids=str)
def test_reference_is_a_convolution_per_sample(case):
    x, weight, routing, bias = case.operands()
    arguments = {name: value for name, value in case.geometry.items() if name != 'kernel_size'}
    kernels = torch.einsum('ne,ep->np', routing, weight)
    for i in range(case.batch):
        kernel = kernels[i].view(case.out_channels, -1, *pair(case.geometry['kernel_size']))
        mixed = None if bias is None else routing[i] @ bias
        expected = torch.nn.functional.conv2d(x[i : i + 1], kernel, mixed, **arguments)
        assert error(case.expected(x, weight, routing, bias)[i : i + 1], expected) < 1e-12


@pytest.mark.parametrize('case', [case for case in CASES if case.batch > 1], ids=lambda case: case.name)
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
def test_batch_of_none(case, channels_last):
    operands = [None if o is None else o.requires_grad_() for o in case.operands(torch.float32, channels_last, batch=0)]
    output = dynamic_conv2d(*operands, **case.geometry)
    assert output.shape == (0, *case.expected(*case.operands()).shape[1:])
    output.sum().backward()
    for operand in operands:
        assert operand is None or (operand.grad.shape == operand.shape and not operand.grad.any())


@pytest.mark.parametrize('padding', ['same', ''])
@pytest.mark.parametrize('kernel_size', [1, 3, 4, (5, 2)])
@pytest.mark.parametrize('stride', [1, 2, (3, 1)])
@pytest.mark.parametrize('dilation', [1, (1, 2)])
@pytest.mark.parametrize('size', [(9, 12), (10, 11)])
def test_padding_by_name_is_timms(padding, kernel_size, stride, dilation, size):
    peer = CondConv2d(4, 6, kernel_size, stride, padding, dilation, groups=2, bias=True, num_experts=3).double()
    x, routing = torch.randn(2, 4, *size).double(), torch.rand(2, 3).double()
    output = dynamic_conv2d(
        x,
        peer.weight,
        routing,
        peer.bias,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=2,
    )
    assert error(output, peer(x, routing)) < 1e-12


def test_defaults_are_a_3x3_convolution_that_keeps_the_size():
    x, weight, routing, _ = BY_NAME['plain'].operands()
    assert torch.equal(dynamic_conv2d(x, weight, routing), dynamic_conv2d(x, weight, routing, None, 3, 1, 1, 1, 1))


@pytest.mark.parametrize('name', ['pointwise', 'pointwise_bias', 'depthwise', 'plain', 'one_sample'])
def test_channels_last_stays(name):
    case = BY_NAME[name]
    output = dynamic_conv2d(*case.operands(torch.float32, channels_last=True), **case.geometry)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_any_strides():
    case = BY_NAME['plain']
    x, weight, routing, _ = case.operands()
    expected = case.expected(x, weight, routing, None)
    wide = torch.zeros(3, 12, 9, 14, dtype=torch.float64)
    wide[:, ::2, :, ::2] = x
    spread = torch.stack((weight, weight), 2)[:, :, 0]
    assert error(dynamic_conv2d(wide[:, ::2, :, ::2], spread, routing.t().contiguous().t()), expected) < 1e-12
    assert error(dynamic_conv2d(x[:1].expand(3, -1, -1, -1), weight, routing)[0], expected[0]) < 1e-12


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', ['bias', 'pointwise_bias', 'one_sample', 'depthwise'])
def test_autocast(name, dtype):
    case = BY_NAME[name]
    x, weight, routing, bias = case.operands(torch.float32)
    expected = case.expected(x, weight, routing, bias)
    with torch.autocast('cpu', dtype=dtype):
        for operands in ((x, weight, routing, bias), (x.to(dtype), weight, routing.to(dtype), bias)):
            output = dynamic_conv2d(*operands, **case.geometry)
            assert output.dtype == dtype
            assert error(output, expected) < TOLERANCE[dtype]


def operands_that(**changes):
    x, weight, routing, bias = BY_NAME['bias'].operands(torch.float32)
    operands = {'x': x, 'weight': weight, 'routing': routing, 'bias': bias}
    return {name: changes[name](operand) if name in changes else operand for name, operand in operands.items()}


@pytest.mark.parametrize(
    ('operands', 'arguments', 'kind', 'message'),
    [
        ({'x': lambda t: t.numpy()}, {}, TypeError, 'x must be a tensor, got ndarray'),
        ({'x': lambda t: t.long()}, {}, TypeError, 'x must have a floating dtype, got torch.int64'),
        ({'x': lambda t: t[0]}, {}, ValueError, r'x must have shape \(N, C, H, W\), got \(6, 9, 7\)'),
        ({'x': lambda t: t[:, :0]}, {}, ValueError, r'at least one row, column and channel, got shape \(3, 0, 9, 7\)'),
        (
            {'weight': lambda t: t.double()},
            {},
            TypeError,
            "weight must have x's dtype torch.float32, got",
        ),
        ({'weight': lambda t: t.to('meta')}, {}, ValueError, "weight must be on x's device cpu, got meta"),
        ({'weight': lambda t: t.view(4, 4, 6, 3, 3)}, {}, ValueError, r'got \(4, 4, 6, 3, 3\)'),
        ({'weight': lambda t: t[:, 1:]}, {}, ValueError, r'multiple of C \* kh \* kw = 6 \* 3 \* 3 columns'),
        (
            {'routing': lambda t: t.half()},
            {},
            TypeError,
            "routing must have x's dtype torch.float32, got",
        ),
        ({'routing': lambda t: t[:2]}, {}, ValueError, r'\(N, E\) = \(3, 4\) .* got \(2, 4\)'),
        ({'routing': lambda t: t[:, 1:]}, {}, ValueError, r'\(N, E\) = \(3, 4\) .* got \(3, 3\)'),
        ({'bias': lambda t: t[:, :3]}, {}, ValueError, r'bias must have shape \(E, Cout\) = \(4, 4\), got \(4, 3\)'),
        ({}, {'groups': 4}, ValueError, "groups must be positive and divide x's 6 channels, got 4"),
        ({}, {'groups': 0}, ValueError, 'groups must be positive'),
        ({}, {'groups': 1.0}, TypeError, 'groups must be an int, got 1.0'),
        ({}, {'kernel_size': 0}, ValueError, 'kernel_size must be at least 1, got 0'),
        ({}, {'stride': (1, 2, 3)}, TypeError, r'stride must be an int or a \(height, width\) pair'),
        ({}, {'padding': -1}, ValueError, 'padding must be at least 0, got -1'),
        ({}, {'padding': 'full'}, TypeError, "padding must be .* got 'full'"),
        ({}, {'dilation': 6, 'padding': 0}, ValueError, r'does not fit into an input of 9 x 7 pixels'),
    ],
)
def test_bad_arguments(operands, arguments, kind, message):
    with pytest.raises(kind, match=message):
        dynamic_conv2d(**operands_that(**operands), **arguments)


class Module(torch.nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.geometry = case.geometry

    def forward(self, x, weight, routing, bias):
        return dynamic_conv2d(x, weight, routing, bias, **self.geometry)


NAMES = ('bias', 'pointwise_bias', 'depthwise', 'depthwise_stride', 'groups')
TRANSFORMED = [BY_NAME[name] for name in NAMES]


@pytest.mark.parametrize('case', TRANSFORMED, ids=lambda case: case.name)
@pytest.mark.parametrize('dynamic', [False, True])
def test_compile(case, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(Module(case), fullgraph=True, backend='aot_eager', dynamic=dynamic)
    for batch in (3, 1, 5):
        operands = case.operands(torch.float32, batch=batch)
        assert error(compiled(*operands), case.expected(*operands)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize('case', TRANSFORMED, ids=lambda case: case.name)
def test_fx(case):
    traced = torch.fx.symbolic_trace(Module(case))
    assert [node.target for node in traced.graph.nodes if node.op == 'call_function'] == [dynamic_conv2d]
    for batch in (0, 1, 3):
        operands = case.operands(batch=batch)
        assert torch.equal(traced(*operands), dynamic_conv2d(*operands, **case.geometry))


def scripted_call(x: Tensor, weight: Tensor, routing: Tensor, bias: Tensor | None) -> Tensor:
    return dynamic_conv2d(x, weight, routing, bias, kernel_size=[3, 3], stride=2, padding=(1, 1), dilation=1, groups=2)


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_torchscript():
    case = Case('scripted', bias=True, arguments={'stride': 2, 'groups': 2})
    scripted = torch.jit.script(scripted_call)
    for batch in (0, 1, 3):
        operands = case.operands(batch=batch)
        assert torch.equal(scripted(*operands), dynamic_conv2d(*operands, **case.geometry))


@pytest.mark.parametrize('case', TRANSFORMED, ids=lambda case: case.name)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_trace_holds_at_other_sizes(case):
    class Plain(Module):
        def forward(self, x, weight, routing):
            return dynamic_conv2d(x, weight, routing, **self.geometry)

    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        traced = torch.jit.trace(Plain(case), case.operands(batch=1)[:3])
    for batch in (1, 4):
        operands = case.operands(batch=batch)[:3]
        assert error(traced(*operands), case.expected(*operands, None)) < 1e-12


@pytest.mark.parametrize('case', TRANSFORMED, ids=lambda case: case.name)
def test_export(case):
    batch = torch.export.Dim('batch', min=1, max=16)
    shapes = ({0: batch}, None, {0: batch}, None)
    program = torch.export.export(Module(case), tuple(case.operands(torch.float32)), dynamic_shapes=shapes)
    for size in (1, 2, 7):
        operands = case.operands(torch.float32, batch=size)
        assert error(program.module()(*operands), case.expected(*operands)) < TOLERANCE[torch.float32]
    fixed = torch.export.export(Module(case), tuple(case.operands(torch.float32, batch=1)))
    operations = {str(node.target) for node in fixed.graph.nodes if node.op == 'call_function'}
    assert operations & {'aten.conv2d.default', 'aten.bmm.default', 'aten.baddbmm.default'}


@pytest.mark.parametrize('case', TRANSFORMED, ids=lambda case: case.name)
@pytest.mark.parametrize('dynamo', [False, True], ids=['traced', 'dynamo'])
@pytest.mark.parametrize('dynamic', [False, True], ids=['fixed', 'dynamic'])
def test_onnx(case, dynamo, dynamic, tmp_path):
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    shapes = {}
    if dynamic and dynamo:
        shapes = {'dynamic_shapes': (axes, None, {0: 'batch'}, None)}
    elif dynamic:
        shapes = {'dynamic_axes': {'x': axes, 'routing': {0: 'batch'}, 'output': axes}}
    path = tmp_path / 'dynamic_conv.onnx'
    names = ['x', 'weight', 'routing', *(['bias'] if case.bias else [])]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the tracing exporter is deprecated, and still what others call
        torch.onnx.export(
            Module(case),
            tuple(case.operands(torch.float32)),
            path,
            input_names=names,
            output_names=['output'],
            opset_version=18,
            dynamo=dynamo,
            **shapes,
        )
    assert {node.domain for node in onnx.load(path).graph.node} == {''}
    session = onnxruntime.InferenceSession(path)
    sizes = [(1, 9, 7), (2, 12, 10)] if dynamic else [(case.batch, case.height, case.width)]
    for batch, height, width in sizes:
        run = Case('run', batch, case.in_channels, case.out_channels, height, width, case.experts, case.bias,
                   case.arguments)  # fmt: skip
        operands = run.operands(torch.float32)
        feed = {name: operand.numpy() for name, operand in zip(names, operands[: len(names)], strict=True)}
        (output,) = session.run(None, feed)
        assert error(torch.from_numpy(output), run.expected(*operands)) < TOLERANCE[torch.float32]


def test_vmap_over_experts_and_samples():
    x, weight, routing, _ = BY_NAME['plain'].operands()
    expected = dynamic_conv2d(x, weight, routing)
    alone = torch.func.vmap(lambda x, routing: dynamic_conv2d(x[None], weight, routing[None])[0])(x, routing)
    assert error(alone, expected) < 1e-12


def test_meta():
    x, weight, routing, bias = (tensor.to('meta') for tensor in BY_NAME['bias'].operands())
    assert dynamic_conv2d(x, weight, routing, bias).shape == (3, 4, 9, 7)
