"""What a command reports in one line, and where it comes from if that is asked for."""

import sys
import traceback

from ..hub import redact


class CommandError(Exception):
    """An error of the user's making or surroundings; its text is the whole report."""


def print_traceback(error: BaseException) -> None:
    """Prints where an error comes from, without anything secret."""
    print(redact(''.join(traceback.format_exception(error))), end='', file=sys.stderr)
