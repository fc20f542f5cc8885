"""How a run is told to stop."""

import signal


class StopSignal:
    """Notes SIGINT and SIGTERM while it is entered, for the run to stop between steps; a second one ends at once."""

    def __init__(self):
        self.number = 0

    def __enter__(self) -> 'StopSignal':
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        self.number = number
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self.restore()
