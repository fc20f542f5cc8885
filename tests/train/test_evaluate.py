"""--eval: the weights of a run or of a model, per class, on real labels, on several processes."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcnzoo.train.arguments import parse
from dcnzoo.train.errors import TrainError
from dcnzoo.train.evaluate import PerClass, RealLabels
from dcnzoo.train.main import evaluate

from .conftest import CLASSES, forget_accelerator
from .ranks import Ranks


def test_eval(photos, trained, tmp_path, train):
    """The best weights of a run, on whatever split; the figures are those of its summary, and add up per class."""
    summary = json.loads((trained / 'summary.json').read_text())
    output = tmp_path / 'run'
    status, text, errors = train(['--resume', trained, '--eval', '--run.output', output])
    assert (status, errors) == (0, [])
    metrics = json.loads((output / 'eval' / 'eval.json').read_text())
    assert metrics == pytest.approx({key: summary[key] for key in ('val_loss', 'val_top1', 'val_top5')}, abs=1e-3)
    with (output / 'eval' / 'per_class.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == list(CLASSES)
    assert [row['images'] for row in rows] == ['5', '5', '5']
    assert sum(float(row['top1']) for row in rows) / 3 == pytest.approx(metrics['val_top1'], abs=0.01)
    assert Image.open(output / 'eval' / 'confusion.png').size[0] > 300
    assert 'img/s' in text
    assert {path.name for path in output.iterdir()} == {'eval'}


def test_eval_on_two_ranks(trained, tmp_path):
    """15 images in batches of 4 and shares that differ: each counts once, in all figures and on real labels too."""
    labels = tmp_path / 'real.json'
    labels.write_text(json.dumps([[number // 5] for number in range(15)]))
    root = tmp_path / 'photos'
    for number, file in enumerate(sorted((Path(parse(['--resume', str(trained)]).data.root) / 'val').rglob('*.jpg'))):
        copy = root / 'val' / file.parent.name / f'ILSVRC2012_val_{number + 1:08d}.JPEG'
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    shutil.copytree(root / 'val', root / 'train')
    output = tmp_path / 'run'
    arguments = ['--resume', trained, '--eval', '--run.output', output, '--data.root', root, '--data.batch_size', 4]
    ranks = Ranks(tmp_path / 'logs', 2, [*arguments, '--data.real_labels', labels])
    assert ranks.wait() == [0, 0], ranks.text()
    summary = json.loads((trained / 'summary.json').read_text())
    metrics = json.loads((output / 'eval' / 'eval.json').read_text())
    assert metrics.pop('real_top1') == pytest.approx(summary['val_top1'])
    assert metrics == pytest.approx({key: summary[key] for key in ('val_loss', 'val_top1', 'val_top5')}, abs=1e-3)
    with (output / 'eval' / 'per_class.csv').open() as file:
        assert [row['images'] for row in csv.DictReader(file)] == ['5', '5', '5']


def test_counts_per_class():
    evaluator = PerClass(3, torch.device('cpu'))
    evaluator.update(torch.tensor([[9.0, 1, 0], [9.0, 1, 0], [0, 1.0, 9]]), torch.tensor([0, 1, 2]))

    class One:
        @staticmethod
        def reduce(tensor, how):
            return tensor

    per_class, confusion = evaluator.gather(One)
    assert per_class == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_real_labels(own_photos, trained, tmp_path, train):
    """Images with several labels or none, named as those of ImageNet."""
    files = sorted((own_photos / 'val').rglob('*.jpg'))
    for number, file in enumerate(files):
        file.rename(file.with_name(f'ILSVRC2012_val_{number + 1:08d}.JPEG'))
    labels = [[number // 5] for number in range(15)]
    labels[0], labels[1] = [], [1, 2]  # not judged, and wrong
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    arguments = ['--resume', trained, '--eval', '--run.output', tmp_path / 'run', '--data.root', own_photos]
    status, _, errors = train([*arguments, '--data.real_labels', tmp_path / 'real.json'])
    assert (status, errors) == (0, [])
    metrics = json.loads((tmp_path / 'run' / 'eval' / 'eval.json').read_text())
    right = round(metrics['val_top1'] * 15 / 100)
    assert metrics['val_top1'] == 100
    assert metrics['real_top1'] == pytest.approx(100 * (right - 2) / 14)
    with pytest.raises(TrainError, match=r"data\.real_labels 'imagenet' does not fit the validation images"):
        RealLabels('imagenet', ['a.jpg'])


def test_function_for_python(trained, tmp_path):
    """`evaluate` returns what it writes."""
    forget_accelerator()
    metrics = evaluate(parse(['--resume', str(trained), '--eval', '--run.output', str(tmp_path / 'run')]))
    assert metrics == json.loads((tmp_path / 'run' / 'eval' / 'eval.json').read_text())
