"""Settings of the whole suite."""

import os

import torch

# The workers of pytest-xdist share the cores: each takes its part, and so do the processes that its tests start.
_workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
_threads = max(1, len(os.sched_getaffinity(0)) // _workers) if hasattr(os, 'sched_getaffinity') else 1
os.environ.setdefault('OMP_NUM_THREADS', str(_threads))
torch.set_num_threads(_threads)
