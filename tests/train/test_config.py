import pytest
import yaml

from dcnzoo.train.arguments import find_config, parse
from dcnzoo.train.config import Config, ModelConfig
from dcnzoo.train.errors import TrainError

from .conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / 'configs').glob('*.yaml'))


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_yaml_and_command_line(tmp_path):
    file = write(tmp_path / 'mine.yaml', {'model': {'name': 'a'}, 'optim': {'lr': '5e-4', 'betas': [0.9, 0.95]}})
    config = parse(['--optim.name', 'sgd', '--config', file, '--optim.momentum=0.5', '--data.image_size', '[32, 48]'])
    assert config.model == ModelConfig(name='a')
    assert (config.optim.lr, config.optim.betas, config.optim.name, config.optim.momentum) == (
        5e-4,
        (0.9, 0.95),
        'sgd',
        0.5,
    )
    assert config.data.image_size == (32, 48)
    assert config.run.output == 'runs/mine'


def test_last_one_wins(tmp_path):
    file = write(tmp_path / 'mine.yaml', {'optim': {'lr': 1.0}})
    assert parse(['--config', file, '--optim.lr', '2']).optim.lr == 2
    assert parse(['--optim.lr', '2', '--config', file]).optim.lr == 1


def test_round_trip(tmp_path):
    first = parse(
        ['--model.kwargs.depths', '[1, 2, 3, 1]', '--augment.scale', '[0.5,1]', '--optim.kwargs', '{nesterov: true}']
    )
    again = parse(['--config', write(tmp_path / 'run.yaml', first.to_yaml())])
    assert again == first
    assert again.model.kwargs == {'depths': [1, 2, 3, 1]}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs(path):
    """Each parses, by its path and by its name, and says on top how to run it."""
    assert parse(['--config', str(path)]) == parse(['--config', path.stem])
    assert f'train --config {path.stem}' in path.read_text()


@pytest.mark.parametrize(('name', 'drop_path'), [('tiny', 0.1), ('small', 0.4), ('base', 0.5)])
def test_published_settings(name, drop_path):
    config = parse(['--config', f'dcnv4_{name}_in1k'])
    assert (config.model.name, config.model.drop_path_rate, config.data.image_size) == (f'dcnv4_{name}', drop_path, 224)
    optim, schedule, augment = config.optim, config.schedule, config.augment
    assert (optim.name, optim.lr, optim.lr_base_batch, optim.weight_decay) == ('adamw', 5e-4, 512, 0.05)
    assert (optim.clip_grad, optim.clip_mode) == (5.0, 'norm')
    assert (schedule.name, schedule.epochs, schedule.warmup_epochs) == ('cosine', 300, 20)
    assert (schedule.warmup_lr, schedule.min_lr) == (5e-7, 5e-6)
    assert (augment.auto_augment, augment.mixup, augment.cutmix) == ('rand-m9-mstd0.5-inc1', 0.8, 1.0)
    assert (augment.random_erasing, augment.label_smoothing) == (0.25, 0.1)
    assert config.ema.decay == 0.9999


@pytest.mark.parametrize('name', ['parameternet_600m', 'parameternet_300m'])
def test_published_settings_of_parameternet(name):
    scratch, pretraining, tuning = (
        parse(['--config', f'{name}_{data}']) for data in ('in1k', 'in22k', 'in22k_ft_in1k')
    )
    for config in (scratch, pretraining, tuning):
        assert (config.model.name, config.optim.name, config.schedule.name) == (name, 'adamw', 'cosine')
    assert (scratch.optim.layer_decay, pretraining.optim.layer_decay, tuning.optim.layer_decay) == (None, None, 0.5)
    assert tuning.augment.random_erasing == 0


def test_published_settings_of_large():
    config = parse(['--config', 'dcnv4_large_in22k_ft_in1k'])
    optim, schedule, augment = config.optim, config.schedule, config.augment
    assert (config.model.name, config.data.image_size, config.model.drop_path_rate) == ('dcnv4_large', 384, 0.1)
    assert (optim.name, optim.lr, optim.lr_base_batch, optim.layer_decay) == ('adamw', 2e-5, 512, 0.9)
    assert optim.groups == {'*.offset_mask*': {'lr_scale': 0.1}}
    assert (schedule.epochs, schedule.warmup_epochs, augment.mixup, augment.cutmix) == (20, 2, 0, 0)


def test_there_are_configs():
    assert {'digits_atto', 'flowers_atto', 'finetune_folder', 'dcnv4_tiny_in1k'} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'optim': {'lrr': 1}}, r"unknown setting optim\.lrr in .*mine\.yaml \(did you mean 'optim\.lr'\?\)"),
        ({'optm': {'lr': 1}}, r"unknown setting optm in .*mine\.yaml \(did you mean 'optim'\?\)"),
        (
            {'model': {'weight_decay': 1}},
            r"unknown setting model\.weight_decay .*\(did you mean 'optim\.weight_decay'\?\)",
        ),
        ({'optim': {'lr': 'high'}}, r'optim\.lr should be float, got high'),
        ({'schedule': {'epochs': 1.5}}, r'schedule\.epochs should be int, got 1\.5'),
        ({'optim': {'clip_mode': 'no'}}, r"optim\.clip_mode should be Literal\['norm', 'value', 'agc'\], got no"),
        ({'data': {'image_size': 'big'}}, r'data\.image_size should be int \| tuple\[int, int\] \| None, got big'),
        ({'optim': 3}, r'optim in .*mine\.yaml should map settings to values, but is 3'),
        ([1, 2], r'mine\.yaml should map settings to values, but holds list'),
        ('', r'mine\.yaml should map settings to values, but holds NoneType'),
        ('optim: [lr: 3', r'cannot read .*mine\.yaml as YAML'),
    ],
)
def test_wrong_yaml(tmp_path, content, message):
    with pytest.raises(TrainError, match=message) as error:
        parse(['--config', write(tmp_path / 'mine.yaml', content)])
    assert error.value.status == 2
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--optim.lrr', '3'], r"unknown setting --optim\.lrr on the command line \(did you mean 'optim\.lr'\?\)"),
        (['--lr=3'], r"unknown setting --lr on the command line \(did you mean 'optim\.lr'\?\)"),
        (['--config', 'digits_ato'], r"no configuration 'digits_ato': no such file \(did you mean 'digits_atto'\?\)"),
        (['--config'], '--config needs a YAML file'),
        (['data'], 'unrecognized arguments: data'),
        (['--optim.lr'], 'expected one argument'),
        (['--run.precision', 'fp8'], r"run\.precision should be .*'bf16'.*, got fp8"),
        (['--data.interpolation', 'foo'], r"data\.interpolation should be .*'bilinear', 'bicubic'.*, got foo"),
        (['--data.interpolation', 'random'], r'data\.interpolation should be .*, got random'),
        (['--augment.interpolation', 'foo'], r"augment\.interpolation should be .*'random', .*, got foo"),
        (['--augment.label_smoothing', '2'], r'augment\.label_smoothing should lie between 0 and 1, got 2'),
        (['--data.batch_size', '0'], r'data\.batch_size should be at least 1, got 0'),
        (['--optim.lr', 'nan'], r'optim\.lr should be float, got nan'),
        (['--augment.mixup', '1', '--data.batch_size', '3'], r'data\.batch_size should be even'),
        (['--augment.scale', '[1.0, 0.1]'], r'augment\.scale should be two positive numbers in order'),
        (
            ['--schedule.epochs', '5', '--schedule.warmup_epochs', '5'],
            r'schedule\.warmup_epochs should be less than schedule\.epochs \(5\), got 5',
        ),
        (
            ['--schedule.epochs', '5', '--schedule.warmup_epochs', '2', '--schedule.cooldown_epochs', '3'],
            r'schedule\.cooldown_epochs should leave some of schedule\.epochs \(5\) after 2 of warm-up, got 3',
        ),
        (['--optim.clip_grad', '-1'], r'optim\.clip_grad should be positive, got -1'),
        (['--optim.weight_decay', '-1'], r'optim\.weight_decay should be at least 0, got -1'),
        (['--data.std', '[0.2, 0, 0.2]'], r'data\.std should be positive numbers, got \(0\.2, 0\.0, 0\.2\)'),
        (['--run.seed', str(1 << 64)], r'run\.seed should be less than 2\*\*63, got 18446744073709551616'),
        (['--model.checkpoint', 'nowhere.pth'], r'model\.checkpoint: no file nowhere\.pth'),
    ],
)
def test_wrong_command_line(arguments, message):
    with pytest.raises(TrainError, match=message):
        parse(arguments)


def test_a_warm_up_that_is_not_given_is_short():
    for epochs, warmup in ((1, 0.1), (20, 2), (50, 5), (300, 5)):
        assert parse(['--schedule.epochs', str(epochs)]).schedule.warmup == warmup
    assert parse(['--schedule.epochs', '9', '--schedule.warmup_epochs', '8']).schedule.warmup == 8


def test_names_are_found_beside_the_package_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config('digits_atto').samefile(REPOSITORY / 'configs' / 'digits_atto.yaml')
    (tmp_path / 'configs').mkdir()
    write(tmp_path / 'configs' / 'digits_atto.yaml', {'model': {'name': 'a'}})
    assert parse(['--config', 'digits_atto']).model.name == 'a'


def test_a_run_to_resume_brings_its_configuration(tmp_path):
    write(tmp_path / 'run.yaml', parse(['--optim.lr', '7', '--run.output', str(tmp_path)]).to_yaml())
    for named in (tmp_path, tmp_path / 'best', tmp_path / 'checkpoints' / 'epoch_0001_batch_00000000'):
        config = parse(['--resume', str(named), '--schedule.epochs', '9'])
        assert (config.optim.lr, config.schedule.epochs, config.run.output) == (7, 9, str(tmp_path))
    assert parse(['--resume=auto']).optim.lr == Config().optim.lr


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert '--optim.clip_grad' in text
    assert 'largest gradient, measured as clip_mode says' in ' '.join(text.split())
