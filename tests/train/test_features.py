"""What a recipe may ask for beyond the loop: parameter groups, frozen parts, losses, teachers, --eval and --dry-run."""

import csv
import fnmatch
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dcnzoo.commands import main as command
from dcnzoo.macs import count_macs
from dcnzoo.train.arguments import parse
from dcnzoo.train.config import AugmentConfig, Config, DataConfig, LossConfig, ModelConfig, OptimConfig
from dcnzoo.train.data import class_counts, open_splits
from dcnzoo.train.errors import TrainError
from dcnzoo.train.evaluate import PerClass, RealLabels
from dcnzoo.train.main import evaluate, plan
from dcnzoo.train.model import build_model, build_optimizer, freeze
from dcnzoo.train.samples import RepeatedSampler
from dcnzoo.train.task import build_criterion, build_task

from .conftest import CLASSES, forget_accelerator, settings

MEAN = {'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}


@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    """A finished run of two epochs with all its checkpoints."""
    from dcnzoo.train.main import train

    output = tmp_path_factory.mktemp('features') / 'run'
    forget_accelerator()
    train(parse(settings(photos, output, ema__decay=0.5, run__keep=9, run__checkpoint_every=2)))
    return output


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


def test_the_head_alone_is_trained(photos, trained, tmp_path, train):
    """All else, the statistics of the batch norm too, stays bit for bit."""
    arguments = settings(
        photos, tmp_path / 'run', model__name=f'local-dir:{trained / "best"}', model__pretrained='true',
        model__head_only='true', schedule__epochs=1,
    )  # fmt: skip
    assert train(arguments)[0] == 0
    before, after = (
        load_file(folder / 'model.safetensors') for folder in (trained / 'best', tmp_path / 'run' / 'last')
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {'head.fc.weight', 'head.fc.bias'}


def criterion(counts=None, mixup=0.0, multi_label=False, splits=0, smoothing=0.0, **loss):
    config = Config(
        loss=LossConfig(**loss),
        augment=AugmentConfig(mixup=mixup, label_smoothing=smoothing, splits=splits),
        data=DataConfig(multi_label=multi_label),
    )
    return build_criterion(config, 3, counts)


def test_losses():
    logits, targets = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 2, 2])
    weighted = criterion(class_weights=[1.0, 2.0, 0.0])(logits, targets)
    each = nn.functional.cross_entropy(logits, targets, reduction='none')
    torch.testing.assert_close(weighted, (each[0] + 2 * each[1]) / 3)
    by_frequency = criterion([1, 1, 4], class_weight='inv_freq')
    torch.testing.assert_close(by_frequency.weight / by_frequency.weight[2], torch.tensor([4.0, 4.0, 1.0]))
    soft = torch.eye(3)[targets]
    torch.testing.assert_close(criterion(mixup=0.5)(logits, soft), each.mean())
    labels = torch.tensor([[1.0, 0, 1]]).expand(6, 3)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(criterion(multi_label=True)(logits, labels), expected)
    assert type(criterion(name='asl', multi_label=True)).__name__ == 'AsymmetricLossMultiLabel'
    assert type(criterion(name='jsd', splits=3)).__name__ == 'JsdCrossEntropy'
    assert criterion(name='bce', kwargs={'bce_target_thresh': 0.2}).target_threshold == 0.2


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'class_weights': [1.0]}, r'loss\.class_weights should have 3 values, one per class, got 1'),
        ({'name': 'zlpr'}, r"loss: Loss type 'zlpr' requires multi-label targets"),
        ({'kwargs': {'bce_sun': True}, 'name': 'bce'}, r'loss: .*bce_sun'),
        ({'class_weight': 'neg_pos', 'counts': [1, 2, 3]}, r'loss: neg_pos weighs positives'),
    ],
)
def test_wrong_losses(changes, message):
    with pytest.raises(TrainError, match=message):
        criterion(**changes)


def test_classes_are_counted(photos):
    assert class_counts(open_splits(DataConfig(root=str(photos))).train, 3) == [12, 12, 12]


def test_a_teacher(trained):
    """The loss is timm's mean of labels and answers, and the teacher sees the images as it was trained to."""
    model = timm.create_model('test_dcnv4', num_classes=3)
    config = Config()
    config.distill.teacher, config.distill.weight, config.distill.temperature = (
        f'local-dir:{trained / "best"}',
        0.25,
        2.0,
    )
    config.augment.label_smoothing = 0.0
    task = build_task(model, config, MEAN, 3, None, torch.device('cpu')).train()
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert not task.teacher.model.training
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    model.eval()
    teacher = timm.create_model(config.distill.teacher, pretrained=True).eval()
    cfg = teacher.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, -1, 1, 1) for name in ('mean', 'std'))
    seen = (images * 0.25 + 0.5 - mean) / std
    with torch.no_grad():
        logits = model(images)
        answers = nn.functional.log_softmax(teacher(seen) / 2, -1)
        distance = nn.functional.kl_div(
            nn.functional.log_softmax(logits / 2, -1), answers, reduction='batchmean', log_target=True
        )
        expected = 0.75 * nn.functional.cross_entropy(logits, targets) + 0.25 * 4 * distance
        torch.testing.assert_close(task(images, targets)['loss'], expected, rtol=1e-4, atol=1e-5)


def test_training_with_a_teacher_and_with_splits(photos, trained, tmp_path, train):
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=1, distill__teacher=f'local-dir:{trained / "best"}')
    assert train(arguments)[0] == 0
    weights = load_file(tmp_path / 'run' / 'last' / 'model.safetensors')
    assert not any(key.startswith('teacher') for key in weights)
    arguments = settings(
        photos, tmp_path / 'splits', schedule__epochs=1, augment__splits=3, loss__name='jsd',
        augment__auto_augment='augmix-m3-w3', augment__random_erasing=0.5, model__num_classes=4,
    )  # fmt: skip
    status, text, errors = train(arguments)
    assert (status, errors) == (0, []), text


def test_a_teacher_of_other_classes(photos, tmp_path, train, trained):
    arguments = settings(
        photos, tmp_path / 'run', model__num_classes=5, distill__teacher=f'local-dir:{trained / "best"}'
    )
    status, _, errors = train(arguments)
    assert status == 1
    assert errors == [f"error: distill.teacher 'local-dir:{trained / 'best'}' knows 3 classes, the data set has 5"]


def test_repeats():
    """Each image three times in an epoch of the same length, every version once, on a rank of its own."""
    sampler = RepeatedSampler(48, repeats=3, seed=0, batch_size=4, processes=3)
    order = list(sampler)
    assert len(order) == len(set(order)) == len(sampler) == 48
    batches = [order[start : start + 4] for start in range(0, 48, 4)]
    for number in range(0, 12, 3):
        images = [sorted(index % 48 for index in batch) for batch in batches[number : number + 3]]
        assert images[0] == images[1] == images[2]
        assert len(set(images[0])) == 4
    sampler.set_epoch(1)
    assert list(sampler) != order


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


def test_dry_run(photos, tmp_path, train):
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=4, optim__accumulate=2, ema__decay=0.9)
    status, text, errors = train([*arguments, '--dry-run'])
    assert (status, errors) == (0, [])
    facts = json.loads((tmp_path / 'run' / 'plan' / 'plan.json').read_text())
    model = timm.create_model('test_dcnv4', num_classes=3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (facts['parameters'], facts['batch'], facts['updates_per_epoch'], facts['updates']) == (parameters, 16, 2, 8)
    assert facts['highest_lr'] == pytest.approx(3e-3, rel=0.05)
    assert facts['memory_mib']['optimizer'] == pytest.approx(2 * facts['memory_mib']['gradients'], abs=1)
    assert facts['memory_mib']['activations'] >= 1
    assert facts['macs'] == count_macs(model.eval(), (3, 32, 32))
    assert facts['loaded_images_per_second'] > 0
    assert Image.open(tmp_path / 'run' / 'plan' / 'lr.png')
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'plan'}
    assert 'nothing was trained' in text
    status, _, errors = train([*settings(tmp_path, tmp_path / 'run'), '--dry-run'])
    assert (status, len(errors)) == (1, 1)
    status, _, errors = train([*arguments, '--dry-run', '--resume', 'nowhere'])
    assert (status, errors) == (1, ['error: --resume: nowhere does not exist'])
    (tmp_path / 'run' / 'best').mkdir()
    status, _, errors = train([*arguments, '--dry-run'])
    assert status == 1
    assert 'holds a run already (best)' in errors[0]


def test_average(trained, tmp_path, capsys):
    """Of the averages in a run's checkpoints, as a folder that timm loads; or of files."""
    checkpoints = sorted((trained / 'checkpoints').iterdir())
    assert command(['average', str(trained), '--last', '2', '--output', str(tmp_path / 'average')]) == 0
    assert 'the average of 2 checkpoints' in capsys.readouterr().out
    ours = timm.create_model(f'local-dir:{tmp_path / "average"}', pretrained=True).state_dict()
    first, second = (load_file(folder / 'ema.safetensors') for folder in checkpoints[-2:])
    for key, value in ours.items():
        expected = (first[key].double() + second[key]) / 2 if value.is_floating_point() else second[key]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=0, atol=0)

    assert command(['average', str(trained), '--output', str(tmp_path / 'average')]) == 1
    assert 'is there already' in capsys.readouterr().err

    files = [str(folder / 'model.safetensors') for folder in checkpoints]
    assert command(['average', *files[:1], *files[:1], '--output', str(tmp_path / 'same')]) == 0
    same = load_file(tmp_path / 'same' / 'model.safetensors')
    assert all(torch.equal(value, same[key]) for key, value in load_file(files[0]).items())
    assert 'no config.json' in capsys.readouterr().out
    other = timm.create_model('test_convnext')
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    for arguments in ([files[0], str(tmp_path / 'other.pth')], [str(tmp_path / 'nowhere')], [str(tmp_path)]):
        assert command(['average', *arguments, '--output', str(tmp_path / 'none')]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / 'none').exists()


def test_shards(photos, tmp_path, capsys, train):
    assert command(['shards', str(photos), str(tmp_path / 'shards'), '--images', '10']) == 0
    assert capsys.readouterr().out.startswith('36 images of train in 4 shards')
    status, text, errors = train(settings(tmp_path / 'shards', tmp_path / 'run', schedule__epochs=1))
    assert (status, errors) == (0, [])
    assert '36 training and 15 validation images' in text
    assert json.loads((tmp_path / 'run' / 'best' / 'config.json').read_text())['label_names'] == list(CLASSES)
    assert command(['shards', str(photos), str(tmp_path / 'shards')]) == 1
    assert 'is not empty' in capsys.readouterr().err
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'val' / 'red').rename(tmp_path / 'photos' / 'val' / 'rot')
    assert command(['shards', str(tmp_path / 'photos'), str(tmp_path / 'more')]) == 1
    assert 'the classes of' in capsys.readouterr().err
    assert not (tmp_path / 'more' / '_info.json').exists()


def test_reports(trained):
    """One page with the curves in it, the configuration, and where it ran."""
    page = (trained / 'report.html').read_text()
    assert 'data:image/png;base64,' in page
    assert 'batch_size: 8' in page
    assert 'val_top1' in page
    assert torch.__version__ in page


def test_functions_for_python(photos, trained, tmp_path):
    """`evaluate` and `plan` return what they write."""
    forget_accelerator()
    metrics = evaluate(parse(['--resume', str(trained), '--eval', '--run.output', str(tmp_path / 'run')]))
    assert metrics == json.loads((tmp_path / 'run' / 'eval' / 'eval.json').read_text())
    forget_accelerator()
    facts = plan(parse(settings(photos, tmp_path / 'run')))
    assert facts == json.loads((tmp_path / 'run' / 'plan' / 'plan.json').read_text())
