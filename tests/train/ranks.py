"""Several ranks as real processes on gloo, cheap to start: forked from a server that has imported everything."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from pathlib import Path


def serve():
    """The context to start processes in; its server lives as long as this process."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.train.ranks', 'dcnzoo.train.main', 'torch.distributed.checkpoint'])
    return context


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _rank(function, arguments, environment, log):
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                status = function(*arguments)
            except BaseException:
                traceback.print_exc()
                status = 99
            file.flush()
    os._exit(status or 0)  # no clean-up of a process group that may have lost its other ranks


def run_training(arguments):
    from dcnzoo.train.main import main

    return main(arguments)


class Ranks:
    """Ranks that call one function, or train; `logs` holds what each prints.

    Args:
        logs: folder for one file per rank.
        count: number of ranks.
        function: importable, called with `arguments` in every rank; by default the trainer.
        arguments: of the function; for the trainer those of the command line.
    """

    def __init__(self, logs, count, arguments, function=None):
        if function is None:
            function, arguments = run_training, ([str(argument) for argument in arguments],)
        logs = Path(logs)
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f'rank{rank}.txt' for rank in range(count)]
        common = {
            'WORLD_SIZE': str(count),
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(free_port()),
            'ACCELERATE_USE_CPU': 'true',
            'OMP_NUM_THREADS': '1',
            'TORCHELASTIC_RUN_ID': '',
        }
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = {**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}
            process = serve().Process(target=_rank, args=(function, arguments, environment, log))
            process.start()
            self.processes.append(process)

    def wait(self, seconds=300):
        """Waits for all, and returns their exit statuses; one that fails takes the others with it, as launchers do."""
        for process in self.processes:
            process.join(seconds)
            if process.exitcode != 0:
                break
        for process in self.processes:
            process.join(5 if any(each.exitcode for each in self.processes) else seconds)
            if process.exitcode is None:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def kill(self):
        """kill -9."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def text(self, rank=0):
        return self.logs[rank].read_text()
