"""Building and installing, in copies of the source tree, with the build tools of this environment."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'configs', 'csrc', 'dcnzoo')

pytestmark = pytest.mark.skipif(not (ROOT / 'setup.py').is_file(), reason='building needs the source tree')


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources without anything built."""
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / 'tree' / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns('*.so', '*.pyd', '__pycache__'))
        else:
            shutil.copy(source, target)
    return tmp_path / 'tree'


def run(*command, cwd, timeout=120, **environment):
    """Runs a Python command without the variables that steer the build, but those given; None removes one."""
    names = 'DCNZOO_CPU', 'DCNZOO_CUDA', 'CC', 'CXX', 'PYTHONPATH'
    variables = {name: value for name, value in os.environ.items() if name not in names}
    variables |= {'DCNZOO_CUDA': '0', **environment}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def wheel(tree, timeout=120, **environment):
    arguments = '--no-build-isolation', '--no-deps', '--disable-pip-version-check', '--wheel-dir', 'dist'
    done = run('-m', 'pip', 'wheel', '--verbose', '.', *arguments, cwd=tree, timeout=timeout, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / 'dist').glob('*.whl')
    return built, done.stdout + done.stderr


def sdist(tree):
    """Makes a source distribution and unpacks it."""
    done = run('setup.py', '--quiet', 'sdist', cwd=tree, DCNZOO_CPU='0')
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / 'dist').glob('*.tar.gz')
    with tarfile.open(archive) as files:
        files.extractall(tree.parent / 'sdist', filter='data')
    (unpacked,) = (tree.parent / 'sdist').iterdir()
    return unpacked


def built(tree):
    return [path.name for path in (tree / 'dcnzoo').glob('*.so')]


def test_without_a_compiler_it_installs_and_runs_on_the_reference(tree, tmp_path):
    tools = tmp_path / 'tools'
    tools.mkdir()
    wheel_file, log = wheel(tree, PATH=tools)
    assert 'no C++ compiler was found' in log
    with zipfile.ZipFile(wheel_file) as archive:
        assert not [name for name in archive.namelist() if name.endswith('.so')]
        archive.extractall(tmp_path / 'installed')

    code = """if True:
        import torch, dcnzoo
        assert dcnzoo.__file__.startswith(__import__('sys').argv[1]), dcnzoo.__file__
        assert dcnzoo.ops.available_backends() == ['reference']
        import timm
        model = timm.create_model('test_dcnv4').eval()
        for _ in range(2):
            print(tuple(model(torch.randn(1, 3, 64, 64)).shape))
    """
    installed = tmp_path / 'installed'
    done = run('-c', code, str(installed), cwd=tmp_path, PYTHONPATH=installed)
    assert (done.returncode, done.stdout) == (0, '(1, 1000)\n' * 2), done.stderr
    assert done.stderr.count('slow reference backend') == 1
    assert 'with a C++ compiler' in done.stderr


def test_a_named_compiler_that_fails_is_an_error(tree):
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree, CC='false', CXX='false')
    assert done.returncode != 0
    assert "the C++ compiler 'false' does not work" in done.stderr
    assert 'DCNZOO_CPU=0 installs without' in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_source_that_does_not_compile_is_an_error(tree):
    (tree / 'csrc' / 'ops.cpp').write_text('#error broken on purpose\n')
    for path in (tree / 'csrc' / 'cpu').glob('*.cpp'):
        path.unlink()
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree)
    assert done.returncode != 0
    assert 'broken on purpose' in done.stdout + done.stderr
    assert 'DCNZOO_CPU=0 installs without' in done.stderr
    assert 'Traceback' not in done.stderr
    assert built(tree) == []


@pytest.mark.parametrize(
    'environment, says',
    (
        ({'DCNZOO_CPU': '2'}, "DCNZOO_CPU must be auto, 0 or 1, got '2'"),
        ({'DCNZOO_CUDA': 'yes'}, "DCNZOO_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {'DCNZOO_CPU': '1', 'PATH': '/nowhere'},
            'DCNZOO_CPU=1 asks for the native CPU operators, but no C++ compiler',
        ),
        (
            {'DCNZOO_CPU': '0', 'DCNZOO_CUDA': '1', 'PATH': '/nowhere', 'CUDA_HOME': '/nowhere'},
            'DCNZOO_CUDA=1 asks for',
        ),
    ),
)
def test_wishes_that_cannot_be_met_are_errors(tree, environment, says):
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree, **environment)
    assert done.returncode != 0
    assert says in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason='needs a CUDA build of torch')
def test_an_nvcc_of_another_cuda_is_left_alone(tree, tmp_path):
    nvcc = tmp_path / 'cuda' / 'bin' / 'nvcc'
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 9.2, V9.2.88"\n')
    nvcc.chmod(0o755)
    (tree / 'csrc' / 'cuda').mkdir(exist_ok=True)
    (tree / 'csrc' / 'cuda' / 'some.cu').touch()
    settings = {'DCNZOO_CPU': '0', 'CUDA_HOME': tmp_path / 'cuda'}
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree, DCNZOO_CUDA='auto', **settings)
    assert done.returncode == 0, done.stderr
    assert 'nvcc 9.2 does not fit torch' in done.stderr
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree, DCNZOO_CUDA='1', **settings)
    assert done.returncode != 0
    assert 'DCNZOO_CUDA=1 asks for the CUDA operators, but nvcc 9.2' in done.stderr


@pytest.mark.skipif(os.name == 'nt', reason='MSVC has one name')
def test_a_compiler_of_another_name_is_used(tree, tmp_path):
    tools, calls = tmp_path / 'tools', tmp_path / 'calls'
    tools.mkdir()
    (tools / 'g++').write_text(f'#!/bin/sh\necho "$@" >> {calls}\ntest "$1" = --version\n')
    (tools / 'g++').chmod(0o755)
    run('setup.py', 'build_ext', '--inplace', cwd=tree, PATH=f'{tools}')
    assert any('.cpp' in call for call in calls.read_text().splitlines())


def test_dcnzoo_cpu_0_needs_no_compiler(tree):
    done = run('setup.py', 'build_ext', '--inplace', cwd=tree, DCNZOO_CPU='0', CC='false', CXX='false')
    assert done.returncode == 0, done.stderr
    assert built(tree) == []


def test_source_distribution_has_every_source(tree):
    (tree / 'dcnzoo' / '_cpu.abi3.so').touch()
    unpacked = sdist(tree)
    sources = [path.relative_to(tree) for name in SOURCES for path in (tree / name, *(tree / name).rglob('*'))]
    missing = [str(path) for path in sources if not (unpacked / path).exists() and '__pycache__' not in path.parts]
    assert missing == ['dcnzoo/_cpu.abi3.so']


@pytest.mark.slow
def test_wheel(tree, tmp_path):
    """One wheel serves every Python; it has the package, the CPU library and nothing else."""
    wheel_file, _ = wheel(sdist(tree), DCNZOO_CPU='1', timeout=900)
    assert wheel_file.name.split('-')[2:4] == ['cp310', 'abi3']
    with zipfile.ZipFile(wheel_file) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / 'installed')
    assert {name.split('/')[0].split('-')[0] for name in names} == {'dcnzoo'}
    assert [name for name in names if name.endswith('.so')] == ['dcnzoo/_cpu.abi3.so']
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert not [name for name in names if name.endswith(('.cpp', '.h', '.cu', '.yaml'))]

    code = "import dcnzoo; assert 'native' in dcnzoo.ops.available_backends(); print(dcnzoo.__file__)"
    done = run('-c', code, cwd=tmp_path, PYTHONPATH=tmp_path / 'installed')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / 'installed'))
