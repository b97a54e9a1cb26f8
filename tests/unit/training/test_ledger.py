"""The ledger counts how the tasks of the newest meta-steps ended."""

from imaml_dist.training.ledger import Ledger


def test_outcomes_of_the_last_steps_are_counted_by_name():
    ledger = Ledger()
    for step, outcomes in enumerate(([2, 2, 2, 2], [0, 0, 0, 0], [1, 1, 2, 0], [1, 2, 2, 2])):
        ledger.commit(step, outcomes)
    assert ledger.outcomes_of_last(1) == {"NON_FINITE": 1, "INNER_DIVERGED": 3}
    assert ledger.outcomes_of_last(2) == {"OK": 1, "NON_FINITE": 3, "INNER_DIVERGED": 4}
    assert ledger.outcomes_of_last(4) == {"OK": 5, "NON_FINITE": 3, "INNER_DIVERGED": 8}
    assert Ledger().outcomes_of_last(3) == {}
