"""What a benchmark leaves: tables in the terminal, a JSON file of all numbers, and a chart."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dcnzoo import __version__

PACKAGES = ('torch', 'torchvision', 'timm', 'onnxruntime', 'triton')
RESULTS = Path(__file__).parent / 'results'
console = Console() if sys.stdout.isatty() else Console(width=200)  # a pipe has no width to respect


def machine(device: str) -> dict[str, object]:
    """Describes what was measured on, and with what."""
    versions = {'dcnzoo': __version__, 'python': platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        'device': torch.cuda.get_device_name() if device == 'cuda' else _processor(),
        'capability': torch.backends.cpu.get_cpu_capability() if device == 'cpu' else torch.version.cuda,
        'system': platform.platform(terse=True),
        'versions': versions,
        'date': datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), platform.machine())


def table(title: str, columns: list[str], rows: list[list[str]], note: str | None = None) -> None:
    """Prints a table whose first column is text and whose others are numbers."""
    printed = Table(title=title, caption=note, title_justify='left', caption_justify='left')
    for index, column in enumerate(columns):
        printed.add_column(column, justify='right' if index else 'left', no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)


def caption(missing: dict[str, str]) -> str | None:
    """Names what could not be measured, and why."""
    return '\n'.join(f'{name} is missing: {reason}' for name, reason in missing.items()) or None


def save(name: str, device: str, settings: dict, results: list, folder: Path, **more: object) -> Path:
    """Writes `name.json`: the machine, the settings and the results, dataclasses as mappings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{name}.json'
    content = {'machine': machine(device), 'settings': settings, 'results': results, **more}
    path.write_text(json.dumps(content, indent=1, default=dataclasses.asdict) + '\n')
    console.print(f'Written to {path}')
    return path


def chart(path: Path, title: str, unit: str, panels: dict[str, dict[str, float]], logarithmic: bool = False) -> None:
    """Draws one panel of horizontal bars for each entry; says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print('No chart: matplotlib is not installed (pip install matplotlib)')
        return
    height = 1 + 0.35 * max(map(len, panels.values()))
    figure = Figure(figsize=(5 * len(panels), height), layout='constrained')
    for axes, (name, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        colors = ['tab:blue' if 'dcn' in label else 'tab:gray' for label in bars]
        container = axes.barh(list(bars), list(bars.values()), color=colors)
        axes.bar_label(container, fmt='%.3g', padding=3)
        axes.invert_yaxis()
        axes.set(title=name, xlabel=unit)
        axes.margins(x=0.2)
        if logarithmic:
            axes.set_xscale('log')
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    console.print(f'Written to {path}')
