import pytest
import timm
import torch

from ..checkpoints import pickled, published, weights
from .conftest import CLASSES, noise

TOKEN = 'hf_secretsecretsecretsecret'


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'three.pth'
    path.write_bytes(pickled({'model': published(weights(num_classes=3))}))
    return path


def test_a_checkpoint_becomes_a_folder_that_predicts(dcnzoo, checkpoint, tmp_path):
    image = noise(tmp_path / 'image.png')
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(CLASSES) + '\n')
    out = tmp_path / 'out'
    arguments = ('--classes', names, '--license', 'mit', '--metric', 'top-1=93.5', '--metric', 'data = mine')
    code, text, err = dcnzoo(
        'convert', checkpoint, '--model', 'test_dcnv4', '--output', out, '--verify', image, *arguments
    )
    assert (code, err) == (0, [])
    lines = text.splitlines()
    assert lines[0] == 'Checkpoint: three.pth'
    assert lines[1].startswith('sha256 of three.pth: ')
    assert 'logits of checkpoint and result differ by 0' in lines
    assert lines[-1] == f'wrote {out} (3 classes); timm loads it as local-dir:{out}'
    card = (out / 'README.md').read_text()
    assert 'license: mit' in card and '- top-1: 93.5\n  - data: mine' in card

    code, predicted, _ = dcnzoo('predict', image, '--model', out, '--topk', 3)
    assert code == 0
    label, probability = predicted.splitlines()[1].split()[1:]
    assert f'{image}: {label} {probability}' in lines and label in CLASSES


def test_what_differs_is_listed(dcnzoo, few_models, checkpoint, tmp_path):
    code, out, err = dcnzoo('convert', checkpoint, '--model', 'test_parameternet', '--output', tmp_path / 'out')
    assert (code, out) == (1, '')
    assert err[0].endswith('missing:') and err[1].startswith('  conv_stem')
    assert err[-1].startswith(
        'dcnzoo convert: three.pth is no checkpoint of test_parameternet; its keys and shapes are'
    )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (('none.pth', '--model', 'test_dcnv4'), 'there is no file none.pth'),
        (('three.pth', '--model', 'dcnv4_tinny'), "dcnzoo has no model 'dcnv4_tinny'; did you mean dcnv4_tiny"),
        (('three.pth', '--model', 'dcnv4_tiny.opengvlab_1k'), "no tag 'opengvlab_1k'; did you mean dcnv4_tiny.op"),
        (('three.pth', '--model', 'test_dcnv4', '--verify', 'none.png'), 'none.png: there is no such file'),
        (('three.pth', '--model', 'test_dcnv4', '--classes', 'none.txt'), '--classes none.txt: No such file'),
        (('three.pth', '--model', 'test_dcnv4', '--output', '.'), '. is there already'),
        (('hf-hub:org/none', '--model', 'test_dcnv4'), 'there is no such repository, or it is private'),
        (('hf-hub:none', '--model', 'test_dcnv4'), 'hf-hub:none names no repository, expected hf-hub:ORG/NAME'),
    ],
)
def test_mistakes_get_one_line(dcnzoo, hub, checkpoint, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = dcnzoo('convert', '--output', 'out', *arguments)
    assert (code, out, len(err)) == (1, '', 1)
    assert says in err[0]
    assert not (tmp_path / 'out').exists()


def test_wrong_metric(dcnzoo, checkpoint):
    code, _, err = dcnzoo('convert', checkpoint, '--model', 'test_dcnv4', '--output', 'out', '--metric', 'good')
    assert code == 2
    assert "must be NAME=VALUE, got 'good'" in err[-1]


def test_no_token_is_shown(dcnzoo, hub, impatient, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    hub.add('org/name', {'three.pth': checkpoint.read_bytes(), 'bad.pth': b''}, private=True)
    address = hub.url.replace('http://', f'http://user:{TOKEN}@')
    said = []
    for number, source in enumerate(
        (
            'hf-hub:org/name/three.pth',
            f'{address}/files/org/name/three.pth?token={TOKEN}',
            f'{address}/files/org/name/bad.pth?token={TOKEN}',
            f'{address}/files/org/none/bad.pth?token={TOKEN}',
        )
    ):
        said += dcnzoo('convert', source, '--model', 'test_dcnv4', '--output', tmp_path / f'out{number}')[1:]
        hub.tokens.add(TOKEN)
    hub.tokens.clear()
    said += dcnzoo('push', tmp_path / 'out1', '--repo', 'me/mine')[1:]
    said += dcnzoo('pull', 'org/name')[1:]
    said += [path.read_text(errors='replace') for path in tmp_path.glob('out*/*')]
    assert (tmp_path / 'out1').exists()
    assert not any(TOKEN in str(text) for text in said)


def test_a_tag_brings_the_preparation(dcnzoo, tmp_path):
    """The name's tag says how images are prepared; a licence it does not give to weights of another file."""
    path = tmp_path / 'mine.pth'
    path.write_bytes(pickled(weights('dcnv4_atto')))
    name, out = 'dcnv4_atto.untrained', tmp_path / 'out'
    assert dcnzoo('convert', path, '--model', name, '--output', out)[0] == 0
    model = timm.create_model(f'local-dir:{out}')
    assert model.pretrained_cfg['crop_pct'] == 1.0 and not model.pretrained_cfg.get('license')
