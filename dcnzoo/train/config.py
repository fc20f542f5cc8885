"""Every setting of a run, in dataclasses; what no run could mean raises `TrainError` with one line.

A docstring below a setting is its line in `--help`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .cores import share_of_cores
from .errors import TrainError

MODES = ('resume', 'dry_run', 'eval')  # of one start, not of a run


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
    compile_backend: str = 'inductor'
    """what torch.compile makes of it, a name of torch.compiler.list_backends()"""
    sync_bn: bool = False
    """take the statistics of batch norms over all processes; on GPUs"""
    head_only: bool = False
    """train the classifier alone, on a network that stays as it is"""
    freeze: list[str] = field(default_factory=list)
    """modules that stay as they are, such as [stem, stages.0, "stages.1.*"]; the rest is trained"""
    freeze_bn: bool = False
    """keep weights and statistics of all batch norms as they are"""


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
    workers: int = field(default_factory=lambda: min(4, share_of_cores()))
    """processes that load images, per training process, four or as many as it has cores if not given; 0 loads in the
    training process itself"""
    prefetch: int = 2
    """batches that each of these processes prepares ahead"""
    mean: tuple[float, ...] | None = None
    """mean of the pixels per channel, of 1; the model's own if not given"""
    std: tuple[float, ...] | None = None
    """standard deviation of the pixels per channel, of 1; the model's own if not given"""
    interpolation: Literal['nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'] | None = None
    """resampling at validation; the model's own if not given"""
    crop_pct: float | None = None
    """share of the resized image's side that validation crops; the model's own if not given"""
    crop_mode: Literal['center', 'squash', 'border'] | None = None
    """what validation crops: the centre, the whole squeezed to the shape, or the whole with borders"""
    download: bool = False
    """download the data set where timm can"""
    max_unreadable: int = 20
    """skip and name up to this many images that cannot be read; one more stops the run"""
    target_key: str | None = None
    """field of the label in hfds/, hfids/ and wds/; of several binary labels all their names, with commas"""
    multi_label: bool = False
    """an image has any number of labels: independent binary classes, judged by mean average precision"""
    real_labels: str | None = None
    """for --eval on ImageNet: JSON of the reassessed labels, or `imagenet` for those that timm brings"""


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
    interpolation: Literal['random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'] | None = None
    """resampling at training, random being bilinear or bicubic; as at validation if not given"""
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
    splits: int = 0
    """if more than 1, an image comes clean and in this many less one augmented versions; for loss.name jsd"""
    repeats: int = 1
    """augmented versions of an image in a row; an epoch keeps its length, so that it sees fewer images"""
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
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """parameters of their own by pattern: {"*.dcn.*": {lr_scale: 0.1, weight_decay: 0.0}}; the last match counts"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of the optimizer"""
    clip_grad: float | None = None
    """largest gradient, measured as clip_mode says; not given is off"""
    clip_mode: Literal['norm', 'value', 'agc'] = 'norm'
    """clip the global norm, each value, or each weight's gradient against the weight (adaptive)"""
    accumulate: int = 1
    """batches whose gradients are averaged into one update"""


@dataclass
class LossConfig:
    """What is minimized."""

    name: Literal['ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr'] | None = None
    """loss of timm; cross-entropy, or its binary form where there are several labels, if not given"""
    class_weight: Literal['inv_freq', 'effective_num', 'neg_pos'] | None = None
    """weigh classes by their number of training images; neg_pos weighs their positives, for bce and asl"""
    class_weights: list[float] | None = None
    """the same with given weights, one per class"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm's create_classification_loss, such as {bce_target_thresh: 0.2}"""


@dataclass
class DistillConfig:
    """A teacher whose answers the model learns too."""

    teacher: str | None = None
    """model of timm with weights for the same classes, or hf-hub:ORG/NAME or local-dir:DIR; none if not given"""
    checkpoint: str | None = None
    """weights file of the teacher, if not its published ones"""
    weight: float = 0.5
    """share of the teacher's answers in the loss; the labels have the rest"""
    temperature: float = 1.0
    """by which both answers are softened"""


@dataclass
class ScheduleConfig:
    """How long, and how the learning rate goes."""

    name: str = 'cosine'
    """schedule of timm: cosine, step, multistep, poly, tanh, wsd, rsqrt, plateau, constant, or none"""
    epochs: int = 100
    """passes over the training images"""
    warmup_epochs: float | None = None
    """epochs of linear warm-up, part of epochs; 5, but at most a tenth of epochs, if not given"""
    warmup_lr: float = 1e-6
    """learning rate at the start of the warm-up"""
    min_lr: float = 0.0
    """learning rate at the end"""
    decay_epochs: float | None = None
    """epochs between the drops of step, or of the decay that ends wsd and rsqrt; 90, or a fifth, if not given"""
    decay_milestones: list[int] = field(default_factory=lambda: [30, 60, 90])
    """epochs of the drops of multistep"""
    decay_rate: float = 0.1
    """factor of a drop, or the power of poly"""
    patience_epochs: int = 10
    """epochs without a better top-1 before plateau drops"""
    cooldown_epochs: int = 0
    """epochs at min_lr at the end, part of epochs"""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """further arguments of timm's create_scheduler_v2, such as {cycle_limit: 3}"""

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, given or not."""
        return min(5, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs


@dataclass
class EmaConfig:
    """Exponential moving average of the weights: where it is on, it is what is validated and saved as the model."""

    decay: float = 0.0
    """share of the old average kept per update, such as 0.9999; 0 is off"""
    warmup: bool = True
    """let the decay grow with the number of updates, so that short runs forget their first weights"""


@dataclass
class HealthConfig:
    """What happens when numbers are no longer finite, and what is watched in deformable layers."""

    skip: int = 5
    """updates in a row that are left out because their loss or gradients are not finite, before it is acted upon"""
    then: Literal['rollback', 'stop'] = 'rollback'
    """go back to the checkpoint before, or stop"""
    rollbacks: int = 3
    """times that a run goes back at most; then it stops"""
    rollback_lr: float = 0.5
    """factor on the learning rate each time"""
    every: int = 100
    """updates between two measurements of offsets and modulation in the deformable layers; 0 is off"""


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
    threads: int | None = None
    """threads of each process on a CPU; the cores that loading leaves, shared out, if neither this, OMP_NUM_THREADS nor
    accelerate's --num_cpu_threads_per_process is given"""
    processes: int | None = None
    """refuse to start unless this many processes take part"""
    log_every: int = 10
    """updates between two lines of the trackers"""
    val_every: int = 1
    """epochs between two validations; the last epoch always has one"""
    checkpoint_every: int = 0
    """updates between two checkpoints, besides the one after every epoch; 0 is off"""
    checkpoint_minutes: float = 0.0
    """minutes between two checkpoints, likewise; 0 is off"""
    keep: int = 2
    """resumable checkpoints kept"""
    trackers: list[str] = field(default_factory=lambda: ['tensorboard'])
    """trackers of accelerate beside the CSV: tensorboard, wandb, trackio, mlflow, ..."""
    deterministic: bool = False
    """use deterministic algorithms only, on GPUs too: slower, and an error where there is none"""


@dataclass
class Config:
    """All settings of one run."""

    resume: str | None = None
    """auto: continue the run in the output folder, if there is one; or a run's folder or checkpoint"""
    dry_run: bool = False
    """say what would be trained, for how many steps and in how much memory, and check it, without training"""
    eval: bool = False
    """validate only: the weights of the run that --resume names, or those of the model"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_yaml(self) -> str:
        """The configuration as YAML that `--config` reads back, without what was asked of this one start."""
        content = {name: group for name, group in asdict(self).items() if name not in MODES}
        return yaml.safe_dump(_plain(content), sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _shorter(size: int | tuple[int, int] | None) -> int | None:
    return min(size) if isinstance(size, tuple) else size


def check(config: Config) -> None:
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
        'distill.weight': config.distill.weight,
        'health.rollback_lr': config.health.rollback_lr,
    }
    at_least = {
        'model.num_classes': (model.num_classes, 1),
        'data.image_size': (_shorter(data.image_size), 1),
        'data.train_image_size': (_shorter(data.train_image_size), 1),
        'data.batch_size': (data.batch_size, 1),
        'data.val_batch_size': (data.val_batch_size, 1),
        'data.workers': (data.workers, 0),
        'data.prefetch': (data.prefetch, 1),
        'data.max_unreadable': (data.max_unreadable, 0),
        'augment.mixup': (augment.mixup, 0),
        'augment.cutmix': (augment.cutmix, 0),
        'augment.splits': (augment.splits, 0),
        'augment.repeats': (augment.repeats, 1),
        'optim.lr': (optim.lr, 0),
        'optim.lr_base_batch': (optim.lr_base_batch, 0),
        'optim.weight_decay': (optim.weight_decay, 0),
        'optim.accumulate': (optim.accumulate, 1),
        'schedule.epochs': (schedule.epochs, 1),
        'schedule.warmup_epochs': (schedule.warmup_epochs, 0),
        'schedule.cooldown_epochs': (schedule.cooldown_epochs, 0),
        'health.skip': (config.health.skip, 0),
        'health.rollbacks': (config.health.rollbacks, 0),
        'health.every': (config.health.every, 0),
        'run.seed': (config.run.seed, 0),
        'run.threads': (config.run.threads, 1),
        'run.log_every': (config.run.log_every, 1),
        'run.val_every': (config.run.val_every, 1),
        'run.checkpoint_every': (config.run.checkpoint_every, 0),
        'run.checkpoint_minutes': (config.run.checkpoint_minutes, 0),
        'run.keep': (config.run.keep, 1),
    }
    positive = {
        'data.crop_pct': data.crop_pct,
        'optim.clip_grad': optim.clip_grad,
        'optim.layer_decay': optim.layer_decay,
        'schedule.decay_epochs': schedule.decay_epochs,
        'distill.temperature': config.distill.temperature,
    }
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise TrainError(f'{name} should lie between 0 and 1, got {value}', usage=True)
    for name, (value, least) in at_least.items():
        if value is not None and not value >= least:
            raise TrainError(f'{name} should be at least {least}, got {value}', usage=True)
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise TrainError(f'{name} should be positive, got {value}', usage=True)
    if data.std is not None and not min(data.std) > 0:
        raise TrainError(f'data.std should be positive numbers, got {data.std}', usage=True)
    if config.run.seed >= 1 << 63:
        raise TrainError(f'run.seed should be less than 2**63, got {config.run.seed}', usage=True)
    for name in ('scale', 'ratio'):
        low, high = getattr(augment, name)
        if not 0 < low <= high:
            raise TrainError(f'augment.{name} should be two positive numbers in order, got {low}, {high}', usage=True)
    if model.in_chans not in (1, 3):
        raise TrainError(f'model.in_chans should be 1 or 3, got {model.in_chans}', usage=True)
    mixed = bool(augment.mixup or augment.cutmix)
    if augment.splits > 1 and (mixed or data.multi_label or augment.repeats > 1):
        raise TrainError('augment.splits does not go with mixup, cutmix, repeats or data.multi_label', usage=True)
    if (config.loss.name == 'jsd') != (augment.splits > 1):
        raise TrainError('loss.name jsd and augment.splits > 1 need each other', usage=True)
    if config.loss.class_weight and config.loss.class_weights:
        raise TrainError('give loss.class_weight or loss.class_weights, not both', usage=True)
    if mixed and data.batch_size % 2:
        raise TrainError(f'data.batch_size should be even, as mixup pairs images, got {data.batch_size}', usage=True)
    if schedule.warmup >= schedule.epochs and schedule.name != 'none':
        raise TrainError(
            f'schedule.warmup_epochs should be less than schedule.epochs ({schedule.epochs}), '
            f'got {schedule.warmup_epochs}',
            usage=True,
        )
    if schedule.warmup + schedule.cooldown_epochs >= schedule.epochs and schedule.name != 'none':
        raise TrainError(
            f'schedule.cooldown_epochs should leave some of schedule.epochs ({schedule.epochs}) after '
            f'{schedule.warmup:g} of warm-up, got {schedule.cooldown_epochs}',
            usage=True,
        )
    if model.checkpoint is not None and not Path(model.checkpoint).is_file():
        raise TrainError(f'model.checkpoint: no file {model.checkpoint}')
