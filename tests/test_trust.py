"""No file that is loaded runs code: not by a command, not by a function, not through timm."""

import ast
import contextlib
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import dcnzoo
from dcnzoo.commands import main
from dcnzoo.convert import convert
from dcnzoo.folder import WeightsError
from dcnzoo.train.config import DataConfig, ModelConfig
from dcnzoo.train.model import build_model

from .checkpoints import malicious, pickled, published, weights
from .train.conftest import make_photos, settings
from .train.conftest import train as trainer

NAME = 'test_dcnv4'
train = trainer  # the fixture
KINDS = list(malicious('marker', {}))


@pytest.fixture
def marker(tmp_path):
    """The file that would be there if code had run."""
    path = tmp_path / 'code-has-run'
    yield path
    assert not path.exists()


@pytest.mark.parametrize('kind', KINDS)
def test_the_attacks_work(tmp_path, kind):
    """Against those who load pickles as such."""
    path = tmp_path / 'attack.pth'
    path.write_bytes(malicious(tmp_path / 'ran', published(weights()))[kind])
    with contextlib.suppress(RuntimeError):  # what is no file of torch's ran first, and then is
        torch.load(path, weights_only=False)
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_runs_them(hub, marker, tmp_path, capsys, kind):
    attack = malicious(marker, published(weights()))[kind]
    folder = tmp_path / 'folder'
    save_for_hf(timm.create_model(NAME, num_classes=2), folder)  # config.json and a pickle
    for name in ('pytorch_model.bin', 'attack.pth', 'attack.pt', 'attack.safetensors', 'attack.pth.tar'):
        (folder / name).write_bytes(attack)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add('org/attack', files)
    hub.tokens.add('token')
    image = tmp_path / 'image.png'
    torch_image(image)

    for source in (folder / 'attack.pth', folder, 'hf-hub:org/attack', f'{hub.url}/files/org/attack/attack.pth'):
        with pytest.raises(WeightsError, match=r'refused: .*(open|exec)|damaged, or no checkpoint'):
            convert(str(source), NAME, tmp_path / 'out')
    for commands in (
        ('convert', folder / 'attack.pth.tar', '--model', NAME, '--output', tmp_path / 'out'),
        ('convert', folder / 'attack.safetensors', '--model', NAME, '--output', tmp_path / 'out'),
        ('predict', image, '--model', folder),
        ('predict', image, '--model', 'hf-hub:org/attack'),
        ('features', image, '--model', folder, '--png', tmp_path / 'maps.png'),
        ('offsets', image, '--model', folder, '--png', tmp_path / 'offsets.png'),
        ('average', folder / 'attack.pth', folder / 'attack.pth', '--output', tmp_path / 'out'),
        ('push', folder, '--repo', 'me/mine'),
        ('pull', 'org/attack', '--output', tmp_path / 'out'),
    ):
        assert main([str(argument) for argument in commands]) == 1
        assert len(capsys.readouterr().err.splitlines()) <= 3, commands
    for create in (
        lambda: timm.create_model(f'local-dir:{folder}', pretrained=True),
        lambda: timm.create_model('hf-hub:org/attack', pretrained=True),
        lambda: timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='org/attack', hf_hub_filename='attack.pth')
        ),
        lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / 'attack.pth'))),
        lambda: timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(url=f'{hub.url}/files/org/attack/attack.pth')
        ),
        lambda: timm.create_model(NAME, checkpoint_path=str(folder / 'attack.pth')),
        lambda: build_model(ModelConfig(name=NAME, checkpoint=str(folder / 'attack.pth')), DataConfig(), 2),
    ):
        with pytest.raises(Exception):  # noqa: B017  (timm's own, torch's own)
            create()
    assert not (tmp_path / 'out').exists() and 'me/mine' not in hub.repos


def torch_image(path: Path) -> None:
    from PIL import Image

    Image.new('RGB', (64, 64)).save(path)


def test_the_trainer_runs_none(marker, tmp_path, train):
    """Neither of weights to start from nor of a checkpoint to go on with."""
    attack = malicious(marker, published(weights()))['nested in model']
    photos = make_photos(tmp_path / 'photos', train=6, val=2)
    (tmp_path / 'attack.pth').write_bytes(attack)
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=1, schedule__name='plateau')
    assert train([*arguments, '--model.checkpoint', tmp_path / 'attack.pth'])[0] == 1
    assert train(arguments)[0] == 0
    saved = next((tmp_path / 'run' / 'checkpoints').iterdir())
    pickles = [path for path in saved.iterdir() if path.suffix in ('.bin', '.pkl', '.pt')]
    assert pickles and not any('custom' in path.name for path in pickles)
    for path in (*pickles, saved / 'custom_checkpoint_0.pkl'):
        path.write_bytes(attack)
    assert train([*arguments, '--schedule.epochs', '2', '--resume', 'auto'])[0] == 1
    for path in (tmp_path / 'run').rglob('*.safetensors'):
        path.write_bytes(attack)
    assert train([*arguments, '--schedule.epochs', '2', '--resume', 'auto'])[0] == 1


def test_a_refusal_names_what_is_in_the_way(marker, tmp_path):
    (tmp_path / 'attack.pth').write_bytes(malicious(marker, {})['reduce'])
    with pytest.raises(WeightsError) as raised:
        convert(str(tmp_path / 'attack.pth'), NAME, tmp_path / 'out')
    assert 'beside tensors it holds objects, and reading those could run any code: ' in str(raised.value)
    assert 'open' in str(raised.value) and 'weights_only' not in str(raised.value)


def test_harmless_settings_beside_the_weights_are_read(tmp_path):
    import argparse

    settings = argparse.Namespace(model=NAME, lr=0.1)
    (tmp_path / 'timm.pth').write_bytes(pickled({'state_dict': weights(), 'args': settings, 'arch': NAME}))
    convert(str(tmp_path / 'timm.pth'), NAME, tmp_path / 'out')


def test_no_code_loads_pickles():
    """Neither by pickle's name, nor by torch.load without its guard, nor by accelerate's custom states."""
    sources = [*Path(dcnzoo.__file__).parent.rglob('*.py')]
    for path in sources:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {'pickle', 'dill', 'joblib', 'cloudpickle'} & set(names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert node.func.attr != 'register_for_checkpointing', f'{path}: accelerate unpickles such states'
                if called.endswith('torch.load'):
                    assert keywords.get('weights_only') == 'True', path
                assert not (called.endswith('np.load') and keywords.get('allow_pickle') == 'True'), path
