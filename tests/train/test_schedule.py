"""Learning rates over a run, against the formulas of timm's schedules; and what plateau remembers."""

import csv
import math

import pytest
import torch

from dcnzoo.train.config import Config, DataConfig, OptimConfig, ScheduleConfig
from dcnzoo.train.errors import TrainError
from dcnzoo.train.schedule import LearningRate, build_scheduler, scaled

from .conftest import settings

BATCHES = 4
HALF = [math.cos(math.pi * epoch / 10) / 2 + 0.5 for epoch in range(10)]


def learning_rate(name, **schedule):
    """Of a run of 10 epochs at 1.0 and, in a second group, at a quarter of that."""
    groups = [{'params': [torch.zeros(1)], 'lr_scale': scale} for scale in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    config = Config(schedule=ScheduleConfig(name=name, epochs=10, **{'warmup_epochs': 0, **schedule}))
    return LearningRate(optimizer, build_scheduler(config, optimizer, BATCHES, processes=1), BATCHES)


def rates(name, **schedule):
    """At the start of each epoch."""
    rate, values = learning_rate(name, **schedule), []
    for epoch in range(10):
        rate.move_to(epoch)
        first, second = (group['lr'] for group in rate.optimizer.param_groups)
        assert second == pytest.approx(first / 4)
        assert rate.highest == first
        values.append(first)
    return values


@pytest.mark.parametrize(
    ('name', 'schedule', 'formula'),
    [
        ('none', {}, lambda t: 1.0),
        ('constant', {}, lambda t: 1.0),
        ('cosine', {}, lambda t: HALF[t]),
        ('cosine', {'min_lr': 0.1}, lambda t: 0.1 + 0.9 * HALF[t]),
        ('tanh', {}, lambda t: (1 - math.tanh(-7 + t)) / 2),
        ('poly', {'decay_rate': 2.0}, lambda t: (1 - t / 10) ** 2),
        ('step', {'decay_epochs': 3, 'decay_rate': 0.5}, lambda t: 0.5 ** (t // 3)),
        ('multistep', {'decay_milestones': [2, 5]}, lambda t: 0.1 ** ((t >= 2) + (t >= 5))),
        ('wsd', {}, lambda t: 1 - math.sqrt(max(0, t - 8) / 2)),
        ('wsd', {'decay_epochs': 5}, lambda t: 1 - math.sqrt(max(0, t - 5) / 5)),
        (
            'rsqrt',
            {'kwargs': {'stable_timescale': 2}},
            lambda t: (1 + t / 2) ** -0.5 * (1 - max(0, t - 8) / 2),
        ),
    ],
)
def test_schedules(name, schedule, formula):
    assert rates(name, **schedule) == pytest.approx([formula(epoch) for epoch in range(10)])


def test_warm_up_and_cool_down():
    """Linear towards the highest rate, in place of what the schedule says until then; at the end the lowest."""
    values = rates('cosine', warmup_epochs=2, warmup_lr=0.0, min_lr=0.01, cooldown_epochs=5)
    cosine = [0.01 + 0.99 * (math.cos(math.pi * epoch / 5) + 1) / 2 for epoch in range(5)]
    assert values == pytest.approx([0, 0.5, *cosine[2:], *[0.01] * 5])


def test_rates_between_epochs():
    rate = learning_rate('cosine')
    for batch in range(10 * BATCHES):
        rate.move_to(batch / BATCHES)
        assert rate.highest == pytest.approx((math.cos(math.pi * batch / BATCHES / 10) + 1) / 2)


def test_rates_for_the_global_batch():
    config = Config(data=DataConfig(batch_size=64), optim=OptimConfig(lr_base_batch=512, accumulate=2))
    assert scaled(1e-3, config, processes=8) == pytest.approx(2e-3)
    config.optim.lr_base_batch = 0
    assert scaled(1e-3, config, processes=8) == 1e-3


def test_plateau():
    """Drops after two epochs that are no better, for every group."""
    rate = learning_rate('plateau', patience_epochs=1, decay_rate=0.5)
    values = []
    for epoch, metric in enumerate([50.0, 60.0, 60.0, 60.0, 60.0, 70.0, 65.0, 65.0], start=1):
        rate.finish_epoch(epoch, metric)
        values.append(rate.highest)
    assert values == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]
    first, second = (group['lr'] for group in rate.optimizer.param_groups)
    assert second == pytest.approx(first / 4)


def test_a_resumed_run_knows_how_long_it_has_not_improved(photos, tmp_path, train):
    """At this rate top-1 does not change: the rate drops in the third epoch and then in every second one."""
    changes = {
        'schedule__name': 'plateau', 'schedule__patience_epochs': 1, 'schedule__decay_rate': 0.5,
        'schedule__warmup_epochs': 0, 'optim__lr': 1e-7,
    }  # fmt: skip
    logs = []
    for output, stops in (('whole', [6]), ('resumed', [2, 6])):
        for epochs in stops:
            arguments = settings(photos, tmp_path / output, schedule__epochs=epochs, **changes)
            assert train([*arguments, '--resume', 'auto'])[0] == 0
        with (tmp_path / output / 'metrics.csv').open() as file:
            logs.append([float(row['lr']) for row in csv.DictReader(file)])
    assert logs[0] == logs[1]
    assert logs[0] == pytest.approx([1e-7, 1e-7, 1e-7, 5e-8, 5e-8, 2.5e-8])


@pytest.mark.parametrize(
    ('name', 'schedule', 'message'),
    [
        ('cosin', {}, r"schedule\.name: cannot create 'cosin'"),
        ('wsd', {'decay_epochs': 20}, r"schedule\.name: cannot create 'wsd': .*decay_epochs"),
        ('cosine', {'kwargs': {'cycles': 2}}, r"schedule\.name: cannot create 'cosine': .*cycles"),
    ],
)
def test_wrong_schedules(name, schedule, message):
    with pytest.raises(TrainError, match=message):
        learning_rate(name, **schedule)
