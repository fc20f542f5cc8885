"""A model's folder in transformers, through its TimmWrapper."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.testing import assert_close

from dcnzoo.convert import convert
from dcnzoo.train.checkpoint import save_weights, timm_config, write_json

from .checkpoints import pickled, weights

README = Path(__file__).parents[1] / 'README.md'
CLASSES = ['ant', 'bee', 'cat']


def converted(folder, in_chans):
    path = folder.with_suffix('.pth')
    path.write_bytes(pickled(weights(num_classes=3, in_chans=in_chans)))
    convert(str(path), 'test_dcnv4', folder, classes=CLASSES)


def trained(folder, in_chans):
    """As `dcnzoo.train` writes best/ and last/."""
    model = timm.create_model('test_dcnv4', num_classes=3, in_chans=in_chans)
    model.load_state_dict(weights(num_classes=3, in_chans=in_chans))
    folder.mkdir(parents=True)
    save_weights(folder / 'model.safetensors', model.state_dict())
    data_config = resolve_model_data_config(model)
    write_json(folder / 'config.json', timm_config(model, data_config, CLASSES, {}))


@pytest.mark.parametrize('in_chans', [3, 1])
@pytest.mark.parametrize('make', [converted, trained])
@torch.no_grad()
def test_folder(tmp_path, make, in_chans):
    folder = tmp_path / 'folder'
    make(folder, in_chans)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    ours = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, in_chans, 160, 160, generator=torch.Generator().manual_seed(0))
    assert_close(model(x).logits, ours(x), rtol=0, atol=0)
    assert model.config.id2label == dict(enumerate(CLASSES))
    if in_chans == 1:
        return

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    prepared = create_transform(**resolve_model_data_config(ours))(image)[None]
    assert_close(processor(image, return_tensors='pt')['pixel_values'], prepared)
    probabilities = ours(prepared).softmax(-1)[0]
    found = transformers.pipeline('image-classification', model=str(folder))(image)
    assert [entry['label'] for entry in found] == [CLASSES[i] for i in probabilities.argsort(descending=True)]
    for entry in found:
        assert entry['score'] == pytest.approx(probabilities[CLASSES.index(entry['label'])].item(), abs=1e-5)


@pytest.mark.skipif(not README.is_file(), reason='needs the source tree')
def test_the_example_of_the_readme(tmp_path, monkeypatch, capsys):
    examples = re.findall('^```py\n(.*?)^```$', README.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
    (example,) = (example for example in examples if 'AutoModelForImageClassification' in example)
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / 'runs/photos/best', 3)
    Image.new('RGB', (90, 120)).save('photo.jpg')
    exec(compile(example, 'README.md', 'exec'), {})
    said = capsys.readouterr().out
    assert all(name in said for name in CLASSES)
