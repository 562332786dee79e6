"""Reports from runs made by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from gatewise.comparing.report import draw, outlook, report, table
from gatewise.comparing.statistics import difference

HERE = {"processor": "a", "multiplies_bfloat16": True, "threads": 1, "gpu": None}
ROWS = 200


def run(arm: str, rate: float, seed: int, values: dict[str, Any], metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    """One finished run. ``values``: part -> a number for each row, or the metric alone."""
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "for": "rate" if seed >= 1000 else "seed",
        "metric": metric,
        "metrics": {part: {metric: float(np.mean(one)), "loss": 1.0, "n": ROWS} for part, one in values.items()},
        "rows": {part: [float(x) for x in one] for part, one in values.items() if np.ndim(one)},
        "parameters": 1000,
        "seconds": 10.0 + seed % 10,
        "peak_memory": 10**9,
        "forgotten": 0.25,
        "machine": HERE,
    } | more


def arm(name: str, rate: float | None = 1e-3) -> dict[str, Any]:
    return {"name": name, "learning_rate": rate, "recipe_rate": 1e-3, "parameters": 1000, "heads": 0, "told": ()}


def answers(right: float, seed: int, of: int = 0) -> np.ndarray:
    """Which rows are right: about this share, the same rows for most seeds."""
    ease = np.random.default_rng(of).random(ROWS) + 0.05 * np.random.default_rng([of, seed]).standard_normal(ROWS)
    return (ease < right).astype(float)


def finals(name: str, right: float, seeds: Sequence[int] = range(5), **more: Any) -> list[dict[str, Any]]:
    return [run(name, 1e-3, seed, {"dev": answers(right, seed, 1), "test": answers(right, seed, 2)}, **more) for seed in seeds]


def tuned(name: str, scores: dict[float, float], **more: Any) -> list[dict[str, Any]]:
    return [run(name, rate, 1000, {"tuning": answers(right, 1000, 3)}, **more) for rate, right in scores.items()]


def test_one_method_is_better() -> None:
    runs = [
        *finals("lora", 0.7),
        *finals("alora", 0.85, parameters=1030),
        *finals("dora", 0.7),
        *tuned("lora", {1e-3: 0.7, 3e-3: 0.5}),
    ]
    content = report(runs, [arm("lora"), arm("alora"), arm("dora")], missing=2)
    assert json.loads(json.dumps(content)) == content
    alora, dora = content["differences"]
    rows = {
        name: np.array([one["rows"]["test"] for one in runs if one["arm"] == name and one["for"] == "seed"])
        for name in ("lora", "alora")
    }
    known = difference(100 * (rows["alora"] - rows["lora"]))
    assert (alora["arm"], alora["mean"], alora["low"], alora["high"], alora["p"]) == (
        "alora",
        known.mean,
        known.low,
        known.high,
        known.p,
    )
    assert alora["p_holm"] == alora["p"]  # dora has no spread and so no p
    assert (dora["low"], dora["why"]) == (None, "all 5 seeds and all rows have the same difference")
    assert content["part"] == "test"
    assert content["chosen_on_dev"] == "alora"
    first = content["arms"][0]
    assert first["seeds"][0].keys() == {"seed", "dev", "test"}
    assert first["mean"]["test"] == pytest.approx(np.mean([one["test"] for one in first["seeds"]]))
    assert first["sd"]["dev"] == pytest.approx(np.std([one["dev"] for one in first["seeds"]], ddof=1))
    assert (first["seconds"], first["peak_memory"], first["forgotten"]) == (12, 10**9, 0.25)
    low, high = known.low, known.high
    told = f"Better than lora beyond chance on test: alora {known.mean:+.1f}, {low:+.1f} to {high:+.1f}, p {known.p:.2g}."
    assert content["sentence"].startswith(f"2 runs are missing. {told}")
    assert content["sentence"].endswith("By dev one would take alora.")
    assert content["notes"] == [
        "alora stores 1,030 parameters, 3.0% more than lora's 1,000",
        "lora's rate, 0.001, is at the edge of those tried: one beyond may be better",
    ]


def test_parameters_are_compared_without_heads() -> None:
    arms = [{**arm(name), "heads": 900} for name in ("lora", "alora")]
    content = report([*finals("lora", 0.7), *finals("alora", 0.7, parameters=1005)], arms)
    assert content["arms"][1]["heads"] == 900
    assert content["notes"][0] == "alora stores 1,005 parameters, 5.0% more than lora's 1,000, 900 of heads left aside"


def test_no_method_is_better() -> None:
    flip = [{**one, "rows": {"test": [*one["rows"]["test"][1:], 1.0 - one["rows"]["test"][0]]}} for one in finals("alora", 0.7)]
    for one in flip:
        one["metrics"]["test"]["accuracy"] = float(np.mean(one["rows"]["test"]))
    content = report([*finals("lora", 0.7), *flip], [arm("lora"), arm("alora")])
    (found,) = content["differences"]
    assert content["sentence"].startswith(
        f"No method is better than lora beyond chance on test (best: alora {found['mean']:+.1f}, "
    )
    assert f"A difference of {content['detectable']:.1f} points would be found four times in five." in content["sentence"]
    assert content["detectable"] > abs(found["mean"])
    content = report([*finals("lora", 0.7, [0]), *finals("alora", 0.9, [0])], [arm("lora"), arm("alora")])
    assert content["sentence"].startswith("No method is better than lora beyond chance on test (best: alora +")
    assert ", one seed does not say how much another would change)." in content["sentence"]


def test_a_loss_is_better_when_less() -> None:
    chance = np.random.default_rng(0)
    levels = {"lora": 2.0, "alora": 1.5, "dora": 2.5}
    runs = [
        run(name, 1e-3, seed, {"dev": level + 0.01 * chance.random(ROWS)}, metric="ter")
        for name, level in levels.items()
        for seed in range(3)
    ]
    content = report(runs, [arm("lora"), arm("alora"), arm("dora")], lower_is_better=True)
    assert (content["part"], content["unit"], content["chosen_on_dev"]) == ("dev", "ter", "alora")
    assert content["sentence"].startswith("Better than lora beyond chance on dev: alora -0.5")
    assert "Worse: dora +0.5" in content["sentence"]


def test_a_plan_compares_nothing_yet() -> None:
    content = report([], [arm("lora"), arm("alora")], missing=20)
    assert content["sentence"] == "Nothing to compare yet: 20 runs are to come."
    content = report(finals("lora", 0.7), [arm("lora"), arm("alora")], missing=5)
    assert content["sentence"].startswith("5 runs are missing. Not compared, as there is no pair of runs: alora.")


def test_what_the_rate_is_worth() -> None:
    scores = {1e-3: 0.9, 1.8e-3: 0.8, 3.24e-3: 0.6, 5.83e-3: 0.1}
    runs = [*tuned("lora", scores), *tuned("alora", {1e-3: 0.9}), run("alora", 1.8e-3, 1000, {}, diverged=True, metrics={})]
    content = report(runs, [arm("lora"), arm("alora"), arm("random", None)])
    lora, alora, random = content["arms"]
    by_rate = {one["learning_rate"]: one["tuning"] for one in lora["rates"]}
    assert list(by_rate) == sorted(scores)
    worth = by_rate[1e-3][0] - by_rate[3.24e-3][0]  # the last is too far away
    assert lora["rate_is_worth"] == pytest.approx(worth)
    assert (alora["rate_is_worth"], alora["rates"][1]["tuning"], random["rate_is_worth"]) == (None, [None], None)
    told = f"The rate is worth up to {worth:.1f} points (the best against the worst tried near it, on lora's tuning runs; by the"
    assert content["sentence"].startswith(
        f"Not compared, as there is no pair of runs: alora, random. {told} chance of these rows equal rates lie up to "
    )


def test_what_a_rate_seems_worth_by_chance() -> None:
    chance = np.random.default_rng(0)
    runs = [run("lora", 1e-3 * 1.8**step, 1000, {"tuning": chance.random(60) < 0.8}) for step in range(-2, 3)]
    best = max(runs, key=lambda one: one["metrics"]["tuning"]["accuracy"])
    content = report(runs, [arm("lora", best["learning_rate"])])
    (lora,) = content["arms"]
    assert 3 < lora["rate_is_worth"] < lora["equal_rates_differ_by"]
    assert content["sentence"].startswith(
        f"What the rate is worth cannot be told from chance: {lora['rate_is_worth']:.1f} points ("
    )
    told = [run("dora", rate, 1000, {"tuning": np.full(60, value)}) for rate, value in ((1e-3, 0.8), (1.8e-3, 0.78))]
    content = report([*runs, *told], [arm("lora", best["learning_rate"]), arm("dora")])
    assert ". The rate is worth up to 2.0 points (the best against the worst tried near it, on dora's" in content["sentence"]
    worst = min(runs, key=lambda one: one["metrics"]["tuning"]["accuracy"])
    assert report(runs, [arm("lora", worst["learning_rate"])])["arms"][0]["rate_is_worth"] == 0


def test_what_no_number_says_is_not_said() -> None:
    gone = [run("alora", 1e-3, seed, {}, diverged=True) for seed in range(5)]
    content = report([*finals("lora", 0.7), *gone, *finals("dora", 0.69)], [arm("lora"), arm("alora"), arm("dora")])
    assert content["sentence"].startswith("No method is better than lora beyond chance on test (best: dora ")
    assert "Not compared, as there is no pair of runs: alora. 5 of alora's 5 seeds diverged" in content["sentence"]
    assert content["notes"][-1].startswith("no rate was searched for: each method ran at its recipe's own")
    content = report([*finals("lora", 0.7), *finals("alora", 0.9, [0, 1, 2]), *gone[3:]], [arm("lora"), arm("alora")])
    assert content["sentence"].startswith("No method is better than lora beyond chance on test. 2 of alora's 5 seeds diverged: ")
    assert content["differences"][0]["p_holm"] < 0.05
    assert content["chosen_on_dev"] != "alora"
    half = [run("lora", 1e-3, 4, {}, diverged=True)]  # the first wins nothing either
    content = report([*finals("lora", 0.9, [0, 1, 2, 3]), *half, *finals("alora", 0.7)], [arm("lora"), arm("alora")])
    assert content["differences"][0]["p_holm"] < 0.05
    assert "Worse" not in content["sentence"]
    content = report([*finals("lora", 0.7), *finals("alora", 0.7)], [arm("lora"), arm("alora")])
    assert (content["detectable"], "would be found" in content["sentence"]) == (None, False)


def test_an_interval_that_holm_takes_back() -> None:
    chance, names = np.random.default_rng(5), ["lora", "a", "b", "c"]
    of = {name: chance.random((5, ROWS)) < 0.7 + 0.07 * (name == "a") for name in names}
    runs = [run(name, 1e-3, seed, {"test": of[name][seed]}) for name in names for seed in range(5)]
    content = report(runs, [arm(name) for name in names])
    top = content["differences"][0]
    assert top["p"] < 0.05 < top["p_holm"]
    assert content["sentence"].startswith("No method is better than lora beyond chance on test (best: a ")
    assert f", p {top['p_holm']:.2g})" in content["sentence"]


def test_what_is_in_no_pair() -> None:
    elsewhere = {**HERE, "multiplies_bfloat16": False, "processor": "b"}
    runs = [
        *finals("lora", 0.7),
        *finals("alora", 0.8, [0, 1, 2]),
        *finals("alora", 0.0, [3], machine=elsewhere),
        *finals("alora", 0.0, [4], diverged=True, metrics={}, rows={}),
        *finals("alora", 0.0, [0, 1], learning_rate=2e-3),  # of a rate that was chosen before the grid went on
    ]
    content = report(runs, [arm("lora"), arm("alora")])
    (found,) = content["differences"]
    assert (found["seeds"], found["over"]) == (3, "seeds and rows")
    assert found["mean"] > 5
    assert content["notes"] == [
        "1 of alora's 4 seeds far below the others (2.0; these 79.0 to 80.5): all count; a lower rate may help",
        "no rate was searched for: each method ran at its recipe's own, which may suit one better than another",
        "alora: 1 seeds ran on another kind of machine than lora's and are in no pair",
    ]
    assert [one["processor"] for one in content["machines"]] == ["a", "b"]


def test_seeds_that_not_all_arms_have_choose_none() -> None:
    runs = [
        run(name, 1e-3, seed, {"dev": of})
        for name, dev in {"lora": [0.6, 0.3], "dora": [0.5]}.items()
        for seed, of in enumerate(dev)
    ]
    content = report(runs, [arm("lora"), arm("dora")])
    assert content["chosen_on_dev"] == "lora"  # whose mean is less than dora's
    assert "arms have different seeds: what one would take by dev is by the 1 that all have" in content["notes"]
    assert "different seeds" not in " ".join(report(runs, [arm("lora"), arm("dora")], missing=1)["notes"])  # dora's is to come


def test_what_an_arm_was_set_to_is_told() -> None:
    content = report(finals("lora", 0.7), [{**arm("lora"), "told": ("has peft.r 2 and not 16, to store as much as dora",)}])
    assert content["notes"][0] == "lora has peft.r 2 and not 16, to store as much as dora"
    assert content["sentence"] == "One arm alone: there is nothing to compare it with."


def test_where_every_rate_diverged_it_is_told() -> None:
    runs = [run("lora", rate, 1000, {}, diverged=True) for rate in (1.0, 2.0)]
    assert report(runs, [arm("lora", 1.0)])["notes"] == [
        "lora diverged at every rate tried, down to 1: give a lower training.learning_rate"
    ]


def test_a_seed_far_below_the_others_is_told_of() -> None:
    def told(**values: Sequence[float]) -> list[str]:
        runs = [run(name, 1e-3, seed, {"test": one / 100}) for name, of in values.items() for seed, one in enumerate(of)]
        return [one for one in report(runs, [arm(name) for name in values])["notes"] if "far below" in one]

    assert told(lora=[89.1, 90.8, 89.9, 90.0, 90.1], alora=[90.6, 24.8, 89.8, 90.1, 90.3]) == [
        "1 of alora's 5 seeds far below the others (24.8; these 89.8 to 90.6): all count; a lower rate may help"
    ]
    assert told(lora=[22.7, 88.0, 25.1, 86.0, 84.0])[0].startswith(
        "2 of lora's 5 seeds far below the others (22.7, 25.1; these 84.0 "
    )
    assert not told(lora=[61.0, 52.0, 38.0, 45.0, 49.0], alora=[90.0, 81.0, 90.1, 90.2, 90.0])  # far apart, or not far below
    assert not told(lora=[90.0, 20.0])  # which of the two?


def test_a_metric_of_all_rows_together() -> None:
    without = [run(name, 1e-3, seed, {"test": 0.5 + 0.01 * seed * (name == "b")}) for name in ("a", "b") for seed in range(3)]
    content = report(without, [arm("a"), arm("b")])
    assert content["differences"][0]["over"] == "seeds"
    assert content["notes"][1:] == [
        "rows have no numbers of their own here: intervals are over seeds alone, and other rows may say otherwise"
    ]
    runs = [
        one | {"metrics": {"test": {"accuracy": 0.5}}} for name in ("a", "b") for one in finals(name, 0.3 + 0.1 * (name == "b"))
    ]
    content = report(runs, [arm("a"), arm("b")])
    assert content["differences"][0]["over"] == "seeds and rows"
    assert content["notes"][1:] == [
        "differences are of the mean of each row's own accuracy, which is not the accuracy of all rows together"
    ]


def test_what_will_be_found() -> None:
    arms = [arm("lora"), arm("alora")]
    before = outlook([], arms, 500, 5)
    assert before is not None
    assert before.startswith("with 500 rows and 5 seeds a difference of ")
    assert "if seeds differ by 1 point and two runs on 10% of the rows; 2 points need " in before
    chance = np.random.default_rng(0)
    tuning = [
        run(name, 1e-3, seed, {"tuning": chance.random(ROWS) < 0.7}) for name in ("lora", "alora") for seed in range(1000, 1003)
    ]
    after = outlook(tuning, arms, 500, 5)
    assert after is not None
    assert "as far as the tuning runs differ" in after
    same = [run(name, 1e-3, seed, {"tuning": np.ones(ROWS)}) for name in ("lora", "alora") for seed in range(1000, 1003)]
    assert outlook(same, arms, 500, 5) == before  # and not 0.0 points
    assert outlook([], arms, 500, 1) is None
    apart = {"lora": (0.9, 0.1, 0.5), "alora": (0.1, 0.9, 0.2)}
    runs = [run(name, 1e-3, 1000 + i, {"tuning": answers(one, i)}) for name, of in apart.items() for i, one in enumerate(of)]
    with_two = outlook(runs, arms, 500, 2)
    assert with_two is not None
    assert with_two.startswith("with 500 rows and 2 seeds no difference would be found four times in five, as far as")
    assert outlook([], arms, 500, 5, lower_is_better=True) is None


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    names = ["lora", "dora", "alora", "pi-lora", "random", "lora+", "rslora", "$x_{"]
    grid = {1e-3 * 1.8**step: 0.8 - 0.1 * abs(step) for step in range(-2, 3)}
    runs = [one for name in names for one in [*finals(name, 0.7, range(2)), *tuned(name, grid)]]
    content = report(runs, [arm(name) for name in names])
    with (console := Console(width=80)).capture() as shown:
        console.print(table(content))
    lines = [line.split() for line in shown.get().splitlines() if line.strip(" ─")]
    assert lines[0] == ["rate", "dev", "±sd", "test", "±sd", "from", "lora"]
    assert lines[9] == ["parameters", "seconds", "memory", "forgotten"]
    assert [line[0] for line in lines[1:9]] == [line[0] for line in lines[10:]] == names
    lora = content["arms"][0]
    assert lines[1] == [
        "lora",
        "0.001",
        *(word for part in ("dev", "test") for word in (f"{lora['mean'][part]:.1f}", f"±{lora['sd'][part]:.1f}")),
    ]
    assert lines[10] == ["lora", "1,000", "10", "1.0", "GB", "0.250"]
    svg = draw(content, tmp_path / "compare.svg")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert draw(report([], [arm("lora", None)]), tmp_path / "compare.png").stat().st_size > 0


def test_a_plan_has_no_empty_table() -> None:
    with (console := Console(width=80)).capture() as shown:
        console.print(table(report([], [arm("lora", None), arm("alora", None)], missing=20)))
    lines = [line.split() for line in shown.get().splitlines() if line.strip(" ─")]
    assert lines == [["parameters"], ["lora", "1,000"], ["alora", "1,000"]]
