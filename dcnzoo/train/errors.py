"""What ends a run with one line instead of a traceback, and the exit status that goes with it."""

import difflib
import signal
from collections.abc import Iterable


class TrainError(Exception):
    """A mistake in the configuration, in the data or of the machine; its message is all that the user has to read.

    Args:
        message: what was found and what was expected.
        usage: True if the command line or its YAML is wrong: exit status 2 instead of 1.
        local: True if only this process may have met it; what all of them meet is said once per machine.
    """

    def __init__(self, message: str, usage: bool = False, local: bool = False):
        line = ' '.join(str(message).split())
        # PyTorch puts the traceback before what a loading process raised
        super().__init__(line.rpartition(f'{__name__}.TrainError: ')[2])
        self.status = 2 if usage else 1
        self.local = local


class Interrupted(Exception):
    """A signal asked the run to stop, and its state has been saved; the exit status is 128 + the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signal.Signals(signum).name
        self.status = 128 + signum


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint ` (did you mean 'x'?)`, or nothing if nothing known comes near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean {found[0]!r}?)' if found else ''
