"""The `dcnzoo` command: one module per subcommand, each with `add_arguments(parser)` and `run(args)`."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from huggingface_hub.errors import HFValidationError

from .._version import __version__
from ..folder import WeightsError
from ..hub import explain
from ._errors import CommandError, print_traceback

_SUBCOMMANDS = {
    'doctor': 'show versions and operator backends, and why one is missing',
    'list': 'list the models with their sizes and weights',
    'predict': 'classify images',
    'features': 'show the feature maps that a model makes of an image',
    'offsets': 'draw where a model samples an image, and its effective receptive field',
    'convert': 'make a folder of safetensors, configuration and model card from a checkpoint',
    'push': 'push the folder of a model to the Hugging Face Hub',
    'pull': 'fetch and verify a model from the Hugging Face Hub',
    'shards': 'write an image folder as webdataset shards, to train on many images',
    'average': 'average the weights of checkpoints',
    'digits': "write scikit-learn's handwritten digits as an image folder, to try things on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `dcnzoo` command.

    Args:
        argv: Arguments behind the command's name; those of the process by default.

    Returns:
        The exit code: 0, 1 after an error, 130 after Ctrl-C. Wrong usage exits with 2 from within.
    """
    parser = argparse.ArgumentParser(
        prog='dcnzoo', description='Deformable and dynamic convolution backbones for timm.'
    )
    parser.add_argument('--version', action='version', version=f'dcnzoo {__version__}')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    subparsers = parser.add_subparsers(title='commands', metavar='COMMAND', dest='command', required=True)
    for name, summary in _SUBCOMMANDS.items():
        module = importlib.import_module(f'.{name}', __name__)
        subparser = subparsers.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    with warnings.catch_warnings(), _quiet_libraries():
        warnings.showwarning = _show_warning
        warnings.filterwarnings('ignore', 'Not enough free disk space')  # an error says so, if it is so
        warnings.filterwarnings('ignore', 'Palette images with Transparency')  # it is left out anyway
        warnings.simplefilter('ignore', DeprecationWarning)  # between libraries, nothing a user can do
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print('dcnzoo: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.traceback:
            print_traceback(error)
            return 1
        for line in getattr(error, 'details', ()):
            print(line, file=sys.stderr)
        known = isinstance(error, (CommandError, HFValidationError, OSError, WeightsError))
        message = explain(error) if known else f'{type(error).__name__}: {explain(error)}'
        print(f'dcnzoo {args.command}: {message}', file=sys.stderr)
        return 1


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps what timm and the hub's client log on their way (each retry, for instance) out of the report."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(f'dcnzoo: warning: {message}', file=sys.stderr)
