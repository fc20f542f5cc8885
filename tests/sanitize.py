"""Runs the operator's tests on a CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [--brief | pytest arguments]

`--brief` is for every run of CI: the properties of the compiled operators on random calls, and their bits by threads.
The library is built into a copy of the package in a temporary folder (g++ or clang++, or what CXX names); the
checkout's own stays as it is. Any report of a sanitizer ends the run with an exit status other than 0.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
SANITIZERS = '-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=undefined,float-cast-overflow'
TESTS = [
    'tests/ops/test_dcnv4.py',
    'tests/ops/test_deform_attn.py',
    'tests/ops/test_properties.py',
    'tests/ops/test_deform_attn_properties.py',
    'tests/ops/test_native_cpu.py',
    'tests/ops/test_native_deform_attn.py',
    'tests/ops/test_depthwise.py',
    'tests/layers/test_dynamic_conv.py',
]
LEFT_OUT = 'compile or opcheck'  # these start compilers, whose own processes cannot be preloaded
OPTIONS = ['-q', '-x', '--capture=sys', '-p', 'no:cacheprovider']
WHOLE = [*OPTIONS, '-k', f'not ({LEFT_OUT})', *TESTS]
CHOSEN = 'native or threads or batch or images or inference or geometry'
BRIEF = [*OPTIONS, '--hypothesis-profile=brief', '-k', CHOSEN, *TESTS[2:4], *TESTS[-2:]]


def build(folder: Path) -> list[str]:
    """Builds dcnzoo/_cpu.abi3.so in a copy of the package and returns the compiler's command."""
    compiler = shlex.split(os.environ.get('CXX', 'c++'))
    flags = (
        f'-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-omit-frame-pointer {SANITIZERS}'.split()
    )
    flags += ['-DTORCH_TARGET_VERSION=0x020a000000000000', '-DPy_LIMITED_API=0x030a0000']
    flags += [f'-I{path}' for path in (*include_paths(), sysconfig.get_path('include'))]
    sources = [ROOT / 'csrc/ops.cpp', *sorted((ROOT / 'csrc/cpu').glob('*.cpp'))]
    objects = [folder / f'{source.stem}.o' for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([*compiler, *flags, '-c', str(source), '-o', str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    libraries = [f'-L{Path(torch.__file__).parent / "lib"}', '-ltorch_cpu', '-ltorch', '-lc10']
    target = folder / 'dcnzoo' / '_cpu.abi3.so'
    subprocess.run([*compiler, *flags, '-shared', *map(str, objects), *libraries, '-o', str(target)], check=True)
    return compiler


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ('dcnzoo', 'tests'):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns('*.so', '*.pyd', '__pycache__'))
        shutil.copy(ROOT / 'pyproject.toml', folder)
        print('Building the CPU library with sanitizers', flush=True)
        compiler = build(folder)
        # The C++ runtime with it: the sanitizer must find the function that throws exceptions when it starts.
        runtimes = [
            subprocess.run(
                [*compiler, f'-print-file-name={library}'], check=True, capture_output=True, text=True
            ).stdout.strip()
            for library in ('libasan.so', 'libstdc++.so')
        ]
        environment = {
            **os.environ,
            'LD_PRELOAD': ' '.join(map(os.path.realpath, runtimes)),
            'ASAN_OPTIONS': 'detect_leaks=0',  # Python and torch keep what they have until the end
            'UBSAN_OPTIONS': 'print_stacktrace=1',
            'PYTHONPATH': str(folder),
        }
        arguments = BRIEF if sys.argv[1:] == ['--brief'] else sys.argv[1:] or WHOLE
        return subprocess.run([sys.executable, '-m', 'pytest', *arguments], cwd=folder, env=environment).returncode


if __name__ == '__main__':
    sys.exit(main())
