"""Where a network samples, drawn and traced: a network whose offsets are set by hand."""

import copy
import io

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from dcnzoo.layers import DCNv4
from dcnzoo.visualize import effective_receptive_field, feature_maps, record_sampling, sampling_offsets, trace_sampling

POINTS = 9
CENTER = 4


class Stage(nn.Module):
    """One layer whose every unit samples at one offset with one weight, and at another with a smaller one."""

    def __init__(self, offset, weight=1.0, second=(0.0, 0.0), second_weight=0.0):
        super().__init__()
        self.dcn = DCNv4(2, group=1)
        nn.init.eye_(self.dcn.value_proj.weight)
        nn.init.eye_(self.dcn.output_proj.weight)
        with torch.no_grad():
            numbers = self.dcn.offset_mask.bias
            for point, (dx, dy), mask in ((CENTER, offset, weight), (0, second, second_weight)):
                numbers[2 * point], numbers[2 * point + 1], numbers[2 * POINTS + point] = dx, dy, mask

    def forward(self, x):
        return self.dcn(x)


class Net(nn.Module):
    def __init__(self, *stages, pool=1):
        super().__init__()
        self.pool = pool
        self.stages = nn.Sequential(*stages)

    def forward(self, x):
        return self.stages(nn.functional.avg_pool2d(x, self.pool).permute(0, 2, 3, 1))


@pytest.fixture
def net():
    # The first point of the grid is (-1, -1) from the centre.
    return Net(Stage((2, -1)), Stage((1, 3), weight=0.5, second=(3, 1), second_weight=-0.25))


def image(height=16, width=20):
    return torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(0))


def test_record(net):
    first, second = record_sampling(net, image())
    assert (first.name, first.stage, second.name, second.stage) == ('stages.0.dcn', 0, 'stages.1.dcn', 1)
    assert first.size == (16, 20) and first.x.shape == (16, 20, 1, POINTS)
    assert (first.x[5, 7, 0, CENTER], first.y[5, 7, 0, CENTER], first.mask[5, 7, 0, CENTER]) == (9, 4, 1)
    assert (second.x[5, 7, 0, 0], second.y[5, 7, 0, 0], second.mask[5, 7, 0, 0]) == (7 - 1 + 3, 5 - 1 + 1, -0.25)
    assert not net._forward_hooks and not net.stages[0].dcn._forward_pre_hooks


def test_record_models_of_the_zoo():
    """Each layer of each stage; the masks of DCNv3 are a softmax."""
    for name in ('test_dcnv4', 'test_internimage'):
        model = timm.create_model(name).eval()
        found = record_sampling(model, torch.randn(1, 3, 64, 64))
        assert [layer.stage for layer in found] == sorted(layer.stage for layer in found)
        assert {layer.stage for layer in found} == {0, 1, 2, 3}
        assert [layer.size for layer in found if layer.stage == 1] == [(8, 8)] * sum(
            layer.stage == 1 for layer in found
        )
    torch.testing.assert_close(found[0].mask.sum(-1), torch.ones_like(found[0].mask[..., 0]))


def heaviest(points, count=1):
    order = points.weight.abs().topk(count).indices
    return [
        tuple(round(number, 4) for number in row)
        for row in torch.stack((points.x, points.y, points.weight), 1)[order].tolist()
    ]


def test_trace_adds_offsets_and_multiplies_weights(net):
    one, two = trace_sampling(record_sampling(net, image()), (7, 5), (16, 20))
    assert heaviest(one, 2) == [(8, 8, 0.5), (9, 5, -0.25)]
    assert heaviest(two, 2) == [(10, 7, 0.5), (11, 4, -0.25)]
    (kept,) = trace_sampling(record_sampling(net, image())[1:], (7, 5), (16, 20), most=1)
    assert heaviest(kept) == [(8, 8, 0.5)] and len(kept.x) == 1


def test_trace_through_a_smaller_map():
    """Coordinates are those of the image: the middle of a map's pixel is the middle of the pixels it stands for."""
    (points,) = trace_sampling(record_sampling(Net(Stage((1, 0)), pool=4), image(32, 32)), (9, 14), (32, 32))
    assert heaviest(points) == [((2 + 1 + 0.5) * 4 - 0.5, (3 + 0.5) * 4 - 0.5, 1)]


def test_points_outside_are_left_out():
    (points,) = trace_sampling(record_sampling(Net(Stage((100, 0))), image()), (7, 5), (16, 20))
    assert len(points.x) == POINTS - 1


def test_effective_receptive_field(net):
    pixels = image().requires_grad_()
    last = record_sampling(net, pixels)[-1]
    field = effective_receptive_field(last.output, pixels, (5, 7))
    expected = torch.zeros(16, 20)
    expected[7, 10], expected[4, 11] = 2 * 0.5, 2 * 0.25
    torch.testing.assert_close(field, expected)


def test_figure(net):
    figure = sampling_offsets(net, image(), (7, 5))
    assert [axis.get_title().split()[-1] for axis in figure.axes[:2]] == ['stages.1.dcn', 'stages.0.dcn']
    assert 'unit (7, 5) of stages.1.dcn' in figure.get_suptitle()
    for axis, places in zip(figure.axes, ([(8, 8), (9, 5)], [(10, 7), (11, 4)]), strict=False):
        (scatter,) = axis.collections
        sizes, offsets = torch.tensor(scatter.get_sizes()), scatter.get_offsets()
        order = sizes.topk(3).indices.tolist()
        assert [tuple(offsets[i]) for i in order[:2]] == places
        assert sizes[order[1]] == sizes[order[0]] / 2 and sizes[order[2]] == 0
        assert tuple(scatter.get_facecolors()[order[0]]) != tuple(scatter.get_facecolors()[order[1]])
    field = figure.axes[-1].images[0].get_array()
    assert field.shape == (16, 20) and field.argmax() == 7 * 20 + 10
    assert len(sampling_offsets(net, image(), (7, 5), layers=1).axes) == 2
    assert sampling_offsets(net, image(), stage=0).axes[0].get_title() == 'sampled by stages.0.dcn'


def test_bad_arguments_are_named(net):
    with pytest.raises(ValueError, match='point must lie within the image of 20 x 16 pixels, got'):
        sampling_offsets(net, image(), (20, 0))
    with pytest.raises(ValueError, match=r'stage must be one of \[0, 1\], got 2'):
        sampling_offsets(net, image(), stage=2)
    with pytest.raises(ValueError, match='layers must be an int of at least 1, got 0'):
        sampling_offsets(net, image(), layers=0)
    with pytest.raises(ValueError, match='Linear has no deformable layers'):
        sampling_offsets(nn.Linear(20, 2), image())
    for call in (record_sampling, sampling_offsets):
        with pytest.raises(ValueError, match=r'batch of one image .* got shape \(2, 2, 4, 4\)'):
            call(net, torch.zeros(2, 2, 4, 4))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I', 'I;16', 'F', 'YCbCr'])
def test_pictures_of_any_mode_and_size(net, mode):
    """A red picture twice as large is drawn red where it has colours, over the whole of the image."""
    red = Image.new('RGB', (40, 32), (255, 0, 0))
    picture = Image.new(mode, red.size) if mode.startswith(('I', 'F')) else red.convert(mode)
    figure = sampling_offsets(net, image(), (7, 5), layers=1, picture=picture)
    drawn = figure.axes[0].images[0]
    assert drawn.get_extent() == [-0.5, 19.5, 15.5, -0.5]
    if mode in ('P', 'RGBA', 'CMYK', 'YCbCr'):
        assert drawn.get_array()[3, 4].tolist() == pytest.approx([255, 0, 0, 255], abs=5)
    feature_maps(picture, [torch.randn(4, 3, 3)], ['one'], channels=1).savefig(io.BytesIO())


def test_half_precision_and_nothing_inside():
    """All samples lie outside the map: there is nothing to draw, and nothing to follow further."""
    far = Stage((1000, 0)).bfloat16()
    torch.nn.init.constant_(far.dcn.offset_mask.bias, 1000)
    figure = sampling_offsets(Net(far, copy.deepcopy(far)), image().bfloat16())
    assert [len(axis.collections[0].get_offsets()) for axis in figure.axes[:2]] == [0, 0]
    assert not figure.axes[-1].images[0].get_array().any()
    figure.savefig(io.BytesIO())
