"""How much do MiLoRA's routers see of a prompt before they are trained? SmolLM2-135M, prompts of arc_easy and openbookqa.

Two spreads of the experts' log-probabilities, means over layers: from expert to expert (of the mean over prompts), and from prompt
to prompt (of one expert). If the first is much the larger, all prompts choose alike whatever they say. And how many of their
choices two prompts share, which benchmarks/milora.py reports of trained routers.

    python benchmarks/new_routers.py --data-dir DATA [--rows 60]     # a minute; writes benchmarks/results/new_routers.json
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from gatewise import RoutedLoraConfig
from gatewise.inspection.routing import routing_of_rows
from gatewise.models import load_model, load_tokenizer
from gatewise.routed.router import Router
from gatewise.tasks import default_template, encode, load_records

RESULTS = Path(__file__).parent / "results" / "new_routers.json"
MODEL, TASKS = "smollm2-135m-instruct", ("arc_easy", "openbookqa")


def keep(kept: list[torch.Tensor], router: nn.Module, given: Any, made: torch.Tensor) -> None:
    """A hook: log-probabilities (b, m) of a call."""
    kept.append(made.log())


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    found: dict[str, Any] = {"model": MODEL, "rows": options.rows}
    for k in (1, 3):
        torch.manual_seed(0)
        config = RoutedLoraConfig(r=8, top_k=k, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_model(MODEL), config).eval()
        seen: dict[nn.Module, list[torch.Tensor]] = {one: [] for one in model.modules() if isinstance(one, Router)}
        for router, kept in seen.items():
            router.register_forward_hook(partial(keep, kept))
        for task in TASKS:
            records = load_records(options.data_dir / task / "dev.jsonl")
            rows = list(encode(records, tokenizer, default_template(records)))[: options.rows]
            chosen = routing_of_rows(model, tokenizer, rows, 20)
            found[f"k={k}, {task}"] = {"distinct": round(chosen.distinct, 2), "agreement": round(chosen.agreement, 4)}
        layers = [torch.cat(made) for made in seen.values()]
        found[f"k={k}"] = {
            "spread over experts": round(statistics.mean(float(one.mean(dim=0).std()) for one in layers), 3),
            "spread over prompts": round(statistics.mean(float(one.std(dim=0).mean()) for one in layers), 3),
        }
    text = json.dumps(found, indent=1) + "\n"
    options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
