"""Whole runs, in this process."""

import csv
import json
import shutil

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from timm.utils import ModelEmaV3

from dcnzoo.train import launch, loop
from dcnzoo.train.arguments import parse
from dcnzoo.train.launch import asked_processes, launched_processes
from dcnzoo.train.loop import Trainer
from dcnzoo.train.main import train as run

from .conftest import CLASSES, REPOSITORY, forget_accelerator, settings


def read(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def same_weights(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


RICH = {  # everything random or with a memory is on
    'model__drop_path_rate': 0.2,
    'augment__auto_augment': 'rand-m5-mstd0.5-inc1',
    'augment__random_erasing': 0.5,
    'augment__mixup': 0.2,
    'augment__cutmix': 0.2,
    'ema__decay': 0.9,
    'optim__accumulate': 2,
    'optim__clip_grad': 1.0,
    'run__checkpoint_every': 1,
    'run__keep': 100,
}


@pytest.fixture(scope='module')
def finished(photos, tmp_path_factory):
    """A finished run of three epochs of four batches, in updates of two, with every checkpoint kept."""
    output = tmp_path_factory.mktemp('runs') / 'finished'
    forget_accelerator()
    run(parse(settings(photos, output, schedule__epochs=3, run__trackers='[tensorboard]', **RICH)))
    return output


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        'best', 'last', 'checkpoints', 'tensorboard', 'run.yaml', 'metrics.csv', 'health.csv', 'curves.png',
        'report.html', 'summary.json',
    }  # fmt: skip
    for folder in ('best', 'last'):
        names = {str(path.relative_to(finished / folder)) for path in (finished / folder).rglob('*.*')}
        assert names == {
            'model.safetensors', 'config.json', 'raw/model.safetensors', 'raw/config.json', 'run.yaml',
        }  # fmt: skip
    assert list((finished / 'tensorboard').rglob('events.*'))
    assert Image.open(finished / 'curves.png').size[0] > 800
    assert (finished / 'run.yaml').read_text() == (finished / 'best' / 'run.yaml').read_text()


def test_metrics(finished):
    rows, summary = read(finished / 'metrics.csv'), json.loads((finished / 'summary.json').read_text())
    assert [int(row['epoch']) for row in rows] == [1, 2, 3]
    assert [int(row['step']) for row in rows] == [2, 4, 6]  # 36 images, 4 batches of 8, in updates of 2
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])
    best = max(rows, key=lambda row: (float(row['val_top1']), -float(row['val_loss'])))
    assert summary['val_top1'] == pytest.approx(float(best['val_top1']), abs=1e-3)
    assert summary['best_epoch'] == int(best['epoch'])
    assert (summary['train_images'], summary['val_images'], summary['epochs'], summary['steps']) == (36, 15, 3, 6)
    assert summary['wall_seconds'] > 0


def test_best_checkpoint_is_what_the_summary_says(finished, photos):
    """As a user loads it, with timm alone."""
    model = timm.create_model(f'local-dir:{finished / "best"}', pretrained=True).eval()
    labels = model.pretrained_cfg['label_names']
    assert labels == list(CLASSES)
    transform = create_transform(**resolve_data_config({}, model=model))
    hits = []
    for path in sorted((photos / 'val').rglob('*.jpg')):
        with torch.no_grad():
            index = model(transform(Image.open(path).convert('RGB'))[None]).argmax().item()
        hits.append(labels[index] == path.parent.name)
    summary = json.loads((finished / 'summary.json').read_text())
    assert 100 * sum(hits) / len(hits) == pytest.approx(summary['val_top1'], abs=1e-3)
    assert len(hits) == summary['val_images']


def test_average_is_the_model(finished):
    raw, averaged = (load_file(finished / name / 'model.safetensors') for name in ('last/raw', 'last'))
    assert timm.create_model(f'local-dir:{finished / "last" / "raw"}', pretrained=True).num_classes == 3
    assert raw.keys() == averaged.keys()
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw)


@pytest.mark.parametrize(
    'kept',
    [
        'epoch_0000_batch_00000002',
        'epoch_0001_batch_00000000',
        'epoch_0001_batch_00000004',
        'epoch_0002_batch_00000002',
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(finished, photos, tmp_path, train, kept):
    """Bit for bit, from within an epoch, between two, and before a validation."""
    output = tmp_path / 'run'
    shutil.copytree(finished / 'checkpoints' / kept, output / 'checkpoints' / kept)
    if int(kept[6:10]):  # where there was a validation, there is a best checkpoint
        shutil.copytree(finished / 'best', output / 'best')
    status, text, errors = train(
        [*settings(photos, output, schedule__epochs=3, data__workers=1, **RICH), '--resume', 'auto']
    )
    assert (status, errors) == (0, [])
    assert f'{kept} at epoch {int(kept[6:10]) + 1}, batch {int(kept[-8:])} of 4' in text
    for name in ('model.safetensors', 'raw/model.safetensors'):
        assert same_weights(finished / 'last' / name, output / 'last' / name)
    ours, theirs = read(output / 'metrics.csv'), read(finished / 'metrics.csv')
    for row in (*ours, *theirs):
        for measured in ('seconds', 'images_per_second'):
            del row[measured]
    assert ours == theirs
    last = 'checkpoints/epoch_0003_batch_00000000/optimizer.bin'
    ours, theirs = (torch.load(folder / last)['state'] for folder in (output, finished))
    assert all(torch.equal(ours[i]['exp_avg_sq'], theirs[i]['exp_avg_sq']) for i in theirs)


def test_the_same_settings_give_the_same_run(finished, photos, tmp_path, train):
    assert train(settings(photos, tmp_path / 'run', schedule__epochs=3, **RICH))[0] == 0
    assert same_weights(finished / 'last' / 'model.safetensors', tmp_path / 'run' / 'last' / 'model.safetensors')


def test_another_seed_gives_another_run(finished, photos, tmp_path, train):
    assert train(settings(photos, tmp_path / 'run', schedule__epochs=3, run__seed=1, **RICH))[0] == 0
    assert not same_weights(finished / 'last' / 'model.safetensors', tmp_path / 'run' / 'last' / 'model.safetensors')


def test_accumulated_batches_step_as_one_large_batch(photos, tmp_path, train):
    """Three updates of twelve images each, whole or in three parts."""
    weights = []
    for name, batch, accumulate in (('large', 12, 1), ('small', 4, 3)):
        arguments = settings(
            photos, tmp_path / name, model__name='test_convnext', data__batch_size=batch, optim__accumulate=accumulate,
            optim__name='sgd', augment__crop_mode='none', schedule__name='none', schedule__epochs=1,
        )  # fmt: skip
        status, _, errors = train(arguments)
        assert (status, errors) == (0, [])
        weights.append(load_file(tmp_path / name / 'last' / 'model.safetensors'))
    large, small = weights
    start = timm.create_model('test_convnext', num_classes=3).state_dict()
    assert any((large[key] - start[key]).abs().max() > 1e-3 for key in large)
    for key in large:
        torch.testing.assert_close(small[key], large[key], rtol=1e-4, atol=1e-6)


def test_a_short_last_group_weighs_as_a_full_one(photos, tmp_path, train, monkeypatch):
    """Five batches in updates of three: gradients are averages over three and over two batches."""
    groups = []
    original = Trainer.train_batch

    def watch(self, images, targets, group, update):
        groups.append((group, update))
        return original(self, images, targets, group, update)

    monkeypatch.setattr(Trainer, 'train_batch', watch)
    arguments = settings(photos, tmp_path / 'run', data__batch_size=7, optim__accumulate=3, schedule__epochs=1)
    assert train(arguments)[0] == 0
    assert groups == [(3, False), (3, False), (3, True), (2, False), (2, True)]


def test_where_weights_are_shared_all_processes_validate_as_many_batches(photos, tmp_path, train, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, 'fit', lambda self: seen.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings(photos, tmp_path / 'run', data__val_batch_size=4))
    (trainer,) = seen
    expected = trainer.validate(trainer.network.plain)
    monkeypatch.setattr(loop, 'is_sharded', lambda accelerator: True)
    monkeypatch.setattr(loop, 'gather_object', lambda counts: [*counts, counts[0] + 2])  # another process has two more
    assert [len(images) for images, _ in trainer.validation_batches()] == [4, 4, 4, 3, 0, 0]
    assert trainer.validate(trainer.network.plain) == expected


def test_other_flags_optimizers_and_schedules(photos, tmp_path, train):
    arguments = settings(
        photos, tmp_path / 'run', run__precision='bf16', model__grad_checkpointing='true', model__in_chans=1,
        model__channels_last='false', optim__name='lamb', optim__layer_decay=0.8, optim__clip_grad=0.05,
        optim__clip_mode='agc', schedule__name='plateau', schedule__epochs=2, data__val_batch_size=4,
    )  # fmt: skip
    status, text, errors = train(arguments)
    assert (status, errors) == (0, [])
    assert 'mixed precision: bf16' in text
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['input_size'] == [1, 32, 32]
    assert train([*arguments, '--schedule.epochs', '3', '--resume', 'auto'])[0] == 0  # plateau's memory is loaded


def test_start_from_a_run_and_from_a_file(finished, photos, tmp_path, train):
    """Fine-tuning on fewer classes, from the folder that a run leaves or from its weights."""
    for path in ('train', 'val'):
        shutil.copytree(
            photos / path, tmp_path / 'two' / path, ignore=lambda _, names: [n for n in names if n == 'red']
        )
    weights = str(finished / 'best' / 'model.safetensors')
    for changes in (
        {'model__name': f'local-dir:{finished / "best"}', 'model__pretrained': 'true'},
        {'model__checkpoint': weights, 'model__num_classes': 3},
    ):
        output = tmp_path / f'run{len(changes)}{changes.get("model__num_classes", "")}'
        still = {'schedule__epochs': 1, 'schedule__name': 'none', 'optim__lr': 0}
        status, text, errors = train(settings(tmp_path / 'two', output, **still, **changes))
        assert (status, errors) == (0, []), text
        config = json.loads((output / 'best' / 'config.json').read_text())
        assert config['architecture'] == 'test_dcnv4'
        ours, theirs = load_file(output / 'last' / 'model.safetensors'), load_file(weights)
        assert torch.equal(ours['stem.conv1.weight'], theirs['stem.conv1.weight'])


def test_layers_learn_at_their_own_rate(photos, tmp_path, train, monkeypatch):
    seen = {}
    monkeypatch.setattr(Trainer, 'fit', lambda self: seen.update(optimizer=self.optimizer) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings(photos, tmp_path / 'run', optim__layer_decay=0.5))
    assert len({group['lr_scale'] for group in seen['optimizer'].param_groups}) > 3


def test_unreadable_images_are_skipped_and_named(own_photos, tmp_path, train):
    bad = [own_photos / 'train' / 'red' / '3.jpg', own_photos / 'val' / 'blue' / '1.jpg']
    bad[0].write_text('no image')
    bad[1].write_bytes(bad[1].read_bytes()[:-200])
    status, _text, errors = train(settings(own_photos, tmp_path / 'run'))
    assert status == 0
    for path in bad:
        assert len([line for line in errors if str(path) in line]) == 1, errors
    assert errors[-1] == f'warning: 2 images could not be read; {tmp_path / "run" / "unreadable.txt"} names them'
    assert len((tmp_path / 'run' / 'unreadable.txt').read_text().splitlines()) == 2
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['unreadable_images'] == 2
    assert summary['val_top1'] * 14 / 100 == pytest.approx(round(summary['val_top1'] * 14 / 100), abs=1e-3)


def test_too_many_unreadable_images(own_photos, tmp_path, train):
    for number in range(3):
        (own_photos / 'train' / 'red' / f'{number}.jpg').write_text('no image')
    status, _, errors = train(settings(own_photos, tmp_path / 'run', data__max_unreadable=2))
    assert status == 1
    assert errors[-1].startswith('error: more than 2 unreadable images (data.max_unreadable); ')
    assert len((tmp_path / 'run' / 'unreadable.txt').read_text().splitlines()) == 3


def test_a_run_is_not_overwritten(finished, photos, train):
    before = (finished / 'summary.json').read_bytes()
    status, _, errors = train(settings(photos, finished))
    assert status == 1
    assert len(errors) == 1
    assert 'holds a run already' in errors[0]
    assert '--resume auto' in errors[0]
    assert (finished / 'summary.json').read_bytes() == before


def test_overwrite_removes_what_a_run_leaves_and_nothing_else(photos, tmp_path, train):
    output = tmp_path / 'run'
    (output / 'best').mkdir(parents=True)
    (output / 'best' / 'old').touch()
    (output / 'mine.txt').touch()
    assert train(settings(photos, output, schedule__epochs=1, run__overwrite='true'))[0] == 0
    assert (output / 'mine.txt').exists()
    assert not (output / 'best' / 'old').exists()


def test_a_mistake_costs_nothing_where_a_run_is_to_be_overwritten(finished, photos, tmp_path, train):
    shutil.copytree(finished, tmp_path / 'run')
    arguments = settings(photos, tmp_path / 'run', run__overwrite='true', model__name='dcnv4_tyni')
    assert train(arguments)[0] == 1
    assert (tmp_path / 'run' / 'summary.json').read_bytes() == (finished / 'summary.json').read_bytes()
    assert same_weights(finished / 'best' / 'model.safetensors', tmp_path / 'run' / 'best' / 'model.safetensors')


def test_resume_into_another_folder(finished, photos, tmp_path, train):
    arguments = settings(photos, tmp_path / 'run', **RICH)
    status, _, errors = train([*arguments, '--schedule.epochs', '3', '--resume', str(finished)])
    assert status == 1
    assert errors[0].endswith('has no epochs left of 3')
    status, _, errors = train([*arguments, '--schedule.epochs', '4', '--resume', str(finished / 'best')])
    assert (status, errors) == (0, [])
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['best_epoch'] == 4
    status, _, errors = train([*arguments, '--schedule.epochs', '4', '--resume', str(finished)])  # another run's
    assert status == 1
    assert 'holds a run already' in errors[0]


def test_a_branch_of_a_run_replaces_what_came_after(finished, photos, tmp_path, train, monkeypatch):
    """However the paths are spelled."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, 'run')
    newest = sorted((tmp_path / 'run' / 'checkpoints').iterdir())[-1]
    (newest / 'model.safetensors').write_bytes(b'damaged')
    before = newest.stat().st_ino
    arguments = settings(photos, 'run', schedule__epochs=3, **RICH)
    assert train([*arguments, '--resume', str(tmp_path / 'run')])[0] == 0
    assert newest.stat().st_ino != before
    assert same_weights(newest / 'model.safetensors', finished / 'checkpoints' / newest.name / 'model.safetensors')


@pytest.mark.parametrize('schedule', ['none', 'cosine'])
def test_a_resumed_run_has_the_settings_that_it_is_given(schedule, photos, tmp_path, train, monkeypatch):
    arguments = settings(photos, tmp_path / 'run', schedule__name=schedule, schedule__warmup_epochs=0)
    assert train([*arguments, '--schedule.epochs', '1'])[0] == 0
    seen = []
    monkeypatch.setattr(Trainer, 'fit', lambda self: seen.append(self) or 1 / 0)
    changes = ['--optim.lr', '0.5', '--optim.weight_decay', '0.25', '--optim.betas', '[0.5, 0.75]']
    with pytest.raises(ZeroDivisionError):
        train([*arguments, '--schedule.epochs', '2', '--resume', 'auto', *changes])
    (trainer,) = seen
    trainer.rate.move_to(0)
    groups = trainer.optimizer.param_groups
    assert {group['lr'] for group in groups} == {0.5}
    assert {group['weight_decay'] for group in groups} == {0.0, 0.25}
    assert {tuple(group['betas']) for group in groups} == {(0.5, 0.75)}
    assert trainer.optimizer.state


def test_loss_that_is_not_finite(photos, tmp_path, train):
    """Whatever the run tries, this learning rate never works: it stops, and what was good before is kept."""
    arguments = settings(photos, tmp_path / 'run', optim__name='sgd', health__skip=1, health__rollbacks=1)
    assert train([*arguments, '--schedule.epochs', '1'])[0] == 0
    best = (tmp_path / 'run' / 'best' / 'model.safetensors').read_bytes()
    status, _, errors = train([*arguments, '--optim.lr', '1e30', '--resume', 'auto', '--schedule.epochs', '3'])
    assert status == 1
    assert errors[-1].startswith('error: 2 updates in a row had no finite loss or gradients; the last: the loss is nan')
    assert 'lower optim.lr' in errors[-1]
    assert (tmp_path / 'run' / 'best' / 'model.safetensors').read_bytes() == best
    assert (tmp_path / 'run' / 'checkpoints' / 'epoch_0001_batch_00000000').is_dir()


def test_disk_full_while_a_checkpoint_is_written(photos, tmp_path, train, monkeypatch):
    arguments = settings(photos, tmp_path / 'run')
    assert train([*arguments, '--schedule.epochs', '1'])[0] == 0

    def full(self, folder, **kwargs):
        raise RuntimeError('[enforce fail at inline_container.cc:642] . unexpected pos 64 vs 0')  # what torch.save says

    monkeypatch.setattr(Accelerator, 'save_state', full)
    status, _, errors = train([*arguments, '--schedule.epochs', '3', '--resume', 'auto'])
    assert status == 1
    assert len(errors) == 1
    assert 'continue from' in errors[0]
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['epoch_0001_batch_00000000']


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__name': 'dcnv4_tyni'}, "error: model.name: unknown model 'dcnv4_tyni' (did you mean 'dcnv4_tiny'?)"),
        ({'model__name': 'test_dcnv4.nowhere'}, "error: model.name 'test_dcnv4.nowhere' cannot be created: Invalid"),
        ({'model__name': 'local-dir:nowhere'}, 'error: model.name: no config.json in the folder nowhere'),
        ({'model__kwargs': '{depth: 3}'}, "error: model.name 'test_dcnv4' cannot be created: "),
        ({'model__num_classes': 2}, 'error: model.num_classes is 2, but the data set has 3 classes'),
        ({'optim__name': 'adamv'}, "error: optim.name: cannot create 'adamv' (did you mean 'adam"),
        ({'optim__kwargs': '{nestorov: true}'}, "error: optim.name: cannot create 'adamw': "),
        ({'schedule__name': 'cosin'}, "error: schedule.name: cannot create 'cosin': Unknown scheduler"),
        ({'data__batch_size': 40}, 'error: 36 training images do not fill one batch of 40 on 1 process: lower'),
        ({'data__mean': '[0.5, 0.5]'}, 'error: data.mean should have 1 or 3 values, got 2'),
        ({'run__trackers': '[wandbb]'}, 'error: '),
        ({'run__processes': 2}, 'error: 2 processes were asked for, but 1 started'),
        ({'run__precision': 'fp16'}, 'error: run.precision: fp16 needs a GPU'),
        ({'run__output': '/proc/run'}, 'error: run.output: cannot write to /proc/run: '),
    ],
)
def test_mistakes_are_one_line(photos, tmp_path, train, changes, message):
    status, _, errors = train(settings(photos, tmp_path / 'run', **changes))
    assert status in (1, 2)
    assert len(errors) == 1, errors
    assert errors[0].startswith(message)
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_output_under_a_file(photos, tmp_path, train):
    (tmp_path / 'file').touch()
    status, _, errors = train(settings(photos, tmp_path / 'file' / 'run'))
    assert (status, errors) == (1, [f'error: run.output: cannot write to {tmp_path / "file" / "run"}: Not a directory'])


def test_resume_of_another_model(finished, photos, tmp_path, train):
    shutil.copytree(finished, tmp_path / 'run')
    status, _, errors = train([*settings(photos, tmp_path / 'run', model__name='test_convnext'), '--resume', 'auto'])
    assert status == 1
    assert len(errors) == 1
    assert 'is a checkpoint of another model: architecture is test_dcnv4, not test_convnext' in errors[0]
    assert same_weights(finished / 'best' / 'model.safetensors', tmp_path / 'run' / 'best' / 'model.safetensors')


def test_weights_of_another_model(finished, photos, tmp_path, train):
    weights = finished / 'best' / 'model.safetensors'
    status, _, errors = train(
        settings(photos, tmp_path / 'run', model__name='test_convnext', model__checkpoint=weights)
    )
    assert status == 1
    assert len(errors) == 1
    assert f"error: model.name 'test_convnext' cannot be created with the weights of {weights}: " in errors[0]


def test_resume_with_another_batch_size(finished, photos, tmp_path, train):
    """At the same place in the epoch, and it says so."""
    kept = 'epoch_0001_batch_00000002'
    shutil.copytree(finished / 'checkpoints' / kept, tmp_path / 'run' / 'checkpoints' / kept)
    arguments = [*settings(photos, tmp_path / 'run', schedule__epochs=2, **RICH), '--resume', 'auto']
    status, text, errors = train([*arguments, '--data.batch_size', '4'])
    assert (status, errors) == (0, [])
    assert '8 images per batch before, 4 now; 4 batches per epoch before, 9 now' in text
    assert 'batch 4 of 9' in text


def test_the_average_follows_timm(photos, tmp_path, train, monkeypatch):
    steps = []
    monkeypatch.setattr(ModelEmaV3, 'update', lambda self, model, step: steps.append(step))
    assert train(settings(photos, tmp_path / 'run', schedule__epochs=1, ema__decay=0.9))[0] == 0
    assert steps == [1, 2, 3, 4]


def test_processes_that_were_asked_for(monkeypatch, tmp_path):
    """By the arguments of `accelerate launch`, its configuration, or another launcher."""
    monkeypatch.setattr(launch, 'default_config_file', str(tmp_path / 'none.yaml'))
    assert asked_processes(['--num_processes', '3', 'train', '--config', 'x']) == 3
    assert asked_processes(['train', '--config', 'x']) == 0
    file = str(REPOSITORY / 'configs' / 'accelerate' / 'ddp.yaml')
    assert asked_processes(['--config_file', file, 'train']) == 8
    assert asked_processes(['--config_file', file, '--num-processes=2', 'train']) == 2
    assert launched_processes() == 0
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert launched_processes() == 2
