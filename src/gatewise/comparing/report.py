"""What came out of a comparison: from its finished runs to ``compare.json``, a table, a picture and a plain sentence.

A learning rate is chosen on the tuning rows, by seeds that are used for nothing else. Dev then says which arm one would take, and
test what that is worth: differences from the first arm are on test, or on dev where there is no test. They are made of pairs, runs
of both arms with the same seed on the same kind of machine.

Numbers are in percent points, and those of losses and the like, of which less is better, in their own unit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table

from gatewise.comparing.statistics import ASSUMED, Array, by_chance_of_rows, detectable, difference, holm, needed, spread
from gatewise.inspection.plotting import figure_for, labelled_axes

Run = Mapping[str, Any]
Content = dict[str, Any]
WIN = 0.05
"""A difference whose p, by Holm over all arms, is below this is beyond chance."""
NEAR = 3.5
"""What the rate is worth is said of rates within this factor of the best: two steps of the grid on either side."""
ROOM = 0.01
"""Arms whose parameters differ by more than this share are told of."""
TOO_FEW = 50.0
"""Rows and seeds that find nothing below so many points tell methods not apart."""


def report(runs: Sequence[Run], arms: Sequence[Mapping[str, Any]], *, lower_is_better: bool = False, missing: int = 0) -> Content:
    """What ``compare.json`` holds.

    Args:
        runs: what finished runs came to, as their files have it.
        arms: ``name``, ``parameters`` (as planned; told is what the final adapters store), ``learning_rate`` (the one that was
            chosen, or None while it is searched for) and ``recipe_rate`` of each. The others are compared with the first.
        lower_is_better: than the metric.
        missing: runs that are not finished.
    """
    metric = next((run["metric"] for run in runs), None)
    scale = _scale(runs, metric, lower_is_better)
    final = {arm["name"]: _final(runs, arm) for arm in arms}
    part = next(
        (name for name in ("test", "dev") if any(name in run.get("metrics", {}) for of in final.values() for run in of)), None
    )
    told = [_arm(arm, runs, final[arm["name"]], metric, scale, lower_is_better, len(arms)) for arm in arms]
    notes = _notes(told, final, missing)
    pairs = {arm["name"]: _pairs(final[arms[0]["name"]], final[arm["name"]], part, metric, scale) for arm in arms[1:]}
    for name, one in pairs.items():
        if one.left_out:
            notes.append(f"{name}: {one.left_out} seeds ran on another kind of machine than {arms[0]['name']}'s and are in no pair")
    pairs = {name: one for name, one in pairs.items() if len(one.a)}
    if any(one.a.shape[1] == 1 for one in pairs.values()):
        notes.append("rows have no numbers of their own here: intervals are over seeds alone, and other rows may say otherwise")
    if not all(one.is_mean for one in pairs.values()):
        notes.append(f"differences are of the mean of each row's own {metric}, which is not the {metric} of all rows together")
    found = {name: difference(one.a, one.b) for name, one in pairs.items()}
    adjusted = holm([one.p for one in found.values()])
    differences = [
        {"arm": name, **asdict(of), "p_holm": p, "part": part, "seeds": len(pairs[name].a)}
        for (name, of), p in zip(found.items(), adjusted, strict=True)
    ]
    content: Content = {
        "metric": metric,
        "unit": "points" if scale == 100 else metric,
        "lower_is_better": lower_is_better,
        "part": part,
        "sentence": "",
        "arms": told,
        "differences": differences,
        "detectable": _detectable([*pairs.values()]),
        "chosen_on_dev": _chosen(told, lower_is_better),
        "missing": missing,
        "machines": [*{str(run.get("machine")): run.get("machine") for of in final.values() for run in of}.values()],
        "notes": notes,
    }
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
    metric = next((run["metric"] for run in runs), None)
    scale = _scale(runs, metric, lower_is_better)
    tuned = [_at_rate([run for run in runs if run["for"] == "rate" and run["arm"] == arm["name"]], arm) for arm in arms]
    pairs = [_pairs(tuned[0], one, "tuning", metric, scale) for one in tuned[1:]]
    known = spread([(one.a, one.b) for one in pairs])
    if (known is None and (lower_is_better or scale != 100)) or len(arms) < 2:
        return None
    basis = "as far as the tuning runs differ" if known else "if seeds differ by 1 point and two runs on 10% of the rows"
    known, others = known or ASSUMED, len(arms) - 1
    smallest = detectable(rows, seeds, known, others)
    if smallest is None:
        return "one seed cannot say what is chance: give --seeds 3 or more"
    given = f"with {rows:,} rows and {seeds} seeds"
    line = f"{given} a difference of {_size(smallest, scale)} is found four times in five, {basis}"
    if scale == 100 and smallest > TOO_FEW:
        line = f"{given} no difference below {TOO_FEW:.0f} points is found, {basis}: they are too few to tell methods apart"
    if scale != 100 or smallest <= 2:
        return line
    more_seeds, more_rows = needed(2, rows, seeds, known, others)
    ways = [f"{more_seeds} seeds" if more_seeds else "", f"{more_rows:,} rows" if more_rows else ""]
    return f"{line}; 2 points need {' or '.join(filter(None, ways)) or 'more of both rows and seeds'}"


# Out of the runs ------------------------------------------------------------------------------------------------------------


def _scale(runs: Sequence[Run], metric: str | None, lower_is_better: bool) -> float:
    """100 for shares, which are told in percent points."""
    values = [of[metric] for run in runs for of in run.get("metrics", {}).values() if of.get(metric) is not None]
    return 1.0 if lower_is_better or any(not 0 <= value <= 1 for value in values) else 100.0


def _at_rate(runs: Sequence[Run], arm: Mapping[str, Any]) -> list[Run]:
    rate = arm["learning_rate"]
    return sorted(
        (run for run in runs if rate and math.isclose(run["learning_rate"], rate, rel_tol=1e-3)), key=lambda run: run["seed"]
    )


def _final(runs: Sequence[Run], arm: Mapping[str, Any]) -> list[Run]:
    return _at_rate([run for run in runs if run["for"] == "seed" and run["arm"] == arm["name"]], arm)


def _value(run: Run, part: str | None, metric: str | None, scale: float) -> float | None:
    value = run.get("metrics", {}).get(part, {}).get(metric)
    return None if value is None else scale * value


def _kind(run: Run) -> tuple[Any, ...]:
    """What about a machine changes numbers."""
    machine = run.get("machine") or {}
    return (machine["gpu"],) if machine.get("gpu") else (machine.get("multiplies_bfloat16"),)


class _Pairs(NamedTuple):
    """Two arms' numbers of the same seeds, (seeds, rows) each, or (seeds, 1) where rows have none of their own.

    Attributes:
        left_out: seeds whose machines were of two kinds.
        is_mean: the metric is the mean over rows.
    """

    a: Array
    b: Array
    left_out: int
    is_mean: bool = True


def _pairs(a: Sequence[Run], b: Sequence[Run], part: str | None, metric: str | None, scale: float) -> _Pairs:
    both = [(one, other) for one in a for other in b if one["seed"] == other["seed"]]
    both = [pair for pair in both if all(_value(run, part, metric, scale) is not None for run in pair)]
    same = [pair for pair in both if _kind(pair[0]) == _kind(pair[1])]
    left_out = len(both) - len(same)
    means = np.array([[_value(run, part, metric, scale) for run in pair] for pair in same], float).reshape(-1, 2, 1)
    rows = [[run.get("rows", {}).get(part) or () for run in pair] for pair in same]
    lengths = {len(one) for pair in rows for one in pair}
    if len(lengths) != 1 or lengths == {0} or any(None in one for pair in rows for one in pair):
        return _Pairs(means[:, 0], means[:, 1], left_out)
    of_rows = scale * np.array(rows, float)
    is_mean = np.allclose(of_rows.mean(-1, keepdims=True), means, atol=1e-3 * scale)
    return _Pairs(of_rows[:, 0], of_rows[:, 1], left_out, bool(is_mean))


def _arm(
    arm: Mapping[str, Any],
    runs: Sequence[Run],
    final: Sequence[Run],
    metric: str | None,
    scale: float,
    lower: bool,
    arms: int,
) -> Content:
    """What is told of one of so many arms."""
    seeds = [{"seed": run["seed"], **{part: _value(run, part, metric, scale) for part in ("dev", "test")}} for run in final]
    by_part = {part: [value for one in seeds if (value := one[part]) is not None] for part in ("dev", "test")}
    tried = [run for run in runs if run["for"] == "rate" and run["arm"] == arm["name"]]
    rates: dict[float, dict[int, Run]] = {}
    for run in sorted(tried, key=lambda run: (run["learning_rate"], run["seed"])):
        rates.setdefault(run["learning_rate"], {})[run["seed"]] = run
    worth, chance = _worth(rates, arm["learning_rate"], metric, scale, lower, arms)
    return {
        "name": arm["name"],
        "learning_rate": arm["learning_rate"],
        "recipe_rate": arm.get("recipe_rate"),
        "parameters": round(stored) if (stored := _mean([run.get("parameters") for run in final])) else arm["parameters"],
        "seeds": seeds,
        "mean": {part: fmean(values) for part, values in by_part.items() if values},
        "sd": {part: stdev(values) for part, values in by_part.items() if len(values) > 1},
        "diverged": sum(bool(run.get("diverged")) for run in final),
        "rates": [
            {"learning_rate": rate, "tuning": [_value(run, "tuning", metric, scale) for run in of.values()], "seeds": [*of]}
            for rate, of in rates.items()
        ],
        "rate_is_worth": worth,
        "equal_rates_differ_by": chance,
        **{name: _mean([run.get(name) for run in final]) for name in ("seconds", "forgotten")},
        "peak_memory": max((run["peak_memory"] for run in final if run.get("peak_memory")), default=None),
    }


def _worth(
    rates: Mapping[float, Mapping[int, Run]], chosen: float | None, metric: str | None, scale: float, lower: bool, arms: int
) -> tuple[float | None, float | None]:
    """How much better the chosen rate is on the tuning rows than the worst one tried within a factor of NEAR, by seeds of both.

    Of several rates that are equal the best looks better than the worst. The second number is how far they lie apart by the chance
    of the rows, in one search of all arms in twenty; None where rows have no numbers.
    """
    near = {rate: [*of.values()] for rate, of in rates.items() if chosen and 1 / NEAR <= rate / chosen <= NEAR}
    best = next((rate for rate in near if chosen and math.isclose(rate, chosen, rel_tol=1e-3)), None)
    searched, found = arms * len(near) * (len(near) - 1) // 2, []
    for rate, of in near.items():
        if best is not None and rate != best and len((pairs := _pairs(of, near[best], "tuning", metric, scale)).a):
            d = (pairs.b - pairs.a) * (-1 if lower else 1)
            found.append((max(float(d.mean()), 0.0), by_chance_of_rows(d, searched)))
    return max(found, key=lambda one: one[0], default=(None, None))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _notes(arms: Sequence[Mapping[str, Any]], final: Mapping[str, Sequence[Run]], missing: int) -> list[str]:
    first, notes = arms[0], []
    for arm in arms[1:]:
        more = arm["parameters"] / first["parameters"] - 1 if first["parameters"] else 0
        if abs(more) > ROOM:
            notes.append(
                f"{arm['name']} stores {arm['parameters']:,} parameters, {abs(more):.1%} {'more' if more > 0 else 'fewer'} than "
                f"{first['name']}'s {first['parameters']:,}"
            )
    for name, runs in final.items():
        if diverged := [run["seed"] for run in runs if run.get("diverged")]:
            notes.append(f"{name} diverged with {len(diverged)} of {len(runs)} seeds, which are in no mean and in no pair")
    if not any(arm["rates"] for arm in arms) and any(final.values()):
        notes.append("no rate was searched for: each method ran at its recipe's own, which may suit one better than another")
    for arm in arms:
        tried = [one["learning_rate"] for one in arm["rates"]]
        for end, edge in (("lowest", min(tried, default=None)), ("highest", max(tried, default=None))):
            if arm["learning_rate"] and edge and math.isclose(arm["learning_rate"], edge, rel_tol=1e-3):
                notes.append(f"{arm['name']}'s rate, {edge:.3g}, is the {end} that was tried: one beyond it may be better")
    if missing:
        notes.append(f"{missing} runs are missing")
    return notes


def _detectable(pairs: Sequence[_Pairs]) -> float | None:
    """The difference that these rows and seeds find four times in five, by how far they differ."""
    known, shapes = spread([(one.a, one.b) for one in pairs]), [one.a.shape for one in pairs if min(one.a.shape) > 1]
    if known is None:
        return None
    return detectable(min(rows for _, rows in shapes), min(seeds for seeds, _ in shapes), known, len(pairs))


def _chosen(arms: Sequence[Content], lower: bool) -> str | None:
    """The arm with the best mean on dev."""
    means = {arm["name"]: arm["mean"]["dev"] for arm in arms if "dev" in arm["mean"]}
    return (min if lower else max)(means, key=means.__getitem__) if means else None


# In words, as a table, as a picture -----------------------------------------------------------------------------------------


def _size(value: float, scale: float, sign: str = "") -> str:
    return f"{value:{sign}.1f} points" if scale == 100 else f"{value:{sign}.3g}"


def _sentences(content: Content) -> list[str]:
    """The result in plain words."""
    first, scale = content["arms"][0]["name"], 100 if content["unit"] == "points" else 1
    better = -1 if content["lower_is_better"] else 1
    differences = sorted(content["differences"], key=lambda one: better * one["mean"], reverse=True)

    def tell(one: Content) -> str:
        if one["low"] is None:
            return f"{one['arm']} {_size(one['mean'], scale, '+')}, no interval: {one['why']}"
        short = "+.1f" if scale == 100 else "+.3g"
        return f"{one['arm']} {one['mean']:{short}}, {one['low']:{short}} to {one['high']:{short}}"

    beyond = [one for one in differences if one["p_holm"] is not None and one["p_holm"] < WIN]
    wins = [one for one in beyond if better * one["mean"] > 0]
    losses = [one for one in beyond if better * one["mean"] < 0]
    alone = [arm["name"] for arm in content["arms"][1:] if arm["name"] not in {one["arm"] for one in differences}]
    said = ["Not all runs are finished."] if content["missing"] and differences else []
    chance = "the chance of the seeds" if any(one["over"] == "seeds" for one in differences) else "chance"
    where = f"{first} beyond {chance}{' on dev' * (content['part'] == 'dev')}"
    if wins:
        said.append(f"Better than {where}: {'; '.join(map(tell, wins))}.")
    elif any(one["p"] is not None for one in differences):
        top, which = differences[0], "largest" if better * differences[0]["mean"] > 0 else "closest"
        holm = f", but p is {top['p_holm']:.2g} by Holm over all methods" if top["p"] is not None and top["p"] < WIN else ""
        none = "No method that was compared is" if alone else "No method is"
        said.append(f"{none} better than {where} ({which}: {tell(top)}{holm if top not in losses else ''}).")
    elif differences:
        said.append(f"What is chance cannot be told ({tell(differences[0])}).")
    elif len(content["arms"]) > 1:
        said.append("There is no pair to compare yet.")
    if losses:
        said.append(f"Worse: {'; '.join(map(tell, losses))}.")
    if alone and differences:
        said.append(f"Not compared, as there is no pair of runs: {', '.join(alone)}.")
    for arm in content["arms"]:
        if diverged := arm["diverged"]:
            some = f"{diverged} of {arm['name']}'s {len(arm['seeds'])} seeds diverged: what is said of it holds for the others."
            said.append(some if diverged < len(arm["seeds"]) else f"{arm['name']} diverged with every seed.")
    if (size := content["detectable"]) is not None and not wins:
        is_few = scale == 100 and size > TOO_FEW
        found = f"No difference below {TOO_FEW:.0f} points" if is_few else f"A difference of {_size(size, scale)}"
        said.append(f"{found} would be found{' with so few rows and seeds' if is_few else ' four times in five'}.")
    if worth := [(arm["rate_is_worth"], arm["equal_rates_differ_by"], arm) for arm in content["arms"] if arm["rate_is_worth"]]:
        most, chance, arm = max(worth, key=lambda one: (one[0] > (one[1] or 0), one[0]))
        how = f"the best against the worst tried near it, on {arm['name']}'s tuning runs"
        by = f"; by the chance of these rows equal rates lie up to {_size(chance, scale)} apart" if chance is not None else ""
        if chance is None or most > chance:
            said.append(f"The rate is worth up to {_size(most, scale)} ({how}{by}).")
        else:
            said.append(f"What the rate is worth cannot be told from chance: {_size(most, scale)} ({how}{by}).")
    if (chosen := content["chosen_on_dev"]) and content["part"] == "test" and differences:
        test = next((f"on test {tell(one).partition(' ')[2]} from {first}" for one in differences if one["arm"] == chosen), "")
        said.append(f"By dev one would take {chosen}{f': {test}' if test else ''}.")
    return said


def table(content: Content) -> Group:
    """How good the arms are, and what they cost; a column that no arm has anything in is left out."""
    scale = 100 if content["unit"] == "points" else 1
    digits = 1 if scale == 100 else 3
    found = {one["arm"]: one for one in content["differences"]}

    def spread_of(arm: Content, part: str) -> str:
        if part not in arm["mean"]:
            return ""
        return f"{arm['mean'][part]:.{digits}f}" + (f" ±{arm['sd'][part]:.{digits}f}" if part in arm["sd"] else "")

    def from_first(arm: Content) -> str:
        one = found.get(arm["name"])
        if one is None or one["low"] is None:
            return f"{one['mean']:+.{digits}f}" if one else ""
        return f"{one['mean']:+.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})"

    arms = content["arms"]
    quality = {
        "rate": [f"{arm['learning_rate']:.2g}" if arm["learning_rate"] else "" for arm in arms],
        **{f"{part} ±sd": [spread_of(arm, part) for arm in arms] for part in ("dev", "test")},
        f"from {arms[0]['name']}": [from_first(arm) for arm in arms],
        "p (Holm)": [f"{p:.2g}" if (p := found.get(arm["name"], {}).get("p_holm")) is not None else "" for arm in arms],
    }
    cost = {
        "parameters": [f"{arm['parameters']:,}" for arm in arms],
        "seconds": [f"{arm['seconds']:.0f}" if arm["seconds"] else "" for arm in arms],
        "memory": [f"{arm['peak_memory'] / 1e9:.1f} GB" if arm["peak_memory"] else "" for arm in arms],
        "forgotten": [f"{arm['forgotten']:.3f}" if arm["forgotten"] is not None else "" for arm in arms],
    }
    return Group(*(_columns([arm["name"] for arm in arms], columns) for columns in (quality, cost)))


def _columns(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    shown = Table("", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for row in zip(names, *columns.values(), strict=True):
        shown.add_row(*row)
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
        for at, arm in enumerate(content["arms"]):
            colour, mark = _COLOURS[at % len(_COLOURS)], _MARKS[at % len(_MARKS)]
            tried = [(one["learning_rate"], [value for value in one["tuning"] if value is not None]) for one in arm["rates"]]
            means = [(rate, fmean(values)) for rate, values in tried if values]
            for rate, values in tried:
                axes.plot([rate] * len(values), values, mark, color=colour, alpha=0.45, markersize=3.5)
            axes.plot(
                *zip(*means, strict=True) if means else ((), ()), color=colour, label=arm["name"], marker=mark, markersize=4.5
            )
            for rate, mean in means:
                if arm["learning_rate"] and math.isclose(rate, arm["learning_rate"], rel_tol=1e-3):
                    axes.plot([rate], [mean], "o", markersize=12, fillstyle="none", color=colour)
        if any(arm["rates"] for arm in content["arms"]):
            figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return Path(out)
