"""Puts a run together: data, model, optimizer, schedule and loss, prepared by accelerate, in one Trainer."""

from pathlib import Path

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch.utils.data import IterableDataset

from .checkpoint import Checkpoints, keep_schedule, timm_config
from .config import Config
from .data import (
    BatchTransform,
    Data,
    Splits,
    build_loaders,
    class_counts,
    open_splits,
    stream_complaint,
    unreadable_limit,
)
from .errors import TrainError
from .loop import Trainer
from .model import Network, build_model, build_optimizer, compile_model, freeze, input_config
from .report import Report
from .samples import seed_all
from .schedule import LearningRate, build_scheduler, scaled
from .task import build_task
from .unreadable import Unreadable


def assemble(config: Config, accelerator: Accelerator) -> Trainer:
    """Everything that a run consists of, and a line about each part.

    Raises:
        TrainError: if any part of the configuration does not fit the data or the model.
    """
    output, device, processes = Path(config.run.output), accelerator.device, accelerator.num_processes

    # data, then the model with as many outputs as there are classes
    with accelerator.main_process_first():  # which downloads, where there is something to download
        splits = open_splits(config.data, config.model.in_chans, config.run.seed)
        seed_all(config.run.seed)
        model = build_model(config.model, config.data, num_classes(config, splits))
    classes = model.num_classes
    data_config = input_config(model, config.data, config.model.in_chans)
    loaders = build_loaders(splits, config, data_config, device.type == 'cuda', classes, processes)
    model_config = timm_config(model, data_config, splits.classes, config.model.kwargs)
    frozen = freeze(model, config.model)

    model.to(device)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
    if config.model.compile:
        compile_model(model, config.model)
    optimizer = build_optimizer(model, config.optim, scaled(config.optim.lr, config, processes))
    if isinstance(splits.train, IterableDataset):  # shared out by its reader
        (model, optimizer), (train_loader, val_loader) = accelerator.prepare(model, optimizer), loaders
    else:
        model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, *loaders)
    batches = len(train_loader)
    check_batches(config, splits, batches, processes)
    rate = LearningRate(optimizer, build_scheduler(config, optimizer, batches, processes), batches)
    if rate.remembers:
        keep_schedule(accelerator, rate.scheduler)

    counts = class_counts(splits.train, classes) if config.loss.class_weight else None
    task = build_task(model, config, data_config, classes, counts, device)
    network = Network(model, accelerator.unwrap_model(model), task, ema, frozen, model_config)
    destination = {'device': device, 'channels_last': config.model.channels_last}
    labels = {'num_classes': classes, 'multi_label': config.data.multi_label}
    transforms = (BatchTransform(data_config, augment, **labels, **destination) for augment in (config.augment, None))
    report = Report(accelerator, output, config.schedule.epochs, batches, config.data.multi_label)
    if (complaint := stream_complaint(splits, config, processes)) and accelerator.is_main_process:
        report.warn(complaint)
    introduce(report, config, model_config, splits, accelerator, sum(p.numel() for p in model.parameters()))
    return Trainer(
        accelerator,
        config,
        data=Data(splits, train_loader, val_loader, *transforms),
        network=network,
        optimizer=optimizer,
        rate=rate,
        unreadable=Unreadable(accelerator, report, output / 'unreadable.txt', unreadable_limit(splits, config)),
        checkpoints=Checkpoints(accelerator, output, config, model_config, ema.module if ema else None),
        report=report,
    )


def num_classes(config: Config, splits: Splits) -> int:
    """Outputs of the classifier: as configured, or one per class of the data set."""
    known = len(splits.classes) if splits.classes else None
    wanted = config.model.num_classes or known
    if wanted is None:
        raise TrainError(f'model.num_classes is missing: {config.data.dataset!r} does not tell its classes')
    if known is not None and wanted < known:
        raise TrainError(f'model.num_classes is {wanted}, but the data set has {known} classes')
    return wanted


def check_batches(config: Config, splits: Splits, batches: int, processes: int) -> None:
    """Raises if the training split does not fill one batch per process."""
    if batches == 0:
        raise TrainError(
            f'{len(splits.train)} training images do not fill one batch of {config.data.batch_size} on {processes} '
            f'process{"es" if processes > 1 else ""}: lower data.batch_size'
        )


def introduce(
    report: Report, config: Config, model_config: dict, splits: Splits, accelerator: Accelerator, parameters: int
) -> None:
    """Says what is about to be trained, on what."""
    height, width = model_config['pretrained_cfg']['input_size'][1:]
    report.say(
        f'{model_config["architecture"]}: {parameters / 1e6:.2f} M parameters, {model_config["num_classes"]} classes, '
        f'{height}x{width} pixels'
    )
    source = config.data.root or config.data.dataset
    report.say(f'{len(splits.train)} training and {len(splits.val)} validation images from {source}')
    devices = f'{accelerator.num_processes} x {accelerator.device.type}, {torch.get_num_threads()} threads each'
    report.say(f'{config.schedule.epochs} epochs on {devices}, mixed precision: {accelerator.mixed_precision}')
    report.say(f'output in {config.run.output}')
