"""Does MiLoRA learn? LoRA, DoRA and MiLoRA with one or three modules a layer, one task at a time and two at once, SmolLM2-135M.

Multiple choice: arc_easy, openbookqa, and both mixed (twice the steps). ``untrained`` is the base model. All methods have the same
rows in the same order, rank, learning rate, steps and, but for the last two, lora_alpha. MiLoRA's gates add up to one in a
layer, so that a module kept with two others has about a third of LoRA's scale; ``-scaled`` has three times the alpha. The first
three route by the pooled states as they are, as the paper does; ``-centred``, scaled too, by what is a prompt's own. The
coefficients of its rational activation learn on 64 rows set aside, which no method trains on. Accuracy and loss are those of the
whole dev split of each task, and the routing is that of its prompts. Results are appended to a JSON-lines file as they come; a run
that is already there is not repeated, so the campaign can be stopped and started at will, and several processes may share it.

    python benchmarks/milora.py --data-dir DATA                  # DATA/arc_easy/train.jsonl, DATA/openbookqa/dev.jsonl, ...
    python benchmarks/milora.py --report                         # the tables from the results file
"""

import itertools
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from campaign import campaign, spread
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from gatewise import RoutedLoraConfig
from gatewise.bilevel import BilevelMixin
from gatewise.inspection.routing import routing_of_rows
from gatewise.models import load_model, load_tokenizer
from gatewise.routed import ACTIVATION_PARAMETERS
from gatewise.runs.trainer import RecipeTrainer
from gatewise.sites import kind_key, site
from gatewise.tasks import PadCollator, default_template, encode, evaluate, load_records

SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "dtype": "float32",  # on CPUs without AMX twice as fast as bfloat16
    "r": 8,
    "lora_alpha": 16,
    "steps": 80,  # a task
    "batch_size": 8,
    "learning_rate": 5e-4,
    "warmup_steps": 8,
    "validation_rows": 64,
    "activation_learning_rate": 1e-6,
    "activation_every": 4,
}
METHODS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "lora": {},
    "dora": {"use_dora": True},
    "milora-k1": {"top_k": 1, "center_states": False},
    "milora-k3": {"top_k": 3, "center_states": False},
    "milora-k3-scaled": {"top_k": 3, "center_states": False, "lora_alpha": 48},
    "milora-k3-centred": {"top_k": 3, "lora_alpha": 48},
}
SINGLE = ("arc_easy", "openbookqa")
TASKS = {**{task: (task,) for task in SINGLE}, "both": SINGLE}


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Trains one adapter and measures it on the dev split of every task that it was trained on."""
    s, own = SETTINGS, METHODS[method]
    draw = random.Random(seed)
    tokenizer = load_tokenizer(s["model"])
    rows: list[Any] = []
    for name in TASKS[task]:
        records = load_records(data_dir / name / "train.jsonl")
        features = list(encode(records, tokenizer, default_template(records)))
        draw.shuffle(features)
        rows += features[: s["steps"] * s["batch_size"] + s["validation_rows"]]
    draw.shuffle(rows)
    held_out, rows = rows[: s["validation_rows"]], rows[s["validation_rows"] :]
    set_seed(seed)
    model = adapted(load_model(s["model"], dtype=getattr(torch, s["dtype"])), method, s, own)
    routed = method.startswith("milora")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=s["steps"] * len(TASKS[task]),
            per_device_train_batch_size=s["batch_size"],
            learning_rate=s["learning_rate"],
            warmup_steps=s["warmup_steps"],
            lr_scheduler_type="linear",
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        common: dict[str, Any] = {
            "model": model, "args": arguments, "train_dataset": rows, "eval_dataset": held_out,
            "collator": PadCollator(tokenizer), "note": {}, "callbacks": [], "group_by_length": True,
        }  # fmt: skip
        if routed:
            trainer: RecipeTrainer = type("TwoLevels", (BilevelMixin, RecipeTrainer), {})(
                upper_dataset=held_out,
                upper_parameters=ACTIVATION_PARAMETERS,
                upper_learning_rate=s["activation_learning_rate"],
                upper_every=s["activation_every"],
                **common,
            )
        else:
            trainer = RecipeTrainer(**common)
        began = time.perf_counter()
        if method != "untrained":
            trainer.train()
        seconds = time.perf_counter() - began
    measured, routing = {}, {}
    for name in TASKS[task]:
        dev = load_records(data_dir / name / "dev.jsonl")
        metrics = evaluate(model, tokenizer, dev, default_template(dev), batch_size=64)
        measured[name] = {key: round(value, 4) for key, value in metrics.items()}
        if routed:
            chosen = routing_of_rows(model, tokenizer, list(encode(dev, tokenizer, default_template(dev))), 64)
            routing[name] = {
                "share": {one.path: round(one.share, 4) for one in chosen.modules},
                "distinct": round(chosen.distinct, 2),
                "agreement": round(chosen.agreement, 4),
            }
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "metrics": measured,
        "routing": routing,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if "lora_" in name),
        "seconds": round(seconds, 1),
        "settings": s | own,
    }


def adapted(base: Any, method: str, s: dict[str, Any], own: dict[str, Any]) -> Any:
    """The base model with the method's adapter at its start."""
    kind = RoutedLoraConfig if method.startswith("milora") else LoraConfig
    settings = {"r": s["r"], "lora_alpha": s["lora_alpha"], **own}
    return get_peft_model(base, kind(target_modules="all-linear", task_type="CAUSAL_LM", **settings))


def report(runs: list[dict[str, Any]], _: Path | None) -> None:
    """Prints mean and spread by task and method, the paired differences to LoRA, and how much the routing looks at the prompt."""
    for task in TASKS:
        cell = {(r["method"], r["seed"]): r for r in runs if r["task"] == task}
        for name in TASKS[task] if cell else ():
            print(f"{name} (dev, {next(iter(cell.values()))['metrics'][name]['n']} rows), trained on {' and '.join(TASKS[task])}")
            for method in METHODS:
                group = [run for (m, _), run in cell.items() if m == method]
                if not group:
                    continue
                right, norm = ([100 * r["metrics"][name][key] for r in group] for key in ("accuracy", "accuracy_norm"))
                loss = [r["metrics"][name]["loss"] for r in group]
                line = (
                    f"  {method:17} accuracy {spread(right, 1)}   by length {spread(norm, 1)}   loss {spread(loss, 3)}   "
                    f"{statistics.mean(r['parameters'] for r in group) / 1e6:.2f}M parameters   "
                    f"{statistics.mean(r['seconds'] for r in group):.0f} s"
                )
                pairs = [seed for (m, seed) in cell if m == method != "lora" and ("lora", seed) in cell]
                if pairs:
                    gains, lower = (
                        [factor * (cell[method, p]["metrics"][name][key] - cell["lora", p]["metrics"][name][key]) for p in pairs]
                        for key, factor in (("accuracy", 100), ("loss", 1))
                    )
                    line += f"   - lora, paired: {spread(gains, 1, True)}, loss {spread(lower, 3, True)}"
                print(f"{line}   seeds {len(group)}")
                routing = [r["routing"][name] for r in group if r["routing"]]
                if routing:
                    print(
                        f"    routing: {statistics.mean(r['distinct'] for r in routing):.1f} different choices a layer, agreement "
                        f"of two prompts {statistics.mean(r['agreement'] for r in routing):.2f}"
                    )
    _print_overlap(runs)


def _print_overlap(runs: list[dict[str, Any]]) -> None:
    """How many of the modules that most prompts keep the prompts of two tasks or two adapters share; and who keeps what."""
    for method, both in itertools.product(METHODS, (False, True)):
        group = [run for run in runs if run["method"] == method and run["routing"] and (run["task"] == "both") == both]
        shares = {(task, run["seed"]): one["share"] for run in group for task, one in run["routing"].items()}
        kept = {key: {path for path, share in found.items() if share > 0.5} for key, found in shares.items()}
        pairs = list(itertools.combinations(kept, 2))
        trained = "trained on both" if both else "trained on one task"
        for name, alike in (
            ("the same seed, on the two tasks", lambda a, b: a[1] == b[1]),
            ("two seeds", lambda a, b: a[1] != b[1]),
        ):
            shared = [len(kept[a] & kept[b]) / max(1, len(kept[a])) for a, b in pairs if alike(a, b)]
            if shared:
                print(
                    f"{method} {trained}: adapters of {name} keep {100 * statistics.mean(shared):.0f}% of their modules in common"
                )
        kinds = sorted({(*kind_key(site(path).kind), site(path).kind) for found in shares.values() for path in found})
        for *_, kind in kinds if both else ():
            means = [
                statistics.mean(share for path, share in found.items() if site(path).kind == kind) for found in shares.values()
            ]
            print(f"  {kind}: kept by {100 * min(means):.0f}% to {100 * max(means):.0f}% of prompts and layers")


if __name__ == "__main__":
    campaign(__doc__, "milora.jsonl", TASKS, METHODS, one_run, lambda run: f"{run['metrics']}, {run['seconds']} s", report)
