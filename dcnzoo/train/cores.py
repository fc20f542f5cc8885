"""The processor cores that a process of the trainer may count on."""

import os

import psutil


def count_cores() -> int:
    """Cores of the machine, but no more than this process may run on."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def share_of_cores() -> int:
    """This process's part of them, beside the others that a launcher started on this machine; at least one."""
    return max(1, count_cores() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
