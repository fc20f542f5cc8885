import json
import os

import huggingface_hub
import pytest
import timm

from dcnzoo.hub import sha256
from dcnzoo.train.main import main as train

from ..checkpoints import pickled, published, weights
from ..train.conftest import forget_accelerator, make_photos, settings
from .conftest import CLASSES, noise

# the client's own use of httpx
pytestmark = pytest.mark.filterwarnings('ignore:Use .content:DeprecationWarning')

TOKEN = 'hf_secretsecretsecretsecret'


@pytest.fixture
def writable(hub, monkeypatch):
    """The hub, with a token that may write."""
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.tokens.add(TOKEN)
    return hub


def test_there_and_back(dcnzoo, writable, trained, tmp_path):
    code, out, err = dcnzoo('push', trained, '--repo', 'me/mine', '--private', '--metric', 'top-1=81')
    assert (code, err) == (0, [])
    assert out == f'pushed to {writable.url}/me/mine; timm loads it as hf-hub:me/mine\n'
    card = writable.repos['me/mine'].files['README.md'].decode()
    assert "timm.create_model('hf-hub:me/mine', pretrained=True)" in card
    assert '- top-1: 81' in card and 'Architecture:** test_dcnv4' in card

    image = noise(tmp_path / 'image.png')
    results = [
        json.loads(dcnzoo('predict', image, '--model', model, '--topk', 3, '--json')[1])[0]['predictions']
        for model in (trained, 'hf-hub:me/mine')
    ]
    assert results[0] == results[1]
    assert {prediction['label'] for prediction in results[0]} == set(CLASSES)

    code, out, err = dcnzoo('pull', 'hf-hub:me/mine', '--output', tmp_path / 'mine')
    assert (code, err) == (0, [])
    assert f'timm loads it as local-dir:{tmp_path / "mine"}' in out
    assert (tmp_path / 'mine/model.safetensors').read_bytes() == (trained / 'model.safetensors').read_bytes()
    assert dcnzoo('pull', 'me/mine')[1].endswith('timm loads it as hf-hub:me/mine\n')
    code, out, err = dcnzoo('pull', 'me/mine', '--output', tmp_path / 'mine')
    assert (code, out, len(err)) == (1, '', 1)
    assert 'is there already; name another folder or remove it' in err[0]


def test_published_weights_are_pulled_into_the_cache(dcnzoo, hub, tmp_path):
    content = pickled({'model': published(weights())})
    hub.add('OpenGVLab/DCNv4', {'flash_intern_image_t_1k_224.pth': content})
    hub.fault('.pth', corrupt=True)
    for name in ('dcnv4_tiny', 'dcnv4_tiny.opengvlab_in1k'):
        code, out, err = dcnzoo('pull', name)
        assert (code, err) == (0, [])
        path, digest, loaded = out.splitlines()
        assert digest == f'sha256 {sha256(path)}' and loaded == f'timm loads it as {name}, pretrained=True'
    assert hub.count('GET', '.pth') == 2


def test_a_run_is_pushed_and_predicts(dcnzoo, writable, tmp_path, capsys):
    """The names of its folders are the names of the classes, there and back."""
    photos = make_photos(tmp_path / 'photos', train=6, val=2)
    forget_accelerator()
    assert train([str(word) for word in settings(photos, tmp_path / 'run', schedule__epochs=1)]) == 0
    assert dcnzoo('push', tmp_path / 'run/best', '--repo', 'me/photos')[0] == 0
    assert set(writable.repos['me/photos'].files) == {'config.json', 'model.safetensors', 'README.md'}
    assert 'trained by `dcnzoo.train`' in writable.repos['me/photos'].files['README.md'].decode()
    for model in (f'local-dir:{tmp_path / "run/best"}', 'hf-hub:me/photos'):
        assert timm.create_model(model, pretrained=True).num_classes == 3
        out = dcnzoo('predict', photos / 'val', '--model', model, '--topk', 3, '--json')[1]
        labels = {prediction['label'] for result in json.loads(out) for prediction in result['predictions']}
        assert labels == {'blue', 'green', 'red'}


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (('pull', 'dcnv4_nano'), 'there are no published weights for dcnv4_nano'),
        (('pull', 'dcnv4_tinny'), 'did you mean dcnv4_tiny'),
        (('pull', 'dcnv4_tiny', '--output', 'x'), 'published weights go into the cache'),
        (('pull', 'org/none'), 'there is no such repository, or it is private'),
        (('pull', 'org/name', '--revision', 'other'), 'the repository has no such revision'),
        (('pull', 'org/pickle'), 'org/pickle has no model.safetensors; dcnzoo convert hf-hub:org/pickle'),
        (('pull', 'org/other'), 'makes no model'),
        (('push', 'nowhere', '--repo', 'me/mine'), 'nowhere has no config.json'),
    ],
)
def test_mistakes_get_one_line(dcnzoo, hub, trained, arguments, says):
    config = (trained / 'config.json').read_bytes()
    hub.add('org/name', {'config.json': config})
    hub.add('org/pickle', {'config.json': config, 'pytorch_model.bin': b''})
    strange = config.replace(b'"test_dcnv4"', b'"of_others"')
    hub.add('org/other', {'config.json': strange, 'model.safetensors': b'x'})
    code, out, err = dcnzoo(*arguments)
    assert (code, out, len(err)) == (1, '', 1)
    assert says in err[0]


def test_a_damaged_cache_is_repaired(dcnzoo, writable, trained, tmp_path):
    """The configuration's, too, though it is timm that reads it."""
    dcnzoo('push', trained, '--repo', 'me/mine')
    image = noise(tmp_path / 'image.png')
    arguments = ('predict', image, '--model', 'hf-hub:me/mine', '--json')
    expected = dcnzoo(*arguments)
    for name in ('config.json', 'model.safetensors'):
        (path,) = writable.cache.rglob(name)
        os.truncate(path.resolve(), 100)
        assert dcnzoo(*arguments) == expected
    assert expected[0] == 0


def test_push_without_a_right(dcnzoo, hub, trained, monkeypatch):
    code, _, err = dcnzoo('push', trained, '--repo', 'me/mine')
    assert (code, err) == (1, ['dcnzoo push: the server wants a token, or another one than HF_TOKEN has'])
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    code, _, err = dcnzoo('push', trained, '--repo', 'me/mine')
    assert (code, err) == (1, ['dcnzoo push: the token in HF_TOKEN does not allow that'])
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    code, _, err = dcnzoo('push', trained, '--repo', 'me/mine')
    assert (code, err) == (1, ['dcnzoo push: HF_HUB_OFFLINE forbids requests'])


def test_a_backbone(dcnzoo, writable, tmp_path):
    kept = {k: v for k, v in published(weights()).items() if not k.startswith(('conv_head', 'head'))}
    path = tmp_path / 'detector.pth'
    path.write_bytes(pickled({'state_dict': {f'backbone.{key}': value for key, value in kept.items()}}))
    image = noise(tmp_path / 'image.png')
    code, out, _ = dcnzoo('convert', path, '--model', 'test_dcnv4', '--output', tmp_path / 'out', '--verify', image)
    assert code == 0 and 'feature maps of checkpoint and result differ by 0' in out
    assert dcnzoo('push', tmp_path / 'out', '--repo', 'me/backbone')[0] == 0
    assert "'hf-hub:me/backbone'" in writable.repos['me/backbone'].files['README.md'].decode()
    assert len(timm.create_model('hf-hub:me/backbone', pretrained=True).feature_info.channels()) == 4
    code, _, err = dcnzoo('predict', image, '--model', tmp_path / 'out')
    assert (code, err) == (1, [f'dcnzoo predict: {tmp_path / "out"} has no classifier'])
    assert dcnzoo('features', image, '--model', tmp_path / 'out')[0] == 0
