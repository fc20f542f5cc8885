"""--dry-run: what a run would be, of every recipe."""

import json

import pytest
import timm
import torch
from PIL import Image
from torch.profiler import profile

from dcnzoo.macs import count_macs
from dcnzoo.train.arguments import parse
from dcnzoo.train.main import plan

from .conftest import REPOSITORY, forget_accelerator, settings

RECIPES = sorted((REPOSITORY / 'configs').glob('*.yaml'))


def test_dry_run(photos, tmp_path, train):
    arguments = settings(photos, tmp_path / 'run', schedule__epochs=4, optim__accumulate=2, ema__decay=0.9)
    status, text, errors = train([*arguments, '--dry-run'])
    assert (status, errors) == (0, [])
    facts = json.loads((tmp_path / 'run' / 'plan' / 'plan.json').read_text())
    model = timm.create_model('test_dcnv4', num_classes=3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (facts['parameters'], facts['batch'], facts['updates_per_epoch'], facts['updates']) == (parameters, 16, 2, 8)
    assert facts['highest_lr'] == pytest.approx(3e-3, rel=0.05)
    assert facts['memory_mib']['optimizer'] == pytest.approx(2 * facts['memory_mib']['gradients'], abs=1)
    assert facts['memory_mib']['activations'] >= 1
    assert facts['macs'] == count_macs(model.eval(), (3, 32, 32))
    assert facts['loaded_images_per_second'] > 0
    assert Image.open(tmp_path / 'run' / 'plan' / 'lr.png')
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'plan'}
    assert 'nothing was trained' in text
    status, _, errors = train([*settings(tmp_path, tmp_path / 'run'), '--dry-run'])
    assert (status, len(errors)) == (1, 1)
    status, _, errors = train([*arguments, '--dry-run', '--resume', 'nowhere'])
    assert (status, errors) == (1, ['error: --resume: nowhere does not exist'])
    (tmp_path / 'run' / 'best').mkdir()
    status, _, errors = train([*arguments, '--dry-run'])
    assert status == 1
    assert 'holds a run already (best)' in errors[0]


WEIGHTS = {  # what a recipe would download
    'finetune_folder': ['--model.pretrained', 'false'],
    'distill_in1k': ['--distill.teacher', 'null'],
}


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes(path, photos, tmp_path, train):
    """Every setting of each is taken by the network, the optimizer, the schedule and the loaders that it names."""
    own = ['--data.root', photos, '--data.batch_size', 4, '--data.workers', 0, '--run.output', tmp_path / 'run']
    status, output, errors = train(['--config', path, *own, *WEIGHTS.get(path.stem, []), '--dry-run'])
    assert (status, errors) == (0, []), output
    config, facts = parse(['--config', str(path)]), json.loads((tmp_path / 'run' / 'plan' / 'plan.json').read_text())
    assert facts['model'] == config.model.name.split('.')[0]
    assert facts['updates'] == config.schedule.epochs * facts['updates_per_epoch']
    base = config.optim.lr_base_batch
    highest = config.optim.lr * (4 * config.optim.accumulate / base if base else 1)
    assert facts['highest_lr'] == pytest.approx(highest, rel=0.05)


def test_memory(photos, tmp_path):
    """What one update on a CPU allocates at most is what was estimated."""
    forget_accelerator()
    facts = plan(parse(settings(photos, tmp_path / 'run', data__batch_size=16, data__image_size=96)))
    estimate = facts['memory_mib']
    model = timm.create_model('test_dcnv4', num_classes=3)
    images, labels = torch.randn(16, 3, 96, 96), torch.randint(3, (16,))
    with profile(profile_memory=True) as record:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
    peak, held = 0, 0
    for event in record.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            peak = max(peak, held)
    assert peak / 2**20 == pytest.approx(estimate['activations'] + estimate['gradients'], rel=0.3)


def test_function_for_python(photos, tmp_path):
    """`plan` returns what it writes."""
    forget_accelerator()
    facts = plan(parse(settings(photos, tmp_path / 'run')))
    assert facts == json.loads((tmp_path / 'run' / 'plan' / 'plan.json').read_text())
