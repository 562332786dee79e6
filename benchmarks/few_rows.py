"""With a hundred rows to train on, where should the parameters lie? LoRA everywhere, LoRA and SPT's prompts in the last layers.

    python benchmarks/data.py --tasks trec subj
    python benchmarks/few_rows.py            # goes on where it was stopped; several processes may share the runs
    python benchmarks/few_rows.py --report

MiniLM-L6 classifies, 200 steps of 16 rows. A run draws its 100 rows from those of the task, and its seed too, by its number. A
method's learning rate is the best of four on 500 rows that no run trains on, over two draws; then five other draws, the same for
all methods, are measured on the dev rows.
"""

import argparse
import json
import random
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from campaign import RESULTS, read, spread, work
from rich.console import Console

from gatewise.comparing.arms import arms_of
from gatewise.comparing.statistics import difference
from gatewise.models.device import machine
from gatewise.runs.run import train

RECIPES = Path(__file__).parent / "recipes"
TASKS = ("trec", "subj")
METHODS = ("lora", "arms/lora-last.yaml", "arms/spt-last.yaml")
RATES = (9.3e-4, 1.67e-3, 3e-3, 5.4e-3)
TUNING, DRAWS, ROWS, OTHERS = (1000, 1001), (0, 1, 2, 3, 4), 100, 500

Key = tuple[str, str, float, int]


def key(run: dict[str, Any]) -> Key:
    return run["task"], run["method"], run["learning_rate"], run["draw"]


def best(done: list[dict[str, Any]], task: str, method: str) -> float | None:
    """The rate that is best on the rows that no run trains on; None while a run is missing."""
    own = [run for run in done if (run["task"], run["method"]) == (task, method) and run["draw"] in TUNING]
    if len(own) < len(RATES) * len(TUNING):
        return None
    return max(RATES, key=lambda rate: fmean(run["accuracy"] for run in own if run["learning_rate"] == rate))


def one_run(task: str, method: str, rate: float, draw: int) -> dict[str, Any]:
    folder = (RECIPES / "data" / task).resolve()
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").strip().split("\n")
    random.Random(0).shuffle(rows)
    others, rows = rows[:OTHERS], rows[OTHERS:]
    with tempfile.TemporaryDirectory() as temporary:
        drawn, measured = Path(temporary) / "train.jsonl", Path(temporary) / "others.jsonl"
        drawn.write_text("\n".join(random.Random(draw).sample(rows, ROWS)) + "\n", encoding="utf-8")
        measured.write_text("\n".join(others) + "\n", encoding="utf-8")
        labels = sorted({json.loads(row)["label"] for row in rows})
        settings = [
            f"data.train={drawn}", f"data.dev={measured if draw in TUNING else folder / 'dev.jsonl'}", "data.test=null",
            f"data.labels={json.dumps(labels)}", "data.held_out=0", f"seed={draw}",
            f"training.learning_rate={rate}", "training.max_steps=200",
        ]  # fmt: skip
        is_file = method.endswith(".yaml")
        settings += [] if is_file else ["peft.r=2", "peft.lora_alpha=4"]
        name = str(RECIPES / method) if is_file else method
        (arm,) = arms_of(RECIPES / f"{task}.yaml", [name], settings)
        result = train(arm.recipe, Path(temporary) / "run", before=False, console=Console(quiet=True))
    found = {"task": task, "method": method, "learning_rate": rate, "draw": draw, "parameters": result.parameters["adapter"]}
    return found | {"accuracy": result.metrics["dev"]["after"]["accuracy"], "machine": machine("cpu")}


def missing(done: list[dict[str, Any]], tasks: list[str], methods: list[str]) -> list[Key]:
    """The runs that can be made now."""
    todo: list[Key] = []
    for task in tasks:
        todo += [(task, method, rate, draw) for draw, method, rate in product(TUNING, methods, RATES)]
        todo += [(task, method, rate, draw) for draw, method in product(DRAWS, methods) if (rate := best(done, task, method))]
    known = {key(run) for run in done}
    return [one for one in todo if one not in known]


def report(done: list[dict[str, Any]]) -> None:
    """The tables of docs/reports/spt.md."""
    for task in dict.fromkeys(run["task"] for run in done if best(done, run["task"], METHODS[0])):
        tried = ", ".join(map(str, RATES))
        print(f"| {task} | rate | accuracy (sd) | minus lora (95%) | parameters | on the other rows, at {tried} |")
        print("|---|---|---|---|---|---|")
        of: dict[str, dict[int, float]] = {}
        for method in METHODS:
            if (rate := best(done, task, method)) is None:
                continue
            own = [run for run in done if (run["task"], run["method"]) == (task, method)]
            of[method] = {
                run["draw"]: 100 * run["accuracy"] for run in own if run["draw"] in DRAWS and run["learning_rate"] == rate
            }
            tuned = [
                100 * fmean(run["accuracy"] for run in own if run["draw"] in TUNING and run["learning_rate"] == one)
                for one in RATES
            ]
            both = sorted({*of[method]} & {*of.get("lora", {})}) if method != "lora" else []
            gap = difference(np.array([[of[method][draw] - of["lora"][draw]] for draw in both])) if len(both) > 1 else None
            told = f"{gap.mean:+.1f} ({gap.low:.1f} to {gap.high:.1f})" if gap and gap.low is not None else ""
            quality = spread([*of[method].values()], 1).replace("sd ", "") if of[method] else ""
            print(
                f"| {Path(method).stem} | {rate:g} | {quality} | {told.replace('-', '−')} | {own[0]['parameters']:,} | "
                f"{', '.join(f'{one:.1f}' for one in tuned)} |"
            )
        print()


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--results", type=Path, default=RESULTS / "few_rows.jsonl")
    parser.add_argument("--report", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if not options.report:
        work(partial(missing, tasks=options.tasks, methods=options.methods), one_run, options.results)
    report(read(options.results))


if __name__ == "__main__":
    main()
