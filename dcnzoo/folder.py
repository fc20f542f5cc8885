"""A model as a folder: config.json in timm's form, model.safetensors and README.md, the model card.

timm loads such a folder as 'local-dir:FOLDER' and, pushed to the Hugging Face Hub, as 'hf-hub:ORG/NAME'; transformers
loads it through its TimmWrapper. Training leaves one, `dcnzoo convert` and `dcnzoo pull` make them, `dcnzoo push`
takes them. Weights without a classifier, from a detector for instance, make the folder of a backbone: its config.json
asks for `features_only`.
"""

import copy
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models._hub import save_config_for_hf
from torch import nn

CONFIG, WEIGHTS, CARD = 'config.json', 'model.safetensors', 'README.md'

Shapes = dict[str, tuple[int, ...]]


class WeightsError(RuntimeError):
    """Weights cannot be had, are damaged, or do not fit; the text is one line for people.

    Attributes:
        details: Further lines, such as the keys that differ.
    """

    def __init__(self, message: str, details: list[str] | None = None):
        super().__init__(message)
        self.details = details or []


def require_free(path: str | Path) -> None:
    """Makes sure that a folder can be made, or is empty.

    Raises:
        WeightsError: There is something.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise WeightsError(f'{path} is there already; name another folder or remove it')


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block has ended without an error.

    Raises:
        WeightsError: There is something of that name already, or it cannot be written; then nothing is left.
    """
    require_free(path)
    path = Path(path).absolute()
    prefix = f'.{path.name}.{platform.node()}.'
    draft = path.with_name(f'{prefix}{os.getpid()}.draft')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_drafts(path.parent, prefix)
        draft.mkdir()
        yield draft
        for file in draft.iterdir():
            with open(file, 'rb') as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rmdir()
        os.rename(draft, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise WeightsError(f'cannot write {path}: {reason}; nothing was written') from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_drafts(folder: Path, prefix: str) -> None:
    """Removes what processes of this machine left that were killed while they filled a folder."""
    for draft in folder.iterdir():
        found = re.fullmatch(rf'{re.escape(prefix)}(\d+)\.draft', draft.name)
        if found and (int(found[1]) == os.getpid() or not _runs(int(found[1]))):
            shutil.rmtree(draft, ignore_errors=True)


def _runs(pid: int) -> bool:
    if os.name == 'nt':  # there `os.kill` ends it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_config(
    folder: Path,
    model: nn.Module,
    *,
    backbone: bool = False,
    label_names: list[str] | None = None,
    label_descriptions: dict[str, str] | None = None,
    pretrained_cfg: dict | None = None,
) -> None:
    """Writes config.json for a model, which may be on the meta device.

    Args:
        folder: Where.
        model: Made by `timm.create_model`.
        backbone: The weights are those of a backbone.
        label_names: Names of the classes in order.
        label_descriptions: What people call them, by name.
        pretrained_cfg: Entries of timm's description of the weights that differ from the model's; None removes one.
    """
    path = folder / CONFIG
    labels = {'label_names': label_names, 'label_descriptions': label_descriptions}
    save_config_for_hf(model, str(path), model_config={'pretrained_cfg': pretrained_cfg or {}, **labels})
    config = json.loads(path.read_text(encoding='utf-8'))
    config['pretrained_cfg'] = {key: value for key, value in config['pretrained_cfg'].items() if value is not None}
    # transformers gives create_model the number of classes and model_args: it must not be in both. Images' channels it
    # knows from model_args alone.
    model_args = config.pop('model_args', {})
    model_args.pop('num_classes', None)
    if model_args.get('in_chans') == 3:
        del model_args['in_chans']
    if backbone:
        model_args = {**model_args, 'features_only': True}
        model_args.pop('global_pool', None)
        for entry in (config, config['pretrained_cfg']):  # without a number timm does not expect a classifier's weights
            entry.pop('num_classes', None)
            entry.pop('global_pool', None)
    if model_args:
        config['model_args'] = model_args
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def read_config(folder: Path) -> dict:
    """The content of config.json.

    Raises:
        WeightsError: There is none, or it is not timm's.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise WeightsError(f'{folder} has no {CONFIG}') from None
    except (OSError, ValueError) as error:
        raise WeightsError(f'{path} cannot be read: {error}') from error
    if not isinstance(config, dict) or 'architecture' not in config:
        raise WeightsError(f"{path} is not timm's: it names no architecture")
    return config


def is_backbone(config: dict) -> bool:
    """Whether a config.json is that of a backbone."""
    return bool((config.get('model_args') or {}).get('features_only'))


def build(folder: Path) -> nn.Module:
    """Builds the whole model of a folder on the meta device, without weights.

    Raises:
        WeightsError: config.json is missing or damaged, or timm cannot make the model.
    """
    read_config(folder)
    try:
        with torch.device('meta'):
            return timm.create_model(f'local-dir:{folder}', features_only=False).eval()
    except Exception as error:  # a constructor of others: each fails in its own way
        raise WeightsError(f'{folder / CONFIG} makes no model: {error}') from error


def prune(model: nn.Module) -> nn.Module:
    """What a backbone needs of a model on the meta device: a copy without classifier."""
    pruned = copy.deepcopy(model)
    pruned.prune_intermediate_layers(len(model.feature_info), prune_norm=True, prune_head=True)
    return pruned


def shapes(state_dict: dict[str, torch.Tensor]) -> Shapes:
    """The shapes of tensors by key."""
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def differences(found: Shapes, expected: Shapes, limit: int = 10) -> list[str]:
    """Lines that say which keys are missing, unexpected or of another shape; none if all is as expected.

    Args:
        found: Of weights.
        expected: Of a model.
        limit: Keys listed of each kind.
    """
    kinds = {
        'missing': [f'{key} {expected[key]}' for key in expected if key not in found],
        'unexpected': [f'{key} {found[key]}' for key in found if key not in expected],
        'of another shape': [
            f'{key} {found[key]}, expected {expected[key]}'
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    lines = []
    for kind, keys in kinds.items():
        if keys:
            lines.append(f'{len(keys)} {kind}:')
            lines += [f'  {key}' for key in keys[:limit]]
            if len(keys) > limit:
                lines.append(f'  ... and {len(keys) - limit} more')
    return lines


def check(folder: Path) -> nn.Module:
    """Makes sure that a folder is complete and that its weights fit, reading no more of them than their header.

    Returns:
        The model, on the meta device and without weights.

    Raises:
        WeightsError: It is not.
    """
    model = build(folder)
    path = folder / WEIGHTS
    try:
        with safe_open(path, 'pt') as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise WeightsError(f'{folder} has no {WEIGHTS}') from None
    except (OSError, SafetensorError) as error:
        raise WeightsError(f'{path} is damaged: {error}') from error
    needed = prune(model) if is_backbone(read_config(folder)) else model
    lines = differences(found, shapes(needed.state_dict()))
    if lines:
        raise WeightsError(f'{path} does not fit {read_config(folder)["architecture"]}', lines)
    return model
