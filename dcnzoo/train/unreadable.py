"""Images that cannot be read: counted, named once, and borne up to a limit."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from .checkpoint import write_text
from .errors import TrainError
from .report import Report


class Unreadable:
    """Collects what the loaders of all processes complain about, in one file.

    Args:
        accelerator: of the run.
        report: shows each complaint once.
        path: of the file.
        limit: images that the run bears.
    """

    def __init__(self, accelerator: Accelerator, report: Report, path: Path, limit: int):
        self.accelerator = accelerator
        self.report = report
        self.path = path
        self.limit = limit
        self.complaints: list[str] = []

    def note(self, complaints: list[str]) -> None:
        """Takes note of the complaints of a batch.

        Raises:
            TrainError: if this process alone has met more images than the run bears.
        """
        fresh = [complaint for complaint in dict.fromkeys(complaints) if complaint not in self.complaints]
        if not fresh:
            return
        self.complaints += fresh
        too_many = len(self.complaints) > self.limit
        if self.accelerator.is_main_process or too_many:
            self.write()
        if too_many:
            raise self.refusal(local=True)
        for complaint in fresh:
            self.report.warn(f'skipped the unreadable image {complaint}')

    def share(self) -> None:
        """Brings the complaints of all processes together.

        Raises:
            TrainError: if together they have met more images than the run bears.
        """
        if self.accelerator.num_processes == 1:
            return
        together = list(dict.fromkeys(gather_object(self.complaints)))
        grown, self.complaints = len(together) > len(self.complaints), together
        if grown and self.accelerator.is_main_process:
            self.write()
        if len(together) > self.limit:
            raise self.refusal(local=False)

    def write(self) -> None:
        write_text(self.path, ''.join(f'{complaint}\n' for complaint in self.complaints))

    def refusal(self, local: bool) -> TrainError:
        return TrainError(
            f'more than {self.limit} unreadable images (data.max_unreadable); {self.path} names them, the last is '
            f'{self.complaints[-1]}',
            local=local,
        )
