"""What the history of rounds means for the next one."""

import pytest

from gatewise.rounds import Round, smoothed, spared


def one_round(number, slots, scores, pruned=None, grown=None):
    return Round(number, number, scores, slots, pruned or {}, grown or {}, {}, 0.0, 0.0, 0.0)


def test_no_smoothing_is_the_scores_themselves():
    history = [one_round(1, {"a": [0]}, {"a": [9.0]})]
    assert smoothed(history, {"a": [0]}, {"a": [1.0]}, 0.0) == {"a": [1.0]}


def test_smoothing_follows_each_slot_while_it_lives():
    """Slot 0 lives throughout, slot 1 is pruned and comes back as another rank, slot 2 is grown in the first round."""
    history = [
        one_round(1, {"a": [0, 1]}, {"a": [4.0, 8.0]}, pruned={"a": [1]}, grown={"a": [2]}),
        one_round(2, {"a": [0, 2]}, {"a": [2.0, 6.0]}, grown={"a": [1]}),
    ]
    got = smoothed(history, {"a": [0, 1, 2]}, {"a": [1.0, 5.0, 7.0]}, 0.5)
    assert got == {"a": [0.5 * (0.5 * 4 + 0.5 * 2) + 0.5 * 1, 5.0, 0.5 * 6 + 0.5 * 7]}


def test_smoothing_weighs_the_past():
    history = [one_round(1, {"a": [3]}, {"a": [1.0]})]
    assert smoothed(history, {"a": [3]}, {"a": [0.0]}, 0.9)["a"] == pytest.approx([0.9])


def test_spared_are_the_positions_of_what_the_last_rounds_grew():
    history = [
        one_round(1, {}, {}, grown={"a": [4], "b": [1]}),
        one_round(2, {}, {}, pruned={"b": [1]}, grown={"a": [5]}),
    ]
    live = {"a": [0, 4, 5], "b": [0]}
    assert spared(history, live, 0) == {}
    assert spared(history, live, 1) == {"a": {2}}
    assert spared(history, live, 2) == {"a": {1, 2}, "b": set()}
