"""LoRA, ALoRA, PI-LoRA and AdaLoRA at the same final budget, with SmolLM2-135M.

Every run of a task and seed has the same rows in the same order, the same starting weights, steps, learning rate (but for
adalora-4x), number of ranks at the end and scale of a rank; only the method differs. sst2 and trec are measured by accuracy,
text2mdt (English guideline passages and their decision trees as lines of text) by the accuracy of each next token, all by the loss
too, on the whole dev split. Results are appended to a JSON-lines file as they come; a run that is already there is not repeated, so
the campaign can be stopped and started at will, and several processes may share it.

    python benchmarks/methods.py --data-dir DATA                  # DATA/sst2/train.jsonl, DATA/text2mdt/en_train.json, ...
    python benchmarks/methods.py --report                         # the tables from the results file; --plot FILE for the map
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_data import load_task, teacher_forced
from campaign import campaign, spread
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import TrainingArguments, set_seed

from gatewise import ConstantBudget, Cubic, RankAllocation
from gatewise.allocation.slots import ranks
from gatewise.models import load_model, load_tokenizer
from gatewise.progress import ConsoleProgress
from gatewise.runs.baselines import AdaLoraSchedule, to_plain_lora
from gatewise.runs.trainer import RecipeTrainer
from gatewise.sites import kind_key, site
from gatewise.tasks import PadCollator, encode, evaluate

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
    "max_exact": 8,  # ranks a round ablates exactly
}
# 300 passages, longer rows: fewer of them a step and in a scoring batch.
OF_TASK: dict[str, dict[str, Any]] = {
    "text2mdt": {"steps": 90, "batch_size": 8, "first_round": 30, "recover": 6, "validation_rows": 16, "max_exact": 0},
}
PI_LORA = {"score": "path_integral", "score_options": {"points": 4}, "module_pruning": True}
# What each method sets of RankAllocation, beside its schedule; None for no allocation at all.
METHODS: dict[str, dict[str, Any] | None] = {
    "lora": None,
    "alora": {"score": "ablation"},
    "pi-lora": PI_LORA,
    "pi-lora-cubic": PI_LORA,
    "moments": {"score": "path_moments"},
    "adalora": None,
    "adalora-4x": None,
}
# AdaLoRA's three factors start with zero singular values and learn more slowly than LoRA's two, so it also gets a rate of its own.
RATE = {"adalora-4x": 4}
INITIAL_RANK = 12  # of the methods whose budget comes down: one and a half times r
METRIC = {"sst2": "accuracy", "trec": "accuracy", "text2mdt": "token_accuracy"}


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Trains one adapter and measures it on the whole dev split."""
    s = {**SETTINGS, **OF_TASK.get(task, {})}
    s["learning_rate"] *= RATE.get(method, 1)
    train, dev, template = load_task(task, data_dir)
    tokenizer = load_tokenizer(s["model"])
    features = encode(train, tokenizer, template)
    # The scoring batch is drawn from the training rows and taken out of them: the dev split only measures.
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = [features[i] for i in order[: s["validation_rows"]]]
    rows = [features[i] for i in order[s["validation_rows"] :]]
    set_seed(seed)
    model: Any = adapted(load_model(s["model"], dtype=getattr(torch, s["dtype"])), method, s)
    collator = PadCollator(tokenizer)
    allocation = allocation_of(method, s, collator(held_out), seed)

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
            train_dataset=rows,
            eval_dataset=held_out,
            collator=collator,
            note={},
            callbacks=[
                *([allocation] if allocation else []),
                *([AdaLoraSchedule()] if is_adalora(method) else []),
                ConsoleProgress(Console()),
            ],
            group_by_length=True,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    if is_adalora(method):
        model = to_plain_lora(model)
    assert isinstance(model, PeftModel)
    if dev.kind == "generation":
        metrics = teacher_forced(model, encode(dev, tokenizer, template), collator)
    else:
        metrics = evaluate(model, tokenizer, dev, template, batch_size=64)
    history = allocation.history if allocation else []
    return {
        "task": task,
        "method": method,
        "seed": seed,
        METRIC[task]: round(metrics[METRIC[task]], 4),
        "loss": round(metrics["loss"], 4),
        "n": metrics["n"],
        "ranks": ranks(model),
        "parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "seconds": round(seconds, 1),
        "scoring_seconds": round(sum(one.seconds for one in history), 1),
        "rounds": [
            {
                "step": o.step, "loss_before": o.loss_before, "loss_after": o.loss_after, "budget": sum(o.ranks.values()),
                "modules": sum(rank > 0 for rank in o.ranks.values()),
            }
            for o in history
        ],
        "settings": {**s, "allocation": METHODS[method]},
    }  # fmt: skip


def is_adalora(method: str) -> bool:
    """Whether the method is PEFT's AdaLoRA, at any learning rate."""
    return method.startswith("adalora")


def adapted(base: Any, method: str, s: dict[str, Any]) -> Any:
    """The base model with the method's adapter at its start. alpha / r is that of LoRA whatever the initial rank."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    r = INITIAL_RANK if method == "pi-lora-cubic" or is_adalora(method) else s["r"]
    alpha = s["lora_alpha"] * r // s["r"]
    if is_adalora(method):
        # PEFT scales AdaLoRA by lora_alpha / init_r. The budget comes down over the steps in which the others have their rounds.
        config: LoraConfig = AdaLoraConfig(
            init_r=r, target_r=s["r"], lora_alpha=alpha, total_step=s["steps"], tinit=s["steps"] // 10,
            tfinal=s["steps"] - s["first_round"] - s["rounds"] * s["recover"], **common,
        )  # fmt: skip
    else:
        config = LoraConfig(r=r, lora_alpha=alpha, **common)
    return get_peft_model(base, config)


def allocation_of(method: str, s: dict[str, Any], batch: Any, seed: int) -> Any:
    """The method's rounds, or None where it has none."""
    own = METHODS[method]
    if own is None:
        return None
    own = dict(own)
    if own["score"] == "ablation":
        own["score_options"] = {"mode": "screened", "max_exact": s["max_exact"]}
    when = {name: s[name] for name in ("rounds", "first_round", "recover")}
    if method == "pi-lora-cubic":
        schedule: ConstantBudget | Cubic = Cubic(**when, target_rank=s["r"])
    else:
        schedule = ConstantBudget(**when, prune_fraction=s["prune_fraction"], grace_rounds=int(method != "alora"))
    return RankAllocation(
        schedule=schedule,
        budget="ranks",
        validation_batch=batch,
        seed=seed,
        on_round=lambda one: print(
            f"  round {one.round}: loss {one.loss_before:.4f} -> {one.loss_after:.4f}, {one.seconds:.0f} s", flush=True
        ),
        **own,
    )


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """Prints mean and spread by task and method, the paired differences to LoRA, and where the ranks went."""
    for task in dict.fromkeys(run["task"] for run in runs):
        cell = {(r["method"], r["seed"]): r for r in runs if r["task"] == task}
        metric = METRIC[task]
        print(f"{task} (dev, {next(iter(cell.values()))['n']} {'tokens' if metric == 'token_accuracy' else 'rows'})")
        for method in METHODS:
            group = [run for (m, _), run in cell.items() if m == method]
            if not group:
                continue
            right, loss = [100 * r[metric] for r in group], [r["loss"] for r in group]
            total = statistics.mean(sum(r["ranks"].values()) for r in group)
            modules = statistics.mean(sum(rank > 0 for rank in r["ranks"].values()) for r in group)
            size = statistics.mean(r["parameters"] for r in group) / 1e6
            took, scoring = (statistics.mean(r[key] for r in group) for key in ("seconds", "scoring_seconds"))
            print(
                f"  {method:13}  {metric} {spread(right, 1)}   loss {spread(loss, 3)}   ranks {total:.0f} in {modules:.0f} "
                f"modules   {size:.2f}M parameters   {took:.0f} s of which scoring {scoring:.0f} s   seeds {len(group)}"
            )
        for method in METHODS:
            pairs = [seed for (m, seed) in cell if m == method != "lora" and ("lora", seed) in cell]
            if pairs:
                gains = [100 * (cell[method, seed][metric] - cell["lora", seed][metric]) for seed in pairs]
                lower = [cell[method, seed]["loss"] - cell["lora", seed]["loss"] for seed in pairs]
                print(f"  {method} - lora, paired: {metric} {spread(gains, 1, True)}, loss {spread(lower, 3, True)}")
        everywhere = {path for run in cell.values() for path in run["ranks"]}
        for method in METHODS:
            moved = [run["ranks"] for (m, _), run in cell.items() if m == method != "lora"]
            kinds: dict[str, list[int]] = {}
            for one in moved:
                for path in everywhere:
                    kinds.setdefault(site(path).kind, []).append(one.get(path, 0))
            if moved:
                means = {kind: statistics.mean(kinds[kind]) for kind in sorted(kinds, key=kind_key)}
                print(f"  mean rank by kind, {method}: " + "  ".join(f"{kind} {value:.1f}" for kind, value in means.items()))
    if plot:
        _plot(runs, plot)


def _plot(runs: list[dict[str, Any]], out: Path) -> None:
    """Mean rank over seeds, layer by kind, one panel a task and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(run["task"] for run in runs if run["method"] == "pi-lora"))
    methods = [m for m in METHODS if m != "lora" and any(run["method"] == m for run in runs)]
    size = (3.2 * len(methods), 6.5 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(methods), figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    for axis, (task, method) in zip(axes.flat, [(t, m) for t in tasks for m in methods], strict=True):
        paths = [site(path) for path in next(r["ranks"] for r in runs if r["task"] == task and r["method"] == "lora")]
        group = [r["ranks"] for r in runs if r["task"] == task and r["method"] == method]
        if not group:
            axis.axis("off")
            continue
        kinds = sorted({p.kind for p in paths}, key=kind_key)
        grid = np.zeros((1 + max(p.layer or 0 for p in paths), len(kinds)))
        for p in paths:
            grid[p.layer or 0, kinds.index(p.kind)] = statistics.mean(one.get(p.path, 0) for one in group)
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=16)
        axis.set(title=f"{task}, {method}", xlabel=f"mean over {len(group)} seed{'s' * (len(group) > 1)}", ylabel="layer")
        axis.set_xticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="rank (LoRA: 8 everywhere)")
    figure.savefig(out, dpi=90)


def _told(run: dict[str, Any]) -> str:
    metric = METRIC[run["task"]]
    return f"{metric} {run[metric]}, loss {run['loss']}, {run['seconds']} s"


if __name__ == "__main__":
    campaign(__doc__, "methods.jsonl", ["trec", "text2mdt"], METHODS, one_run, _told, report)
