"""Tune's schedulers as a sweep uses them: told of the past they decide as if they had seen it, and none pauses a trial."""

import pytest
from ray.tune.schedulers import TrialScheduler

from imaml_dist.config.sweep import AshaConfig, MedianConfig, NoSchedulerConfig
from imaml_dist.distributed.ray_search import make_scheduler, replay
from imaml_dist.sweeps.ledger import Result, Trial

GOOD = [0.5, 0.7, 0.8, 0.85]
CONFIGS = [AshaConfig(grace=10, reduction=2.0), MedianConfig(grace=10, min_trials=2)]


class Running:
    def __init__(self, name):
        self.trial_id = name


def reports(curve):
    return [{"meta_steps": 10 * (n + 1), "val_accuracy": value} for n, value in enumerate(curve)]


def decisions(scheduler, curve):
    trial, said = Running("new"), []
    scheduler.on_trial_add(None, trial)
    for report in reports(curve):
        said.append(scheduler.on_trial_result(None, trial, report))
        if said[-1] == TrialScheduler.STOP:
            break
    return said


def past(*curves):
    ended = [Trial(n, {}, "finished", Result(accuracy=curve[-1]), ended=float(n)) for n, curve in enumerate(curves)]
    return list(zip(ended, map(reports, curves), strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_scheduler_that_is_told_of_the_past_stops_what_is_worse_and_nothing_else(config):
    scheduler = make_scheduler(config, 40)
    replay(scheduler, past(GOOD, [v - 0.01 for v in GOOD], [v - 0.02 for v in GOOD]))
    assert decisions(scheduler, [0.2, 0.3, 0.3, 0.3]) == [TrialScheduler.STOP]
    assert decisions(scheduler, [v + 0.05 for v in GOOD]) == [TrialScheduler.CONTINUE] * 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_without_a_past_nothing_is_stopped_or_paused(config):
    assert decisions(make_scheduler(config, 40), [0.2, 0.2, 0.2, 0.2]) == [TrialScheduler.CONTINUE] * 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_what_a_trial_reports_again_after_a_crash_counts_once(config):
    """Its first two validations are bad: counted twice, they would lower the mean that others are measured by."""

    def judged(crashes_after):
        scheduler, trial, curve = make_scheduler(config, 40), Running("again"), reports([0.2, 0.2, 0.8, 0.8])
        replay(scheduler, past([0.2, 0.2, 0.8, 0.8]))
        scheduler.on_trial_add(None, trial)
        for number, report in enumerate(curve, start=1):
            assert scheduler.on_trial_result(None, trial, report) == TrialScheduler.CONTINUE
            if number == crashes_after:
                for earlier in curve[:number]:
                    assert scheduler.on_trial_result(None, trial, earlier) == TrialScheduler.CONTINUE
        return decisions(scheduler, [0.49] * 4)

    assert judged(None)[-1] == TrialScheduler.STOP
    assert [judged(number) for number in (1, 2, 3)] == [judged(None)] * 3


def test_no_scheduler_stops_nothing():
    scheduler = make_scheduler(NoSchedulerConfig(), 40)
    replay(scheduler, past(GOOD))
    assert decisions(scheduler, [0.0, 0.0]) == [TrialScheduler.CONTINUE] * 2
