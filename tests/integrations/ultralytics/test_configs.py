"""Configurations: exact sizes, every base and scale, and what is refused."""

import copy
import pickle
from pathlib import Path

import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import torch
import yaml
from ultralytics import YOLO
from ultralytics.nn import tasks

from dcnzoo.integrations.ultralytics import BLOCKS, VARIANTS, ModelConfig, blocks, configs, model_config

TASKS = {
    '': tasks.DetectionModel,
    '-seg': tasks.SegmentationModel,
    '-pose': tasks.PoseModel,
    '-obb': tasks.OBBModel,
    '-cls': tasks.ClassificationModel,
}
NAMES = {'': 'detect', '-seg': 'segment', '-pose': 'pose', '-obb': 'obb', '-cls': 'classify'}
PAIRS = [
    (family, variant)
    for family in ('yolov8', 'yolo11')
    for variant, described in VARIANTS.items()
    if {'yolov8': 'C2f', 'yolo11': 'C3k2'}[family] in described.blocks or 'Conv' in described.blocks
]


def on_meta(config):
    """A model as parsed, without memory, and its output's shapes at 64 pixels."""
    model = tasks.BaseModel()
    with torch.device('meta'):
        model.model, model.save = tasks.parse_model(copy.deepcopy(config), ch=3, verbose=False)
    outputs = model(torch.empty(2, 3, 64, 64, device='meta'))
    return model, outputs


def blocks_of(config):
    return [row.module for row in configs.rows(config) if row.module in BLOCKS]


@pytest.mark.parametrize(
    'base, variant, nc, parameters',
    (
        ('yolov8n', 'dcnv4-backbone', None, 3_007_232),
        ('yolov8n', 'dcnv4-head', None, 3_010_704),
        ('yolov8n', 'dynamicconv', None, 4_885_608),
        ('yolov8n', 'c2f-dynamicconv', None, 2_331_328),
        ('yolo11n', 'c3k2-dynamicconv', 25, 3_234_759),
        ('yolo11n', 'dynamicconv', 25, 4_599_987),
    ),
)
def test_parameters_are_those_of_the_models_that_circulate(base, variant, nc, parameters):
    model, _ = on_meta(model_config(base, variant, nc))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize('family, variant', PAIRS)
def test_smallest_and_largest_scale(family, variant):
    for scale in 'nx':
        config = model_config(f'{family}{scale}', variant)
        model, outputs = on_meta(config)
        assert {type(module) for module in model.model} & set(BLOCKS.values())
        maps = outputs if isinstance(outputs, list) else outputs['feats']
        assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4), (2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize('family, variant', PAIRS)
def test_every_scale_of_every_task_runs(family, variant):
    for suffix, build in TASKS.items():
        for scale in 'nsmlx' if not suffix else 'n':
            try:
                config = model_config(f'{family}{scale}{suffix}', variant)
            except ValueError:
                assert (variant, suffix) == ('dcnv4-head', '-cls')
                continue
            model = build(config, verbose=False).eval()
            with torch.no_grad():
                model(torch.rand(1, 3, 64, 32))
                model.fuse(verbose=False)(torch.rand(1, 3, 32, 64))


@pytest.mark.parametrize('suffix', TASKS)
def test_every_task(suffix):
    for base, variant in (('yolo11n', 'c3k2-dcnv4'), ('yolov8n', 'dynamicconv')):
        config = model_config(base + suffix, variant, nc=4)
        model = TASKS[suffix](config, verbose=False).eval()
        assert model.nc == 4 if hasattr(model, 'nc') else len(model.names) == 4
        with torch.no_grad():
            model(torch.rand(1, 3, 64, 64))
        assert tasks.guess_model_task(config) == NAMES[suffix]


@pytest.mark.parametrize('suffix', TASKS)
def test_every_scale_of_every_task(suffix):
    for family, variant in (('yolo11', 'c3k2-dcnv4'), ('yolov8', 'dynamicconv')):
        models = [on_meta(model_config(f'{family}{scale}{suffix}', variant))[0] for scale in 'nsmlx']
        sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
        assert sizes == sorted(set(sizes))
        assert {tasks.guess_model_task(model) for model in models} == {NAMES[suffix]}


def test_which_rows_the_variants_replace():
    def levels(base, variant):
        config = model_config(base, variant)
        return [(row.section, row.level) for row in configs.rows(config) if row.module in BLOCKS]

    assert levels('yolov8n', 'dcnv4-backbone') == [('backbone', 3), ('backbone', 4), ('backbone', 5)]
    assert levels('yolo11n', 'dcnv4-backbone') == [('backbone', 3), ('backbone', 4), ('backbone', 5)]
    assert levels('yolov8n', 'dcnv4-head') == [('head', 4), ('head', 3), ('head', 4), ('head', 5)]
    expected = [('backbone', 2), ('backbone', 3), ('backbone', 4), ('backbone', 5), ('head', 4), ('head', 5)]
    assert levels('yolov8n', 'dynamicconv') == levels('yolo11n', 'dynamicconv') == expected
    assert len(levels('yolov8n', 'c2f-dynamicconv')) == len(levels('yolo11n', 'c3k2-dcnv4')) == 8


def test_a_mapping_with_a_filter():
    config = model_config('yolo11n', {'C3k2': 'C3k2_DCNv4', 'Conv': 'DCNv4Conv'}, where=lambda row: row.level == 4)
    assert blocks_of(config) == ['DCNv4Conv', 'C3k2_DCNv4', 'C3k2_DCNv4', 'DCNv4Conv', 'C3k2_DCNv4']
    model, _ = on_meta(config)
    assert [type(model.model[i]).__name__ for i in (5, 6)] == ['DCNv4Conv', 'C3k2_DCNv4']


def test_larger_scales_force_c3k_as_the_stock_model_does():
    for scale, inner in (('n', blocks.Bottleneck_DCNv4), ('m', blocks.C3k_DCNv4)):
        model, _ = on_meta(model_config(f'yolo11{scale}', 'c3k2-dcnv4'))
        assert type(model.model[2].m[0]) is inner
        assert model.model[-1].legacy is False


def test_blocks_beside_stock_rows_leave_those_alone():
    stock, _ = on_meta(model_config('yolo11m'))
    ours, _ = on_meta(model_config('yolo11m', 'dynamicconv'))
    for before, after in zip(stock.model, ours.model, strict=True):
        assert type(after) is (blocks.DynamicConv if type(after) is blocks.DynamicConv else type(before))
        if type(after) is not blocks.DynamicConv:
            assert str(after) == str(before)
            assert after.type == before.type
        else:
            assert after.type == 'dcnzoo.integrations.ultralytics.blocks.DynamicConv'


def test_yolo_takes_the_configuration():
    config = model_config('yolo11s', 'c3k2-dynamicconv', nc=7)
    model = YOLO(config)
    assert model.task == 'detect'
    assert model.model.yaml['nc'] == 7
    assert model.model.yaml['scale'] == 's'
    direct = tasks.DetectionModel(config, verbose=False)
    assert {key: tensor.shape for key, tensor in direct.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.model.state_dict().items()
    }


def test_the_file_of_a_configuration_follows_its_content(tmp_path):
    config = model_config('yolo11s', 'c3k2-dynamicconv')
    before = str(config)
    config['nc'] = 3
    assert str(config) != before
    saved = config.save(tmp_path / 'deeper' / 'any-name.yaml')
    for path in (str(config), saved):
        assert yaml.safe_load(Path(path).read_text()) == config
    assert list(config['scales']) == ['s']  # so that the file's name need not say the scale


def test_what_keeps_a_configuration_keeps_a_plain_mapping():
    config = model_config('yolo11n', 'dynamicconv')
    assert isinstance(config, ModelConfig)
    for kept in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(kept) is dict
        assert kept == config


@pytest.mark.parametrize('base', ('yolov8n', 'yolo11n', 'yolo11n-seg', 'yolov8n-cls'))
def test_timm_backbone(base):
    config = model_config(base, backbone='test_dcnv4', nc=3)
    stock = model_config(base)
    assert len(config['head']) == len(stock['head'])
    build = TASKS[base.removeprefix('yolov8n').removeprefix('yolo11n')]
    model = build(config, verbose=False).eval()
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 96))
    assert type(model.model[0]) is blocks.TimmBackbone
    if build is not tasks.ClassificationModel:
        assert model.stride.tolist() == [8, 16, 32]


def test_timm_backbone_of_other_kinds():
    for backbone in ('test_parameternet', 'test_convnext'):
        on_meta(model_config('yolo11n', 'dcnv4-head', backbone=backbone))


def test_names():
    assert configs.config_by_name('yolo11n-seg-c3k2-dcnv4') == model_config('yolo11n-seg', 'c3k2-dcnv4')
    assert configs.config_by_name('yolo11n-c3k2-dynamicconv') == model_config('yolo11n', 'c3k2-dynamicconv')
    config = configs.config_by_name('yolov8s-dcnv4-head+test_dcnv4')
    assert config == model_config('yolov8s', 'dcnv4-head', backbone='test_dcnv4')
    assert config.name == 'yolov8s-dcnv4-head-test_dcnv4'


@pytest.mark.parametrize(
    'arguments, message',
    (
        (
            ('yolo11', 'c3k2-dcnv4'),
            r"base must be a model of ultralytics with its scale, got 'yolo11'; did you mean yolo11",
        ),
        (('yolo11q', 'c3k2-dcnv4'), "got 'yolo11q'"),
        (('resnet50', 'c3k2-dcnv4'), "got 'resnet50'"),
        (('yolo11n', 'c3k2-dcn4'), "variant must be one of .*, got 'c3k2-dcn4'; did you mean c3k2-dcnv4"),
        (('yolov8n', 'c3k2-dcnv4'), 'yolov8n has no C3k2 to replace'),
        (('yolov8n-cls', 'dcnv4-head'), 'yolov8n-cls has no C2f or C3k2 to replace'),
        (('yolo11n', {'C3k2': 'C3k2_DCNV4'}), "there is no block 'C3k2_DCNV4'; did you mean C3k2_DCNv4"),
        (('yolo11n', {'C3k2': None}), 'there is no block None'),
        (('yolo11n', {'C3k2': 'DetectionModel'}), "there is no block 'DetectionModel'"),
        (
            ('yolo11n', {'C3K2': 'C3k2_DCNv4'}),
            r'yolo11n has no C3K2 to replace, only C2PSA, C3k2, .*, nn\.Upsample; did you mean C3k2\?',
        ),
        (('yolo11n', {'C3k2': 'C3k2_DCNv4', 'Cnov': 'DCNv4Conv'}), r'has no Cnov to .*; did you mean Conv\?'),
        (('yolo11n', {'Conv': 'DCNv4Conv', 'C2f': 'C2f_DCNv4'}), 'yolo11n has no C2f to replace, only C2PSA'),
        (('yolo11n', {}), 'variant must say which blocks to replace, got {}'),
        (('yolo11n', 123), 'variant must be one of dcnv4-backbone, .* or a mapping, got 123$'),
        (('yolo11n', ['c3k2-dcnv4']), r"variant must be one of .*, got \['c3k2-dcnv4'\]"),
        ((None, 'c3k2-dcnv4'), 'base must be a model of ultralytics with its scale, got None$'),
        *((('yolo11n', None, nc), f'nc must be a positive int, got {nc!r}') for nc in (0, -3, 'abc', 2.5, True)),
    ),
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_config(*arguments)


def test_more_that_is_refused():
    with pytest.raises(ValueError, match='where goes with a mapping'):
        model_config('yolo11n', 'c3k2-dcnv4', where=lambda row: True)
    with pytest.raises(ValueError, match=r'has no C3k2 to replace there$'):
        model_config('yolo11n', {'C3k2': 'C3k2_DCNv4'}, where=lambda row: False)
    with pytest.raises(ValueError, match='pretrained goes with a backbone, got True without one'):
        model_config('yolo11n', pretrained=True)
    with pytest.raises(ValueError, match="timm has no model 'dcnv4_huge'"):
        model_config('yolo11n', backbone='dcnv4_huge')
    with pytest.raises(ValueError, match='must take maps at strides 8, 16 and 32 only, not at 4'):
        model_config('yolov8n-p2', backbone='test_dcnv4')
