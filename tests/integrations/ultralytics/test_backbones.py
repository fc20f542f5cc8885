"""timm backbones within ultralytics: what they compute there, and when their published weights are fetched."""

import copy

import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import timm
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks

from dcnzoo.integrations.ultralytics import adopt, model_config


@pytest.fixture
def fetched(monkeypatch):
    """The names of the models whose published weights were asked for; ones stand for those weights."""
    names = []
    create = timm.create_model

    def create_model(name, pretrained=False, **options):
        model = create(name, **options)
        if pretrained:
            names.append(name)
            for parameter in model.parameters():
                nn.init.ones_(parameter)
        return model

    monkeypatch.setattr(timm, 'create_model', create_model)
    return names


def all_ones(model):
    return all(bool((parameter == 1).all()) for parameter in model.model[0].parameters())


@pytest.mark.parametrize('name', ('resnet10t', 'test_parameternet'))
def test_computes_what_the_model_of_timm_does(name, tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1)).eval()
    for buffer in (buffer for key, buffer in theirs.named_buffers() if key.endswith('running_var')):
        buffer.mul_(1e-3)  # so small that eps tells
    ours = YOLO(model_config('yolo11n', backbone=name)).model.eval()
    ours.model[0].m.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 64, 64)
    normalised = (x - ours.model[0].mean) / ours.model[0].std
    with torch.no_grad():
        expected = theirs(normalised)
        torch.save({'model': ours}, tmp_path / 'ours.pt')
        for model in (ours, copy.deepcopy(ours), YOLO(tmp_path / 'ours.pt').model):
            torch.testing.assert_close(model.model[0](x), expected, rtol=0, atol=0)
    assert ours.model[-1].cv2[0][0].bn.eps == 1e-3  # the others are as ultralytics wants them


def test_a_configuration_fetches_published_weights(fetched):
    model = YOLO(model_config('yolo11n', backbone='test_dcnv4', pretrained=True))
    assert fetched == ['test_dcnv4']
    assert all_ones(model.model)
    assert all_ones(tasks.DetectionModel(model.model.yaml, verbose=False))  # as a trainer makes it anew


def test_a_copy_fetches_published_weights_as_the_original_does(fetched):
    model = copy.deepcopy(YOLO(model_config('yolo11n', backbone='test_dcnv4', pretrained=True)))
    for copied in (model.model, copy.deepcopy(model.model)):
        assert all_ones(copied)
        assert all_ones(tasks.DetectionModel(copied.yaml, verbose=False))


def test_a_checkpoint_has_its_weights(fetched, tmp_path, train):
    path = tmp_path / 'mine.pt'
    YOLO(model_config('yolo11n', backbone='test_dcnv4', pretrained=True)).save(path)
    fetched.clear()
    model = YOLO(path)
    assert all_ones(model.model)
    tasks.DetectionModel(model.model.yaml, verbose=False)
    assert all_ones(adopt(path, tmp_path / 'adopted.pt'))
    trained = train(path, interrupt=True, fraction=0.1, lr0=0.0, weight_decay=0.0, val=False)
    assert all_ones(trained.model)
    assert fetched == []


def test_a_model_without_a_configuration_is_copied():
    model = tasks.BaseModel()
    config = copy.deepcopy(model_config('yolo11n', backbone='test_dcnv4'))
    model.model, _ = tasks.parse_model(config, ch=3, verbose=False)
    assert len(copy.deepcopy(model).state_dict()) == len(model.state_dict())


def test_a_checkpoint_has_its_weights_where_nobody_has_imported_dcnzoo(fetched, tmp_path, fresh):
    YOLO(model_config('yolo11n', backbone='test_dcnv4', pretrained=True)).save(tmp_path / 'mine.pt')
    code = """if True:
        import sys
        from ultralytics import YOLO
        from ultralytics.nn import tasks
        print(type(tasks.DetectionModel(YOLO(sys.argv[1]).model.yaml, verbose=False).model[0]).__name__)
    """
    assert fresh(code, tmp_path / 'mine.pt').split()[-1] == 'TimmBackbone'
