"""Averages the weights of several checkpoints of one model into a folder that timm loads.

Checkpoints are files (.safetensors, .pth), folders with a model.safetensors, or runs, of which all resumable ones
are taken, and where EMA was on its averages.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ._errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT', type=Path, help='file, folder or run')
    parser.add_argument(
        '--output', required=True, type=Path, metavar='DIR', help='gets model.safetensors and config.json'
    )
    parser.add_argument('--last', type=int, metavar='N', help='only the last N of those found')
    parser.add_argument('--raw', action='store_true', help='of runs with EMA, take the weights without it')


def run(args: argparse.Namespace) -> int:
    from ..train.checkpoint import save_weights
    from ..train.errors import TrainError

    files = [file for path in args.checkpoints for file in find_weights(path, args.raw)]
    files = files[-args.last :] if args.last else files
    weights = average(files)
    try:
        save_weights(args.output / 'model.safetensors', weights)
    except TrainError as error:
        raise CommandError(str(error)) from error
    config = next((each for path in args.checkpoints for each in find_config(path)), None)
    if config is not None and config.resolve() != (args.output / 'config.json').resolve():
        shutil.copyfile(config, args.output / 'config.json')
    print(f'the average of {len(files)} checkpoints is in {args.output}')
    if config is None:
        print('no config.json was found beside them: load the weights with pretrained_cfg_overlay=dict(file=...)')
    return 0


def find_weights(path: Path, raw: bool) -> list[Path]:
    """The files of weights that a path stands for, oldest first."""
    if path.is_file():
        return [path]
    if (path / 'model.safetensors').is_file():
        return [path / 'model.safetensors']
    checkpoints = sorted((path / 'checkpoints').glob('epoch_*'))
    if not checkpoints:
        raise CommandError(f'there are no weights in {path}' if path.exists() else f'there is no {path}')
    names = ['model.safetensors'] if raw else ['ema.safetensors', 'model.safetensors']
    return [next(folder / name for name in names if (folder / name).is_file()) for folder in checkpoints]


def find_config(path: Path) -> list[Path]:
    """config.json beside weights, or in the best/ of a run."""
    folders = [path.parent if path.is_file() else path, path / 'best']
    return [folder / 'config.json' for folder in folders if (folder / 'config.json').is_file()]


def average(files: list[Path]) -> dict[str, Tensor]:
    """The mean of each tensor, added up in float64; what is not floating point is taken from the last file.

    Raises:
        CommandError: A file cannot be read, or its tensors are not those of the first.
    """
    from timm.models import load_state_dict

    sums: dict[str, Tensor] = {}
    for file in files:
        try:
            weights = load_state_dict(str(file), use_ema=True)
        except Exception as error:  # whatever safetensors and pickle may raise
            raise CommandError(f'cannot read the weights in {file}: {error}') from error
        shapes = {key: value.shape for key, value in weights.items()}
        if sums and shapes != {key: value.shape for key, value in sums.items()}:
            raise CommandError(f'the weights in {file} are not those of the model in {files[0]}')
        for key, value in weights.items():
            floating = value.is_floating_point()
            sums[key] = (
                sums[key] + value.double() if floating and key in sums else value.double() if floating else value
            )
    last = weights
    return {
        key: (value / len(files)).to(last[key].dtype) if value.dtype == torch.float64 else value
        for key, value in sums.items()
    }
