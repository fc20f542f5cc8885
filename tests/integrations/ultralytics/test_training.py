"""Real trainings, on photos where they are at hand: from the first step to the exported file."""

import copy
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.nn import tasks

from dcnzoo.integrations.ultralytics import BLOCKS, blocks, model_config

from .conftest import SETTINGS
from .distributed import TwoOnCPU
from .test_configs import PAIRS
from .test_registration import PATCHED, write_patched

README = Path(__file__).parents[3] / 'README.md'
QUICK = [('yolo11', 'c3k2-dcnv4'), ('yolov8', 'dynamicconv')]
ALL = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]


@pytest.fixture(scope='module')
def trained(train):
    """Each variant, trained once, with an interruption."""
    models = {}

    def trained(family, variant):
        if (family, variant) not in models:
            models[family, variant] = train(model_config(f'{family}n', variant), interrupt=True)
        return models[family, variant]

    return trained


@pytest.mark.parametrize('family, variant', ALL)
def test_trains_validates_saves_resumes_and_predicts(family, variant, trained):
    model = trained(family, variant)
    before, after, resumed, _, end = model.losses
    assert resumed == pytest.approx(after, rel=0.02)  # checkpoints are kept in half, and of averaged weights
    assert end < resumed
    assert after < before
    lines = (model.trainer.save_dir / 'results.csv').read_text().splitlines()
    assert [line.split(',')[0].strip() for line in lines] == ['epoch', '1', '2', '3']
    metrics = model.metrics.results_dict
    assert all(np.isfinite(value) for value in metrics.values())

    assert model.trainer.best.is_file()
    saved = YOLO(model.trainer.last)
    assert sum(p.numel() for p in saved.model.parameters()) == sum(
        p.numel() for p in tasks.DetectionModel(saved.model.yaml, verbose=False).parameters()
    )
    rng = np.random.default_rng(0)
    wide, high = (Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 100), (90, 50)))
    results = saved.predict([wide, high], imgsz=96, conf=0.0, device='cpu', verbose=False)
    assert [result.orig_shape for result in results] == [(40, 100), (90, 50)]
    (result,) = saved.predict(wide, imgsz=(32, 96), conf=0.0, device='cpu', verbose=False)
    assert len(result.boxes)
    assert torch.isfinite(result.boxes.data).all()


@pytest.mark.parametrize('family, variant', ALL)
def test_exports_compute_the_same(family, variant, trained):
    model = YOLO(trained(family, variant).trainer.last)
    torch.manual_seed(0)
    for module in model.model.modules():
        if isinstance(module, blocks.DCNv4):  # a short training leaves the offsets next to zero
            # Most of it in the bias: masks that grow with the map make a network in which rounding errors grow too.
            torch.nn.init.normal_(module.offset_mask.weight, std=0.02)
            torch.nn.init.normal_(module.offset_mask.bias, std=0.5)
    plain = copy.deepcopy(model.model).float().eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = plain(x)[0]
        fused = plain.fuse(verbose=False)(x)[0]
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-3)

    exported = model.export(format='onnx', imgsz=(64, 96), simplify=False, device='cpu')
    session = onnxruntime.InferenceSession(exported, providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {'images': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-3)

    exported = model.export(format='torchscript', imgsz=(64, 96), device='cpu')
    torch.testing.assert_close(torch.jit.load(exported)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not README.is_file(), reason='needs the source tree')
def test_the_readme_shows_what_runs(images, tmp_path, monkeypatch):
    examples = re.findall(r'^```py\n(.*?)^```$', README.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
    (code,) = (example for example in examples if 'ultralytics' in example)
    shown = "data='coco8.yaml', epochs=100"
    assert shown in code
    YOLO('yolo11n.yaml').save(tmp_path / 'yolo11n.pt')
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, 'data': images(), 'epochs': 1, 'fraction': 0.2, 'project': str(tmp_path / 'runs')}
    exec(code.replace(shown, '**settings'), {'settings': settings})
    assert list(tmp_path.rglob('best.pt'))


def test_timm_backbone_trains_and_exports(train):
    model = train(model_config('yolo11n', backbone='test_dcnv4'), epochs=3)
    start, before, _, after = model.losses
    assert after < before
    assert after < start
    saved = YOLO(model.trainer.last)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = copy.deepcopy(saved.model).float().eval()(x)[0]
    exported = saved.export(format='onnx', imgsz=(64, 96), simplify=False, device='cpu')
    (out,) = onnxruntime.InferenceSession(exported).run(None, {'images': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, suffix', (('segment', '-seg'), ('pose', '-pose'), ('obb', '-obb'), ('classify', '-cls'))
)
@pytest.mark.parametrize('family, variant', QUICK)
def test_other_tasks_train_and_export(family, variant, task, suffix, train):
    # Classes are colours, which the usual augmentation changes.
    plain = {'auto_augment': None, 'erasing': 0.0, 'hsv_h': 0.0, 'hsv_s': 0.0, 'hsv_v': 0.0}
    settings = plain if task == 'classify' else {}
    model = train(model_config(f'{family}n{suffix}', variant), task, epochs=3, **settings)
    before, *_, after = model.losses
    assert after < before
    saved = YOLO(model.trainer.last)
    assert saved.task == task
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(saved.model).float().eval()(x)[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    exported = saved.export(format='onnx', imgsz=64, simplify=False, device='cpu')
    out = onnxruntime.InferenceSession(exported).run(None, {'images': x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('name', PATCHED)
def test_yaml_files_for_hand_patched_copies_train(name, images, fresh, tmp_path):
    """In five lines, and where ultralytics loads no classes but those that it has been told of."""
    path, _ = write_patched(name, tmp_path)
    settings = {**SETTINGS, 'epochs': 1, 'fraction': 0.2, 'project': str(tmp_path), 'name': 'run'}
    script = f"""if True:
        import dcnzoo.integrations.ultralytics
        from ultralytics import YOLO
        model = YOLO({str(path)!r})
        model.train(data={images()!r}, **{settings})
        print(YOLO(model.trainer.best).task)
    """
    assert fresh(script, ULTRALYTICS_SAFE_LOAD='1').split()[-1] == 'detect'


@pytest.mark.slow
@pytest.mark.parametrize('family, variant', QUICK)
def test_two_processes_train_together(family, variant, images, tmp_path):
    overrides = {**SETTINGS, 'epochs': 1, 'data': images(), 'project': str(tmp_path), 'name': 'run'}
    trainer = TwoOnCPU(overrides={'model': str(model_config(f'{family}n', variant)), **overrides})
    trainer.train()
    first, second = (float((trainer.save_dir / f'rank{rank}').read_text()) for rank in (0, 1))
    assert first == second
    found = {type(module) for module in YOLO(trainer.last).model.model}
    assert found & set(BLOCKS.values())
