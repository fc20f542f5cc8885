import json
import platform

import timm
import torch

import dcnzoo as package
from dcnzoo import ops


def test_report(dcnzoo):
    code, out, err = dcnzoo('doctor')
    assert (code, err) == (0, [])
    for version in (package.__version__, platform.python_version(), torch.__version__, timm.__version__):
        assert version.partition('+')[0] in out
    assert torch.backends.cpu.get_cpu_capability() in out
    assert 'reference   available' in out


def test_json_holds_the_reason_of_each_missing_backend(dcnzoo, monkeypatch):
    monkeypatch.setattr(ops, 'missing', lambda backend, device: None if backend == 'reference' else f'no {backend}')
    code, out, err = dcnzoo('doctor', '--json')
    assert (code, err) == (0, [])
    report = json.loads(out)
    assert report['versions']['torch'] == torch.__version__.partition('+')[0]
    assert report['devices']['cpu']['backends'] == {'native': 'no native', 'triton': 'no triton', 'reference': None}
    assert 'native      missing: no native' in dcnzoo('doctor')[1]


def test_compiler(dcnzoo, monkeypatch, tmp_path):
    compiler = tmp_path / 'mycc'
    compiler.write_text('#!/bin/sh\necho "mycc 4.2 of today"\necho more\n')
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', f'{compiler} -O1')
    assert 'mycc 4.2 of today\n' in dcnzoo('doctor')[1]
    monkeypatch.setenv('CXX', 'false')
    assert 'c++             not found' in dcnzoo('doctor')[1]
