"""Weights from the Hugging Face Hub and to it.

huggingface_hub does the work: it downloads, resumes, caches, locks and replaces files atomically. What it does not do
is look at what it got or finds in its cache: a file of the right size is good enough for it. `fetch` does, and all
that this package loads from a Hub goes through it, `timm.create_model(..., pretrained=True)` included. `fetch_url` is
its counterpart for other servers.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import HFValidationError, WeakFileLock, get_token
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from timm.models._builder import _resolve_pretrained_source
from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, get_cache_dir, hf_split
from timm.models._pretrained import PretrainedCfg

from ._version import __version__
from .card import card_in_repository
from .folder import CARD, CONFIG, WEIGHTS, WeightsError, check, new_folder

# sha256 of the published files, 'ORG/NAME/FILE'; None where it is not known.
SHA256: dict[str, str | None] = {
    'OpenGVLab/DCNv4/flash_intern_image_t_1k_224.pth': None,
    'OpenGVLab/DCNv4/flash_intern_image_s_1k_224.pth': None,
    'OpenGVLab/DCNv4/flash_intern_image_b_1k_224.pth': None,
    'OpenGVLab/DCNv4/flash_internimage_l_22kto1k_384.pth': None,
    'OpenGVLab/internimage_t_1k_224/model.safetensors': None,
    'OpenGVLab/internimage_s_1k_224/model.safetensors': None,
    'OpenGVLab/internimage_b_1k_224/model.safetensors': None,
    'OpenGVLab/internimage_l_22kto1k_384/model.safetensors': None,
    'OpenGVLab/internimage_xl_22kto1k_384/model.safetensors': None,
    'OpenGVLab/internimage_h_22kto1k_640/model.safetensors': None,
    'OpenGVLab/internimage_g_22kto1k_512/model.safetensors': None,
    'OpenGVLab/InternImage/internimage_t_1k_224.pth': None,
    'OpenGVLab/InternImage/internimage_s_1k_224.pth': None,
    'OpenGVLab/InternImage/internimage_b_1k_224.pth': None,
    'OpenGVLab/InternImage/internimage_l_22kto1k_384.pth': None,
    'OpenGVLab/InternImage/internimage_xl_22kto1k_384.pth': None,
    'OpenGVLab/InternImage/internimage_h_22kto1k_640.pth': None,
    'OpenGVLab/InternImage/internimage_g_22kto1k_512.pth': None,
    'OpenGVLab/InternImage/internimage_l_22k_192to384.pth': None,
    'OpenGVLab/InternImage/internimage_xl_22k_192to384.pth': None,
    'OpenGVLab/InternImage/internimage_h_jointto22k_384.pth': None,
    'OpenGVLab/InternImage/internimage_g_pretrainto22k_384.pth': None,
}

# The first digits of its sha256 in a file's name; eight decimal ones are a date.
DIGITS = re.compile(r'-(?!\d{8}\.)([0-9a-f]{8,64})\.')

_download = partial(huggingface_hub.hf_hub_download, library_name='dcnzoo', library_version=__version__)


def sha256(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex()


def fetch(repo_id: str, filename: str, revision: str | None = None, cache_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a file of the Hub, or finds it in the client's cache, and verifies its content.

    Content is compared with the sha256 in `SHA256` where that is known, and with what the Hub says: the sha256 of a
    large file, git's hash of another. What differs or was cut short is fetched again once.

    Args:
        repo_id: 'org/name'.
        filename: Path in the repository.
        revision: Branch, tag or commit; 'main' by default.
        cache_dir: The cache, by default the client's own.

    Returns:
        The file, in the cache.

    Raises:
        WeightsError: It was damaged both times, or is damaged and cannot be fetched again.
        HfHubHTTPError, LocalEntryNotFoundError, OSError: As huggingface_hub raises them.
    """
    return _twice(
        lambda again: Path(_download(repo_id, filename, revision=revision, cache_dir=cache_dir, force_download=again)),
        lambda path: _damage(path, repo_id, filename),
        f'{repo_id}/{filename}',
        Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE),
    )


def fetch_url(url: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a file of any web server into timm's cache, or finds it there.

    A body of another size than announced is fetched again once, and so is a file of another sha256 than its name says,
    where that has the first digits as is the custom with torch (`resnet50-0676ba61.pth`).

    Args:
        url: Its query is a part of what the file is known by in the cache, and is shown to nobody.
        cache_dir: The cache, by default timm's own.

    Returns:
        The file, in the cache.

    Raises:
        WeightsError: It was damaged both times, or the server cannot be reached or has no such file for us.
        OSError: It cannot be written.
    """
    folder = Path(cache_dir or get_cache_dir('dcnzoo')) / hashlib.sha256(url.encode()).hexdigest()[:16]
    target = folder / (Path(urlsplit(url).path).name or 'file')
    named = DIGITS.search(target.name)

    def download(again: bool) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / '.lock'):
            if again or not target.exists():
                _download_url(url, target)
        return target

    def damage(path: Path) -> str | None:
        actual = sha256(path)
        return f'its sha256 is {actual}' if named and not actual.startswith(named[1]) else None

    return _twice(download, damage, redact(url), folder)


def _download_url(url: str, target: Path) -> None:
    """Downloads a file, which takes its name when it is on the disk as a whole."""
    draft = target.with_name(f'{target.name}.incomplete')
    try:
        with open(draft, 'wb') as file, _redacted_logs():
            http_get(url, file, displayed_filename=target.name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except Exception as error:
        if type(error) is OSError:  # the disk is full, or the body was not of the size announced
            raise
        raise WeightsError(f'{redact(url)}: {explain(error, "the server")}') from None  # the client quotes the URL
    finally:
        draft.unlink(missing_ok=True)


def _twice(download: Callable[[bool], Path], damage: Callable[[Path], str | None], name: str, place: Path) -> Path:
    """Downloads and verifies, and once more if the content is not what it should be."""
    problem = ''
    for again in (False, True):
        try:
            path = download(again)
        except ValueError as error:  # so the client says that what has to be replaced cannot be
            if not again or isinstance(error, (HFValidationError, LocalEntryNotFoundError)):
                raise
            reason = explain(error.__cause__ or error)
            raise WeightsError(f'{name} is damaged ({problem}) and cannot be fetched again: {reason}') from error
        except OSError as error:
            if error.errno == errno.ENOSPC and error.filename is None:  # from a write: say where
                raise OSError(error.errno, error.strerror, str(place)) from error
            if type(error) is not OSError or error.errno is not None:
                raise
            problem = str(error).split(' (')[0]  # so the client says that a body was not of the size announced
        else:
            problem = damage(path)
            if problem is None:
                return path
            if again:
                _forget(path)
            elif not path.is_symlink():
                path.unlink()  # where the cache has no links, the client would leave it in its place
    raise WeightsError(f'{name} came damaged, twice: {problem}')


def _damage(path: Path, repo_id: str, filename: str) -> str | None:
    """What is wrong with the content of a cached file."""
    stated, published = _stated(path, repo_id, filename), SHA256.get(f'{repo_id}/{filename}')
    if re.fullmatch('[0-9a-f]{40}', stated):
        actual = git_hash(path.read_bytes())
        return None if actual == stated else f'its hash is {actual}, the Hub says {stated}'
    actual = sha256(path)
    if re.fullmatch('[0-9a-f]{64}', stated) and actual != stated:
        return f'its sha256 is {actual}, the Hub says {stated}'
    if published is not None and actual != published:
        return f'its sha256 is {actual}, that of the published file is {published}'
    return None


def _stated(path: Path, repo_id: str, filename: str) -> str:
    """The hash that the Hub says a cached file has, '' where it cannot be told."""
    if path.is_symlink():  # to where the cache keeps files by their hashes
        return os.path.basename(os.readlink(path))
    try:
        url = huggingface_hub.hf_hub_url(repo_id, filename, revision=commit_of(path))
        return huggingface_hub.get_hf_file_metadata(url).etag or ''
    except Exception:  # without a network, for instance
        return ''


def commit_of(path: Path) -> str:
    """The commit that a file in the client's cache is of, which its folder is named by."""
    parts = path.parts
    return parts[len(parts) - parts[::-1].index('snapshots')]


def _forget(path: Path) -> None:
    """Removes a file from the cache, lest others take it for a good one."""
    if path.is_symlink():
        (path.parent / os.readlink(path)).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def fetch_pretrained(pretrained_cfg: PretrainedCfg, cache_dir: str | os.PathLike | None = None) -> Path | None:
    """Fetches and verifies the file of weights that timm is about to load.

    Args:
        pretrained_cfg: timm's description of the weights.
        cache_dir: The cache, by default the client's own.

    Returns:
        The file, or None for weights that need not be fetched.

    Raises:
        As `fetch` and `fetch_url` do; and
        WeightsError: The config.json that timm has made the description of was damaged. It is fetched again.
    """
    source, location = _resolve_pretrained_source(pretrained_cfg.to_dict())
    if source == 'url':
        return fetch_url(location, cache_dir)
    if source != 'hf-hub':
        return None
    hub_id, filename = location if isinstance(location, tuple) else (location, HF_WEIGHTS_NAME)
    repo_id, revision = hf_split(hub_id)
    if pretrained_cfg.source == 'hf-hub':
        _verify_config(repo_id, revision, cache_dir)
    for candidate in _get_safe_alternatives(filename):
        try:
            return fetch(repo_id, candidate, revision, cache_dir)
        except EntryNotFoundError:
            continue
    return fetch(repo_id, filename, revision, cache_dir)


def fetch_config(hub_id: str) -> Path:
    """Fetches and verifies the config.json of a repository, 'org/name' or 'org/name@revision', as `fetch` does."""
    repo_id, revision = hf_split(hub_id)
    return fetch(repo_id, CONFIG, revision)


def _verify_config(repo_id: str, revision: str | None, cache_dir: str | os.PathLike | None) -> None:
    path = huggingface_hub.try_to_load_from_cache(repo_id, CONFIG, cache_dir, revision)
    problem = _damage(Path(path), repo_id, CONFIG) if isinstance(path, str) else None
    if problem:
        fetch(repo_id, CONFIG, revision, cache_dir)
        raise WeightsError(f'{repo_id}/{CONFIG} was damaged ({problem}) and is fetched again: load the model again')


def pull(repo_id: str, output: str | Path | None = None, revision: str | None = None) -> Path:
    """Fetches a model's folder: config.json, model.safetensors and, where there is one, the model card.

    Args:
        repo_id: 'org/name'.
        output: A new folder for it; by default it stays in the client's cache.
        revision: Branch, tag or commit; 'main' by default.

    Returns:
        The folder.

    Raises:
        WeightsError: The repository has no safetensors, or what it has is damaged or does not fit together.
        HfHubHTTPError, LocalEntryNotFoundError, OSError: As huggingface_hub raises them.
    """
    files = {CONFIG: fetch(repo_id, CONFIG, revision)}
    commit = commit_of(files[CONFIG])  # so that all files are of one commit
    try:
        files[WEIGHTS] = fetch(repo_id, WEIGHTS, commit)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise WeightsError(
            f'{repo_id} has no {WEIGHTS}; dcnzoo convert hf-hub:{repo_id} makes one of a checkpoint'
        ) from error
    with contextlib.suppress(EntryNotFoundError):
        files[CARD] = fetch(repo_id, CARD, commit)
    folder = files[CONFIG].parent
    check(folder)
    if output is None:
        return folder
    with new_folder(output) as draft:
        for name, file in files.items():
            shutil.copyfile(file, draft / name)
    return Path(output)


def push(
    folder: str | Path, repo_id: str, *, private: bool = False, card: str | None = None, message: str | None = None
) -> str:
    """Pushes a model's folder in one commit: config.json, model.safetensors and the model card, nothing else.

    Args:
        folder: Such as training leaves.
        repo_id: 'org/name'; the repository is made where there is none.
        private: The repository has to be private.
        card: A model card for a folder without one; it replaces none on the Hub.
        message: Of the commit.

    Returns:
        The address of the repository.

    Raises:
        WeightsError: The folder is not complete or does not fit together, or the repository is public but should not
            be.
        HfHubHTTPError: As huggingface_hub raises it.
    """
    folder = Path(folder)
    check(folder)
    api = HfApi(library_name='dcnzoo', library_version=__version__)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    repo_id = url.repo_id
    if private and not api.model_info(repo_id).private:
        raise WeightsError(f'{repo_id} exists and is public; nothing was pushed')
    contents = {name: str(folder / name) for name in (CONFIG, WEIGHTS)}
    if (folder / CARD).is_file():
        contents[CARD] = card_in_repository((folder / CARD).read_text(encoding='utf-8'), repo_id).encode()
    elif card is not None and not api.file_exists(repo_id, CARD):
        contents[CARD] = card.encode()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    api.create_commit(repo_id, operations, commit_message=message or 'Add model')
    return str(url)


def explain(error: BaseException, server: str = '') -> str:
    """One line for people about what went wrong at a server or on the way, without anything secret.

    Args:
        error: What was raised.
        server: What it is called, by default the Hub.
    """
    return redact(_explain(error, server or f'the Hub at {huggingface_hub.constants.ENDPOINT}'))


def _explain(error: BaseException, server: str) -> str:
    if isinstance(error, WeightsError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 'no space is left on the device' + (f' of {error.filename}' if error.filename else '')
    if isinstance(error, GatedRepoError):
        return 'access to the repository has to be asked for on the Hub, then HF_TOKEN to be set to your token'
    if isinstance(error, RepositoryNotFoundError):
        return 'there is no such repository, or it is private: then HF_TOKEN has to be a token that may read it'
    if isinstance(error, RevisionNotFoundError):
        return 'the repository has no such revision'
    if isinstance(error, LocalEntryNotFoundError):
        reason = f', and {_explain(error.__cause__, server)}' if error.__cause__ else ''
        return f'it is not in the cache{reason}'
    if isinstance(error, EntryNotFoundError):
        return f'the repository has no such file: {_request(error)}'
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE forbids requests'
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: 'the server wants a token, or another one than HF_TOKEN has',
            403: 'the token in HF_TOKEN does not allow that',
            429: 'the server has had too many requests; try again later',
        }
        return reasons.get(status, f'the server answers with status {status}: {_request(error)}')
    if type(error).__module__.startswith('httpx'):
        return f'{server} cannot be reached: {str(error) or type(error).__name__}'
    return ' '.join(str(error).split()) or type(error).__name__


def _request(error: HfHubHTTPError) -> str:
    request = getattr(error.response, 'request', None)
    return str(request.url) if request is not None else ''


@contextlib.contextmanager
def _redacted_logs() -> Iterator[None]:
    """Keeps what is secret in URLs out of what the client logs of its requests and retries."""

    def redact_record(record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True

    names = [name for name in logging.root.manager.loggerDict if name.startswith(('huggingface_hub', 'http'))]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(redact_record)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(redact_record)


def redact(text: str) -> str:
    """Text without tokens, nor the passwords and queries of URLs, which may be secret."""
    token = get_token()
    if token:
        text = text.replace(token, '***')
    text = re.sub(r'\bhf_[A-Za-z0-9]{8,}', '***', text)
    text = re.sub(r'(https?://)[^/@\s]+@', r'\1', text)
    return re.sub(r'(https?://[^\s?#]+)[?#][^\s\'")]*', r'\1', text)
