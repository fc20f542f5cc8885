"""The DCNv3 layer against its definition, spelled out with the reference operator."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from dcnzoo.layers import DCNv3
from dcnzoo.ops import dcnv4, use_backend


def layer(**kwargs) -> DCNv3:
    """A layer in float64 with noise on all parameters."""
    torch.manual_seed(0)
    module = DCNv3(**kwargs, dtype=torch.float64).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def maps(channels: int = 64, size: tuple[int, int] = (9, 11), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, *size, channels, dtype=dtype, generator=torch.Generator().manual_seed(1))


PUBLISHED = {
    'default': {},
    'remove_center': dict(remove_center=True, group=2),
    'kernel5': dict(kernel_size=5, pad=2, dw_kernel_size=3),
    'dilated': dict(pad=2, dilation=2),
    'offset_scale': dict(offset_scale=0.5, dw_kernel_size=5),
    'center_feature_scale': dict(center_feature_scale=True, dw_kernel_size=5),
    'no_output_bias': dict(output_bias=False),
    'narrow_groups': dict(channels=12, group=3, act_layer='ReLU'),
    'batch_norm': dict(norm_layer='BN', act_layer='SiLU'),
}


@pytest.mark.parametrize('kwargs', PUBLISHED.values(), ids=PUBLISHED.keys())
@torch.no_grad()
def test_published_definition(kwargs):
    module = layer(**kwargs)
    x = maps(module.channels)
    keys = module.state_dict()
    group = module.group

    value = F.linear(x, keys['input_proj.weight'], keys['input_proj.bias'])
    weight = keys['dw_conv.0.weight']
    hidden = F.conv2d(
        x.permute(0, 3, 1, 2), weight, keys['dw_conv.0.bias'], padding=weight.shape[-1] // 2, groups=module.channels
    )
    if kwargs.get('norm_layer') == 'BN':
        norm = (keys[f'dw_conv.1.0.{name}'] for name in ('running_mean', 'running_var', 'weight', 'bias'))
        hidden = F.batch_norm(hidden, *norm).permute(0, 2, 3, 1)
    else:
        norm = keys['dw_conv.1.1.weight'], keys['dw_conv.1.1.bias']
        hidden = F.layer_norm(hidden.permute(0, 2, 3, 1), (module.channels,), *norm, 1e-6)
    hidden = {'GELU': F.gelu, 'ReLU': F.relu, 'SiLU': F.silu}[kwargs.get('act_layer', 'GELU')](hidden)
    offset = F.linear(hidden, keys['offset.weight'], keys['offset.bias']).unflatten(-1, (group, -1))
    mask = F.linear(hidden, keys['mask.weight'], keys['mask.bias']).unflatten(-1, (group, -1)).softmax(-1)
    assert mask.shape[-1] == kwargs.get('kernel_size', 3) ** 2 - kwargs.get('remove_center', False)
    with use_backend('reference'):
        expected = dcnv4(
            value,
            torch.cat((offset, mask), -1).flatten(-2),
            groups=group,
            kernel_size=kwargs.get('kernel_size', 3),
            padding=kwargs.get('pad', 1),
            dilation=kwargs.get('dilation', 1),
            offset_scale=kwargs.get('offset_scale', 1.0),
            remove_center=kwargs.get('remove_center', False),
        )
    if kwargs.get('center_feature_scale'):
        gate = F.linear(hidden, keys['center_feature_scale_proj_weight'], keys['center_feature_scale_proj_bias'])
        gate = gate.sigmoid().repeat_interleave(module.channels // group, -1)
        expected = expected * (1 - gate) + value * gate
    expected = F.linear(expected, keys['output_proj.weight'], keys.get('output_proj.bias'))
    assert_close(module(x), expected)


def test_state_dict_is_the_published():
    names = ('dw_conv.0', 'dw_conv.1.1', 'offset', 'mask', 'input_proj', 'output_proj')
    state_dict = DCNv3(center_feature_scale=True, dw_kernel_size=5).state_dict()
    assert state_dict.keys() == {
        *(f'{name}.{kind}' for name in names for kind in ('weight', 'bias')),
        'center_feature_scale_proj_weight',
        'center_feature_scale_proj_bias',
    }
    assert state_dict['offset.weight'].shape == (2 * 4 * 9, 64) and state_dict['mask.weight'].shape == (4 * 9, 64)


def test_entries_of_the_state_dict_are_the_parameters():
    """Averages of weights write into them."""
    module = layer(group=2)
    shadow = copy.deepcopy(module)
    with torch.no_grad():
        for entry in shadow.state_dict().values():
            entry.mul_(0.5)
    for parameter, half in zip(module.parameters(), shadow.parameters(), strict=True):
        assert_close(half, parameter / 2)
    assert not torch.allclose(shadow(maps()), module(maps()))


def test_initialisation():
    module = DCNv3(64)
    for name in ('offset', 'mask'):
        assert not module.get_submodule(name).weight.any() and not module.get_submodule(name).bias.any()
    bound = math.sqrt(6 / (64 + 64))
    assert 0.95 * bound < module.input_proj.weight.abs().max() <= bound
    with torch.no_grad():
        # Every point of the window has the same share.
        x = maps(dtype=torch.float32)
        mean = F.avg_pool2d(module.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
        assert_close(module(x), module.output_proj(mean))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(stride=2),
        dict(stride=2, center_feature_scale=True, dw_kernel_size=5),
        dict(kernel_size=(3, 5), stride=(1, 2), pad=(0, 2), center_feature_scale=True),
        dict(kernel_size=2, pad=1, stride=2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_strides_and_pads(kwargs):
    """The dense layer's features at the windows' centres are those of a strided one, whatever the window is."""
    module = layer(**kwargs)
    x = maps(size=(12, 10))
    (kh, kw), (sh, sw), (ph, pw) = module.kernel_size, module.stride, module.pad
    dense = copy.deepcopy(module.dw_conv)
    dense[0].stride = (1, 1)
    dense, value = dense(x.permute(0, 3, 1, 2)), module.input_proj(x)
    rows = [i * sh - ph + (kh - 1) // 2 for i in range((12 + 2 * ph - kh) // sh + 1)]
    columns = [j * sw - pw + (kw - 1) // 2 for j in range((10 + 2 * pw - kw) // sw + 1)]
    features, centers = (source.new_zeros(2, len(rows), len(columns), 64) for source in (dense, value))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if 0 <= row < 12 and 0 <= column < 10:
                features[:, i, j], centers[:, i, j] = dense[:, row, column], value[:, row, column]
    offset, mask = (predict(features).unflatten(-1, (4, -1)) for predict in (module.offset, module.mask))
    packed = torch.cat((offset, mask), -1).flatten(-2)
    out = dcnv4(value, packed, groups=4, kernel_size=(kh, kw), stride=(sh, sw), padding=(ph, pw), softmax=True)
    if module.center_feature_scale:
        weight, bias = module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias
        gate = F.linear(features, weight, bias).sigmoid().repeat_interleave(16, -1)
        out = out * (1 - gate) + centers * gate
    expected = module.output_proj(out)
    assert_close(module(x), expected)
    assert_close(torch.jit.script(module)(x), expected)
    assert_close(torch.fx.symbolic_trace(module)(x), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    module = layer(center_feature_scale=True).float()
    x = maps(dtype=torch.float32)
    expected = module(x).detach()
    with torch.autocast('cpu', dtype=dtype):
        outputs = module(x)
    assert outputs.dtype == dtype
    assert (outputs - expected).norm() < 0.05 * expected.norm()
    outputs.float().square().mean().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key
    half = module.to(dtype)(x.to(dtype))
    assert half.dtype == dtype and (half - expected).norm() < 0.1 * expected.norm()


def test_gradients():
    module = layer(channels=4, group=2, center_feature_scale=True)
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    x = maps(4, (4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


def test_compile_fullgraph():
    torch._dynamo.reset()
    module = layer(stride=2, center_feature_scale=True)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    assert_close(compiled(maps()), module(maps()))


@torch.no_grad()
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    module = layer(center_feature_scale=True).float()
    x, path = maps(dtype=torch.float32), tmp_path / 'layer.onnx'
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(outputs), module(x), rtol=1e-4, atol=1e-5)


def test_meta_and_dtype():
    module = DCNv3(device='meta', dtype=torch.bfloat16, center_feature_scale=True)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    outputs = module(torch.empty(2, 5, 7, 64, device='meta', dtype=torch.bfloat16))
    assert outputs.shape == (2, 5, 7, 64) and outputs.device.type == 'meta'


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(group=5), ValueError, 'group must divide the 64 channels, got 5'),
        (dict(kernel_size='3'), TypeError, r"kernel_size must be an int or a \(height, width\) pair of ints, got '3'"),
        (dict(stride=0), ValueError, 'stride must be at least 1, got 0'),
        (dict(dw_kernel_size=2), ValueError, 'dw_kernel_size must be a positive odd int or None, got 2'),
        (dict(act_layer='gelu'), ValueError, "act_layer must be one of 'GELU', 'ReLU', 'SiLU', got 'gelu'"),
        (dict(norm_layer='GN'), ValueError, "norm_layer must be 'LN' or 'BN', got 'GN'"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        DCNv3(**kwargs)
