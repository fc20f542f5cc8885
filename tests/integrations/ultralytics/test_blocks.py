"""The blocks alone: keys, widths, types and layouts."""

import copy

import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import torch
from torch import nn

from dcnzoo import layers
from dcnzoo.integrations import ultralytics as blocks
from dcnzoo.integrations.ultralytics.blocks import DCNv4, GhostModule_DynamicConv

LAYOUTS = {
    'C2f_DCNv4': {'shortcut': True},
    'C2f_DynamicConv': {'shortcut': True},
    'C3k2_DCNv4': {},
    'C3k2_DynamicConv': {},
    'C3k_DCNv4': {},
    'C3k_DynamicConv': {},
    'DCNv4Conv': {},
    'DynamicConv': {'k': 3},
}


def norm(prefix):
    return {prefix + name for name in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}


def conv(prefix):
    return {f'{prefix}conv.weight'} | norm(f'{prefix}bn.')


def dynamic(prefix):
    return {prefix + name for name in ('routing.weight', 'routing.bias', 'cond_conv.weight')}


def dcnv4(prefix):
    layers = ('offset_mask', 'value_proj', 'output_proj')
    return {f'{prefix}{layer}.{name}' for layer in layers for name in ('weight', 'bias')}


C2F = conv('cv1.') | conv('cv2.')
C3K = C2F | conv('m.0.cv1.') | conv('m.0.cv2.') | conv('m.0.cv3.')


def shuffled(module):
    """A module whose weights are far from their initial zeros and ones."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


@pytest.mark.parametrize(
    'block, keys',
    (
        (blocks.DynamicConv(8, 16, 3, 2), dynamic('')),
        (blocks.C2f_DCNv4(8, 16), C2F | conv('m.0.cv1.') | dcnv4('m.0.cv2.')),
        (
            blocks.C2f_GhostModule_DynamicConv(8, 16),
            C2F
            | dynamic('m.0.primary_conv.0.')
            | norm('m.0.primary_conv.1.')
            | dynamic('m.0.cheap_operation.0.')
            | norm('m.0.cheap_operation.1.'),
        ),
        (blocks.C3k2_DCNv4(8, 16), C2F | conv('m.0.cv1.') | dcnv4('m.0.cv2.')),
        (blocks.C3k2_DynamicConv(8, 16), C2F | conv('m.0.cv1.') | dynamic('m.0.cv2.')),
        (
            blocks.C3k2_DCNv4(8, 16, c3k=True),
            C3K | conv('m.0.m.0.cv1.') | dcnv4('m.0.m.0.cv2.') | conv('m.0.m.1.cv1.') | dcnv4('m.0.m.1.cv2.'),
        ),
        (
            blocks.C3k2_DynamicConv(8, 16, c3k=True),
            C3K | conv('m.0.m.0.cv1.') | dynamic('m.0.m.0.cv2.') | conv('m.0.m.1.cv1.') | dynamic('m.0.m.1.cv2.'),
        ),
    ),
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else '',
)
def test_keys_are_those_that_circulate(block, keys):
    assert set(block.state_dict()) == keys


def test_experts_are_stored_flat_and_mixed_by_four_groups_of_points():
    assert blocks.DynamicConv(8, 16, 3, 2).state_dict()['cond_conv.weight'].shape == (4, 16 * 8 * 9)
    assert blocks.DynamicConv(8, 16, 3, g=4, num_experts=2).state_dict()['cond_conv.weight'].shape == (2, 16 * 2 * 9)
    assert {blocks.C2f_DCNv4(width, width).m[0].cv2.group for width in (16, 64, 256)} == {4}


def test_dynamic_conv_is_the_layer():
    torch.manual_seed(0)
    ours, layer = blocks.DynamicConv(6, 8, 3, 2, d=2, g=2), layers.DynamicConv2d(6, 8, 3, 2, dilation=2, groups=2)
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 15, 11)
    torch.testing.assert_close(ours(x), layer(x))


def test_dcnv4_is_the_layer_with_channels_in_front():
    ours, layer = shuffled(DCNv4(8)), layers.DCNv4(8, group=4)
    layer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 7, 5)
    torch.testing.assert_close(ours(x), layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_c2f_dcnv4_computes_what_its_layout_says():
    block = shuffled(blocks.C2f_DCNv4(8, 12, 2, shortcut=True)).eval()
    x = torch.randn(1, 8, 9, 6)
    first, last = block.cv1(x).chunk(2, 1)
    maps = [first, last]
    for bottleneck in block.m:
        maps.append(maps[-1] + bottleneck.cv2(bottleneck.cv1(maps[-1])))
    torch.testing.assert_close(block(x), block.cv2(torch.cat(maps, 1)))


def test_ghost_module_cuts_odd_widths():
    assert GhostModule_DynamicConv(6, 7)(torch.randn(2, 6, 4, 4)).shape == (2, 7, 4, 4)


@pytest.mark.parametrize('name', LAYOUTS)
def test_every_width_trains_on_every_pixel_of_any_map(name):
    for width in (4, 12, 20):
        block = getattr(blocks, name)(width, width + 8, **LAYOUTS[name])
        shuffled(block)
        x = torch.randn(2, width, 9, 6, requires_grad=True)
        out = block(x)
        assert out.shape == (2, width + 8, 9, 6)
        out.square().sum().backward()
        assert x.grad.abs().sum(dim=(0, 1)).min() > 0
        assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


@pytest.mark.parametrize('name', LAYOUTS)
def test_half_channels_last_and_copies(name):
    block = shuffled(getattr(blocks, name)(16, 16, **LAYOUTS[name])).eval()
    x = torch.randn(2, 16, 8, 6)
    with torch.no_grad():
        expected = block(x)
        close = {'rtol': 1e-4, 'atol': 1e-5}
        last = copy.deepcopy(block).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, **close)
        half = copy.deepcopy(block).half()
        assert half(x.half()).dtype == torch.float16
        torch.testing.assert_close(half.float()(x), expected, rtol=2e-2, atol=2e-2)


def test_stride_and_padding_of_plain_rows():
    x = torch.randn(1, 8, 17, 12)
    for s, k, p in ((2, 3, None), (1, 5, None), (2, 3, 0)):
        expected = nn.Conv2d(8, 16, k, s, k // 2 if p is None else p)(x).shape
        assert blocks.DCNv4Conv(8, 16, k, s, p).eval()(x).shape == expected
        assert blocks.DynamicConv(8, 16, k, s, p)(x).shape == expected
    assert isinstance(blocks.DCNv4Conv(8, 16, act=False).act, nn.Identity)


def test_plain_rows_of_dcnv4_take_pairs():
    x = torch.randn(1, 8, 17, 12)
    square, pairs = (shuffled(blocks.DCNv4Conv(8, 8, *sizes)).eval() for sizes in ((3, 2), ((3, 3), [2, 2])))
    torch.testing.assert_close(pairs(x), square(x), rtol=0, atol=0)
    assert blocks.DCNv4Conv(8, 8, (3, 5)).eval()(x).shape == x.shape
    assert blocks.DCNv4Conv(8, 8, [5, 3], d=(1, 2)).eval()(x).shape == x.shape
    with pytest.raises(TypeError, match=r'k must be an int or a \(height, width\) pair of ints, got \(3, 3, 3\)'):
        blocks.DCNv4Conv(8, 8, (3, 3, 3))


def test_plain_rows_of_dcnv4_learn_from_the_start():
    """Layers that all start at zero, as the published one does, would stop each other's gradients."""
    stack = nn.Sequential(*(blocks.DCNv4Conv(8, 8) for _ in range(3)))
    stack(torch.randn(2, 8, 9, 9)).square().sum().backward()
    projections = [parameter for name, parameter in stack.named_parameters() if 'offset_mask' not in name]
    assert all(parameter.grad.abs().sum() > 0 for parameter in projections)


@pytest.mark.parametrize('name', ('C2f_DCNv4', 'C3k2_DCNv4', 'C3k2_DynamicConv'))
def test_groups_that_do_not_fit(name):
    with pytest.raises(ValueError, match='must be a positive int, got True'):
        getattr(blocks, name)(16, 32, g=True)
    with pytest.raises(ValueError, match=r'group.* must divide'):
        getattr(blocks, name)(16, 32, g=7)


def test_timm_backbone():
    backbone = blocks.TimmBackbone('test_dcnv4').eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(x)
        plain = backbone.m((x - 0.5) / 0.5)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert backbone.channels == [32, 64, 128]
    assert not torch.allclose(maps[0], plain[0])  # normalised with ImageNet's mean, not with another
    assert not [key for key in backbone.state_dict() if not key.startswith('m.')]
    with pytest.raises(ValueError, match='takes images of 3 channels, got 4'):
        backbone(torch.rand(1, 4, 64, 64))
    with pytest.raises(ValueError, match="timm has no model 'dcnv5_tiny'"):
        blocks.TimmBackbone('dcnv5_tiny')
    with pytest.raises(ValueError, match=r'vit_tiny_patch16_224 has its last maps at strides \[16, 16, 16\]'):
        blocks.TimmBackbone('vit_tiny_patch16_224')
