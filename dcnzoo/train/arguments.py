"""The command line: settings from YAML files and options, read by jsonargparse.

A key of the YAML is an option of the command line: `optim: {lr: 1e-3}` and `--optim.lr 1e-3` are the same, and the last
one given wins. Unknown keys and wrong types raise `TrainError` with one line.
"""

import contextlib
import difflib
import io
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import jsonargparse
import yaml

from .config import MODES, Config, check
from .errors import TrainError, nearest

USAGE = (
    'accelerate launch train --config NAME|FILE [--GROUP.SETTING VALUE ...] [--resume auto|RUN] [--dry-run] [--eval]'
)
OPEN = re.compile(r'\w+\.kwargs\.')  # settings whose keys are those of others
DESCRIPTION = 'Trains an image classification model of timm, those of dcnzoo included.'


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
    check(config)
    return config


def _build_parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog='train', usage=USAGE, description=DESCRIPTION, exit_on_error=False)
    parser.add_argument('--config', action='config', help='YAML file, or the name of one in configs/')
    resume = "'auto': continue the run in the output folder, if there is one; or a run's folder or checkpoint"
    parser.add_argument('--resume', type=str | None, default=None, help=resume)
    parser.add_argument(
        '--dry-run', action='store_true', help='say what would be trained, and check it, without training'
    )
    parser.add_argument('--eval', action='store_true', help='validate only: the run that --resume names, or the model')
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
        elif group not in MODES:
            raise TrainError(f'{group} in {path} should map settings to values, but is {values!r}', usage=True)


def _known_keys() -> set[str]:
    groups = {entry.name: entry.type for entry in fields(Config)}
    settings = {name: fields(group) for name, group in groups.items() if is_dataclass(group)}
    nested = {f'{name}.{entry.name}' for name, entries in settings.items() for entry in entries}
    return {'config', 'help', 'print_config', 'dry-run', *groups, *nested}


def _check_keys(keys: Iterable[str], where: str, dashes: str = '') -> None:
    known = _known_keys()
    for key in keys:
        if key.removesuffix('+') not in known and not OPEN.match(key):
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
