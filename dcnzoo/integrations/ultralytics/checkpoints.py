"""Checkpoints of hand-patched copies of ultralytics, which name classes that exist nowhere else."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn import modules, tasks
from ultralytics.utils import DEFAULT_CFG_DICT

from .blocks import without_fetching
from .registration import BLOCKS, check_block

# ultralytics' models that can be rebuilt, and what they are for.
_TASKS = {
    'DetectionModel': 'detect',
    'SegmentationModel': 'segment',
    'ClassificationModel': 'classify',
    'PoseModel': 'pose',
    'OBBModel': 'obb',
}

# ultralytics evaluates this entry of a configuration as Python: nn.SiLU(), torch.nn.LeakyReLU(0.1) and their like.
_ACTIVATION = re.compile(r'(torch\.)?nn\.\w+\([\w\s.,=+-]*\)')


def adopt(path: str | Path, output: str | Path, rename: Mapping[str, str] | None = None) -> nn.Module:
    """Rebuilds the model of a checkpoint from its YAML and its tensors, and saves it as a checkpoint of today.

    No code of the file runs: tensors and plain values are all that is read, and what else the file names, classes of
    the patched files for instance, is replaced by something inert. Its YAML may name layers only.

    Args:
        path: The checkpoint, a whole model as ultralytics saves it.
        output: The new checkpoint, which `YOLO` loads; its folder must exist, the file must not.
        rename: Blocks by the names they have in the checkpoint's YAML, where they are others than ours.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: The file is no such checkpoint, has blocks that are unknown, or tensors that do not fit them.
        FileExistsError: There is a file at `output`.
    """
    if Path(output).exists():
        raise FileExistsError(f'output {output} exists')
    checkpoint = read(path)
    saved = (checkpoint.get(key) for key in ('ema', 'model'))
    source = next((model for model in saved if isinstance(model, (Inert, nn.Module))), None)
    state = vars(source) if source is not None else {}
    if not isinstance(state.get('yaml'), dict) or '_modules' not in state:
        raise ValueError(f'{path} has no whole model with its YAML in it, as ultralytics saves one')
    kind = type(source).__name__.rpartition('.')[2]
    if kind not in _TASKS:
        raise ValueError(f'{path} has a {kind}, not one of {", ".join(_TASKS)}')

    try:
        config = _checked(state['yaml'], rename or {})
        tensors = dict(_tensors(source))
        model = getattr(tasks, kind)(config, ch=config.get('channels', 3), verbose=False)
        names = {int(index): str(name) for index, name in dict(state.get('names') or model.names).items()}
    except Exception as error:  # whatever a file out of unknown hands may hold
        reason = error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'
        raise ValueError(f'{path} has a model that cannot be rebuilt: {reason}') from error
    _load(model, tensors, path)
    given = checkpoint.get('train_args')
    given = given if isinstance(given, dict) else {}
    model.task, model.names = _TASKS[kind], names
    model.args = {key: value for key, value in given.items() if key in DEFAULT_CFG_DICT and _plain(value)}
    model.args['task'] = model.task
    part = Path(f'{output}.{os.getpid()}')
    torch.save({'epoch': -1, 'model': model.half(), 'ema': None, 'train_args': model.args}, part)
    part.replace(output)
    return model.float().eval()


def read(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's tensors and plain values; in place of all else there are objects that only keep its state.

    Raises:
        ValueError: The file is not torch's, damaged, or names what is refused even so (modules `os` and `sys`).
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(type(name, (Inert,), {}), name) for name in named]):
            content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except (ValueError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f'{path} cannot be read as a checkpoint: {str(error).strip().splitlines()[0]}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} has a {type(content).__name__} in it, not the mapping that ultralytics saves')
    return content


class Inert:
    """Stands for a class or function that a checkpoint names: takes any arguments and state, does nothing with them."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _plain(value: Any) -> bool:
    """Whether a value is made of nothing but Python's own numbers, texts and lists."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _tensors(module: Inert | nn.Module, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """The state_dict of a module, whatever is left of its class."""
    state = vars(module)
    skipped = state.get('_non_persistent_buffers_set', ())
    for name, tensor in {**state['_parameters'], **state['_buffers']}.items():
        if tensor is not None and name not in skipped:
            yield prefix + name, tensor
    for name, child in state['_modules'].items():
        if child is not None:
            yield from _tensors(child, f'{prefix}{name}.')


def _checked(config: Mapping, names: Mapping[str, str]) -> dict:
    """A configuration of layers and nothing else, with blocks renamed and with its own scale only."""
    config = {**config}
    activation = config.get('activation')
    if activation is not None and not _ACTIVATION.fullmatch(activation):
        raise ValueError(f'its activation must be a call such as nn.SiLU(), got {activation!r}')
    for section in ('backbone', 'head'):
        config[section] = [
            [source, repeats, _checked_name(names.get(name, name)), args]
            for source, repeats, name, args in config[section]
        ]
    if config.get('scale') in config.get('scales', {}):
        config['scales'] = {config['scale']: config['scales'][config['scale']]}
    return without_fetching(config)


def _checked_name(name: str) -> str:
    check_block(name)
    if not (name in BLOCKS or hasattr(modules, name) or name.startswith(('nn.', 'torchvision.ops.'))):
        raise ValueError(f'{name} is no layer')  # of what else ultralytics resolves, who knows what it does
    return name


def _load(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Loads all tensors, or raises with the first that do not fit."""
    total = len(tensors)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(f'{path}: {len(lines) - 1} of {total} tensors do not fit: {lines[1].strip()}') from error
    if missing or unexpected:
        first = ', '.join([*unexpected[:2], *missing[:2]])
        raise ValueError(
            f'{path}: {len(unexpected)} of {total} tensors have no place in the model, {len(missing)} of its own are '
            f'missing; the first: {first}'
        )
