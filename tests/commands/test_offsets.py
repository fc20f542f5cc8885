import pytest
from PIL import Image


def test_png(dcnzoo, photos, trained, tmp_path):
    drawing = tmp_path / 'where.png'
    code, out, err = dcnzoo(
        'offsets',
        photos / 'a.jpg',
        '--model',
        trained,
        '--point',
        20,
        30.5,
        '--stage',
        2,
        '--layers',
        2,
        '--png',
        drawing,
    )
    assert (code, out, err) == (0, f'{drawing}\n', [])
    with Image.open(drawing) as image:
        assert image.format == 'PNG'
        assert min(image.size) > 300
        assert len(set(image.convert('L').tobytes())) > 100


def test_an_untrained_model_says_so(dcnzoo, photos, tmp_path):
    code, _, err = dcnzoo('offsets', photos / 'a.jpg', '--model', 'test_dcnv4', '--png', tmp_path / 'where.png')
    assert code == 0
    assert err == ['dcnzoo offsets: initial weights, not trained ones: offsets and masks may all be zero']


@pytest.mark.parametrize(
    'arguments, says',
    (
        (['--png', 'nowhere/where.png'], 'cannot write nowhere/where.png: No such file or directory'),
        (['--point', '500', '3'], 'point must lie within the image of'),
        (['--stage', '7'], 'stage must be one of [0, 1, 2, 3], got 7'),
        (['--layers', '0'], 'layers must be an int of at least 1, got 0'),
        (['--model', 'test_resnet', '--untrained'], 'has no deformable layers'),
    ),
)
def test_errors(dcnzoo, photos, trained, arguments, says):
    code, _, err = dcnzoo('offsets', photos / 'a.jpg', '--model', trained, *arguments)
    assert code == 1
    assert says in err[-1]
