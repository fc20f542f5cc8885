import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from dcnzoo.commands import main

CLASSES = ('ant', 'bee', 'cat')


@pytest.fixture
def dcnzoo(capsys):
    """Runs the command in this process; returns its exit code, standard output and the lines of standard error."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        output = capsys.readouterr()
        assert 'Traceback' not in output.out + output.err
        return code, output.out, output.err.splitlines()

    return run


def save(folder, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model('test_dcnv4', **kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    labels = {'label_names': list(CLASSES)} if model.num_classes == len(CLASSES) else {}
    save_for_hf(model, folder, model_config={'num_classes': model.num_classes, **labels}, safe_serialization=True)
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A folder such as training leaves."""
    return save(tmp_path_factory.mktemp('trained'), num_classes=len(CLASSES))


def noise(path, mode='RGB', size=(60, 40), seed=0):
    torch.manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Images of several kinds in nested folders."""
    noise(tmp_path / 'a.jpg', seed=1)
    noise(tmp_path / 'more' / 'b.png', seed=2)
    noise(tmp_path / 'more' / 'grey.PNG', 'L', seed=3)
    noise(tmp_path / 'more' / 'palette.png', 'P', seed=4)
    noise(tmp_path / 'more' / 'deeper' / 'c.webp', seed=5)
    (tmp_path / 'more' / 'notes.txt').write_text('not for classifying')
    noise(tmp_path / '.hidden' / 'd.png')
    return tmp_path
