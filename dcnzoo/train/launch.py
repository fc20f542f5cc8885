"""accelerate's engine: started as it was asked for, or not at all."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list

from .config import Config
from .errors import TrainError

SHARDED = {'ACCELERATE_USE_FSDP': DistributedType.FSDP, 'ACCELERATE_USE_DEEPSPEED': DistributedType.DEEPSPEED}


def build_accelerator(config: Config) -> Accelerator:
    """accelerate's engine, with as many processes and as much sharding as were asked for.

    Raises:
        TrainError: if there are fewer processes, or the sharding, the precision or a tracker is not available.
    """
    output = Path(config.run.output)
    on_cpu = config.run.cpu or not torch.cuda.is_available()
    if config.run.precision == 'fp16' and on_cpu:
        raise TrainError('run.precision: fp16 needs a GPU; bf16 works on CPUs, too', usage=True)
    if config.model.sync_bn and on_cpu:
        raise TrainError('model.sync_bn needs GPUs', usage=True)
    sharding = next((kind for name, kind in SHARDED.items() if os.environ.get(name, '').lower() in ('1', 'true')), None)
    if sharding is not None and on_cpu:
        raise TrainError(f'{sharding.value} was asked for, but accelerate shards on GPUs only; on CPUs use --multi_gpu')
    if sharding is not None and config.ema.decay:
        raise TrainError(f'ema.decay: there is no average of sharded weights; with {sharding.value} set it to 0')
    if sharding == DistributedType.DEEPSPEED and config.optim.accumulate > 1:
        raise TrainError('optim.accumulate: DeepSpeed counts batches by itself; raise data.batch_size instead')
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
    if sharding is not None and accelerator.distributed_type != sharding:
        raise TrainError(f'{sharding.value} was asked for, but accelerate started {accelerator.distributed_type.value}')
    asked = config.run.processes or launched_processes()
    if asked is not None and asked != accelerator.num_processes:
        raise TrainError(
            f'{asked} processes were asked for, but {accelerator.num_processes} started: several on CPU need '
            f'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}'
        )
    return accelerator


def make_deterministic(wanted: bool) -> None:
    """Same numbers on the same GPU, too; on CPUs they are the same anyhow, with the same number of threads."""
    if wanted:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


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


def on_main(accelerator: Accelerator, function: Callable, *arguments: Any) -> Any:
    """What a function returns on the main process, or the TrainError that it raises there, on every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*arguments)
        except TrainError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result
