"""Every setting of a run: dataclasses filled from a YAML file and from the command line by jsonargparse.

A key of the YAML is an option of the command line: `optim: {lr: 1e-3}` and `--optim.lr 1e-3` are the same, and the last
one given wins. What no run could mean (unknown keys, wrong types, contradictions) raises `TrainError` with one line.
"""

import contextlib
import difflib
import io
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from .errors import TrainError, nearest

USAGE = 'accelerate launch train --config NAME|FILE [--GROUP.SETTING VALUE ...] [--resume auto|RUN]'
DESCRIPTION = 'Trains an image classification model of timm, those of dcnzoo included.'


@dataclass
class ModelConfig:
    """The network."""

    name: str = 'dcnv4_tiny'
    """model of timm or dcnzoo (`dcnzoo list`), with or without a pretrained tag, or hf-hub:ORG/NAME or local-dir:DIR"""
    pretrained: bool = False
    """start from the model's published weights; a classifier of another size starts anew"""
    checkpoint: str | None = None
    """start from this weights file instead (.safetensors, or a published .pth)"""
    num_classes: int | None = None
    """outputs of the classifier; taken from the data set where it knows its classes"""
    in_chans: int = 3
    """channels of an input image: 3 reads RGB, 1 reads grey"""
    drop_rate: float = 0.0
    """dropout before the classifier"""
    drop_path_rate: float | None = None
    """stochastic depth of the last block, growing linearly from 0 at the first; the model's own if not given"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of the model, such as {depths: [2, 2, 4, 2]}"""
    grad_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    channels_last: bool = True
    """keep images and convolution weights in NHWC memory order"""
    compile: bool = False
    """compile the model with torch.compile"""


@dataclass
class DataConfig:
    """The images."""

    root: str | None = None
    """folder of the data set; an image folder is ROOT/SPLIT/CLASS/*.jpg (or ROOT/SPLIT.tar)"""
    dataset: str = ''
    """empty for an image folder, or a name of timm: torch/cifar10, hfds/ORG/NAME, hfids/..., tfds/NAME, wds/NAME"""
    train_split: str = 'train'
    """split to train on"""
    val_split: str = 'val'
    """split to validate on; an image folder may also call it valid, validation, eval or test"""
    image_size: int | tuple[int, int] | None = None
    """side, or height and width, of the network's input in pixels; the model's own if not given"""
    train_image_size: int | tuple[int, int] | None = None
    """the same of the training crops, where they differ: crops magnify, so that smaller ones fit, and train faster"""
    batch_size: int = 64
    """training images per step and process"""
    val_batch_size: int | None = None
    """validation images per step and process; as for training if not given"""
    workers: int = 4
    """processes that load images, per training process; 0 loads in the training process itself"""
    mean: tuple[float, ...] | None = None
    """mean of the pixels per channel, of 1; the model's own if not given"""
    std: tuple[float, ...] | None = None
    """standard deviation of the pixels per channel, of 1; the model's own if not given"""
    interpolation: str | None = None
    """resampling at validation: bilinear, bicubic, ...; the model's own if not given"""
    crop_pct: float | None = None
    """share of the resized image's side that validation crops; the model's own if not given"""
    download: bool = False
    """download the data set where timm can"""
    max_unreadable: int = 20
    """skip and name up to this many images that cannot be read, per process; one more stops the run"""


@dataclass
class AugmentConfig:
    """What training does to an image and to its label."""

    crop_mode: Literal['rrc', 'rkrc', 'rkrr', 'none'] = 'rrc'
    """random resized crop, or timm's crops that keep the aspect ratio; none: as at validation, and no other change"""
    scale: tuple[float, float] = (0.08, 1.0)
    """range of the crop's share of the image's area"""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """range of the crop's aspect ratio"""
    hflip: float = 0.5
    """probability of a horizontal flip"""
    vflip: float = 0.0
    """probability of a vertical flip"""
    color_jitter: float = 0.4
    """range of brightness, contrast and saturation; auto_augment takes its place"""
    auto_augment: str | None = None
    """policy of timm, such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or 3a"""
    interpolation: str | None = None
    """resampling at training: random, bilinear, bicubic, ...; as at validation if not given"""
    random_erasing: float = 0.0
    """probability of erasing a box of the image"""
    erasing_mode: Literal['const', 'rand', 'pixel'] = 'pixel'
    """what fills the erased box: zeros, one random colour, or noise"""
    mixup: float = 0.0
    """alpha of mixup; 0 is off"""
    cutmix: float = 0.0
    """alpha of cutmix; 0 is off"""
    mix_prob: float = 1.0
    """probability that a batch is mixed at all"""
    mix_switch_prob: float = 0.5
    """probability of cutmix where both are on"""
    mix_mode: Literal['batch', 'pair', 'elem'] = 'batch'
    """draw the mix per batch, per pair or per image"""
    mix_off_epoch: int | None = None
    """train without mixup and cutmix from this epoch on, the first being 0"""
    label_smoothing: float = 0.1
    """share of the label spread over all classes"""


@dataclass
class OptimConfig:
    """How the weights move."""

    name: str = 'adamw'
    """optimizer of timm: adamw, sgd, lamb, nadamw, muon, ..."""
    lr: float = 1e-3
    """highest learning rate"""
    lr_base_batch: int = 0
    """if not 0, lr, warmup_lr and min_lr are given for this global batch and scaled linearly to that of the run"""
    weight_decay: float = 0.05
    """weight decay, not applied to biases, norms and what the model excludes"""
    momentum: float = 0.9
    """momentum of the optimizers that have one"""
    betas: tuple[float, float] | None = None
    """betas of the Adam family; the optimizer's own if not given"""
    eps: float | None = None
    """epsilon; the optimizer's own if not given"""
    layer_decay: float | None = None
    """factor on the learning rate per layer from the classifier down"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer"""
    clip_grad: float | None = None
    """largest gradient, measured as clip_mode says; not given is off"""
    clip_mode: Literal['norm', 'value', 'agc'] = 'norm'
    """clip the global norm, each value, or each weight's gradient against the weight (adaptive)"""
    accumulate: int = 1
    """batches whose gradients are averaged into one update"""


@dataclass
class ScheduleConfig:
    """How long, and how the learning rate goes."""

    name: str = 'cosine'
    """schedule of timm: cosine, step, multistep, poly, tanh, plateau, or none"""
    epochs: int = 100
    """passes over the training images"""
    warmup_epochs: float = 5
    """epochs of linear warm-up, part of epochs"""
    warmup_lr: float = 1e-6
    """learning rate at the start of the warm-up"""
    min_lr: float = 0.0
    """learning rate at the end"""
    decay_epochs: float = 30
    """epochs between the drops of step"""
    decay_milestones: list[int] = field(default_factory=lambda: [30, 60, 90])
    """epochs of the drops of multistep"""
    decay_rate: float = 0.1
    """factor of a drop, or the power of poly"""
    patience_epochs: int = 10
    """epochs without a better top-1 before plateau drops"""


@dataclass
class EmaConfig:
    """Exponential moving average of the weights: where it is on, it is what is validated and saved as the model."""

    decay: float = 0.0
    """share of the old average kept per update, such as 0.9999; 0 is off"""
    warmup: bool = True
    """let the decay grow with the number of updates, so that short runs forget their first weights"""


@dataclass
class RunConfig:
    """Where and how the run happens."""

    output: str | None = None
    """folder of the run; runs/NAME OF THE CONFIG if not given"""
    overwrite: bool = False
    """replace an earlier run in that folder"""
    seed: int = 0
    """seed of weights, order, augmentation and dropout"""
    precision: Literal['no', 'fp16', 'bf16'] | None = None
    """mixed precision; what accelerate was launched or configured with if not given"""
    cpu: bool = False
    """train on the CPU even if there is an accelerator"""
    processes: int | None = None
    """refuse to start unless this many processes take part"""
    log_every: int = 10
    """updates between two lines of the trackers and two checks of the loss"""
    val_every: int = 1
    """epochs between two validations; the last epoch always has one"""
    checkpoint_every: int = 0
    """updates between two checkpoints, besides the one after every epoch; 0 is off"""
    keep: int = 2
    """resumable checkpoints kept"""
    trackers: list[str] = field(default_factory=lambda: ['tensorboard'])
    """trackers of accelerate beside the CSV: tensorboard, wandb, trackio, mlflow, ..."""


@dataclass
class Config:
    """All settings of one run."""

    resume: str | None = None
    """auto: continue the run in the output folder, if there is one; or a run's folder or checkpoint"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back; where it was resumed from is no part of it."""
        content = {name: group for name, group in asdict(self).items() if name != 'resume'}
        return yaml.safe_dump(_plain(content), sort_keys=False, width=120)


def parse(argv: Sequence[str] | None = None) -> Config:
    """Reads the command line and the YAML files it names.

    Args:
        argv: arguments; those of the process if not given.

    Raises:
        TrainError: on anything that is unknown, unreadable, of a wrong type or contradictory.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, configs = _locate_configs(argv)
    for config in configs:
        _check_keys(_yaml_keys(config), f'in {config}')
    _check_keys((arg[2:].split('=')[0] for arg in argv if arg.startswith('--')), 'on the command line', dashes='--')

    parser = _build_parser()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed = parser.instantiate(parser.parse_args(argv))
    except (ArgumentError, TypeError, ValueError) as error:
        raise TrainError(f'{_plain_message(str(error))} (--help lists all settings)', usage=True) from None
    config = Config(**{entry.name: getattr(parsed, entry.name) for entry in fields(Config)})
    if config.run.output is None:
        config.run.output = str(Path('runs') / (configs[-1].stem if configs else config.model.name.split(':')[-1]))
    _check(config)
    return config


def _build_parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog='train', usage=USAGE, description=DESCRIPTION, exit_on_error=False)
    parser.add_argument('--config', action='config', help='YAML file, or the name of one in configs/')
    resume = "'auto': continue the run in the output folder, if there is one; or a run's folder or checkpoint"
    parser.add_argument('--resume', type=str | None, default=None, help=resume)
    for entry in fields(Config):
        if is_dataclass(entry.type):
            parser.add_argument(f'--{entry.name}', type=entry.type, default=entry.type())
    return parser


def _locate_configs(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Replaces names given to --config by paths; a run to resume brings its configuration, unless one is given."""
    located, configs = [], []
    arguments = iter(argv)
    for arg in arguments:
        option, equals, value = arg.partition('=')
        if option != '--config':
            located.append(arg)
            continue
        if not equals:
            value = next(arguments, None)
            if value is None:
                raise TrainError('--config needs a YAML file, or the name of one in configs/', usage=True)
        configs.append(find_config(value))
        located += ['--config', str(configs[-1])]
    if not configs and (stored := _stored_config(argv)):
        configs, located = [stored], ['--config', str(stored), *located]
    return located, configs


def _stored_config(argv: list[str]) -> Path | None:
    """run.yaml of the run that --resume names by its folder."""
    pairs = zip(argv, [*argv[1:], ''], strict=True)
    for value in (arg.partition('=')[2] or following for arg, following in pairs if arg.split('=')[0] == '--resume'):
        for folder in (Path(value), *Path(value).parents[:2]):
            if (folder / 'run.yaml').is_file():
                return folder / 'run.yaml'
    return None


def find_config(name: str) -> Path:
    """The YAML file at the path `name`, or called so in configs/ of the working directory or of the clone."""
    folders = [Path('configs'), Path(__file__).parents[2] / 'configs']
    for path in (Path(name), *(folder / name for folder in folders)):
        for candidate in (path, path.with_name(f'{path.name}.yaml')):
            if candidate.is_file():
                return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob('*.yaml')})
    listing = f'; configs/ has {", ".join(known)}' if known else ''
    raise TrainError(f'no configuration {name!r}: no such file{nearest(Path(name).stem, known)}{listing}', usage=True)


def _yaml_keys(path: Path) -> Iterator[str]:
    """Dotted names of all keys in a YAML file."""
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(f'cannot read {path} as YAML: {error}', usage=True) from None
    if not isinstance(content, dict):
        raise TrainError(f'{path} should map settings to values, but holds {type(content).__name__}', usage=True)
    for group, values in content.items():
        yield str(group)
        if isinstance(values, dict):
            yield from (f'{group}.{key}' for key in values)
        elif group != 'resume':
            raise TrainError(f'{group} in {path} should map settings to values, but is {values!r}', usage=True)


def _known_keys() -> set[str]:
    groups = {entry.name: entry.type for entry in fields(Config)}
    settings = {name: fields(group) for name, group in groups.items() if is_dataclass(group)}
    nested = {f'{name}.{entry.name}' for name, entries in settings.items() for entry in entries}
    return {'config', 'help', 'print_config', *groups, *nested}


def _check_keys(keys: Iterable[str], where: str, dashes: str = '') -> None:
    known = _known_keys()
    for key in keys:
        if key.removesuffix('+') not in known and not key.startswith(('model.kwargs.', 'optim.kwargs.')):
            hint = _nearest_key(key, known)
            raise TrainError(f'unknown setting {dashes}{key} {where}{hint}', usage=True)


def _nearest_key(key: str, known: set[str]) -> str:
    """A hint at the setting of the nearest name; of those called the same, the one in the nearest group."""
    group, _, name = key.rpartition('.')
    names = difflib.get_close_matches(name, {entry.rpartition('.')[2] for entry in known}, n=1)
    namesakes = [entry for entry in known if entry.rpartition('.')[2] in names]
    if not namesakes:
        return nearest(key, known)
    likeness = {entry: difflib.SequenceMatcher(None, group, entry.rpartition('.')[0]).ratio() for entry in namesakes}
    return f' (did you mean {max(sorted(namesakes), key=likeness.get)!r}?)'


def _plain_message(message: str) -> str:
    """jsonargparse's message as one line, such as `optim.lr should be float, got abc`."""
    complaint = re.search(r'Parser key "(\w+)\.(\w+)".*(?:Given|Got) value: (.*)', message, flags=re.DOTALL)
    if complaint is None:
        return message.rstrip('.')
    group, name, value = complaint.groups()
    kind = next((entry.type for entry in fields(Config.__dataclass_fields__[group].type) if entry.name == name), None)
    expected = kind.__name__ if isinstance(kind, type) else str(kind).replace('typing.', '')
    return f'{group}.{name} should be {expected}, got {value}'


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shorter(size: int | tuple[int, int] | None) -> int | None:
    return min(size) if isinstance(size, tuple) else size


def _check(config: Config) -> None:
    """Raises on values that no run could mean."""
    model, data, augment, optim, schedule = config.model, config.data, config.augment, config.optim, config.schedule
    probabilities = {
        'model.drop_rate': model.drop_rate,
        'model.drop_path_rate': model.drop_path_rate or 0.0,
        **{
            f'augment.{name}': getattr(augment, name)
            for name in ('hflip', 'vflip', 'random_erasing', 'mix_prob', 'mix_switch_prob', 'label_smoothing')
        },
        'ema.decay': config.ema.decay,
    }
    at_least = {
        'model.num_classes': (model.num_classes, 1),
        'data.image_size': (_shorter(data.image_size), 1),
        'data.train_image_size': (_shorter(data.train_image_size), 1),
        'data.batch_size': (data.batch_size, 1),
        'data.val_batch_size': (data.val_batch_size, 1),
        'data.workers': (data.workers, 0),
        'data.max_unreadable': (data.max_unreadable, 0),
        'augment.mixup': (augment.mixup, 0),
        'augment.cutmix': (augment.cutmix, 0),
        'optim.lr': (optim.lr, 0),
        'optim.lr_base_batch': (optim.lr_base_batch, 0),
        'optim.accumulate': (optim.accumulate, 1),
        'schedule.epochs': (schedule.epochs, 1),
        'schedule.warmup_epochs': (schedule.warmup_epochs, 0),
        'run.seed': (config.run.seed, 0),
        'run.log_every': (config.run.log_every, 1),
        'run.val_every': (config.run.val_every, 1),
        'run.checkpoint_every': (config.run.checkpoint_every, 0),
        'run.keep': (config.run.keep, 1),
    }
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise TrainError(f'{name} should lie between 0 and 1, got {value}', usage=True)
    for name, (value, least) in at_least.items():
        if value is not None and not value >= least:
            raise TrainError(f'{name} should be at least {least}, got {value}', usage=True)
    for name in ('scale', 'ratio'):
        low, high = getattr(augment, name)
        if not 0 < low <= high:
            raise TrainError(f'augment.{name} should be two positive numbers in order, got {low}, {high}', usage=True)
    if model.in_chans not in (1, 3):
        raise TrainError(f'model.in_chans should be 1 or 3, got {model.in_chans}', usage=True)
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        raise TrainError(f'data.batch_size should be even, as mixup pairs images, got {data.batch_size}', usage=True)
    if schedule.warmup_epochs >= schedule.epochs and schedule.name != 'none':
        raise TrainError(
            f'schedule.warmup_epochs should be less than schedule.epochs ({schedule.epochs}), '
            f'got {schedule.warmup_epochs}',
            usage=True,
        )
    if model.checkpoint is not None and not Path(model.checkpoint).is_file():
        raise TrainError(f'model.checkpoint: no file {model.checkpoint}')
