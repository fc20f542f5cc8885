"""Builds the native libraries; everything else is in pyproject.toml.

Two libraries on the libtorch stable ABI, one for CPU and one for CUDA, each chosen by an environment variable:

    DCNZOO_CPU=auto|0|1    auto skips the CPU library only where there is no C++ compiler; 1 fails there, 0 never builds
    DCNZOO_CUDA=auto|0|1   auto builds where nvcc and a CUDA build of torch are found (no GPU is needed); 1 fails there

A compiler that is there but fails is always an error: an installation is never slower than it says.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TORCH_TARGET = '0x020a000000000000'  # the oldest torch (2.10) whose libtorch the libraries run on
MACROS = [('TORCH_TARGET_VERSION', TORCH_TARGET)]
MSVC = os.name == 'nt'
HIDDEN = '-fvisibility=hidden'  # the two libraries have functions of the same names


def wish(name: str) -> str:
    value = os.environ.get(name, 'auto')
    if value not in ('auto', '0', '1'):
        sys.exit(f'{name} must be auto, 0 or 1, got {value!r}')
    return value


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / 'csrc').glob(pattern))


def find_compiler() -> str | None:
    """The C++ compiler torch's BuildExtension will call, or None; one named by CXX counts even when it is broken."""
    named = os.environ.get('CXX')
    if named:
        return named
    if MSVC:
        return shutil.which('cl')
    found = next(filter(shutil.which, ('c++', 'g++', 'clang++')), None)
    if found in ('g++', 'clang++'):
        os.environ['CXX'] = found  # torch looks for c++ alone
    return found


def check_compiler(compiler: str) -> None:
    try:
        subprocess.run(
            [*shlex.split(compiler), '/?' if MSVC else '--version'],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f'dcnzoo: the C++ compiler {compiler!r} does not work ({error}). Repair it or name another one in CXX; '
            f'DCNZOO_CPU=0 installs without the native CPU operators.'
        )


def cpu_extension() -> list:
    choice = wish('DCNZOO_CPU')
    if choice == '0':
        return []
    compiler = find_compiler()
    if compiler is None:
        if choice == '1':
            sys.exit('dcnzoo: DCNZOO_CPU=1 asks for the native CPU operators, but no C++ compiler was found')
        print('dcnzoo: no C++ compiler was found, installing without the native CPU operators', file=sys.stderr)
        return []
    check_compiler(compiler)
    return [
        cpp_extension.CppExtension(
            'dcnzoo._cpu',
            sources('ops.cpp', 'cpu/*.cpp'),
            define_macros=MACROS,
            extra_compile_args={'cxx': ['/O2'] if MSVC else ['-O3', '-g0', '-ffp-contract=off', HIDDEN, '-Wall']},
            py_limited_api=True,
        )
    ]


def nvcc_release() -> str:
    nvcc = Path(cpp_extension.CUDA_HOME) / 'bin' / 'nvcc'
    said = subprocess.run([nvcc, '--version'], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    found = re.search(r'release ([\d.]+)', said)
    return found[1] if found else 'of unknown release'


def cuda_extension() -> list:
    choice = wish('DCNZOO_CUDA')
    if choice == '0':
        return []
    files = sources('cuda/*.cu')
    missing = None
    if not files:
        missing = 'this source tree has no CUDA sources'
    elif torch.version.cuda is None:
        missing = f'torch {torch.__version__} is a build without CUDA'
    elif cpp_extension.CUDA_HOME is None or not (Path(cpp_extension.CUDA_HOME) / 'bin' / 'nvcc').exists():
        missing = 'nvcc was not found (set CUDA_HOME)'
    elif find_compiler() is None:
        missing = 'no C++ compiler was found'
    elif nvcc_release().split('.')[0] != torch.version.cuda.split('.')[0]:
        missing = f'nvcc {nvcc_release()} does not fit torch, which is built for CUDA {torch.version.cuda}'
    if missing:
        if choice == '1':
            sys.exit(f'dcnzoo: DCNZOO_CUDA=1 asks for the CUDA operators, but {missing}')
        print(f'dcnzoo: installing without the CUDA operators: {missing}', file=sys.stderr)
        return []
    if not torch.cuda.is_available():
        os.environ.setdefault('TORCH_CUDA_ARCH_LIST', '8.0;9.0+PTX')
    return [
        cpp_extension.CUDAExtension(
            'dcnzoo._cuda',
            ['csrc/ops.cpp', *files],
            define_macros=[*MACROS, ('USE_CUDA', None), ('DCNZOO_CUDA', None)],
            # Where torch does not look: lib of toolkits without lib64, and below the prefix of a wrapper called nvcc.
            library_dirs=[str(Path(cpp_extension.CUDA_HOME) / folder) for folder in ('lib', 'cuda/lib', 'cuda/lib64')],
            extra_compile_args={
                'cxx': ['/O2'] if MSVC else ['-O3', HIDDEN],
                'nvcc': ['-O3', '--threads=2', '-Xptxas=-v', *([] if MSVC else [f'-Xcompiler={HIDDEN}'])],
            },
            py_limited_api=True,
        )
    ]


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            sys.exit(
                f'dcnzoo: the native operators do not compile ({error}), see above. DCNZOO_CPU=0 installs '
                f'without those for the CPU, DCNZOO_CUDA=0 without those for CUDA.'
            )


setup(
    ext_modules=[*cpu_extension(), *cuda_extension()],
    cmdclass={'build_ext': BuildExtension},
    options={'bdist_wheel': {'py_limited_api': 'cp310'}},
)
