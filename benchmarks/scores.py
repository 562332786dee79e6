"""Which importance score finds the ranks that do not matter? Deletion curves on SmolLM2-135M.

A LoRA adapter (r = 8 on all linear layers) is trained on a task and kept early and late. Its ranks are scored on held-out training
rows, the lowest 10, 25, 50 and 75% are switched off, and the loss is measured on dev rows: never on rows that trained or scored.
The gradient of every gate for every single example is taken at each node of the path, so that all gradient scores, per batch or per
example, come from the same passes.

Everything measured is appended to a JSON-lines file as it comes; what is there is not measured again. The file has more than this
script still measures: scores of more examples, by magnitudes, and of single points of the path, which lost.

    python benchmarks/scores.py --data-dir DATA --tasks sst2 trec --seeds 0 1 2
    python benchmarks/scores.py --report                          # the tables
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_data import load_task, shuffled
from campaign import RESULTS, append, read
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from gatewise.allocation import slots
from gatewise.allocation.scores.ablation import exact as exactly
from gatewise.allocation.scores.path_integral import quadrature
from gatewise.allocation.scores.path_moments import NODES
from gatewise.allocation.scoring import GateBank, parts_of, scoring
from gatewise.losses import mean_loss
from gatewise.models import load_model, load_tokenizer
from gatewise.runs.trainer import RecipeTrainer
from gatewise.scores import sensitivity
from gatewise.tasks import PadCollator, encode

MODEL = "smollm2-135m-instruct"
TASKS: dict[str, dict[str, int]] = {
    "sst2": {"early": 20, "late": 80, "batch": 16, "rows": 32, "measured": 96},
    "trec": {"early": 20, "late": 80, "batch": 16, "rows": 32, "measured": 96},
    "text2mdt": {"early": 20, "late": 80, "batch": 8, "rows": 32, "measured": 32},
}
STAGES = ("early", "late")
CUTS = (0.10, 0.25, 0.50, 0.75)
RECOVERY = {"steps": 8, "cut": 0.75, "learning_rate": 5e-4}
EXACT_RANKS = 40
RULES = {"pi2": 2, "pi4": 4, "pi8": 8}  # the quadratures of seed 0; the other seeds have pi4 alone
# What is deleted by; path_scores says what the names mean.
DELETED = ("ab", "loo", "std", "pi", "pi second moment", "fisher", "moment", "moments", "pi moments", "sensitivity", "magnitude",
           "random")  # fmt: skip
RECOVERED = ("ab", "pi", "moments", "sensitivity", "random")

Line = dict[str, Any]
"""One measurement."""
Place = tuple[str, int, str]
Score = tuple[str, str]
"""A score's name and whether it was made of few or many examples."""


class State:
    """One adapter at one stage: its model, and its scoring and measuring rows."""

    def __init__(self, task: str, seed: int, stage: str, data_dir: Path, work: Path) -> None:
        self.seed, self.settings = seed, TASKS[task]
        train, dev, template = load_task(task, data_dir)
        tokenizer = load_tokenizer(MODEL)
        self.collate = PadCollator(tokenizer)
        features = encode(shuffled(train, seed), tokenizer, template)
        rows = self.settings["rows"]
        self.batch, self.trained = self.collate(features[:rows]), features[rows:]
        self.measured = encode(shuffled(dev, seed, self.settings["measured"]), tokenizer, template)
        self.folder, self.file = work / f"{task}-{seed}", work / f"{task}-{seed}" / f"{stage}.safetensors"

    def model(self) -> Any:
        """The base model with the adapter of this stage, trained first where it is not yet on disk."""
        if not self.file.is_file():
            _train(self)
        model = fresh_model(self.seed)
        model.load_state_dict(load_file(str(self.file)), strict=False)
        return model.eval()


def fresh_model(seed: int) -> Any:
    """SmolLM2 in bfloat16 with a LoRA adapter at its start."""
    set_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load_model(MODEL, dtype=torch.bfloat16), config)


def _train(state: State) -> None:
    """Trains one adapter and keeps its weights at both stages."""
    model = fresh_model(state.seed)
    state.folder.mkdir(parents=True, exist_ok=True)

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, trainer_state: Any, control: Any, **kwargs: Any) -> None:
            for stage in STAGES:
                if trainer_state.global_step == state.settings[stage]:
                    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
                    save_file(weights, str(state.folder / f"{stage}.safetensors"))

    train_on(model, state, state.settings["late"], 5e-4, warmup=8, callbacks=[Keep()])


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
            eval_dataset=state.measured,
            collator=state.collate,
            note={},
            callbacks=callbacks or [],
            group_by_length=True,
        ).train()


def example_gradients(model: Any, batch: dict[str, Tensor], node: float) -> tuple[Tensor, Tensor, Tensor]:
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
    return gradients, losses, counts


def path_scores(model: Any, state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every score made of the examples' gradients, name -> (R,), higher for ranks worth keeping; and how complete the integral is.

    ab: AB-LoRA to first order, loo one of its two terms, std the two standardised and added; pi: the path integral; second moment:
    the root mean square over examples; fisher: that of the gradient with all ranks on; moments: gatewise's path_moments, the mean
    and the second moment of the upper half of the path; pi moments: the same from the whole path.
    """
    passes: dict[float, tuple[Tensor, Tensor, Tensor]] = {}

    def at(node: float) -> Tensor:
        if node not in passes:
            passes[node] = example_gradients(model, state.batch, node)
        return passes[node][0]

    on, off = at(1.0), at(0.0)
    labels = passes[1.0][2].sum()
    rules = RULES if state.seed == 0 else {"pi4": 4}
    # (rows, R): what each rank takes off the loss of each example.
    paths = {name: -sum(w * at(c) for c, w in zip(*quadrature(points), strict=True)) for name, points in rules.items()}
    reduction = float((passes[0.0][1] - passes[1.0][1]).sum() / labels)
    loo, alone = -on.sum(0) / labels, -off.sum(0) / labels
    scores = {"ab": loo + alone, "loo": loo, "std": loo / loo.std() + alone / alone.std(), "pi": paths["pi4"].sum(0) / labels}
    for name, each in (("moment", -sum(w * at(c) for c, w in NODES)), ("pi second moment", paths["pi4"])):
        mean, scores[name] = each.mean(0), each.square().mean(0).sqrt()
        scores["moments" if name == "moment" else "pi moments"] = mean / mean.std() + scores[name] / scores[name].std()
    scores["fisher"] = on.square().mean(0).sqrt()
    sums = {name: own.sum(0) / labels for name, own in paths.items()}
    finest = list(sums.values())[-1]
    facts = {
        "reduction": reduction,
        "completeness_error": {name: float(value.sum()) - reduction for name, value in sums.items()},
        "spearman_to_finest": {name: spearman(value, finest) for name, value in sums.items()},
        "spearman_few_to_many": {},
        "spearman_to_ab": {name: spearman(value, scores["ab"]) for name, value in scores.items()},
    }
    return scores, facts


def weight_scores(model: Any, state: State) -> dict[str, Tensor]:
    """The scores that are not made of path gradients: AdaLoRA's, the size of a rank's update, and chance."""
    layers = slots.lora_layers(model).values()
    size = [a.norm(dim=1) * b.norm(dim=0) for a, b in (slots.factors(layer, "default") for layer in layers)]
    flat = torch.cat(list(sensitivity(model, state.batch).values()))
    chance = torch.rand(len(flat), generator=torch.Generator().manual_seed(state.seed))
    return {"sensitivity": flat, "magnitude": torch.cat(size).detach(), "random": chance}


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
    todo = [one for one in wanted(seed, stage) if key({**place, **one}) not in done]
    if not todo:
        return
    state = State(task, seed, stage, data_dir, work)
    model = state.model()
    scores, facts = path_scores(model, state)
    scores |= weight_scores(model, state)
    for one in todo:
        if one["what"] == "state":
            everything = torch.ones(len(scores["pi"]), dtype=torch.bool)
            values = {"loss_on": measured_loss(model, state), "loss_off": measured_loss(model, state, everything), **facts}
        elif one["what"] == "exact":
            values = exact_agreement(model, state, scores)
        else:
            of = recovered_loss(state, lowest(scores[one["score"]], one["cut"])) if one["what"] == "recovered" else None
            values = {"loss": measured_loss(model, state, lowest(scores[one["score"]], one["cut"])) if of is None else of}
        append({**place, **one, **values}, results)
    print(f"  {task} {seed} {stage}: measured", flush=True)


def wanted(seed: int, stage: str) -> Iterator[dict[str, Any]]:
    """What is measured of a state, the plain facts first."""
    yield {"what": "state", "score": "", "rows": "", "cut": 0}
    yield from ({"what": "deleted", "score": score, "rows": "few", "cut": cut} for score in DELETED for cut in CUTS)
    if stage == "late":
        yield from ({"what": "recovered", "score": score, "rows": "few", "cut": RECOVERY["cut"]} for score in RECOVERED)
        if seed == 0:
            yield {"what": "exact", "score": "", "rows": "few", "cut": 0}


def exact_agreement(model: Any, state: State, scores: dict[str, Tensor]) -> dict[str, Any]:
    """Spearman correlation of every score with exact AB-LoRA over ranks drawn at random."""
    ranks = [(path, slot) for path, layer in slots.lora_layers(model).items() for slot in range(layer.r["default"])]
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(1))[:EXACT_RANKS]
    with scoring(model), GateBank(model) as gates:
        exact = exactly(model, parts_of(model, state.batch), gates, [ranks[i] for i in drawn.tolist()])
    return {"ranks": len(drawn), "spearman": {name: spearman(value[drawn], exact) for name, value in scores.items()}}


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation."""
    order = torch.stack([value.double().argsort().argsort().double() for value in (first, second)])
    return round(float(torch.corrcoef(order)[0, 1]), 5)


def key(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("task", "seed", "stage", "what", "score", "rows", "cut"))


# ---- the report ----


def report(lines: list[Line]) -> None:
    """Prints the tables."""
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
                print(f"  spearman with exact ablation over {line['ranks']} ranks: {means}")


def named(score: Score) -> str:
    return score[0] if score[1] == "none" else f"{score[0]}, {score[1]} examples"


def spread(values: list[float], sign: bool = False) -> str:
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.3f}{deviation}"


def main() -> None:
    """Measures what is missing, or reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS / "scores.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs") / "scores", help="adapters are kept here")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    options = parser.parse_args()
    if options.report:
        report(read(options.results))
        return
    if options.data_dir is None:
        parser.error("--data-dir is needed: the folder with sst2/train.jsonl, text2mdt/en_train.json and so on")
    for seed in options.seeds:
        for task in options.tasks:
            for stage in reversed(STAGES):
                measure(task, seed, stage, options.data_dir, options.work, options.results)


if __name__ == "__main__":
    main()
