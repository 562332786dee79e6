"""How far an adapter can be made smaller, in which order, and against what. MiniLM-L6 and SmolLM2-135M.

For every task and seed a LoRA adapter (r = 8 on all linear layers) is trained. Then, for every order of ranks and every size, what
is left is measured on the dev rows: as it is, with one number a rank fitted anew on 128 training rows (32 of Text2MDT, which have
80 labelled tokens each), and after 60 more steps, on the batches that the training began with. Beside the orders of `gatewise
compress` stand random ones, the last layers, and one that keeps every module: "even" (as many ranks in each, the largest singular
values), which is what PEFT's `convert_to_lora` makes of an adapter for a whole rank. Further: the whole adapter with the same 60
steps, and LoRA of that size trained from the start for as many steps in all. The first seed tries several learning rates for it,
and the other seeds, which alone are reported, take the best of them. The results have four more orders, which lost and are measured
no more: "activation", "path_integral", "taylor" and "energy" (this script at commit 08827f9).

    python benchmarks/compress.py --data-dir DATA --models minilm --tasks trec --seeds 0 1
    python benchmarks/compress.py --report
    python benchmarks/compress.py --table --models minilm

Rows are appended to results/compress.jsonl as they come; what is there is not measured again. Trained adapters are kept in --work.
Where a processor has instructions for bfloat16, products are in bfloat16, else in float32. Rows say which, but for the older ones,
and rows of one kind alone are compared.
SmolLM2 is measured on fewer dev rows and sizes (SETTINGS): it takes thirty times as long.
"""

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from benchmark_data import TEMPLATES, load_task, teacher_forced
from campaign import append, claimed, read
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import set_seed

from gatewise.allocation.slots import costs, live_slots, lora_layers, prune
from gatewise.compress.basis import to_singular_basis
from gatewise.compress.order import ORDERS as KEPT_ORDERS
from gatewise.compress.order import moves, rank_values
from gatewise.compress.recovery import RATE_OF_RUN, Recovery, recover, refit
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import machine, pick_dtype
from gatewise.sites import sites_in_order
from gatewise.tasks import PadCollator, encode, evaluate
from gatewise.tasks.encoding import encode_classification

RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
ORDERS = ("path_moments", "singular", "random", "last", "even")
HALVES = (1 / 2, 1 / 3, 1 / 4, 1 / 8, 1 / 16)
# cells: by order and unit the sizes that are measured as they are; refitted, recovered: (orders, sizes in parameters, in modules).
SETTINGS: dict[str, dict[str, Any]] = {
    "minilm": {
        "model": "minilm-l6", "task": "classification", "steps": 300, "learning_rate": 1e-3, "dev": 500,
        "sizes": {"parameters": HALVES, "modules": HALVES},
        "refitted": (("path_moments", "singular"), (1 / 16,), (1 / 3,)),
        "recovered": (("path_moments", "random"), (1 / 4,), (1 / 3,)),
        "rates": (1e-3, 2e-3, 4e-3),
    },
    "smollm2": {
        "model": "smollm2-135m-instruct", "task": "causal", "steps": 120, "learning_rate": 5e-4, "dev": 200,
        "sizes": {"parameters": (1 / 4, 1 / 16), "modules": (1 / 3,)},
        "refitted": (("path_moments",), (1 / 4, 1 / 16), (1 / 3,)),
        "recovered": (("path_moments",), (1 / 4,), (1 / 3,)),
        "rates": (5e-4, 1e-3, 2e-3),
    },
}  # fmt: skip
ALPHA, RANK, SMALL, RECOVERY, HELD_BACK = 16, 8, 2, 60, 128
SCORED = {"text2mdt": 32}  # rows that value ranks and fit numbers; of the others all that are held back, which have one label each
BATCH = {"text2mdt": 8}  # rows a step; of the others, which are shorter, 16
TASKS = ("trec", "subj", "mr", "sst2", "rte", "text2mdt")


class Case:
    """A model and task: its rows, and a fresh model with a LoRA of some rank."""

    def __init__(self, name: str, task: str, seed: int, data_dir: Path) -> None:
        self.name, self.task, self.seed, self.settings = name, task, seed, SETTINGS[name]
        train, dev, template = load_task(task, data_dir)
        self.dev = replace(dev, rows=dev.rows[: self.settings["dev"]])
        self.template = None if self.settings["task"] == "classification" else template
        self.tokenizer = load_tokenizer(self.settings["model"])
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        train = replace(train, rows=[train.rows[at] for at in order])
        if self.template is None:
            features: list[Any] = list(encode_classification(train, self.tokenizer, max_length=256))
        else:
            features = list(encode(train, self.tokenizer, self.template))
        self.labels = train.labels
        self.collate = PadCollator(self.tokenizer)
        self.batch, self.features = self.collate(features[: SCORED.get(task, HELD_BACK)]), features[HELD_BACK:]

    def fresh(self, rank: int) -> Any:
        set_seed(self.seed)
        kind = self.settings["task"]
        dtype = torch.float32 if kind == "classification" else pick_dtype("auto")
        base = load_model(
            self.settings["model"], task=kind, num_labels=len(self.labels or []) if kind == "classification" else None, dtype=dtype
        )
        # On a processor the backward pass of PyTorch's fused attention is slow for short texts: a fifth of a step.
        base.set_attn_implementation("eager")
        config = LoraConfig(
            r=rank, lora_alpha=ALPHA * rank // RANK or 2, target_modules="all-linear",
            task_type="SEQ_CLS" if kind == "classification" else "CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(base, config)

    def train(self, model: Any, steps: int, learning_rate: float) -> None:
        note = {"training": {"batch_size": BATCH.get(self.task, 16)}}
        with self.quicker():
            recover(model, self.tokenizer, self.features, Recovery("", steps, learning_rate), note, self.seed)

    def quicker(self) -> torch.autocast:
        """Products in bfloat16 where the processor has instructions for it. Ranks are always valued without."""
        # Without its cache: in training that would hold the factors as they were at first.
        return torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype("auto") == torch.bfloat16, cache_enabled=False)

    def measured(self, model: Any) -> dict[str, float]:
        """Accuracy and mean loss (nats) on the dev rows; of trees, the share of tokens that are likeliest after the right ones."""
        if self.task == "text2mdt":
            rows = list(encode(self.dev, self.tokenizer, self.template))
            with self.quicker():
                found = teacher_forced(model, rows, self.collate)
            return {"accuracy": round(found["token_accuracy"], 5), "loss": round(found["loss"], 5)}
        with self.quicker():
            found = evaluate(model, self.tokenizer, self.dev, self.template, batch_size=32)
        return {name: round(float(found[name]), 5) for name in ("accuracy", "loss")}


def trained(case: Case, work: Path) -> Any:
    """The whole adapter, from --work where it was trained before."""
    path = work / f"{case.name}-{case.task}-{case.seed}.safetensors"
    model = case.fresh(RANK)
    if path.is_file():
        set_peft_model_state_dict(model, load_file(path))
        return model.eval()
    case.train(model, case.settings["steps"], case.settings["learning_rate"])
    work.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()}, path)
    return model


def wanted(settings: Mapping[str, Any]) -> dict[tuple[str, str, float], list[str]]:
    """(order, unit, fraction) -> the stages that are measured of it."""
    found = {("whole", "parameters", 1.0): ["as it is", "recovered"]}
    for order, (unit, sizes) in product(ORDERS, settings["sizes"].items()):
        for fraction in sizes:
            if order == "even" and (unit == "modules" or RANK * fraction != int(RANK * fraction)):
                continue
            found[order, unit, fraction] = ["as it is"]
            for stage in ("refitted", "recovered"):
                orders, *fractions = settings[stage]
                if order in orders and fraction in fractions[unit == "modules"]:
                    found[order, unit, fraction].append(stage)
    return found


def values_of(model: Any, batch: Any, order: str, seed: int) -> Mapping[str, list[float]]:
    """Values of ranks by an order of ``gatewise compress``, or one that lost.

    "even" takes as many ranks of every module; "random" is by the seed; of "last" the last layers are worth most.
    """
    if order in KEPT_ORDERS:
        return {path: one.tolist() for path, one in rank_values(model, batch, order).items()}
    generator = torch.Generator().manual_seed(seed)
    sizes = rank_values(model, batch, "singular")
    if order == "even":
        return {path: one.argsort(descending=True).argsort().neg().tolist() for path, one in sizes.items()}
    found: dict[str, list[float]] = {}
    for site in sites_in_order(sizes):
        own = sizes[site.path]
        if order == "random":
            own = torch.rand(len(own), generator=generator, dtype=torch.float64) + torch.rand(1, generator=generator).double()
        else:  # within a layer the smaller singular values go first
            own = 1 + (len(found) if site.layer is None else site.layer) + own / (1 + own.sum())
        found[site.path] = own.tolist()
    return {path: found[path] for path in sizes}


def measurements(case: Case, work: Path, done: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Every measurement of a case that is missing; where none is, nothing is trained."""

    def row(order: str, unit: str, fraction: float, stage: str) -> dict[str, Any]:
        return {"model": case.name, "task": case.task, "seed": case.seed, "order": order, "unit": unit,
                "fraction": round(fraction, 4), "stage": stage}  # fmt: skip

    missing = {
        cell: left
        for cell, stages in wanted(case.settings).items()
        if (left := [stage for stage in stages if not done(row(*cell, stage))])
    }
    if not missing:
        return
    model = trained(case, work)
    layers = lora_layers(model, "default")
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    to_singular_basis(model)
    whole = {name: value.detach().clone() for name, value in own.items()}
    live = {path: live_slots(layer, "default") for path, layer in layers.items()}
    each = costs(layers, "default")

    def back(to: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(to[name])

    def size() -> dict[str, int]:
        left = {path: len(live_slots(layer, "default")) for path, layer in layers.items()}
        return {"parameters": sum(each[path] * n for path, n in left.items()), "modules": sum(map(bool, left.values()))}

    values: dict[str, Mapping[str, Any]] = {}
    total = size()
    for (order, unit, fraction), stages in missing.items():
        back(whole)
        if order != "whole":
            if order not in values:
                values = {order: values_of(model, case.batch, order, case.seed)}
            kept = [*live] if order == "even" else []  # no module goes
            # What says nothing of a rank's worth is not shared out by its size: random ranks would be the smallest ones.
            by_cost = None if unit == "modules" else each if order in KEPT_ORDERS else dict.fromkeys(each, 1)
            for move in moves(values[order], by_cost, kept):
                if size()[unit] <= fraction * total[unit]:
                    break
                prune(layers[move.path], "default", [live[move.path][rank] for rank in move.ranks])
        if "as it is" in stages:
            yield {**row(order, unit, fraction, "as it is"), **size(), **case.measured(model)}
        if stages == ["as it is"]:
            continue
        if order != "whole":
            refit(model, case.batch)
        if "refitted" in stages:
            yield {**row(order, unit, fraction, "refitted"), **size(), **case.measured(model)}
        if "recovered" in stages:
            case.train(model, RECOVERY, RATE_OF_RUN * case.settings["learning_rate"])
            yield {**row(order, unit, fraction, "recovered"), **size(), **case.measured(model)}


def small_ones(case: Case, results: Path, done: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """LoRA of a smaller rank trained from the start, for as many steps as the whole adapter and its recovery."""
    rates = case.settings["rates"]
    if case.seed:
        same = {"model": case.name, "task": case.task, "seed": 0, "stage": "trained", "fraction": SMALL / RANK}
        tried = [one for one in read(results) if all(one[key] == value for key, value in same.items())]
        if len(tried) < len(rates):
            return  # the first seed says which rate
        rates = [max(tried, key=lambda one: (one["accuracy"], -one["loss"]))["learning_rate"]]
    for rate in rates:
        row = {"model": case.name, "task": case.task, "seed": case.seed, "order": f"trained, {rate:g}", "unit": "parameters",
               "fraction": round(SMALL / RANK, 4), "stage": "trained"}  # fmt: skip
        if done(row):
            continue
        model = case.fresh(SMALL)
        case.train(model, case.settings["steps"] + RECOVERY, rate)
        count = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
        yield {**row, "learning_rate": rate, "parameters": count, **case.measured(model)}


KEYS = ("model", "task", "seed", "order", "unit", "fraction", "stage")


WHOLE = ("whole", "parameters", 1, "as it is")
TRAINED_ON = ("whole", "parameters", 1, "recovered")
QUARTER, THIRD = ("path_moments", "parameters", 0.25), ("path_moments", "modules", 0.3333)
SMALL_LORA = ("small LoRA", "parameters", 0.25, "trained")
# What is compared with the same steps, the second less the first.
SAME_STEPS = {
    "1/4 of the parameters, recovered, less the whole one with the same steps": (TRAINED_ON, (*QUARTER, "recovered")),
    "1/3 of the modules, recovered, less the whole one with the same steps": (TRAINED_ON, (*THIRD, "recovered")),
    "small LoRA less the whole one with the same steps": (TRAINED_ON, SMALL_LORA),
    "small LoRA less 1/4 of the parameters, recovered": ((*QUARTER, "recovered"), SMALL_LORA),
}


At = tuple[str, int, bool | None]
"""Task, seed, and whether the processor multiplies bfloat16: what is equal in the rows of a pair."""


def by_cell(rows: list[dict[str, Any]], model: str) -> dict[tuple[Any, ...], dict[At, dict[str, Any]]]:
    """(order, unit, fraction, stage) -> row by what pairs it. Of LoRA trained small, the rate that was best in the first seed; the
    first seed itself is left out."""
    own = [one for one in rows if one["model"] == model]
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for one in own:
        if one["stage"] == "trained" and not one["seed"]:
            at = (one["task"], one["fraction"])
            best[at] = max(best.get(at, one), one, key=lambda row: (row["accuracy"], -row["loss"]))
    found: dict[tuple[Any, ...], dict[At, dict[str, Any]]] = {}
    for one in own:
        order = one["order"]
        if one["stage"] == "trained":
            if not one["seed"] or one["learning_rate"] != best.get((one["task"], one["fraction"]), one)["learning_rate"]:
                continue
            order = "small LoRA"
        at = (one["task"], one["seed"], one.get("multiplies_bfloat16"))
        found.setdefault((order, one["unit"], one["fraction"], one["stage"]), {})[at] = one
    return found


def gaps(
    cells: Mapping[tuple[Any, ...], Mapping[At, dict[str, Any]]], cell: tuple[Any, ...], other: tuple[Any, ...] = WHOLE
) -> dict[At, float]:
    """By pair the points of accuracy that a cell has more than another one, mostly the whole adapter."""
    less = cells.get(other, {})
    return {at: 100 * (row["accuracy"] - less[at]["accuracy"]) for at, row in cells.get(cell, {}).items() if at in less}


def interval(values: Mapping[At, float]) -> str:
    """The mean and, of several, its 95% interval: the bootstrap over tasks, and over the seeds of each that is drawn."""
    by_task: dict[str, list[float]] = {}
    for (task, _, _), value in values.items():
        by_task.setdefault(task, []).append(value)
    draw, tasks = random.Random(0), list(by_task)
    means = []
    for _ in range(2000):
        drawn = [draw.choices(by_task[task], k=len(by_task[task])) for task in draw.choices(tasks, k=len(tasks))]
        means.append(statistics.mean([value for one in drawn for value in one]))
    means.sort()
    told = f" [{means[49]:+.1f}, {means[1949]:+.1f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):+.1f}{told}"


def report(rows: list[dict[str, Any]]) -> None:
    """What is lost by order, size and stage, paired with the whole adapter; by task; and what is compared with something else."""
    print("Points of accuracy less than the whole adapter as it is, on the same tasks and seeds; 95% interval; n")
    for model in SETTINGS:
        cells = by_cell(rows, model)
        for cell in sorted(cells, key=lambda cell: (cell[1], cell[3], cell[0], -cell[2])):
            if points := gaps(cells, cell):
                order, unit, fraction, stage = cell
                print(f"{model}, {order}, {fraction:.3g} of the {unit}, {stage}: {by_task(points)}")
        for name, (other, cell) in SAME_STEPS.items():
            if points := gaps(cells, cell, other):
                print(f"{model}, {name}: {by_task(points)}")
        for order, stage in product(("singular", "activation", "path_integral", "random"), ("as it is", "refitted")):
            for _, unit, fraction, _ in sorted(cell for cell in cells if cell[0] == order and cell[3] == stage):
                if points := gaps(cells, ("path_moments", unit, fraction, stage), (order, unit, fraction, stage)):
                    print(f"{model}, path_moments less {order}, {fraction:.3g} of the {unit}, {stage}: {by_task(points)}")


def by_task(points: Mapping[At, float]) -> str:
    """The interval over all tasks, then of each."""
    tasks = {task: {at: gap for at, gap in points.items() if at[0] == task} for task in TASKS}
    told = "   ".join(f"{task} {interval(own)}" for task, own in tasks.items() if own)
    return f"{interval(points)} n={len(points)}\n    {told}"


def table(rows: list[dict[str, Any]], model: str) -> None:
    """The table of docs/reports/compress.md: points that each order loses without further training, and the pairs a row has."""
    cells = by_cell(rows, model)
    sizes = [(unit, fraction) for unit, fractions in SETTINGS[model]["sizes"].items() for fraction in fractions]
    print("| order | " + " | ".join(f"1/{round(1 / fraction)} of the {unit}" for unit, fraction in sizes) + " | pairs |")
    print("|---" * (len(sizes) + 2) + "|")
    for order in dict.fromkeys([*ORDERS, *(cell[0] for cell in sorted(cells) if cell[0] not in ("whole", "small LoRA"))]):
        told, pairs = [], 0
        for unit, fraction in sizes:
            cell = (order, unit, round(fraction, 4), "as it is")
            points = gaps(cells, cell)
            # One share of the squares for all keeps a rank in each module, and is no smaller than that.
            if any(row[unit] > 1.2 * fraction * cells[WHOLE][at][unit] for at, row in cells.get(cell, {}).items() if at in points):
                points = {}
            told.append(f"{round(statistics.mean(points.values()), 1) + 0.0:.1f}" if points else "")
            pairs = max(pairs, len(points))
        print(f"| `{order}` | " + " | ".join(told) + f" | {pairs} |")


def main() -> None:
    """Makes the measurements that are missing, then reports all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatewise-compress")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=sorted(TEMPLATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the table of the report for --models, run nothing")
    options = parser.parse_args()
    if options.table:
        for name in options.models:
            table(read(options.results), name)
        return
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with a folder for each task")

        on = {"multiplies_bfloat16": machine()["multiplies_bfloat16"]}

        def done(row: dict[str, Any]) -> bool:
            return any(all(one[key] == row[key] for key in KEYS) for one in read(options.results))

        for seed in options.seeds:
            for name in options.models:
                for task in options.tasks:
                    if task == "text2mdt" and SETTINGS[name]["task"] == "classification":
                        continue  # trees are written, which a model of MiniLM's kind cannot
                    with claimed((name, task, seed), options.results) as free:
                        if not free:
                            continue
                        case = Case(name, task, seed, options.data_dir)
                        for row in chain(measurements(case, options.work, done), small_ones(case, options.results, done)):
                            append(row | on, options.results)
                            print(json.dumps(row | on), flush=True)
    report(read(options.results))


if __name__ == "__main__":
    main()
