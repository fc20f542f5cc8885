"""Arguments that say where a layer's windows lie, checked and in one form."""


def pair(name: str, size: int | tuple[int, int], least: int) -> tuple[int, int]:
    """A size as (height, width).

    Raises:
        TypeError: The size is neither an int nor a pair of ints.
        ValueError: It is below `least`.
    """
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(type(number) is int for number in sizes):
        raise TypeError(f'{name} must be an int or a (height, width) pair of ints, got {size!r}')
    if min(sizes) < least:
        raise ValueError(f'{name} must be at least {least}, got {size!r}')
    return sizes[0], sizes[1]


def check_positive(**numbers: int) -> None:
    """Raises ValueError for the first argument that is not a positive int."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f'{name} must be a positive int, got {number!r}')


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
