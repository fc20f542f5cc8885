"""What the properties of operators are tested with: backends, layouts of tensors, numbers of examples, comparisons."""

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from dcnzoo.ops import available_backends, use_backend
from tests.ops.cases import TOLERANCE

DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
BACKENDS = [(device, backend) for device in DEVICES for backend in available_backends(device)]
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
NAN, INFINITY = float('nan'), float('inf')

LAYOUTS = {
    'contiguous': lambda tensor: tensor,
    'part_of_a_row': lambda tensor: torch.cat((tensor, tensor), -1)[..., tensor.shape[-1] :],
    'every_other_channel': lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    'storage_offset': lambda tensor: torch.cat((tensor.new_zeros(3), tensor.flatten()))[3:].view_as(tensor),
    'transposed': lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    'expanded': lambda tensor: tensor[:1].expand_as(tensor),
}

every_backend = pytest.mark.parametrize(('device', 'backend'), BACKENDS)
needs_native = pytest.mark.skipif('native' not in available_backends('cpu'), reason='the CPU library was not built')


def examples(share: float = 1.0, backend: str = '') -> int:
    """A share of the profile's number of examples; less where Triton is interpreted."""
    return max(3, int(settings().max_examples * share * (0.04 if backend == 'triton' and INTERPRETED else 1)))


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Has PyTorch fill memory that nobody wrote with NaN, too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_backend(backend: str, deterministic: bool, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of a backend, deterministic if asked, but where that takes too long."""
    slow = backend == 'reference' or INTERPRETED
    with use_backend(backend), deterministic_algorithms(deterministic and not slow):
        return call()


def finite(tensor: Tensor) -> Tensor:
    """In float64, with 0 for what is not finite."""
    return tensor.double().nan_to_num(0, 0, 0)


def assert_near(name: str, actual: Tensor, expected: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Holds numbers to the float64 ones; errors are measured against `bound`, the magnitudes of what was added up."""
    assert actual.shape == expected.shape
    known = expected.isfinite()
    assert torch.equal(actual.isfinite(), known), f'{name} is not finite elsewhere'
    difference = torch.where(known, actual.double() - expected, 0).norm()
    assert difference <= TOLERANCE[dtype] * torch.where(known, bound, 0).norm() + 1e-30, f'{name}: {difference:.2e}'


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit, NaN where NaN."""
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


def assert_independent_of_threads(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Calls with several numbers of threads; returns what all of them gave."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    return results[0]
