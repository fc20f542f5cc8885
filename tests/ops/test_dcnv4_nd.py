"""DCNv4 along sequences and through volumes: the two-dimensional operator where both mean the same, and gradients."""

import pytest
import torch

from dcnzoo.ops import available_backends, dcnv4, dcnv4_1d, dcnv4_3d, use_backend
from tests.ops.cases import error

GROUPS, DEPTH = 2, 8
VARIANTS = [
    {},
    {'stride': 2, 'padding': 3, 'dilation': 2, 'offset_scale': 0.75},
    {'kernel_size': 5, 'padding': 2, 'softmax': True},
    {'remove_center': True, 'softmax': True},
    {'remove_center': True},
]
variants = pytest.mark.parametrize('arguments', VARIANTS, ids=lambda variant: '-'.join(variant) or 'plain')


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def out(size, kernel_size=3, stride=1, padding=1, dilation=1, **_):
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


@pytest.fixture(params=available_backends('cpu'))
def backend(request):
    with use_backend(request.param):
        yield request.param


@variants
def test_a_sequence_is_a_row(backend, arguments):
    """Against sums of linear samples, written out."""
    kernel = arguments.get('kernel_size', 3)
    points = kernel - int(arguments.get('remove_center', False))
    value, packed = draw(2, 11, GROUPS * DEPTH), draw(2, out(11, **arguments), 2 * GROUPS * points + 1, seed=1)
    value.requires_grad_(), packed.requires_grad_()
    result = dcnv4_1d(value, packed, groups=GROUPS, **arguments)

    offset, mask = packed[..., :-1].unflatten(-1, (GROUPS, 2 * points)).split(points, -1)
    if arguments.get('softmax'):
        mask = mask.softmax(-1)
    scale, dilation = arguments.get('offset_scale', 1.0), arguments.get('dilation', 1)
    center = (dilation * (kernel - 1)) >> 1
    taps = torch.tensor([i for i in range(kernel) if points == kernel or i != kernel // 2]) * dilation
    start = torch.arange(result.shape[1]) * arguments.get('stride', 1) - arguments.get('padding', 1)
    x = start[:, None, None] + center - center * scale + (taps + offset) * scale
    low = x.detach().floor()
    expected = 0
    for pixel, weight in ((low, 1 - (x - low)), (low + 1, x - low)):
        seen = (pixel >= 0) & (pixel < 11)
        index = torch.where(seen, pixel, 0).long().permute(0, 2, 1, 3).flatten(2)
        maps = value.unflatten(-1, (GROUPS, DEPTH)).transpose(1, 2)
        samples = maps.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, DEPTH))
        samples = samples.unflatten(2, (result.shape[1], points)).transpose(1, 2)
        expected = expected + (samples * (weight * mask * seen).unsqueeze(-1)).sum(3)
    expected = expected.flatten(2)
    assert error(result.detach(), expected.detach()) < 1e-12
    grad = draw(*result.shape, seed=2)
    for actual, wanted in zip(
        torch.autograd.grad(result, (value, packed), grad),
        torch.autograd.grad(expected, (value, packed), grad),
        strict=True,
    ):
        assert error(actual, wanted) < 1e-12


def test_a_row_of_the_operator(backend):
    value, offset, mask = draw(2, 9, 16), draw(2, 9, GROUPS, 3, seed=1), draw(2, 9, GROUPS, 3, seed=2)
    packed = torch.cat((offset, mask), -1).flatten(2)
    flat = torch.cat((torch.stack((offset, torch.zeros_like(offset)), -1).flatten(3), mask), -1).flatten(2)
    expected = dcnv4(value[:, None], flat[:, None], groups=GROUPS, kernel_size=(1, 3), padding=(0, 1))
    assert torch.equal(dcnv4_1d(value, packed, groups=GROUPS), expected[:, 0])


@pytest.mark.parametrize('axis', range(3))
@pytest.mark.parametrize('arguments', VARIANTS[:3], ids=lambda variant: '-'.join(variant) or 'plain')
def test_a_volume_of_one_slice_is_a_map(axis, arguments):
    """Whichever axis is the thin one."""
    kernel = arguments.get('kernel_size', 3)
    points = kernel * kernel
    value = draw(2, 7, 9, GROUPS * DEPTH).requires_grad_()
    packed = draw(2, out(7, **arguments), out(9, **arguments), 3 * GROUPS * points, seed=1).requires_grad_()
    expected = dcnv4(value, packed, groups=GROUPS, **arguments)

    numbers = packed.unflatten(-1, (GROUPS, 3 * points))
    offset, mask = numbers[..., : 2 * points].unflatten(-1, (points, 2)), numbers[..., 2 * points :]
    triples = list(offset.unbind(-1))
    triples.insert(2 - axis, torch.zeros_like(triples[0]))
    volume = torch.cat((torch.stack(triples, -1).flatten(-2), mask), -1).flatten(-2)
    sizes = {'kernel_size': kernel, 'stride': 1, 'padding': 1, 'dilation': 1, **arguments}
    thin = {'kernel_size': 1, 'stride': 1, 'padding': 0, 'dilation': 1}
    for name, one in thin.items():
        size = [sizes[name]] * 2
        size.insert(axis, one)
        sizes[name] = tuple(size)
    result = dcnv4_3d(value.unsqueeze(1 + axis), volume.unsqueeze(1 + axis), groups=GROUPS, **sizes).squeeze(1 + axis)
    assert error(result.detach(), expected.detach()) < 1e-12
    grad = draw(*result.shape, seed=2)
    for actual, wanted in zip(
        torch.autograd.grad(result, (value, packed), grad),
        torch.autograd.grad(expected, (value, packed), grad),
        strict=True,
    ):
        assert error(actual, wanted) < 1e-12


def test_a_volume_without_offsets_is_a_box_convolution():
    value = draw(2, 5, 6, 7, 4)
    packed = torch.zeros(2, 3, 3, 4, 4 * 26, dtype=torch.float64)
    packed[..., 3 * 26 :] = 1
    result = dcnv4_3d(value, packed, groups=1, stride=2, remove_center=True)
    box = torch.ones(4, 1, 3, 3, 3, dtype=torch.float64)
    box[:, :, 1, 1, 1] = 0
    expected = torch.nn.functional.conv3d(value.movedim(-1, 1), box, stride=2, padding=1, groups=4).movedim(1, -1)
    assert error(result, expected) < 1e-12


def test_gradcheck():
    value, packed = draw(1, 2, 3, 2, 2).requires_grad_(), draw(1, 1, 2, 2, 4 * 4, seed=1).requires_grad_()
    kernel = {'kernel_size': (2, 2, 1), 'padding': 0}
    assert torch.autograd.gradcheck(lambda v, p: dcnv4_3d(v, p, groups=1, **kernel), (value, packed))
    sequence, row = draw(1, 4, 2).requires_grad_(), draw(1, 4, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, p: dcnv4_1d(v, p, groups=1), (sequence, row))
    assert torch.autograd.gradgradcheck(lambda v, p: dcnv4_1d(v, p, groups=1), (sequence, row))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_points_that_are_nowhere(dtype):
    value, packed = draw(1, 4, 4, 4, 4), draw(1, 4, 4, 4, 4 * 27, seed=1)
    packed[0, 1, 2, 3, :9] = float('nan')
    result = dcnv4_3d(value.to(dtype), packed.to(dtype), groups=1)
    assert result.dtype == dtype and result.is_contiguous() and result.isfinite().all()
    exact = dcnv4_3d(value.to(dtype).double(), packed.to(dtype).double(), groups=1)
    assert error(result, exact) < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


Z = torch.zeros


@pytest.mark.parametrize(
    ('call', 'kind', 'message'),
    [
        (lambda: dcnv4_1d(Z(2, 9), Z(2, 9, 6), groups=1), ValueError, r'value must have 3 dimensions \(N, L, C\)'),
        (
            lambda: dcnv4_1d(Z(2, 9, 4), Z(2, 9, 5), groups=1),
            ValueError,
            r'\(2, 9\) and at least 6 channels.*got \(2, 9, 5',
        ),
        (lambda: dcnv4_1d(Z(2, 9, 4), Z(2, 9, 6).int(), groups=1), TypeError, 'offset_mask must have.*int32'),
        (
            lambda: dcnv4_1d(Z(2, 9, 4), Z(2, 9, 6), groups=3),
            ValueError,
            r'groups must divide.*\(2, 9, 4\) and groups 3',
        ),
        (lambda: dcnv4_1d(Z(2, 9, 4), Z(2, 9, 6), groups=1, stride='1'), TypeError, "stride must be an int, got '1'"),
        (lambda: dcnv4_1d(Z(2, 1, 4), Z(2, 1, 6), groups=1, padding=0), ValueError, r'kernel_size \(3,\) does not fit'),
        (lambda: dcnv4_3d(Z(2, 4, 4, 4), Z(1), groups=1), ValueError, 'value must have 5 dimensions'),
        (
            lambda: dcnv4_3d(Z(2, 4, 4, 4, 4), Z(2, 4, 4, 4, 108), groups=1, kernel_size=(3, 3)),
            TypeError,
            r'kernel_size must be an int or 3 of them, got \(3, 3\)',
        ),
        (
            lambda: dcnv4_3d(Z(2, 4, 4, 4, 4), Z(2, 4, 4, 4, 108), groups=1, kernel_size=2, remove_center=True),
            ValueError,
            r'remove_center needs odd.*got \(2, 2, 2\)',
        ),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_no_other_backend_serves_volumes():
    backend = available_backends('cpu')[0]
    if backend == 'reference':
        pytest.skip('no other backend is at hand')
    with use_backend(backend), pytest.raises(RuntimeError, match='dcnv4_3d has no other backend than the reference'):
        dcnv4_3d(Z(1, 2, 2, 2, 2), Z(1, 2, 2, 2, 108), groups=1)
