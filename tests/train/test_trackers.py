"""Trackers of accelerate: what they are told of a run."""

import pytest
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from dcnzoo.train.config import Config
from dcnzoo.train.errors import TrainError
from dcnzoo.train.report import begin_trackers

from .conftest import forget_accelerator


def track(output, *trackers):
    """An accelerator whose trackers have been told of a run's settings and of one number."""
    forget_accelerator()
    config = Config()
    config.run.output, config.run.trackers = str(output), list(trackers)
    config.optim.groups = {'head.*': {'lr_scale': 2.0}}
    project = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / 'tensorboard'))
    accelerator = Accelerator(cpu=True, log_with=list(trackers) or None, project_config=project)
    begin_trackers(accelerator, config)
    accelerator.log({'train/loss': 0.5}, step=1)
    accelerator.end_training()


def test_tensorboard(tmp_path):
    track(tmp_path / 'run', 'tensorboard')
    (file,) = (tmp_path / 'run' / 'tensorboard').rglob('hparams.yml')
    stored = yaml.safe_load(file.read_text())
    assert (stored['optim.lr'], stored['model.name']) == (Config().optim.lr, 'dcnv4_tiny')
    assert stored['optim.groups'] == "{'head.*': {'lr_scale': 2.0}}"


def test_none(tmp_path):
    track(tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_one_that_does_not_start(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise ConnectionError('no\nlogin')

    monkeypatch.setattr(Accelerator, 'init_trackers', refuse)
    with pytest.raises(TrainError, match=r'run\.trackers: tensorboard cannot start: no login; --run\.trackers \[\]'):
        track(tmp_path / 'run', 'tensorboard')


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    (tmp_path / 'run').mkdir()
    track(tmp_path / 'run', 'wandb')
    assert list((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
    mlflow.set_tracking_uri((tmp_path / 'mlruns').as_uri())
    track(tmp_path / 'run', 'mlflow')
    (found,) = mlflow.search_runs(experiment_names=['dcnzoo'], output_format='list')
    assert found.info.run_name == 'run'
    assert found.data.metrics == {'train/loss': 0.5}
    assert found.data.params['model.name'] == 'dcnv4_tiny'


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    pytest.importorskip('trackio')
    track(tmp_path / 'run', 'trackio')
    assert list((tmp_path / 'trackio').glob('dcnzoo*'))
