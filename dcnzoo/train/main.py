"""One run of image classification, from its configuration to its summary.

accelerate launch train --config flowers_atto --data.root DIR        from a clone; -m train, python -m train likewise
accelerate launch -m dcnzoo.train --config X.yaml --optim.lr 1e-3    from an installation
accelerate launch --multi_gpu --num_processes 8 train --config dcnv4_tiny_in1k --data.root DIR
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train --config flowers_atto --data.root DIR
python -m train --resume runs/flowers_atto                           continue a run where it stopped

Exit status: 0 finished, 1 an error in the data or of the machine, 2 an error in the settings, 130 stopped by SIGINT and
143 by SIGTERM, both with a checkpoint to resume from. `accelerate launch` itself turns every failure into 1.
"""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import accelerate
import psutil
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import IterableDataset

import dcnzoo

from .checkpoint import (
    Checkpoints,
    begin_output,
    check_output,
    find_checkpoint,
    keep_schedule,
    timm_config,
    write_json,
)
from .config import Config, parse
from .data import BatchTransform, Splits, build_loaders, open_splits, seed_all, unreadable_limit
from .errors import Interrupted, TrainError
from .loop import Trainer
from .model import build_model, build_optimizer, input_config, scaled
from .report import Report, clock, draw_curves


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status and prints what went wrong, if anything did, as one line on stderr."""
    speaks = os.environ.get('LOCAL_RANK', '0') == '0'
    try:
        train(parse(argv))
        return 0
    except TrainError as error:
        if speaks or error.local:
            print(f'error: {error}', file=sys.stderr)
        return error.status
    except Interrupted as stop:
        if speaks:
            print(f'{stop.signal}: {stop}', file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:  # before there is anything to save, or the second one
        return 128 + signal.SIGINT
    except torch.cuda.OutOfMemoryError as error:
        print(f'error: {str(error).splitlines()[0]} Lower data.batch_size, raise optim.accumulate.', file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not str(error).startswith('DataLoader worker'):  # one that died, for want of memory most of the time
            raise
        print(f'error: {" ".join(str(error).split())} --data.workers 0 does without.', file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def train(config: Config) -> dict:
    """Trains as configured and returns the summary that it leaves in the run's folder."""
    accelerator = build_accelerator(config)
    run, schedule = config.run, config.schedule
    checkpoint = find_checkpoint(config)
    output = Path(run.output)
    if accelerator.is_main_process:
        check_output(config)
    accelerator.wait_for_everyone()

    # data, then the model with as many outputs as there are classes
    with accelerator.main_process_first():  # which downloads, where there is something to download
        splits = open_splits(config.data, config.model.in_chans, run.seed)
        seed_all(run.seed)
        model = build_model(config.model, config.data, num_classes(config, splits))
    data_config = input_config(model, config.data, config.model.in_chans)
    train_loader, val_loader = build_loaders(splits, config, data_config, pin_memory=accelerator.device.type == 'cuda')
    model_config = timm_config(model, data_config, splits.classes, config.model.kwargs)

    model.to(accelerator.device)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
    if config.model.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optim, scaled(config.optim.lr, config, accelerator.num_processes))
    model, optimizer = accelerator.prepare(model, optimizer)
    if not isinstance(splits.train, IterableDataset):  # streams are shared out by their reader
        train_loader, val_loader = accelerator.prepare(train_loader, val_loader)
    check_batches(config, splits, len(train_loader), accelerator.num_processes)
    scheduler = build_scheduler(config, optimizer, len(train_loader), accelerator.num_processes)
    if scheduler is not None and scheduler.t_in_epochs:
        keep_schedule(accelerator, scheduler)  # plateau remembers

    destination = {
        'num_classes': model_config['num_classes'],
        'device': accelerator.device,
        'channels_last': config.model.channels_last,
    }
    report = Report(accelerator, output, schedule.epochs, len(train_loader))
    checkpoints = Checkpoints(accelerator, output, config, model_config, ema.module if ema else None)
    trainer = Trainer(
        accelerator,
        config,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        train_transform=BatchTransform(data_config, config.augment, **destination),
        val_transform=BatchTransform(data_config, None, **destination),
        unreadable_limit=unreadable_limit(splits, config),
        checkpoints=checkpoints,
        report=report,
        output=output,
    )
    introduce(report, config, model_config, splits, accelerator, sum(p.numel() for p in model.parameters()))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if accelerator.is_main_process:
        begin_output(config)
    if run.trackers:
        accelerator.init_trackers('dcnzoo')

    started = time.monotonic()
    trainer.fit()
    summary = summarize(trainer, model_config, splits, config, time.monotonic() - started)
    accelerator.end_training()
    return summary


def build_accelerator(config: Config) -> Accelerator:
    """accelerate's engine, with as many processes as were asked for.

    Raises:
        TrainError: if there are fewer processes, or the precision or a tracker is not available.
    """
    output = Path(config.run.output)
    if config.run.precision == 'fp16' and (config.run.cpu or not torch.cuda.is_available()):
        raise TrainError('run.precision: fp16 needs a GPU; bf16 works on CPUs, too', usage=True)
    try:
        accelerator = Accelerator(
            cpu=config.run.cpu,
            mixed_precision=config.run.precision,
            # every process validates its own share without a collective, so the shares may differ in length
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=config.run.seed, even_batches=False, non_blocking=True
            ),
            log_with=config.run.trackers or None,
            project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / 'tensorboard')),
        )
    except (ValueError, ImportError, RuntimeError, NotImplementedError) as error:
        raise TrainError(f'accelerate cannot start: {error}') from None
    available = {str(getattr(tracker, 'value', tracker)) for tracker in accelerator.log_with}
    missing = sorted(set(config.run.trackers) - available)
    if missing:
        raise TrainError(f'run.trackers: {missing[0]} is not installed; --run.trackers [] does without')
    asked = config.run.processes or launched_processes()
    if asked is not None and asked != accelerator.num_processes:
        raise TrainError(
            f'{asked} processes were asked for, but {accelerator.num_processes} started: several on CPU need '
            f'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}'
        )
    return accelerator


def launched_processes() -> int | None:
    """--num_processes of the `accelerate launch` that started this process; it silently starts one with --cpu."""
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):
        return None
    if 'launch' not in command or not any('accelerate' in word for word in command):
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--num_processes', '--num-processes', type=int)
    try:
        return parser.parse_known_args(command[command.index('launch') + 1 :])[0].num_processes
    except SystemExit:
        return None


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


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, batches: int, processes: int):
    """timm's schedule, counted in batches; plateau, which looks at the top-1, in epochs."""
    schedule, per_epoch = config.schedule, config.schedule.name == 'plateau'
    try:
        return create_scheduler_v2(
            optimizer,
            sched=schedule.name,
            num_epochs=schedule.epochs,
            warmup_epochs=schedule.warmup_epochs,
            warmup_lr=scaled(schedule.warmup_lr, config, processes),
            min_lr=scaled(schedule.min_lr, config, processes),
            decay_epochs=schedule.decay_epochs,
            decay_milestones=schedule.decay_milestones,
            decay_rate=schedule.decay_rate,
            patience_epochs=schedule.patience_epochs,
            step_on_epochs=per_epoch,
            updates_per_epoch=batches,
        )[0]
    except (ValueError, AssertionError) as error:
        raise TrainError(f'schedule.name: cannot create {schedule.name!r}: {error}', usage=True) from None


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


def summarize(trainer: Trainer, model_config: dict, splits: Splits, config: Config, seconds: float) -> dict:
    """Loads the best checkpoint as any user would, validates it, and writes the summary and the curves."""
    accelerator, state, output = trainer.accelerator, trainer.state, trainer.output
    accelerator.wait_for_everyone()
    best = timm.create_model(f'local-dir:{(output / "best").resolve()}', pretrained=True).to(accelerator.device)
    if config.model.channels_last:
        best.to(memory_format=torch.channels_last)
    metrics = trainer.validate(best)
    summary = {
        'model': model_config['architecture'],
        'parameters': sum(p.numel() for p in best.parameters()),
        'num_classes': model_config['num_classes'],
        'input_size': model_config['pretrained_cfg']['input_size'],
        'train_images': len(splits.train),
        'val_images': len(splits.val),
        'epochs': state.epoch,
        'steps': state.step,
        **{name: round(value, 4) for name, value in metrics.items()},
        'best_epoch': state.best['epoch'],
        'weights': 'ema' if config.ema.decay else 'model',
        'unreadable_images': len(state.unreadable),
        'train_seconds': round(state.seconds, 1),
        'wall_seconds': round(seconds, 1),
        'images_per_second': round(sum(row['images_per_second'] for row in state.history) / len(state.history), 1),
        'processes': accelerator.num_processes,
        'device': torch.cuda.get_device_name() if accelerator.device.type == 'cuda' else platform.processor() or 'cpu',
        'precision': accelerator.mixed_precision,
        'seed': config.run.seed,
        'versions': {
            'python': platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, timm, accelerate, dcnzoo)},
        },
    }
    if accelerator.is_main_process:
        write_json(output / 'summary.json', summary)
        title = f'{model_config["architecture"]}: top-1 {metrics["val_top1"]:.2f} %'
        draw_curves(output / 'curves.png', state.history, title)
        if state.unreadable:
            names = output / 'unreadable.txt'
            trainer.report.warn(f'{len(state.unreadable)} images could not be read; {names} names them')
    trainer.report.say(
        f'best checkpoint {output / "best"}: top-1 {metrics["val_top1"]:.2f} % on {len(splits.val)} validation images '
        f'(epoch {summary["best_epoch"]}); {clock(state.seconds)} of training'
    )
    return summary
