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
from ultralytics.utils import DEFAULT_CFG

from dcnzoo.integrations.ultralytics import blocks, model_config

from .conftest import SETTINGS
from .test_configs import PAIRS

README = Path(__file__).parents[3] / 'README.md'
QUICK = [('yolo11', 'c3k2-dcnv4'), ('yolov8', 'dynamicconv')]
ALL = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]


@pytest.fixture(scope='module')
def trained(train):
    """Each variant, trained once."""
    models = {}

    def trained(family, variant):
        if (family, variant) not in models:
            models[family, variant] = train(model_config(f'{family}n', variant))
        return models[family, variant]

    return trained


@pytest.mark.parametrize('family, variant', ALL)
def test_trains_validates_saves_and_predicts(family, variant, trained, tmp_path):
    model = trained(family, variant)
    before, after = model.losses
    assert after < before
    metrics = model.metrics.results_dict
    assert all(np.isfinite(value) for value in metrics.values())

    assert model.trainer.best.is_file()
    saved = YOLO(model.trainer.last)
    assert sum(p.numel() for p in saved.model.parameters()) == sum(
        p.numel() for p in tasks.DetectionModel(saved.model.yaml, verbose=False).parameters()
    )
    rng = np.random.default_rng(0)
    wide, high = (Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 100), (90, 50)))
    results = saved.predict([wide, high], imgsz=96, conf=0.0001, device='cpu', verbose=False)
    assert [result.orig_shape for result in results] == [(40, 100), (90, 50)]
    (result,) = saved.predict(wide, imgsz=(32, 96), conf=0.0001, device='cpu', verbose=False)
    assert len(result.boxes)
    assert torch.isfinite(result.boxes.data).all()


@pytest.mark.parametrize('family, variant', ALL)
def test_exports_compute_the_same(family, variant, trained):
    model = YOLO(trained(family, variant).trainer.last)
    torch.manual_seed(0)
    for module in model.model.modules():
        if isinstance(module, blocks.DCNv4):  # a short training leaves the offsets next to zero
            torch.nn.init.normal_(module.offset_mask.weight, std=0.3)
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


def test_goes_on_after_an_interruption_and_from_weights(train, images, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(trainer):
        raise Interrupted

    model = YOLO(model_config('yolo11n', 'dynamicconv'))
    model.add_callback('on_model_save', interrupt)
    settings = {**SETTINGS, 'data': images(), 'fraction': 0.3, 'project': str(tmp_path), 'val': False}
    with pytest.raises(Interrupted):
        model.train(**settings, epochs=2, name='run')
    last = tmp_path / 'run' / 'weights' / 'last.pt'

    resumed = YOLO(last)
    resumed.train(resume=True)
    epochs = [line.split(',')[0].strip() for line in (tmp_path / 'run' / 'results.csv').read_text().splitlines()[1:]]
    assert epochs[-1] == '2'

    tuned = YOLO(last)
    tuned.train(**settings, epochs=1, name='tuned')
    assert type(tuned.model.model[1]) is blocks.DynamicConv


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
    model = train(model_config('yolo11n', backbone='test_dcnv4'))
    before, after = model.losses
    assert after < before
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
    # Classes are colours, which the usual augmentation changes, and the first steps overshoot.
    plain = {'epochs': 4, 'lr0': 5e-4, 'auto_augment': None, 'erasing': 0.0, 'hsv_h': 0.0, 'hsv_s': 0.0, 'hsv_v': 0.0}
    settings = plain if task == 'classify' else {}
    model = train(model_config(f'{family}n{suffix}', variant), task, **settings)
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


def _losses_of_two(rank, config, file, results):
    """One of two processes: three steps of plain SGD on other images each; returns a checksum of its weights."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tasks.DetectionModel(config, verbose=False)
    model.args = DEFAULT_CFG
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(1 + rank)
    for _ in range(3):
        batch = {
            'img': torch.rand(2, 3, 64, 64),
            'cls': torch.zeros(2, 1),
            'bboxes': torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.4, 0.6, 0.3, 0.5]]),
            'batch_idx': torch.tensor([0.0, 1.0]),
        }
        loss, _ = parallel(batch)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    results[rank] = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('family, variant', QUICK)
def test_two_processes_agree(family, variant, tmp_path):
    """Every parameter takes part, or the second step would fail; ultralytics itself starts no processes on CPUs."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        config = dict(model_config(f'{family}n', variant, nc=1))
        torch.multiprocessing.spawn(_losses_of_two, (config, str(tmp_path / 'meeting'), results), nprocs=2)
        assert results[0] == results[1]
