"""Which importance score finds the ranks that do not matter? Deletion curves on SmolLM2-135M.

A LoRA adapter (r = 8 on all linear layers) is trained on a task and kept early and late. Its ranks are scored on held-out training
rows, the lowest 10, 25, 50 and 75% are switched off, and the loss is measured on dev rows: never on rows that trained or scored.
The gradient of every gate for every single example is kept at each node of the path, so that all gradient scores, signed or not,
per batch or per example, of few rows or many, come from the same passes.

Everything measured is appended to a JSON-lines file as it comes; what is there is not measured again. Several processes may work on
different tasks or seeds at once.

    python benchmarks/scores.py --data-dir DATA --tasks sst2 trec --seeds 0 1 2
    python benchmarks/scores.py --report                          # the tables; --plot docs/deletion_curves.png for the curves
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_data import load_task, shuffled
from campaign import RESULTS, append, read
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from gatewise.allocation import slots
from gatewise.allocation.scores.ablation import exact as exactly
from gatewise.allocation.scores.path_integral import quadrature
from gatewise.allocation.scoring import GateBank, parts_of, scoring
from gatewise.allocation.slots import factors, lora_layers
from gatewise.losses import mean_loss
from gatewise.models import load_model, load_tokenizer
from gatewise.runs.trainer import RecipeTrainer
from gatewise.scores import sensitivity
from gatewise.tasks import PadCollator, encode

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
Place = tuple[str, int, str]
Score = tuple[str, str]
"""A score's name and whether it was made of few or many examples."""


class State:
    """One adapter at one stage: its model, its scoring and measuring rows, and the file of its gradients."""

    def __init__(self, task: str, seed: int, stage: str, data_dir: Path, work: Path) -> None:
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
        file = self.folder / f"{self.stage}.safetensors"
        if not file.is_file():
            _train(self)
        model: PeftModel = fresh_model(self.seed)
        model.load_state_dict(load_file(str(file)), strict=False)
        return model.eval()

    def gradients(self, model: Any) -> dict[str, Tensor]:
        """The gate gradients of every example at every node, kept in a file. ``few`` nodes for the first rows only."""
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
    set_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_model(MODEL, dtype=torch.bfloat16), config)


def _train(state: State) -> None:
    """Trains one adapter and keeps its weights at both stages."""
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
    rows = len(batch["labels"])
    with scoring(model), GateBank(model) as gates:
        total = sum(len(gate) for gate in gates.fill(node).values())
        gradients, losses = torch.zeros(rows, total), torch.zeros(rows)
        counts = torch.zeros(rows)
        for part in parts_of(model, {**batch, "row": torch.arange(rows)}).own:
            own = part.pop("row")
            found, sums, number = gates.row_gradients(part, node, apart=True)
            gradients[own] = torch.cat(list(found.values()), dim=1)
            losses[own], counts[own] = sums, number.float()
    return gradients, losses, counts if labels is None or len(counts) > len(labels) else labels


def path_scores(kept: dict[str, Tensor], rows: int, points: int) -> dict[str, Tensor]:
    """Every score made from the examples' gradients: name -> (R,), higher for ranks worth keeping.

    ab: AB-LoRA to first order, loo and alone its two terms, std the two standardised and added; pi: the path integral; abs: the
    magnitude of a sum over examples; per example: the sum of the examples' magnitudes; second moment: the root mean square over
    examples; fisher: the second moment of the gradient with all ranks on; moment: of the integral over the upper half of the
    path, or of the gradient at 0.79; moments: gatewise's path_moments, the mean of that and its moment; pi moments: the same from
    the whole path.
    """
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
    with scoring(model, float32=False), GateBank(model) as gates:
        if off is not None:
            parts = (~off).float().split([len(gate) for gate in gates.fill(1.0).values()])
            gates.gates = dict(zip(gates.layers, parts, strict=True))
        return mean_loss(model, parts_of(model, state.collate(state.measured)).own)


def lowest(scores: Tensor, cut: float) -> Tensor:
    """(R,) bool: the share ``cut`` of the ranks that score lowest."""
    off = torch.zeros(len(scores), dtype=torch.bool)
    off[scores.argsort(stable=True)[: round(cut * len(scores))]] = True
    return off


def recovered_loss(state: State, off: Tensor) -> float:
    """The measured loss after the ranks in ``off`` are gone and the others have trained on for a few steps."""
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
        append({**place, **one, **values}, results)
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
    ranks = [(path, slot) for path, layer in lora_layers(model).items() for slot in range(layer.r["default"])]
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(1))[:EXACT_RANKS]
    began = time.perf_counter()
    with scoring(model), GateBank(model) as gates:
        exact = exactly(
            model, parts_of(model, state.collate(state.scored[: state.settings["few"]])), gates, [ranks[i] for i in drawn.tolist()]
        )
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


# ---- the report ----


def report(lines: list[Line], plot: Path | None) -> None:
    """Prints the tables, and draws the curves."""
    states = {place_of(line): line for line in lines if line["what"] == "state"}
    losses: dict[Place, dict[Score, dict[float, float]]] = {}
    for line in lines:
        if line["what"] == "deleted":
            score = (line["score"], line["rows"] if line["score"] not in ("random", "magnitude") else "none")
            losses.setdefault(place_of(line), {}).setdefault(score, {})[line["cut"]] = line["loss"]
    curves(states, losses)
    regrets(losses)
    recovered(lines, states)
    agreement(states, lines)
    if plot:
        draw(states, losses, plot)


def place_of(line: Line) -> Place:
    return line["task"], line["seed"], line["stage"]


def groups(states: Iterable[Place]) -> Iterator[tuple[str, str, list[Place]]]:
    """Task, stage and the seeds' places."""
    known = list(states)
    for task in TASKS:
        for stage in STAGES:
            places = [place for place in known if place[0] == task and place[2] == stage]
            if places:
                yield task, stage, places


def curves(states: dict[Place, Line], losses: dict[Place, dict[Score, dict[float, float]]]) -> None:
    """The rise of the dev loss at every cut, mean over seeds, for every score."""
    for task, stage, places in groups(states):
        on, off = ([states[p][key] for p in places] for key in ("loss_on", "loss_off"))
        print(f"\n{task}, {stage}: dev loss {spread(on)} with all ranks, {spread(off)} with none; rise when the lowest are off")
        print("  " + " " * 30 + "".join(f"{cut:>14.0%}" for cut in CUTS) + "   seeds")
        rows: dict[Score, tuple[list[list[float]], int]] = {}
        for score in dict.fromkeys(s for p in places for s in losses.get(p, {})):
            held = [p for p in places if len(losses[p].get(score, {})) == len(CUTS)]
            if held:
                rise = [[losses[p][score][cut] - states[p]["loss_on"] for p in held] for cut in CUTS]
                rows[score] = rise, len(held)
        for score, (rise, seeds) in sorted(rows.items(), key=lambda item: statistics.mean(item[1][0][2])):
            print(f"  {named(score):30}" + "".join(f"{spread(values, True):>14}" for values in rise) + f"   {seeds}")


def regrets(losses: dict[Place, dict[Score, dict[float, float]]]) -> None:
    """How far each score is from the best one of the same place and cut, over all places where all of them were measured."""
    everywhere = [s for s in dict.fromkeys(s for m in losses.values() for s in m) if all(s in m for m in losses.values())]
    complete = [p for p, m in losses.items() if all(len(m[s]) == len(CUTS) for s in everywhere)]
    print(f"\ndistance to the best score of the same adapter and cut, over {len(complete)} adapters: mean, worst, times best")
    found: dict[Score, list[tuple[float, float]]] = {score: [] for score in everywhere}
    for place in complete:
        for cut in CUTS:
            best = min(losses[place][score][cut] for score in everywhere)
            for score in everywhere:
                found[score].append((cut, losses[place][score][cut] - best))
    print("  " + " " * 30 + "".join(f"{cut:>9.0%}" for cut in CUTS) + "      all    worst   best")
    for score, values in sorted(found.items(), key=lambda item: statistics.mean([v for _, v in item[1]] or [0])):
        if values:
            by_cut = [statistics.mean(v for c, v in values if c == cut) for cut in CUTS]
            everything = [v for _, v in values]
            print(
                f"  {named(score):30}" + "".join(f"{value:9.3f}" for value in by_cut)
                + f"{statistics.mean(everything):9.3f}{max(everything):9.3f}{sum(v == 0 for v in everything):7}"
            )  # fmt: skip


def recovered(lines: list[Line], states: dict[Place, Line]) -> None:
    """The rise of the dev loss after the lowest are gone for good and the rest has trained on."""
    print("\nafter a short recovery (late adapters): rise of the dev loss")
    for task, stage, places in groups(states):
        mine = [line for line in lines if line["what"] == "recovered" and place_of(line) in places]
        for score in dict.fromkeys(line["score"] for line in mine):
            rise = [line["loss"] - states[place_of(line)]["loss_on"] for line in mine if line["score"] == score]
            print(f"  {task:9} {stage:6} {mine[0]['cut']:.0%} off  {score:20} {spread(rise, True):>16}   seeds {len(rise)}")


def agreement(states: dict[Place, Line], lines: list[Line]) -> None:
    """How complete the integral is, and how the scores agree."""
    for task, stage, places in groups(states):
        print(f"\n{task}, {stage}:")
        for key in ("completeness_error", "spearman_to_finest", "spearman_few_to_many", "spearman_to_ab"):
            names = dict.fromkeys(name for p in places for name in states[p][key])
            facts = {n: [states[p][key][n] for p in places if n in states[p][key]] for n in names}
            if key == "completeness_error":
                facts = {n: [abs(states[p][key][n] / states[p]["reduction"]) for p in places if n in states[p][key]] for n in names}
            means = "  ".join(f"{name} {statistics.mean(values):.4f}" for name, values in facts.items())
            if not means:
                continue
            print(f"  {key.replace('_', ' ') + (' / reduction' if key == 'completeness_error' else '')}: {means}")
        for line in lines:
            if line["what"] == "exact" and place_of(line) in places:
                means = "  ".join(f"{name} {value:.4f}" for name, value in line["spearman"].items())
                print(f"  spearman with exact ablation over {line['ranks']} ranks ({line['seconds']} s): {means}")


def named(score: Score) -> str:
    return score[0] if score[1] == "none" else f"{score[0]}, {score[1]} examples"


def spread(values: list[float], sign: bool = False) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.3f}{deviation}"


def draw(states: dict[Place, Line], losses: dict[Place, dict[Score, dict[float, float]]], out: Path) -> None:
    """Mean dev loss against the share of ranks that are off, one panel a task and stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = list(groups(states))
    figure, axes = plt.subplots(len(STAGES), len(TASKS), figsize=(4.4 * len(TASKS), 7), layout="constrained")
    shown: dict[Score, dict[str, Any]] = {
        ("ab", "few"): {"color": "#0b3f73", "label": "AB-LoRA"},
        ("pi", "few"): {"color": "#c2410c", "label": "path integral"},
        ("moments", "few"): {"color": "#15803d", "lw": 2.2, "label": "path moments (gatewise)"},
        ("moment", "few"): {"color": "#15803d", "ls": "--", "label": "its second moment alone"},
        ("sensitivity", "few"): {"color": "#7e22ce", "label": "AdaLoRA's sensitivity"},
        ("loo", "few"): {"color": "#5c6b7a", "ls": ":", "label": "loss without the rank, first order"},
        ("random", "none"): {"color": "#9aa5b1", "label": "random"},
    }
    for task, stage, places in panels:
        axis = axes[STAGES.index(stage)][list(TASKS).index(task)]
        base = statistics.mean(states[p]["loss_on"] for p in places)
        for score, style in shown.items():
            held = [p for p in places if len(losses.get(p, {}).get(score, {})) == len(CUTS)]
            if held:
                means = [statistics.mean(losses[p][score][cut] for p in held) for cut in CUTS]
                axis.plot([0, *[100 * cut for cut in CUTS]], [base, *means], marker="o", ms=3, **style)
        axis.set(title=f"{task}, {stage}", xlabel="% of ranks off", ylabel=f"dev loss, mean of {len(places)} seeds", yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measures what is missing, or reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "scores.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "scores", help="adapters and gradients are kept here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    parser.add_argument("--plot", type=Path, help="where --report draws the curves")
    options = parser.parse_args()
    if options.report:
        report(read(options.results), options.plot)
        return
    if options.data_dir is None:
        parser.error("--data-dir is needed: the folder with sst2/train.jsonl, text2mdt/en_train.json and so on")
    for seed in options.seeds:
        for task in options.tasks:
            for stage in reversed(STAGES):
                measure(task, seed, stage, options.data_dir, options.work, options.results)


if __name__ == "__main__":
    main()
