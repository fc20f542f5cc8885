"""One run of image classification, from its configuration to its summary.

accelerate launch train --config flowers_atto --data.root DIR        from a clone; -m train, python -m train likewise
accelerate launch -m dcnzoo.train --config X.yaml --optim.lr 1e-3    from an installation
accelerate launch --multi_gpu --num_processes 8 train --config dcnv4_tiny_in1k --data.root DIR
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 train --config flowers_atto --data.root DIR
accelerate launch --config_file configs/accelerate/fsdp2.yaml train --config dcnv4_large_in22k_ft_in1k --data.root DIR
python -m train --config dcnv4_tiny_in1k --data.root DIR --dry-run   what it would be, without training
python -m train --resume runs/flowers_atto                           continue a run where it stopped
python -m train --resume runs/flowers_atto --eval                    validate its best weights, per class

Exit status: 0 finished, 1 an error in the data or of the machine, 2 an error in the settings, 130 stopped by SIGINT and
143 by SIGTERM, both with a checkpoint to resume from. `accelerate launch` itself turns every failure into 1.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Sequence

import torch

from .arguments import parse
from .assemble import assemble
from .checkpoint import begin_output, check_output, choose_checkpoint
from .config import Config
from .errors import Interrupted, TrainError
from .evaluate import evaluate_only, with_weights_of_run
from .launch import build_accelerator, make_deterministic, on_main
from .plan import write_plan
from .report import begin_trackers
from .summary import summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one training; returns the exit status and prints what went wrong, if anything did, as one line on stderr."""
    speaks = os.environ.get('LOCAL_RANK', '0') == '0'
    try:
        config = parse(argv)
        if config.dry_run:
            plan(config)
        elif config.eval:
            evaluate(config)
        else:
            train(config)
        return 0
    except TrainError as error:
        if speaks or error.local:
            print(f'error: {error}', file=sys.stderr)
        return error.status
    except Interrupted as stop:
        if speaks:
            print(f'{stop.signal}: {stop}', file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:  # before there is anything to save, or once more while it is saved
        if speaks:
            print('SIGINT: stopped at once; what was saved before is untouched', file=sys.stderr)
        return 128 + signal.SIGINT
    except torch.cuda.OutOfMemoryError as error:
        print(f'error: {str(error).splitlines()[0]} Lower data.batch_size, raise optim.accumulate.', file=sys.stderr)
        return 1
    except (RuntimeError, OSError) as error:
        reason = explain(error)
        if reason is None:
            raise
        if speaks:
            print(f'error: {reason}', file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def explain(error: Exception) -> str | None:
    """What happened, in one line, if it was the machine's fault or that of another process; None if it may be ours."""
    text = ' '.join(str(error).split())
    if isinstance(error, PermissionError):
        return f'{error.filename}: {error.strerror}'
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f'{error.strerror}; the checkpoints before are untouched, continue with --resume auto' if full else None
    if text.startswith('DataLoader worker'):  # one that died, for want of memory most of the time
        return f'{text} --data.workers 0 does without.'
    if text.startswith('Caught RuntimeError in DataLoader worker'):
        return f'loading images failed: {str(error).strip().splitlines()[-1]} (--data.workers 0 shows where)'
    if text.startswith('derivative for'):
        return f'optim.name: this optimizer needs second derivatives, and the network has none: {text}'
    if isinstance(error, getattr(torch.distributed, 'DistError', ())) or 'gloo/' in text:
        return f'another process of the run is lost, continue with --resume auto: {text[:200]}'
    return None


def train(config: Config) -> dict:
    """Trains as configured and returns the summary that it leaves in the run's folder."""
    accelerator = build_accelerator(config)
    make_deterministic(config.run.deterministic)
    checkpoint, complaints = on_main(accelerator, choose_checkpoint, config)
    on_main(accelerator, check_output, config)
    trainer = assemble(config, accelerator)
    if checkpoint is not None:
        for complaint in complaints if accelerator.is_main_process else ():
            trainer.report.warn(complaint)
        trainer.resume(checkpoint)
    if accelerator.is_main_process:
        begin_output(config)
    on_main(accelerator, begin_trackers, accelerator, config)

    started = time.monotonic()
    with trainer.timing.signal:
        trainer.fit()
        summary = summarize(trainer, time.monotonic() - started)
    accelerator.end_training()
    return summary


def evaluate(config: Config) -> dict:
    """Validates, and returns the metrics that it leaves in eval/ of the run's folder."""
    accelerator = build_accelerator(config)
    make_deterministic(config.run.deterministic)
    return evaluate_only(assemble(with_weights_of_run(config), accelerator))


def plan(config: Config) -> dict:
    """Checks a configuration without training, and returns the facts that it leaves in plan/ of the run's folder."""
    accelerator = build_accelerator(config)
    on_main(accelerator, choose_checkpoint, config)
    on_main(accelerator, check_output, config)
    return write_plan(assemble(config, accelerator))
