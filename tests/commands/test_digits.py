import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

load_digits = pytest.importorskip('sklearn.datasets').load_digits


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    from dcnzoo.commands.digits import export

    folder = tmp_path_factory.mktemp('digits')
    export(folder / 'data', folder / 'holdout')
    return folder


def test_every_digit_is_in_exactly_one_split(exported):
    files = {split: sorted((exported / split).rglob('*.png')) for split in ('data/train', 'data/val', 'holdout')}
    assert {split: len(found) for split, found in files.items()} == {
        'data/train': 1397,
        'data/val': 300,
        'holdout': 100,
    }
    images = [file.read_bytes() for found in files.values() for file in found]
    assert len(set(images)) == len(images) == len(load_digits().images)


def test_folders_are_the_classes(exported):
    for split in ('data/train', 'data/val', 'holdout'):
        dataset = ImageFolder(exported / split)
        assert dataset.classes == list('0123456789')
    with Image.open(exported / 'holdout/7/170.png') as image:
        assert (image.size, image.mode) == ((32, 32), 'L')
        small = torch.tensor(list(image.resize((8, 8), Image.Resampling.BOX).tobytes())).reshape(8, 8)
    digits = load_digits()
    original = torch.tensor(digits.images[digits.target == 7][170]) * 255 / 16
    assert (small - original).abs().mean() < 12


def test_command(dcnzoo, tmp_path):
    code, out, err = dcnzoo('digits', tmp_path / 'digits')
    assert (code, err) == (0, [])
    assert f'100 images in {tmp_path / "digits/holdout"}' in out
    code, out, err = dcnzoo('digits', tmp_path / 'digits')
    assert (code, out, len(err)) == (1, '', 1)
    assert f'{tmp_path / "digits/holdout"} is there already' in err[0]


def test_unwritable(dcnzoo, tmp_path):
    (tmp_path / 'file').touch()
    code, out, err = dcnzoo('digits', tmp_path / 'file')
    assert (code, out, len(err)) == (1, '', 1)
    assert 'Not a directory' in err[0]


@pytest.mark.parametrize('holdout', ('digits', 'digits/train', 'digits/val/more', '.'))
def test_splits_that_would_mix(dcnzoo, tmp_path, holdout):
    code, out, err = dcnzoo('digits', tmp_path / 'digits', '--holdout', tmp_path / holdout)
    assert (code, out, len(err)) == (1, '', 1)
    assert '--holdout must be apart from' in err[0]
    assert not (tmp_path / 'digits').exists()
