"""accelerate's engine: started as it was asked for, or not at all."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list

from .config import Config
from .cores import share_of_cores
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
    if on_cpu:
        set_threads(config.run.threads, config.data.workers)
    asked = config.run.processes or launched_processes()
    if asked and asked != accelerator.num_processes:
        raise TrainError(
            f'{asked} processes were asked for, but {accelerator.num_processes} started: several on CPU need '
            f'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked}'
        )
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes share the weights, so that a forward pass takes all of them."""
    return accelerator.distributed_type in SHARDED.values()


def make_deterministic(wanted: bool) -> None:
    """Same numbers on the same GPU, too; on CPUs they are the same anyhow, with the same number of threads."""
    if wanted:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def set_threads(wanted: int | None, workers: int) -> None:
    """Lets a process that trains on a CPU have its share of the cores, or as many threads as are wanted.

    accelerate and torchrun give a process one thread, whatever the machine has, unless OMP_NUM_THREADS or an option
    says otherwise. Its loading processes take up to half of the share: a thread without a core holds up all others.
    """
    command, environment = parent()
    launched = is_accelerate(command) or any(word.endswith(('torchrun', 'torch.distributed.run')) for word in command)
    if wanted is None and launched and 'OMP_NUM_THREADS' not in environment:
        options = [word.partition('=')[0].replace('-', '_') for word in command]
        if '__num_cpu_threads_per_process' not in options:
            share = share_of_cores()
            wanted = max(1, share - min(workers, share // 2))
    if wanted is not None:
        torch.set_num_threads(wanted)


def parent() -> tuple[list[str], dict[str, str]]:
    """Command line and environment of what started this process; empty where they cannot be read."""
    try:
        process = psutil.Process().parent()
        return process.cmdline(), process.environ()
    except (psutil.Error, AttributeError):
        return [], {}


def is_accelerate(command: list[str]) -> bool:
    """Whether a command line is `accelerate launch`."""
    return 'launch' in command and any('accelerate' in word for word in command)


def launched_processes() -> int:
    """Processes that the launcher of this one was asked for; 0 if there is none, or it was not told a number."""
    command, _ = parent()
    if is_accelerate(command):
        return asked_processes(command[command.index('launch') + 1 :])
    return int(os.environ.get('WORLD_SIZE', 0))


def asked_processes(arguments: list[str]) -> int:
    """num_processes in the arguments of `accelerate launch` or its configuration; with --cpu it starts but one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument('--num_processes', '--num-processes', type=int)
    parser.add_argument('--config_file', '--config-file', default=default_config_file)
    try:
        known, _ = parser.parse_known_args(arguments)
        if known.num_processes is None and Path(known.config_file).is_file():
            known.num_processes = load_config_from_file(known.config_file).num_processes
    except (argparse.ArgumentError, ValueError, OSError):  # accelerate has complained already
        return 0
    return max(0, known.num_processes or 0)


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
