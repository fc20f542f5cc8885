"""The operators' schemas, the libraries that implement them, and the choice between backends.

Schemas are defined here, once, so that the operators exist without a compiler. Behind one name the dispatcher finds the
compiled kernel of the tensor's device where its library was built, else Triton's on a GPU, else the reference. Every
operator has a twin, suffixed `_triton`, which is always Triton's: `use_backend` chooses it beside a native one.
What dynamic convolution has beside these are kernels for CPUs only; who calls them has made sure that they are there.
"""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path

import torch

BACKENDS = ('native', 'triton', 'reference')

_WINDOW = 'int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w'
_GEOMETRY = f'int groups, {_WINDOW}, float offset_scale, bool remove_center, bool softmax'
_ATTENTION = 'Tensor value, Tensor sampling_locations, Tensor attention_weights, SymInt[] spatial_shapes'
_SCHEMAS = {
    'dcnv4': f'(Tensor value, Tensor offset_mask, {_GEOMETRY}) -> Tensor',
    'dcnv4_backward': (
        f'(Tensor grad_output, Tensor value, Tensor offset_mask, {_GEOMETRY}, bool deterministic) -> (Tensor, Tensor)'
    ),
    'deform_attn': f'({_ATTENTION}) -> Tensor',
    'deform_attn_backward': f'(Tensor grad_output, {_ATTENTION}, bool deterministic) -> (Tensor, Tensor, Tensor)',
}

library = torch.library.Library('dcnzoo', 'DEF')
for _name, _schema in _SCHEMAS.items():
    for _suffix in ('', '_triton'):
        library.define(_name + _suffix + _schema, tags=(torch.Tag.pt2_compliant_tag,))
for _schema in (
    'mixed_kernels(Tensor x, Tensor weight, Tensor? bias, Tensor experts, float temperature, bool softmax) -> Tensor',
    f'depthwise(Tensor x, Tensor kernels, {_WINDOW}) -> Tensor',
    f'depthwise_backward(Tensor grad_output, Tensor x, Tensor kernels, {_WINDOW}) -> (Tensor, Tensor)',
    f'depthwise_planes(Tensor x, Tensor kernels, {_WINDOW}) -> Tensor',
):
    library.define(_schema)

_REINSTALL = 'pip install --no-build-isolation --no-deps --force-reinstall .'


def _load_native(device: str) -> str | None:
    """Loads the compiled library for a device type; returns None, or why there is none."""
    # Beside this very package: the import system would also offer the library of an editable installation elsewhere.
    found = PathFinder.find_spec(f'_{device}', [str(Path(__file__).parents[1])])
    if found is None:
        needs = 'a C++ compiler' if device == 'cpu' else 'nvcc and a CUDA build of torch'
        return f'the {device.upper()} library was not built; with {needs} installed, run `{_REINSTALL}` in a clone'
    try:
        torch.ops.load_library(found.origin)
    except (ImportError, OSError) as error:
        return f'the {device.upper()} library does not load ({error}); rebuild it with `{_REINSTALL}` in a clone'
    return None


_NATIVE_MISSING = {device: _load_native(device) for device in ('cpu', 'cuda')}
_TRITON_INSTALLED = importlib.util.find_spec('triton') is not None
_TRITON_INTERPRETED = os.environ.get('TRITON_INTERPRET', '0') == '1'


def _triton_missing(device: str) -> str | None:
    if not _TRITON_INSTALLED:
        return 'Triton is not installed; run `pip install triton`'
    if _TRITON_INTERPRETED:
        return None if device == 'cpu' else 'TRITON_INTERPRET=1 makes Triton run on the CPU'
    return None if device in ('cuda', 'xpu') else 'Triton compiles for GPUs only'


def missing(backend: str, device: str = 'cpu') -> str | None:
    """Why a backend cannot serve a device type, or None where it can.

    Args:
        backend: 'native', 'triton' or 'reference'.
        device: A device type, 'cpu' or 'cuda' for instance.

    Raises:
        ValueError: There is no backend of that name.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(map(repr, BACKENDS))}, got {backend!r}')
    if backend == 'native':
        return _NATIVE_MISSING.get(device, f'there are no compiled operators for {device} devices')
    if backend == 'triton':
        return _triton_missing(device)
    return None


def available_backends(device: str | torch.device = 'cpu') -> list[str]:
    """Lists the backends that can serve a device, in the order in which they are chosen.

    Args:
        device: A device or its type, 'cpu', 'cuda' or 'cuda:1' for instance.

    Returns:
        Names out of 'native', 'triton' and 'reference'.
    """
    kind = torch.device(device).type
    return [backend for backend in BACKENDS if missing(backend, kind) is None]


_override: ContextVar[str | None] = ContextVar('dcnzoo_backend', default=None)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes the operators run on one backend within a `with` block, in this thread.

    A call on a device that the backend cannot serve raises a RuntimeError with the reason. TorchScript code and graphs
    compiled before are not affected.

    Args:
        backend: 'native', 'triton' or 'reference'.

    Raises:
        ValueError: There is no backend of that name.
    """
    missing(backend)
    token = _override.set(backend)
    try:
        yield
    finally:
        _override.reset(token)


@torch.compiler.assume_constant_result  # dynamo of torch 2.10 cannot trace a ContextVar
def _overriding() -> str | None:
    return _override.get()


def chosen_backend(device: torch.device) -> str | None:
    """The backend asked for with `use_backend`, checked against the device, or None where the dispatcher chooses."""
    backend = _overriding()
    if backend is not None and device.type != 'meta':
        reason = missing(backend, device.type)
        if reason is not None:
            raise RuntimeError(f'the {backend!r} backend is not available on {device.type}: {reason}')
    return backend


def operator(name: str, backend: str | None) -> torch._ops.OpOverload:
    """The registered operator that runs on a backend; None stands for the dispatcher's own choice."""
    return getattr(torch.ops.dcnzoo, f'{name}_triton' if backend == 'triton' else name).default


def exporting() -> bool:
    """Whether a graph is recorded for another runtime, which knows standard operators only."""
    return torch.compiler.is_exporting() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export())


@functools.cache
def warn_slow(device: str) -> None:
    """Says once per device type that the reference serves for want of a faster backend."""
    reasons = '; '.join(missing(backend, device) or '' for backend in BACKENDS[:-1])
    warnings.warn(f'dcnzoo runs on its slow reference backend on {device}: {reasons}', RuntimeWarning, stacklevel=2)
