"""The reference against a loop written straight from the definition, the published outputs, and numeric derivatives."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcnzoo.ops import dcnv4, reference, use_backend
from tests.ops.cases import CASES, Case, answer, error, pair

GOLDEN = Path(__file__).parent / 'golden'


@pytest.fixture(autouse=True)
def reference_backend():
    with use_backend('reference'):
        yield


def loop(
    value,
    offset_mask,
    groups,
    kernel_size,
    stride,
    padding,
    dilation,
    offset_scale=1.0,
    remove_center=False,
    softmax=False,
):
    """DCNv4's definition, one scalar at a time."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (pair(size) for size in (kernel_size, stride, padding, dilation))
    batch, height, width, channels = value.shape
    _, out_h, out_w, _ = offset_mask.shape
    per_group = channels // groups
    points = kh * kw - int(remove_center)
    center_x, center_y = (dw * (kw - 1)) >> 1, (dh * (kh - 1)) >> 1
    value, offset_mask, out = value.tolist(), offset_mask.tolist(), torch.zeros(batch, out_h, out_w, channels).double()

    def pixel(n, y, x, c):
        return value[n][y][x][c] if 0 <= y < height and 0 <= x < width else 0.0

    for n, ho, wo, g in itertools.product(range(batch), range(out_h), range(out_w), range(groups)):
        numbers = offset_mask[n][ho][wo][3 * points * g : 3 * points * (g + 1)]
        scalars = numbers[2 * points :]
        if softmax:
            exponentials = [math.exp(scalar - max(scalars)) for scalar in scalars]
            scalars = [exponential / sum(exponentials) for exponential in exponentials]
        k = 0
        for i in range(kw):
            for j in range(kh):
                if remove_center and i == kw // 2 and j == kh // 2:
                    continue
                x = center_x - pw + wo * sw - center_x * offset_scale + (i * dw + numbers[2 * k]) * offset_scale
                y = center_y - ph + ho * sh - center_y * offset_scale + (j * dh + numbers[2 * k + 1]) * offset_scale
                if -1 < y < height and -1 < x < width:
                    x0, y0 = math.floor(x), math.floor(y)
                    fx, fy = x - x0, y - y0
                    for d in range(per_group):
                        c = g * per_group + d
                        out[n, ho, wo, c] += scalars[k] * (
                            (1 - fy) * (1 - fx) * pixel(n, y0, x0, c)
                            + (1 - fy) * fx * pixel(n, y0, x0 + 1, c)
                            + fy * (1 - fx) * pixel(n, y0 + 1, x0, c)
                            + fy * fx * pixel(n, y0 + 1, x0 + 1, c)
                        )
                k += 1
    return out


@pytest.mark.parametrize('case', [case for case in CASES if case.height < 20], ids=lambda case: case.name)
def test_matches_the_definition(case):
    value, offset_mask, _ = case.operands()
    assert error(dcnv4(value, offset_mask, **case.geometry), loop(value, offset_mask, **case.geometry)) < 1e-13


@pytest.mark.parametrize('number', range(5))
def test_matches_the_published_outputs(number):
    geometry = json.loads((GOLDEN / 'dcnv4_op.json').read_text())[str(number)]
    golden = {
        key.partition('.')[2]: tensor
        for key, tensor in load_file(GOLDEN / 'dcnv4_op.safetensors').items()
        if key.startswith(f'{number}.')
    }
    results = answer(geometry, golden['value'], golden['offset_mask'], golden['grad_out'])
    for actual, name in zip(results, ('out', 'grad_value', 'grad_offset_mask'), strict=True):
        assert error(actual, golden[name]) < 1e-13


SMALL = [
    Case('plain', 1, 3, 4, 4, tail=1),
    Case('softmax_remove_center', 1, 3, 3, 4, {'softmax': True, 'remove_center': True}),
    Case(
        'scaled_stride', 2, 4, 3, 2, {'groups': 1, 'stride': (2, 1), 'offset_scale': 0.7, 'dilation': 2, 'padding': 2}
    ),
]


@pytest.mark.parametrize('case', SMALL, ids=lambda case: case.name)
def test_derivatives_are_the_numeric_ones(case):
    value, offset_mask, _ = case.operands()
    value.requires_grad_(), offset_mask.requires_grad_()

    def function(value, offset_mask):
        return dcnv4(value, offset_mask, **case.geometry)

    assert torch.autograd.gradcheck(function, (value, offset_mask))
    assert torch.autograd.gradgradcheck(function, (value, offset_mask))


@pytest.mark.parametrize('case', [*CASES, *SMALL], ids=lambda case: case.name)
def test_written_out_backward_equals_autograd(case):
    """The backward behind the registered operator, which cannot use autograd, against autograd through the forward."""
    value, offset_mask, grad_output = case.operands()
    _, *expected = answer(case.geometry, value, offset_mask, grad_output)
    pairs = [size for name in ('kernel_size', 'stride', 'padding', 'dilation') for size in pair(case.geometry[name])]
    flags = case.geometry.get('remove_center', False), case.geometry.get('softmax', False)
    arguments = case.geometry['groups'], *pairs, case.geometry.get('offset_scale', 1.0), *flags
    for actual, wanted in zip(
        reference.dcnv4_backward(grad_output, value, offset_mask, *arguments), expected, strict=True
    ):
        assert error(actual, wanted) < 1e-13


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_computed_in_float32(dtype):
    case = Case('plain')
    value, offset_mask, _ = case.operands(dtype)
    single = dcnv4(value.float(), offset_mask.float(), **case.geometry)
    assert torch.equal(dcnv4(value, offset_mask, **case.geometry), single.to(dtype))
    assert torch.equal(dcnv4(value, offset_mask.float(), **case.geometry), single.to(dtype))
