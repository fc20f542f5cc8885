"""DCNv4 in place of convolutions: the layer, and its exchange in whole models."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close

from dcnzoo.layers import CondConv2d, DCNv4Conv2d, DeformConv2d, replace_conv
from dcnzoo.ops import dcnv4


def layer(*args, **kwargs) -> DCNv4Conv2d:
    """A layer in float64 with noise on all parameters."""
    torch.manual_seed(0)
    module = DCNv4Conv2d(*args, **kwargs, dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def images(channels: int = 6, size: tuple[int, int] = (9, 11), dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))


GEOMETRY = {
    'plain': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, stride=2, padding=1, bias=False),
    'pairs': dict(kernel_size=(3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1)),
    'no_padding': dict(kernel_size=3),
    'same_even': dict(kernel_size=(2, 4), padding='same'),
    'valid': dict(kernel_size=2, stride=2, padding='valid'),
    'grouped': dict(kernel_size=3, padding=1, groups=2),
    'large': dict(kernel_size=7, stride=2, padding=3),
    'pointwise': dict(kernel_size=1),
}


@pytest.mark.parametrize('kwargs', GEOMETRY.values(), ids=GEOMETRY.keys())
@torch.no_grad()
def test_interface_of_a_convolution(kwargs):
    module = layer(6, 20, **kwargs)
    plain = nn.Conv2d(6, 20, **kwargs, dtype=torch.float64)
    for x in (images(), images(size=(8, 8)).to(memory_format=torch.channels_last)):
        assert module(x).shape == plain(x).shape
    assert (module.output_proj.bias is None) == (plain.bias is None)


@pytest.mark.parametrize(('out_chs', 'offset_groups'), [(20, 4), (12, 1), (7, 7), (18, 6)])
@torch.no_grad()
def test_definition(out_chs, offset_groups):
    module = layer(6, out_chs, 3, 2, 1, offset_groups=offset_groups)
    x = images()
    value = torch.einsum('nchw,oc->nhwo', x, module.value_proj.weight[:, :, 0, 0])
    offset_mask = module.dcn.offset_mask(value[:, ::2, ::2])
    out = dcnv4(value, offset_mask, groups=offset_groups, stride=2)
    expected = torch.einsum('nhwo,po->nphw', out, module.output_proj.weight[:, :, 0, 0])
    assert_close(module(x), expected + module.output_proj.bias.view(-1, 1, 1))


@pytest.mark.parametrize(
    ('out_chs', 'groups'), [(64, 4), (16, 1), (8, 1), (48, 3), (40, 2), (17, 1), (1, 1), (255, 15)]
)
def test_groups_are_about_16_channels_wide(out_chs, groups):
    assert DCNv4Conv2d(3, out_chs, 3, device='meta').dcn.group == groups


@torch.no_grad()
def test_starts_as_a_mean_over_the_window():
    module = DCNv4Conv2d(6, 32, 3, padding=1, dtype=torch.float64)
    mean = F.avg_pool2d(module.value_proj(images()), 3, 1, 1)
    assert_close(module(images()), module.output_proj(mean))


@pytest.mark.parametrize('kwargs', [dict(stride=2, padding=1), dict(groups=2, center_feature_scale=True)], ids=str)
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_transformations(kwargs):
    module = layer(6, 12, 3, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    scripted, traced = torch.jit.script(module), torch.fx.symbolic_trace(module)
    program = torch.export.export(module, (images(),))
    for function in (scripted, traced, compiled, program.module()):
        assert_close(function(images()), module(images()))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = module.float()(images(dtype=torch.float32))
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert module.bfloat16()(images(dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    module = layer(6, 32, 3, 2, 1).float().eval()
    path = tmp_path / 'layer.onnx'
    torch.onnx.export(module, (images(dtype=torch.float32),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    x = images(dtype=torch.float32)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(outputs), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(out_chs=0), ValueError, 'out_chs must be a positive int, got 0'),
        (dict(groups=4), ValueError, 'groups must divide in_channels 6 and out_channels 20, got 4'),
        (dict(offset_groups=3), ValueError, 'offset_groups must divide the 20 channels out, got 3'),
        (dict(kernel_size='3'), TypeError, 'kernel_size must be an int or a'),
        (dict(padding='same', stride=2), ValueError, "padding 'same' needs stride 1"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        DCNv4Conv2d(**(dict(in_chs=6, out_chs=20, kernel_size=3) | kwargs))


def step(model: nn.Module, x: torch.Tensor) -> None:
    """A step of training that reaches every parameter."""
    model.train()(x).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_resnet_of_torchvision():
    model = torchvision.models.resnet18(num_classes=5)
    x = images(3, (64, 64), torch.float32)
    expected = model(x).shape
    report = replace_conv(model)
    assert len(report.replaced) == 16 and len(report.kept) == 4
    assert report.kept['conv1'] == 'it reads 3 channels only'
    assert report.kept['layer2.0.downsample.0'] == 'it looks at single pixels'
    first = report.replaced[0]
    assert (first.name, first.after) == ('layer1.0.conv1', 'DCNv4Conv2d') and first.params_before == 64 * 64 * 9
    assert first.params_after == sum(p.numel() for p in model.layer1[0].conv1.parameters())
    text = str(report)
    assert 'layer4.1.conv2: Conv2d(512, 512' in text and text.endswith('4 kept') and 'conv1: kept, it reads' in text
    assert isinstance(model.layer2[0].conv1, DCNv4Conv2d) and model.layer2[0].conv1.output_proj.bias is None
    assert model(x).shape == expected
    step(model, x)
    assert not replace_conv(model).replaced


def test_stage_of_a_resnet_of_timm():
    model = timm.create_model('resnet10t', num_classes=0).to(torch.float64).eval()
    report = replace_conv(model, 'layer[34].*', offset_groups=4, dw_kernel_size=3)
    assert report.replaced and all(entry.name.startswith(('layer3.', 'layer4.')) for entry in report.replaced)
    assert report.kept['layer1.0.conv1'] == 'left out by `where`'
    replaced = model.get_submodule(report.replaced[0].name)
    assert replaced.value_proj.weight.dtype == torch.float64 and not replaced.training
    assert replaced.dcn.group == 4 and replaced.dcn.dw_kernel_size == 3
    assert model(images(3, (32, 32))).isfinite().all()


class UNet(nn.Module):
    """Two levels, a skip connection, a transposed convolution."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding='same'), nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, 1, 2, 2)
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.down1(x)
        coarse = self.middle(self.down2(fine))
        return self.out(torch.cat((fine, self.up(coarse)), 1))


def test_unet_learns_what_lies_elsewhere():
    """Every layer learns, although nothing but convolutions lies between input and output."""
    torch.manual_seed(0)
    model = UNet()
    x = 5 * F.avg_pool2d(images(3, (24, 24), torch.float32), 5, 1)
    expected = model(x).shape
    report = replace_conv(model, lambda name, conv: conv.kernel_size != (1, 1))
    assert [entry.name for entry in report.replaced] == ['down1.0', 'down2.0', 'middle.0', 'middle.2', 'out.0']
    assert report.kept == {'out.2': 'left out by `where`'}
    assert model(x).shape == expected
    target = x.mean(1, keepdim=True).roll(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(40):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * target.var()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_deformable_convolutions_go_on_with_the_weights():
    model = torchvision.models.resnet18(num_classes=5).eval()
    x = images(3, (64, 64), torch.float32)
    expected = model(x)
    report = replace_conv(model, ['layer3.*.conv?', 'conv1'], layer=DeformConv2d, offset_groups=1)
    assert [entry.name for entry in report.replaced][:2] == ['conv1', 'layer3.0.conv1'] and len(report.replaced) == 5
    assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_shared_convolutions_stay_shared():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.ModuleDict(dict(a=nn.Sequential(conv), b=nn.Sequential(nn.ReLU(), conv)))
    assert len(replace_conv(model).replaced) == 2
    assert model['a'][0] is model['b'][1]


def test_what_is_no_plain_convolution_is_kept():
    class Scaled(nn.Conv2d):
        pass

    model = nn.Sequential(Scaled(8, 8, 3), nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'), nn.Conv2d(8, 8, 3))
    report = replace_conv(model, lambda name, conv: True)
    assert [entry.name for entry in report.replaced] == ['2']
    assert report.kept == {'0': 'a Scaled may compute something else', '1': "padding_mode is 'reflect'"}


def test_errors_leave_the_model_as_it_is():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match='1: offset_groups must divide the 12 channels out, got 8'):
        replace_conv(model, offset_groups=8)
    with pytest.raises(ValueError, match="no convolution of the model is named 'head"):
        replace_conv(model, ['0', 'head*'])
    assert str(model) == str(before)
    with pytest.raises(TypeError, match='model must be a module that contains the convolutions to replace, got Conv2d'):
        replace_conv(model[0])
    with pytest.raises(TypeError, match='where must be a pattern, several, or a function of name and convolution, got'):
        replace_conv(model, 3)


def test_hooks_are_not_lost():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].register_forward_hook(lambda *_: None)
    report = replace_conv(model)
    assert report.kept == {'0': 'it has hooks', '1': 'it has hooks'} and isinstance(model[2], DCNv4Conv2d)


def test_what_has_the_same_name_and_shape_is_taken_over():
    """Frozen weights stay frozen, beside what predicts offsets; a parameter of another shape is the layer's own."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    model[0].weight.requires_grad_(False)
    weight = model[0].weight.clone()
    replace_conv(model, layer=DeformConv2d)
    assert torch.equal(model[0].weight, weight) and not model[0].weight.requires_grad
    assert model[0].bias.requires_grad and model[0].conv_offset.weight.requires_grad
    bias = model[0].bias.detach().clone()
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].bias.copy_(bias)
    replace_conv(model, layer=lambda chs, out_chs, size, *args, **kwargs: CondConv2d(chs, out_chs, size, num_experts=2))
    assert model[0].weight.shape == (2, 8 * 8 * 9)


def test_grouped_and_strided_convolutions_of_a_mobile_network():
    """Depthwise and pointwise, strides of 2 with the padding of timm: all sizes stay, everything learns."""
    model = timm.create_model('mobilenetv2_050', num_classes=5)
    x = images(3, (64, 64), torch.float32)
    expected = [feature.shape for feature in model.forward_intermediates(x, intermediates_only=True)]
    depthwise = [name for name, module in model.named_modules() if getattr(module, 'groups', 1) > 1]
    report = replace_conv(model)
    assert [entry.name for entry in report.replaced] == depthwise
    assert 'groups=' in report.replaced[0].before and report.kept['conv_stem'] == 'it reads 3 channels only'
    assert [feature.shape for feature in model.forward_intermediates(x, intermediates_only=True)] == expected
    step(model, x)
