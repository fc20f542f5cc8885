"""The CUDA operators compiled for the host, where an emulation of the GPU runs their kernels thread by thread."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / 'csrc' / 'cuda').glob('*.cu')), ROOT / 'tests' / 'gpu' / 'emulation' / 'library.cpp']
FLAGS = ['-std=c++17', '-O1', '-fPIC', '-w', '-DUSE_CUDA', '-DTORCH_TARGET_VERSION=0x020a000000000000']


def compiler() -> str:
    """The C++ compiler, or skips the test with the reason why there is none to use."""
    if not sys.platform.startswith('linux'):
        pytest.skip('the emulation switches between threads with makecontext, on Linux')
    found = shutil.which(os.environ.get('CXX', 'c++'))
    if found is None:
        pytest.skip('the emulation needs a C++ compiler')
    return found


def build() -> Path:
    """Compiles the operators with the emulation; a library built before from the same sources is used again."""
    command = compiler()
    headers = [
        *sorted((ROOT / 'csrc').glob('*.h')),
        *sorted((ROOT / 'csrc' / 'cuda').glob('*.h')),
        *sorted((ROOT / 'tests' / 'gpu' / 'emulation').glob('*.h')),
    ]
    key = hashlib.sha256(torch.__version__.encode())
    for path in [*SOURCES, *headers]:
        key.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f'dcnzoo-emulation-{os.getuid()}'
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f'{key.hexdigest()[:16]}.so'
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            includes = [f'-I{ROOT / "tests" / "gpu" / "emulation"}', *(f'-I{p}' for p in cpp_extension.include_paths())]
            objects = []
            for source in SOURCES:
                objects.append(f'{work}/{source.stem}.o')
                subprocess.run([command, '-x', 'c++', '-c', source, '-o', objects[-1], *includes, *FLAGS], check=True)
            links = [*(f'-L{path}' for path in cpp_extension.library_paths()), '-ltorch_cpu', '-ltorch', '-lc10']
            subprocess.run(
                [command, '-shared', '-Wl,-Bsymbolic', '-o', f'{work}/library.so', *objects, *links], check=True
            )
            os.replace(f'{work}/library.so', library)
    return library
