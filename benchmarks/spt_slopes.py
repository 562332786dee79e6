"""Why SPT's gates open where they do: what a gate's slope is made of, layer by layer, in the course of a search.

A gate mixes two prompts, p = (1 - a) below + a new, so with g the gradient of the loss in p, the slope in a is

    dL/da  =  <g, new>    what its own prompt brings
            - <g, below>  what writing over the prompt from below costs

A negative slope opens a gate. Both parts are measured at four points of the search of spt.py (MiniLM-L6, SPT's two additions on),
without dropout and without re-parameterised gates, on the same 512 rows of the half that trains the gates. Beside them is the
mean loss of the pairs of layers with each layer, by which `choose: loss` chooses at the end.

    python benchmarks/spt_slopes.py --data-dir DATA --tasks minilm-l6/trec/full
    python benchmarks/spt_slopes.py --report
"""

import random
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

from campaign import campaign
from spt import TASKS, adapted, prepared, searched

ROWS = 512
POINTS = 4


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Searches once more and measures the slopes on the way."""
    from transformers import TrainerCallback

    from gatewise.upper_level import split_in_half

    cell = prepared(task, seed, data_dir)
    s = {**cell.settings, "learning_rate": cell.settings["learning_rate"]["spt"]}
    model = adapted(cell.fresh(), "spt", s, None)
    _, upper = split_in_half(cell.rows, seed)
    rows = sorted(random.Random(seed).sample(upper, min(ROWS, len(upper))), key=lambda row: len(row["input_ids"]))
    batches = [cell.collator(rows[start : start + 32]) for start in range(0, len(rows), 32)]
    points: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % (s["steps"] // POINTS) == 0:
                points.append({"step": state.global_step, **slopes(model, batches)})

    found = searched(model, cell, seed, s, additions=True, callbacks=[Watch()])
    kept = {key: found[key] for key in ("by_gates", "by_loss", "gates", "losses")}
    return {"task": task, "method": method, "seed": seed, "rows": len(rows), "points": points, **kept, "settings": s}


def slopes(model: Any, batches: list[Any]) -> dict[str, Any]:
    """Both parts of every gate's slope (nats a row), and the gates."""
    import torch

    tuner = model.base_model
    gates = tuner.gates()
    brings = torch.ones(len(gates), requires_grad=True)
    overwrites = torch.ones(len(gates), requires_grad=True)
    layer = 0

    def mixed(below: Any, new: Any, gate: Any, tau: float) -> Any:
        """The library's mixture; the two factors of one only take gradients."""
        nonlocal layer
        share = tau * gate
        mixture = share * brings[layer] * new
        if below is not None:
            mixture = mixture + (1 - share * overwrites[layer]) * below
        layer += 1
        return mixture

    before, count, loss = model.training, 0, 0.0
    sums = [torch.zeros(len(gates)), torch.zeros(len(gates))]
    model.eval()
    with patch("gatewise.prompts.block.mixed", mixed):
        for batch in batches:
            layer, size = 0, len(batch["labels"])
            whole = size * model(**batch).loss
            for total, part in zip(sums, torch.autograd.grad(whole, [brings, overwrites]), strict=True):
                total += part
            count, loss = count + size, loss + float(whole.detach())
    model.train(before)
    # A factor's gradient is a times the slope's part.
    new, over = ([round(value, 5) for value in (total / count / gates).tolist()] for total in sums)
    return {"gates": [round(gate, 4) for gate in gates.tolist()], "brings": new, "overwrites": over, "loss": round(loss / count, 4)}


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """Means over seeds, a line a point of the search and a column a layer."""
    for task in dict.fromkeys(run["task"] for run in runs):
        group = [run for run in runs if run["task"] == task]
        print(f"\n{task}, {len(group)} searches, {group[0]['rows']} rows")
        print("  Slope of the loss in each layer's gate, hundredths of a nat; minus opens it")
        for number, first in enumerate(group[0]["points"]):
            at = [run["points"][number] for run in group]
            brings, over, gates = ([point[key] for point in at] for key in ("brings", "overwrites", "gates"))
            both = [[a + b for a, b in zip(point["brings"], point["overwrites"], strict=True)] for point in at]
            print(f"  step {first['step']}")
            for name, values in (("its own prompt", brings), ("writing over", over), ("both", both)):
                print(f"    {name:15}" + _by_layer([[100 * value for value in of_run] for of_run in values], "+8.2f"))
            print(f"    {'gates':15}" + _by_layer(gates, "8.2f"))
        print("  Mean loss of the pairs of layers with each, after the search")
        print(" " * 19 + _by_layer([run["losses"] for run in group], "8.3f"))


def _by_layer(runs: list[list[float]], style: str) -> str:
    return "".join(f"{statistics.mean(values):{style}}" for values in zip(*runs, strict=True))


def _told(run: dict[str, Any]) -> str:
    return f"by gates {run['by_gates']}, by loss {run['by_loss']}"


if __name__ == "__main__":
    campaign(__doc__, "spt_slopes.jsonl", [task for task in TASKS if task.startswith("minilm")], ["spt"], one_run, _told, report)
