"""ALoRA against LoRA at the same budget, on sentence classification with SmolLM2-135M.

Every run differs from its pair in one thing only: whether ``RankAllocation`` is there. Same data order, same starting weights, same
steps, learning rate and number of ranks. Results are appended to a JSON-lines file as they come; a run that is already there is
not repeated, so the campaign can be stopped and started at will.

    python benchmarks/alora_vs_lora.py --data-dir DATA            # DATA/sst2/train.jsonl, DATA/sst2/dev.jsonl, DATA/trec/...
    python benchmarks/alora_vs_lora.py --report                   # the table and the map from the results file
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEMPLATES = {"sst2": "Review: {text}\nSentiment:", "trec": "Question: {text}\nType of answer:"}
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "dtype": "bfloat16",
    "r": 8,
    "lora_alpha": 16,
    "steps": 120,
    "batch_size": 16,
    "learning_rate": 5e-4,
    "warmup_steps": 8,
    "rounds": 6,
    "first_round": 40,
    "recover": 8,
    "prune_fraction": 1 / 8,
    "validation_rows": 32,
    "max_exact": 8,  # ranks a round ablates exactly; benchmarks/scoring.py shows how little the others need it
}


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Trains one adapter and measures it on the whole dev split."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, TrainingArguments, set_seed

    from gatewise.allocation import RankAllocation
    from gatewise.models import load_model, load_tokenizer
    from gatewise.slots import ranks
    from gatewise.tasks import PadCollator, Template, encode, evaluate, load_records
    from gatewise.training import RecipeTrainer

    s = SETTINGS
    train = load_records(data_dir / task / "train.jsonl")
    dev = load_records(data_dir / task / "dev.jsonl", labels=train.labels)
    template = Template(TEMPLATES[task])
    tokenizer = load_tokenizer(s["model"])
    features = encode(train, tokenizer, template)
    # The scoring batch is drawn from the training rows and taken out of them: the dev split only measures.
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [features[i] for i in order[: s["validation_rows"]]]
    rows = [features[i] for i in order[s["validation_rows"] :]]
    set_seed(seed)
    model = load_model(s["model"], dtype=getattr(torch, s["dtype"]))
    config = LoraConfig(r=s["r"], lora_alpha=s["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    collator = PadCollator(tokenizer)
    allocation = RankAllocation(
        score="ablation",
        rounds=s["rounds"],
        first_round=s["first_round"],
        recover=s["recover"],
        prune_fraction=s["prune_fraction"],
        validation_batch=collator(held_out),
        score_options={"mode": "screened", "max_exact": s["max_exact"]},
        seed=seed,
        on_round=lambda one: print(
            f"  round {one.round}: loss {one.loss_before:.4f} -> {one.loss_after:.4f}, {one.seconds:.0f} s", flush=True
        ),
    )

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                print(
                    f"  step {state.global_step}: loss {float(logs['loss']):.4f}, {time.perf_counter() - began:.0f} s", flush=True
                )

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=s["steps"],
            per_device_train_batch_size=s["batch_size"],
            learning_rate=s["learning_rate"],
            warmup_steps=s["warmup_steps"],
            lr_scheduler_type="linear",
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_steps=20,
            disable_tqdm=True,
        )
        trainer = RecipeTrainer(
            model=model,
            args=arguments,
            train=rows,
            dev=held_out,
            collator=collator,
            note={},
            callbacks=[*([allocation] if method == "alora" else []), Told()],
            group_by_length=True,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    metrics = evaluate(model, tokenizer, dev, template, batch_size=64)
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "accuracy": round(metrics["accuracy"], 4),
        "loss": round(metrics["loss"], 4),
        "n": metrics["n"],
        "ranks": ranks(model),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(seconds, 1),
        "scoring_seconds": round(sum(one.seconds for one in allocation.history), 1),
        "rounds": [
            {"step": o.step, "loss_before": o.loss_before, "loss_after": o.loss_after, "budget": sum(o.ranks.values())}
            for o in allocation.history
        ],
        "settings": s,
    }


def read(results: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line cut off by an interruption is left out."""
    runs = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else []:
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return runs


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """Prints mean and spread by task and method, the paired differences, and where the ranks went."""
    from gatewise.sites import kind_key, site

    for task in dict.fromkeys(run["task"] for run in runs):
        cell = {(r["method"], r["seed"]): r for r in runs if r["task"] == task}
        print(f"{task} (dev, {next(iter(cell.values()))['n']} rows)")
        for method in ("lora", "alora"):
            group = [run for (m, _), run in cell.items() if m == method]
            if not group:
                continue
            accuracy, loss = [100 * r["accuracy"] for r in group], [r["loss"] for r in group]
            total = statistics.mean(sum(r["ranks"].values()) for r in group)
            size = statistics.mean(r["parameters"] for r in group) / 1e6
            print(
                f"  {method:5}  accuracy {_spread(accuracy, 1)}   loss {_spread(loss, 3)}   ranks {total:.0f}   "
                f"{size:.2f}M parameters   {statistics.mean(r['seconds'] for r in group):.0f} s of which scoring "
                f"{statistics.mean(r['scoring_seconds'] for r in group):.0f} s   seeds {len(group)}"
            )
        pairs = [seed for (method, seed) in cell if method == "alora" and ("lora", seed) in cell]
        if pairs:
            gains = [100 * (cell["alora", seed]["accuracy"] - cell["lora", seed]["accuracy"]) for seed in pairs]
            lower = [cell["alora", seed]["loss"] - cell["lora", seed]["loss"] for seed in pairs]
            print(f"  ALoRA - LoRA, paired: accuracy {_spread(gains, 1, True)}, loss {_spread(lower, 3, True)}")
        moved = [run["ranks"] for (method, _), run in cell.items() if method == "alora"]
        if moved:
            kinds: dict[str, list[int]] = {}
            for one in moved:
                for path in next(r["ranks"] for r in cell.values() if r["method"] == "lora"):
                    kinds.setdefault(site(path).kind, []).append(one.get(path, 0))
            means = {kind: statistics.mean(kinds[kind]) for kind in sorted(kinds, key=kind_key)}
            print("  mean rank by kind: " + "  ".join(f"{kind} {value:.1f}" for kind, value in means.items()))
    if plot:
        _plot(runs, plot)


def _spread(values: list[float], digits: int, sign: bool = False) -> str:
    mark = "+" if sign else ""
    deviation = f" (sd {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{mark}.{digits}f}{deviation}"


def _plot(runs: list[dict[str, Any]], out: Path) -> None:
    """Mean rank over seeds, layer by kind, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from gatewise.sites import kind_key, site

    tasks = list(dict.fromkeys(run["task"] for run in runs if run["method"] == "alora"))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 8), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        paths = [site(path) for path in next(r["ranks"] for r in runs if r["task"] == task and r["method"] == "lora")]
        group = [r["ranks"] for r in runs if r["task"] == task and r["method"] == "alora"]
        kinds = sorted({p.kind for p in paths}, key=kind_key)
        grid = np.zeros((1 + max(p.layer or 0 for p in paths), len(kinds)))
        for p in paths:
            grid[p.layer or 0, kinds.index(p.kind)] = statistics.mean(one.get(p.path, 0) for one in group)
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=16)
        axis.set(title=f"{task}: mean rank over {len(group)} seeds", xlabel="module", ylabel="layer")
        axis.set_xticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=axes[0].tolist(), label="rank (LoRA: 8 everywhere)")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Runs what is missing from the campaign, or reports it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "alora_vs_lora.jsonl")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with sst2/train.jsonl, sst2/dev.jsonl and so on")
        done = {(run["task"], run["method"], run["seed"]) for run in read(options.results)}
        for seed in options.seeds:
            for task in options.tasks:
                for method in ("lora", "alora"):
                    if (task, method, seed) in done:
                        continue
                    print(f"{task} {method} seed {seed}", flush=True)
                    run = one_run(task, method, seed, options.data_dir)
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(run) + "\n")
                    print(f"  accuracy {run['accuracy']}, loss {run['loss']}, {run['seconds']} s", flush=True)
    report(read(options.results), options.plot)


if __name__ == "__main__":
    main()
