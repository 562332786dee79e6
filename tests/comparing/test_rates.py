"""Successive halving over learning rates, on results whose best rate is known."""

from collections.abc import Callable
from math import inf

import pytest

from gatewise.comparing.rates import FIRST_SEED, Score, Trial, best_rate, rate_at


def searched(rates: int, truth: Callable[[int, int], float]) -> tuple[int, list[Trial]]:
    """The step that is found where a run of (step, seed) comes to ``truth``, and the runs made, in order."""
    done: dict[Trial, Score] = {}
    while True:
        trials, step = best_rate(rates, done.get)
        if step is not None:
            assert not trials
            return step, list(done)
        assert trials
        assert not done.keys() & set(trials)
        done |= {trial: (truth(*trial), 0.0) for trial in trials}


def test_all_rates_run_once_the_better_half_twice_and_the_best_two_three_times() -> None:
    step, runs = searched(5, lambda step, _: -abs(step - 1))
    assert step == 1
    seeds = {step: [seed - FIRST_SEED for one, seed in runs if one == step] for step, _ in runs}
    assert {one: len(own) for one, own in seeds.items()} == {-2: 1, -1: 1, 0: 3, 1: 3, 2: 2}
    assert all(own == [*range(len(own))] for own in seeds.values())


def test_the_mean_over_seeds_decides_and_not_one_lucky_seed() -> None:
    lucky = {(-1, FIRST_SEED): 1.0}
    assert searched(5, lambda step, seed: lucky.get((step, seed), -abs(step)))[0] == 0


@pytest.mark.parametrize(("best", "runs"), [(4, 5 + 3 + 3 + 2), (-3, 5 + 2 + 3 + 2)])
def test_the_grid_goes_on_outwards_while_the_best_rate_is_at_its_edge(best: int, runs: int) -> None:
    step, made = searched(5, lambda step, _: -abs(step - best))
    assert (step, len(made)) == (best, runs)


def test_a_winner_that_is_at_the_edge_only_in_the_end_meets_the_rate_beyond_it() -> None:
    def truth(step: int, seed: int) -> float:
        return {-2: -4.0, -1: -3.0, 0: 0.0 if seed == FIRST_SEED else -9.0, 1: -1.0, 2: -0.5, 3: -0.2}.get(step, -5.0)

    step, made = searched(5, truth)
    assert step == 3
    assert [seed - FIRST_SEED for one, seed in made if one == 3] == [0, 1, 2]
    assert [seed - FIRST_SEED for one, seed in made if one == 4] == [0]


def test_where_every_run_diverges_the_search_goes_down_and_ends() -> None:
    step, made = searched(3, lambda *_: -inf)
    assert step < 0
    assert min(one for one, _ in made) == -1 - 3


def test_one_rate_is_the_recipes_own_for_which_nothing_is_run() -> None:
    assert best_rate(1, lambda _: None) == ([], 0)
    assert rate_at(0.00012345, 0) == 0.00012345
    assert [rate_at(1e-3, step) for step in (-2, -1, 1, 2)] == [0.000309, 0.000556, 0.0018, 0.00324]
