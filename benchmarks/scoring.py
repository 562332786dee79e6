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

from gatewise.allocation.fast_ablation import Rank, exact
from gatewise.allocation.scores.ablation import naive
from gatewise.allocation.slots import lora_layers
from gatewise.losses import row_losses
from gatewise.models import load_model, load_tokenizer
from gatewise.scores import ablation, taylor
from gatewise.sites import site
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
        for mode, score, count in (("naive", naive, naive_per_layer), ("exact", exact, per_layer)):
            if not find(results, stage, mode):
                ranks = sample(model, count)
                scores, seconds = timed(partial(score, model, validation, ranks))
                line = {"stage": stage, "mode": mode, "seconds": round(seconds, 3), "ranks": ranks, "scores": scores.tolist()}
                append(results, line)


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


def sample(model: PeftModel, per_layer: int) -> list[Rank]:
    """Random ranks of every layer, the same at every stage; a smaller sample is part of a larger one."""
    layers: dict[int, list[Rank]] = {}
    for path in lora_layers(model):
        layers.setdefault(site(path).layer or 0, []).extend((path, slot) for slot in range(RANK))
    generator = torch.Generator().manual_seed(1)
    drawn = [[ranks[i] for i in torch.randperm(len(ranks), generator=generator).tolist()] for ranks in layers.values()]
    return [rank for ranks in drawn for rank in ranks[:per_layer]]


def report(results: Path) -> None:
    """Prints cost and agreement for each stage."""
    for stage in STAGES:
        lines = {line["mode"]: line for line in read(results) if line["stage"] == stage}
        if lines.keys() < {"taylor", "screened", "naive", "exact"}:
            continue
        naive, exact = (by_rank(lines[mode]) for mode in ("naive", "exact"))
        total = sum(map(len, lines["taylor"]["scores"].values()))
        ablated = max(16, total // 64)
        # Forward passes over the whole batch, a backward counted as one; exact and screened rerun about half of the layers.
        forwards = {"naive": 2 * total, "exact": total, "screened": 4 + ablated, "taylor": 4}
        reference = lines["naive"]["seconds"] * total / len(naive)
        print(f"{stage}: after {STAGES[stage]} steps, {total} ranks, {ROWS} examples, {lines['naive'].get('threads')} threads")
        for mode, count in forwards.items():
            measured = len(lines[mode].get("ranks", [])) or total
            seconds = lines[mode]["seconds"] * total / measured
            note = "measured whole" if measured == total else f"extrapolated from {measured} ranks"
            print(f"  {mode:9}{seconds:8.0f} s  {seconds / reference:7.4f} of naive  ~{count:4} forwards  {note}")
        both = [rank for rank in naive if rank in exact]
        spread = max(naive.values()) - min(naive.values())
        error = max(abs(naive[rank] - exact[rank]) for rank in both) / spread
        print(
            f"  exact against naive: {agreement(naive, {r: exact[r] for r in both})}; largest difference {error:.1e} of the spread"
        )
        for mode in ("taylor", "screened"):
            scores = lines[mode]["scores"]
            print(f"  {mode} against exact: {agreement(exact, {(path, slot): scores[path][slot] for path, slot in exact})}")
            share = likely_overlap(scores, exact)
            print(f"    over all {total} ranks, were errors everywhere as on the sample: {share:.1%} of the pruned the same")


def likely_overlap(scores: dict[str, list[float]], exact: dict[Rank, float], draws: int = 200) -> float:
    """Share of the eighth pruned by ``scores`` that the exact scores would prune too, were errors everywhere as on the sample."""
    everything = torch.tensor([value for values in scores.values() for value in values], dtype=torch.float64)
    errors = torch.tensor([score - scores[path][slot] for (path, slot), score in exact.items()], dtype=torch.float64)
    count, generator = len(everything) // 8, torch.Generator().manual_seed(0)
    chosen = set(everything.argsort()[:count].tolist())
    shares = []
    for _ in range(draws):
        drawn = errors[torch.randint(len(errors), (len(everything),), generator=generator)]
        shares.append(len(chosen & set((everything + drawn).argsort()[:count].tolist())) / count)
    return sum(shares) / draws


def by_rank(line: dict[str, Any]) -> dict[Rank, float]:
    return {(path, slot): score for (path, slot), score in zip(line["ranks"], line["scores"], strict=True)}


def agreement(reference: dict[Rank, float], other: dict[Rank, float]) -> str:
    """Spearman, and the overlap of the eighth that each would prune, over the ranks of ``other``."""
    ranks = list(other)
    count = max(1, round(len(ranks) / 8))
    lowest, same = (set(sorted(ranks, key=scores.__getitem__)[:count]) for scores in (reference, other))
    correlation = spearmanr([reference[r] for r in ranks], [other[r] for r in ranks]).statistic
    return f"{len(ranks)} ranks, Spearman {correlation:.4f}, {len(lowest & same)} of the lowest {count} the same"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def find(results: Path, stage: str, mode: str) -> bool:
    return any((line["stage"], line["mode"]) == (stage, mode) for line in read(results))


def append(results: Path, line: dict[str, Any]) -> None:
    line["threads"] = torch.get_num_threads()
    print({key: value for key, value in line.items() if key not in ("scores", "ranks")}, flush=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Measures what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scoring.jsonl")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--ranks-per-layer", type=int, default=4)
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
