"""Checkpoints such as hand-patched copies of ultralytics leave: same keys, classes that exist nowhere."""

import copy
import os
import pickle
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from dcnzoo.integrations.ultralytics import adopt, model_config

from .hand_patched import PATCHES

PLACES = {
    'C2f_DCNv4': 'ultralytics.nn.modules.dcnv4_block',
    'DCNv4': 'ultralytics.nn.Addmodules.DCNv4',
    'Bottleneck_DCNv4': 'ultralytics.nn.Addmodules.DCNv4',
    'DynamicConv': 'ultralytics.nn.Addmodules.DynamicConv',
    'CondConv2d': 'ultralytics.nn.Addmodules.DynamicConv',
    'C3k2_DynamicConv': 'ultralytics.nn.Addmodules.DynamicConv',
    'C3k_DynamicConv': 'ultralytics.nn.Addmodules.DynamicConv',
    'Bottleneck_DynamicConv': 'ultralytics.nn.Addmodules.DynamicConv',
}


@pytest.fixture
def hand_patched(tmp_path, monkeypatch):
    """Saves a model as if its classes lived in files added to ultralytics, which afterwards are gone."""

    def hand_patched(base, variant, name='old.pt', change=lambda model: None):
        torch.manual_seed(0)
        model = tasks.DetectionModel(dict(model_config(base, variant, nc=3)), verbose=False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        model.names = {0: 'ant', 1: 'bee', 2: 'cat'}
        model.args = {'imgsz': 320, 'model': 'patched.yaml'}
        model.eval()
        patched = copy.deepcopy(model)
        change(patched)
        for module in patched.modules():
            place = PLACES.get(type(module).__name__)
            if place:
                module.__class__ = imitation(place, type(module).__name__)
        train_args = {'imgsz': 320, 'data': 'mine.yaml', 'of_another_version': 1}
        path = tmp_path / name
        torch.save({'epoch': -1, 'model': patched.half(), 'ema': None, 'train_args': train_args}, path)
        return path, model

    def imitation(place, name):
        module = sys.modules.get(place) or types.ModuleType(place)
        monkeypatch.setitem(sys.modules, place, module)
        if not hasattr(module, name):
            setattr(module, name, type(name, (nn.Module,), {'__module__': place, '__qualname__': name}))
        return getattr(module, name)

    yield hand_patched


@pytest.fixture
def without_patches(monkeypatch):
    def forget():
        for place in set(PLACES.values()):
            monkeypatch.delitem(sys.modules, place, raising=False)

    return forget


@pytest.mark.parametrize(
    'base, variant', (('yolov8n', 'dcnv4-backbone'), ('yolo11n', 'c3k2-dynamicconv'), ('yolov8n', 'dynamicconv'))
)
def test_adopts(base, variant, hand_patched, without_patches, tmp_path):
    old, model = hand_patched(base, variant)
    without_patches()
    with pytest.raises((ImportError, AttributeError, TypeError)):
        YOLO(old)
    adopt(old, tmp_path / 'new.pt')
    loaded = YOLO(tmp_path / 'new.pt')
    assert loaded.names == {0: 'ant', 1: 'bee', 2: 'cat'}
    assert loaded.task == 'detect'
    assert loaded.model.args['imgsz'] == 320
    assert loaded.model.args['data'] == 'mine.yaml'
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = (m.half().float().eval()(x)[0] for m in (model, loaded.model))
    torch.testing.assert_close(found, expected)
    assert sorted(path.name for path in tmp_path.glob('*.pt*')) == ['new.pt', 'old.pt']


@pytest.fixture(scope='module')
def written_anew(fresh, tmp_path_factory):
    """The folder of checkpoints whose blocks have no code in common with ours."""
    folder = tmp_path_factory.mktemp('written_anew')
    fresh(Path(__file__).with_name('hand_patched.py').read_text(encoding='utf-8'), folder)
    return folder


@pytest.mark.parametrize('name', PATCHES)
def test_computes_what_blocks_written_anew_do(name, written_anew, tmp_path):
    x, expected = torch.load(written_anew / f'{name}.answer.pt')
    with pytest.raises((ImportError, AttributeError, TypeError)):
        YOLO(written_anew / f'{name}.pt')
    adopted = adopt(written_anew / f'{name}.pt', tmp_path / 'new.pt')
    for model in (adopted, YOLO(tmp_path / 'new.pt').model):
        with torch.no_grad():
            torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_other_names_and_shapes_of_the_experts(hand_patched, without_patches, tmp_path):
    """Some keep the experts as (E, Cout, C, kh, kw), and call the blocks otherwise."""

    def change(model):
        for row in model.yaml['backbone'] + model.yaml['head']:
            row[2] = row[2].replace('DynamicConv', 'DyConv')
        for module in model.modules():
            if type(module).__name__ == 'CondConv2d':
                module.weight = nn.Parameter(module.weight.view(module.num_experts, *module.weight_shape))

    old, model = hand_patched('yolo11n', 'dynamicconv', change=change)
    without_patches()
    with pytest.raises(ValueError, match="there is no block 'DyConv'"):
        adopt(old, tmp_path / 'new.pt')
    adopted = adopt(old, tmp_path / 'new.pt', rename={'DyConv': 'DynamicConv'})
    expected = model.half().float().state_dict()  # checkpoints are saved in half
    torch.testing.assert_close(dict(adopted.state_dict()), dict(expected))


def test_tensors_that_do_not_fit(hand_patched, without_patches, tmp_path):
    def lose(model):
        del model.model[4].cv2.bn

    def grow(model):
        model.model[4].cv2.bn = nn.BatchNorm2d(7)

    for change, message in (
        (
            lose,
            r'0 of .* have no place in the model, 4 of its own are missing; the first: model.4.cv2.bn.weight',
        ),
        (grow, r'4 of \d+ tensors do not fit: size mismatch for model.4.cv2.bn.weight'),
    ):
        old, _ = hand_patched('yolov8n', 'dcnv4-backbone', change=change)
        without_patches()
        with pytest.raises(ValueError, match=message):
            adopt(old, tmp_path / 'new.pt')
    assert not (tmp_path / 'new.pt').exists()


class Malicious:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def test_code_in_a_checkpoint_does_not_run(hand_patched, without_patches, tmp_path):
    trap = tmp_path / 'trap'
    for function, arguments in ((os.system, (f'touch {trap}',)), (exec, (f'open({str(trap)!r}, "w")',))):
        old, _ = hand_patched('yolov8n', 'dcnv4-backbone')
        content = torch.load(old, weights_only=False)
        torch.save({**content, 'extra': Malicious(function, *arguments)}, old)
        without_patches()
        try:
            adopt(old, tmp_path / f'{function.__name__}.pt')
        except ValueError as error:
            assert 'cannot be read as a checkpoint' in str(error)
        assert not trap.exists()
    assert not (tmp_path / 'system.pt').exists()  # refused as a whole
    assert (tmp_path / 'exec.pt').exists()  # read without it


def test_a_configuration_does_not_run_either(hand_patched, without_patches, tmp_path, monkeypatch):
    """ultralytics evaluates a configuration's activation, and resolves names of whole models with their own."""
    monkeypatch.setattr(tasks, 'OfAnother', type('OfAnother', (nn.Module,), {}), raising=False)
    trap = tmp_path / 'trap'
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    nested = {'nc': 1, 'activation': code, 'backbone': [], 'head': [[-1, 1, 'Detect', ['nc']]]}
    for change, message in (
        ({'activation': code}, 'its activation must be a call such as nn.SiLU'),
        ({'activation': f'nn.SiLU({code})'}, 'its activation must be a call such as nn.SiLU'),
        ({'activation': code.encode()}, 'TypeError'),
        ({'head': [[-1, 1, 'DetectionModel', [nested]]]}, "there is no block 'DetectionModel'"),
        ({'head': [[-1, 1, 'OfAnother', [code]]]}, 'OfAnother is no layer'),
        ({'head': [[-1, 1, 'nn.Identity']]}, 'not enough values to unpack'),
        ({'head': None}, 'TypeError'),
    ):
        old, _ = hand_patched('yolov8n', 'dynamicconv', change=lambda model: model.yaml.update(change))  # noqa: B023
        without_patches()
        with pytest.raises(ValueError, match=f'has a model that cannot be rebuilt: {message}'):
            adopt(old, tmp_path / 'new.pt')
    assert not trap.exists()
    old, _ = hand_patched(
        'yolov8n', 'dynamicconv', change=lambda model: model.yaml.update(activation='torch.nn.LeakyReLU(0.1)')
    )
    without_patches()
    assert isinstance(adopt(old, tmp_path / 'new.pt').model[0].act, nn.LeakyReLU)


def test_what_is_not_plain_is_left_out(hand_patched, without_patches, tmp_path):
    old, _ = hand_patched('yolov8n', 'dynamicconv')
    content = torch.load(old, weights_only=False)
    content['train_args'] |= {'project': tmp_path, 'classes': [tmp_path], 'freeze': [1, 2]}
    torch.save(content, old)
    without_patches()
    adopted = adopt(old, tmp_path / 'new.pt')
    assert adopted.args == {'imgsz': 320, 'data': 'mine.yaml', 'freeze': [1, 2], 'task': 'detect'}
    assert torch.load(tmp_path / 'new.pt', weights_only=False)['train_args'] == adopted.args


def test_other_models_and_damaged_files(hand_patched, without_patches, tmp_path):
    old, _ = hand_patched('yolov8n', 'dynamicconv', change=lambda model: setattr(model, '__class__', tasks.WorldModel))
    without_patches()
    with pytest.raises(ValueError, match=r'old\.pt has a WorldModel, not one of DetectionModel, '):
        adopt(old, tmp_path / 'new.pt')
    whole = old.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 30):
        old.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'old\.pt cannot be read as a checkpoint'):
            adopt(old, tmp_path / 'new.pt')
    assert [path.name for path in tmp_path.iterdir()] == ['old.pt']


def test_what_is_no_checkpoint(tmp_path):
    new = tmp_path / 'new.pt'
    text, weights, pickled = (tmp_path / name for name in ('text.pt', 'weights.pt', 'pickled.pt'))
    text.write_text('not a checkpoint')
    torch.save({'model': {'weight': torch.zeros(2)}}, weights)
    pickled.write_bytes(pickle.dumps({'model': 1}))
    for path in (text, pickled):
        with pytest.raises(ValueError, match=f'{path.name} cannot be read as a checkpoint'):
            adopt(path, new)
    with pytest.raises(ValueError, match='has no whole model with its YAML'):
        adopt(weights, new)
    with pytest.raises(FileNotFoundError):
        adopt(tmp_path / 'missing.pt', new)
    new.touch()
    with pytest.raises(FileExistsError, match=r'new\.pt exists'):
        adopt(weights, new)
