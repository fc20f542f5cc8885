import errno
import os
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from dcnzoo.train import checkpoint
from dcnzoo.train.checkpoint import (
    atomic,
    find_checkpoints,
    load_weights,
    save_weights,
    timm_config,
    write_json,
    write_text,
)
from dcnzoo.train.config import Config, RunConfig
from dcnzoo.train.errors import TrainError


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'file.txt'
    write_text(path, 'first')
    with (
        pytest.raises(
            TrainError, match=r'cannot write .*file\.txt: No space left on device; what was there is untouched'
        ),
        atomic(path) as draft,
    ):
        draft.write_text('half')
        full_disk()
    assert path.read_text() == 'first'
    monkeypatch.setattr(os, 'replace', full_disk)
    with pytest.raises(TrainError, match='No space left'):
        write_text(path, 'second')
    assert [entry.name for entry in path.parent.iterdir()] == ['file.txt']
    assert path.read_text() == 'first'


def test_weights_in_any_memory_order(tmp_path):
    first, second = (timm.create_model('test_dcnv4', num_classes=3) for _ in range(2))
    first.to(memory_format=torch.channels_last)
    save_weights(tmp_path / 'model.safetensors', first.state_dict())
    load_weights(tmp_path / 'model.safetensors', second)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('test_dcnv4', {'channels': 16}), ('test_vit', {'img_size': 96}), ('test_convnext', {})],
)
def test_folder_for_timm(tmp_path, name, kwargs):
    """timm makes the model of the folder with all that it needs: classes, channels, size, statistics, label names."""
    model = timm.create_model(name, num_classes=3, in_chans=1, **kwargs).eval()
    data = {'input_size': (1, 96, 96), 'mean': (0.3,), 'std': (0.2,), 'interpolation': 'bilinear', 'crop_pct': 0.9}
    config = timm_config(model, data, ['ant', 'bee', 'cat'], kwargs)
    save_weights(tmp_path / 'model.safetensors', model.state_dict())
    write_json(tmp_path / 'config.json', config)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    image = torch.randn(2, 1, 96, 96)
    assert torch.equal(model(image), again(image))
    cfg = again.pretrained_cfg
    assert (cfg['num_classes'], tuple(cfg['input_size']), cfg['label_names']) == (3, (1, 96, 96), ['ant', 'bee', 'cat'])
    assert 'num_classes' not in config.get('model_args', {})  # transformers passes it itself

    # and a model made from such a folder makes another one
    more = timm_config(again, data, None, {})
    assert more.get('model_args') == config.get('model_args')
    assert 'label_names' not in more
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7)(image).shape == (2, 7)


def checkpoints(output, *names):
    for name in names:
        (output / 'checkpoints' / name).mkdir(parents=True)
        write_json(output / 'checkpoints' / name / 'trainer.json', {})
    return output / 'checkpoints'


def test_what_is_resumed(tmp_path, monkeypatch):
    def config(resume, output='run'):
        return Config(resume=resume, run=RunConfig(output=str(tmp_path / output)))

    folder = checkpoints(
        tmp_path / 'run', 'epoch_0002_batch_00000000', 'epoch_0010_batch_00000000', 'epoch_0002_batch_00000009'
    )
    (folder / '.epoch_0011_batch_00000000.draft').mkdir()  # half written when the run was killed
    newest = folder / 'epoch_0010_batch_00000000'
    (tmp_path / 'run' / 'best').mkdir()
    older = folder / 'epoch_0002_batch_00000009'
    newest_first = [newest, older, folder / 'epoch_0002_batch_00000000']
    assert find_checkpoints(config(None)) == []
    assert find_checkpoints(config('auto')) == newest_first
    assert find_checkpoints(config('auto', 'fresh')) == []
    assert find_checkpoints(config(str(tmp_path / 'run'), 'fresh')) == newest_first
    assert find_checkpoints(config(str(tmp_path / 'run' / 'best'))) == newest_first
    assert find_checkpoints(config(str(older))) == [older]
    monkeypatch.chdir(tmp_path)
    relative = Config(resume=str(older), run=RunConfig(output='run'))
    assert find_checkpoints(relative) == [older.relative_to(tmp_path)]  # they are compared with those in the output
    with pytest.raises(TrainError, match=r'--resume: .*nowhere does not exist'):
        find_checkpoints(config(str(tmp_path / 'nowhere')))
    shutil.rmtree(folder)
    with pytest.raises(TrainError, match=r'--resume: .*best holds no resumable checkpoint'):
        find_checkpoints(config(str(tmp_path / 'run' / 'best')))


def test_weights_that_cannot_be_written(tmp_path, monkeypatch):
    model = timm.create_model('test_dcnv4', num_classes=3)
    save_weights(tmp_path / 'model.safetensors', model.state_dict())
    monkeypatch.setattr(checkpoint, 'save_file', full_disk)
    torch.nn.init.zeros_(next(model.parameters()))
    with pytest.raises(TrainError, match='No space left'):
        save_weights(tmp_path / 'model.safetensors', model.state_dict())
    assert load_file(tmp_path / 'model.safetensors')
    assert len(list(tmp_path.iterdir())) == 1
