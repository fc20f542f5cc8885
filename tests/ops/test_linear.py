"""The linear map: the ways it takes agree, and only plain calls leave PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from dcnzoo.layers import Linear, Mlp
from dcnzoo.ops import _linear, linear

SHAPES = [((300, 64), 128), ((300, 128), 64), ((2, 25, 7, 96), 112), ((4096, 16), 16), ((1, 1024), 1024), ((3, 5), 4)]


def operands(shape=(300, 64), out_features=128, bias=True, **kwargs):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (out_features, shape[-1]), (out_features,))[: 3 if bias else 2]
    return [torch.randn(size, generator=generator).requires_grad_(**kwargs) for size in sizes]


def served(monkeypatch):
    """Counts the products that take the other way than PyTorch's."""
    calls = []
    product = _linear._product
    monkeypatch.setattr(_linear, '_product', lambda *args: calls.append(args) or product(*args))
    return calls


gains = pytest.mark.skipif(not _linear.ONEDNN_IS_WIDER, reason='this processor gains nothing: no AVX-512')


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(('shape', 'out_features'), SHAPES)
def test_values_and_gradients(shape, out_features, bias):
    tensors = operands(shape, out_features, bias)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, expected = linear(*tensors), F.linear(*doubles)
    assert out.shape == expected.shape
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, doubles, grad.double())
    with torch.no_grad():
        torch.testing.assert_close(linear(*tensors), out, rtol=0, atol=0)
    for ours, theirs in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_any_strides():
    x, weight, bias = operands((128, 300), 96, requires_grad=False)
    weight = torch.randn(128, 96).t()
    x = x.t()[::2].expand(3, 150, 128)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('frozen', [0, 1, 2])
def test_gradients_that_nobody_needs(frozen):
    tensors = operands()
    tensors[frozen].requires_grad_(False)
    linear(*tensors).sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [i == frozen for i in range(3)]


def test_differentiated_twice():
    tensors = operands()
    results = []
    for function in (linear, F.linear):
        grad_x, grad_weight = torch.autograd.grad(function(*tensors).pow(2).sum(), tensors[:2], create_graph=True)
        results.append(torch.autograd.grad(grad_x.pow(2).sum() + grad_weight.sum(), tensors))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-1)


@gains
def test_plain_calls_are_served(monkeypatch):
    calls = served(monkeypatch)
    tensors = operands()
    linear(*tensors).sum().backward()
    assert len(calls) == 3
    with torch.inference_mode():
        linear(*tensors)
    assert len(calls) == 4


def through_autocast(*tensors):
    with torch.autocast('cpu', torch.bfloat16):
        return linear(*tensors)


def through_vmap(x, weight, bias):
    return torch.vmap(linear, (0, None, None))(x.unflatten(0, (2, -1)), weight, bias)


def through_forward_ad(x, weight, bias):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)).tangent


def through_flop_counter(x, weight, bias):
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    return torch.tensor(counter.get_total_flops())


ELSEWHERE = {
    'autocast': (through_autocast, lambda *t: F.linear(*(a.bfloat16() for a in t))),
    'vmap': (through_vmap, lambda *t: F.linear(*t).unflatten(0, (2, -1))),
    'func.grad': (
        lambda *t: torch.func.grad(lambda *a: linear(*a).sum())(*t),
        lambda x, weight, bias: weight.sum(0).expand_as(x),
    ),
    'forward AD': (through_forward_ad, lambda x, weight, bias: weight.sum(1).expand(len(x), -1)),
    'flop counter': (through_flop_counter, lambda x, weight, bias: torch.tensor(2 * x.numel() * len(weight))),
    'trace': (lambda *t: torch.jit.trace(linear, t, check_trace=False)(*t), F.linear),
    'script': (lambda *t: torch.jit.script(linear)(*t), F.linear),
    'double': (lambda *t: linear(*(a.double() for a in t)), lambda *t: F.linear(*(a.double() for a in t))),
    'compile': (lambda *t: torch.compile(linear, backend='aot_eager', fullgraph=True)(*t), F.linear),
    'meta': (lambda *t: linear(*(a.to('meta') for a in t)).new_zeros(1, device='cpu'), lambda *t: torch.zeros(1)),
}


@pytest.mark.parametrize('name', ELSEWHERE)
def test_everything_else_is_left_to_pytorch(name, monkeypatch):
    calls = served(monkeypatch)
    tensors = operands(requires_grad=False)
    function, expected = ELSEWHERE[name]
    torch.testing.assert_close(function(*tensors), expected(*tensors), rtol=1e-4, atol=1e-3)
    assert not calls


def test_the_layers():
    torch.manual_seed(0)
    layer, mlp = Linear(96, 64), Mlp(64, 256, fc2_bias=False)
    x = torch.randn(2, 14, 14, 96)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    expected = F.linear(F.gelu(F.linear(expected, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight)
    torch.testing.assert_close(mlp(layer(x)), expected, rtol=1e-4, atol=1e-4)
    graph = torch.fx.symbolic_trace(mlp)
    torch.testing.assert_close(graph(layer(x)), expected, rtol=1e-4, atol=1e-4)
    assert [node.target for node in graph.graph.nodes if node.op == 'call_function'] == [linear, linear]
