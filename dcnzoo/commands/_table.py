"""Tables for people: drawn in a terminal, and never cut off in a file or a pipe."""

import sys

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


class Table:
    """Rows under headings; a heading that starts with '>' aligns its column to the right."""

    def __init__(self, *headings: str):
        self._table = RichTable(box=None, header_style='bold', pad_edge=False)
        for heading in headings:
            right = heading.startswith('>')
            self._table.add_column(heading.lstrip('>'), justify='right' if right else 'left', overflow='fold')

    def add(self, *cells: str, style: str | None = None) -> None:
        self._table.add_row(*(Text(_printable(cell)) for cell in cells), style=style)

    def print(self) -> None:
        if sys.stdout.isatty():
            Console().print(self._table)
            return
        console = Console(width=10_000)
        with console.capture() as capture:
            console.print(self._table)
        print('\n'.join(line.rstrip() for line in capture.get().splitlines()))


def _printable(text: str) -> str:
    """Escapes what standard output cannot encode, such as bytes in a file's name that are not UTF-8."""
    encoding = sys.stdout.encoding or 'utf-8'
    return text.encode(encoding, 'backslashreplace').decode(encoding)
