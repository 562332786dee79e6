"""Seconds of every importance score for one batch, and the same in forward passes of that batch.

An adapter of ``benchmarks/scores.py`` (sst2, seed 0, late; trained first if it is not there) and its 32 scoring examples. Run it
with nothing else running.

    python benchmarks/scores_cost.py --data-dir DATA
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from scores import HERE, RULES, State

from gatewise.allocation.fast_ablation import exact as exactly
from gatewise.allocation.scoring import parts_of, scoring
from gatewise.allocation.slots import lora_layers
from gatewise.losses import mean_loss
from gatewise.scores import SCORES


def cost(state: State, out: Path) -> None:
    """Seconds of every score for one batch, and the same in forward passes of that batch (without gradients)."""
    model, batch = state.model(), state.collate(state.scored[: state.settings["few"]])

    def forward() -> None:
        with scoring(model):
            mean_loss(model, parts_of(model, batch))

    ranks = [(path, slot) for path, layer in lora_layers(model).items() for slot in range(layer.r["default"])]
    sample = ranks[:: len(ranks) // 20]
    runs: dict[str, Any] = {"forward": forward, "taylor": lambda: SCORES["taylor"](model, batch)}
    runs |= {f"path_integral, {n} points": lambda n=n: SCORES["path_integral"](model, batch, n) for n in RULES.values()}
    runs["path_moments"] = lambda: SCORES["path_moments"](model, batch)
    runs["sensitivity"] = lambda: SCORES["sensitivity"](model, batch)
    runs["ablation, screened"] = lambda: SCORES["ablation"](model, batch, "screened")
    runs["ablation, exact *"] = lambda: exactly(model, batch, sample)
    seconds: dict[str, float] = {}
    for name, run in runs.items():
        taken = []
        for _ in range(1 if "ablation" in name else 3):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        seconds[name] = min(taken) * (len(ranks) / len(sample) if name.endswith("*") else 1)
        print(f"  {name:28} {seconds[name]:8.1f} s {seconds[name] / seconds['forward']:8.1f} forwards", flush=True)
    settings = {"rows": len(batch["labels"]), "ranks": len(ranks), "threads": torch.get_num_threads(),
                "extrapolated": f"* from {len(sample)} ranks"}  # fmt: skip
    out.write_text(json.dumps({"seconds": seconds, **settings}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Times the scores and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs") / "scores")
    options = parser.parse_args()
    cost(State("sst2", 0, "late", options.data_dir, options.work), HERE / "results" / "scores_cost.json")


if __name__ == "__main__":
    main()
