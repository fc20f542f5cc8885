"""The layers of dynamic convolution: routing, timm's layout and numbers, every option, and what users do to modules."""

import copy
import itertools
import math

import pytest
import timm.layers
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.utils.model import reparameterize_model
from torch import nn
from torch.testing import assert_close

from dcnzoo.layers import CondConv2d, DynamicConv2d
from dcnzoo.layers.dynamic_conv import GatedConv2d
from dcnzoo.ops import _dynamic_conv, available_backends, use_backend
from dcnzoo.ops._mixed_conv import samples_at_once


def images(batch: int = 2, channels: int = 6, size: tuple[int, int] = (9, 8)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize('padding', ['', 'same', 'valid', 0, (2, 1)], ids=str)
@pytest.mark.parametrize('kernel_size', [1, 3, 4, (5, 3)], ids=str)
@pytest.mark.parametrize('stride', [1, 2, (2, 1)], ids=str)
@pytest.mark.parametrize(('groups', 'bias', 'num_experts'), [(1, False, 4), (2, True, 1), (6, True, 3)])
def test_bank_is_timms(padding, kernel_size, stride, groups, bias, num_experts):
    arguments = (6, 12, kernel_size, stride, padding, (1, 2), groups, bias, num_experts)
    peer = timm.layers.CondConv2d(*arguments).double()
    bank = CondConv2d(*arguments, dtype=torch.float64)
    bank.load_state_dict(peer.state_dict())
    routing = torch.rand(2, num_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(bank(images(), routing), peer(images(), routing))


@pytest.mark.parametrize('routing', ['linear', 'mlp'])
@pytest.mark.parametrize('routing_activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('temperature', [1.0, 30.0])
def test_is_the_published_formula(routing, routing_activation, temperature):
    layer = DynamicConv2d(
        *(6, 4, 3),
        bias=True,
        routing=routing,
        routing_activation=routing_activation,
        temperature=temperature,
        dtype=torch.float64,
    )
    x = images()
    logits = layer.routing(x.mean((2, 3))) / temperature
    shares = logits.sigmoid() if routing_activation == 'sigmoid' else logits.softmax(1)
    assert_close(layer.shares(x), shares)
    bank = layer.cond_conv
    for i in range(2):
        kernel = sum(shares[i, e] * bank.weight[e].view(4, 6, 3, 3) for e in range(4))
        bias = sum(shares[i, e] * bank.bias[e] for e in range(4))
        assert_close(layer(x)[i], nn.functional.conv2d(x[i], kernel, bias, padding=1))


@pytest.mark.skipif('native' not in available_backends('cpu'), reason='the CPU library was not built')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('channels, size', [(6, (9, 8)), (80, (7, 5)), (36, (40, 33)), (24, (1, 1))], ids=str)
@pytest.mark.parametrize('num_experts', [1, 4, 7])
@pytest.mark.parametrize('routing_activation, temperature', [('sigmoid', 1.0), ('softmax', 30.0)])
def test_inference_on_one_sample(layout, channels, size, num_experts, routing_activation, temperature, mixings):
    """One call of the compiled library does what five of PyTorch do."""
    for kernel_size, stride, groups in ((1, 1, 1), (3, 2, 2), ((5, 3), 1, channels)):
        layer = DynamicConv2d(
            *(channels, channels, kernel_size, stride),
            groups=groups,
            num_experts=num_experts,
            routing_activation=routing_activation,
            temperature=temperature,
        )
        x = (3 + images(1, channels, size).float()).to(memory_format=layout)
        for view in (x, x.expand(2, -1, -1, -1)[1:], torch.cat([x, x])[1:], x.flip(3), x.transpose(2, 3)):
            with torch.no_grad():
                out = layer(view)
            with torch.no_grad(), use_backend('reference'):
                expected = layer(view)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                kept = expected.is_contiguous(memory_format=memory_format)
                assert out.is_contiguous(memory_format=memory_format) == kept
            assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert mixings.count == 3 * 5


@pytest.mark.skipif('native' not in available_backends('cpu'), reason='the CPU library was not built')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('channels, size', [(6, (9, 8)), (80, (7, 5)), (24, (1, 1)), (40, (300, 300))], ids=str)
def test_inference_on_several_samples(layout, channels, size, mixings):
    """The same for small kernels that all samples are convolved with at once."""
    layer = DynamicConv2d(channels, channels, 3, groups=channels)
    x = (3 + images(3, channels, size).float()).to(memory_format=layout)
    with torch.no_grad():
        out = layer(x)
    with torch.no_grad(), use_backend('reference'):
        expected = layer(x)
    assert out.is_contiguous(memory_format=layout)
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert mixings.count == 1
    with torch.no_grad():
        large = DynamicConv2d(channels, 2**14 // channels + 1, 1)
        large(x[:, :, :2, :2])
    assert mixings.count == 1


def test_samples_convolved_in_parts_are_mixed_in_parts(mixings):
    layer, x = DynamicConv2d(24, 48, 3), images(3, 24, (300, 300)).float()
    assert samples_at_once(x, layer.cond_conv.weight, [3, 3], [1, 1], [1, 1], 1) < 3
    with torch.no_grad():
        out = layer(x)
    assert mixings.count == 0
    with torch.no_grad(), use_backend('reference'):
        assert_close(out, layer(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def mixings(monkeypatch):
    """Counts the calls of the compiled library."""

    class Counter:
        count = 0

        def __call__(self, *arguments):
            self.count += 1
            return torch.ops.dcnzoo.mixed_kernels.default(*arguments)

    counter = Counter()
    monkeypatch.setattr(_dynamic_conv, '_mixed_kernels', counter)
    return counter


def test_inference_respects_hooks_wrappers_and_gradients(mixings):
    layer, x = DynamicConv2d(6, 4, 3), images(1).float()
    expected = layer(x)
    assert expected.requires_grad
    seen = []
    with torch.no_grad():
        for module in (layer.routing, layer.cond_conv):
            handles = [
                module.register_forward_hook(lambda *_: seen.append('after')),
                module.register_forward_pre_hook(lambda *_: seen.append('before')),
            ]
            for handle in handles:
                assert_close(layer(x), expected)
                handle.remove()
        assert seen == ['before', 'after', 'before'] * 2
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append('global'))
        assert_close(layer(x), expected)
        handle.remove()
        assert 'global' in seen
        layer.routing = nn.Sequential(layer.routing)
        assert_close(layer(x), expected)
        with use_backend('reference'):
            layer(x)
        layer.double()(images(1))
    assert mixings.count == 0


@pytest.mark.parametrize('name', ['routing', 'cond_conv'])
def test_inference_respects_another_forward(mixings, name):
    class Zero(ModelHook):
        def post_forward(self, module, output):
            return torch.zeros_like(output)

    layer, x = DynamicConv2d(6, 4, 3), images(1).float()
    add_hook_to_module(getattr(layer, name), Zero())
    expected = layer(x)
    with torch.no_grad():
        assert_close(layer(x), expected.detach())
    assert mixings.count == 0


@pytest.mark.parametrize('grad', [True, False])
def test_parameters_of_other_shapes_are_refused(grad):
    layer, x = DynamicConv2d(6, 4, 3), images(1).float()
    layer.routing = nn.Linear(6, 3)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r'routing must have shape \(N, E\) = \(1, 4\)'):
        layer(x)
    layer = DynamicConv2d(6, 4, 3)
    layer.cond_conv.weight = nn.Parameter(torch.zeros(4, 215))
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match='weight must have a multiple of'):
        layer(x)


def test_inference_respects_shares_of_the_instance(mixings):
    layer, x = DynamicConv2d(6, 4, 3), images(1).float()
    layer.shares = lambda x: x.new_full((len(x), 4), 0.25)
    expected = layer(x)
    with torch.no_grad():
        assert_close(layer(x), expected.detach())
    assert mixings.count == 0


def test_inference_respects_a_subclass_with_other_shares(mixings):
    class Even(DynamicConv2d):
        def shares(self, x):
            return x.new_full((len(x), 4), 0.25)

    layer, x = Even(6, 4, 3), images(1).float()
    expected = nn.functional.conv2d(x, layer.cond_conv.weight.mean(0).view(4, 6, 3, 3), padding=1)
    with torch.no_grad():
        assert_close(layer(x), expected.detach())
    assert mixings.count == 0


def test_inference_refuses_what_does_not_fit():
    with torch.no_grad():
        with pytest.raises(ValueError, match=r'x must have shape \(N, 6, H, W\), got \[1, 5, 9, 8\]'):
            DynamicConv2d(6, 4, 3)(torch.randn(1, 5, 9, 8))
        with pytest.raises(ValueError, match='does not fit into an input of 2 x 2 pixels'):
            DynamicConv2d(6, 4, 5, padding=0)(torch.randn(1, 6, 2, 2))
        with pytest.raises(ValueError, match='x must have at least one row, column and channel'):
            DynamicConv2d(6, 4, 1, padding=1)(torch.randn(1, 6, 0, 2))


def test_keys_and_shapes():
    linear = {key: tuple(value.shape) for key, value in DynamicConv2d(6, 4, 3, bias=True).state_dict().items()}
    assert linear == {
        'routing.weight': (4, 6),
        'routing.bias': (4,),
        'cond_conv.weight': (4, 4 * 6 * 9),
        'cond_conv.bias': (4, 4),
    }
    assert list(DynamicConv2d(6, 4, 1).state_dict()) == ['routing.weight', 'routing.bias', 'cond_conv.weight']
    mlp = {key: tuple(value.shape) for key, value in DynamicConv2d(6, 4, routing='mlp').routing.state_dict().items()}
    assert mlp == {'fc1.weight': (6, 6), 'fc1.bias': (6,), 'fc2.weight': (4, 6), 'fc2.bias': (4,)}


def test_every_expert_starts_as_a_convolution_does():
    torch.manual_seed(0)
    layer = DynamicConv2d(64, 32, 3, groups=2, bias=True, num_experts=16)
    bound = 1 / math.sqrt(32 * 9)
    for expert, bias in zip(layer.cond_conv.weight, layer.cond_conv.bias, strict=True):
        assert 0.98 * bound < expert.abs().max() <= bound
        assert abs(expert.std() / (bound / math.sqrt(3)) - 1) < 0.03
        assert 0.5 * bound < bias.abs().max() <= bound


def test_other_layouts_of_expert_weights_load():
    bank = CondConv2d(6, 4, (3, 2), groups=2, num_experts=3)
    weight = torch.randn(3, 4 * 3 * 6)
    for shape in ((3, 4, 3, 3, 2), (12, 3, 3, 2), (3, 72)):
        bank.load_state_dict({'weight': weight.view(shape)})
        assert torch.equal(bank.weight, weight)
    for shape in ((72, 3), (3, 4, 18), (3, 4, 3, 2, 3)):
        with pytest.raises(RuntimeError, match='size mismatch'):
            bank.load_state_dict({'weight': weight.view(shape)})


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('groups', [1, 4])
def test_module_survives_what_trainers_do(kernel_size, groups):
    """Half and back, channels_last, a deep copy as for EMA, and a state_dict."""
    layer = DynamicConv2d(4, 4, kernel_size, groups=groups)
    x = images(3, 4).float()
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    assert_close(copy.deepcopy(layer)(x), expected)
    assert layer.half()(x.half()).dtype == torch.float16
    assert_close(layer.float()(x), expected, rtol=1e-2, atol=1e-2)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(('kernel_size', 'groups', 'padding'), [(1, 1, ''), (3, 1, 'same'), (3, 6, 1), (5, 6, '')])
@pytest.mark.parametrize('routing_activation', ['sigmoid', 'softmax'])
@pytest.mark.filterwarnings('ignore:.*torch.jit', 'ignore:Converting a tensor to a Python boolean')
def test_transformations(kernel_size, groups, padding, routing_activation):
    layer = DynamicConv2d(
        *(6, 6, kernel_size, 2, padding), groups=groups, routing_activation=routing_activation, temperature=2.0
    ).eval()
    scripted, traced = torch.jit.script(layer), torch.fx.symbolic_trace(layer)
    jit_traced = torch.jit.trace(layer, images(1).float())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for batch, size in itertools.product((1, 3), ((9, 8), (6, 6))):
        x = images(batch, 6, size).float()
        with torch.no_grad():
            for function in (scripted, traced, compiled):
                assert_close(function(x), layer(x))
            if padding != 'same' or size == (9, 8):  # a trace keeps the padding of its example
                assert_close(jit_traced(x), layer(x))


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize(('kernel_size', 'groups'), [(1, 1), (3, 64)])
def test_exports_any_size_with_gradients(batch, kernel_size, groups):
    model = nn.Sequential(nn.Conv2d(3, 64, 1), DynamicConv2d(64, 64, kernel_size, groups=groups))
    sizes = {2: torch.export.Dim('height', min=8, max=2048), 3: torch.export.Dim('width', min=8, max=2048)}
    exported = torch.export.export(model, (torch.randn(batch, 3, 64, 64),), dynamic_shapes=(sizes,)).module()
    for size in ((20, 30), (64, 64), (9, 300)):
        x = torch.randn(batch, 3, *size)
        assert_close(exported(x), model(x))


@pytest.mark.parametrize('free_batch', [False, True])
@pytest.mark.parametrize(
    ('kernel_size', 'stride', 'groups', 'padding'),
    [(1, 2, 1, ''), (3, 2, 1, ''), (3, 2, 8, ''), (5, (2, 3), 8, 'same'), (3, (1, 3), 2, (1, 2))],
)
def test_exports_any_size_with_strides(kernel_size, stride, groups, padding, free_batch):
    if free_batch and groups == 8 and torch.__version__ < '2.14':  # 2.10 fails, those between are untried
        pytest.skip('the exporter of this PyTorch compares free sizes of products that are broadcast')
    layer = DynamicConv2d(8, 8, kernel_size, stride, padding, groups=groups)
    shapes = {2: torch.export.Dim('height', min=8, max=2048), 3: torch.export.Dim('width', min=8, max=2048)}
    if free_batch:
        shapes[0] = torch.export.Dim('batch', min=1, max=16)
    exported = torch.export.export(layer, (torch.randn(3, 8, 33, 40),), dynamic_shapes=(shapes,)).module()
    for size in ((31, 18), (8, 9), (64, 64)):
        for batch in (1, 5) if free_batch else (3,):
            x = torch.randn(batch, 8, *size)
            assert_close(exported(x), layer(x))


def test_autocast_trains():
    layer = DynamicConv2d(6, 8, 3, bias=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        output = layer(images().float())
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


@pytest.mark.parametrize('batch', [0, 1, 3])
def test_batches(batch):
    layer = DynamicConv2d(6, 8, 3, 2)
    assert layer(images(batch).float()).shape == (batch, 8, 5, 4)


def test_temperature_may_change_in_training():
    layer = DynamicConv2d(6, 4, routing_activation='softmax', temperature=1.0)
    x = images().float()
    sharp = layer.shares(x)
    layer.temperature = 1000.0
    assert_close(layer.shares(x), torch.full((2, 4), 0.25), rtol=0.01, atol=0)
    assert sharp.std() > layer.shares(x).std()


@pytest.mark.parametrize('padding', ['', 'same', 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('routing_activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('bias', [False, True])
@torch.no_grad()
def test_one_expert_fuses_to_a_plain_convolution(padding, stride, routing_activation, bias):
    layer = DynamicConv2d(
        *(6, 4, 3, stride, padding),
        bias=bias,
        num_experts=1,
        routing_activation=routing_activation,
        temperature=3.0,
        dtype=torch.float64,
    )
    model = nn.Sequential(layer).eval()
    plain = reparameterize_model(model)
    assert not any(isinstance(module, (DynamicConv2d, CondConv2d)) for module in plain.modules())
    assert any(type(module) is nn.Conv2d for module in plain.modules())
    x = images(3)
    assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    if routing_activation == 'softmax' and (padding != 'same' or stride == 1):
        assert type(plain[0]) is nn.Conv2d
    else:
        assert isinstance(plain[0], GatedConv2d) and not plain[0].training


def test_several_experts_stay_as_they_are():
    layer = DynamicConv2d(6, 4)
    assert layer.fuse() is layer
    assert isinstance(reparameterize_model(nn.Sequential(layer))[0], DynamicConv2d)


@pytest.mark.parametrize(
    ('arguments', 'kind', 'message'),
    [
        (dict(in_channels=0), ValueError, 'in_channels must be a positive int, got 0'),
        (dict(num_experts=0), ValueError, 'num_experts must be a positive int, got 0'),
        (dict(groups=4), ValueError, 'groups must divide in_channels 6 and out_channels 4, got 4'),
        (dict(kernel_size=(3, 3, 3)), TypeError, 'kernel_size must be an int or a'),
        (dict(stride=0), ValueError, 'stride must be at least 1, got 0'),
        (dict(padding='full'), ValueError, "padding must be .* got 'full'"),
        (dict(padding=-1), ValueError, 'padding must be at least 0, got -1'),
        (dict(routing='conv'), ValueError, "routing must be 'linear' or 'mlp', got 'conv'"),
        (dict(routing_activation='relu'), ValueError, "must be 'sigmoid' or 'softmax', got 'relu'"),
        (dict(temperature=0), ValueError, 'temperature must be positive, got 0'),
    ],
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        DynamicConv2d(**(dict(in_channels=6, out_channels=4) | arguments))


def test_wrong_input():
    layer = DynamicConv2d(6, 4)
    with pytest.raises(ValueError, match='x must have shape'):
        layer.cond_conv(torch.randn(6, 9, 8), torch.rand(1, 4))
    with pytest.raises(ValueError, match=r'routing must have shape \(N, E\) = \(2, 4\)'):
        layer.cond_conv(images().float(), torch.rand(2, 3))
    with pytest.raises(ValueError, match=r'x must have shape \(N, 6, H, W\), got \[2, 5, 9, 8\]'):
        layer(images(channels=5).float())
    with pytest.raises(ValueError, match=r'x must have shape \(N, 6, H, W\), got \[6, 9, 8\]'):
        layer(images()[0].float())
    with pytest.raises(ValueError, match='does not fit into an input of 2 x 9 pixels'):
        DynamicConv2d(6, 4, 5, padding=0)(images(size=(2, 9)).float())


def test_repr_names_what_matters():
    text = repr(DynamicConv2d(6, 4, 3, 2, 'same', routing_activation='softmax'))
    assert 'num_experts=4' in text and 'padding=same' in text and 'softmax' in text and 'stride=(2, 2)' in text
