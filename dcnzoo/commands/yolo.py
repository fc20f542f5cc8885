"""The `dcnzoo-yolo` command: ultralytics' `yolo` with our blocks, and two commands beside its own.

dcnzoo-yolo train model=yolo11n-c3k2-dcnv4 data=coco8.yaml    any command of `yolo`; a variant is named like a model
dcnzoo-yolo models                                            the variants, with parameters and GFLOPs
dcnzoo-yolo adopt OLD.pt                                      a checkpoint of hand-patched files becomes one of today
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..macs import count_macs
from ._errors import CommandError, print_traceback
from ._models import first_line
from ._table import Table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `dcnzoo-yolo` command.

    Args:
        argv: Arguments behind the command's name; those of the process by default.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C. Wrong usage of our own commands exits with 2 from within.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    traceback = '--traceback' in arguments
    arguments = [argument for argument in arguments if argument != '--traceback']
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print('dcnzoo-yolo: interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if traceback:
            print_traceback(error)
            return 1
        kind = '' if isinstance(error, (CommandError, ImportError, ValueError)) else f'{type(error).__name__}: '
        print(f'dcnzoo-yolo: {kind}{first_line(error)}', file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ('help', '-h', '--help'):
        print(f'{__doc__}\nThe commands of `yolo`:')
        arguments = ['help']
    elif arguments[0] in _OWN:
        add_arguments, run = _OWN[arguments[0]]
        parser = argparse.ArgumentParser(prog=f'dcnzoo-yolo {arguments[0]}', description=run.__doc__)
        add_arguments(parser)
        return run(parser.parse_args(arguments[1:]))

    from ..integrations.ultralytics import register

    register()

    from ultralytics.cfg import entrypoint, merge_equals_args

    given = sys.argv[:]
    sys.argv[:] = ['yolo', *map(_with_config, merge_equals_args(arguments))]  # in place: ultralytics keeps this list
    try:
        entrypoint()
    finally:
        sys.argv[:] = given
    return 0


def _with_config(argument: str) -> str:
    """Replaces model=VARIANT by the path of its configuration; other arguments stay.

    Raises:
        CommandError: if a checkpoint that is named does not exist, for which ultralytics would ask its server.
    """
    from ultralytics.utils.downloads import GITHUB_ASSETS_STEMS

    from ..integrations.ultralytics.configs import VARIANTS, config_by_name
    from ..integrations.ultralytics.registration import nearest

    key, _, value = argument.partition('=')
    path = Path(value)
    if (
        key == 'model'
        and path.suffix == '.pt'
        and len(path.parts) > 1
        and '://' not in value
        and path.stem not in GITHUB_ASSETS_STEMS
        and not path.exists()
    ):
        raise CommandError(f'model: there is no file {value}')
    name = value.removesuffix('.yaml').removesuffix('.pt')
    if key != 'model' or path.exists() or not re.fullmatch(r'yolov?\d+[^./]*(\+.*)?', name):
        return argument
    if '+' not in name and not nearest(name.partition('-')[2], VARIANTS):  # a misspelt one is meant too
        return argument
    if value.endswith('.pt'):  # ultralytics would look for it among its releases
        raise CommandError(f'model: there is no file {value}; model={name} is the variant before any training')
    return f'model={config_by_name(name)}'


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('base', nargs='?', help='yolov8, yolo11, or one for another task such as yolo11-seg; else all')
    parser.add_argument('--imgsz', type=int, default=640, metavar='N', help='side of the image for GFLOPs')


def models(args: argparse.Namespace) -> int:
    """Lists the variants per base and scale, with parameters and GFLOPs (two per multiply-accumulate)."""
    from ..integrations.ultralytics.configs import VARIANTS, bases, model_config, scales

    known = bases()
    if args.base is not None and args.base not in known:
        raise CommandError(f'base must be one of {", ".join(known)}, got {args.base!r}')
    if args.imgsz < 32 or args.imgsz % 32:
        raise CommandError(f'--imgsz must be a positive multiple of 32, got {args.imgsz}')
    table = Table('model', '>params (M)', '>GFLOPs', 'blocks')
    for base in [args.base] if args.base else ['yolov8', 'yolo11']:
        family, dash, task = base.partition('-')
        for variant in (None, *VARIANTS):
            for scale in scales(base):
                try:
                    config = model_config(f'{family}{scale}{dash}{task}', variant)
                except ValueError:  # no row of this base is one that the variant replaces
                    break
                params, macs = describe(config, args.imgsz)
                table.add(
                    config.name,
                    f'{params / 1e6:.2f}',
                    f'{2 * macs / 1e9:.1f}',
                    VARIANTS[variant].summary if variant else '',
                )
    table.print()
    return 0


def describe(config: dict, imgsz: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a configuration's model, without allocating its weights."""
    from ultralytics.nn import tasks

    model = tasks.BaseModel()
    with torch.device('meta'):
        model.model, model.save = tasks.parse_model(config, ch=3, verbose=False)
    return sum(parameter.numel() for parameter in model.parameters()), count_macs(model, (3, imgsz, imgsz))


def add_adopt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='OLD.pt', type=Path)
    parser.add_argument('output', nargs='?', metavar='NEW.pt', type=Path, help='by default OLD-dcnzoo.pt beside it')
    parser.add_argument(
        '--rename', nargs='+', default=[], metavar='OLD=NEW', help='blocks that have other names in the checkpoint'
    )


def adopt(args: argparse.Namespace) -> int:
    """Rebuilds a checkpoint of hand-patched files on our blocks; none of the code that it names runs."""
    from ..integrations import ultralytics

    output = args.output or args.checkpoint.with_name(f'{args.checkpoint.stem}-dcnzoo.pt')
    wrong = [pair for pair in args.rename if len(pair.split('=')) != 2]
    if wrong:
        raise CommandError(f'--rename takes OLD=NEW, got {wrong[0]}')
    try:
        model = ultralytics.adopt(args.checkpoint, output, dict(pair.split('=') for pair in args.rename))
    except OSError as error:
        raise CommandError(f'{error.filename or args.checkpoint}: {error.strerror or error}') from error
    tensors = len(model.state_dict())
    print(f'{output}: {model.task}, {len(model.names)} classes, all {tensors} tensors of {args.checkpoint}')
    return 0


_OWN = {'models': (add_models_arguments, models), 'adopt': (add_adopt_arguments, adopt)}
