"""Weights over HTTP: the real client against a server on this machine, at its best and at its worst."""

import errno
import hashlib
import os
import resource
import signal
import threading
import time
import traceback

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import save_for_hf
from torch.testing import assert_close

from dcnzoo.folder import WeightsError
from dcnzoo.hub import SHA256, explain, fetch, fetch_url, pull, push, redact

from .checkpoints import flip, pickled, published, weights
from .models.golden.fill import fill, image
from .models.registry import models
from .models.test_dcnv4 import KEYS, OUTPUTS, relative_error

REPO, FILE = 'org/name', 'weights.pth'
BODY = bytes(range(256)) * 4096  # 1 MiB
TOKEN = 'hf_secretsecretsecretsecret'
SECRET = 'a-password-of-another-kind'

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


@pytest.fixture
def served(hub):
    """The server with one file."""
    hub.add(REPO, {FILE: BODY})
    return hub


def finished(hub) -> list[bytes]:
    """What the cache offers as whole files."""
    return [path.read_bytes() for path in hub.cache.rglob('snapshots/*/*') if path.exists()]


def fork(work) -> int:
    """Runs a function in a child process, whose exit status is 0 if it returned."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# Published weights


def test_every_tag_is_complete():
    tags = [tag for name in models() for tag in timm.list_pretrained(f'{name}.*')]
    assert len(tags) == 15
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert f'{cfg.hf_hub_id}/{cfg.hf_hub_filename or "model.safetensors"}' in SHA256, f'{tag} is not in the table'
        assert cfg.license and cfg.origin_url and cfg.paper_ids and cfg.mean and cfg.std and cfg.crop_pct
        assert cfg.hf_hub_id.count('/') == 1 and cfg.input_size[0] == 3
    assert all(digest is None or len(digest) == 64 for digest in SHA256.values())


def test_published_weights_load_from_the_hub(hub):
    state_dict = {k: v.float() if v.is_floating_point() else v for k, v in fill(KEYS['dcnv4_tiny']).items()}
    hub.add('OpenGVLab/DCNv4', {'flash_intern_image_t_1k_224.pth': pickled({'model': state_dict})})
    whole = timm.create_model('dcnv4_tiny', pretrained=True).eval()
    with torch.no_grad():
        features, stages = whole.forward_intermediates(image(1, (2, 3, 224, 224)).float())
        assert relative_error(whole.forward_head(features), OUTPUTS['dcnv4_tiny.logits']) < 1e-4
    for i, stage in enumerate(stages):
        assert relative_error(stage.mean((2, 3)), OUTPUTS[f'dcnv4_tiny.stage{i}.mean']) < 1e-4

    model = timm.create_model('dcnv4_tiny', pretrained=True, num_classes=5, in_chans=1).eval()
    assert_close(model.stem.conv1.weight, state_dict['patch_embed.conv1.weight'].sum(1, keepdim=True))
    assert torch.equal(model.stages[3].blocks[3].mlp.fc2.weight, state_dict['levels.3.blocks.3.mlp.fc2.weight'])
    with torch.no_grad():
        assert model(torch.randn(1, 1, 64, 96)).shape == (1, 5)
    backbone = timm.create_model('dcnv4_tiny.opengvlab_in1k', pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, expected in zip(backbone(x), whole.forward_intermediates(x, intermediates_only=True), strict=True):
            assert_close(ours, expected)
    assert hub.count('GET', '.pth') == 1  # once, then the cache


def miniature(name: str, **kwargs) -> torch.nn.Module:
    """A miniature, as if its weights were published."""
    overlay = {'hf_hub_id': REPO, 'hf_hub_filename': FILE}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@pytest.mark.parametrize('name', [name for name in models() if name.startswith('test_')])
def test_every_architecture_verifies(hub, name):
    hub.add(REPO, {FILE: pickled({'model': weights(name)})})
    hub.fault(FILE, corrupt=True)
    assert torch.equal(next(miniature(name).parameters()), next(iter(weights(name).values())))
    assert hub.count('GET', FILE) == 2


def test_cache_dir_is_obeyed(hub, tmp_path):
    hub.add(REPO, {FILE: pickled({'model': published(weights())})})
    miniature('test_dcnv4', cache_dir=str(tmp_path / 'mine'))
    assert list((tmp_path / 'mine').rglob(FILE)) and not hub.cache.exists()


# Damage


def test_a_damaged_download_is_fetched_again_once(served):
    served.fault(FILE, corrupt=True)
    assert fetch(REPO, FILE).read_bytes() == BODY
    assert served.count('GET', FILE) == 2
    assert fetch(REPO, FILE).read_bytes() == BODY
    assert served.count('GET', FILE) == 2


def test_a_download_damaged_twice_is_reported_and_forgotten(served):
    served.fault(FILE, corrupt=True, times=9)
    with pytest.raises(WeightsError, match=rf'{REPO}/{FILE} came damaged, twice: its sha256 is \w+, the Hub says \w+'):
        fetch(REPO, FILE)
    assert served.count('GET', FILE) == 2
    assert finished(served) == []


def test_a_damaged_configuration_in_the_cache_is_noticed(hub, folder):
    """By timm's function once the file was read; then it is fetched again."""
    hub.add(REPO, {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    path = fetch(REPO, 'config.json')
    path.resolve().write_bytes(path.read_bytes().replace(b'"num_classes": 3', b'"num_classes": 4'))
    with pytest.raises(WeightsError, match=r'config\.json was damaged .*hash is .* load the model again'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert timm.create_model(f'hf-hub:{REPO}', pretrained=True).num_classes == 3


def test_weights_from_a_url(served, impatient, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    state_dict = published(weights())
    served.repos[REPO].files[FILE] = pickled({'model': state_dict})
    served.fault(FILE, cut=1000)
    overlay = {'url': f'{served.url}/files/{REPO}/{FILE}'}
    for cache_dir in (None, tmp_path / 'mine'):
        model = timm.create_model('test_dcnv4', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir)
        assert torch.equal(model.stem.conv1.weight, state_dict['patch_embed.conv1.weight'])
    assert len(list(tmp_path.rglob(FILE))) == 2 and served.count('GET', FILE) == 3


def test_a_small_file_is_verified_by_its_git_hash(served):
    served.repos[REPO].files['config.json'] = b'{"architecture": "test_dcnv4"}'
    served.fault('config.json', corrupt=True)
    assert fetch(REPO, 'config.json').read_bytes() == b'{"architecture": "test_dcnv4"}'
    served.fault('config.json', corrupt=True, times=9)
    flip(fetch(REPO, 'config.json').resolve())
    with pytest.raises(WeightsError, match='its hash is'):
        fetch(REPO, 'config.json')


@pytest.mark.parametrize('damage', [flip, lambda path: os.truncate(path, 1000)], ids=['same size', 'truncated'])
def test_damage_in_the_cache_is_repaired(served, damage):
    damage(fetch(REPO, FILE).resolve())
    assert fetch(REPO, FILE).read_bytes() == BODY
    assert served.count('GET', FILE) == 2


def test_damage_in_the_cache_without_a_network_is_reported(served, monkeypatch):
    flip(fetch(REPO, FILE).resolve())
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match=r'is damaged .* and cannot be fetched again: HF_HUB_OFFLINE'):
        fetch(REPO, FILE)


def test_a_short_body_is_fetched_again(served):
    served.fault(FILE, truncate=5)
    assert fetch(REPO, FILE).read_bytes() == BODY
    served.repos[REPO].files['other.pth'] = BODY[::-1]
    served.fault('other.pth', truncate=5, times=9)
    with pytest.raises(WeightsError, match=r'other\.pth came damaged, twice: Consistency check failed'):
        fetch(REPO, 'other.pth')
    assert finished(served) == [BODY]


def test_a_body_cut_off_is_resumed(served, impatient, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 100_000)
    served.fault(FILE, cut=300_000)
    assert fetch(REPO, FILE).read_bytes() == BODY
    gets = [headers for method, path, headers in served.requests if method == 'GET' and path.endswith(FILE)]
    assert [headers.get('Range') for headers in gets] == [None, 'bytes=300000-']


@pytest.mark.parametrize('status', [429, 503])
@pytest.mark.parametrize('method', ['HEAD', 'GET'])
def test_a_busy_hub_is_asked_again(served, impatient, method, status):
    served.fault(FILE, method=method, status=status, times=1 if status == 503 else 2)
    if method == 'GET' and status == 503:
        with pytest.raises(
            HfHubHTTPError
        ) as raised:  # so it is with the client: nothing is cached, it can be called again
            fetch(REPO, FILE)
        assert 'status 503' in explain(raised.value)
    assert fetch(REPO, FILE).read_bytes() == BODY


def test_a_slow_hub(served):
    served.fault(FILE, delay=0.5)
    assert fetch(REPO, FILE).read_bytes() == BODY


def test_a_known_sha256_is_held_against_the_hub(served, monkeypatch):
    monkeypatch.setitem(SHA256, f'{REPO}/{FILE}', hashlib.sha256(BODY).hexdigest())
    assert fetch(REPO, FILE).read_bytes() == BODY
    monkeypatch.setitem(SHA256, f'{REPO}/{FILE}', '0' * 64)
    with pytest.raises(WeightsError, match=f'that of the published file is {"0" * 64}'):
        fetch(REPO, FILE)


def test_a_cache_without_links(served, monkeypatch):
    """As on Windows: what the Hub says is asked for again, and a sha256 from the table is checked without it."""
    monkeypatch.setattr(huggingface_hub.file_download, 'are_symlinks_supported', lambda *_: False)
    path = fetch(REPO, FILE)
    assert not path.is_symlink()
    flip(path)
    assert fetch(REPO, FILE).read_bytes() == BODY
    monkeypatch.setitem(SHA256, f'{REPO}/{FILE}', hashlib.sha256(BODY).hexdigest())
    flip(path)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match=r'cannot be fetched again: .*HF_HUB_OFFLINE'):
        fetch(REPO, FILE)


# The errors of a Hub, in one line


def failure(*arguments, **kwargs) -> str:
    with pytest.raises(Exception) as raised:
        fetch(*arguments, **kwargs)
    text = explain(raised.value)
    assert '\n' not in text and TOKEN not in text
    return text


def test_errors_are_explained(hub, impatient, monkeypatch):
    hub.add(REPO, {FILE: BODY})
    hub.add('org/private', {FILE: BODY}, private=True)
    hub.add('org/gated', {FILE: BODY}, gated=True)
    assert 'no such repository, or it is private' in failure('org/nothing', FILE)
    assert 'no such repository, or it is private' in failure('org/private', FILE)
    assert 'asked for on the Hub' in failure('org/gated', FILE)
    assert f'no such file: {hub.url}/{REPO}/resolve/main/other.pth' in failure(REPO, 'other.pth')
    assert 'no such revision' in failure(REPO, FILE, 'other')
    assert 'Repo id must be' in failure('not/a/repo', FILE)
    for status, says in ((403, 'does not allow'), (429, 'too many requests'), (500, 'status 500'), (504, 'status 504')):
        hub.fault(FILE, method='HEAD', status=status, times=99)
        assert says in failure(REPO, FILE)
        hub.faults.clear()
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.tokens.add('another')
    assert 'no such repository, or it is private' in failure('org/private', FILE)
    hub.tokens.add(TOKEN)
    for repo in ('org/private', 'org/gated'):
        assert fetch(repo, FILE).read_bytes() == BODY


def test_offline_and_unreachable(served, impatient, monkeypatch):
    fetch(REPO, FILE)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert fetch(REPO, FILE).read_bytes() == BODY
    with pytest.raises(LocalEntryNotFoundError) as raised:
        fetch(REPO, 'other.pth')
    assert explain(raised.value) == 'it is not in the cache, and HF_HUB_OFFLINE forbids requests'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    nowhere = 'http://127.0.0.1:9'
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', nowhere)
    monkeypatch.setattr(
        huggingface_hub.constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nowhere + '/{repo_id}/resolve/{revision}/{filename}'
    )
    assert fetch(REPO, FILE).read_bytes() == BODY
    assert f'the Hub at {nowhere} cannot be reached' in failure(REPO, 'other.pth')


def test_no_space_left():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), '/cache/file')
    assert explain(error) == 'no space is left on the device of /cache/file'


@pytest.mark.parametrize(
    'text',
    [
        f'token {TOKEN}',
        'hf_abcdefghijklmnopq is wrong',
        f'https://user:{TOKEN}@host/file',
        'https://host/file?X-Amz-Signature=hf_abcdefghijklmnopq&x=1 failed',
    ],
)
def test_nothing_secret_is_shown(text, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'plainsecret')
    shown = redact(text + ' plainsecret')
    assert not any(secret in shown for secret in (TOKEN, 'hf_abc', 'plainsecret', 'user:', 'Signature'))


# Several processes, and processes that die


@forks
def test_two_processes_at_once(served):
    served.gate.clear()
    children = [fork(lambda: fetch(REPO, FILE)) for _ in range(2)]
    deadline = time.monotonic() + 20
    while served.count('HEAD', FILE) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    served.gate.set()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert fetch(REPO, FILE).read_bytes() == BODY


@forks
def test_two_processes_at_one_url(served, tmp_path, monkeypatch):
    """One downloads, the other waits for it."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    url = f'{served.url}/files/{REPO}/{FILE}'
    served.gate.clear()
    children = [fork(lambda: fetch_url(url)) for _ in range(2)]
    threading.Timer(0.3, served.gate.set).start()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert fetch_url(url).read_bytes() == BODY
    assert served.count('GET', FILE) == 1


@forks
def test_two_processes_repair_at_once(served):
    flip(fetch(REPO, FILE).resolve())
    children = [fork(lambda: fetch(REPO, FILE)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert finished(served) == [BODY]


@forks
@pytest.mark.parametrize(
    'fetching',
    [lambda hub: fetch(REPO, FILE), lambda hub: fetch_url(f'{hub.url}/files/{REPO}/{FILE}')],
    ids=['hub', 'url'],
)
def test_killed_while_it_downloads(served, tmp_path, monkeypatch, fetching):
    """What a download left that was killed between any two bytes is never taken for the file."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    for sent in (1, 200_000, len(BODY) - 1):
        served.fault(FILE, cut=sent, hold=True)
        child = fork(lambda: fetching(served))
        assert served.held.wait(20)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        served.release()
        assert finished(served) == [] and not list((tmp_path / 'torch').rglob(FILE))
    assert fetching(served).read_bytes() == BODY


@forks
def test_a_disk_that_is_full(served, tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle."""
    said = tmp_path / 'said'

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            fetch(REPO, FILE)
        except OSError as error:
            said.write_text(explain(error))

    assert os.waitpid(fork(work), 0)[1] == 0
    assert 'File too large' in said.read_text() and '\n' not in said.read_text()
    assert finished(served) == []
    assert fetch(REPO, FILE).read_bytes() == BODY


# Other servers


def test_url(served, impatient, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    address = f'{served.url}/files/{REPO}'
    served.fault(FILE, cut=5)
    assert fetch_url(f'{address}/{FILE}').read_bytes() == BODY
    assert fetch_url(f'{address}/{FILE}').read_bytes() == BODY
    assert served.count('GET', FILE) == 2
    assert fetch_url(f'{address}/{FILE}?version=2') != fetch_url(f'{address}/{FILE}')  # which may be other weights

    name = f'w-{hashlib.sha256(BODY).hexdigest()[:8]}.pth'
    served.repos[REPO].files[name] = BODY
    served.fault(name, corrupt=True)
    assert fetch_url(f'{address}/{name}').read_bytes() == BODY
    assert served.count('GET', name) == 2
    wrong = ('w-0000000a.pth', 'short.pth')
    served.repos[REPO].files |= dict.fromkeys((*wrong, 'w-20240131.pth', 'w-00001-of-00002.pth'), BODY)
    for fault in 2 * (dict(cut=1000), dict(truncate=5)):  # so that what is resumed is of another size than announced
        served.fault('short.pth', **fault)
    for name, says in zip(wrong, ('its sha256 is', 'Consistency check failed: [^(]*$'), strict=True):
        with pytest.raises(WeightsError, match=f'came damaged, twice: {says}'):
            fetch_url(f'{address}/{name}')
    for name in ('w-20240131.pth', 'w-00001-of-00002.pth'):  # no sha256, but a date and a number
        assert fetch_url(f'{address}/{name}').read_bytes() == BODY


def test_a_url_keeps_its_secrets(served, impatient, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    for name in ('root', 'huggingface_hub'):
        caplog.set_level('DEBUG', logger=name)
    served.fault(FILE, cut=5)
    served.fault(FILE, status=429)
    served.repos[REPO].files['short.pth'] = BODY
    served.fault('short.pth', cut=5, times=99)
    fetch_url(f'{served.url}/files/{REPO}/{FILE}?token={SECRET}')
    said = ''
    for server, name, says in (
        (served.url, 'none.pth', 'the server answers with status 404'),
        (served.url, 'short.pth', 'the server cannot be reached: '),
        ('http://127.0.0.1:9', FILE, 'the server cannot be reached: '),
    ):
        with pytest.raises(WeightsError, match=f'{name}: {says}') as raised:
            fetch_url(f'{server}/files/{REPO}/{name}?token={SECRET}')
        said += ''.join(traceback.format_exception(raised.value))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match=f'{FILE}: HF_HUB_OFFLINE forbids requests') as raised:
        fetch_url(f'{served.url}/files/{REPO}/{FILE}?token={SECRET}2')
    said += ''.join(traceback.format_exception(raised.value))
    assert 'resume' in caplog.text and '429' in caplog.text
    assert SECRET[-12:] not in caplog.text + said


# Push and pull


@pytest.fixture
def folder(tmp_path):
    """What training leaves, and some things beside it."""
    model = timm.create_model('test_dcnv4', num_classes=3)
    model.load_state_dict(weights(num_classes=3))
    place = tmp_path / 'best'
    save_for_hf(model, place, model_config={'label_names': ['ant', 'bee', 'cat']}, safe_serialization='both')
    (place / 'run.yaml').write_text('data: {root: /secret/place}')
    return place


def test_push_and_load(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.tokens.add(TOKEN)
    assert push(folder, 'me/mine', private=True, card='# Card') == f'{hub.url}/me/mine'
    assert set(hub.repos['me/mine'].files) == {'config.json', 'model.safetensors', 'README.md'}
    assert hub.repos['me/mine'].private and hub.repos['me/mine'].commits == 2
    assert hub.count('PUT', '') == 1

    model = timm.create_model('hf-hub:me/mine', pretrained=True).eval()
    local = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), local(x))
    assert model.pretrained_cfg['label_names'] == ['ant', 'bee', 'cat']

    hub.repos['me/mine'].files['README.md'] = b'# Edited on the Hub'
    push(folder, 'me/mine', card='# Card')
    assert hub.repos['me/mine'].files['README.md'] == b'# Edited on the Hub'
    (folder / 'README.md').write_text('# Mine')
    push(folder, 'me/mine', card='# Card')
    assert hub.repos['me/mine'].files['README.md'] == b'# Mine'

    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(HfHubHTTPError):
        timm.create_model('hf-hub:me/mine', pretrained=True, cache_dir=str(folder / 'empty'))


def test_push_refuses(hub, folder, monkeypatch):
    with pytest.raises(HfHubHTTPError) as raised:
        push(folder, 'me/mine')
    assert explain(raised.value) == 'the server wants a token, or another one than HF_TOKEN has'
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.tokens.add(TOKEN)
    hub.add('me/public', {})
    with pytest.raises(WeightsError, match='me/public exists and is public; nothing was pushed'):
        push(folder, 'me/public', private=True)
    assert hub.repos['me/public'].files == {}

    (folder / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r'model\.safetensors is damaged'):
        push(folder, 'me/mine')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(WeightsError, match=r'has no model\.safetensors'):
        push(folder, 'me/mine')
    (folder / 'config.json').unlink()
    with pytest.raises(WeightsError, match=r'has no config\.json'):
        push(folder, 'me/mine')
    assert 'me/mine' not in hub.repos


def test_pull(hub, folder, tmp_path):
    files = {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors', 'pytorch_model.bin')}
    hub.add(REPO, {**files, 'README.md': b'# Card'})
    hub.fault('model.safetensors', corrupt=True)
    hub.fault('config.json', corrupt=True)
    place = pull(REPO, tmp_path / 'pulled')
    assert sorted(path.name for path in place.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert all((place / name).read_bytes() == files[name] for name in ('config.json', 'model.safetensors'))
    assert not any(path.is_symlink() for path in place.iterdir())
    with pytest.raises(WeightsError, match='is there already'):
        pull(REPO, tmp_path / 'pulled')
    assert (pull(REPO) / 'model.safetensors').read_bytes() == files['model.safetensors']

    hub.add('org/old', {name: files[name] for name in ('config.json', 'pytorch_model.bin')})
    with pytest.raises(WeightsError, match=r'org/old has no model\.safetensors; dcnzoo convert hf-hub:org/old'):
        pull('org/old', tmp_path / 'old')
    hub.add('org/none', {})
    with pytest.raises(EntryNotFoundError):
        pull('org/none', tmp_path / 'old')
    assert not (tmp_path / 'old').exists()


def test_pull_is_of_one_commit(hub, folder, tmp_path):
    """Weights that are pushed between two files do not get mixed with an old configuration."""
    hub.add(REPO, {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    old = hub.repos[REPO].commit

    def push_again():
        while not hub.count('GET', 'config.json'):
            time.sleep(0.001)
        hub.repos[REPO].commits += 1

    hub.gate.clear()
    pusher = threading.Thread(target=push_again)
    pusher.start()
    threading.Timer(0.2, hub.gate.set).start()
    with pytest.raises(Exception, match='Revision Not Found'):  # this server keeps no history
        pull(REPO)
    pusher.join()
    assert hub.requests[-1][1] == f'/{REPO}/resolve/{old}/model.safetensors'
