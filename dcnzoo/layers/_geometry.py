"""Arguments and inputs of the layers, checked and in one form."""

import math

import torch
from torch import Tensor


def sizes(name: str, size: int | tuple[int, ...], least: int, dims: int) -> tuple[int, ...]:
    """A size per dimension, from one int for all or from a sequence.

    Raises:
        TypeError: The size is neither an int nor a sequence of `dims` ints.
        ValueError: It is below `least`.
    """
    numbers = (size,) * dims if isinstance(size, int) else size
    if not isinstance(numbers, (tuple, list)) or len(numbers) != dims or not all(type(n) is int for n in numbers):
        several = 'a (height, width) pair of ints' if dims == 2 else f'a sequence of {dims}'
        raise TypeError(f'{name} must be an int or {several}, got {size!r}')
    if min(numbers) < least:
        raise ValueError(f'{name} must be at least {least}, got {size!r}')
    return tuple(numbers)


def pair(name: str, size: int | tuple[int, int], least: int) -> tuple[int, int]:
    """A size as (height, width), checked as by `sizes`."""
    height, width = sizes(name, size, least, 2)
    return height, width


def check_positive(**numbers: int) -> None:
    """Raises ValueError for the first argument that is not a positive int."""
    for name, number in numbers.items():
        if type(number) is not int or number < 1:
            raise ValueError(f'{name} must be a positive int, got {number!r}')


def check_scale(offset_scale: float) -> float:
    """The factor on offsets and grid as a float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite.
    """
    if isinstance(offset_scale, bool) or not isinstance(offset_scale, (int, float)):
        raise TypeError(f'offset_scale must be a number, got {offset_scale!r}')
    if not math.isfinite(offset_scale):
        raise ValueError(f'offset_scale must be finite, got {offset_scale!r}')
    return float(offset_scale)


def conv_padding(
    padding: int | tuple[int, int] | str,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padding argument of `torch.nn.Conv2d` as rows and columns on all sides, and more at bottom and right.

    Raises:
        TypeError: The padding is neither an int, a pair of ints nor a string.
        ValueError: It is negative or another string, or 'same' beside a stride.
    """
    if padding == 'valid':
        return (0, 0), (0, 0)
    if padding == 'same':
        if stride != (1, 1):
            raise ValueError(f"padding 'same' needs stride 1, got stride {stride}")
        spans = [distance * (size - 1) for distance, size in zip(dilation, kernel_size, strict=True)]
        return (spans[0] // 2, spans[1] // 2), (spans[0] % 2, spans[1] % 2)
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, a pair of ints, 'same' or 'valid', got {padding!r}")
    return pair('padding', padding, 0), (0, 0)


def check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    """Raises ValueError where the groups of a convolution do not divide its channels."""
    if in_channels % groups != 0 or out_channels % groups != 0:
        raise ValueError(f'groups must divide in_channels {in_channels} and out_channels {out_channels}, got {groups}')


def check_map(x: Tensor, layout: str, channels: int) -> None:
    """Raises ValueError for an input of another layout, such as 'N, H, W, C', or of another number of channels."""
    axes = layout.split(', ')
    # A trace knows no sizes to check.
    if not torch.jit.is_tracing() and (x.dim() != len(axes) or x.shape[axes.index('C')] != channels):
        raise ValueError(f'x must have shape ({layout.replace("C", str(channels))}), got {list(x.shape)}')
