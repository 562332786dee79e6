"""What came out of a comparison: from its finished runs to ``compare.json``, a table, a picture and a plain sentence.

A learning rate is chosen on the tuning rows, by seeds that are used for nothing else. Dev then says which arm one would take, and
test what that is worth: differences from the first arm are on test, or on dev where there is no test. They are made of pairs, runs
of both arms with the same seed on the same kind of machine.

Numbers are in percent points, and those of losses and the like, of which less is better, in their own unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from gatewise.comparing.arms import another_size
from gatewise.comparing.statistics import ASSUMED, Array, by_chance_of_rows, detectable, difference, holm, needed, spread
from gatewise.inspection.plotting import figure_for, labelled_axes

Run = Mapping[str, Any]
Content = dict[str, Any]
WIN = 0.05
"""A difference whose p, by Holm over all arms, is below this is beyond chance."""
NEAR = 3.5
"""What the rate is worth is said of rates within this factor of the best: two steps of the grid on either side."""
FEW = 500
"""Of fewer rows to train on, runs on other draws (and seeds) may differ by more than methods do: docs/reports/spt.md."""
LOST = 20
"""A seed that is more points than this below the better half of its arm's seeds, and more than five times as far as these lie
apart, is told of. Where more than half of the seeds are lost, none is."""


def report(
    runs: Sequence[Run],
    arms: Sequence[Mapping[str, Any]],
    *,
    lower_is_better: bool = False,
    missing: int = 0,
    trained: int | None = None,
) -> Content:
    """What ``compare.json`` holds.

    Args:
        runs: what finished runs came to, as their files have it.
        arms: ``name``, ``parameters`` (planned; the report has what final adapters store), ``heads`` (how many of them are of
            heads, in which arms do not differ), ``learning_rate`` (the one that was chosen, or None while it is searched for),
            ``recipe_rate`` and ``told`` of each; see :class:`~gatewise.comparing.arms.Arm`. The others are compared with the first.
        lower_is_better: than the metric.
        missing: runs that are not finished.
        trained: rows that all runs train on.
    """
    runs, metric, unit = _in_unit(runs, lower_is_better)
    final = {arm["name"]: _at_rate(runs, arm, "seed") for arm in arms}
    every = [run for of in final.values() for run in of]
    part = next((name for name in ("test", "dev") if any(name in run["value"] for run in every)), None)
    first, *others = final
    tried = {name: _pairs(final[first], final[name], part) for name in others}
    pairs = {name: one.d for name, one in tried.items() if len(one.d)}
    found = {name: difference(d) for name, d in pairs.items()}
    known, shapes = spread([*pairs.values()]), [d.shape for d in pairs.values()]
    told = [_arm(arm, runs, final[arm["name"]], lower_is_better, len(arms)) for arm in arms]
    whole = [arm for arm in told if "dev" in arm["mean"] and not arm["diverged"]]
    dev = {arm["name"]: {one["seed"]: one["dev"] for one in arm["seeds"] if one["dev"] is not None} for arm in whole}
    common = set.intersection(*map(set, dev.values())) if dev else set()
    means = {name: fmean(of[seed] for seed in common) for name, of in dev.items()} if common else {}
    content: Content = {
        "metric": metric,
        "unit": unit,
        "lower_is_better": lower_is_better,
        "part": part,
        "sentence": "",
        "arms": told,
        "differences": [
            {"arm": name, **asdict(one), "p_holm": p, "part": part, "seeds": len(pairs[name])}
            for (name, one), p in zip(found.items(), holm([one.p for one in found.values()]), strict=True)
        ],
        "detectable": known and detectable(min(n for _, n in shapes), min(n for n, _ in shapes), known, len(pairs)),
        "chosen_on_dev": (min if lower_is_better else max)(means, key=means.__getitem__, default=None),
        "missing": missing,
        "machines": [*{str(run.get("machine")): run.get("machine") for run in every}.values()],
        "notes": _settings(arms) + _notes(told, tried, metric, part if unit == "points" else None),
    }
    if any(len(of) > len(common) for of in dev.values()) and not missing:
        content["notes"].append(f"arms have different seeds: what one would take by dev is by the {len(common)} that all have")
    if trained is not None and trained < FEW:
        content["notes"].append(
            f"all runs train on the same {trained} rows, and other rows would teach otherwise, which is in no interval: "
            "compare on other draws, too"
        )
    content["sentence"] = " ".join(_sentences(content))
    return content


def outlook(
    runs: Sequence[Run], arms: Sequence[Mapping[str, Any]], rows: int, seeds: int, *, lower_is_better: bool = False
) -> str | None:
    """What differences will be found, in a sentence: by the tuning runs at the chosen rates, or by ``ASSUMED`` before them.

    Args:
        runs, arms, lower_is_better: as for ``report``.
        rows: those that tell, of test or dev. seeds: final ones.
    """
    runs, _, unit = _in_unit(runs, lower_is_better)
    first, *others = (_at_rate(runs, arm, "rate") for arm in arms)
    known = spread([_pairs(first, one, "tuning").d for one in others])
    smallest = detectable(rows, seeds, known or ASSUMED, len(others)) if others else None
    if smallest is None or (known is None and unit != "points"):
        return None
    found = f"a difference of {_size(smallest, unit)} is found four times in five"
    if _is_beyond(smallest, unit):
        found = "no difference would be found four times in five"
    basis = "as far as the tuning runs differ" if known else "if seeds differ by 1 point and two runs on 10% of the rows"
    line = f"with {rows:,} rows and {seeds} seeds {found}, {basis}"
    if unit == "points" and smallest > 2:
        more_seeds, more_rows = needed(2, rows, seeds, known or ASSUMED, len(others))
        line += f"; 2 points need {more_seeds or 'over 100'} seeds or {f'{more_rows:,}' if more_rows else 'over a million'} rows"
    return line


# Out of the runs ------------------------------------------------------------------------------------------------------------


def _in_unit(runs: Sequence[Run], lower_is_better: bool) -> tuple[list[Run], str | None, str | None]:
    """The runs with their numbers in the unit that is told: ``value`` and ``rows``, by part. And the metric and the unit."""
    metric = next((run["metric"] for run in runs), None)
    values = [of[metric] for run in runs for of in run.get("metrics", {}).values() if of.get(metric) is not None]
    is_share = not lower_is_better and all(0 <= value <= 1 for value in values)
    scale = 100 if is_share else 1

    def scaled(run: Run) -> Run:
        value = {part: scale * of[metric] for part, of in run.get("metrics", {}).items() if of.get(metric) is not None}
        rows = {part: scale * np.array(of, float) for part, of in run.get("rows", {}).items() if None not in of}
        return {**run, "value": value, "rows": rows}

    return [*map(scaled, runs)], metric, "points" if is_share else metric


def _at_rate(runs: Sequence[Run], arm: Mapping[str, Any], what: str) -> list[Run]:
    """The runs of an arm for a rate or a seed, at the rate that was chosen for it."""
    own = [run for run in runs if run["arm"] == arm["name"] and run["for"] == what]
    return sorted((run for run in own if _is(arm["learning_rate"], run["learning_rate"])), key=lambda run: run["seed"])


def _is(chosen: float | None, rate: float) -> bool:
    return chosen is not None and math.isclose(rate, chosen, rel_tol=1e-3)


def _kind(run: Run) -> Any:
    """What about a machine changes numbers."""
    machine = run.get("machine") or {}
    return machine.get("gpu") or machine.get("multiplies_bfloat16")


class _Pairs(NamedTuple):
    """How much more one arm has than another.

    Attributes:
        d: by seed and row, or (seeds, 1) where rows have no numbers of their own.
        left_out: seeds whose machines were of two kinds.
        is_mean: the metric is the mean over rows.
    """

    d: Array
    left_out: int
    is_mean: bool


def _pairs(a: Sequence[Run], b: Sequence[Run], part: str | None) -> _Pairs:
    seeds = {run["seed"]: run for run in b if part in run["value"]}
    both = [(run, seeds[run["seed"]]) for run in a if part in run["value"] and run["seed"] in seeds]
    same = [pair for pair in both if _kind(pair[0]) == _kind(pair[1])]
    means = np.array([[run["value"][part] for run in pair] for pair in same], float).reshape(-1, 2, 1)
    rows = [[run["rows"].get(part, ()) for run in pair] for pair in same]
    lengths = {len(one) for pair in rows for one in pair}
    numbers = np.array(rows, float) if len(lengths) == 1 and 0 not in lengths else means
    is_mean = np.allclose(numbers.mean(-1, keepdims=True), means, rtol=1e-3)
    return _Pairs(numbers[:, 1] - numbers[:, 0], len(both) - len(same), bool(is_mean))


def _arm(arm: Mapping[str, Any], runs: Sequence[Run], final: Sequence[Run], lower: bool, arms: int) -> Content:
    """What is told of one of so many arms."""
    by_part = {part: [run["value"][part] for run in final if part in run["value"]] for part in ("dev", "test")}
    tried = [run for run in runs if run["for"] == "rate" and run["arm"] == arm["name"]]
    tried.sort(key=lambda run: (run["learning_rate"], run["seed"]))
    rates = {rate: [*of] for rate, of in groupby(tried, lambda run: run["learning_rate"])}
    worth, chance = _worth(rates, arm["learning_rate"], lower, arms)
    costs = {
        name: [run[name] for run in final if run.get(name) is not None]
        for name in ("parameters", "seconds", "forgotten", "peak_memory")
    }
    means = {name: fmean(values) if values else None for name, values in costs.items()}
    return {
        "name": arm["name"],
        "learning_rate": arm["learning_rate"],
        "recipe_rate": arm["recipe_rate"],
        "parameters": round(means["parameters"] or arm["parameters"]),
        "heads": arm["heads"],
        "seeds": [{"seed": run["seed"], **{part: run["value"].get(part) for part in by_part}} for run in final],
        "mean": {part: fmean(values) for part, values in by_part.items() if values},
        "sd": {part: stdev(values) for part, values in by_part.items() if len(values) > 1},
        "diverged": sum(bool(run.get("diverged")) for run in final),
        "rates": [
            {"learning_rate": rate, "tuning": [run["value"].get("tuning") for run in of], "seeds": [run["seed"] for run in of]}
            for rate, of in rates.items()
        ],
        "rate_is_worth": worth,
        "equal_rates_differ_by": chance,
        "seconds": means["seconds"],
        "forgotten": means["forgotten"],
        "peak_memory": max(costs["peak_memory"], default=None),
    }


def _worth(rates: Mapping[float, Sequence[Run]], chosen: float | None, lower: bool, arms: int) -> tuple[float | None, float | None]:
    """How much better the chosen rate is on the tuning rows than the worst one tried within a factor of NEAR, by seeds of both.

    Of several rates that are equal the best looks better than the worst. The second number is how far they lie apart by the chance
    of the rows, in one search of all arms in twenty; None where rows have no numbers.
    """
    near = {rate: of for rate, of in rates.items() if chosen and 1 / NEAR <= rate / chosen <= NEAR}
    best: Sequence[Run] = next((of for rate, of in near.items() if _is(chosen, rate)), ())
    pairs = [_pairs(of, best, "tuning").d * (-1 if lower else 1) for of in near.values() if of is not best]
    searched = arms * len(near) * (len(near) - 1) // 2
    found = [(max(float(d.mean()), 0.0), by_chance_of_rows(d, searched)) for d in pairs if len(d)]
    return max(found, key=lambda one: one[0], default=(None, None))


def _lost(values: Sequence[float]) -> list[float]:
    """Of an arm's seeds those far below the others."""
    best = sorted(values, reverse=True)[: len(values) // 2 + 1]
    return sorted(value for value in values if best[-1] - value > max(LOST, 5 * (best[0] - best[-1])))


def _settings(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is told of the arms, but for the sizes that were planned: ``_notes`` has those of the final adapters."""
    first = arms[0]
    return [
        f"{arm['name']} {line}"
        for arm in arms
        for line in arm["told"]
        if line != another_size(arm["parameters"], first["parameters"], first["name"], arm["heads"])
    ]


def _notes(arms: Sequence[Content], pairs: Mapping[str, _Pairs], metric: str | None, part: str | None) -> list[str]:
    """``part``: the one that differences are on, if it is in points."""
    first, notes = arms[0], list[str]()
    for arm in arms:
        values = [one[part] for one in arm["seeds"] if part and one[part] is not None]
        if lost := _lost(values) if len(values) > 2 else ():
            others = sorted(value for value in values if value not in lost)
            named = ", ".join(f"{one:.1f}" for one in lost)
            notes.append(
                f"{len(lost)} of {arm['name']}'s {len(values)} seeds far below the others ({named}; these {others[0]:.1f} to "
                f"{others[-1]:.1f}): all count; a lower rate may help"
            )
    for arm in arms:
        if another := another_size(arm["parameters"], first["parameters"], first["name"], first["heads"]):
            notes.append(f"{arm['name']} {another}")
    if not any(arm["rates"] for arm in arms) and any(arm["seeds"] for arm in arms):
        notes.append("no rate was searched for: each method ran at its recipe's own, which may suit one better than another")
    for arm in arms:
        tried = [one["learning_rate"] for one in arm["rates"]]
        if arm["learning_rate"] is not None and tried and all(value is None for one in arm["rates"] for value in one["tuning"]):
            notes.append(
                f"{arm['name']} diverged at every rate tried, down to {min(tried):.3g}: give a lower training.learning_rate"
            )
        elif tried and any(_is(arm["learning_rate"], edge) for edge in (min(tried), max(tried))):
            notes.append(
                f"{arm['name']}'s rate, {arm['learning_rate']:.3g}, is at the edge of those tried: one beyond may be better"
            )
    notes += [
        f"{name}: {one.left_out} seeds ran on another kind of machine than {first['name']}'s and are in no pair"
        for name, one in pairs.items()
        if one.left_out
    ]
    if any(one.d.shape[1] == 1 for one in pairs.values() if len(one.d)):
        notes.append("rows have no numbers of their own here: intervals are over seeds alone, and other rows may say otherwise")
    if not all(one.is_mean for one in pairs.values()):
        notes.append(f"differences are of the mean of each row's own {metric}, which is not the {metric} of all rows together")
    return notes


# In words, as a table, as a picture -----------------------------------------------------------------------------------------


def _size(value: float, unit: str | None) -> str:
    return f"{value:.1f} points" if unit == "points" else f"{value:.3g}"


def _is_beyond(value: float, unit: str | None) -> bool:
    """Whether no two arms can lie so far apart."""
    return unit == "points" and value > 100


def _sentences(content: Content) -> list[str]:
    """The result in plain words."""
    first, unit, better = content["arms"][0]["name"], content["unit"], -1 if content["lower_is_better"] else 1
    digits = "+.1f" if unit == "points" else "+.3g"
    differences = sorted(content["differences"], key=lambda one: better * one["mean"], reverse=True)

    def tell(one: Content) -> str:
        how = one["why"] if one["low"] is None else f"{one['low']:{digits}} to {one['high']:{digits}}, p {one['p_holm']:.2g}"
        return f"{one['arm']} {one['mean']:{digits}}, {how}"

    beyond = [one for one in differences if one["p_holm"] is not None and one["p_holm"] < WIN]
    whole = {arm["name"] for arm in content["arms"] if not arm["diverged"]}  # where seeds diverged, the others are no fair sample
    wins = [one for one in beyond if better * one["mean"] > 0 and one["arm"] in whole]
    losses = [one for one in beyond if better * one["mean"] < 0 and first in whole]
    is_plan = content["missing"] and not any(arm["seeds"] for arm in content["arms"])
    if is_plan:
        said = [f"Nothing to compare yet: {content['missing']} runs are to come."]
    else:
        said = [f"{content['missing']} runs are missing."] if content["missing"] else []
    where = f"{first} beyond chance on {content['part']}"
    if wins:
        said.append(f"Better than {where}: {'; '.join(map(tell, wins))}.")
    elif differences:
        best = next((f" (best: {tell(one)})" for one in differences if one["arm"] in whole), "")
        said.append(f"No method is better than {where}{best}.")
    if losses:
        said.append(f"Worse: {'; '.join(map(tell, losses))}.")
    alone = {arm["name"] for arm in content["arms"][1:]} - {one["arm"] for one in differences}
    if alone and not is_plan:
        said.append(f"Not compared, as there is no pair of runs: {', '.join(sorted(alone))}.")
    said += [
        f"{arm['diverged']} of {arm['name']}'s {len(arm['seeds'])} seeds diverged: they are in no mean and no pair, and it wins "
        "nothing."
        for arm in content["arms"]
        if arm["diverged"]
    ]
    if content["detectable"] is not None and not wins and not losses:
        said.append(
            "With so few seeds no difference would be found four times in five."
            if _is_beyond(content["detectable"], unit)
            else f"A difference of {_size(content['detectable'], unit)} would be found four times in five."
        )
    if worth := [arm for arm in content["arms"] if arm["rate_is_worth"]]:
        arm = max(worth, key=lambda arm: (arm["rate_is_worth"] > (arm["equal_rates_differ_by"] or 0), arm["rate_is_worth"]))
        most, chance = arm["rate_is_worth"], arm["equal_rates_differ_by"]
        by = f"; by the chance of these rows equal rates lie up to {_size(chance, unit)} apart" if chance is not None else ""
        lead = "The rate is worth up to" if most > (chance or 0) else "What the rate is worth cannot be told from chance:"
        said.append(f"{lead} {_size(most, unit)} (the best against the worst tried near it, on {arm['name']}'s tuning runs{by}).")
    if content["chosen_on_dev"] and content["part"] == "test" and differences:
        said.append(f"By dev one would take {content['chosen_on_dev']}.")
    return said or ["One arm alone: there is nothing to compare it with."]


def table(content: Content) -> Group:
    """How good the arms are, once there are runs, and what they cost; a column that no arm has anything in is left out."""
    number, signed = ("{:.1f}", "{:+.1f}") if content["unit"] == "points" else ("{:.3f}", "{:+.3f}")
    found = {one["arm"]: one for one in content["differences"]}
    quality, costs = [], []
    for arm in content["arms"]:
        one, mean, sd = found.get(arm["name"], {}), arm["mean"], arm["sd"]
        quality.append(
            {
                "": arm["name"],
                "rate": _cell("{:.2g}", arm["learning_rate"]),
                "dev ±sd": _cell(number, mean.get("dev")) + _cell(f" ±{number}", sd.get("dev")),
                "test ±sd": _cell(number, mean.get("test")) + _cell(f" ±{number}", sd.get("test")),
                f"from {content['arms'][0]['name']}": _cell(signed, one.get("mean"))
                + _cell(f" ({number}", one.get("low"))
                + _cell(f" to {number})", one.get("high")),
                "p (Holm)": _cell("{:.2g}", one.get("p_holm")),
            }
        )
        costs.append(
            {
                "": arm["name"],
                "parameters": _cell("{:,}", arm["parameters"]),
                "seconds": _cell("{:.0f}", arm["seconds"]),
                "memory": _cell("{:.1f} GB", arm["peak_memory"] and arm["peak_memory"] / 1e9),
                "forgotten": _cell("{:.3f}", arm["forgotten"]),
            }
        )
    return Group(*(_table(rows) for rows in (quality, costs) if any(value for row in rows for name, value in row.items() if name)))


def _cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        shown.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for row in rows:
        shown.add_row(*(row[name] for name in names))
    return shown


# Okabe and Ito's colours, which every kind of colour vision tells apart, with grey for the yellow that white paper swallows.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8a8a")
_MARKS = "osD^vPX*"


def draw(content: Content, out: str | Path) -> Path:
    """Draws quality on the tuning rows by learning rate, a line an arm, into a PNG or SVG file: a point is a run, and the chosen
    rate has a ring."""
    from matplotlib.ticker import LogLocator

    unit = content["metric"] if content["unit"] != "points" else f"{content['metric']}, points"
    with figure_for(out, 7.2, 4.2, layout="constrained") as figure:
        axes = labelled_axes(figure, "Quality by learning rate", "on rows taken out of training", "learning rate", unit)
        axes.set_xscale("log", subs=())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        lines = []
        for at, arm in enumerate(content["arms"]):
            colour, mark = _COLOURS[at % len(_COLOURS)], _MARKS[at % len(_MARKS)]
            runs = [(one["learning_rate"], value) for one in arm["rates"] for value in one["tuning"] if value is not None]
            means = {rate: fmean(value for other, value in runs if other == rate) for rate, _ in runs}
            chosen = [rate for rate in means if _is(arm["learning_rate"], rate)]
            axes.plot(*np.reshape(runs, (-1, 2)).T, mark, color=colour, alpha=0.45, markersize=3.5)
            lines += axes.plot([*means], [*means.values()], mark + "-", color=colour, markersize=4.5)
            axes.plot(chosen, [means[rate] for rate in chosen], "o", markersize=12, fillstyle="none", color=colour)
        # Handed over: labels that begin with "_" would be left out.
        figure.legend(lines, [arm["name"] for arm in content["arms"]], loc="outside right center", frameon=False, fontsize=8)
    return Path(out)
