"""The DCNv4 modules along sequences and through volumes."""

import pytest
import torch

from dcnzoo.layers import DCNv4, DCNv4_1d, DCNv4_3d
from tests.ops.cases import error


@pytest.mark.parametrize(
    'arguments', [{}, {'stride': 2, 'dilation': 2, 'pad': 1}, {'kernel_size': 5, 'pad': 4}], ids=str
)
def test_shapes_are_those_of_a_convolution_and_everything_learns(arguments):
    sizes = {'kernel_size': 3, 'padding': 1, **{name.replace('pad', 'padding'): n for name, n in arguments.items()}}
    for layer, conv, shape in (
        (DCNv4_1d, torch.nn.Conv1d, (2, 9, 8)),
        (DCNv4_3d, torch.nn.Conv3d, (1, 3, 4, 5, 8)),
    ):
        module = layer(8, group=2, **arguments)
        torch.nn.init.normal_(module.offset_mask.weight, std=0.5)
        out = module(torch.randn(shape))
        assert out.movedim(-1, 1).shape == conv(8, 8, **sizes)(torch.randn(shape).movedim(-1, 1)).shape
        out.square().mean().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize('arguments', [{}, {'stride': 2}, {'dilation': 2, 'pad': 1}, {'kernel_size': 2}], ids=str)
def test_a_volume_of_one_slice_is_a_map(arguments):
    """Offsets are predicted at the same pixels as in the layer for maps."""
    flat = DCNv4(8, group=2, **arguments)
    thin = {'kernel_size': 1, 'stride': 1, 'pad': 0, 'dilation': 1}
    sizes = {
        name: (one, *([arguments.get(name, {'kernel_size': 3, 'pad': 1}.get(name, 1))] * 2))
        for name, one in thin.items()
    }
    volume = DCNv4_3d(8, group=2, **sizes)
    points = volume.kernel_size[1] ** 2
    torch.nn.init.normal_(flat.offset_mask.weight, std=0.5)
    volume.value_proj.load_state_dict(flat.value_proj.state_dict())
    volume.output_proj.load_state_dict(flat.output_proj.state_dict())
    with torch.no_grad():
        packed = flat.offset_mask.weight[: 3 * 2 * points].unflatten(0, (2, 3 * points))
        offsets = packed[:, : 2 * points].unflatten(1, (points, 2))
        triples = torch.cat((offsets, torch.zeros_like(offsets[:, :, :1])), 2).flatten(1, 2)
        volume.offset_mask.weight.copy_(torch.cat((triples, packed[:, 2 * points :]), 1).flatten(0, 1))
    x = torch.randn(2, 7, 9, 8)
    assert error(volume(x.unsqueeze(1)).squeeze(1), flat(x)) < 1e-5


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match='group must divide the 8 channels, got 3'):
        DCNv4_1d(8, group=3)
    with pytest.raises(TypeError, match=r'stride must be an int or a sequence of 3, got \(1, 2\)'):
        DCNv4_3d(8, stride=(1, 2))
    with pytest.raises(ValueError, match='pad must be at least 0, got -1'):
        DCNv4_1d(8, pad=-1)
    with pytest.raises(ValueError, match='remove_center needs one odd kernel_size'):
        DCNv4_3d(8, kernel_size=4, remove_center=True)
    with pytest.raises(TypeError, match="offset_scale must be a number, got '2'"):
        DCNv4_3d(8, group=2, offset_scale='2')
    for layer, layout in ((DCNv4_1d, 'N, L, 8'), (DCNv4_3d, 'N, D, H, W, 8')):
        with pytest.raises(ValueError, match=rf'x must have shape \({layout}\), got \[2, 3, 4, 8\]'):
            layer(8, group=2)(torch.zeros(2, 3, 4, 8))


def test_empty_batches():
    assert DCNv4_1d(8, group=2)(torch.zeros(0, 5, 8)).shape == (0, 5, 8)
    x = torch.zeros(0, 2, 3, 4, 8, requires_grad=True)
    out = DCNv4_3d(8, group=2, stride=2)(x)
    assert out.shape == (0, 1, 2, 2, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape
