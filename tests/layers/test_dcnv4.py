"""The DCNv4 layer against its definition, spelled out with the reference operator."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dcnzoo.layers import DCNv3, DCNv4
from dcnzoo.ops import dcnv4, use_backend


def layer(**kwargs) -> DCNv4:
    """A layer in float64 with noise on all parameters."""
    torch.manual_seed(0)
    module = DCNv4(**kwargs, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def maps(channels: int = 64, size: tuple[int, int] = (9, 11), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, *size, channels, dtype=dtype, generator=torch.Generator().manual_seed(1))


PUBLISHED = {
    'default': {},
    'remove_center': dict(remove_center=True, group=2),
    'kernel5': dict(kernel_size=5, pad=2),
    'dilated': dict(pad=2, dilation=2, dw_kernel_size=3),
    'offset_scale': dict(offset_scale=0.5, dw_kernel_size=5),
    'center_feature_scale': dict(center_feature_scale=True, dw_kernel_size=3),
    'no_output_bias': dict(output_bias=False),
    'without_pointwise': dict(without_pointwise=True, center_feature_scale=True),
    'narrow_groups': dict(channels=12, group=3),
}


@pytest.mark.parametrize('kwargs', PUBLISHED.values(), ids=PUBLISHED.keys())
@torch.no_grad()
def test_published_definition(kwargs):
    module = layer(**kwargs)
    x = maps(module.channels)
    keys = module.state_dict()
    group, kernel, pad = module.group, kwargs.get('kernel_size', 3), kwargs.get('pad', 1)

    value = x
    if not kwargs.get('without_pointwise'):
        value = F.linear(x, keys['value_proj.weight'], keys['value_proj.bias'])
    hidden = x
    if 'dw_kernel_size' in kwargs:
        weight, bias = keys['offset_mask_dw.weight'], keys['offset_mask_dw.bias']
        hidden = F.conv2d(
            x.permute(0, 3, 1, 2), weight, bias, padding=(weight.shape[-1] - 1) // 2, groups=module.channels
        ).permute(0, 2, 3, 1)
    offset_mask = F.linear(hidden, keys['offset_mask.weight'], keys['offset_mask.bias'])
    points = group * (kernel**2 - kwargs.get('remove_center', False))
    assert offset_mask.shape[-1] == 8 * math.ceil(3 * points / 8)
    with use_backend('reference'):
        expected = dcnv4(
            value,
            offset_mask,
            groups=group,
            kernel_size=kernel,
            padding=pad,
            dilation=kwargs.get('dilation', 1),
            offset_scale=kwargs.get('offset_scale', 1.0),
            remove_center=kwargs.get('remove_center', False),
        )
    if kwargs.get('center_feature_scale'):
        gate = F.linear(
            expected, keys['center_feature_scale_proj_weight'], keys['center_feature_scale_proj_bias']
        ).sigmoid()
        gate = gate.repeat_interleave(module.channels // group, -1)
        expected = expected * (1 - gate) + value * gate
    if not kwargs.get('without_pointwise'):
        expected = F.linear(expected, keys['output_proj.weight'], keys.get('output_proj.bias'))
    assert_close(module(x), expected)


def test_state_dict_keys():
    assert DCNv4().state_dict().keys() == {
        f'{name}.{kind}' for name in ('offset_mask', 'value_proj', 'output_proj') for kind in ('weight', 'bias')
    }
    options = dict(dw_kernel_size=3, center_feature_scale=True, output_bias=False, without_pointwise=True)
    assert DCNv4(**options).state_dict().keys() == {
        'offset_mask.weight',
        'offset_mask.bias',
        'offset_mask_dw.weight',
        'offset_mask_dw.bias',
        'center_feature_scale_proj_weight',
        'center_feature_scale_proj_bias',
    }


def test_initialisation():
    module = DCNv4(64, center_feature_scale=True)
    for name in ('offset_mask.weight', 'offset_mask.bias', 'value_proj.bias', 'output_proj.bias'):
        assert not module.get_parameter(name).any()
    assert not module.center_feature_scale_proj_weight.any() and not module.center_feature_scale_proj_bias.any()
    bound = math.sqrt(6 / (64 + 64))
    assert 0.95 * bound < module.value_proj.weight.abs().max() <= bound
    with torch.no_grad():
        module.reset_parameters()
        # Nothing is sampled yet, and each gate lets half of the centre through.
        x = maps(dtype=torch.float32)
        assert_close(module(x), module.output_proj(module.value_proj(x) / 2))


STRIDED = {
    'stride2': dict(stride=2),
    'stride2_dw': dict(stride=2, dw_kernel_size=3),
    'pairs': dict(kernel_size=(3, 5), stride=(1, 2), pad=(1, 2), dilation=(1, 1)),
    'no_pad': dict(pad=0),
    'no_pad_dw': dict(pad=0, stride=2, dw_kernel_size=3),
    'wide_pad': dict(pad=3, center_feature_scale=True),
    'even_kernel': dict(kernel_size=2, pad=1, stride=2, center_feature_scale=True),
    'even_span': dict(kernel_size=(4, 3), pad=(0, 2), dilation=(1, 2), stride=(3, 1), dw_kernel_size=3),
}


@pytest.mark.parametrize('kwargs', STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_offsets_come_from_the_centres(kwargs):
    """Each output pixel is a function of the features at its window's centre and of what it samples from there."""
    module = layer(**kwargs)
    x = maps(size=(12, 10))
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = module.kernel_size, module.stride, module.pad, module.dilation
    out_h, out_w = (12 + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (10 + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    expected_input = x
    if module.dw_kernel_size is not None:
        dense = F.conv2d(
            x.permute(0, 3, 1, 2), module.offset_mask_dw.weight, module.offset_mask_dw.bias, padding=1, groups=64
        )
        expected_input = dense.permute(0, 2, 3, 1)
    value = module.value_proj(x)
    centers, center_values = x.new_zeros(2, out_h, out_w, 64), x.new_zeros(2, out_h, out_w, 64)
    for i in range(out_h):
        for j in range(out_w):
            row, column = i * sh - ph + (dh * (kh - 1)) // 2, j * sw - pw + (dw * (kw - 1)) // 2
            if 0 <= row < 12 and 0 <= column < 10:
                centers[:, i, j] = expected_input[:, row, column]
                center_values[:, i, j] = value[:, row, column]
    out = dcnv4(
        value,
        module.offset_mask(centers),
        groups=4,
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.pad,
        dilation=module.dilation,
    )
    if module.center_feature_scale:
        gate = (
            F.linear(out, module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias)
            .sigmoid()
            .repeat_interleave(16, -1)
        )
        out = out * (1 - gate) + center_values * gate
    expected = module.output_proj(out)
    assert expected.shape == (2, out_h, out_w, 64)
    assert_close(module(x), expected)
    assert_close(torch.jit.script(module)(x), expected)
    assert_close(torch.fx.symbolic_trace(module)(x), expected)


@pytest.mark.parametrize('kwargs', [{}, dict(without_pointwise=True), dict(center_feature_scale=True)], ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(kwargs, dtype):
    module = layer(**kwargs).float()
    x = maps(dtype=torch.float32).requires_grad_()
    expected = module(x).detach()
    for inputs in (x, x.detach().to(dtype)):
        with torch.autocast('cpu', dtype=dtype):
            outputs = module(inputs)
        assert outputs.dtype == (inputs.dtype if kwargs.get('without_pointwise') else dtype)
        assert (outputs - expected).norm() < 0.05 * expected.norm()
        outputs.float().square().mean().backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_gradients():
    module = layer(channels=4, group=2, dw_kernel_size=3, center_feature_scale=True)
    parameters = dict(module.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    x = maps(4, (4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    module = layer(stride=2, dw_kernel_size=3, center_feature_scale=True)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert_close(compiled(maps()), module(maps()))


def test_meta_and_dtype():
    module = DCNv4(device='meta', dtype=torch.bfloat16, dw_kernel_size=3, center_feature_scale=True)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {('meta', torch.bfloat16)}
    outputs = module(torch.empty(2, 5, 7, 64, device='meta', dtype=torch.bfloat16))
    assert outputs.shape == (2, 5, 7, 64) and outputs.device.type == 'meta'


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(channels=64, group=5), ValueError, 'group must divide the 64 channels, got 5'),
        (dict(channels=0), ValueError, 'channels must be a positive int, got 0'),
        (dict(group=4.0), ValueError, 'group must be a positive int, got 4.0'),
        (dict(kernel_size='3'), TypeError, r"kernel_size must be an int or a \(height, width\) pair of ints, got '3'"),
        (dict(stride=(1, 2, 3)), TypeError, r'stride must be .* got \(1, 2, 3\)'),
        (dict(stride=0), ValueError, 'stride must be at least 1, got 0'),
        (dict(pad=-1), ValueError, 'pad must be at least 0, got -1'),
        (dict(dilation=(1, 0)), ValueError, r'dilation must be at least 1, got \(1, 0\)'),
        (dict(dw_kernel_size=2), ValueError, 'dw_kernel_size must be a positive odd int or None, got 2'),
        (dict(dw_kernel_size=-1), ValueError, 'dw_kernel_size must be a positive odd int or None, got -1'),
        (dict(offset_scale='2'), TypeError, "offset_scale must be a number, got '2'"),
        (dict(offset_scale=float('inf')), ValueError, 'offset_scale must be finite, got inf'),
        (dict(group=True), ValueError, 'group must be a positive int, got True'),
        (dict(remove_center=True, kernel_size=2), ValueError, 'remove_center needs an odd square kernel_size'),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        DCNv4(**kwargs)


def test_bad_inputs():
    for x in (torch.zeros(2, 25, 64), torch.zeros(2, 64, 5, 5)):
        message = re.escape(f'x must have shape (N, H, W, 64), got {list(x.shape)}')
        for module in (DCNv4(), DCNv4(dw_kernel_size=3), DCNv3()):
            with pytest.raises(ValueError, match=message):
                module(x)
    with pytest.raises(ValueError, match='does not fit into a value map of 2 x 9 pixels'):
        DCNv4(kernel_size=5, pad=0)(torch.zeros(1, 2, 9, 64))
