"""How large the prompts are that SPT mixes, and what its generators learn from, at the start of a search.

One batch of the search of spt.py, layer by layer, with as many random gates open as layers are kept:

    sum          p = (1 - a) p_propagated + a p_new, as the paper has it
    balanced     by their directions, with a size between theirs (SelectivePromptConfig(balanced=True))
    discrete     the model that the search is for: new prompts at those layers, nothing mixed

Sizes are root mean squares of the numbers of a prompt token, means over tokens; propagated ones are those that the layers below
left with the plain sum. Gradients are norms over all of a layer's generator, and the generators are the same in all three.

    python benchmarks/spt_sizes.py --data-dir DATA --tasks smollm2-135m-instruct/trec/few minilm-l6/trec/few
    python benchmarks/spt_sizes.py --report
"""

import random
import statistics
from pathlib import Path
from typing import Any

from campaign import campaign
from spt import TASKS, adapted, prepared


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Three passes of the same batch, forward and back."""
    import torch

    cell = prepared(task, "spt", seed, data_dir)
    s = cell.settings
    layers = sorted(random.Random(seed).sample(range(s["layers"]), s["keep"]))
    batch = cell.collator(cell.rows[: s["batch_size"]])
    model = adapted(cell.fresh(), "spt", s, None).eval()
    config = model.peft_config["default"]
    result: dict[str, Any] = {"task": task, "method": method, "seed": seed, "open": layers, "gradients": {}, "losses": {}}
    for balanced in (False, True):
        config.balanced = balanced
        with model.gates_dropped([layer not in layers for layer in range(s["layers"])]):
            seen = _sizes(model, layers) if not balanced else {}
            name = "balanced" if balanced else "sum"
            result["losses"][name], result["gradients"][name] = _backward(model, batch, layers)
        result.update({key: [round(value, 3) for value in sizes.values()] for key, sizes in seen.items()})
    discrete = adapted(cell.fresh(), "spt", s, layers).eval()
    with torch.no_grad():
        given = dict(model.named_parameters())
        for path, parameter in discrete.named_parameters():
            if "spt_generator" in path:
                parameter.copy_(given[path])
    result["losses"]["discrete"], result["gradients"]["discrete"] = _backward(discrete, batch, layers)
    return {**result, "settings": s}


def _sizes(model: Any, layers: list[int]) -> dict[str, dict[int, float]]:
    """Filled by the next pass: the sizes of what meets at the open layers but the first, where nothing is propagated."""
    seen: dict[str, dict[int, float]] = {"propagated": {}, "new": {}}
    blocks = {i: block for i, block in enumerate(model.base_model._transformer.layers) if i in layers[1:]}

    def size(prompt: Any) -> float:
        return float(prompt.detach().float().square().mean(dim=-1).sqrt().mean())

    for layer, block in blocks.items():

        def propagated(module: Any, args: Any, layer: int = layer) -> None:
            seen["propagated"][layer] = size(args[1])

        def new(module: Any, args: Any, output: Any, layer: int = layer) -> None:
            seen["new"][layer] = size(output)

        block.register_forward_pre_hook(propagated)
        block.selective_prompt.spt_generator["default"].register_forward_hook(new)
    return seen


def _backward(model: Any, batch: Any, layers: list[int]) -> tuple[float, list[float]]:
    """The loss, and the norm of the gradient of each layer's generator."""
    import torch

    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    norms = []
    for layer in layers:
        parts = [p.grad.flatten() for path, p in model.named_parameters() if f".{layer}.selective_prompt.spt_generator." in path]
        norms.append(round(float(torch.cat(parts).norm()), 4))
    return round(float(loss.detach()), 3), norms


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """A column an open layer; seeds one below the other, since they have different layers."""
    for run in runs:
        print(f"\n{run['task']}, seed {run['seed']}")
        print(f"  {'layer':22}" + "".join(f"{layer:9}" for layer in run["open"]))
        for key in ("propagated", "new"):
            print(f"  size, {key:16}" + " " * 9 + "".join(f"{size:9.2f}" for size in run[key]))
        for key, norms in run["gradients"].items():
            print(f"  gradient, {key:12}" + "".join(f"{norm:9.3f}" for norm in norms) + f"   loss {run['losses'][key]:.2f}")
    for task in dict.fromkeys(run["task"] for run in runs):
        group = [run for run in runs if run["task"] == task]
        ratios = [a / b for run in group for a, b in zip(run["propagated"], run["new"], strict=True)]
        middle = statistics.median(ratios)
        print(f"\n{task}: propagated prompts are {min(ratios):.1f} to {max(ratios):.1f} times as large, median {middle:.1f}")
        for name in ("sum", "balanced"):
            parts = [
                own / whole
                for run in group
                for own, whole in list(zip(run["gradients"][name], run["gradients"]["discrete"], strict=True))[1:]
            ]
            print(
                f"  gradients above the first open layer, {name}: {min(parts):.4f} to {max(parts):.2f} of those of the discrete "
                f"model, median {statistics.median(parts):.3f}"
            )


def _told(run: dict[str, Any]) -> str:
    return f"layers {run['open']}, propagated {run['propagated']}"


if __name__ == "__main__":
    campaign(__doc__, "spt_sizes.jsonl", TASKS, ["spt"], one_run, _told, report)
