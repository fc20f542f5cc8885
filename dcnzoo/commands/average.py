"""Averages the weights of several checkpoints of one model into a folder that timm loads.

Checkpoints are files (.safetensors, .pth), folders with a model.safetensors, or runs, of which all resumable ones
are taken, and where EMA was on its averages.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints import read
from ..folder import CONFIG, WEIGHTS, new_folder, shapes
from ._arguments import positive
from ._errors import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT', type=Path, help='file, folder or run')
    parser.add_argument('--output', required=True, type=Path, metavar='DIR', help='a new folder')
    parser.add_argument('--last', type=positive, metavar='N', help='only the last N of those found')
    parser.add_argument('--raw', action='store_true', help='of runs with EMA, take the weights without it')


def run(args: argparse.Namespace) -> int:
    files = [file for path in args.checkpoints for file in find_weights(path, args.raw)]
    files = files[-args.last :] if args.last else files
    config = next((config for path in args.checkpoints for config in find_config(path)), None)
    weights = average(files)
    with new_folder(args.output) as draft:
        save_file(weights, draft / WEIGHTS, metadata={'format': 'pt'})
        if config is not None:
            shutil.copyfile(config, draft / CONFIG)
    print(f'the average of {len(files)} checkpoints is in {args.output}')
    if config is None:
        print('no config.json was found beside them: load the weights with pretrained_cfg_overlay=dict(file=...)')
    return 0


def find_weights(path: Path, raw: bool) -> list[Path]:
    """The files of weights that a path stands for, oldest first."""
    if path.is_file():
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    found = []
    for checkpoint in sorted((path / 'checkpoints').glob('epoch_*')):
        files = [checkpoint / name for name in ([] if raw else ['ema.safetensors']) + [WEIGHTS]]
        found += [file for file in files if file.is_file()][:1]
    if not found:
        raise CommandError(f'there are no weights in {path}' if path.exists() else f'there is no {path}')
    return found


def find_config(path: Path) -> list[Path]:
    """config.json beside weights, or in the best/ of a run."""
    folders = [path.parent if path.is_file() else path, path / 'best']
    return [folder / CONFIG for folder in folders if (folder / CONFIG).is_file()]


def average(files: list[Path]) -> dict[str, Tensor]:
    """The mean of each tensor, added up in float64; what is not floating point is taken from the last file.

    Raises:
        WeightsError: A file cannot be read.
        CommandError: Its tensors are not those of the first.
    """
    sums: dict[str, Tensor] = {}
    for file in files:
        weights, _ = read(file)
        if sums and shapes(weights) != shapes(sums):
            raise CommandError(f'the weights in {file} are not those of the model in {files[0]}')
        for key, value in weights.items():
            sums[key] = sums.get(key, 0) + value.double() if value.is_floating_point() else value.clone()
    return {
        key: (sums[key] / len(files)).to(value.dtype) if value.is_floating_point() else sums[key]
        for key, value in weights.items()
    }
