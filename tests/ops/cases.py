"""Operator cases shared by the tests of all backends: parameters, random operands, and the float64 answer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcnzoo.ops import dcnv4, use_backend

# Largest relative error of outputs and gradients against float64, by dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    """One call of the operator: the value map's shape and the arguments."""

    name: str
    batch: int = 2
    height: int = 7
    width: int = 9
    channels: int = 32
    arguments: dict = field(default_factory=dict)
    spread: float = 1.5  # standard deviation of the offsets in pixels
    tail: int = 0  # ignored channels behind offset_mask's last group

    @property
    def geometry(self) -> dict:
        defaults = {'groups': 2, 'kernel_size': 3, 'stride': 1, 'padding': 1, 'dilation': 1}
        return {**defaults, **self.arguments}

    def operands(self, dtype=torch.float64, device='cpu', seed=0) -> tuple[Tensor, Tensor, Tensor]:
        """Random value, offset_mask and output gradient."""
        pairs = {name: pair(self.geometry[name]) for name in ('kernel_size', 'stride', 'padding', 'dilation')}
        out_h, out_w = (
            (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
            for size, kernel, stride, pad, dilation in zip((self.height, self.width), *pairs.values(), strict=True)
        )
        kernel_h, kernel_w = pairs['kernel_size']
        points = kernel_h * kernel_w - int(self.geometry.get('remove_center', False))
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        groups = self.geometry['groups']
        value = draw(self.batch, self.height, self.width, self.channels)
        grad_output = draw(self.batch, out_h, out_w, self.channels)
        packed = draw(self.batch, out_h, out_w, groups, 3 * points)
        packed[..., : 2 * points] *= self.spread
        tail = draw(self.batch, out_h, out_w, self.tail)
        offset_mask = torch.cat((packed.flatten(3), tail), -1)
        return tuple(tensor.to(dtype=dtype, device=device) for tensor in (value, offset_mask, grad_output))


def pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


CASES = [
    Case('plain', tail=2),
    Case('one_pixel', height=1, width=1),
    Case('one_pixel_no_padding', height=3, width=3, arguments={'padding': 0}),
    Case('one_row', height=1, width=11),
    Case('empty_batch', batch=0),
    Case('stride_2_odd', height=9, width=11, arguments={'stride': 2}),
    Case(
        'pairs',
        height=11,
        width=8,
        arguments={'kernel_size': (5, 3), 'stride': (1, 2), 'padding': (2, 0), 'dilation': (1, 2)},
    ),
    Case('even_kernel', arguments={'kernel_size': (2, 4), 'padding': (1, 2)}),
    Case('kernel_1', arguments={'kernel_size': 1, 'padding': 0}),
    Case('kernel_7', batch=1, channels=16, arguments={'kernel_size': 7, 'padding': 3}),
    Case('dilated', arguments={'dilation': 3, 'padding': 3}),
    Case('scaled', arguments={'offset_scale': 0.37}),
    Case('scaled_dilated', arguments={'offset_scale': 2.0, 'dilation': (2, 3), 'padding': (2, 3)}),
    Case('remove_center', arguments={'remove_center': True}),
    Case('remove_center_5', arguments={'remove_center': True, 'kernel_size': 5, 'padding': 2}),
    Case('softmax', arguments={'softmax': True}),
    Case('softmax_remove_center', arguments={'softmax': True, 'remove_center': True, 'groups': 4}),
    Case('one_group', channels=20, arguments={'groups': 1}),
    Case('one_channel_groups', channels=5, arguments={'groups': 5}),
    Case('width_3', channels=12, arguments={'groups': 4}),
    Case('width_8', channels=16),
    Case('width_16', channels=64, arguments={'groups': 4}, tail=4),
    Case('width_32', channels=64),
    Case('width_33', channels=66),
    Case('width_64', channels=128),
    Case('width_100', batch=1, channels=100, arguments={'groups': 1}),
    Case('far_offsets', spread=30.0),
    Case('no_padding', arguments={'padding': 0}),
    Case('much_padding', arguments={'padding': 4}),
    Case('stage_1', batch=1, height=28, width=28, channels=64, arguments={'groups': 4}, tail=4),
]


def answer(
    case_geometry: dict, value: Tensor, offset_mask: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients by the reference in float64, from operands of any dtype."""
    value, offset_mask = (tensor.detach().double().requires_grad_() for tensor in (value, offset_mask))
    with use_backend('reference'):
        output = dcnv4(value, offset_mask, **case_geometry)
    return output.detach(), *torch.autograd.grad(output, (value, offset_mask), grad_output.double())


def run(case_geometry: dict, value: Tensor, offset_mask: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients by the backend in force."""
    value, offset_mask = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = dcnv4(value, offset_mask, **case_geometry)
    return output.detach(), *torch.autograd.grad(output, (value, offset_mask), grad_output)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; a NaN or an infinity where none is expected is infinitely wrong."""
    assert actual.shape == expected.shape
    actual = actual.to(expected)
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return float('inf')
    difference = torch.where(expected.isfinite(), actual - expected, 0).norm().item()
    return difference / max(torch.where(expected.isfinite(), expected, 0).norm().item(), 1e-30)


def check(results, expected, dtype: torch.dtype) -> None:
    """Compares output and gradients with the answer."""
    for name, actual, wanted in zip(('output', 'grad_value', 'grad_offset_mask'), results, expected, strict=True):
        if wanted.numel():
            assert error(actual, wanted) <= TOLERANCE[dtype], f'{name}: {error(actual, wanted):.2e}'
