"""Tables and deletion curves from the results of ``benchmarks/scores.py``.

python benchmarks/scores_report.py --plot docs/deletion_curves.png
"""

import argparse
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from scores import CUTS, HERE, STAGES, TASKS, Line, read

Place = tuple[str, int, str]
Score = tuple[str, str]
"""A score's name and whether it was made of few or many examples."""


def main() -> None:
    """Prints the tables, and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scores.jsonl")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    lines = read(options.results)
    states = {place_of(line): line for line in lines if line["what"] == "state"}
    losses: dict[Place, dict[Score, dict[float, float]]] = {}
    for line in lines:
        if line["what"] == "deleted":
            score = (line["score"], line["rows"] if line["score"] not in ("random", "magnitude") else "none")
            losses.setdefault(place_of(line), {}).setdefault(score, {})[line["cut"]] = line["loss"]
    curves(states, losses)
    regrets(losses)
    recovered(lines, states)
    agreement(states, lines)
    if options.plot:
        draw(states, losses, options.plot)


def place_of(line: Line) -> Place:
    return line["task"], line["seed"], line["stage"]


def groups(states: Iterable[Place]) -> Iterator[tuple[str, str, list[Place]]]:
    """Task, stage and the seeds' places."""
    known = list(states)
    for task in TASKS:
        for stage in STAGES:
            places = [place for place in known if place[0] == task and place[2] == stage]
            if places:
                yield task, stage, places


def curves(states: dict[Place, Line], losses: dict[Place, dict[Score, dict[float, float]]]) -> None:
    """The rise of the dev loss at every cut, mean over seeds, for every score."""
    for task, stage, places in groups(states):
        on, off = ([states[p][key] for p in places] for key in ("loss_on", "loss_off"))
        print(f"\n{task}, {stage}: dev loss {spread(on)} with all ranks, {spread(off)} with none; rise when the lowest are off")
        print("  " + " " * 30 + "".join(f"{cut:>14.0%}" for cut in CUTS) + "   seeds")
        rows: dict[Score, tuple[list[list[float]], int]] = {}
        for score in dict.fromkeys(s for p in places for s in losses.get(p, {})):
            held = [p for p in places if len(losses[p].get(score, {})) == len(CUTS)]
            if held:
                rise = [[losses[p][score][cut] - states[p]["loss_on"] for p in held] for cut in CUTS]
                rows[score] = rise, len(held)
        for score, (rise, seeds) in sorted(rows.items(), key=lambda item: statistics.mean(item[1][0][2])):
            print(f"  {named(score):30}" + "".join(f"{spread(values, True):>14}" for values in rise) + f"   {seeds}")


def regrets(losses: dict[Place, dict[Score, dict[float, float]]]) -> None:
    """How far each score is from the best one of the same place and cut, over all places where all of them were measured."""
    everywhere = [s for s in dict.fromkeys(s for m in losses.values() for s in m) if all(s in m for m in losses.values())]
    complete = [p for p, m in losses.items() if all(len(m[s]) == len(CUTS) for s in everywhere)]
    print(f"\ndistance to the best score of the same adapter and cut, over {len(complete)} adapters: mean, worst, times best")
    found: dict[Score, list[tuple[float, float]]] = {score: [] for score in everywhere}
    for place in complete:
        for cut in CUTS:
            best = min(losses[place][score][cut] for score in everywhere)
            for score in everywhere:
                found[score].append((cut, losses[place][score][cut] - best))
    print("  " + " " * 30 + "".join(f"{cut:>9.0%}" for cut in CUTS) + "      all    worst   best")
    for score, values in sorted(found.items(), key=lambda item: statistics.mean([v for _, v in item[1]] or [0])):
        if values:
            by_cut = [statistics.mean(v for c, v in values if c == cut) for cut in CUTS]
            everything = [v for _, v in values]
            print(
                f"  {named(score):30}" + "".join(f"{value:9.3f}" for value in by_cut)
                + f"{statistics.mean(everything):9.3f}{max(everything):9.3f}{sum(v == 0 for v in everything):7}"
            )  # fmt: skip


def recovered(lines: list[Line], states: dict[Place, Line]) -> None:
    """The rise of the dev loss after the lowest are gone for good and the rest has trained on."""
    print("\nafter a short recovery (late adapters): rise of the dev loss")
    for task, stage, places in groups(states):
        mine = [line for line in lines if line["what"] == "recovered" and place_of(line) in places]
        for score in dict.fromkeys(line["score"] for line in mine):
            rise = [line["loss"] - states[place_of(line)]["loss_on"] for line in mine if line["score"] == score]
            print(f"  {task:9} {stage:6} {mine[0]['cut']:.0%} off  {score:20} {spread(rise, True):>16}   seeds {len(rise)}")


def agreement(states: dict[Place, Line], lines: list[Line]) -> None:
    """How complete the integral is, and how the scores agree."""
    for task, stage, places in groups(states):
        print(f"\n{task}, {stage}:")
        for key in ("completeness_error", "spearman_to_finest", "spearman_few_to_many", "spearman_to_ab"):
            names = dict.fromkeys(name for p in places for name in states[p][key])
            facts = {n: [states[p][key][n] for p in places if n in states[p][key]] for n in names}
            if key == "completeness_error":
                facts = {n: [abs(states[p][key][n] / states[p]["reduction"]) for p in places if n in states[p][key]] for n in names}
            means = "  ".join(f"{name} {statistics.mean(values):.4f}" for name, values in facts.items())
            if not means:
                continue
            print(f"  {key.replace('_', ' ') + (' / reduction' if key == 'completeness_error' else '')}: {means}")
        for line in lines:
            if line["what"] == "exact" and place_of(line) in places:
                means = "  ".join(f"{name} {value:.4f}" for name, value in line["spearman"].items())
                print(f"  spearman with exact ablation over {line['ranks']} ranks ({line['seconds']} s): {means}")


def named(score: Score) -> str:
    return score[0] if score[1] == "none" else f"{score[0]}, {score[1]} examples"


def spread(values: list[float], sign: bool = False) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.3f}{deviation}"


def draw(states: dict[Place, Line], losses: dict[Place, dict[Score, dict[float, float]]], out: Path) -> None:
    """Mean dev loss against the share of ranks that are off, one panel a task and stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = list(groups(states))
    figure, axes = plt.subplots(len(STAGES), len(TASKS), figsize=(4.4 * len(TASKS), 7), layout="constrained")
    shown: dict[Score, dict[str, Any]] = {
        ("ab", "few"): {"color": "#0b3f73", "label": "AB-LoRA"},
        ("pi", "few"): {"color": "#c2410c", "label": "path integral"},
        ("moments", "few"): {"color": "#15803d", "lw": 2.2, "label": "path moments (gatewise)"},
        ("moment", "few"): {"color": "#15803d", "ls": "--", "label": "its second moment alone"},
        ("sensitivity", "few"): {"color": "#7e22ce", "label": "AdaLoRA's sensitivity"},
        ("loo", "few"): {"color": "#5c6b7a", "ls": ":", "label": "loss without the rank, first order"},
        ("random", "none"): {"color": "#9aa5b1", "label": "random"},
    }
    for task, stage, places in panels:
        axis = axes[STAGES.index(stage)][list(TASKS).index(task)]
        base = statistics.mean(states[p]["loss_on"] for p in places)
        for score, style in shown.items():
            held = [p for p in places if len(losses.get(p, {}).get(score, {})) == len(CUTS)]
            if held:
                means = [statistics.mean(losses[p][score][cut] for p in held) for cut in CUTS]
                axis.plot([0, *[100 * cut for cut in CUTS]], [base, *means], marker="o", ms=3, **style)
        axis.set(title=f"{task}, {stage}", xlabel="% of ranks off", ylabel=f"dev loss, mean of {len(places)} seeds", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
