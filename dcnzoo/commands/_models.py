"""Models as commands name them, and what goes with their weights: preparation of images and names of classes."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

from ..folder import WeightsError
from ..hub import explain, fetch_config, redact
from ._errors import CommandError

_SCHEMES = ('hf-hub:', 'hf_hub:', 'local-dir:')


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', help='cpu, cuda, cuda:1, mps ...; by default the accelerator if there is one')


def resolve_device(name: str | None) -> torch.device:
    """The device a user named, checked by putting something on it; by default the accelerator, else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise CommandError(f'--device {name} cannot be used: {first_line(error)}') from error
    return device


def load_model(name: str, pretrained: bool = True, **kwargs) -> nn.Module:
    """Creates a model in evaluation mode.

    Args:
        name: A name of timm's registry, with a tag or without; a folder that training left, also as 'local-dir:DIR'; or
            'hf-hub:ORG/NAME'.
        pretrained: Load weights.
        kwargs: For `timm.create_model`.

    Raises:
        CommandError: There is no such model, it has no weights, or they cannot be fetched or do not fit.
    """
    name = _with_scheme(name)
    elsewhere = name.startswith(_SCHEMES)
    if not elsewhere:
        check_registered(name)
        if pretrained and not has_weights(name):
            raise CommandError(
                f'there are no pretrained weights for {name}; name a folder that training left, such as runs/X/best'
            )
    if name.startswith('hf-hub:') or (pretrained and not elsewhere):
        print(f'loading {name} from the Hugging Face Hub or its cache', file=sys.stderr)
    try:
        scheme, _, repo_id = name.partition(':')
        if scheme in ('hf-hub', 'hf_hub'):  # before timm reads it
            fetch_config(repo_id)
        return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except Exception as error:  # whatever a hub client, a file or a state_dict that does not fit may raise
        what = 'load' if pretrained or elsewhere else 'build'
        raise CommandError(f'cannot {what} {name}: {first_line(error)}') from error


def has_weights(name: str) -> bool:
    """Whether weights can be loaded for a model named as for `load_model`."""
    if _with_scheme(name).startswith(_SCHEMES):
        return True
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.has_weights


def _with_scheme(name: str) -> str:
    """Names a folder as timm does; a registered model comes first, a folder of its name must be given as ./NAME."""
    if name.startswith(_SCHEMES) or timm.is_model(name):
        scheme, _, path = name.partition(':')
        if scheme == 'local-dir':
            _check_folder(Path(path))
        return name
    path = Path(name)
    if path.is_dir():
        _check_folder(path)
        return f'local-dir:{name}'
    if path.is_file():
        raise CommandError(f'--model {name} is a file; name the folder that holds it and its config.json')
    if len(path.parts) > 1 or name.startswith(('.', '~')):
        raise CommandError(f'there is no folder {name}; a model of the Hugging Face Hub is named hf-hub:{name}')
    return name


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CommandError(f'there is no folder {folder}')
    if not (folder / 'config.json').is_file():
        inner = next((path.parent for path in sorted(folder.glob('*/config.json'))), None)
        hint = f'; try {inner}' if inner else ''
        raise CommandError(f'{folder} is not the folder of a trained model, it has no config.json{hint}')


def check_registered(name: str) -> None:
    """Makes sure that there is a model of that name, and the tag if it has one."""
    architecture, _, tag = name.partition('.')
    if not timm.is_model(architecture):
        raise CommandError(f'there is no model {architecture!r}{nearest(architecture, timm.list_models())}')
    if tag:
        tagged = timm.list_models(f'{architecture}.*', include_tags=True)
        if name not in tagged:
            raise CommandError(f'{architecture} has no tag {tag!r}{nearest(name, tagged) or ", and no other"}')


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean a, b?' with the names most like one, or nothing."""
    close = difflib.get_close_matches(name.lower(), list(names), n=3, cutoff=0.5)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, at most 300 characters of it, and nothing secret."""
    if isinstance(error, (OSError, WeightsError)):
        return explain(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(':'):
        lines[0] += f' {lines[1]}'
    text = lines[0] if lines else type(error).__name__
    return redact(text if len(text) <= 300 else f'{text[:297]}...')


def image_transform(model: nn.Module) -> Callable:
    """The preparation that a model's weights ask for: from PIL images to tensors (C, H, W) of its channels."""
    config = resolve_model_data_config(model)
    channels = model.in_chans if hasattr(model, 'in_chans') else config['input_size'][0]
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    config['input_size'] = (channels, *config['input_size'][1:])
    return create_transform(**config, is_training=False)


def image_mode(model: nn.Module) -> str:
    """The PIL mode of images for a model."""
    channels = getattr(model, 'in_chans', 3)
    if channels not in (1, 3):
        raise CommandError(f'the model wants images of {channels} channels; files are read with 1 or 3')
    return {1: 'L', 3: 'RGB'}[channels]


def class_names(model: nn.Module) -> list[str]:
    """The names of a classifier's classes: from its weights' configuration, else ImageNet's where the number fits."""
    config = model.pretrained_cfg
    names = config.get('label_names')
    if isinstance(names, dict):
        names = [names.get(index, names.get(str(index), str(index))) for index in range(model.num_classes)]
    if names and len(names) == model.num_classes:
        descriptions = config.get('label_descriptions') or {}
        return [str(descriptions.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).label_descriptions()
    return [str(index) for index in range(model.num_classes)]
