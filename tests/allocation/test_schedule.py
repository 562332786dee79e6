"""When rounds run and how much goes in each, and settings that cannot be."""

import math

import numpy as np
import pytest

from gatewise import ConstantBudget, Cubic
from gatewise.allocation.schedule import in_steps
from gatewise.errors import GatewiseError


def test_whole_numbers_above_one_are_steps_and_others_epochs():
    assert [in_steps(value, 100) for value in (2, 1, 1.0, 0.25, 2.0, 0.001)] == [2, 100, 100, 25, 200, 1]
    assert ConstantBudget(rounds=3, first_round=1.0, recover=3).steps(10) == [10, 13, 16]


def test_numpys_whole_numbers_are_steps_too():
    """They were epochs."""
    schedule = ConstantBudget(rounds=np.int64(2), first_round=np.int64(2), recover=np.int32(3))
    assert schedule.steps(100) == schedule.steps(None) == [2, 5]


def test_epochs_of_data_without_a_length_are_refused():
    with pytest.raises(GatewiseError, match=r"recover=0\.25 means epochs, but the training data has no length: give steps"):
        ConstantBudget(first_round=3).steps(None)


def test_a_constant_budget_prunes_the_same_share_each_time():
    assert [ConstantBudget().cut(100, 100, live, 1, 8) for live in (100, 90)] == [(12, 100), (12, 100)]
    assert ConstantBudget(prune_fraction=0.001).cut(100, 100, 100, 1, 8) == (1, 100)


def test_a_cubic_budget_comes_down_fast_at_first():
    cut = Cubic(target_rank=1).cut
    assert [cut(100, 36, 100, done, 4)[1] for done in range(6)] == [100, 63, 44, 37, 36, 36]
    assert cut(100, 36, 63, 2, 4) == (19, 44)
    assert cut(100, 36, 40, 2, 4) == (0, 44)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ConstantBudget, {"prune_fraction": 1.5}, "prune_fraction is 1.5; expected a share between 0 and 1"),
        (ConstantBudget, {"recover": 0}, "recover is 0; expected epochs or steps above 0"),
        (ConstantBudget, {"first_round": "1"}, "first_round is '1'; expected epochs or steps above 0"),
        (ConstantBudget, {"grace_rounds": -1}, "grace_rounds is -1; expected a whole number of at least 0"),
        (ConstantBudget, {"grace_rounds": 1.5}, "grace_rounds is 1.5; expected a whole number"),
        (ConstantBudget, {"rounds": "3"}, "rounds is '3'; expected a whole number"),
        (ConstantBudget, {"r_max": 4.5}, "r_max is 4.5; expected a number of ranks"),
        *(
            (Cubic, {"target_rank": wrong}, f"target_rank is {wrong!r}; expected a number above 0")
            for wrong in (0, math.nan, "2", math.inf)
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, settings, message):
    with pytest.raises(GatewiseError, match=message):
        kind(**settings)
