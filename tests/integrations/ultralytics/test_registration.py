"""Names in YAML files and checkpoints, and what is said where they cannot be resolved."""

import re
import types

import pytest

pytest.importorskip('ultralytics', reason="needs ultralytics: pip install 'dcnzoo[yolo]'")

import torch
import yaml
from torch import nn
from ultralytics import YOLO, __version__
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, ROOT

from dcnzoo.integrations.ultralytics import RegistrationError, blocks, model_config, register

from .conftest import SETTINGS


class Unregistered(nn.Identity):
    """A module that neither ultralytics nor dcnzoo knows."""


def stock_yaml(base):
    (path,) = (ROOT / 'cfg' / 'models').rglob(f'{base}.yaml')
    return yaml.safe_load(path.read_text())


def patched(base, old, new, rows):
    """The stock YAML with a name replaced in some rows, as people edit it by hand."""
    config = stock_yaml(base)
    for index, row in enumerate(config['backbone'] + config['head']):
        if row[2] == old and index in rows:
            row[2] = new
    return config


EVERYWHERE = range(100)
PATCHED = {
    'a': ('yolov8', 'C2f', 'C2f_DCNv4', (4, 6, 8), 3_007_232),
    'b': ('yolov8', 'C2f', 'C2f_DCNv4', range(10, 30), 3_010_704),
    'c': ('yolov8', 'Conv', 'DynamicConv', range(1, 30), 4_885_608),
    'd': ('yolov8', 'C2f', 'C2f_DynamicConv', EVERYWHERE, 2_331_328),
    'd, by its class': ('yolov8', 'C2f', 'C2f_GhostModule_DynamicConv', EVERYWHERE, 2_331_328),
    'e': ('yolo11', 'C3k2', 'C3k2_DynamicConv', EVERYWHERE, 3_234_759),
    'f': ('yolo11', 'Conv', 'DynamicConv', range(1, 30), 4_599_987),
}


def write_patched(name, folder):
    """Writes such a file at scale n; returns its path and the number of parameters."""
    base, old, new, rows, parameters = PATCHED[name]
    config = patched(base, old, new, rows)
    config['nc'] = 25 if base == 'yolo11' else 80
    (folder / f'{base}-mine.yaml').write_text(yaml.safe_dump(config))
    return folder / f'{base}n-mine.yaml', parameters


@pytest.mark.parametrize('name', PATCHED)
def test_yaml_files_for_hand_patched_copies_load_unchanged(name, tmp_path):
    path, parameters = write_patched(name, tmp_path)
    assert sum(parameter.numel() for parameter in YOLO(path).model.parameters()) == parameters


def test_registering_again_changes_nothing():
    before = tasks.parse_model
    register()
    assert tasks.parse_model is before
    assert tasks.C2f.__module__ == 'ultralytics.nn.modules.block'


def test_another_ultralytics_is_refused(monkeypatch):
    def of_another_kind(d, ch, verbose=True):
        return nn.Sequential(*(nn.Identity() for _ in d['backbone'] + d['head'])), []

    monkeypatch.setattr(tasks, 'parse_model', of_another_kind)
    with pytest.raises(RegistrationError, match=rf'ultralytics {re.escape(__version__)}, only to 8.3.240 and newer'):
        register()
    assert tasks.parse_model is of_another_kind


def test_a_parser_that_lists_other_modules_is_refused(monkeypatch):
    """As if C2f no longer were among the modules whose repeats are an argument."""
    stock = tasks.parse_model.stock
    without_c2f = {'frozenset': lambda names: frozenset(name for name in names if name.__name__ != 'C2f')}
    namespace = {**stock.__globals__, **without_c2f}
    other = types.FunctionType(stock.__code__, namespace, 'parse_model', stock.__defaults__)
    monkeypatch.setattr(tasks, 'parse_model', other)
    with pytest.raises(RegistrationError, match='dcnzoo does not know how to add blocks'):
        register()


def test_misspelt_blocks_and_wrong_arguments_name_the_row():
    def parse(*row):
        backbone = [[-1, 1, 'Conv', [8, 3, 2]], [-1, 1, *row]]
        config = {'nc': 1, 'scale': 'n', 'backbone': backbone, 'head': [[-1, 1, 'Detect', ['nc']]]}
        tasks.parse_model(config, ch=3, verbose=False)

    with pytest.raises(ValueError, match="row 1 of the backbone: there is no block 'C2f_DCNV4'; did you mean C2f"):
        parse('C2f_DCNV4', [8])
    with pytest.raises(ValueError, match="there is no block 'Konv'; did you mean Conv"):
        parse('Konv', [8])
    with pytest.raises(ValueError, match=r"there is no block 'nn\.Upsampel'; did you mean nn\.Upsample"):
        parse('nn.Upsampel', [8])
    with pytest.raises(ValueError, match=r'row 1 of the backbone: DynamicConv\(8, 16, 3, 2, 1, 1, 3\): groups must'):
        parse('DynamicConv', [16, 3, 2, 1, 1, 3])
    with pytest.raises(ValueError, match=r'row 1 of the backbone: C3k2_DCNv4\(8, 16, 1, False, 0.5, True\): g must be'):
        parse('C3k2_DCNv4', [16, False, 0.5, True])
    with pytest.raises(ValueError, match=r'row 1 of the backbone: C2f_DCNv4\(8, 16, 1, 1, 2, 3, 4, 5\): .*argument'):
        parse('C2f_DCNv4', [16, 1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=r'row 1 of the backbone: DynamicConv\(8, 0\): out_channels must be'):
        parse('DynamicConv', [0])


def test_repeated_plain_rows():
    config = {
        'nc': 1,
        'depth_multiple': 0.5,
        'backbone': [[-1, 1, 'Conv', [8, 3, 2]], [-1, 4, 'DynamicConv', [8, 3]]],
        'head': [[-1, 1, 'Conv', [4]]],
    }
    model, _ = tasks.parse_model(config, ch=3, verbose=False)
    assert [type(module) for module in model[1]] == [blocks.DynamicConv] * 2
    assert config['backbone'][1] == [-1, 4, 'DynamicConv', [8, 3]]


def test_pretrained_weights_of_the_stock_model_carry_over(caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, 'handlers', [caplog.handler])  # of its own one, old versions keep the first stdout
    stock = YOLO('yolo11n.yaml').model
    model = tasks.DetectionModel(model_config('yolo11n', 'c3k2-dcnv4'), verbose=False)
    model.load(stock)
    shared = [
        key
        for key, tensor in model.state_dict().items()
        if key in stock.state_dict() and stock.state_dict()[key].shape == tensor.shape
    ]
    assert len(shared) > 350
    for key in shared:
        torch.testing.assert_close(model.state_dict()[key], stock.state_dict()[key])
    assert 'model.2.m.0.cv1.conv.weight' not in shared  # another width there, since DCNv4 keeps it
    assert 'model.2.cv1.conv.weight' in shared
    assert f'Transferred {len(shared)}/{len(model.state_dict())} items' in caplog.text


def test_checkpoints_load_where_nobody_has_imported_dcnzoo(tmp_path, fresh):
    YOLO(model_config('yolo11n', 'c3k2-dcnv4', nc=2)).save(tmp_path / 'ours.pt')
    code = """if True:
        import sys
        from ultralytics import YOLO
        assert 'dcnzoo' not in sys.modules
        model = YOLO(sys.argv[1])
        print(type(model.model.model[2]).__name__)
        from ultralytics.nn import tasks
        print(type(tasks.DetectionModel(model.model.yaml, verbose=False).model[2]).__name__)
    """
    assert fresh(code, tmp_path / 'ours.pt').split()[-2:] == ['C3k2_DCNv4', 'C3k2_DCNv4']


@pytest.mark.skipif(not hasattr(tasks, 'SAFE_LOAD'), reason=f'ultralytics {__version__} has no restricted loading')
def test_restricted_loading_admits_the_blocks(tmp_path, fresh):
    variants = {
        'yolo11n': ('c3k2-dcnv4', 'c3k2-dynamicconv', 'dynamicconv'),
        'yolov8n': ('c2f-dcnv4', 'c2f-dynamicconv'),
    }
    configs = [model_config(base, variant, nc=2) for base, names in variants.items() for variant in names]
    configs.append(model_config('yolo11n', {'Conv': 'DCNv4Conv'}, nc=2))
    backbones = 'test_dcnv4', 'test_parameternet', 'test_efficientnet'
    configs += [model_config('yolo11n', backbone=backbone, nc=2) for backbone in backbones]
    paths = [tmp_path / f'{config.name}.pt' for config in configs]
    for config, path in zip(configs, paths, strict=True):
        YOLO(config).save(path)
    with_another = YOLO(configs[0])
    with_another.model.model[2].m[0] = Unregistered()
    with_another.save(tmp_path / 'another.pt')
    code = """if True:
        import sys
        import dcnzoo.integrations.ultralytics
        from ultralytics import YOLO
        *admitted, another = sys.argv[1:]
        print(*(len(YOLO(path).model.names) for path in admitted))
        try:
            YOLO(another)
        except TypeError as error:
            print(error)
    """
    *_, admitted, refused = fresh(code, *paths, tmp_path / 'another.pt', ULTRALYTICS_SAFE_LOAD='1').splitlines()
    assert admitted.split() == ['2'] * 9
    assert 'another.pt references types outside the supported' in refused


def test_processes_of_distributed_training_know_the_blocks(tmp_path, images, fresh):
    """What ultralytics starts once per GPU, started here on the CPU."""
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.utils.dist import ddp_cleanup, generate_ddp_file

    config = str(model_config('yolo11n', 'dynamicconv'))
    settings = {**SETTINGS, 'epochs': 1, 'project': str(tmp_path), 'name': 'run', 'fraction': 0.2, 'val': False}
    trainer = DetectionTrainer(overrides={'model': config, 'data': images(), **settings})
    file = generate_ddp_file(trainer)
    fresh('import runpy, sys; runpy.run_path(sys.argv[1], run_name="__main__")', file)
    assert (tmp_path / 'run' / 'weights' / 'last.pt').is_file() or list(tmp_path.glob('run*/weights/last.pt'))
    ddp_cleanup(trainer, file)


def test_without_ultralytics_the_package_works_and_the_integration_says_what_to_install(fresh):
    code = """if True:
        import contextlib, io, sys, types
        import dcnzoo.integrations
        from dcnzoo.commands.yolo import main
        for module in (types.SimpleNamespace(__version__='8.2.103'), None):
            sys.modules['ultralytics'] = module
            try:
                import dcnzoo.integrations.ultralytics
            except ImportError as error:
                print(error)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            print(main(['train', 'model=yolo11n.yaml']), main(['models']), main(['adopt', 'x.pt']))
        print(stderr.getvalue())
    """
    old = 'needs ultralytics 8.3.240 or newer, found 8.2.103'
    says = "dcnzoo.integrations.ultralytics needs ultralytics: pip install 'dcnzoo[yolo]'"
    first, *others = fresh(code).splitlines()
    assert old in first
    assert others == [says, '1 1 1', *[f'dcnzoo-yolo: {says}'] * 3, '']
