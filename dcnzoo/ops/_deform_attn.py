"""Multi-scale deformable attention: the public function, its checks, and its registration with PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import reference
from ._dcnv4 import _DTYPES, _is_int
from ._library import chosen_backend, exporting, operator
from ._registration import register


def deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention of `Deformable DETR <https://arxiv.org/abs/2010.04159>`_.

    Each query's output is, per head, a weighted sum of bilinear samples of several feature maps, the levels. A location
    (x, y) is normalised: (0, 0) is the outer corner of a map's first pixel and (1, 1) that of its last, so that
    ``x * width - 0.5`` is the coordinate in pixels, as in ``grid_sample(align_corners=False)``. What is outside a map
    counts as zero, and so do points at locations that are not finite.

    Args:
        value: The maps' pixels row by row, level behind level, (N, S, M, D): S = sum of height * width over the levels,
            M heads of D channels; float64, float32, float16 or bfloat16. Any strides.
        spatial_shapes: (height, width) of each of the L levels: pairs of ints, or an integer tensor (L, 2). One that is
            on a GPU is read back, which waits for the GPU; `torch.compile` wants pairs, whose ints may be dynamic.
        sampling_locations: (N, queries, M, L, points, 2) as (x, y), in value's dtype, or float32 beside a half value.
        attention_weights: Weights of the samples, (N, queries, M, L, points), in one of the same two dtypes. They are
            used as they come; in Deformable DETR they are a softmax over all levels and points.

    Returns:
        (N, queries, M * D), contiguous, in value's dtype.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: A dtype or the type of an argument does not fit.
        RuntimeError: The backend asked for with `use_backend` is not available on value's device.
    """
    tensors = (value, sampling_locations, attention_weights)
    if has_torch_function(tensors):
        return handle_torch_function(deform_attn, tensors, value, spatial_shapes, sampling_locations, attention_weights)
    shapes = _flat_shapes(spatial_shapes)
    _check(value, shapes, sampling_locations, attention_weights)
    if sampling_locations.dtype != attention_weights.dtype:
        sampling_locations, attention_weights = sampling_locations.float(), attention_weights.float()
    arguments = (value, sampling_locations, attention_weights, shapes)
    backend = chosen_backend(value.device)
    if backend == 'reference' or exporting():
        return reference.deform_attn(*arguments)
    return operator('deform_attn', backend)(*arguments)


def _flat_shapes(spatial_shapes: object) -> list[int]:
    """Heights and widths in one list: (h0, w0), (h1, w1), ... -> h0, w0, h1, w1, ..."""
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.is_floating_point() or spatial_shapes.is_complex() or spatial_shapes.dtype == torch.bool:
            raise TypeError(f'spatial_shapes must be a tensor of integers, got {spatial_shapes.dtype}')
        if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f'spatial_shapes must have shape (levels, 2), got {tuple(spatial_shapes.shape)}')
        spatial_shapes = spatial_shapes.tolist()
    if not isinstance(spatial_shapes, (tuple, list)):
        kind = type(spatial_shapes).__name__
        raise TypeError(f'spatial_shapes must be a sequence of (height, width) pairs or a tensor, got {kind}')
    flat = []
    for shape in spatial_shapes:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2 or not all(map(_is_int, shape)):
            raise TypeError(f'spatial_shapes must be (height, width) pairs of ints, got {shape!r} among them')
        flat.extend(shape)
    if not flat or min(flat) < 1:
        raise ValueError(
            f'spatial_shapes must name at least one level, each of at least one pixel, got {spatial_shapes!r}'
        )
    return flat


def _check(value, shapes, sampling_locations, attention_weights):
    """Raises ValueError or TypeError for arguments that do not fit; the kernels' own checks are only a last guard."""
    others = (('sampling_locations', sampling_locations), ('attention_weights', attention_weights))
    for name, tensor in (('value', value), *others):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(tensor).__name__}')
    if value.dtype not in _DTYPES:
        raise TypeError(f'value must be float64, float32, float16 or bfloat16, got {value.dtype}')
    half = value.dtype in (torch.float16, torch.bfloat16)
    for name, tensor in others:
        if tensor.dtype != value.dtype and not (half and tensor.dtype == torch.float32):
            raise TypeError(
                f"{name} must have value's dtype {value.dtype}{' or float32' if half else ''}, got {tensor.dtype}"
            )
        if tensor.device != value.device:
            raise ValueError(f"{name} must be on value's device {value.device}, got {tensor.device}")
    if value.ndim != 4:
        raise ValueError(f'value must have 4 dimensions (N, S, heads, channels), got shape {tuple(value.shape)}')
    n, pixels, heads, channels = value.shape
    if heads < 1 or channels < 1:
        raise ValueError(f'value must have at least one head and channel, got shape {tuple(value.shape)}')
    sizes = list(zip(shapes[::2], shapes[1::2], strict=True))
    if sum(height * width for height, width in sizes) != pixels:
        raise ValueError(f'value must have the pixels of all levels {sizes} in its second dimension, got {pixels}')
    if sampling_locations.ndim != 6:
        raise ValueError(
            f'sampling_locations must have 6 dimensions (N, queries, heads, levels, points, 2), got shape '
            f'{tuple(sampling_locations.shape)}'
        )
    _, queries, _, _, points, _ = sampling_locations.shape
    shape = (n, queries, heads, len(sizes), points, 2)
    if tuple(sampling_locations.shape) != shape:
        raise ValueError(
            f'sampling_locations must have shape {shape} for a value of shape {tuple(value.shape)} and {len(sizes)} '
            f'level(s), got {tuple(sampling_locations.shape)}'
        )
    if points < 1:
        raise ValueError(f'sampling_locations must have at least one point, got shape {shape}')
    if tuple(attention_weights.shape) != shape[:-1]:
        raise ValueError(
            f'attention_weights must have shape {shape[:-1]} beside sampling_locations of shape {shape}, got '
            f'{tuple(attention_weights.shape)}'
        )


def _fake(value, sampling_locations, attention_weights, spatial_shapes):
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


register('deform_attn', tensors=3, fake=_fake)
