"""What AB-LoRA's three ways of scoring cost, and whether they agree. SmolLM2-135M, r = 8 on all linear layers, sst2, 32 examples.

An adapter is trained a few steps ("early") and some more ("late"). At both points every layer gives a random sample of its ranks:
``naive`` and ``exact`` score ranks of that sample, ``taylor`` and ``screened`` score all of them. Costs of a whole round are
extrapolated from the sample and say so; ``--ranks-per-layer 56`` scores every rank. One result a line, resumable.

    python benchmarks/scoring.py --data-dir DATA                  # DATA/sst2/train.jsonl
    python benchmarks/scoring.py --report
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import spearmanr
from torch import Tensor
from transformers import set_seed

from gatewise.losses import row_losses
from gatewise.models import load_model, load_tokenizer
from gatewise.scores import ablation, taylor
from gatewise.scores.ablation import Rank, ablate
from gatewise.sites import site
from gatewise.slots import lora_layers
from gatewise.tasks import PadCollator, Template, encode, load_records

HERE = Path(__file__).parent
STAGES = {"early": 10, "late": 100}
MODEL, PROMPT, RANK, ROWS, BATCH_SIZE, LEARNING_RATE = "smollm2-135m-instruct", "Review: {text}\nSentiment:", 8, 32, 16, 5e-4


def measure(data_dir: Path, results: Path, stages: list[str], per_layer: int, naive_per_layer: int) -> None:
    """Appends what is missing from the results file."""
    records, tokenizer = load_records(data_dir / "sst2" / "train.jsonl"), load_tokenizer(MODEL)
    features, collate = encode(records, tokenizer, Template(PROMPT)), PadCollator(tokenizer)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).tolist()
    validation = collate([features[i] for i in order[:ROWS]])
    for stage in stages:
        set_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_model(MODEL), config)
        rows = order[ROWS : ROWS + BATCH_SIZE * STAGES[stage]]
        train(model, [collate([features[i] for i in rows[at : at + BATCH_SIZE]]) for at in range(0, len(rows), BATCH_SIZE)])
        # One unmeasured pass: the first touch of fresh memory is slow on some machines.
        taylor(model, validation)
        for mode, score in (("taylor", taylor), ("screened", partial(ablation, mode="screened"))):
            if not find(results, stage, mode):
                scores, seconds = timed(partial(score, model, validation))
                values = {path: [float(f"{v:.9g}") for v in score.tolist()] for path, score in scores.items()}
                append(results, {"stage": stage, "mode": mode, "seconds": round(seconds, 3), "scores": values})
        for layer, ranks in sample(model, per_layer).items():
            for mode, count in (("exact", per_layer), ("naive", naive_per_layer)):
                wanted = ranks[:count]
                if wanted and not find(results, stage, mode, layer):
                    scores, seconds = timed(partial(ablate, model, validation, wanted, mode))
                    line = {"stage": stage, "mode": mode, "layer": layer, "ranks": wanted, "scores": scores.tolist()}
                    append(results, line | {"seconds": round(seconds, 3)})


def train(model: PeftModel, batches: list[dict[str, Tensor]]) -> None:
    """Plain AdamW with a linear decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / max(STAGES.values()))
        sums, counts = row_losses(model, batch)
        (sums.sum() / counts.sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def sample(model: PeftModel, per_layer: int) -> dict[int, list[Rank]]:
    """Layer -> random ranks of its modules, the same at every stage."""
    layers: dict[int, list[Rank]] = {}
    for path in lora_layers(model):
        layers.setdefault(site(path).layer or 0, []).extend((path, slot) for slot in range(RANK))
    generator = torch.Generator().manual_seed(1)
    return {
        layer: [ranks[i] for i in torch.randperm(len(ranks), generator=generator).tolist()[:per_layer]]
        for layer, ranks in layers.items()
    }


def report(results: Path) -> None:
    """Prints cost and agreement for each stage."""
    for stage in STAGES:
        lines = [line for line in read(results) if line["stage"] == stage]
        exact, naive = ({} for _ in range(2))
        for line in lines:
            for rank, score in zip(line.get("ranks", []), line["scores"], strict=False):
                (exact if line["mode"] == "exact" else naive)[tuple(rank)] = score
        seconds = {
            mode: sum(line["seconds"] for line in lines if line["mode"] == mode)
            for mode in ("taylor", "screened", "exact", "naive")
        }
        if not exact or not naive:
            continue
        whole = {line["mode"]: line["scores"] for line in lines if line["mode"] in ("taylor", "screened")}
        total = sum(map(len, whole["screened"].values()))
        full = {"naive": seconds["naive"] * total / len(naive), "exact": seconds["exact"] * total / len(exact)}
        full |= {mode: seconds[mode] for mode in ("screened", "taylor")}
        both = [rank for rank in naive if rank in exact]
        spread = max(naive.values()) - min(naive.values())
        error = max(abs(naive[rank] - exact[rank]) for rank in both)
        print(f"{stage}: after {STAGES[stage]} steps, {total} ranks, {ROWS} examples")
        notes = {
            "naive": f"extrapolated from {len(naive)} ranks" if len(naive) < total else "every rank",
            "exact": f"extrapolated from {len(exact)} ranks" if len(exact) < total else "every rank",
            "screened": f"{max(16, total // 32)} ranks ablated exactly, measured whole",
            "taylor": "first order alone, measured whole",
        }
        for mode, cost in full.items():
            print(f"  {mode:9} {cost:8.0f} s   {cost / full['naive']:7.4f} of naive   {forwards(mode, total):8}   {notes[mode]}")
        print(f"  exact against naive on the same {len(both)} ranks: largest difference {error / spread:.1e} of the spread")
        count = round(len(exact) / 8)
        lowest = set(sorted(exact, key=exact.__getitem__)[:count])
        for mode, scores in whole.items():
            values = {rank: scores[rank[0]][rank[1]] for rank in exact}
            same = len(lowest & set(sorted(values, key=values.__getitem__)[:count])) / count
            correlation = spearmanr([exact[r] for r in exact], [values[r] for r in exact]).statistic
            agreement = f"Spearman {correlation:.4f}, same lowest eighth {same:.1%} of {count}"
            print(f"  {mode} against exact on {len(exact)} ranks: {agreement}")


def forwards(mode: str, total: int) -> str:
    """Forward passes of the whole batch that a round takes, a backward counted as one."""
    return {"naive": str(2 * total), "exact": f"~{total}", "screened": f"~{4 + max(16, total // 32)}", "taylor": "4"}[mode]


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def find(results: Path, stage: str, mode: str, layer: int | None = None) -> bool:
    return any((line["stage"], line["mode"], line.get("layer")) == (stage, mode, layer) for line in read(results))


def append(results: Path, line: dict[str, Any]) -> None:
    print({key: value for key, value in line.items() if key not in ("scores", "ranks")}, flush=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Measures what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scoring.jsonl")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--ranks-per-layer", type=int, default=8)
    parser.add_argument("--naive-per-layer", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with sst2/train.jsonl")
        measure(options.data_dir, options.results, options.stages, options.ranks_per_layer, options.naive_per_layer)
    report(options.results)


if __name__ == "__main__":
    main()
