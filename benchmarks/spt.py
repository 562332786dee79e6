"""SPT against guessed layers, PEFT's soft prompts and LoRA: does the search find better layers than chance, and the same again?

    spt           SPT-DARTS, weights on one half of the rows and gates on the other; then the chosen layers, from scratch on all
    spt-long      the same with a search of four times the steps
    spt-plain     spt without its two additions: gates not re-parameterised, no consistency
    first, last, spread, random-0, random-1 ...    the same number of layers, guessed; the random sets of a seed are all layers in
                  random order, cut into pieces, so that each layer is in one of them
    prompt-tuning, prefix-tuning    through PEFT, as many prompt tokens
    lora          on all linear layers, at the rank whose parameters come closest to SPT's
    lora-low      the same at a quarter of the learning rate, added once lora had failed to train in two runs; minilm-l6 only

Each on minilm-l6 (a classifier with a fresh head) and smollm2-135m-instruct (writing the label), on all training rows or on
100 ("few"), measured on the whole dev split. The learning rates were set beforehand and, but for lora-low, not tuned on these
tasks; runs of one model, data set, size and seed have the same rows, order and steps, and the same head at the start. Results
are appended to a JSON-lines file as they come; a run that is there is not repeated, so the campaign can be stopped and started
at will, and several processes may share it.

    python benchmarks/spt.py --data-dir DATA                      # DATA/sst2/train.jsonl, DATA/sst2/dev.jsonl, ...
    python benchmarks/spt.py --data-dir DATA --tasks smollm2-135m-instruct/trec/few
    python benchmarks/spt.py --report                             # the tables from the results file
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from benchmark_data import load_task, shuffled
from campaign import campaign, spread
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments, set_seed

from gatewise import SelectivePromptConfig
from gatewise.models import load_model, load_tokenizer
from gatewise.prompts import search
from gatewise.prompts.darts import SearchMixin
from gatewise.prompts.method import fixed_layers
from gatewise.runs.trainer import RecipeTrainer
from gatewise.tasks import PadCollator, encode, encode_classification, evaluate

COMMON: dict[str, Any] = {
    "num_prompt_tokens": 10,
    "bottleneck": 64,
    "batch_size": 16,
    "warmup_ratio": 0.06,
    "gate_learning_rate": 1e-2,
    "consistency": 1.0,
    "drop": 0.5,
    "few": 100,
}
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "task": "classification",
        "layers": 6,
        "keep": 2,
        "steps": {"full": 400, "few": 200},
        "learning_rate": {"spt": 2e-3, "prompt-tuning": 1e-2, "prefix-tuning": 1e-2, "lora": 2e-3, "lora-low": 5e-4},
    },
    "smollm2-135m-instruct": {
        "task": "causal",
        "layers": 30,
        "keep": 6,
        "drop": 0.8,  # 1 - keep / layers, as docs/spt.md advises
        "steps": {"full": 120, "few": 80},
        "learning_rate": {"spt": 2e-3, "prompt-tuning": 3e-2, "prefix-tuning": 1e-2, "lora": 5e-4},
    },
}
SEARCHED = ("spt", "spt-long", "spt-plain")
LONG = 4  # times the steps of the training
RANDOM = tuple(f"random-{number}" for number in range(5))
FIXED = ("first", "last", "spread", *RANDOM)
OTHERS = ("prompt-tuning", "prefix-tuning", "lora", "lora-low")
METHODS = (*SEARCHED, *FIXED, *OTHERS)
COMPARED = (*SEARCHED, "first", "last", "spread", *OTHERS)
DATA = ("sst2", "mr", "subj", "trec", "rte")
SIZES = ("full", "few")
TASKS = ["/".join(parts) for parts in product(MODELS, DATA, SIZES)]
# In tokens. The longest prompt takes positions too, and all methods read the same tokens.
LENGTH = 256


@dataclass
class Cell:
    """What a run starts from; ``fresh`` makes the base model anew, the same each time."""

    settings: dict[str, Any]
    rows: list[Any]
    dev: Any
    template: Any
    tokenizer: Any
    collator: Any
    fresh: Callable[[], Any]


def prepared(task: str, method: str, seed: int, data_dir: Path) -> Cell:
    """Rows, settings and base model of a run."""
    name, data, size = task.split("/")
    s = {**COMMON, **MODELS[name]}
    s["steps"] = s["steps"][size]
    s["learning_rate"] = s["learning_rate"].get(method, s["learning_rate"]["spt"])
    if method.startswith("spt-long"):
        s["search_steps"] = LONG * s["steps"]
    train, dev, template = load_task(data, data_dir)
    if size == "few":
        train = shuffled(train, seed, s["few"])
    tokenizer = load_tokenizer(name)
    classification = s["task"] == "classification"
    rows: list[Any] = list(
        encode_classification(train, tokenizer, max_length=LENGTH)
        if classification
        else encode(train, tokenizer, template, max_length=LENGTH)
    )

    def fresh() -> Any:
        set_seed(seed)
        return load_model(
            name,
            task=s["task"],
            num_labels=len(train.labels or ()) if classification else None,
            dtype=torch.float32,  # on CPUs without AMX faster than bfloat16
        )

    return Cell(s, rows, dev, None if classification else template, tokenizer, PadCollator(tokenizer), fresh)


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any] | None:
    """Searches where the method does, trains one adapter and measures it on the whole dev split; None without such a method."""
    model_settings = MODELS[task.partition("/")[0]]
    if method in RANDOM[model_settings["layers"] // model_settings["keep"] :]:
        return None
    if method == "lora-low" and method not in model_settings["learning_rate"]:
        return None
    cell = prepared(task, method, seed, data_dir)
    s = cell.settings
    found: dict[str, Any] = {"layers": None}
    if method in SEARCHED:
        found = searched(adapted(cell.fresh(), "spt", s, None), cell, seed, additions=method != "spt-plain")
    elif method in FIXED:
        found = {"layers": guessed(method, seed, s)}
    set_seed(seed)
    model = adapted(cell.fresh(), method, s, found["layers"])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = recipe_trainer(model, cell.rows, cell.collator, arguments(folder, seed, s))
        set_seed(seed)
        trainer.train()
    seconds = time.perf_counter() - began
    metrics = evaluate(model, cell.tokenizer, cell.dev, cell.template, batch_size=64, max_length=LENGTH)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "modules_to_save" in name)
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "accuracy": round(metrics["accuracy"], 4),
        "loss": round(metrics["loss"], 4),
        "n": metrics["n"],
        "parameters": sum(trained.values()) - head,
        "head_parameters": head,
        "search_seconds": 0.0,
        "seconds": round(seconds, 1),
        **found,
        "settings": s,
    }


def searched(model: Any, cell: Cell, seed: int, additions: bool) -> dict[str, Any]:
    """The layers that SPT-DARTS chooses for its network, what it saw, and what it took."""
    s = {**cell.settings}
    s["steps"] = s.get("search_steps", s["steps"])

    class Search(SearchMixin, RecipeTrainer):
        """The search of a run."""

    def trainer(model: Any, args: Any, train_dataset: Any, **more: Any) -> Any:
        return recipe_trainer(model, train_dataset, cell.collator, args, Search, **more)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        found = search(
            model,
            cell.rows,
            arguments(folder, seed, s),
            keep=s["keep"],
            trainer_class=trainer,
            upper_learning_rate=s["gate_learning_rate"],
            reparameterise=additions,
            consistency=s["consistency"] if additions else 0.0,
            drop=s["drop"],
        )
    tenth = max(1, s["steps"] // 10)
    return {
        "layers": found.layers,
        "gates": [round(gate, 4) for gate in found.gates[-1].tolist()],
        "trajectory": [[round(gate, 4) for gate in gates] for gates in found.gates[::tenth].tolist()],
        "search_seconds": round(time.perf_counter() - began, 1),
    }


def guessed(method: str, seed: int, s: dict[str, Any]) -> list[int]:
    """The layers of a fixed choice."""
    choice, _, number = method.partition("-")
    if choice != "random":
        return fixed_layers(choice, s["keep"], s["layers"])
    order = random.Random(seed).sample(range(s["layers"]), s["layers"])
    return sorted(order[int(number) * s["keep"] :][: s["keep"]])


def adapted(base: Any, method: str, s: dict[str, Any], layers: list[int] | None) -> Any:
    """The base model with the method's adapter at its start; without layers SPT's is the network to be searched."""
    task = "SEQ_CLS" if s["task"] == "classification" else "CAUSAL_LM"
    config: Any
    if method.startswith("lora"):
        config = LoraConfig(r=equal_rank(base, s), lora_alpha=16, target_modules="all-linear", task_type=task)
    elif method == "prompt-tuning":
        config = PromptTuningConfig(num_virtual_tokens=s["num_prompt_tokens"], prompt_tuning_init="SAMPLE_VOCAB", task_type=task)
    elif method == "prefix-tuning":
        config = PrefixTuningConfig(num_virtual_tokens=s["num_prompt_tokens"], task_type=task)
    else:
        config = SelectivePromptConfig(
            num_prompt_tokens=s["num_prompt_tokens"], bottleneck=s["bottleneck"], prompt_layers=layers, task_type=task
        )
    return get_peft_model(base, config)


def equal_rank(base: Any, s: dict[str, Any]) -> int:
    """LoRA's rank, on all linear layers but the head, whose parameters come closest to those of SPT's generators."""
    wanted = 2 * s["keep"] * s["bottleneck"] * base.config.hidden_size
    heads = ("classifier", "score", "lm_head")
    linear = [m for name, m in base.named_modules() if isinstance(m, nn.Linear) and name.rpartition(".")[2] not in heads]
    return max(1, round(wanted / sum(m.in_features + m.out_features for m in linear)))


def recipe_trainer(model: Any, rows: list[Any], collator: Any, args: Any, kind: Any = RecipeTrainer, **more: Any) -> Any:
    """A Trainer with the loss of gatewise's own runs."""
    common = {"train_dataset": rows, "eval_dataset": [], "collator": collator, "note": {}, "callbacks": []}
    return kind(model=model, args=args, group_by_length=True, **common, **more)


def arguments(folder: str, seed: int, s: dict[str, Any]) -> Any:
    """The same for search and training."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=s["steps"],
        per_device_train_batch_size=s["batch_size"],
        learning_rate=s["learning_rate"],
        warmup_steps=round(s["warmup_ratio"] * s["steps"]),
        lr_scheduler_type="linear",
        seed=seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )


# The report -----------------------------------------------------------------------------------------------------------


def report(runs: list[dict[str, Any]], _: Path | None) -> None:
    """First whether the search beats chance and agrees with itself, then every method's numbers."""
    for model, size in product(MODELS, SIZES):
        group = [
            {**run, "task": run["task"].split("/")[1]}
            for run in runs
            if run["task"].startswith(f"{model}/") and run["task"].endswith(f"/{size}")
        ]
        if group:
            s = group[0]["settings"]
            print(f"\n{model}, {'all rows' if size == 'full' else '100 rows'}: {s['keep']} of {s['layers']} layers")
            _against_chance(group)
            _agreement(group)
            _by_layer(group)
            _methods(group)


def _against_chance(runs: list[dict[str, Any]]) -> None:
    """Every method less the mean and less the best of the random sets of a seed: accuracy in points, paired by task and seed."""
    print("  Does the search beat random sets of layers? (accuracy in points, and loss; and what the others are to those sets)")
    for method in COMPARED:
        mean_gains: list[float] = []
        best_gains: list[float] = []
        lower: list[float] = []
        for task, cells in _by_task(runs):
            means, bests = [], []
            for seed in [seed for m, seed in cells if m == method]:
                guesses = [cells[r, seed] for r in RANDOM if (r, seed) in cells]
                if guesses:
                    own, drawn = cells[method, seed], [run["accuracy"] for run in guesses]
                    means.append(100 * (own["accuracy"] - statistics.mean(drawn)))
                    # Which set is best is known only afterwards: what the search is up against at most.
                    bests.append(100 * (own["accuracy"] - max(drawn)))
                    lower.append(own["loss"] - statistics.mean(run["loss"] for run in guesses))
            mean_gains += means
            best_gains += bests
            if means and method in SEARCHED:
                print(f"    {method:13} {task:5} - mean {_spread(means, True)}   - best {_spread(bests, True)}")
        if mean_gains:
            wins = sum(gain > 0 for gain in mean_gains) + sum(gain == 0 for gain in mean_gains) / 2
            print(
                f"    {method:13} all   - mean {_spread(mean_gains, True)}   - best {_spread(best_gains, True)}   loss - mean "
                f"{statistics.mean(lower):+.4f}   better than the mean in {wins:g} of {len(mean_gains)} runs"
            )


def _agreement(runs: list[dict[str, Any]]) -> None:
    """How many layers two searches of a task share, by pairs of seeds; and two tasks of a seed."""
    print("  Do searches agree? (share of chosen layers in common; chance is keep / layers)")
    s = runs[0]["settings"]
    for method in SEARCHED:
        chosen = {(run["task"], run["seed"]): set(run["layers"]) for run in runs if run["method"] == method}
        seeds = [len(chosen[a] & chosen[b]) / s["keep"] for a, b in combinations(chosen, 2) if a[0] == b[0]]
        tasks = [len(chosen[a] & chosen[b]) / s["keep"] for a, b in combinations(chosen, 2) if a[0] != b[0] and a[1] == b[1]]
        for name, pairs in (("seeds of a task", seeds), ("tasks of a seed", tasks)):
            if pairs:
                shared = f"{statistics.mean(pairs):.2f} over {len(pairs)} pairs"
                print(f"    {method:13} {name}: {shared}, chance {s['keep'] / s['layers']:.2f}")
        for task in dict.fromkeys(task for task, _ in chosen):
            print(f"      {task:5} " + "   ".join(f"{sorted(c)}" for (t, _), c in sorted(chosen.items()) if t == task))


def _by_layer(runs: list[dict[str, Any]]) -> None:
    """What each layer is worth to a random set: each is in one of a seed's."""
    drawn = [run for run in runs if run["method"] in RANDOM]
    layers = sorted({layer for run in drawn for layer in run["layers"]})
    means = {i: statistics.mean(100 * run["accuracy"] for run in drawn if i in run["layers"]) for i in layers}
    if means:
        print("  Mean accuracy of the random sets with each layer: " + "   ".join(f"{i}: {mean:.1f}" for i, mean in means.items()))


def _methods(runs: list[dict[str, Any]]) -> None:
    print("  Every method: accuracy, mean and spread over seeds (and random sets); loss; parameters beside the head; seconds")
    for task, cells in _by_task(runs):
        count = next(iter(cells.values()))["n"]
        print(f"    {task} (dev, {count} rows)")
        for name in (*SEARCHED, "first", "last", "spread", "random", *OTHERS):
            group = [run for (method, _), run in cells.items() if method == name or (name == "random" and method in RANDOM)]
            if not group:
                continue
            keys = ("seconds", "search_seconds", "loss", "parameters")
            took, searching, loss, size = (statistics.mean(run[key] for run in group) for key in keys)
            accuracy = _spread([100 * run["accuracy"] for run in group])
            search = f" after {searching:.0f} s of search" if searching else ""
            print(
                f"      {name:13} accuracy {accuracy:16}  loss {loss:.3f}   {size:9,.0f} parameters   {took:.0f} s{search}   "
                f"runs {len(group)}"
            )


def _by_task(runs: list[dict[str, Any]]) -> Iterator[tuple[str, dict[tuple[str, int], dict[str, Any]]]]:
    for task in dict.fromkeys(run["task"] for run in runs):
        yield task, {(run["method"], run["seed"]): run for run in runs if run["task"] == task}


def _spread(values: list[float], sign: bool = False) -> str:
    return spread(values, 1, sign) if values else "not run"


def _told(run: dict[str, Any]) -> str:
    where = f", layers {run['layers']}" if run["layers"] else ""
    return f"accuracy {run['accuracy']}, loss {run['loss']}{where}, {run['search_seconds'] + run['seconds']:.0f} s"


if __name__ == "__main__":
    campaign(__doc__, "spt.jsonl", TASKS, METHODS, one_run, _told, report)
