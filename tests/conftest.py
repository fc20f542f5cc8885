"""Settings of the whole suite, and a Hugging Face Hub of its own: no test ever reaches another."""

import atexit
import os
import shutil
import tempfile

import pytest
import torch
from PIL import Image

from .hub_server import HubServer

# The workers of pytest-xdist share the cores: each takes its part, and so do the processes that its tests start.
_workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
_threads = max(1, len(os.sched_getaffinity(0)) // _workers) if hasattr(os, 'sched_getaffinity') else 1
os.environ.setdefault('OMP_NUM_THREADS', str(_threads))
torch.set_num_threads(_threads)

# huggingface_hub reads these when it is imported, which is later.
_hub = HubServer()
_home = tempfile.mkdtemp(prefix='dcnzoo-tests-')
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {
    'HF_ENDPOINT': _hub.url,
    'HF_HOME': _home,
    'HF_HUB_DISABLE_XET': '1',
    'HF_HUB_DISABLE_PROGRESS_BARS': '1',
    'TORCH_HOME': _home,
    # ultralytics too: no network, no installing of packages, settings of the tests' own.
    'YOLO_OFFLINE': 'true',
    'YOLO_AUTOINSTALL': 'false',
    'YOLO_CONFIG_DIR': _home,
}
for _name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_CACHE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE'):
    os.environ.pop(_name, None)

_open_image = Image.open


@pytest.fixture(autouse=True)
def pillow(monkeypatch):
    """Gives Pillow its own `open` back, for which ultralytics puts one that wants packages for what it cannot read."""
    monkeypatch.setattr(Image, 'open', _open_image)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, empty, and an empty cache of the client, `hub.cache`."""
    import huggingface_hub

    _hub.reset()
    _hub.cache = tmp_path / 'hub-cache'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(_hub.cache))
    yield _hub
    _hub.reset()


@pytest.fixture
def few_models(monkeypatch):
    """Lets those whom a checkpoint might fit be few, for speed."""
    few = ['dcnv4_atto', 'test_dcnv4', 'test_parameternet']
    monkeypatch.setattr('dcnzoo.convert._models', lambda: few)


@pytest.fixture
def impatient(monkeypatch):
    """Lets the client wait no time between its attempts."""
    import time

    sleep = time.sleep
    monkeypatch.setattr(time, 'sleep', lambda seconds: sleep(min(seconds, 0.01)))
