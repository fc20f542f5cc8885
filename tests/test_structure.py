"""The rules of the house: what may import what, light imports, and documented public names."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(importlib.import_module('dcnzoo').__file__).parent

# Per part of the package, the others it may import, and the distributions beside the standard library. Extras count as
# well: importing one within a function keeps `import dcnzoo` light but is a dependency all the same.
MAY_IMPORT = {
    '__init__': ({'_version', 'layers', 'models', 'ops'}, set()),
    '__main__': ({'commands'}, set()),
    '_version': (set(), set()),
    'ops': (set(), {'torch', 'triton'}),
    'layers': ({'ops'}, {'torch', 'torchvision'}),
    'models': ({'hub', 'layers', 'ops'}, {'timm', 'torch'}),
    'hub': ({'_version', 'card', 'folder'}, {'huggingface_hub', 'timm', 'torch'}),
    'folder': (set(), {'safetensors', 'timm', 'torch'}),
    'card': ({'macs'}, {'timm', 'torch'}),
    'checkpoints': ({'folder', 'hub'}, {'huggingface_hub', 'safetensors', 'timm', 'torch'}),
    'convert': ({'_version', 'card', 'checkpoints', 'folder', 'hub'}, {'safetensors', 'timm', 'torch'}),
    'macs': (set(), {'torch'}),
    'integrations': ({'layers', 'models', 'ops'}, None),
    'visualize': ({'layers', 'models', 'ops'}, {'PIL', 'matplotlib', 'torch'}),
    'train': ({'__init__', '_version', 'hub', 'layers', 'macs', 'models', 'ops'}, None),
    'commands': (None, None),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob('*.py'))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The dotted names a module imports, relative ones made absolute, wherever in the file."""
    package = ('dcnzoo', *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split('.')) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module.split('.') if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize('path', modules(), ids=name)
def test_imports(path):
    assert part(path) in MAY_IMPORT, f'say in MAY_IMPORT what {name(path)} may import'
    parts, distributions = MAY_IMPORT[part(path)]
    for imported in imports(path):
        if imported[0] == 'dcnzoo':
            target = imported[1] if len(imported) > 1 else '__init__'
            if target == '__version__' or target == part(path):
                continue
            assert parts is None or target in parts, f'{name(path)} must not import dcnzoo.{target}'
        elif imported[0] not in sys.stdlib_module_names:
            assert distributions is None or imported[0] in distributions, f'{name(path)} must not import {imported[0]}'


def test_nothing_imports_commands_or_train():
    for path in modules():
        for imported in imports(path):
            if imported[:2] == ('dcnzoo', 'commands'):
                assert part(path) in ('commands', '__main__'), name(path)
            if imported[:2] == ('dcnzoo', 'train'):
                assert part(path) in ('train', 'commands'), name(path)


def test_import_is_light_and_silent():
    heavy = 'accelerate', 'jsonargparse', 'matplotlib', 'onnx', 'sklearn', 'tensorboard', 'transformers', 'ultralytics'
    code = f'import sys, dcnzoo; print([name for name in {heavy} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, '[]\n', '')


@pytest.mark.parametrize('module', ('dcnzoo', 'dcnzoo.ops', 'dcnzoo.layers', 'dcnzoo.models'))
def test_public_names(module):
    module = importlib.import_module(module)
    assert inspect.getdoc(module)
    assert sorted(module.__all__) == list(module.__all__)
    for public in module.__all__:
        thing = getattr(module, public)
        if callable(thing):
            assert inspect.getdoc(thing), f'{public} has no docstring'


def test_promised_names():
    from dcnzoo import layers, ops

    assert {'dcnv4', 'available_backends', 'use_backend'} <= set(ops.__all__)
    assert 'DCNv4' in layers.__all__
    assert 'reference' in ops.available_backends('cpu')
    assert ops.available_backends() == ops.available_backends('cpu')
