"""The choice of backend: what is available, overrides, reasons, and life without a compiled library."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dcnzoo
from dcnzoo.ops import available_backends, dcnv4, missing, use_backend

OPERANDS = torch.randn(1, 4, 4, 16), torch.randn(1, 4, 4, 32)


def test_every_backend_is_there_or_says_why():
    for device in ('cpu', 'cuda', 'mps'):
        available = available_backends(device)
        assert available[-1] == 'reference'
        for backend in ('native', 'triton', 'reference'):
            reason = missing(backend, device)
            assert (reason is None) == (backend in available)
            assert reason is None or len(reason) > 20
    assert available_backends(torch.device('cpu')) == available_backends('cpu')


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'native', 'triton', 'reference', got 'cuda'"):
        missing('cuda')
    with pytest.raises(ValueError, match="got 'fast'"), use_backend('fast'):
        pass


def test_a_missing_backend_says_why():
    backend = next((name for name in ('triton', 'native') if missing(name, 'cpu')), None)
    assert backend, 'every backend serves the CPU here'
    with (
        use_backend(backend),
        pytest.raises(RuntimeError, match=f"the '{backend}' backend is not available on cpu: .*"),
    ):
        dcnv4(*OPERANDS, groups=1)


def test_use_backend_nests_and_belongs_to_its_thread():
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    def composed():
        """Whether a call goes through the composition, which gathers, rather than one registered operator."""
        calls.clear()
        with Recorder():
            dcnv4(*OPERANDS, groups=1)
        return torch.ops.aten.gather.default in calls

    with use_backend('reference'):
        assert composed()
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(composed()))
        thread.start()
        thread.join()
        assert elsewhere == [False]
        with pytest.raises(KeyError), use_backend('reference'):
            raise KeyError
        assert composed()
    assert not composed()


def test_without_compiled_libraries_the_reference_serves_and_says_so_once(tmp_path):
    package = Path(dcnzoo.__file__).parent
    shutil.copytree(package, tmp_path / 'dcnzoo', ignore=shutil.ignore_patterns('*.so', '*.pyd', '__pycache__'))
    code = (
        'import torch; from dcnzoo.ops import available_backends, dcnv4\n'
        'assert available_backends() == ["reference"]\n'
        'value, offset_mask = torch.randn(1, 4, 4, 16, requires_grad=True), torch.randn(1, 4, 4, 32)\n'
        'for _ in range(3): dcnv4(value, offset_mask, groups=1).sum().backward()\n'
        'assert value.grad.abs().sum() > 0\n'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count('RuntimeWarning') == 1
    assert 'slow reference backend on cpu: the CPU library was not built' in done.stderr
    assert 'pip install' in done.stderr
