"""Checkpoints as others leave them: finding them, by file, URL or repository, and reading what is in them.

Nothing is unpickled but tensors and plain containers, and tensors are mapped into memory, not read.
"""

import argparse
import contextlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.models._hub import hf_split
from torch import Tensor

from . import hub
from .folder import CONFIG, WEIGHTS, WeightsError

PREFERRED = (WEIGHTS, f'{WEIGHTS}.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.pth.tar')
WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')  # averaged weights first, as timm does


def locate(source: str) -> tuple[Path, str]:
    """Finds a checkpoint, and fetches it where it is not on this machine.

    Args:
        source: A file or folder; a URL; or 'hf-hub:ORG/NAME', perhaps with '@REVISION', perhaps with '/FILE'.

    Returns:
        The file, or the index of one in shards, which then lie beside it; and a name for it that tells no secret.

    Raises:
        WeightsError: There is no checkpoint, or there are several.
        HfHubHTTPError, LocalEntryNotFoundError, OSError: As `dcnzoo.hub.fetch` raises them.
    """
    if source.startswith(('http://', 'https://')):
        return _locate_url(source)
    if source.startswith(('hf-hub:', 'hf_hub:')):
        org, _, rest = source[len('hf-hub:') :].partition('/')
        repo, _, filename = rest.partition('/')
        if not repo:
            raise WeightsError(f'{source} names no repository, expected hf-hub:ORG/NAME')
        return _locate_in_hub(*hf_split(f'{org}/{repo}'), filename)
    path = Path(source.removeprefix('local-dir:')).expanduser()
    if path.is_dir() and source:
        path /= _choose([file.name for file in path.iterdir()], source)
    if not path.is_file():
        raise WeightsError(f'there is no file {path}')
    return path, path.name


def _locate_url(url: str) -> tuple[Path, str]:
    endpoint = huggingface_hub.constants.ENDPOINT + '/'
    for kind in ('/resolve/', '/blob/'):
        repo_id, found, rest = url.removeprefix(endpoint).partition(kind)
        if url.startswith(endpoint) and found:
            revision, _, filename = urlsplit(rest).path.partition('/')
            return _locate_in_hub(repo_id, revision, filename)
    return hub.fetch_url(url), hub.redact(url)


def _locate_in_hub(repo_id: str, revision: str | None, filename: str) -> tuple[Path, str]:
    if not filename:
        filename = _choose(huggingface_hub.list_repo_files(repo_id, revision=revision), repo_id)
    path = hub.fetch(repo_id, filename, revision)
    folder, commit = filename[: filename.rfind('/') + 1], hub.commit_of(path)
    for shard in _shards(path):
        hub.fetch(repo_id, folder + shard, commit)
    with contextlib.suppress(EntryNotFoundError):
        hub.fetch(repo_id, folder + CONFIG, commit)  # which `saved_config` reads
    return path, f'{repo_id}/{filename}@{commit}'


def _choose(names: Sequence[str], where: str) -> str:
    for name in PREFERRED:
        if name in names:
            return name
    found = sorted(name for name in names if name.endswith(SUFFIXES))
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(f'{where} holds several checkpoints; name one of them, {where}/FILE: {", ".join(found)}')
    raise WeightsError(f'there is no checkpoint in {where} (looked for {", ".join(SUFFIXES)})')


def _shards(path: Path) -> dict[str, list[str]]:
    """The keys in each file of a checkpoint in shards, by file; nothing for one that is not an index."""
    if not path.name.endswith('.index.json'):
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding='utf-8'))['weight_map']
        shards: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            shards.setdefault(name, []).append(key)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f'{path} is no index of a checkpoint in shards: {error!r}') from error
    for name in shards:
        if Path(name).name != name:
            raise WeightsError(f'{path} names a file outside its folder: {name!r}')
    return shards


def files(path: Path) -> list[Path]:
    """The files that a checkpoint is made of: itself, or its shards.

    Raises:
        WeightsError: A shard is missing, or the index is damaged.
    """
    found = [path.with_name(name) for name in sorted(_shards(path))] or [path]
    for file in found:
        if not file.is_file():
            raise WeightsError(f'there is no file {file}')
    return found


def saved_config(path: Path) -> dict:
    """The config.json in timm's form beside a checkpoint, or nothing."""
    try:
        config = json.loads((path.parent / CONFIG).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and 'architecture' in config else {}


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads a checkpoint, its tensors mapped into memory.

    Args:
        path: A safetensors file, a pickle of torch, or the index of either in shards.

    Returns:
        The tensors by key, without what wraps of models add to the keys; and the entry of the checkpoint that held
        them, '' where it holds nothing else.

    Raises:
        WeightsError: It is damaged, holds no tensors, or asks to run code.
    """
    shards = _shards(path)
    if not shards:
        return _unwrap(_read_file(path), path)
    weights = {}
    for name, keys in shards.items():
        shard = path.with_name(name)
        content, _ = _unwrap(_read_file(shard), shard)
        lacking = [key for key in keys if key not in content]
        if lacking:
            raise WeightsError(f'{shard} lacks {lacking[0]}, which {path.name} says it has')
        weights |= {key: content[key] for key in keys}
    return weights, ''


def _read_file(path: Path) -> dict:
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        # a run of timm's own trainer leaves its settings, a Namespace, in the checkpoint
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged file fails in any way
        unsafe = _unsafe_globals(path)
        if unsafe:
            raise WeightsError(
                f'{path} is refused: beside tensors it holds objects, and reading those could run any code: {unsafe}'
            ) from error
        # PyTorch's own words, but not its advice to read the file without safety
        reason = str(error).rpartition('WeightsUnpickler error:')[2].partition('Check the documentation')[0]
        reason = ' '.join(reason.split())[:200] or type(error).__name__
        raise WeightsError(f'{path} is damaged, or no checkpoint: {reason}') from error


def _unsafe_globals(path: Path) -> str:
    try:
        return ', '.join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # what is no pickle has none
        return ''


def _unwrap(checkpoint: object, path: Path) -> tuple[dict[str, Tensor], str]:
    wrapper = ''
    if isinstance(checkpoint, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(checkpoint.get(key), dict)), '')
        checkpoint = checkpoint[wrapper] if wrapper else checkpoint
    if isinstance(checkpoint, dict):
        weights = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
        if weights:
            return clean_state_dict(weights), wrapper
    raise WeightsError(f'{path} holds no tensors by key')
