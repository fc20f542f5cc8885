"""Checkpoints of hand-patched copies of ultralytics, which name classes that exist nowhere else."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG_DICT

_MODELS = {
    'detect': 'DetectionModel',
    'segment': 'SegmentationModel',
    'classify': 'ClassificationModel',
    'pose': 'PoseModel',
    'obb': 'OBBModel',
}


def adopt(path: str | Path, output: str | Path, rename: Mapping[str, str] | None = None) -> nn.Module:
    """Rebuilds the model of a checkpoint from its YAML and its tensors, and saves it as a checkpoint of today.

    No code of the file runs: tensors and plain values are all that is read, and what else the file names, classes of
    the patched files for instance, is replaced by something inert.

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
    source = checkpoint.get('ema') or checkpoint.get('model')
    state = vars(source) if isinstance(source, (Inert, nn.Module)) else {}
    if not isinstance(state.get('yaml'), dict) or '_modules' not in state:
        raise ValueError(f'{path} has no whole model with its YAML in it, as ultralytics saves one')
    config = _renamed(state['yaml'], rename or {})
    task = tasks.guess_model_task(config)
    if task not in _MODELS:
        raise ValueError(f'{path} is a model for {task!r}; there are {", ".join(_MODELS)}')

    model = getattr(tasks, _MODELS[task])(config, ch=config.get('channels', 3), verbose=False)
    _load(model, dict(_tensors(source)), path)
    model.task = task
    model.names = dict(state.get('names') or model.names)
    given = checkpoint.get('train_args')
    arguments = {key: value for key, value in (given or {}).items() if key in DEFAULT_CFG_DICT and not _inert(value)}
    model.args = {**arguments, 'task': task}
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


def _inert(value: Any) -> bool:
    return isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert))


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


def _renamed(config: Mapping, names: Mapping[str, str]) -> dict:
    """A configuration with blocks renamed and with its own scale only."""
    config = {**config}
    for section in ('backbone', 'head'):
        config[section] = [
            [source, repeats, names.get(name, name), args] for source, repeats, name, args in config[section]
        ]
    if config.get('scale') in config.get('scales', {}):
        config['scales'] = {config['scale']: config['scales'][config['scale']]}
    return config


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
