"""Qualities by row, and the paired bootstrap."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_run import write_adapter, write_base, write_rows

from gatewise.adapters.loading import Loaded, load_with_data
from gatewise.compress.quality import difference, differences, qualities
from gatewise.compress.rows import check_enough, split
from gatewise.errors import GatewiseError
from gatewise.tasks import Records, evaluate


@pytest.fixture(scope="module", params=["llama", "bert"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_rows(folder / "rows.jsonl", 30)
    adapter = write_adapter(folder / "adapter", write_base(folder / "base", request.param))
    return load_with_data(adapter, str(rows))


def test_means_over_rows_are_what_evaluate_says(loaded: Loaded) -> None:
    wanted = evaluate(loaded.model, loaded.tokenizer, loaded.records, loaded.template)
    right = qualities(loaded, loaded.records, "right")
    assert set(right.tolist()) <= {0.0, 1.0}
    assert float(right.mean()) == pytest.approx(wanted["accuracy"])
    loss = qualities(loaded, loaded.records, "loss")
    assert len(loss) == 30
    if loaded.template is None:  # one label a row, as evaluate counts them
        assert -float(loss.mean()) == pytest.approx(wanted["loss"], rel=1e-4)


def test_answers_may_be_as_long_as_in_the_adapters_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    given, said = [], list[str]()

    def evaluated(*_: Any, max_new_tokens: int | None, answers: list[dict[str, Any]], **__: Any) -> None:
        given.append(max_new_tokens)
        answers += [{"right": 1}, {"right": 0, "cut": True}]

    monkeypatch.setattr("gatewise.compress.quality.evaluate", evaluated)
    qualities(replace(loaded, note={"max_new_tokens": 7}), loaded.records, "right", say=said.append)
    assert given == [7]
    assert said[0].startswith("1 of 2 answers had not ended when they were cut; data.max_new_tokens of the adapter's run")


def test_losses_lie_with_their_rows(loaded: Loaded) -> None:
    together = qualities(loaded, loaded.records, "loss")
    for at in (0, 7, 29):
        alone = Records(loaded.records.kind, [loaded.records.rows[at]], loaded.records.labels, "one")
        found = qualities(loaded, alone, "loss")
        assert float(found[0]) == pytest.approx(float(together[at]), rel=1e-4)


def test_equal_answers_are_bounded_by_the_rule_of_three() -> None:
    for n in (50, 300, 2000):
        gap = difference(torch.ones(n), torch.ones(n))
        assert gap.mean == 0
        assert gap.high == pytest.approx(3 / n, rel=0.05)
    assert difference(torch.ones(300), torch.ones(300)).within(0.01)
    assert not difference(torch.ones(200), torch.ones(200)).within(0.01)


def test_the_bound_holds_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows drawn from a known law: the true difference is above the bound in about one of twenty draws, and not in more."""
    monkeypatch.setattr("gatewise.compress.quality._DRAWS", 2000)
    generator = torch.Generator().manual_seed(0)
    worse, missed, trials = 0.03, 0, 300
    for trial in range(trials):
        whole = (torch.rand(400, generator=generator) < 0.9).double()
        flips = torch.rand(400, generator=generator)
        smaller = torch.where(flips < 0.06 + worse, torch.zeros(()), torch.where(flips > 0.97, torch.ones(()), whole)).double()
        truth = (0.06 + worse) * 0.9 - 0.03 * 0.1
        missed += difference(whole, smaller, seed=trial).high < truth
    assert missed / trials < 0.08


def plain_bound(gaps: torch.Tensor, draws: int, generator: torch.Generator) -> float:
    """The 95% percentile of bootstrap means, from the definition."""
    means = sorted(float(gaps[torch.randint(len(gaps), (len(gaps),), generator=generator)].mean()) for _ in range(draws))
    return means[math.ceil(0.95 * draws) - 1]


def test_one_candidate_has_the_bound_of_the_percentile_bootstrap() -> None:
    generator = torch.Generator().manual_seed(2)
    gaps = torch.randn(200, generator=generator).double() * 0.3
    wanted = plain_bound(torch.cat([gaps, gaps.max()[None]]), 4000, generator)
    assert difference(torch.zeros(200), -gaps, "loss").high == pytest.approx(wanted, abs=0.003)


def test_candidates_that_fail_alike_cost_no_more_than_one_and_others_do() -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.zeros(300).double()
    own = [torch.randn(300, generator=generator).double() * 0.2 for _ in range(8)]
    alone = differences(whole, own[:1], "loss")[0]
    assert differences(whole, own[:1] * 8, "loss")[3] == alone
    apart = differences(whole, own, "loss")
    assert apart[0].mean == alone.mean
    # Of eight that have nothing to do with one another each may fail as seldom as 1 - 0.95 ** (1 / 8): at 2.49 errors, not 1.645.
    error = float(own[0].std() / math.sqrt(300))
    assert alone.high - alone.mean == pytest.approx(1.645 * error, abs=0.25 * error)
    assert apart[0].high - apart[0].mean == pytest.approx(2.49 * error, abs=0.35 * error)
    # In the order they were given.
    assert [one.mean for one in apart] == [pytest.approx(-float(one.mean())) for one in own]


def test_candidates_all_just_beyond_the_tolerance_are_seldom_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fitted anew, so that half of what is by chance is its own: the worst case of picking the best of several."""
    monkeypatch.setattr("gatewise.compress.quality._DRAWS", 600)
    generator = torch.Generator().manual_seed(4)
    whole, alone, together, trials = torch.zeros(400).double(), 0, 0, 100
    for trial in range(trials):
        common = torch.randn(400, generator=generator).double()
        tried = [
            -(0.02 + 0.2 * (common + torch.randn(400, generator=generator).double()) / math.sqrt(2)) for _ in range(10)
        ]  # fmt: skip
        alone += any(difference(whole, one, "loss", trial).within(0.02) for one in tried)
        together += any(one.within(0.02) for one in differences(whole, tried, "loss", trial))
    assert together / trials < 0.08 < alone / trials


def test_rare_large_losses_are_counted_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in fifty is worse by a nat: the rows at hand have too few of them as often as too many."""
    monkeypatch.setattr("gatewise.compress.quality._DRAWS", 1000)
    generator = torch.Generator().manual_seed(5)
    missed, trials = 0, 300
    for trial in range(trials):
        gaps = (torch.rand(150, generator=generator) < 0.02).double() + 0.02 * torch.randn(150, generator=generator).double()
        missed += difference(torch.zeros(150), -gaps, "loss", trial).high < 0.02
    assert missed / trials < 0.08


def test_losses_that_do_not_differ_are_the_same() -> None:
    assert difference(torch.randn(160).double(), torch.zeros(160).double(), "loss").high > 0
    same = torch.randn(160).double()
    assert difference(same, same, "loss").high == 0


@pytest.mark.parametrize(("measure", "least"), [("loss", 150), ("right", 20)])
def test_too_few_rows_have_no_bound(measure: Any, least: int) -> None:
    whole, smaller = torch.ones(least).double(), torch.zeros(least).double()
    enough, few = difference(whole, smaller, measure), difference(whole[1:], smaller[1:], measure)
    assert enough.mean == few.mean == 1
    assert enough.high == 1
    assert math.isnan(few.high)
    assert not few.within(1e9)
    assert str(few) == "worse by 1.0000, too few rows to say at most how much"
    assert str(difference(smaller, whole, measure)).startswith("better by 1.0000, worse at most by ")


@pytest.mark.parametrize(
    ("rows", "measure", "tolerance", "needed"),
    [
        (100, "right", 0.01, r"300: give more rows, a larger tolerance \(--tolerance\) or ask for a size"),
        (100, "loss", 0.01, "150: give more rows, or ask for a size"),
        (19, "right", 0.5, "20: give more rows, or ask for a size"),
    ],
)
def test_too_few_rows_are_refused_with_what_would_do(rows: int, measure: Any, tolerance: float, needed: str) -> None:
    few = Records("label", [{"text": "a", "label": "x"}] * rows, ["x", "y"], "dev.jsonl")
    with pytest.raises(GatewiseError, match=f"dev.jsonl has {rows} rows .* cannot be shown with fewer than {needed}"):
        check_enough(few, measure, tolerance)
    check_enough(replace(few, rows=few.rows * 3), measure, tolerance)


def test_rows_are_split_apart() -> None:
    records = Records("label", [{"text": str(i), "label": "x"} for i in range(40)], ["x"], "rows")
    for count, drawn in ((6, 6), (30, 10)):
        one, rest = split(records, count)
        assert (len(one), len(rest)) == (drawn, 40 - drawn)
        assert sorted(int(row["text"]) for row in (*one.rows, *rest.rows)) == list(range(40))
