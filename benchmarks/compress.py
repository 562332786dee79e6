"""How far an adapter can be made smaller, in which order, and against what. MiniLM-L6 and SmolLM2-135M.

For every task and seed a LoRA adapter (r = 8 on all linear layers) is trained. Then, for every order of ranks and every size, what
is left is measured on the dev rows: as it is, with one number a rank fitted anew on 128 training rows, and after 60 more steps
on the training rows. Against it stand random orders, singular values alone, the last layers, the whole adapter with the same 60
steps, and LoRA of that size trained from the start for as many steps in all, at the best of several learning rates.

    python benchmarks/compress.py --data-dir DATA --models minilm --tasks trec --seeds 0 1
    python benchmarks/compress.py --report

Rows are appended to results/compress.jsonl as they come; what is there is not measured again. Trained adapters are kept in --work.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmark_data import TEMPLATES, load_task
from campaign import append, claimed, read, spread

RESULTS = Path(__file__).parent / "results" / "compress.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {
    "minilm": {"model": "minilm-l6", "task": "classification", "steps": 300, "learning_rate": 1e-3},
    "smollm2": {"model": "smollm2-135m-instruct", "task": "causal", "steps": 120, "learning_rate": 5e-4},
}
BATCH, ALPHA, RANK, RECOVERY, SCORED = 16, 16, 8, 60, 128
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of the small LoRA that is trained from the start
FRACTIONS = (1 / 2, 1 / 3, 1 / 4, 1 / 8, 1 / 16)
ORDERS = ("path_moments", "path_integral", "taylor", "singular", "activation", "random", "last")
RECOVERED = ("path_moments", "singular", "random")  # orders that are also trained on
TASKS = ("trec", "subj", "mr", "sst2", "rte")


class Case:
    """A model and task: its rows, and a fresh model with a LoRA of some rank."""

    def __init__(self, name: str, task: str, seed: int, data_dir: Path) -> None:
        from gatewise.models import load_tokenizer
        from gatewise.tasks import PadCollator, encode
        from gatewise.tasks.encoding import encode_classification

        self.name, self.task, self.seed, self.settings = name, task, seed, SETTINGS[name]
        train, self.dev, template = load_task(task, data_dir)
        self.template = None if self.settings["task"] == "classification" else template
        self.tokenizer = load_tokenizer(self.settings["model"])
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [train.rows[at] for at in order]
        from dataclasses import replace

        shuffled = replace(train, rows=rows)
        if self.template is None:
            features: list[Any] = list(encode_classification(shuffled, self.tokenizer, max_length=256))
        else:
            features = list(encode(shuffled, self.tokenizer, self.template))
        self.labels = train.labels
        self.collate = PadCollator(self.tokenizer)
        self.batch, self.features = self.collate(features[:SCORED]), features[SCORED:]

    def fresh(self, rank: int) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        from gatewise.models import load_model
        from gatewise.models.device import pick_dtype

        set_seed(self.seed)
        kind = self.settings["task"]
        dtype = torch.float32 if kind == "classification" else pick_dtype("auto")
        base = load_model(
            self.settings["model"], task=kind, num_labels=len(self.labels) if kind == "classification" else None, dtype=dtype
        )
        config = LoraConfig(
            r=rank, lora_alpha=ALPHA * rank // RANK or 2, target_modules="all-linear",
            task_type="SEQ_CLS" if kind == "classification" else "CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(base, config)

    def train(self, model: Any, steps: int, learning_rate: float) -> None:
        from gatewise.compress.recovery import Recovery, recover

        recover(model, self.tokenizer, self.features, Recovery("", steps, learning_rate, BATCH), {}, self.seed)

    def measured(self, model: Any) -> dict[str, float]:
        from gatewise.tasks import evaluate

        found = evaluate(model, self.tokenizer, self.dev, self.template, batch_size=32)
        return {name: round(float(found[name]), 5) for name in ("accuracy", "loss")}


def trained(case: Case, work: Path) -> Any:
    """The whole adapter, from --work where it was trained before."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    path = work / f"{case.name}-{case.task}-{case.seed}.safetensors"
    model = case.fresh(RANK)
    if path.is_file():
        set_peft_model_state_dict(model, load_file(path))
        return model.eval()
    case.train(model, case.settings["steps"], case.settings["learning_rate"])
    work.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()}, path)
    return model


def measurements(case: Case, work: Path, done: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """Every measurement of a case that is missing."""
    from gatewise.allocation.slots import live_slots, lora_layers, prune
    from gatewise.compress.basis import to_singular_basis
    from gatewise.compress.order import module_costs, moves, parameter_costs, rank_values
    from gatewise.compress.recovery import refit

    model = trained(case, work)
    layers = lora_layers(model, "default")
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    to_singular_basis(model)
    whole = {name: value.detach().clone() for name, value in own.items()}
    live = {path: live_slots(layer, "default") for path, layer in layers.items()}
    each = {path: cost.each for path, cost in parameter_costs(model, "default").items()}
    total = {"parameters": sum(each[path] * len(ranks) for path, ranks in live.items()), "modules": len(live)}

    def back() -> None:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(whole[name])

    def row(order: str, unit: str, fraction: float, stage: str) -> dict[str, Any]:
        return {"model": case.name, "task": case.task, "seed": case.seed, "order": order, "unit": unit,
                "fraction": round(fraction, 4), "stage": stage}  # fmt: skip

    def size() -> dict[str, float]:
        left = {path: len(live_slots(layer, "default")) for path, layer in layers.items()}
        return {"parameters": sum(each[path] * n for path, n in left.items()), "modules": sum(map(bool, left.values()))}

    if not done(row("whole", "parameters", 1, "as it is")):
        yield {**row("whole", "parameters", 1, "as it is"), **size(), **case.measured(model)}
    if not done(row("whole", "parameters", 1, "recovered")):
        case.train(model, RECOVERY, case.settings["learning_rate"])
        yield {**row("whole", "parameters", 1, "recovered"), **size(), **case.measured(model)}
        back()
    for order in ORDERS:
        values: Mapping[str, Any] | None = None
        for unit, costs_of in (("parameters", parameter_costs), ("modules", module_costs)):
            for fraction in FRACTIONS:
                stages = ["as it is", "refitted", *(["recovered"] if order in RECOVERED else [])]
                stages = [stage for stage in stages if not done(row(order, unit, fraction, stage))]
                if not stages:
                    continue
                if values is None:
                    back()
                    values = {path: one.tolist() for path, one in rank_values(model, case.batch, order, seed=case.seed).items()}
                back()
                costs = costs_of(model, "default")
                left = total[unit]
                for move in moves(values, costs):
                    if left <= fraction * total[unit]:
                        break
                    prune(layers[move.path], "default", [live[move.path][rank] for rank in move.ranks])
                    left -= costs[move.path].each * len(move.ranks) + (costs[move.path].fixed if unit == "modules" else 0)
                if "as it is" in stages:
                    yield {**row(order, unit, fraction, "as it is"), **size(), **case.measured(model)}
                refit(model, case.batch)
                if "refitted" in stages:
                    yield {**row(order, unit, fraction, "refitted"), **size(), **case.measured(model)}
                if "recovered" in stages:
                    case.train(model, RECOVERY, case.settings["learning_rate"])
                    yield {**row(order, unit, fraction, "recovered"), **size(), **case.measured(model)}


def small_ones(case: Case, done: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
    """LoRA of a smaller rank trained from the start, for as many steps as the whole adapter and its recovery."""
    for rank in (4, 2, 1):
        for rate in RATES:
            row = {"model": case.name, "task": case.task, "seed": case.seed, "order": f"trained, {rate:g}", "unit": "parameters",
                   "fraction": round(rank / RANK, 4), "stage": "trained"}  # fmt: skip
            if done(row):
                continue
            model = case.fresh(rank)
            case.train(model, case.settings["steps"] + RECOVERY, rate)
            count = sum(value.numel() for name, value in model.named_parameters() if "lora_" in name)
            yield {**row, "parameters": count, "modules": 0, **case.measured(model)}


KEYS = ("model", "task", "seed", "order", "unit", "fraction", "stage")


def report(rows: list[dict[str, Any]]) -> None:
    """Accuracy by order and size, mean over tasks and seeds, and the loss beside it."""
    for model in SETTINGS:
        for unit in ("parameters", "modules"):
            for stage in ("as it is", "refitted", "recovered", "trained"):
                here = [one for one in rows if (one["model"], one["unit"], one["stage"]) == (model, unit, stage)]
                if not here:
                    continue
                print(f"\n{model}, {unit}, {stage}: accuracy and loss")
                for order in dict.fromkeys(one["order"] for one in here):
                    cells = []
                    for fraction in sorted({one["fraction"] for one in here}, reverse=True):
                        own = [one for one in here if one["order"] == order and one["fraction"] == fraction]
                        if own:
                            accuracy, loss = ([one[name] for one in own] for name in ("accuracy", "loss"))
                            cells.append(f"{fraction:.3g}: {spread([100 * a for a in accuracy], 1)} {spread(loss, 3)} n={len(own)}")
                    print(f"  {order:22s} {'   '.join(cells)}")


def main() -> None:
    """Makes the measurements that are missing, then reports all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatewise-compress")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=sorted(TEMPLATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--skip-trained", action="store_true", help="without the LoRA that is trained small")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with a folder for each task")

        def done(row: dict[str, Any]) -> bool:
            return any(all(one[key] == row[key] for key in KEYS) for one in read(options.results))

        for seed in options.seeds:
            for name in options.models:
                for task in options.tasks:
                    with claimed((name, task, seed), options.results) as free:
                        if not free:
                            continue
                        case = Case(name, task, seed, options.data_dir)
                        found = [measurements(case, options.work, done)]
                        for rows in [*found, *([] if options.skip_trained else [small_ones(case, done)])]:
                            for row in rows:
                                append(row, options.results)
                                print(json.dumps(row), flush=True)
    report(read(options.results))


if __name__ == "__main__":
    main()
