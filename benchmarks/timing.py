"""Times several functions side by side, so that what disturbs the machine disturbs all of them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over all calls, the quartiles around it, and the shortest."""

    median: float
    lower: float
    upper: float
    shortest: float

    @classmethod
    def of(cls, seconds: list[float]) -> 'Timing':
        ordered = sorted(seconds)
        lower, _, upper = statistics.quantiles(ordered, n=4, method='inclusive') if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), lower, upper, ordered[0])


def time_calls(function: Callable[[], object], count: int, device: str) -> list[float]:
    """Times `count` calls one by one after a first that warms the caches."""
    function()
    seconds = []
    for _ in range(count):
        if device == 'cuda':
            torch.cuda.synchronize()
        begin = time.perf_counter()
        function()
        if device == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(
    calls: dict[str, Callable[[int], list[float]]], rounds: int, seconds: float, most: int = 50
) -> dict[str, Timing]:
    """Runs the peers in turn, round by round.

    Args:
        calls: For each peer a function that times so many calls, as `time_calls` does.
        rounds: How often each peer's turn comes.
        seconds: About how long a turn takes.
        most: The most calls of a turn.

    Returns:
        Each peer's timing over all rounds.
    """
    turns = {name: min(most, max(1, round(seconds / min(call(2))))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name] += call(turns[name])
    return {name: Timing.of(times) for name, times in samples.items()}
