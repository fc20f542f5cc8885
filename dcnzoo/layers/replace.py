"""Deformable layers in place of a model's convolutions."""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ._aggregation import DeformableAggregation
from .dcnv4 import DCNv4Conv2d
from .deform_conv import DeformConv2d

OWN_LAYERS = (DeformableAggregation, DCNv4Conv2d, DeformConv2d)


@dataclass(frozen=True)
class ConvReplacement:
    """One convolution that was replaced.

    Attributes:
        name: Its name in the model.
        before: The convolution, as `repr` shows it.
        after: The class of the layer in its place.
        params_before: Number of the convolution's parameters.
        params_after: Number of the layer's.
    """

    name: str
    before: str
    after: str
    params_before: int
    params_after: int


@dataclass(frozen=True)
class ReplaceReport:
    """What `replace_conv` did.

    Attributes:
        replaced: The convolutions that were replaced.
        kept: The names of the others, each with the reason.
    """

    replaced: tuple[ConvReplacement, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f'{entry.name}: {entry.before} -> {entry.after}, '
            f'{entry.params_before:,} -> {entry.params_after:,} parameters'
            for entry in self.replaced
        ]
        lines += [f'{name}: kept, {reason}' for name, reason in self.kept.items()]
        before, after = (
            sum(getattr(entry, name) for entry in self.replaced) for name in ('params_before', 'params_after')
        )
        total = f'{len(self.replaced)} replaced ({before:,} -> {after:,} parameters), {len(self.kept)} kept'
        return '\n'.join([*lines, total])


def replace_conv(
    model: nn.Module,
    where: str | Sequence[str] | Callable[[str, nn.Conv2d], bool] | None = None,
    layer: Callable[..., nn.Module] = DCNv4Conv2d,
    **kwargs,
) -> ReplaceReport:
    """Replaces convolutions of a model, in place, by deformable layers of the same channels, window and stride.

    Parameters of the same name and shape are taken over, frozen ones stay frozen: a `DeformConv2d` goes on with the
    weights of the convolution, while a `DCNv4Conv2d` has others and has to be trained.

    Args:
        model: The model.
        where: Which convolutions. By default all that look at more than one pixel and read more than 4 channels, for
            images have little to predict offsets from; a pattern such as 'layer4.*' or several narrow that down. A
            convolution's own name, or a function of name and convolution that returns True, takes any other too.
        layer: Makes the layer from the arguments of `torch.nn.Conv2d`.
        kwargs: Further arguments for it.

    Returns:
        A report of what was replaced and what was not, for which reason; `print` shows it as text.

    Raises:
        TypeError: The model is itself a convolution or no module, or `where` is neither patterns nor a function.
        ValueError: A pattern fits none of the convolutions, or the layer does not take the arguments of one. The model
            is as before.
    """
    if not isinstance(model, nn.Module) or isinstance(model, nn.Conv2d):
        raise TypeError(f'model must be a module that contains the convolutions to replace, got {type(model).__name__}')
    patterns = [where] if isinstance(where, str) else where
    found = list(_convolutions(model))
    if patterns is not None and not callable(patterns):
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f'where must be a pattern, several, or a function of name and convolution, got {where!r}')
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, *_ in found):
                raise ValueError(f'where: no convolution of the model is named {pattern!r}')

    kept, replaced, layers = {}, [], {}
    for name, _, _, conv in found:
        reason = _reason_to_keep(name, conv, patterns)
        if reason is not None:
            kept[name] = reason
            continue
        if conv not in layers:
            layers[conv] = _make(name, conv, layer, kwargs)
        sizes = (sum(parameter.numel() for parameter in module.parameters()) for module in (conv, layers[conv]))
        replaced.append(ConvReplacement(name, repr(conv), type(layers[conv]).__name__, *sizes))
    names = {entry.name for entry in replaced}
    for name, parent, attribute, conv in found:
        if name in names:
            setattr(parent, attribute, layers[conv])
    return ReplaceReport(tuple(replaced), kept)


def _convolutions(module: nn.Module, prefix: str = '') -> Iterator[tuple[str, nn.Module, str, nn.Conv2d]]:
    """Name, parent, attribute and module of the convolutions outside of deformable layers."""
    for attribute, child in module._modules.items():
        if isinstance(child, nn.Conv2d):
            yield prefix + attribute, module, attribute, child
        elif child is not None and not isinstance(child, OWN_LAYERS):
            yield from _convolutions(child, f'{prefix}{attribute}.')


def _reason_to_keep(
    name: str, conv: nn.Conv2d, where: Sequence[str] | Callable[[str, nn.Conv2d], bool] | None
) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f'a {type(conv).__name__} may compute something else'
    if conv.padding_mode != 'zeros':
        return f'padding_mode is {conv.padding_mode!r}'
    if conv._forward_pre_hooks or conv._forward_hooks:
        return 'it has hooks'  # those of torch.nn.utils.weight_norm, for instance
    left_out = 'left out by `where`'
    if callable(where):
        return None if where(name, conv) else left_out
    if where is not None:
        if name in where:
            return None
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in where):
            return left_out
    if max(conv.kernel_size) == 1:
        return 'it looks at single pixels'
    return f'it reads {conv.in_channels} channels only' if conv.in_channels <= 4 else None


def _make(name: str, conv: nn.Conv2d, layer: Callable[..., nn.Module], kwargs: dict) -> nn.Module:
    try:
        module = layer(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
            **kwargs,
        )
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error
    own = dict(module.named_parameters())
    with torch.no_grad():
        for key, parameter in conv.named_parameters():
            if key in own and own[key].shape == parameter.shape:
                own[key].copy_(parameter).requires_grad_(parameter.requires_grad)
    return module.train(conv.training)
