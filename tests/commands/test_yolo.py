"""The `dcnzoo-yolo` command, in this process."""

import re

import pytest
import torch
from PIL import Image

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

from ultralytics import YOLO

from dcnzoo.commands.yolo import main
from dcnzoo.integrations.ultralytics import model_config

from ..integrations.ultralytics import data


@pytest.fixture
def yolo(capfd):
    """Runs the command; returns its exit code, standard output and the last line of standard error."""

    def run(*arguments):
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        output = capfd.readouterr()
        assert 'Traceback' not in output.out + output.err
        return code, output.out, output.err.splitlines()[-1] if output.err else ''

    return run


def test_trains_validates_predicts_and_exports(yolo, tmp_path):
    images = data.make(tmp_path / 'images', 'detect', train=8, val=4)
    common = 'imgsz=64', 'device=cpu', 'workers=0', f'project={tmp_path}', 'plots=False', f'data={images}'
    code, _, error = yolo('train', 'model=yolo11n-c3k2-dynamicconv', 'epochs=1', 'batch=4', 'name=run', *common)
    assert code == 0, error
    (weights,) = tmp_path.rglob('best.pt')
    assert type(YOLO(weights).model.model[2]).__name__ == 'C3k2_DynamicConv'
    assert yolo('val', f'model={weights}', 'name=val', *common)[0] == 0
    Image.new('RGB', (90, 50)).save(tmp_path / 'image.jpg')
    source = f'source={tmp_path / "image.jpg"}'
    code, _, _ = yolo('predict', f'model={weights}', source, 'imgsz=64', 'device=cpu', f'project={tmp_path}')
    assert code == 0
    assert [path for path in tmp_path.rglob('image.jpg') if path.parent != tmp_path]
    assert yolo('export', f'model={weights}', 'format=torchscript', 'imgsz=64', 'device=cpu')[0] == 0
    assert weights.with_suffix('.torchscript').is_file()


@pytest.mark.parametrize(
    'base, expected',
    (
        (
            'yolov8',
            {
                'yolov8n': ('3.16', '8.7'),
                'yolov8x': ('68.23', '257.8'),
                'yolov8n-dynamicconv': ('4.89', '8.7'),
                'yolov8n-dcnv4-backbone': ('3.01', '8.5'),
            },
        ),
        (
            'yolo11',
            {
                'yolo11n': ('2.62', '6.5'),
                'yolo11n-dynamicconv': ('4.63', '6.5'),
                'yolo11n-c3k2-dcnv4': ('2.58', '6.9'),
            },
        ),
    ),
)
def test_models(base, expected, yolo):
    code, out, _ = yolo('models', base)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:2] == ['model', 'params']
    names = [row[0] for row in rows[1:]]
    assert len(names) == len(set(names)) == 5 * 6
    assert {row[0]: (row[1], row[2]) for row in rows[1:] if row[0] in expected} == expected


def test_gflops_of_the_stock_model_are_those_of_ultralytics():
    from dcnzoo.commands.yolo import describe

    params, macs = describe(model_config('yolov8n'), 640)
    assert params == 3_157_200
    assert 2 * macs / 1e9 == pytest.approx(8.7, abs=0.1)


def test_adopt(yolo, tmp_path):
    YOLO(model_config('yolov8n', 'dcnv4-head', nc=3)).save(tmp_path / 'old.pt')
    code, out, _ = yolo('adopt', tmp_path / 'old.pt')
    assert code == 0
    assert re.search(r'old-dcnzoo\.pt: detect, 3 classes, all \d+ tensors of .*old\.pt', out)
    assert torch.load(tmp_path / 'old-dcnzoo.pt', weights_only=False)['model'].yaml['nc'] == 3


@pytest.mark.parametrize(
    'arguments, code, message',
    (
        (('train', 'model=yolo11n-c3k2-dcnv5', 'data=x.yaml'), 1, "got 'c3k2-dcnv5'; did you mean c3k2-dcnv4"),
        (('train', 'model=yolo11q-dcnv4-head'), 1, "base must be .*, got 'yolo11q'; did you mean yolo11"),
        (('val', 'model=yolo11n-dcnv4-head.pt', 'data=x.yaml'), 1, r'model: there is no file yolo11n-dcnv4-head\.pt'),
        (('predict', 'model=runs/none.pt', 'source=x.jpg'), 1, r'model: there is no file runs/none\.pt'),
        (('train', 'model=yolov8n-c3k2-dcnv4'), 1, 'yolov8n has no C3k2 to replace'),
        (('train', 'modle=x'), 1, 'modle'),
        (('models', 'yolov9'), 1, "base must be one of yolo11, .*, got 'yolov9'"),
        (('models', '--imgsz', '50'), 1, '--imgsz must be a positive multiple of 32, got 50'),
        (('adopt', 'missing.pt'), 1, 'missing.pt: No such file'),
        (('adopt', 'missing.pt', '--rename', 'a'), 1, '--rename takes OLD=NEW, got a'),
        (('adopt',), 2, 'the following arguments are required: OLD.pt'),
    ),
)
def test_errors_are_one_line(arguments, code, message, yolo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, error = yolo(*arguments)
    assert found == code
    assert re.search(message, error), error
    assert error.startswith('dcnzoo-yolo')


def test_help_lists_both_kinds_of_commands(yolo):
    for arguments in ((), ('--help',)):
        code, out, _ = yolo(*arguments)
        assert code == 0
        assert 'dcnzoo-yolo adopt OLD.pt' in out
