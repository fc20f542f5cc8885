"""Shows the versions in use, the devices, and which operator backends serve them; why, where one does not."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess

import torch

from .. import ops
from .._version import __version__

_PACKAGES = (
    'torch',
    'torchvision',
    'timm',
    'accelerate',
    'huggingface_hub',
    'safetensors',
    'triton',
    'numpy',
    'pillow',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print JSON')


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def examine() -> dict:
    """Collects what `dcnzoo doctor` shows.

    Returns:
        'versions' by name, None for what is not installed; 'system', 'cpu', 'compilers' and 'cuda', facts by name;
        'devices', per device type its name and its 'backends': the reason why a backend is missing, or None.
    """
    cuda = torch.cuda.is_available()
    devices = {'cpu': {'name': platform.processor() or platform.machine()}}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        count = torch.accelerator.device_count()
        names = [torch.cuda.get_device_name(i) for i in range(count)] if cuda else [f'{count} {accelerator.type}']
        devices[accelerator.type] = {'name': ', '.join(names)}
    for device, facts in devices.items():
        facts['backends'] = {backend: ops.missing(backend, device) for backend in ('native', 'triton', 'reference')}
    return {
        'versions': {'dcnzoo': __version__, 'python': platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        'system': platform.platform(),
        'cpu': {'capability': torch.backends.cpu.get_cpu_capability(), 'threads': torch.get_num_threads()},
        'compilers': {
            'c++': _first_line(_compiler(), '--version'),
            'nvcc': _last_line('nvcc', '--version'),
        },
        'cuda': {'built for': torch.version.cuda, 'driver and GPU': cuda},
        'devices': devices,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str:
    """The compiler that an installation would take."""
    return os.environ.get('CXX') or next(filter(shutil.which, ('c++', 'g++', 'clang++')), 'c++')


def _output(command: str, *arguments: str) -> list[str]:
    words = shlex.split(command)
    if shutil.which(words[0]) is None:
        return []
    try:
        done = subprocess.run(
            [*words, *arguments], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _first_line(*command: str) -> str | None:
    return next(iter(_output(*command)), None)


def _last_line(*command: str) -> str | None:
    return next(reversed(_output(*command)), None)


def _print(report: dict) -> None:
    print('\n'.join(f'{name:16}{version or "not installed"}' for name, version in report['versions'].items()))
    print(f'{"system":16}{report["system"]}')
    print(f'{"cpu":16}{report["cpu"]["capability"]}, {report["cpu"]["threads"]} threads')
    for name, version in report['compilers'].items():
        print(f'{name:16}{version or "not found"}')
    built, present = report['cuda'].values()
    print(f'{"cuda":16}{f"torch is built for {built}" if built else "torch is built without it"}', end='')
    print('' if present or not built else ', no usable GPU')
    for device, facts in report['devices'].items():
        print(f'\n{device} ({facts["name"]})')
        for backend, reason in facts['backends'].items():
            print(f'  {backend:12}{"available" if reason is None else f"missing: {reason}"}')
