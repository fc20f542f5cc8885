"""Cores that a process of the trainer may count on, and what follows from them."""

import os

import psutil
import pytest

from dcnzoo.train.config import Config
from dcnzoo.train.cores import count_cores, share_of_cores


@pytest.fixture
def machine(monkeypatch):
    """Makes the machine have so many cores, of which so many may be used, and so many processes share them."""

    def become(physical: int | None, allowed: int, processes: int = 1) -> None:
        monkeypatch.setattr(psutil, 'cpu_count', lambda logical: physical)
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(allowed)), raising=False)
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))

    return become


@pytest.mark.parametrize(
    ('physical', 'allowed', 'processes', 'cores', 'share', 'workers'),
    [(64, 128, 1, 64, 64, 4), (64, 128, 8, 64, 8, 4), (64, 3, 1, 3, 3, 3), (None, 2, 1, 2, 2, 2), (2, 2, 4, 2, 1, 1)],
)
def test_cores_are_shared(machine, physical, allowed, processes, cores, share, workers):
    machine(physical, allowed, processes)
    assert count_cores() == cores
    assert share_of_cores() == share
    assert Config().data.workers == workers
