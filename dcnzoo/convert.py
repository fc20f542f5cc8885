"""From a checkpoint of any origin to a model's folder.

A model's own `checkpoint_filter_fn` renames the keys. Tensors stay mapped into memory and are streamed to the new file:
whatever a checkpoint's size, it takes little more memory than that.
"""

import copy
import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._version import __version__
from .card import model_card
from .checkpoints import files, locate, read, saved_config
from .folder import (
    CARD,
    WEIGHTS,
    WeightsError,
    build,
    differences,
    new_folder,
    prune,
    require_free,
    shapes,
    write_config,
)
from .hub import SHA256, sha256

BACKBONE = 'backbone.'  # what mmdetection and mmsegmentation begin a backbone's keys with
LABELS = ('label_names', 'label_descriptions')
TOLERANCE = 1e-5  # of outputs, relative to the largest: the same weights may lie in memory otherwise aligned

Weights = dict[str, Tensor]
Filter = Callable[[Weights, nn.Module], Weights]


@dataclass
class Conversion:
    """What became of a checkpoint.

    Attributes:
        folder: The new folder.
        model: Its model, on the meta device; of a backbone without what the classifier needs.
        origin: Where the checkpoint came from: facts by name, its sha256 among them.
        backbone: The weights are those of a backbone.
        difference: Largest absolute difference between what source and result give.
        outputs: What the result gives: logits, or the maps of a backbone.
    """

    folder: Path
    model: nn.Module
    origin: dict[str, str]
    backbone: bool
    difference: float
    outputs: list[Tensor]


def convert(
    source: str,
    name: str,
    output: str | Path,
    *,
    classes: Sequence[str] | None = None,
    license: str | None = None,
    metrics: dict[str, str] | None = None,
    prepare: Callable[[nn.Module], Tensor] | None = None,
) -> Conversion:
    """Makes a model's folder of a checkpoint.

    Numbers of classes and of the image's channels are those of the weights. The checkpoint of a detector or a
    segmenter, whose keys begin with `backbone.`, gives a folder without classifier.

    Args:
        source: As `dcnzoo.checkpoints.locate` takes it.
        name: One of this package's models, with a tag or without.
        output: The new folder.
        classes: Names of the classes in order.
        license: Of the weights; that of published ones is known.
        metrics: Figures for the model card, which says that they are the caller's.
        prepare: Makes the images (N, C, H, W) with which source and result are compared, given the model; by default
            they are noise.

    Raises:
        WeightsError: The source is no checkpoint of the model, the result differs from it, or it cannot be written.
            Then nothing is written.
        HfHubHTTPError, LocalEntryNotFoundError, OSError: As `dcnzoo.hub.fetch` raises them.
    """
    require_free(output)
    architecture = name.partition('.')[0]
    remap = _filter_of(architecture)
    path, called = locate(source)
    digests = {file.name: sha256(file) for file in files(path)}
    tag, address = _published_as(name, called, digests) or (None, None)
    config = saved_config(path)
    if config.get('architecture') != architecture:
        config = {}

    found, wrapper = read(path)
    backbone = any(key.startswith(BACKBONE) for key in found)
    if backbone:
        found = {key[len(BACKBONE) :]: value for key, value in found.items() if key.startswith(BACKBONE)}
    model, weights = _fit(tag or name, remap, found, config)
    needed = prune(model) if backbone else model
    lines = differences(shapes(weights), shapes(needed.state_dict()))
    if lines:
        hint = _suggestion(architecture, found, backbone)
        raise WeightsError(f'{called} is no checkpoint of {architecture}{hint}', lines)
    labels = _labels(classes, config, 0 if backbone else model.num_classes)
    _check_space(Path(output), sum(value.nbytes for value in weights.values()))

    generator = torch.Generator().manual_seed(0)
    images = prepare(model) if prepare else torch.randn(1, model.in_chans, 128, 128, generator=generator)
    expected = _run(needed, weights, images, backbone)
    if not all(tensor.isfinite().all() for tensor in expected):
        raise WeightsError(f'{called} gives outputs that are not finite')
    license = license or (model.pretrained_cfg.get('license') if tag else None)
    entries = {'license': license} if tag else {'license': license, 'tag': None, 'origin_url': None}
    origin = _origin(called, digests, tag, address)
    with new_folder(output) as draft:
        save_file({key: _own(value) for key, value in weights.items()}, draft / WEIGHTS, metadata={'format': 'pt'})
        del found, weights  # lets go of the checkpoint's memory
        write_config(draft, model, backbone=backbone, pretrained_cfg=entries, **labels)
        result = build(draft)
        outputs = _run(prune(result) if backbone else result, load_file(draft / WEIGHTS), images, backbone)
        difference = max((a - b).abs().max().item() for a, b in zip(expected, outputs, strict=True))
        if not difference <= TOLERANCE * max(tensor.abs().max().item() for tensor in expected):
            raise WeightsError(f'the outputs of {called} and of what was made of it differ by {difference:.3g}')
        made = f'by `dcnzoo convert`, version {__version__}' + (f", from the entry '{wrapper}'" if wrapper else '')
        card = model_card(
            Path(output).absolute().name,
            needed,
            backbone=backbone,
            license=license,
            made=f'{made}; the outputs of checkpoint and result differ by {difference:.1g}',
            origin=origin,
            metrics=metrics,
        )
        (draft / CARD).write_text(card, encoding='utf-8')
    return Conversion(Path(output), needed, origin, backbone, difference, outputs)


def _filter_of(architecture: str) -> Filter:
    """The function beside a model that renames the keys of published checkpoints."""
    if architecture not in _models():
        raise WeightsError(f'dcnzoo has no model {architecture!r}')
    return sys.modules[timm.model_entrypoint(architecture).__module__].checkpoint_filter_fn


def _models() -> list[str]:
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('dcnzoo.')]


def _published_as(name: str, called: str, digests: dict[str, str]) -> tuple[str, str] | None:
    """The tagged name of published weights and their address, told by the file's name and, where known, its sha256."""
    for tag in [name] if '.' in name else timm.list_pretrained(f'{name}.*'):
        for address in _addresses(tag):
            named = Path(called).name == Path(address).name != WEIGHTS
            if (named or called.partition('@')[0] == address) and SHA256.get(address) in (None, *digests.values()):
                return tag, address
    return None


def _addresses(tag: str) -> list[str]:
    """Where weights were published, 'ORG/NAME/FILE': what the tag stands for, and the pickle of the same name."""
    cfg = timm.get_pretrained_cfg(tag)
    if not cfg.hf_hub_id:
        return []
    repository = Path(cfg.hf_hub_id).name
    pickles = [address for address in SHA256 if Path(address).name == f'{repository}.pth']
    return [f'{cfg.hf_hub_id}/{cfg.hf_hub_filename or WEIGHTS}', *pickles]


def _origin(called: str, digests: dict[str, str], tag: str | None, address: str | None) -> dict[str, str]:
    origin = {'Checkpoint': called}
    for file, digest in digests.items():
        origin[f'sha256 of {file}'] = digest
    if tag:
        origin['Published as'] = address
        origin['sha256 of the published file'] = 'the same' if SHA256.get(address) else 'not known'
        origin['Publisher'] = timm.get_pretrained_cfg(tag).origin_url
    return origin


def _fit(name: str, remap: Filter, found: Weights, config: dict) -> tuple[nn.Module, Weights]:
    """The model on the meta device, with as many classes and channels as the weights have, and the weights renamed."""
    args = {key: value for key, value in (config.get('model_args') or {}).items() if key != 'features_only'}
    if config.get('pretrained_cfg'):
        args['pretrained_cfg'] = config['pretrained_cfg']

    def create(**kwargs) -> tuple[nn.Module, Weights]:
        with torch.device('meta'):
            model = timm.create_model(name, **args | kwargs).eval()
        try:
            return model, remap(dict(found), model)
        except (AttributeError, KeyError, IndexError, RuntimeError, ValueError):  # made for other checkpoints than this
            return model, found

    model, weights = create()
    classifier = f'{model.pretrained_cfg["classifier"]}.weight'
    # the kernels of a dynamic convolution lie flat, its routing tells the channels
    first = f'{model.pretrained_cfg["first_conv"]}.weight'.replace('cond_conv', 'routing')
    counts = {}
    if classifier in weights:
        counts['num_classes'] = weights[classifier].shape[0]
    if first in weights:
        counts['in_chans'] = found.get(first, weights[first]).shape[1]  # renaming may have fitted it to the model
    if all(getattr(model, key) == count for key, count in counts.items()):
        return model, weights
    return create(**counts)


def _labels(classes: Sequence[str] | None, config: dict, count: int) -> dict:
    """The names of the classes, as given or as saved beside the checkpoint."""
    labels = {'label_names': list(classes)} if classes else {key: config.get(key) for key in LABELS}
    given = len(labels['label_names'] or ())
    if given and given != count:
        raise WeightsError(f'{given} names of classes were given, the weights have {count or "no"} classes')
    return labels


def _suggestion(architecture: str, found: Weights, backbone: bool) -> str:
    """The model whose keys and shapes a checkpoint has, if there is one."""
    for name in _models():
        if name != architecture:
            model, weights = _fit(name, _filter_of(name), found, {})
            needed = prune(model) if backbone else model
            if shapes(weights) == shapes(needed.state_dict()):
                return f'; its keys and shapes are those of {name}'
    return ''


def _check_space(output: Path, needed: int) -> None:
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(f'{folder} has {free / 1e6:,.0f} MB left, {needed / 1e6:,.0f} MB are needed')


@torch.inference_mode()
def _run(model: nn.Module, weights: Weights, images: Tensor, backbone: bool) -> list[Tensor]:
    """What a model on the meta device gives with weights, which it takes as they lie in memory."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights, assign=True)
    dtypes = [value.dtype for value in weights.values() if value.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, dtypes)
    model, images = model.to(dtype), images.to(dtype)
    return model.forward_intermediates(images, intermediates_only=True) if backbone else [model(images)]


def _own(value: Tensor) -> Tensor:
    """A tensor that is all of its memory, as safetensors wants it: itself where it is."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)
