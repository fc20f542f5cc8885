"""The network and its optimizer: parameter groups, frozen parts, compilation."""

import csv
import fnmatch

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import list_optimizers, muon
from torch import nn

from dcnzoo.train.arguments import parse
from dcnzoo.train.config import DataConfig, ModelConfig, OptimConfig
from dcnzoo.train.errors import TrainError
from dcnzoo.train.model import build_model, build_optimizer, freeze

from .conftest import settings


@pytest.mark.parametrize('layer_decay', [None, 0.9])
def test_parameters_of_their_own(layer_decay):
    """A tenth of the rate on the deformable layers, on top of the layer decay; the rest as timm has it."""
    model = timm.create_model('test_dcnv4', num_classes=3)
    groups = {'*.dcn.*': {'lr_scale': 0.1}, 'head.fc.*': {'lr_scale': 2.0, 'weight_decay': 0.3}}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def settings_of(optim):
        optimizer = build_optimizer(model, optim, lr=1e-3)
        return {
            names[id(parameter)]: (group.get('lr_scale', 1.0), group['weight_decay'])
            for group in optimizer.param_groups
            for parameter in group['params']
        }

    plain = settings_of(OptimConfig(layer_decay=layer_decay))
    own = settings_of(OptimConfig(layer_decay=layer_decay, groups=groups))
    assert plain.keys() == own.keys() == set(names.values())
    for name, (scale, decay) in plain.items():
        if fnmatch.fnmatch(name, '*.dcn.*'):
            assert own[name] == (pytest.approx(0.1 * scale), decay)
        elif name.startswith('head.fc.'):
            assert own[name] == (pytest.approx(2 * scale), 0.0 if name.endswith('bias') else 0.3)
        else:
            assert own[name] == (scale, decay)


def test_rates_of_the_large_fine_tune():
    """As published: each block learns 0.9 times as fast as the one above it, offsets and modulation a tenth of that."""
    optim = parse(['--config', 'dcnv4_large_in22k_ft_in1k']).optim
    with torch.device('meta'):
        model = timm.create_model('dcnv4_large')
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group['lr_scale']
        for group in build_optimizer(model, optim, lr=1e-3).param_groups
        for parameter in group['params']
    }
    blocks = [f'stages.{number}.blocks.{block}' for number, depth in enumerate((5, 5, 22, 5)) for block in range(depth)]
    for above, block in enumerate(reversed(blocks)):
        assert rates[f'{block}.mlp.fc1.weight'] == pytest.approx(0.9**above)
        assert rates[f'{block}.dcn.value_proj.weight'] == pytest.approx(0.9**above)
        assert rates[f'{block}.dcn.offset_mask.weight'] == pytest.approx(0.1 * 0.9**above)
        assert rates[f'{block}.dcn.offset_mask_dw.bias'] == pytest.approx(0.1 * 0.9**above)
    assert rates['head.fc.weight'] == 1
    assert rates['stem.conv1.weight'] == rates['stages.0.blocks.0.mlp.fc1.weight']
    assert rates['stages.2.downsample.conv.weight'] == rates['stages.2.blocks.0.mlp.fc1.weight']


@pytest.mark.parametrize(
    ('groups', 'message'),
    [
        ({'stem.conv3.*': {'lr_scale': 0.1}}, r"optim\.groups: no parameter matches 'stem\.conv3\.\*' \(did you mean"),
        ({'stem.*': {'lr': 0.1}}, r"optim\.groups: 'stem\.\*' takes lr_scale and weight_decay, not lr"),
    ],
)
def test_wrong_groups(groups, message):
    with pytest.raises(TrainError, match=message):
        build_optimizer(timm.create_model('test_dcnv4'), OptimConfig(groups=groups), lr=1e-3)


def trained_names(**changes):
    config = ModelConfig(name='test_dcnv4', **changes)
    model = build_model(config, DataConfig(image_size=32), 3)
    frozen = freeze(model, config)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}, frozen, model


def test_frozen_parts():
    everything, none, model = trained_names()
    assert (none, everything) == ([], {name for name, _ in model.named_parameters()})
    names, _, _ = trained_names(freeze=['stem', 'stages.[01]'])
    assert names == {name for name in everything if not name.startswith(('stem.', 'stages.0.', 'stages.1.'))}
    names, frozen, _ = trained_names(freeze_bn=True)
    assert frozen and all(isinstance(module, nn.BatchNorm2d) for module in frozen)
    assert len(everything - names) == 2 * len(frozen)
    names, _, model = trained_names(head_only=True)
    assert names == {'head.fc.weight', 'head.fc.bias'}
    with pytest.raises(TrainError, match=r"model\.freeze: no module is called 'steam' \(did you mean 'stem'\?\)"):
        trained_names(freeze=['steam'])
    with pytest.raises(TrainError, match=r'model\.freeze leaves nothing to train'):
        trained_names(freeze=['*'])


def train_on(photos, trained, output, train, **changes):
    """Goes on with a run's weights for an epoch; returns all their names, and those of the weights that changed."""
    model = {'model__name': f'local-dir:{trained / "best"}', 'model__pretrained': 'true'}
    assert train(settings(photos, output, schedule__epochs=1, **model, **changes))[0] == 0
    before, after = (load_file(folder / 'model.safetensors') for folder in (trained / 'best', output / 'last'))
    return before.keys(), {key for key in before if not torch.equal(before[key], after[key])}


def test_the_head_alone_is_trained(photos, trained, tmp_path, train):
    """All else, the statistics of the batch norm too, stays bit for bit."""
    _, changed = train_on(photos, trained, tmp_path / 'run', train, model__head_only='true')
    assert changed == {'head.fc.weight', 'head.fc.bias'}


def test_batch_norms_stay_as_they_are(photos, trained, tmp_path, train):
    """Weights and statistics, bit for bit, while all else learns."""
    names, changed = train_on(photos, trained, tmp_path / 'run', train, model__freeze_bn='true')
    norms = {name.rpartition('.')[0] for name in names if name.endswith('running_mean')}
    kept = {name for name in names if name.rpartition('.')[0] in norms}
    assert len(kept) == 5 * len(norms) > 0
    assert changed == names - kept


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compiled_models_learn_the_same(backend, photos, tmp_path, train):
    """With averaged weights, and under the same names."""
    losses, keys = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        output = tmp_path / f'compiled {compiled}'
        changes = {'model__compile': compiled, 'model__compile_backend': backend, 'ema__decay': 0.5}
        assert train(settings(photos, output, schedule__epochs=2, **changes))[0] == 0
        assert bool(torch._dynamo.utils.counters['stats']['unique_graphs']) == compiled
        losses.append([float(row['train_loss']) for row in csv.DictReader((output / 'metrics.csv').open())])
        keys.append(load_file(output / 'best' / 'model.safetensors').keys())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert keys[0] == keys[1]
    status, _, errors = train(
        settings(photos, tmp_path / 'run', model__compile=True, model__compile_backend='induktor')
    )
    assert status == 1
    assert errors == ["error: model.compile_backend: unknown backend 'induktor' (did you mean 'inductor'?)"]


@pytest.mark.parametrize('name', list_optimizers())
def test_optimizers(name):
    """Every one of timm moves all weights; those of packages that need CUDA say so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    if name.startswith(('bnb', 'fused')):
        with pytest.raises(TrainError, match=rf"optim\.name: cannot create '{name}': "):
            build_optimizer(model, OptimConfig(name=name), lr=1e-2)
        return
    optimizer = build_optimizer(model, OptimConfig(name=name), lr=1e-2)
    before = [parameter.clone() for parameter in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(2, 3, 8, 8)).square().mean()
        loss.backward(create_graph=getattr(optimizer, 'is_second_order', False))
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_muon_computes_in_float32_on_a_cpu(monkeypatch):
    """bfloat16, of which timm leaves no choice, is emulated by many; and timm's function stays as it is."""
    seen, theirs = [], muon.zeropower_via_newtonschulz

    def spy(*arguments, **options):
        seen.append(options.get('dtype'))
        return theirs(*arguments, **options)

    monkeypatch.setattr(muon, 'zeropower_via_newtonschulz', spy)
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, OptimConfig(name='adamuon'), lr=0.1)
    before = model.weight.clone()
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert seen == [torch.float32, torch.float32]
    assert not torch.equal(model.weight, before)
    assert muon.zeropower_via_newtonschulz is spy
