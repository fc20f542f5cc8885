"""The deformable convolutions v1 and v2: against their definition, and in the places of an ordinary convolution."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from dcnzoo.layers import DCNv4Conv2d, DeformConv2d


def layer(*args, noise: float = 0.3, dtype=torch.float64, **kwargs) -> DeformConv2d:
    """A layer with noise on what predicts the offsets."""
    torch.manual_seed(0)
    module = DeformConv2d(*args, dtype=dtype, **kwargs)
    for parameter in module.conv_offset.parameters():
        nn.init.normal_(parameter, std=noise)
    return module


def images(channels: int = 6, size: tuple[int, int] = (9, 11), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


GEOMETRY = {
    'plain': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, stride=2, padding=1),
    'pairs': dict(kernel_size=(3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    'no_padding': dict(kernel_size=3),
    'same': dict(kernel_size=3, padding='same', dilation=2),
    'same_even': dict(kernel_size=(2, 4), padding='same'),
    'valid': dict(kernel_size=2, stride=2, padding='valid'),
    'grouped': dict(kernel_size=3, padding=1, groups=2, bias=False),
    'pointwise': dict(kernel_size=1),
}


@pytest.mark.parametrize('kwargs', GEOMETRY.values(), ids=GEOMETRY.keys())
@pytest.mark.parametrize('modulated', [False, True])
@torch.no_grad()
def test_starts_as_an_ordinary_convolution(kwargs, modulated):
    module = DeformConv2d(6, 8, **kwargs, offset_groups=3, modulated=modulated, dtype=torch.float64)
    plain = nn.Conv2d(6, 8, **kwargs, dtype=torch.float64)
    plain.weight.copy_(module.weight)
    if plain.bias is not None:
        plain.bias.copy_(module.bias)
    if modulated:
        plain.weight.mul_(0.5)
    assert_close(module(images()), plain(images()))


def by_loops(x, offset, mask, weight, bias, module):
    """The sum over the taps of weight and bilinear sample, written down tap by tap."""
    (sh, sw), (ph, pw), (dh, dw) = module.stride, module.padding, module.dilation
    kh, kw = module.kernel_size
    n, out_h, out_w = offset.shape[0], *offset.shape[2:]
    offset = offset.view(n, module.offset_groups, kh * kw, 2, out_h, out_w)
    mask = mask.view(n, module.offset_groups, kh * kw, out_h, out_w)
    columns = x.new_zeros(n, x.shape[1], kh * kw, out_h, out_w)
    width = x.shape[1] // module.offset_groups

    def pixel(sample, channel, row, column):
        inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
        return x[sample, channel, row, column] if inside else x.new_zeros(())

    for sample, channel, tap, i, j in itertools.product(*map(range, columns.shape)):
        group = channel // width
        row = i * sh - ph + tap // kw * dh + offset[sample, group, tap, 0, i, j].item()
        column = j * sw - pw + tap % kw * dw + offset[sample, group, tap, 1, i, j].item()
        top, left = int(row // 1), int(column // 1)
        for y, z in itertools.product((top, top + 1), (left, left + 1)):
            share = (1 - abs(row - y)) * (1 - abs(column - z))
            columns[sample, channel, tap, i, j] += share * pixel(sample, channel, y, z)
        columns[sample, channel, tap, i, j] *= mask[sample, group, tap, i, j]
    parts = zip(columns.chunk(module.groups, 1), weight.flatten(2).chunk(module.groups), strict=True)
    out = torch.cat([torch.einsum('nckij,ock->noij', part, kernel) for part, kernel in parts], 1)
    return out + bias.view(-1, 1, 1)


@pytest.mark.parametrize('modulated', [False, True])
@torch.no_grad()
def test_definition(modulated):
    module = layer(4, 2, (2, 3), (2, 1), (0, 1), (1, 2), groups=2, offset_groups=2, modulated=modulated)
    x = images(4, (6, 7))
    predicted = module.conv_offset(x)
    points = 2 * 6
    mask = predicted[:, 2 * points :].sigmoid() if modulated else torch.ones_like(predicted[:, :points])
    assert_close(module(x), by_loops(x, predicted[:, : 2 * points], mask, module.weight, module.bias, module))


@pytest.mark.parametrize('modulated', [False, True])
def test_gradients(modulated):
    module = layer(2, 2, 2, offset_groups=2, modulated=modulated)
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (images(2, (4, 3)).requires_grad_(), *parameters.values()), fast_mode=True)


@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(modulated, dtype):
    module = layer(6, 8, 3, padding=1, offset_groups=2, modulated=modulated, dtype=torch.float32)
    x = images(dtype=torch.float32)
    expected = module(x).detach()
    with torch.autocast('cpu', dtype=dtype):
        outputs = module(x)
        assert module(x.to(dtype)).dtype == dtype
    assert (outputs - expected).norm() < 0.03 * expected.norm()
    outputs.float().square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name
    outputs = copy.deepcopy(module).to(dtype)(x.to(dtype))
    assert outputs.dtype == dtype
    assert (outputs - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_transformations(modulated):
    module = layer(6, 8, (3, 2), padding='same', offset_groups=3, modulated=modulated)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    scripted, traced = torch.jit.script(module), torch.fx.symbolic_trace(module)
    program = torch.export.export(module, (images(),))
    for function in (scripted, traced, compiled, program.module()):
        assert_close(function(images()), module(images()))
    compiled(images()).square().mean().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    for function in (scripted, traced):
        assert_close(function(images(size=(5, 4))), module(images(size=(5, 4))))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(kernel_size=3, padding=1, offset_groups=3),
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False, modulated=True),
    ],
    ids=['v1', 'v2'],
)
@torch.no_grad()
def test_onnx(kwargs, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', '1.25', 'ONNX Runtime computes DeformConv on CPUs from 1.25 on')
    module = layer(6, 8, **kwargs, dtype=torch.float32).eval()
    path = tmp_path / 'layer.onnx'
    sizes = [torch.export.Dim(name, min=4, max=64) for name in ('height', 'width')]
    program = torch.onnx.export(
        module,
        (images(dtype=torch.float32),),
        opset_version=19,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=8), 2: sizes[0], 3: sizes[1]},),
        verbose=False,
    )
    program.save(path)
    assert [opset.version for opset in program.model_proto.opset_import if opset.domain == ''] == [19]
    assert [node.op_type for node in program.model_proto.graph.node].count('DeformConv') == 1
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    for size in ((9, 11), (12, 7)):
        x = images(size=size, dtype=torch.float32)
        (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(outputs), module(x), rtol=1e-4, atol=1e-5)


def test_state_dict_of_others_loads():
    module = layer(6, 8, 3, modulated=True)
    assert list(module.state_dict()) == ['weight', 'bias', 'conv_offset.weight', 'conv_offset.bias']
    published = {key.replace('conv_offset', 'conv_offset_mask'): value for key, value in module.state_dict().items()}
    other = DeformConv2d(6, 8, 3, modulated=True, dtype=torch.float64)
    other.load_state_dict(published)
    assert_close(other(images()), module(images()))
    assert set(published) == {'weight', 'bias', 'conv_offset_mask.weight', 'conv_offset_mask.bias'}
    v1 = DeformConv2d(6, 8, 3, dtype=torch.float64)
    v1.load_state_dict(nn.Conv2d(6, 8, 3).state_dict(), strict=False)


def test_meta_device_and_repr():
    module = DeformConv2d(6, 8, 3, 2, 1, device='meta', dtype=torch.bfloat16, modulated=True)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    assert module(torch.empty(2, 6, 9, 9, device='meta', dtype=torch.bfloat16)).shape == (2, 8, 5, 5)
    assert 'modulated=True' in repr(module) and 'offset_groups=1' in repr(module)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(in_channels=0), ValueError, 'in_channels must be a positive int, got 0'),
        (dict(groups=4), ValueError, 'groups must divide in_channels 6 and out_channels 8, got 4'),
        (dict(offset_groups=4), ValueError, 'offset_groups must divide the 6 channels in, got 4'),
        (dict(kernel_size=1.5), TypeError, r'kernel_size must be an int or a \(height, width\) pair of ints, got 1.5'),
        (dict(stride=0), ValueError, 'stride must be at least 1, got 0'),
        (dict(padding='full'), ValueError, "padding must be an int, a pair of ints, 'same' or 'valid', got 'full'"),
        (dict(padding='same', stride=2), ValueError, r"padding 'same' needs stride 1, got stride \(2, 2\)"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        DeformConv2d(**(dict(in_channels=6, out_channels=8, kernel_size=3) | kwargs))


def test_bad_inputs():
    for layer_class in (DeformConv2d, DCNv4Conv2d):
        for x in (torch.randn(6, 9, 11), torch.randn(2, 5, 9, 11)):
            message = re.escape(f'x must have shape (N, 6, H, W), got {list(x.shape)}')
            with pytest.raises(ValueError, match=message):
                layer_class(6, 8, 3)(x)


def test_zero_offsets_of_a_large_kernel_at_the_border():
    """What lies outside counts as zero, as an ordinary convolution's padding."""
    module = DeformConv2d(1, 1, 7, padding=3, bias=False, dtype=torch.float64)
    x = images(1, (3, 4))
    assert_close(module(x), F.conv2d(x, module.weight, padding=3))
