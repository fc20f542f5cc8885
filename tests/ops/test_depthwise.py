"""The compiled depthwise convolution with kernels per sample, against PyTorch's in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcnzoo.ops import available_backends, use_backend
from dcnzoo.ops._depthwise import depthwise, serves_depthwise

pytestmark = pytest.mark.skipif('native' not in available_backends('cpu'), reason='the CPU library was not built')


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    """A copy whose channels lie together, whatever its sizes."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def expected(x: Tensor, kernels: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    outs = [
        F.conv2d(image[None], kernel.view(len(image), 1, *kernel_size), None, stride, padding, dilation, len(image))
        for image, kernel in zip(x, kernels, strict=True)
    ]
    return torch.cat(outs)


def check(x: Tensor, kernels: Tensor, geometry: tuple) -> None:
    """The output from channels_last maps with its gradients, and that from contiguous maps without."""
    planes = depthwise(x.contiguous(), kernels, *geometry)
    wanted = expected(x.double(), kernels.double(), *geometry)
    assert planes.is_contiguous()
    torch.testing.assert_close(planes.double(), wanted, rtol=1e-5, atol=1e-5 * (1 + wanted.abs().max().item()))
    x, kernels = x.requires_grad_(), kernels.requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, kernels)]
    output, wanted = depthwise(x, kernels, *geometry), expected(*exact, *geometry)
    if not x.is_contiguous():  # nor is a map of one pixel or one channel laid out in both ways
        assert output.permute(0, 2, 3, 1).is_contiguous()
    grad = draw(*wanted.shape, seed=1)
    found = output, *torch.autograd.grad(output, (x, kernels), grad)
    for tensor, want in zip(found, (wanted, *torch.autograd.grad(wanted, exact, grad.double())), strict=True):
        assert tensor.shape == want.shape
        torch.testing.assert_close(tensor.double(), want, rtol=1e-5, atol=1e-5 * (1 + want.abs().max().item()))


SIZES = [(2, 5, 7, 6), (3, 70, 9, 8), (2, 130, 3, 11), (1, 16, 4, 4), (2, 33, 1, 1), (2, 1, 12, 9)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('kernel_size', [(1, 1), (3, 3), (5, 3), (2, 4), (7, 7)], ids=str)
def test_output_and_gradients(size, kernel_size):
    tried = 0
    sides = list(itertools.product([(1, 1), (2, 3)], [(0, 0), (1, 1), (4, 7)], [(1, 1), (2, 1)]))
    for stride, padding, dilation in sides:
        spans = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel_size, strict=True)]
        if all(side + 2 * pad >= span for side, pad, span in zip(size[2:], padding, spans, strict=True)):
            kernels = draw(size[0], size[1] * kernel_size[0] * kernel_size[1], seed=2)
            check(channels_last(draw(*size)), kernels, (kernel_size, stride, padding, dilation))
            tried += 1
    assert tried > 0


@given(st.data())
def test_any_geometry(data):
    small, side = st.integers(1, 3), st.integers(1, 12)
    size = data.draw(st.tuples(small, st.integers(1, 90), side, side))
    kernel_size, stride, dilation = (data.draw(st.tuples(upto, upto)) for upto in (st.integers(1, 6), small, small))
    padding = data.draw(st.tuples(st.integers(0, 7), st.integers(0, 7)))
    spans = [step * (taps - 1) + 1 for step, taps in zip(dilation, kernel_size, strict=True)]
    least = [max(0, (span - length + 1) // 2) for span, length in zip(spans, size[2:], strict=True)]
    padding = tuple(map(max, padding, least))
    kernels = draw(size[0], size[1] * kernel_size[0] * kernel_size[1], seed=2)
    check(channels_last(draw(*size)), kernels, (kernel_size, stride, padding, dilation))


@pytest.mark.parametrize('layout', ['contiguous', 'expanded', 'flipped', 'sliced'])
def test_gradients_of_any_layout(layout):
    x, kernels = channels_last(draw(2, 20, 6, 5)).requires_grad_(), draw(2, 180).requires_grad_()
    output = depthwise(x, kernels, (3, 3), (1, 1), (1, 1), (1, 1))
    grad = {
        'contiguous': draw(2, 20, 6, 5),
        'expanded': draw(2, 20, 1, 1).expand(2, 20, 6, 5),
        'flipped': draw(2, 20, 5, 6).transpose(2, 3),
        'sliced': draw(2, 40, 6, 5)[:, ::2],
    }[layout]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, kernels)]
    wanted = expected(*exact, (3, 3), (1, 1), (1, 1), (1, 1))
    pairs = zip(
        torch.autograd.grad(output, (x, kernels), grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    )
    for found, want in pairs:
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('needed', [(True, True), (True, False), (False, True)], ids=str)
def test_second_derivatives(needed):
    x, kernels = channels_last(draw(2, 3, 4, 4)), draw(2, 27)
    operands = [x.requires_grad_(needed[0]), kernels.requires_grad_(needed[1])]
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in operands]
    seconds = []
    for function, inputs in ((depthwise, operands), (expected, exact)):
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        output = function(*inputs, (3, 3), (2, 1), (1, 1), (1, 1))
        firsts = torch.autograd.grad(output.square().sum(), wanted, create_graph=True)
        seconds.append(torch.autograd.grad(sum(first.square().sum() for first in firsts), wanted))
    for found, want in zip(*seconds, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('threads', [2, 3])
def test_bits_do_not_depend_on_threads_or_batch(threads):
    x, kernels, grad = channels_last(draw(5, 150, 20, 17)), draw(5, 1350), draw(5, 10, 17, 150)
    window = (3, 3, 2, 1, 1, 1, 1, 1)

    def results(rows: slice) -> list[Tensor]:
        pixels = x[rows].permute(0, 2, 3, 1)
        output = torch.ops.dcnzoo.depthwise(pixels, kernels[rows], *window)
        planes = torch.ops.dcnzoo.depthwise_planes(x[rows].contiguous(), kernels[rows], *window)
        return [output, planes, *torch.ops.dcnzoo.depthwise_backward(grad[rows], pixels, kernels[rows], *window)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [results(slice(i, i + 1)) for i in range(5)]
        torch.set_num_threads(threads)
        together = results(slice(None))
    finally:
        torch.set_num_threads(before)
    for i, parts in enumerate(zip(*alone, strict=True)):
        assert torch.equal(torch.cat(parts), together[i])


def test_where_it_serves():
    x, kernels = channels_last(draw(2, 6, 4, 4)), draw(2, 54)
    assert serves_depthwise(x, kernels, 6)
    assert not serves_depthwise(x, kernels, 3)
    assert not serves_depthwise(x.contiguous(), kernels, 6)
    assert serves_depthwise(x[:1].requires_grad_(), kernels[:1], 6)
    assert not serves_depthwise(x[:0], kernels[:0], 6)
    assert not serves_depthwise(x.double(), kernels.double(), 6)
    with use_backend('reference'):
        assert not serves_depthwise(x, kernels, 6)
    with torch.autocast('cpu'):
        assert not serves_depthwise(x, kernels, 6)


def test_large_contiguous_maps_are_served_without_gradients():
    x, kernels = torch.empty(2, 16, 256, 256), draw(2, 144)
    assert serves_depthwise(x, kernels, 16)
    assert not serves_depthwise(x[:, :, :128], kernels, 16)
    assert not serves_depthwise(x[:, :, :128].contiguous(), kernels, 16)
    assert not serves_depthwise(x, kernels.requires_grad_(), 16)
    with torch.no_grad():
        assert serves_depthwise(x, kernels, 16)


def test_a_single_small_sample_is_served_in_any_layout():
    x, kernels = draw(1, 16, 5, 7), draw(1, 144)
    assert serves_depthwise(x, kernels, 16)
    assert serves_depthwise(x, draw(1, 144).requires_grad_(), 16)
    assert serves_depthwise(channels_last(x), kernels, 16)
    assert not serves_depthwise(channels_last(x).transpose(2, 3), kernels, 16)
    assert not serves_depthwise(draw(1, 4, 5, 7), draw(1, 36), 4)
    large = draw(1, 16, 60, 60)
    assert serves_depthwise(large, kernels, 16)
    assert not serves_depthwise(large.requires_grad_(), kernels, 16)
    assert not serves_depthwise(draw(1, 16, 200, 200), kernels, 16)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'flipped'])
def test_the_output_is_laid_out_as_that_of_a_convolution(layout):
    x, kernels = draw(1, 16, 5, 7), draw(1, 144)
    x = {'contiguous': x, 'channels_last': channels_last(x), 'flipped': x.transpose(2, 3)}[layout]
    x, kernels = x.requires_grad_(), kernels.requires_grad_()
    found = depthwise(x, kernels, [3, 3], [2, 1], [1, 1], [1, 2])
    wanted = F.conv2d(x, kernels.view(16, 1, 3, 3), None, (2, 1), 1, (1, 2), 16)
    torch.testing.assert_close(found, wanted)
    assert found.stride() == wanted.stride()
    gradients = (torch.autograd.grad(output.square().sum(), (x, kernels)) for output in (found, wanted))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ('size', 'kernels', 'window', 'message'),
    [
        ((2, 4, 6), (2, 54), (3, 3, 1, 1, 1, 1, 1, 1), r'x must have 4 dimensions \(N, H, W, C\), got 3'),
        ((2, 4, 4, 6), (2, 53), (3, 3, 1, 1, 1, 1, 1, 1), r'kernels must have shape \(2, 54\)'),
        ((2, 4, 4, 6), (1, 54), (3, 3, 1, 1, 1, 1, 1, 1), r'kernels must have shape \(2, 54\)'),
        ((2, 4, 4, 6), (2, 54), (3, 3, 0, 1, 1, 1, 1, 1), 'must be positive'),
        ((2, 4, 4, 6), (2, 54), (3, 3, 1, 1, 1, -1, 1, 1), 'padding not negative'),
        ((2, 1, 4, 6), (2, 54), (3, 3, 1, 1, 0, 1, 1, 1), 'the kernel does not fit into 1 rows or columns'),
    ],
)
def test_last_guard(size, kernels, window, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dcnzoo.depthwise(draw(*size), draw(*kernels), *window)
    planes = draw(*size).movedim(-1, 1)
    with pytest.raises(RuntimeError, match=message.replace('N, H, W, C', 'N, C, H, W')):
        torch.ops.dcnzoo.depthwise_planes(planes, draw(*kernels), *window)
    with pytest.raises(RuntimeError):
        torch.ops.dcnzoo.depthwise_backward(draw(*size), draw(*size), draw(*kernels), *window)
