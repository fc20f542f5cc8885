"""How the CUDA kernels deal out their work: host arithmetic, checked over thousands of shapes by a C++ program."""

import subprocess
from pathlib import Path

from tests.gpu.emulated import compiler


def test_launch_arithmetic(tmp_path):
    source, program = Path(__file__).with_name('partition_test.cpp'), tmp_path / 'partition_test'
    sanitizers = ['-fsanitize=undefined', '-fno-sanitize-recover']
    subprocess.run([compiler(), '-std=c++17', '-O1', '-Wall', *sanitizers, '-o', program, source], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.stdout == 'ok\n', result.stdout + result.stderr
