"""Which importance score finds the ranks that do not matter? Deletion curves on SmolLM2-135M.

A LoRA adapter (r = 8 on all linear layers) is trained on a task and kept early and late. Its ranks are scored on held-out training
rows, the lowest 10, 25, 50 and 75% are switched off, and the loss is measured on dev rows: never on rows that trained or scored.
The gradient of every gate for every single example is kept at each node of the path, so that all gradient scores, signed or not,
per batch or per example, of few rows or many, come from the same passes.

Everything measured is appended to a JSON-lines file as it comes; what is there is not measured again. Several processes may work on
different tasks or seeds at once.

    python benchmarks/scores.py --data-dir DATA --tasks sst2 trec --seeds 0 1 2
    python benchmarks/scores_report.py                            # the tables
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_data import load_task, shuffled
from torch import Tensor

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
TASKS: dict[str, dict[str, int]] = {
    "sst2": {"early": 20, "late": 80, "batch": 16, "few": 32, "many": 256, "measured": 96},
    "trec": {"early": 20, "late": 80, "batch": 16, "few": 32, "many": 256, "measured": 96},
    # 300 passages in all, so the larger scoring batch is 96 of them.
    "text2mdt": {"early": 20, "late": 80, "batch": 8, "few": 32, "many": 96, "measured": 32},
}
STAGES = ("early", "late")
CUTS = (0.10, 0.25, 0.50, 0.75)
RECOVERY = {"steps": 8, "cut": 0.75, "learning_rate": 5e-4}
EXACT_RANKS = 40
UPPER = (0.605662, 0.894338)  # the two Gauss-Legendre nodes of [1/2, 1]
RULES = {"pi2": 2, "pi4": 4, "pi8": 8, "pi16": 16}

# What is deleted by; seed 0 measures all of it and the other seeds what is marked. path_scores says what the names mean.
MEASURED = {
    "ab": True, "loo": False, "std": True, "abs ab": False, "pi": True, "abs pi": False, "pi per example": False,
    "pi second moment": True, "fisher": True, "moment": True, "moments": True, "pi moments": True, "moment at 0.79": False,
    "moments at 0.79": False, "sensitivity": True, "magnitude": True, "random": True,
}  # fmt: skip
MEASURED_MANY = {
    "ab": True, "pi": True, "abs pi": False, "pi per example": False, "pi second moment": False, "fisher": False,
    "moment at 0.79": False, "moments at 0.79": True,
}  # fmt: skip
RECOVERED = ("ab", "pi", "moments", "sensitivity", "random")


Line = dict[str, Any]
"""One measurement."""


class State:
    """One adapter at one stage: its model, its scoring and measuring rows, and the file of its gradients."""

    def __init__(self, task: str, seed: int, stage: str, data_dir: Path, work: Path) -> None:
        from gatewise.models import load_tokenizer
        from gatewise.tasks import PadCollator, encode

        self.task, self.seed, self.stage, self.work = task, seed, stage, work
        self.settings = TASKS[task]
        train, dev, template = load_task(task, data_dir)
        tokenizer = load_tokenizer(MODEL)
        self.collate = PadCollator(tokenizer)
        order = shuffled(train, seed)
        features = encode(order, tokenizer, template)
        many = self.settings["many"]
        self.scored, self.trained = features[:many], features[many:]
        self.measured = encode(shuffled(dev, seed, self.settings["measured"]), tokenizer, template)
        self.folder = work / f"{task}-{seed}"

    @property
    def rules(self) -> dict[str, int]:
        """The quadratures computed here: all of them for seed 0, but the finest not on the long rows of text2mdt."""
        if self.seed:
            return {"pi4": 4}
        return {name: points for name, points in RULES.items() if self.task != "text2mdt" or points < 16}

    def model(self) -> Any:
        """The base model with the adapter of this stage, trained first where it is not yet on disk."""
        from peft import PeftModel
        from safetensors.torch import load_file

        file = self.folder / f"{self.stage}.safetensors"
        if not file.is_file():
            _train(self)
        model: PeftModel = fresh_model(self.seed)
        model.load_state_dict(load_file(str(file)), strict=False)
        return model.eval()

    def gradients(self, model: Any) -> dict[str, Tensor]:
        """The gate gradients of every example at every node, kept in a file. ``few`` nodes for the first rows only."""
        from safetensors.torch import load_file, save_file

        from gatewise.allocation.scores.path_integral import quadrature

        file = self.folder / f"{self.stage}-gradients.safetensors"
        kept = load_file(str(file)) if file.is_file() else {}
        large = [0.0, 1.0, *quadrature(2)[0]] if with_many(self.task, self.seed) else []
        wanted = [("many", node, self.settings["many"]) for node in large]
        small = [0.0, 1.0, *UPPER, *(node for points in self.rules.values() for node in quadrature(points)[0])]
        wanted += [("few", node, self.settings["few"]) for node in small]
        for size, node, rows in wanted:
            name = f"{size} {node:.6f}"
            if name in kept or (size == "few" and f"many {node:.6f}" in kept):
                continue
            began = time.perf_counter()
            kept[name], kept[f"{name} loss"], kept["labels"] = example_gradients(
                model, self.collate(self.scored[:rows]), node, kept.get("labels")
            )
            print(f"  {self.task} {self.seed} {self.stage}: gradients at {node:.3f}, {rows} rows, "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
            save_file(kept, str(file) + ".part")
            Path(str(file) + ".part").replace(file)
        return kept


def fresh_model(seed: int) -> Any:
    """SmolLM2 in bfloat16 with a LoRA adapter at its start."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from gatewise.models import load_model

    set_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_model(MODEL, dtype=torch.bfloat16), config)


def _train(state: State) -> None:
    """Trains one adapter and keeps its weights at both stages."""
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    settings = state.settings
    model = fresh_model(state.seed)
    state.folder.mkdir(parents=True, exist_ok=True)

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
            for stage in STAGES:
                if trainer_state.global_step == settings[stage]:
                    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
                    save_file(weights, str(state.folder / f"{stage}.safetensors"))

    began = time.perf_counter()
    train_on(model, state, settings["late"], 5e-4, warmup=8, callbacks=[Keep()])
    print(f"  {state.task} {state.seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)


def train_on(model: Any, state: State, steps: int, rate: float, warmup: int, callbacks: list[Any] | None = None) -> None:
    """Trains at a constant rate after warm-up, so that a stage is a point in the middle of training."""
    from transformers import TrainingArguments

    from gatewise.runs.trainer import RecipeTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=state.settings["batch"],
            learning_rate=rate,
            warmup_steps=warmup,
            lr_scheduler_type="constant_with_warmup",
            seed=state.seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        RecipeTrainer(
            model=model,
            args=arguments,
            train_dataset=state.trained,
            eval_dataset=state.scored,
            collator=state.collate,
            note={},
            callbacks=callbacks or [],
            group_by_length=True,
        ).train()


def example_gradients(model: Any, batch: dict[str, Tensor], node: float, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, R) gradient of every example's summed loss in every gate, all gates at ``node``; the rows' losses; their labels."""
    from gatewise.allocation.gates import GateBank
    from gatewise.allocation.scoring import parts_of, scoring
    from gatewise.losses import row_losses

    rows = len(batch["labels"])
    with scoring(model), GateBank(model) as gates:
        total = sum(len(gate) for gate in gates.fill(node).values())
        gradients, losses = torch.zeros(rows, total), torch.zeros(rows)
        counts = torch.zeros(rows)
        for part in parts_of(model, {**batch, "row": torch.arange(rows)}).own:
            own = part.pop("row")
            leaves = {
                path: torch.full((len(own), 1, len(gate)), node, requires_grad=True) for path, gate in gates.fill(node).items()
            }
            for path, leaf in leaves.items():
                gates.assign(path, leaf)
            sums, number = row_losses(model, part)
            found = torch.autograd.grad(sums.sum(), list(leaves.values()))
            gradients[own] = torch.cat([gradient[:, 0] for gradient in found], dim=1)
            losses[own], counts[own] = sums.detach(), number.float()
    return gradients, losses, counts if labels is None or len(counts) > len(labels) else labels


def path_scores(kept: dict[str, Tensor], rows: int, points: int) -> dict[str, Tensor]:
    """Every score made from the examples' gradients: name -> (R,), higher for ranks worth keeping.

    ab: AB-LoRA to first order, loo and alone its two terms, std the two standardised and added; pi: the path integral; abs: the
    magnitude of a sum over examples; per example: the sum of the examples' magnitudes; second moment: the root mean square over
    examples; fisher: the second moment of the gradient with all ranks on; moment: of the integral over the upper half of the
    path, or of the gradient at 0.79; moments: gatewise's path_moments, the mean of that and its moment; pi moments: the same from
    the whole path.
    """
    from gatewise.allocation.scores.path_integral import quadrature

    labels = kept["labels"][:rows].sum()
    on, off = _at(kept, 1.0)[:rows], _at(kept, 0.0)[:rows]
    # (rows, R): what each rank takes off the loss of each example.
    each = -sum(w * _at(kept, c)[:rows] for c, w in zip(*quadrature(points), strict=True))
    loo, alone = -on.sum(0) / labels, -off.sum(0) / labels
    upper = [_at(kept, node) for node in UPPER]
    paths = {"pi moment{}": each}
    if rows == len(upper[0]):
        paths["moment{}"] = -sum(upper)
    if "many 0.788675" in kept:
        paths["moment{} at 0.79"] = -kept["many 0.788675"][:rows]
    more: dict[str, Tensor] = {}
    for name, own in paths.items():
        mean, size = own.mean(0), own.square().mean(0).sqrt()
        more |= {name.format(""): size, name.format("s"): mean / mean.std() + size / size.std()}
    return more | {
        "ab": loo + alone,
        "loo": loo,
        "std": loo / loo.std() + alone / alone.std(),
        "pi": each.sum(0) / labels,
        "abs pi": (each.sum(0) / labels).abs(),
        "abs ab": (loo + alone).abs(),
        "pi per example": each.abs().sum(0) / labels,
        "pi second moment": each.square().mean(0).sqrt(),
        "fisher": on.square().mean(0),
    }


def _at(kept: dict[str, Tensor], node: float, what: str = "") -> Tensor:
    name = f"{node:.6f}{what}"
    return kept[f"many {name}"] if f"many {name}" in kept else kept[f"few {name}"]


def weight_scores(model: Any, state: State) -> dict[str, Tensor]:
    """The scores that are not made of path gradients: AdaLoRA's, the size of a rank's update, and chance."""
    from gatewise.allocation.slots import factors, lora_layers
    from gatewise.scores import sensitivity

    batch = state.collate(state.scored[: state.settings["few"]])
    size = [torch.linalg.norm(a, dim=1) * torch.linalg.norm(b, dim=0) for a, b in
            (factors(layer, "default") for layer in lora_layers(model).values())]  # fmt: skip
    generator = torch.Generator().manual_seed(state.seed)
    flat = torch.cat(list(sensitivity(model, batch).values()))
    return {
        "sensitivity": flat,
        "magnitude": torch.cat(size).detach(),
        "random": torch.rand(len(flat), generator=generator),
    }


def measured_loss(model: Any, state: State, off: Tensor | None = None) -> float:
    """Mean loss on the measuring rows with the ranks in ``off`` (R,) bool switched off."""
    from gatewise.allocation.gates import GateBank
    from gatewise.allocation.scoring import parts_of, scoring
    from gatewise.losses import mean_loss

    with scoring(model, float32=False), GateBank(model) as gates:
        if off is not None:
            parts = (~off).float().split([len(gate) for gate in gates.fill(1.0).values()])
            for path, gate in zip(gates.layers, parts, strict=True):
                gates.assign(path, gate)
        return mean_loss(model, parts_of(model, state.collate(state.measured)).own)


def lowest(scores: Tensor, cut: float) -> Tensor:
    """(R,) bool: the share ``cut`` of the ranks that score lowest."""
    off = torch.zeros(len(scores), dtype=torch.bool)
    off[scores.argsort(stable=True)[: round(cut * len(scores))]] = True
    return off


def recovered_loss(state: State, off: Tensor) -> float:
    """The measured loss after the ranks in ``off`` are gone and the others have trained on for a few steps."""
    from gatewise.allocation import slots

    model = state.model()
    layers = slots.lora_layers(model)
    for layer, dead in zip(layers.values(), off.split([layer.r["default"] for layer in layers.values()]), strict=True):
        slots.prune(layer, "default", dead.nonzero().flatten().tolist())
    train_on(model, state, int(RECOVERY["steps"]), RECOVERY["learning_rate"], warmup=2)
    return measured_loss(model, state)


def measure(task: str, seed: int, stage: str, data_dir: Path, work: Path, results: Path) -> None:
    """Everything that is still missing of one state."""
    done = {key(line) for line in read(results)}
    place = {"task": task, "seed": seed, "stage": stage}
    todo = [one for one in wanted(task, seed, stage) if key({**place, **one}) not in done]
    if not todo:
        return
    state = State(task, seed, stage, data_dir, work)
    model = state.model()
    kept = state.gradients(model)
    few = path_scores(kept, state.settings["few"], 4) | weight_scores(model, state)
    many = path_scores(kept, state.settings["many"], 2) if with_many(task, seed) else {}
    for one in todo:
        scores = (many if one["rows"] == "many" else few).get(one["score"], torch.zeros(0))
        if one["what"] == "state":
            values = describe(model, state, kept, few, many)
        elif one["what"] == "exact":
            values = exact_agreement(model, state, kept, few)
        elif one["what"] == "recovered":
            values = {"loss": recovered_loss(state, lowest(scores, one["cut"]))}
        else:
            values = {"loss": measured_loss(model, state, lowest(scores, one["cut"]))}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**place, **one, **values}) + "\n")
    print(f"  {task} {seed} {stage}: measured", flush=True)


def with_many(task: str, seed: int) -> bool:
    """Whether the larger scoring batch is scored too: not for the other seeds of text2mdt, whose rows are long."""
    return task != "text2mdt" or seed == 0


def wanted(task: str, seed: int, stage: str) -> Iterator[dict[str, Any]]:
    """What is measured of a state, the plain facts first."""
    yield {"what": "state", "score": "", "rows": "", "cut": 0}
    for rows, names in (("few", MEASURED), ("many", MEASURED_MANY if with_many(task, seed) else {})):
        for score, always in names.items():
            if always or (seed == 0 and task != "text2mdt"):
                for cut in CUTS:
                    yield {"what": "deleted", "score": score, "rows": rows, "cut": cut}
    if stage == "late":
        for score in RECOVERED:
            yield {"what": "recovered", "score": score, "rows": "few", "cut": RECOVERY["cut"]}
        if seed == 0:
            yield {"what": "exact", "score": "", "rows": "few", "cut": 0}


def describe(model: Any, state: State, kept: dict[str, Tensor], few: dict[str, Tensor], many: dict[str, Tensor]) -> dict[str, Any]:
    """Losses with all ranks and with none, how complete the integral is, and how the scores agree with each other."""
    rows, count = state.settings["few"], len(few["pi"])
    labels = float(kept["labels"][:rows].sum())
    reduction = float((_at(kept, 0.0, " loss")[:rows] - _at(kept, 1.0, " loss")[:rows]).sum()) / labels
    rules = {name: path_scores(kept, rows, points)["pi"] for name, points in state.rules.items()}
    best = rules[max(rules, key=lambda name: RULES[name])]
    return {
        "loss_on": measured_loss(model, state),
        "loss_off": measured_loss(model, state, torch.ones(count, dtype=torch.bool)),
        "scoring_rows": [rows, state.settings["many"]],
        "measuring_rows": len(state.measured),
        "reduction": reduction,
        "completeness_error": {name: float(value.sum()) - reduction for name, value in rules.items()},
        "spearman_to_finest": {name: spearman(value, best) for name, value in rules.items()},
        "spearman_few_to_many": {name: spearman(few[name], many[name]) for name in MEASURED_MANY if many},
        "spearman_to_ab": {name: spearman(value, few["ab"]) for name, value in few.items()},
    }


def exact_agreement(model: Any, state: State, kept: dict[str, Tensor], few: dict[str, Tensor]) -> dict[str, Any]:
    """Spearman correlation of every score with exact AB-LoRA over ranks drawn at random."""
    from gatewise.allocation.gates import GateBank
    from gatewise.allocation.scores.ablation import exact as exactly
    from gatewise.allocation.scoring import scoring
    from gatewise.allocation.slots import lora_layers

    ranks = [(path, slot) for path, layer in lora_layers(model).items() for slot in range(layer.r["default"])]
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(1))[:EXACT_RANKS]
    began = time.perf_counter()
    with scoring(model), GateBank(model) as gates:
        exact = exactly(model, state.collate(state.scored[: state.settings["few"]]), gates, [ranks[i] for i in drawn.tolist()])
    few = few | {name: path_scores(kept, state.settings["few"], n)["pi"] for name, n in state.rules.items()}
    return {
        "ranks": len(drawn),
        "seconds": round(time.perf_counter() - began, 1),
        "spearman": {name: spearman(value[drawn], exact) for name, value in few.items()},
    }


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation."""
    order = torch.stack([value.double().argsort().argsort().double() for value in (first, second)])
    return round(float(torch.corrcoef(order)[0, 1]), 5)


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "seed", "stage", "what", "score", "rows", "cut"))


def read(results: Path) -> list[Line]:
    """The lines so far; a last one cut off by an interruption is left out."""
    lines = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def main() -> None:
    """Measures what is missing, or reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "scores.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "scores", help="adapters and gradients are kept here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if options.data_dir is None:
        parser.error("--data-dir is needed: the folder with sst2/train.jsonl, text2mdt/en_train.json and so on")
    for seed in options.seeds:
        for task in options.tasks:
            for stage in reversed(STAGES):
                measure(task, seed, stage, options.data_dir, options.work, options.results)


if __name__ == "__main__":
    main()
