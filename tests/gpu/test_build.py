"""What nvcc says of the CUDA kernels, which needs no GPU: they compile, and the fast ones keep to their registers."""

import re
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.gpu.emulated import FLAGS, ROOT

NVCC = Path(cpp_extension.CUDA_HOME or '/nonexistent') / 'bin' / 'nvcc'
# The scalar kernels, with 64-bit indices, which serve what the others cannot.
SCALAR = re.compile(r'Li1E(Li1E)?lE?')

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not NVCC.exists(), reason='there is no nvcc (set CUDA_HOME)')]


@pytest.mark.parametrize('architecture', ['80', '90'])
@pytest.mark.parametrize(
    'name', ['dcnv4_forward', 'dcnv4_backward', 'dcnv4_gather', 'deform_attn_forward', 'deform_attn_backward']
)
def test_no_spills(tmp_path, name, architecture):
    includes = [f'-I{path}' for path in cpp_extension.include_paths()]
    defines = [flag for flag in FLAGS if flag.startswith(('-D', '-std'))]
    target = f'-gencode=arch=compute_{architecture},code=sm_{architecture}'
    source = ROOT / 'csrc' / 'cuda' / f'{name}.cu'
    command = [
        NVCC,
        '-cubin',
        source,
        '-o',
        tmp_path / 'kernels.cubin',
        '-O3',
        '-Xptxas=-v',
        target,
        *defines,
        *includes,
    ]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores", report, re.DOTALL)
    assert len(kernels) >= 12
    spills = {kernel: int(stores) for kernel, stores in kernels if not SCALAR.search(kernel)}
    assert len(spills) >= 6
    assert not any(spills.values()), spills
