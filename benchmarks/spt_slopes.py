"""Which way SPT's gates are drawn in the course of a search: with all of them open, and with some left out, as they are trained.

The slope of the loss in a gate, layer by layer, at four points of the search of spt.py (with SPT's two additions), without dropout
and without re-parameterised gates, on the same rows of the half that trains the gates:

    all open      the network with all its prompts, which lower steps never train
    some left out    means over the same random draws of the gates at each point, of the draws that leave the gate in

A negative slope opens a gate. Beside the slopes are the loss of both and, at the end, the mean loss of the subsets of layers with
each layer, by which `choose: loss` chooses.

    python benchmarks/spt_slopes.py --data-dir DATA --tasks minilm-l6/trec/full
    python benchmarks/spt_slopes.py --report
"""

import random
import statistics
from pathlib import Path
from typing import Any

from campaign import campaign
from spt import TASKS, adapted, prepared, searched

ROWS = 256
POINTS = 4
DRAWS = 12


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Searches once more and measures the slopes on the way."""
    import torch
    from transformers import TrainerCallback

    from gatewise.bilevel.state import split_in_half
    from gatewise.prompts.darts import draw_dropped

    cell = prepared(task, method, seed, data_dir)
    s = cell.settings
    model = adapted(cell.fresh(), "spt", s, None)
    _, upper = split_in_half(cell.rows, seed)
    rows = sorted(random.Random(seed).sample(upper, min(ROWS, len(upper))), key=lambda row: len(row["input_ids"]))
    batches = [cell.collator(rows[start : start + 32]) for start in range(0, len(rows), 32)]
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.stack([draw_dropped(s["layers"], s["drop"], generator) for _ in range(DRAWS)])
    points: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % (s["steps"] // POINTS) == 0:
                gates = [round(gate, 4) for gate in model.gates().tolist()]
                whole = slopes(model, batches, torch.zeros_like(dropped[:1]))
                points.append(
                    {"step": state.global_step, "gates": gates, "open": whole, "left_out": slopes(model, batches, dropped)}
                )

    found = searched(model, cell, seed, additions=True, callbacks=[Watch()])
    kept = {key: found[key] for key in ("by_gates", "by_loss", "gates", "losses")}
    return {"task": task, "method": method, "seed": seed, "rows": len(rows), "points": points, **kept, "settings": s}


def slopes(model: Any, batches: list[Any], dropped: Any) -> dict[str, Any]:
    """The mean slope of the loss (nats a row) in each gate a over the draws (draws, n) that leave it in, and the mean loss."""
    import torch

    parameters = list(model.gate_parameters().values())
    gates, before = model.gates(), model.training
    sums, loss, rows = torch.zeros(len(gates)), 0.0, sum(len(batch["labels"]) for batch in batches)
    model.eval()
    for which in dropped:
        with model.gates_dropped(which):
            for batch in batches:
                whole = len(batch["labels"]) / rows * model(**batch).loss
                loss += float(whole.detach())
                # From the logit's slope to that in its sigmoid.
                sums += torch.cat(torch.autograd.grad(whole, parameters)) / (gates * (1 - gates))
    model.train(before)
    times = (~dropped).sum(dim=0)
    return {"slopes": [round(slope, 5) for slope in (sums / times).tolist()], "loss": round(loss / len(dropped), 4)}


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """Means over seeds, a line a point of the search and a column a layer."""
    for task in dict.fromkeys(run["task"] for run in runs):
        group = [run for run in runs if run["task"] == task]
        print(f"\n{task}, {len(group)} searches, {group[0]['rows']} rows")
        print("  Slope of the loss in each layer's gate, hundredths of a nat; minus opens it")
        for number, first in enumerate(group[0]["points"]):
            _point(f"step {first['step']}", [run["points"][number] for run in group])
        _point("mean of these", [point for run in group for point in run["points"]])
        print("  Mean loss of the subsets of layers with each, after the search")
        print(" " * 19 + _by_layer([run["losses"] for run in group], "8.3f"))


def _point(name: str, points: list[dict[str, Any]]) -> None:
    print(f"  {name}")
    for key, state in (("open", "all open"), ("left_out", "some left out")):
        values = [[100 * slope for slope in point[key]["slopes"]] for point in points]
        loss = statistics.mean(point[key]["loss"] for point in points)
        print(f"    {state:15}{_by_layer(values, '+8.2f')}   loss {loss:.3f}")
    print(f"    {'gates':15}{_by_layer([point['gates'] for point in points], '8.2f')}")


def _by_layer(runs: list[list[float]], style: str) -> str:
    return "".join(f"{statistics.mean(values):{style}}" for values in zip(*runs, strict=True))


def _told(run: dict[str, Any]) -> str:
    return f"by gates {run['by_gates']}, by loss {run['by_loss']}"


if __name__ == "__main__":
    campaign(__doc__, "spt_slopes.jsonl", [task for task in TASKS if task.startswith("minilm")], ["spt"], one_run, _told, report)
