"""What the README shows is run, and what its tables say is compared."""

import re
import subprocess
from pathlib import Path

import pytest

from dcnzoo.commands.list import describe, model_names

README = Path(__file__).parents[1] / 'README.md'

pytestmark = pytest.mark.skipif(not README.is_file(), reason='needs the source tree')


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', README.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)


def rows() -> dict[str, tuple[str, ...]]:
    """The rows of the table of models, by the model's name."""
    table = re.findall(r'^\| (\w+_\w+) \| (.*) \|$', README.read_text(encoding='utf-8'), re.MULTILINE)
    return {name: tuple(cell.strip() for cell in rest.split('|')) for name, rest in table}


def test_python_examples():
    examples = blocks('python')
    assert len(examples) >= 3
    exec(compile('\n'.join(examples), 'README.md', 'exec'), {})


def test_every_model_has_a_row():
    assert set(rows()) == set(model_names())


@pytest.mark.parametrize('name', sorted(rows()) if README.is_file() else [])
def test_table_of_models(name):
    params, macs, size, top1, weights = rows()[name]
    model = describe(name)
    assert (f'{model["params"] / 1e6:.1f}', f'{model["macs"] / 1e9:.2f}') == (params, macs)
    assert str(model['input_size'][-1]) == size
    assert ', '.join(model['pretrained']) == weights
    assert bool(top1) == bool(weights)


def test_make_targets_and_files_exist():
    text = README.read_text(encoding='utf-8')
    for target in set(re.findall(r'`make ([a-z-]+)`', text)) | {'demo', 'test'}:
        done = subprocess.run(['make', '--dry-run', target], cwd=README.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', text):
        assert (README.parent / link).exists(), link
