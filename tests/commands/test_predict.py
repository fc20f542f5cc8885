import json
import os
import shutil
import struct
import sys

import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

from .conftest import CLASSES, noise, save


def predictions(output):
    return {os.path.basename(result['image']): result['predictions'] for result in json.loads(output)}


def test_folder_agrees_with_timm(dcnzoo, trained, photos):
    code, out, err = dcnzoo('predict', photos, '--model', trained, '--topk', 3, '--json', '--batch-size', 2)
    assert (code, err) == (0, [])
    found = predictions(out)
    assert set(found) == {'a.jpg', 'b.png', 'grey.PNG', 'palette.png', 'c.webp'}

    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    for path in photos.rglob('*.*'):
        if path.name not in found:
            continue
        with torch.no_grad():
            expected = model(transform(Image.open(path).convert('RGB'))[None]).softmax(-1)[0]
        top = found[path.name]
        assert [prediction['index'] for prediction in top] == expected.argsort(descending=True).tolist()
        for prediction in top:
            assert prediction['probability'] == pytest.approx(expected[prediction['index']].item(), abs=1e-5)
            assert prediction['label'] == CLASSES[prediction['index']]


def test_table(dcnzoo, trained, photos):
    code, out, err = dcnzoo('predict', photos / 'a.jpg', photos / 'more/b.png', '--model', trained, '--device', 'cpu')
    assert (code, err) == (0, [])
    rows = out.splitlines()
    assert rows[0].split() == ['image', 'prediction', 'probability']
    assert [row.split()[0] for row in rows[1:]] == [str(photos / 'a.jpg'), str(photos / 'more/b.png')]
    assert all(row.split()[1] in CLASSES and row.endswith('%') for row in rows[1:])


def test_topk_beyond_the_classes(dcnzoo, trained, photos):
    out = dcnzoo('predict', photos / 'a.jpg', '--model', trained, '--topk', 9, '--json')[1]
    assert len(predictions(out)['a.jpg']) == 3


def test_bad_images_are_reported_and_the_rest_is_classified(dcnzoo, trained, photos):
    text = photos / 'text.png'
    text.write_text('this is no image')
    empty = photos / 'empty.png'
    empty.touch()
    cut = photos / 'cut.jpg'
    cut.write_bytes((photos / 'a.jpg').read_bytes()[:900])
    broken = photos / 'broken.png'
    data = bytearray((photos / 'more/b.png').read_bytes())
    data[len(data) // 2] ^= 255
    broken.write_bytes(data)

    code, out, err = dcnzoo('predict', photos, photos / 'none.png', '--model', trained, '--json')
    assert code == 1
    results = {os.path.basename(result['image']): result for result in json.loads(out)}
    bad = {name for name, result in results.items() if 'error' in result}
    assert bad == {'text.png', 'empty.png', 'cut.jpg', 'broken.png', 'none.png'}
    assert len(results) == 10
    assert sorted(line.split(': ')[1] for line in err) == sorted(str(photos / name) for name in bad)
    assert any('truncated' in line for line in err)

    code, out, err = dcnzoo('predict', text, '--model', trained)
    assert (code, out, err) == (1, '', [f'dcnzoo predict: {text}: not an image'])


def test_whatever_a_decoder_raises_concerns_one_image(dcnzoo, trained, photos, monkeypatch):
    def transpose(image):  # what Pillow raises for some damaged metadata
        if image.filename.endswith('a.jpg'):
            raise struct.error('required argument is not an integer')
        return image

    monkeypatch.setattr(ImageOps, 'exif_transpose', transpose)
    code, out, err = dcnzoo('predict', photos, '--model', trained, '--json')
    assert (code, err) == (
        1,
        [f'dcnzoo predict: {photos / "a.jpg"}: damaged, or not an image: required argument is not an integer'],
    )
    assert sum('predictions' in result for result in json.loads(out)) == 4


@pytest.mark.skipif(sys.platform != 'linux', reason='names of files are text here')
def test_names_that_are_no_text(dcnzoo, trained, photos):
    name = os.fsencode(photos) + b'/caf\xe9.jpg'
    os.rename(photos / 'a.jpg', name)
    code, out, err = dcnzoo('predict', os.fsdecode(name), '--model', trained)
    assert (code, err) == (0, [])
    assert 'caf\\udce9.jpg' in out
    (result,) = json.loads(dcnzoo('predict', os.fsdecode(name), '--model', trained, '--json')[1])
    assert os.fsencode(result['image']) == name


def test_unreadable_file(dcnzoo, trained, photos):
    fifo = photos / 'a.jpg'
    fifo.unlink()
    fifo.mkdir()
    code, out, err = dcnzoo('predict', fifo, '--model', trained)
    assert (code, out) == (1, '')
    assert err == [f'dcnzoo predict: there are no images in {fifo} (looked for {err[0].split("looked for ")[1]}']


def test_images_are_read_upright_and_in_16_bit(dcnzoo, trained, tmp_path):
    plain = noise(tmp_path / 'plain.png', size=(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees for viewing
    with Image.open(plain) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
        grey = image.convert('L')
    grey.save(tmp_path / 'grey.png')
    deep = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).reshape(64, 64).to(torch.int32) * 256
    Image.fromarray(deep.to(torch.uint16).numpy()).save(tmp_path / 'deep.png')
    found = predictions(dcnzoo('predict', tmp_path, '--model', trained, '--topk', 3, '--json')[1])
    for one, other in (('plain.png', 'turned.png'), ('grey.png', 'deep.png')):
        for a, b in zip(found[one], found[other], strict=True):
            assert a['probability'] == pytest.approx(b['probability'], abs=1e-4)
    assert found['plain.png'] != found['grey.png']


def test_model_of_one_channel(dcnzoo, photos, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp('grey'), num_classes=3, in_chans=1)
    code, _, err = dcnzoo('predict', photos, '--model', folder)
    assert (code, err) == (0, [])


def test_imagenet_names(dcnzoo, photos, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp('imagenet'))
    top = predictions(dcnzoo('predict', photos, '--model', folder, '--topk', 1000, '--json')[1])['a.jpg']
    labels = {prediction['index']: prediction['label'] for prediction in top}
    assert labels[0].startswith('tench')


def test_truth(dcnzoo, trained, tmp_path):
    for number, name in enumerate(CLASSES):
        noise(tmp_path / name / f'{name}.png', seed=number)
    code, out, _ = dcnzoo('predict', tmp_path, '--model', trained, '--truth', '--json')
    assert code == 0
    results = json.loads(out)
    assert [result['truth'] for result in results] == list(CLASSES)
    right = sum(result['predictions'][0]['label'] == result['truth'] for result in results)
    assert right == sum(result['correct'] for result in results)
    code, out, _ = dcnzoo('predict', tmp_path, '--model', trained, '--truth')
    assert code == 0
    assert out.count('right') - 1 == right
    assert out.count('wrong') == 3 - right
    assert f'{right} of 3 right' in out

    noise(tmp_path / 'dog' / 'dog.png')
    code, out, err = dcnzoo('predict', tmp_path, '--model', trained, '--truth')
    assert (code, out, len(err)) == (1, '', 1)
    assert "'dog'" in err[0]


@pytest.mark.parametrize(
    'model, says',
    (
        ('dcnv4_tinny', 'did you mean dcnv4_tiny'),
        ('dcnv4_tiny.other', 'did you mean dcnv4_tiny.opengvlab_in1k'),
        ('dcnv4_nano', 'there are no pretrained weights for dcnv4_nano'),
        ('runs/nowhere/best', 'there is no folder runs/nowhere/best'),
        ('local-dir:runs/nowhere/best', 'there is no folder runs/nowhere/best'),
    ),
)
def test_model_names(dcnzoo, photos, model, says):
    code, out, err = dcnzoo('predict', photos, '--model', model)
    assert (code, out, len(err)) == (1, '', 1)
    assert says in err[0]


def test_model_folders_that_do_not_fit(dcnzoo, photos, trained, tmp_path_factory):
    def report(folder):
        code, out, err = dcnzoo('predict', photos, '--model', folder)
        assert (code, out, len(err)) == (1, '', 1)
        return err[0]

    parent = tmp_path_factory.mktemp('run')
    best = shutil.copytree(trained, parent / 'best')
    assert f'try {best}' in report(parent)
    assert 'is a file' in report(best / 'model.safetensors')
    (best / 'model.safetensors').write_bytes((trained / 'model.safetensors').read_bytes()[:5000])
    assert 'cannot load' in report(best)
    (best / 'model.safetensors').unlink()
    assert 'cannot load' in report(best)
    (best / 'config.json').write_text('{"architecture": ')
    assert 'cannot load' in report(best)

    other = timm.create_model('test_convnext', num_classes=3)
    shutil.copytree(trained, parent / 'last')
    from safetensors.torch import save_file

    save_file(other.state_dict(), parent / 'last' / 'model.safetensors')
    assert 'cannot load' in report(parent / 'last')


@pytest.mark.parametrize('arguments', (['--topk', '0'], ['--topk', 'many'], ['--batch-size', '-1']))
def test_wrong_numbers(dcnzoo, photos, trained, arguments):
    code, _, err = dcnzoo('predict', photos, '--model', trained, *arguments)
    assert code == 2
    assert arguments[0] in err[-1]


def test_wrong_device(dcnzoo, photos, trained):
    code, out, err = dcnzoo('predict', photos, '--model', trained, '--device', 'toaster')
    assert (code, out, len(err)) == (1, '', 1)
    assert '--device toaster' in err[0]
