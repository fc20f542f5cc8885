"""The parameternet models: published sizes, keys and outputs, and the options of their architecture."""

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from dcnzoo.layers import DynamicConv2d
from dcnzoo.layers.dynamic_conv import GatedConv2d
from dcnzoo.models.parameternet import GHOSTNET

from .golden import KEYS, OUTPUTS, relative_error
from .golden.fill import image
from .registry import create, parameter_count


@pytest.mark.parametrize(
    ('name', 'options', 'count'),
    [
        ('parameternet_600m', {}, 34_504_504),
        ('parameternet_300m', {}, 15_737_100),
        ('parameternet_600m', dict(num_experts=1), 19_852_939),
        ('parameternet_600m', dict(num_experts=8), 54_039_924),
    ],
)
def test_published_parameter_counts(name, options, count):
    with torch.device('meta'):
        assert sum(parameter.numel() for parameter in timm.create_model(name, **options).parameters()) == count


def test_miniature_is_small():
    assert parameter_count('test_parameternet') < 0.5e6


@pytest.mark.parametrize(('name', 'millions'), [('parameternet_600m', 590), ('parameternet_300m', 292)])
def test_published_multiplications(name, millions):
    """The mixing of the kernels counts too."""
    with torch.device('meta'):
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert round(counter.get_total_flops() / 2e6) == millions


def test_published_keys():
    with torch.device('meta'):
        state_dict = timm.create_model('parameternet_600m').state_dict()
    assert {key: list(value.shape) for key, value in state_dict.items()} == KEYS['parameternet_600m']


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize('channels_last', [False, True])
@torch.no_grad()
def test_golden_outputs(published, dtype, tolerance, channels_last):
    model = timm.create_model(
        'parameternet_600m',
        pretrained=True,
        pretrained_cfg_overlay=published('parameternet_600m'),
        dtype=dtype,
    )
    x, logits = image(21, (3, 3, 224, 224)).to(dtype), OUTPUTS['parameternet_600m.logits']
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert relative_error(model.eval()(x), logits) < tolerance
    assert relative_error(model(x[1:2]), logits[1:2]) < tolerance


@pytest.mark.parametrize('num_classes', [0, 5, 1000])
@pytest.mark.parametrize('in_chans', [1, 3, 4])
@torch.no_grad()
def test_classes_and_channels_of_a_published_load(published, num_classes, in_chans):
    model = timm.create_model(
        'parameternet_600m',
        pretrained=True,
        pretrained_cfg_overlay=published('parameternet_600m'),
        num_classes=num_classes,
        in_chans=in_chans,
    ).eval()
    grey = image(0, (2, 1, 32, 32)).float()
    outputs = model(grey.expand(-1, in_chans, -1, -1))
    assert outputs.shape == (2, num_classes or 1280)
    assert outputs.isfinite().all()
    if num_classes == 1000 and in_chans == 1:
        # An image whose channels are equal is the same image to a network of one channel.
        full = timm.create_model(
            'parameternet_600m', pretrained=True, pretrained_cfg_overlay=published('parameternet_600m')
        ).eval()
        assert_close(outputs, full(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('num_experts', [1, 2, 16])
@torch.no_grad()
def test_experts_are_an_argument(num_experts):
    model = create('test_parameternet', num_experts=num_experts)
    banks = [module.cond_conv for module in model.modules() if isinstance(module, DynamicConv2d)]
    assert banks and all(bank.num_experts == num_experts for bank in banks)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_no_experts_are_plain_convolutions():
    model = timm.create_model('test_parameternet', num_experts=0)
    assert not any(isinstance(module, DynamicConv2d) for module in model.modules())
    dynamic = timm.create_model('test_parameternet', num_experts=1)
    routing = sum(parameter.numel() for key, parameter in dynamic.named_parameters() if '.routing.' in key)
    assert sum(p.numel() for p in dynamic.parameters()) - routing == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('routing_activation', ['sigmoid', 'softmax'])
@torch.no_grad()
def test_one_expert_converts_to_plain_convolutions(routing_activation):
    model = create('test_parameternet', num_experts=1, routing_activation=routing_activation).double()
    plain = reparameterize_model(model)
    assert any(isinstance(module, DynamicConv2d) for module in model.modules())
    assert not any(isinstance(module, DynamicConv2d) for module in plain.modules())
    if routing_activation == 'softmax':
        assert not any(isinstance(module, GatedConv2d) for module in plain.modules())
    x = image(0, (3, 3, 64, 96))
    assert_close(plain(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'options',
    [
        dict(routing='mlp', routing_activation='softmax', temperature=30.0),
        dict(width=0.25, act_layer='relu'),
        dict(cfgs=GHOSTNET[:4], num_experts=2),
        dict(output_stride=8, global_pool='max'),
    ],
    ids=str,
)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_options(options):
    model = create('test_parameternet', num_classes=7, **options)
    x = image(0, (2, 3, 72, 88)).float()
    expected = model(x)
    assert expected.shape == (2, 7)
    tolerance = dict(rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert_close(torch.jit.script(model)(x), expected, **tolerance)
    assert_close(torch.fx.symbolic_trace(model)(x), expected, **tolerance)
    model.train()(x).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key


@torch.no_grad()
def test_features_are_the_last_maps_of_each_resolution():
    model = create('parameternet_600m')
    assert [(info['reduction'], info['module']) for info in model.feature_info] == [
        (2, 'blocks.0'),
        (4, 'blocks.2'),
        (8, 'blocks.4'),
        (16, 'blocks.6'),
        (32, 'blocks.8'),
    ]


@torch.no_grad()
def test_dilation_computes_the_same_network_more_densely():
    """Without what averages over the map, every pixel of the undilated network reappears in the finer maps."""
    features = {}
    for output_stride in (32, 16, 8):
        model = create('test_parameternet', output_stride=output_stride, num_experts=0).double()
        for block in model.blocks[:-1].modules():
            if hasattr(block, 'se'):
                block.se = nn.Identity()
        features[output_stride] = model.forward_intermediates(image(0, (1, 3, 64, 96)), intermediates_only=True)
    for output_stride in (16, 8):
        for coarse, fine in zip(features[32], features[output_stride], strict=True):
            step = fine.shape[2] // coarse.shape[2]
            assert_close(fine[:, :, ::step, ::step], coarse)
    assert features[8][-1].shape[2:] == (8, 12)


def test_pooling_of_another_width_is_refused_after_creation():
    model = timm.create_model('test_parameternet')
    model.reset_classifier(3, 'max')
    with pytest.raises(
        ValueError, match=r"global_pool 'catavgmax' gives .* name the pooling when the model is created"
    ):
        model.reset_classifier(3, 'catavgmax')
    assert timm.create_model('test_parameternet', global_pool='catavgmax')(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(output_stride=4), 'output_stride must be 8, 16 or 32, got 4'),
        (dict(num_experts=-1), 'num_experts must be a positive int, or 0 for plain convolutions, got -1'),
        (dict(width=0), 'width must be positive, got 0'),
        (dict(routing='conv'), "routing must be 'linear' or 'mlp', got 'conv'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_parameternet', **options)


@pytest.mark.parametrize('name', ['parameternet_300m', 'parameternet_600m', 'test_parameternet'])
def test_models_without_weights_say_so(name):
    assert not any(tag.startswith(name) for tag in timm.list_pretrained())
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)
