import json

import pytest
import timm
import torch
from PIL import Image

from dcnzoo import visualize


def test_shapes(dcnzoo, photos):
    code, out, err = dcnzoo('features', photos / 'a.jpg', '--model', 'test_dcnv4', '--json')
    assert (code, err) == (0, [])
    report = json.loads(out)
    model = timm.create_model('test_dcnv4', features_only=True)
    channels, size = model.feature_info.channels(), model.pretrained_cfg['input_size'][1:]
    assert report['input'] == [3, *size]
    assert [stage['reduction'] for stage in report['stages']] == [4, 8, 16, 32]
    for stage, width in zip(report['stages'], channels, strict=True):
        assert stage['shape'] == [width, *(side // stage['reduction'] for side in size)]


def test_table_and_other_timm_models(dcnzoo, photos):
    code, out, err = dcnzoo('features', photos / 'a.jpg', '--model', 'test_resnet')
    assert (code, err) == (0, [])
    rows = out.splitlines()
    assert rows[0].split() == ['stage', 'reduction', 'channels', 'height', 'width']
    assert [row.split()[1] for row in rows[1:]] == ['1', '2', '4', '8', '16', '32']


def test_png(dcnzoo, photos, trained, tmp_path):
    drawing = tmp_path / 'maps.png'
    code, _, err = dcnzoo('features', photos / 'a.jpg', '--model', trained, '--png', drawing)
    assert (code, err) == (0, [])
    with Image.open(drawing) as image:
        assert image.format == 'PNG'
        assert min(image.size) > 500
        assert len(set(image.convert('L').tobytes())) > 100


def test_png_of_an_untrained_model_says_so(dcnzoo, photos, tmp_path):
    for arguments in (['--model', 'test_dcnv4'], ['--model', 'test_resnet', '--untrained']):
        code, _, err = dcnzoo('features', photos / 'a.jpg', *arguments, '--png', tmp_path / 'maps.png')
        assert code == 0
        assert err == ['dcnzoo features: the maps are drawn with initial weights, not trained ones']


@pytest.mark.parametrize(
    'arguments, says',
    (
        (['--png', 'nowhere/maps.png', '--untrained'], 'cannot write nowhere/maps.png: No such file or directory'),
        (['--model', 'test_dcnv5'], 'did you mean test_dcnv4'),
    ),
)
def test_errors(dcnzoo, photos, arguments, says):
    code, _, err = dcnzoo('features', photos / 'a.jpg', '--model', 'test_dcnv4', *arguments)
    assert code == 1
    assert says in err[-1]


def test_not_an_image(dcnzoo, photos):
    code, out, err = dcnzoo('features', photos / 'more/notes.txt', '--model', 'test_dcnv4')
    assert (code, out, err) == (1, '', [f'dcnzoo features: {photos / "more/notes.txt"}: not an image'])


def test_figure():
    features = [torch.randn(8, 6, 6), torch.randn(3, 3, 3)]
    features[0][5] *= 10
    figure = visualize.feature_maps(Image.new('RGB', (24, 24)), features, ['first', 'second'], channels=4)
    titles = [axis.get_title() for axis in figure.axes]
    assert 'first\nmean magnitude' in titles
    assert titles.index('channel 5') == 2  # the one that varies most comes first
    assert sum(title.startswith('channel') for title in titles) == 4 + 3
    with pytest.raises(ValueError, match='titles must name each of the 2'):
        visualize.feature_maps(Image.new('RGB', (24, 24)), features, ['first'])
    with pytest.raises(ValueError, match=r'got one of shape \(1, 8, 6, 6\)'):
        visualize.feature_maps(Image.new('RGB', (24, 24)), [features[0][None]], ['first'])


def test_to_image_undoes_normalisation():
    pixels = torch.randint(256, (3, 5, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    image = visualize.to_image(normalised, mean, std)
    assert image.tobytes() == pixels.movedim(0, -1).contiguous().numpy().tobytes()
    assert visualize.to_image(normalised[:1], mean[:1], std[:1]).mode == 'L'
