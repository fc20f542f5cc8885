"""Averages of checkpoints, as `dcnzoo average` makes them."""

import timm
import torch
from safetensors.torch import load_file

from dcnzoo.commands import main as command


def test_average(trained, tmp_path, capsys):
    """Of the averages in a run's checkpoints, as a folder that timm loads; or of files."""
    checkpoints = sorted((trained / 'checkpoints').iterdir())
    assert command(['average', str(trained), '--last', '2', '--output', str(tmp_path / 'average')]) == 0
    assert 'the average of 2 checkpoints' in capsys.readouterr().out
    ours = timm.create_model(f'local-dir:{tmp_path / "average"}', pretrained=True).state_dict()
    first, second = (load_file(folder / 'ema.safetensors') for folder in checkpoints[-2:])
    for key, value in ours.items():
        expected = (first[key].double() + second[key]) / 2 if value.is_floating_point() else second[key]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=0, atol=0)

    assert command(['average', str(trained), '--output', str(tmp_path / 'average')]) == 1
    assert 'is there already' in capsys.readouterr().err

    files = [str(folder / 'model.safetensors') for folder in checkpoints]
    assert command(['average', *files[:1], *files[:1], '--output', str(tmp_path / 'same')]) == 0
    same = load_file(tmp_path / 'same' / 'model.safetensors')
    assert all(torch.equal(value, same[key]) for key, value in load_file(files[0]).items())
    assert 'no config.json' in capsys.readouterr().out
    other = timm.create_model('test_convnext')
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    for arguments in ([files[0], str(tmp_path / 'other.pth')], [str(tmp_path / 'nowhere')], [str(tmp_path)]):
        assert command(['average', *arguments, '--output', str(tmp_path / 'none')]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / 'none').exists()
