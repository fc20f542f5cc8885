"""Checkpoints of several origins become folders of models, or are refused with reasons."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from timm.models import save_for_hf
from torch.testing import assert_close

from dcnzoo.checkpoints import read
from dcnzoo.convert import convert
from dcnzoo.folder import WeightsError, check
from dcnzoo.hub import SHA256, explain, sha256

from .checkpoints import pickled, published, weights
from .models.registry import create, models, parameter_count
from .test_hub import fork, forks

NAME = 'test_dcnv4'
X = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path):
    """A file as publishers leave it."""
    path = tmp_path / 'published.pth'
    path.write_bytes(pickled({'model': published(weights())}))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / 'out'


def logits(source: str, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return timm.create_model(source, pretrained=True, **kwargs).eval()(X)


def expected(name: str = NAME, **kwargs) -> torch.Tensor:
    """What the weights of `weights` give, put into a model by hand."""
    model = timm.create_model(name, **kwargs).eval()
    model.load_state_dict(weights(name, **kwargs))
    with torch.no_grad():
        return model(X)


def drafts(folder) -> list:
    return list(folder.glob('.*.draft'))


def nothing_left(folder) -> bool:
    return not (folder / 'out').exists() and not drafts(folder)


def test_published(checkpoint, out):
    conversion = convert(str(checkpoint), NAME, out, metrics={'top-1': '12.3'})
    assert conversion.difference == 0
    assert sorted(path.name for path in out.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert_close(logits(f'local-dir:{out}'), expected(), rtol=0, atol=0)
    with safe_open(out / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt'}
    card = (out / 'README.md').read_text()
    for said in (
        f'sha256 of published.pth: {sha256(checkpoint)}',
        'Architecture:** test_dcnv4',
        f'Parameters (M): {parameter_count(NAME) / 1e6:.2f}',
        'Multiply-accumulates (G)',
        'license: unknown',
        'not measured by dcnzoo:**\n  - top-1: 12.3',
        'arxiv.org/abs/2401.06197',
        '@inproceedings{xiong2024dcnv4',
        'How made:** by `dcnzoo convert`',
    ):
        assert said in card, said
    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == NAME and config['num_classes'] == 1000
    assert 'num_classes' not in config.get('model_args', {}) and 'license' not in config['pretrained_cfg']


MINIATURES = [name for name in models() if name.startswith('test_')]
CASES = [(name, kwargs) for name in MINIATURES for kwargs in ({}, dict(num_classes=7))]
CASES += [(name, dict(in_chans=1)) for name in ('test_dcnv4', 'test_internimage', 'test_parameternet')]


@pytest.mark.parametrize(('name', 'kwargs'), CASES, ids=str)
def test_every_architecture(name, kwargs, tmp_path, out):
    """Its own keys, as timm's trainer leaves them, with whatever head or channels."""
    state_dict = weights(name, **kwargs)
    path = tmp_path / 'checkpoint.pth.tar'
    wrapped = {f'module.{key}': value for key, value in state_dict.items()}
    torch.save({'state_dict': {}, 'state_dict_ema': wrapped, 'epoch': 3}, path)
    conversion = convert(str(path), name, out)
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert all(torch.equal(value, state_dict[key]) for key, value in model.state_dict().items())
    assert check(out).num_classes == conversion.model.num_classes == kwargs.get('num_classes', 1000)
    assert "from the entry 'state_dict_ema'" in (out / 'README.md').read_text()


def test_a_repository_of_safetensors_for_transformers(hub, out):
    """As InternImage's publishers have one for each size: with a prefix and a configuration of their own."""
    name, repo = 'test_internimage', 'OpenGVLab/internimage_t_1k_224'
    state_dict = {f'model.{key}': value for key, value in published(weights(name)).items()}
    hub.add(repo, {'model.safetensors': save(state_dict, {'format': 'pt'}), 'config.json': b'{"model_type": "other"}'})
    convert(f'hf-hub:{repo}', name, out)
    assert_close(logits(f'local-dir:{out}'), expected(name), rtol=0, atol=0)
    assert_close(logits(name, pretrained_cfg_overlay=dict(hf_hub_id=repo)), expected(name), rtol=0, atol=0)


def test_names_of_classes(checkpoint, tmp_path, out):
    torch.save(weights(num_classes=3), tmp_path / 'three.pth')
    convert(str(tmp_path / 'three.pth'), NAME, out, classes=['ant', 'bee', 'cat'], license='cc0-1.0')
    model = timm.create_model(f'local-dir:{out}')
    assert model.pretrained_cfg['label_names'] == ['ant', 'bee', 'cat']
    assert model.pretrained_cfg['license'] == 'cc0-1.0'
    with pytest.raises(WeightsError, match='2 names of classes were given, the weights have 3 classes'):
        convert(str(tmp_path / 'three.pth'), NAME, tmp_path / 'other', classes=['ant', 'bee'])
    with pytest.raises(WeightsError, match=r'out is there already'):
        convert(str(checkpoint), NAME, out)


def test_a_published_file_brings_its_facts(hub, tmp_path, out, monkeypatch):
    """The licence and the publisher are named where the file is the published one, and only there."""
    from dcnzoo.convert import _origin, _published_as

    tag, file = 'dcnv4_tiny.opengvlab_in1k', 'flash_intern_image_t_1k_224.pth'
    address = f'OpenGVLab/DCNv4/{file}'
    assert _published_as('dcnv4_tiny', f'{address}@main', {}) == (tag, address)
    assert _published_as(tag, file, {}) == (tag, address)
    assert _published_as('dcnv4_tiny', 'mine.pth', {}) is None
    assert _published_as('dcnv4_small', file, {}) is None
    assert _origin(file, {file: '1' * 64}, tag, address)['sha256 of the published file'] == 'not known'
    monkeypatch.setitem(SHA256, address, '0' * 64)
    assert _published_as('dcnv4_tiny', file, {file: '1' * 64}) is None
    assert _published_as('dcnv4_tiny', file, {file: '0' * 64}) == (tag, address)
    assert _origin(file, {file: '0' * 64}, tag, address)['sha256 of the published file'] == 'the same'

    tag, name = 'internimage_tiny.opengvlab_in1k', 'internimage_t_1k_224'  # as safetensors and as a pickle
    for address in (f'OpenGVLab/{name}/model.safetensors', f'OpenGVLab/InternImage/{name}.pth'):
        assert _published_as('internimage_tiny', f'{address}@main', {}) == (tag, address)
    assert _published_as('internimage_tiny', f'{name}.pth', {}) == (tag, address)
    assert _published_as('internimage_tiny', 'model.safetensors', {}) is None


@pytest.mark.parametrize('prefixes', [('neck.', 'bbox_head.'), ('decode_head.', 'auxiliary_head.')])
def test_detectors_give_their_backbone(prefixes, tmp_path, out):
    state_dict = published(weights())
    kept = {key: value for key, value in state_dict.items() if not key.startswith(('conv_head', 'head'))}
    detector = {f'backbone.{key}': value for key, value in kept.items()}
    detector |= {f'{prefix}conv.weight': torch.randn(3, 3) for prefix in prefixes}
    torch.save(
        {'meta': {'epoch': 12, 'CLASSES': ('ant',)}, 'state_dict': detector, 'optimizer': {}}, tmp_path / 'd.pth'
    )
    conversion = convert(str(tmp_path / 'd.pth'), NAME, out)
    assert conversion.backbone and len(load_file(out / 'model.safetensors')) == len(kept)
    whole = timm.create_model(NAME).eval()
    whole.load_state_dict(weights())
    backbone = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        for ours, theirs in zip(backbone(X), whole.forward_intermediates(X, intermediates_only=True), strict=True):
            assert_close(ours, theirs, rtol=0, atol=0)
    check(out)
    classifier = timm.create_model(f'local-dir:{out}', pretrained=True, features_only=False, num_classes=5)
    assert classifier(X).shape == (1, 5)
    assert 'pipeline_tag: image-feature-extraction' in (out / 'README.md').read_text()
    with pytest.raises(WeightsError, match='1 names of classes were given, the weights have no classes'):
        convert(str(tmp_path / 'd.pth'), NAME, tmp_path / 'o', classes=['ant'])


def test_another_model(few_models, tmp_path, out):
    torch.save({'model': published(weights())}, tmp_path / 'p.pth')
    with pytest.raises(
        WeightsError, match=r'p\.pth is no checkpoint of dcnv4_atto; its keys .* are those of test_dcnv4'
    ) as e:
        convert(str(tmp_path / 'p.pth'), 'dcnv4_atto', out)
    assert any(line.endswith('missing:') for line in e.value.details)
    assert any('stem.conv1.weight (8, 3, 3, 3), expected (16, 3, 3, 3)' in line for line in e.value.details)
    assert any(line.strip().startswith('... and') for line in e.value.details)
    assert nothing_left(tmp_path)


def test_differences_are_listed(few_models, tmp_path, out):
    state_dict = published(weights())
    state_dict['levels.1.blocks.0.norm1.0.weight'] = torch.ones(5)
    del state_dict['levels.0.blocks.0.mlp.fc1.bias']
    state_dict['surplus.weight'] = torch.ones(2, 2)
    torch.save({'model': state_dict}, tmp_path / 'p.pth')
    with pytest.raises(WeightsError, match=r'p\.pth is no checkpoint of test_dcnv4$') as raised:
        convert(str(tmp_path / 'p.pth'), NAME, out)
    assert raised.value.details == [
        '1 missing:',
        '  stages.0.blocks.0.mlp.fc1.bias (32,)',
        '1 unexpected:',
        '  surplus.weight (2, 2)',
        '1 of another shape:',
        '  stages.1.blocks.0.norm1.weight (5,), expected (32,)',
    ]
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (b'', 'is damaged, or no checkpoint'),
        (b'PK\x03\x04 not a zip', 'is damaged, or no checkpoint'),
        (b'<html>Not found</html>', 'is damaged, or no checkpoint'),
        (pickled([1, 2]), 'holds no tensors by key'),
        (pickled({'model': {'epoch': 3}}), 'holds no tensors by key'),
        (pickled({'model': published(weights())})[:-3000], 'is damaged, or no checkpoint'),
    ],
    ids=['empty', 'no zip', 'html', 'list', 'numbers', 'truncated'],
)
@pytest.mark.parametrize('name', ['c.pth', 'c.safetensors'])
def test_damaged_files(tmp_path, out, content, says, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=says if name == 'c.pth' else 'is damaged, or no checkpoint'):
        convert(str(tmp_path / name), NAME, out)
    assert nothing_left(tmp_path)


def test_sources_that_are_none(tmp_path, out, checkpoint):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'two').mkdir()
    (tmp_path / 'two/a.pth').touch()
    (tmp_path / 'two/b.pth').touch()
    for source, says in (
        ('none.pth', 'no file'),
        ('empty', 'no checkpoint'),
        ('two', r'several checkpoints; .*: a\.pth, b'),
    ):
        with pytest.raises(WeightsError, match=says):
            convert(str(tmp_path / source), NAME, out)
    with pytest.raises(WeightsError, match="dcnzoo has no model 'dcnv4_tinny'"):
        convert(str(checkpoint), 'dcnv4_tinny', out)
    with pytest.raises(WeightsError, match="dcnzoo has no model 'resnet18'"):
        convert(str(checkpoint), 'resnet18', out)


def test_weights_that_are_not_finite(tmp_path, out):
    state_dict = weights()
    state_dict['head.fc.bias'][3] = float('nan')
    torch.save(state_dict, tmp_path / 'p.pth')
    with pytest.raises(WeightsError, match='gives outputs that are not finite'):
        convert(str(tmp_path / 'p.pth'), NAME, out)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(tmp_path, out, dtype):
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights().items()}
    torch.save(halves, tmp_path / 'p.pth')
    convert(str(tmp_path / 'p.pth'), NAME, out)
    written = load_file(out / 'model.safetensors')
    assert all(torch.equal(written[key], value) and written[key].dtype == value.dtype for key, value in halves.items())


def shard(state_dict, folder, suffix) -> str:
    """Three files and an index, as transformers leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(3):
        name = f'model-{number + 1:05}-of-00003{suffix}'
        part = {key: value for i, (key, value) in enumerate(state_dict.items()) if i % 3 == number}
        save_file(part, folder / name) if suffix == '.safetensors' else torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    name = f'{"model" if suffix == ".safetensors" else "pytorch_model"}{suffix}.index.json'
    (folder / name).write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
    return name


@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
def test_shards(tmp_path, out, suffix):
    index = shard(published(weights()), tmp_path / 'parts', suffix)
    convert(str(tmp_path / 'parts' / index), NAME, out)
    assert_close(logits(f'local-dir:{out}'), expected(), rtol=0, atol=0)
    convert(str(tmp_path / 'parts'), NAME, tmp_path / 'again')
    card = (out / 'README.md').read_text()
    assert all(sha256(path) in card for path in (tmp_path / 'parts').glob('model-*'))
    first = next((tmp_path / 'parts').glob('model-00001*'))
    first.write_bytes((tmp_path / 'parts' / first.name.replace('1-of', '2-of')).read_bytes())
    with pytest.raises(WeightsError, match=r'lacks .*, which .*index\.json says it has'):
        convert(str(tmp_path / 'parts'), NAME, tmp_path / 'third')
    first.unlink()
    with pytest.raises(WeightsError, match='there is no file'):
        convert(str(tmp_path / 'parts'), NAME, tmp_path / 'third')
    (tmp_path / 'parts' / index).write_text(json.dumps({'weight_map': {'a': '../../secret.bin'}}))
    with pytest.raises(WeightsError, match='names a file outside its folder'):
        read(tmp_path / 'parts' / index)


def test_from_a_hub_and_the_web(hub, tmp_path, impatient, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    shard(published(weights()), tmp_path / 'parts', '.safetensors')
    hub.add('org/parts', {path.name: path.read_bytes() for path in (tmp_path / 'parts').iterdir()})
    one = pickled({'model': published(weights())})
    hub.add('org/many', {'a.pth': one, 'sub/b.pth': one})
    hub.fault('a.pth', corrupt=True)
    hub.fault('-of-00003.safetensors', corrupt=True)
    token = 'hf_secretsecretsecretsecret'
    commit = hub.repos['org/many'].commit
    sources = {
        'hf-hub:org/parts': f'org/parts/model.safetensors.index.json@{hub.repos["org/parts"].commit}',
        'hf-hub:org/many/a.pth': f'org/many/a.pth@{commit}',
        f'hf-hub:org/many@{commit}/sub/b.pth': f'org/many/sub/b.pth@{commit}',
        f'{hub.url}/org/many/resolve/main/sub/b.pth?download=true': f'org/many/sub/b.pth@{commit}',
        f'{hub.url}/files/org/many/a.pth?token={token}': f'{hub.url}/files/org/many/a.pth',
    }
    for number, (source, called) in enumerate(sources.items()):
        out = tmp_path / f'out{number}'
        convert(source, NAME, out)
        card = (out / 'README.md').read_text()
        assert f'Checkpoint: {called}\n' in card and token not in card
        assert load_file(out / 'model.safetensors').keys() == weights().keys()
    with pytest.raises(WeightsError, match=r'org/many holds several checkpoints; .*: a\.pth, sub/b\.pth'):
        convert('hf-hub:org/many', NAME, tmp_path / 'none')


def test_a_folder_of_pickles_in_the_form_of_timm(hub, tmp_path, out):
    """Its configuration is kept: arguments of the model, input size, names of classes."""
    kwargs = dict(num_classes=2, depths=(1, 1, 2, 1), post_norm=True)
    model = create(NAME, **kwargs)
    names = {'label_names': ['ant', 'bee'], 'label_descriptions': {'ant': 'an ant', 'bee': 'a bee'}}
    save_for_hf(model, tmp_path / 'old', model_config={'pretrained_cfg': {'input_size': (3, 96, 96)}, **names})
    hub.add('org/old', {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()})
    for number, source in enumerate((str(tmp_path / 'old'), 'hf-hub:org/old')):
        convert(source, NAME, tmp_path / f'out{number}')
        result = timm.create_model(f'local-dir:{tmp_path}/out{number}', pretrained=True).eval()
        with torch.no_grad():
            assert_close(result(X), model(X), rtol=0, atol=0)
        assert tuple(result.pretrained_cfg['input_size']) == (3, 96, 96)
        assert result.pretrained_cfg['label_names'] == ['ant', 'bee']
        assert result.pretrained_cfg['label_descriptions'] == names['label_descriptions']


MEASURE = """
import re
from pathlib import Path
from dcnzoo.convert import convert

def memory(kind):
    status = Path('/proc/self/status').read_text()
    return int(re.search(kind + r':\\s*(\\d+) kB', status)[1]) * 1024

convert({small!r}, 'test_dcnv4', {small!r} + '-out')  # what the first run takes in any case
before = memory('VmRSS')
Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
convert({source!r}, {name!r}, {out!r})
print(memory('VmHWM') - before)
"""


def memory_of(small, source, name, out) -> int:
    """Bytes that converting takes at its peak, mapped files included, of a process that has converted before."""
    code = MEASURE.format(small=str(small), source=str(source), name=name, out=str(out))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads memory as Linux counts it')
@pytest.mark.parametrize('form', ['.pth', pytest.param('.safetensors', marks=pytest.mark.slow)])
def test_memory(checkpoint, tmp_path, out, form):
    """Not more than 1.3 times the checkpoint: one that was read and written as a whole would take twice."""
    state_dict = timm.create_model('dcnv4_tiny').state_dict()
    path = tmp_path / f'large{form}'
    save_file(state_dict, path) if form == '.safetensors' else torch.save({'model': published(state_dict)}, path)
    size = path.stat().st_size
    del state_dict
    assert memory_of(checkpoint, path, 'dcnv4_tiny', out) < 1.3 * size


@forks
@pytest.mark.parametrize('kills', [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_time(checkpoint, out, kills):
    """Whenever a conversion dies there is no folder of that name, or a whole one."""
    convert(str(checkpoint), NAME, out)
    whole = 0
    for moment in (0, *random.Random(0).sample(range(500), kills - 1)):
        shutil.rmtree(out, ignore_errors=True)
        child = fork(lambda: convert(str(checkpoint), NAME, out))
        while not out.exists() and not any(f'.{child}.' in draft.name for draft in drafts(out.parent)):
            time.sleep(0.001)
        time.sleep(moment / 1000)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            check(out)
            whole += 1
        assert len(drafts(out.parent)) <= 1  # the next conversion removes what was left
    assert whole < kills
    shutil.rmtree(out, ignore_errors=True)
    convert(str(checkpoint), NAME, out)
    assert not drafts(out.parent)


@forks
def test_a_disk_that_is_full(checkpoint, out, tmp_path):
    said = tmp_path / 'said'

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            convert(str(checkpoint), NAME, out)
        except WeightsError as error:
            said.write_text(explain(error))

    assert os.waitpid(fork(work), 0)[1] == 0
    assert re.fullmatch(f'cannot write {out}: .*File too large.*; nothing was written', said.read_text())
    said.unlink()
    assert nothing_left(tmp_path)


def test_too_little_space_is_noticed_before(checkpoint, out, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r'has 0 MB left, 2 MB are needed'):
        convert(str(checkpoint), NAME, out)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads memory as Linux counts it')
@pytest.mark.parametrize('name', ['internimage_large', 'internimage_giant'])
def test_gigabytes_in_shards(name, tmp_path, out, checkpoint):
    """Up to the 12 GB of the largest that was published. The shards are sparse: zeros that take no room on the disk."""
    with torch.device('meta'):
        state_dict = timm.create_model(name).state_dict()
    size = sum(value.nbytes for value in state_dict.values())
    weight_map = {}
    for number, keys in enumerate(batched(state_dict, 300)):
        header, offset = {}, 0
        for key in keys:
            value = state_dict[key]
            dtype = {torch.float32: 'F32', torch.int64: 'I64'}[value.dtype]
            header[key] = {'dtype': dtype, 'shape': list(value.shape), 'data_offsets': [offset, offset + value.nbytes]}
            offset += value.nbytes
            weight_map[key] = f'part{number}.safetensors'
        text = json.dumps(header).encode()
        text += b' ' * (-len(text) % 8)
        with open(tmp_path / f'part{number}.safetensors', 'wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            file.truncate(8 + len(text) + offset)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    assert memory_of(checkpoint, tmp_path / 'model.safetensors.index.json', name, out) < 1.3 * size
    assert (out / 'model.safetensors').stat().st_size > size


def batched(items, size: int) -> list[list]:
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]
