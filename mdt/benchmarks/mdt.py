"""Decision trees from medical text: LoRA, ALoRA and PI-LoRA at one budget, by what may be written.

A task is a language: en with SmolLM2-135M, zh with Gemma 3 270M (fetch it first: `gatewise models fetch gemma3-270m`). A run is
what `gatewise train mdt/recipes/mdt-METHOD.yaml` does with other data, model and budget, on every passage and three copies of
it with swapped phrases (gatewise_mdt.training.swapping). The dev passages are then read by the adapter it wrote, twice:

    constrained    only what can still become a valid tree
    verbatim       that, and only subjects and objects that are whole words of the text

(Rows that are there already also have "free", written without a constraint.)

Everything is measured on the dev split by all metrics and the errors of gatewise_mdt.evaluation, gold trees repaired as
`gatewise mdt evaluate` does; "as_published" has the metrics without that. Time is that of the processor: with
OMP_NUM_THREADS=1 minutes of one core. A run that is stopped goes on where it was; its checkpoints, and what was written for each
passage, are in runs/mdt.

    OMP_NUM_THREADS=1 python mdt/benchmarks/mdt.py --data-dir DATA --tasks en --seeds 0      # DATA/text2mdt/en_train.json, ...
    python mdt/benchmarks/mdt.py --report                             # the tables from the results file
"""

import dataclasses
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from benchmark_data import teacher_forced
from campaign import campaign, spread
from gatewise_mdt import Extractor, count_mistakes, evaluate, read_trees, swapped_copies, training_rows
from gatewise_mdt.records import read_items

from gatewise import GatewiseError
from gatewise.files import write_json
from gatewise.progress import quiet
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train, what_is_kept
from gatewise.tasks import PadCollator, Records, encode

ROOT = Path(__file__).parents[1]  # of gatewise-mdt
RUNS = ROOT / "runs" / "mdt"
# Changes of the recipes: of all, of a language's, of a method's.
SETTINGS: dict[str, Any] = {
    "dtype": "float32",  # on CPUs without AMX faster than bfloat16
    "peft.r": 16,
    "peft.lora_alpha": 32,
    "peft.lora_dropout": 0.0,  # drawing its zeros takes a fifth of the time on a CPU
    "copies": 3,  # no setting of recipes: so many copies of every training record, with phrases swapped, join it
    "training.epochs": 2,
    "training.batch_size": 8,
    "training.learning_rate": 1e-3,
    "training.save_every": 25,
}
LANGUAGES: dict[str, dict[str, Any]] = {"en": {"model": "smollm2-135m-instruct"}, "zh": {"model": "gemma3-270m"}}
ROUNDS: dict[str, Any] = {
    "allocation.budget": "ranks", "allocation.rounds": 3, "allocation.first_round": 0.5, "allocation.recover": 0.125,
}  # fmt: skip
# Each named for its recipe, a variant with more after it.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    # In as many steps: the records alone, and more copies, so that nothing comes twice.
    "lora-plain": {"copies": 0, "training.epochs": 8},
    "lora-once": {"copies": 7, "training.epochs": 1},
    # Exact ablation of all 3360 ranks would take longer than the training.
    "alora": {**ROUNDS, "allocation.score": "ablation", "allocation.score_options": {"mode": "screened", "max_exact": 0}},
    "pi-lora": {**ROUNDS, "allocation.score_options": {"points": 4}},
}
DECODINGS: dict[str, dict[str, bool]] = {
    "constrained": {},
    "verbatim": {"verbatim": True},
}
DECODING_BATCH = 25
MAX_NEW_TOKENS = 384  # the longest gold output of the dev splits has about 250
SHOWN = ("triplet_f1", "node_f1", "tree_acc", "path_f1", "ter")


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Trains one adapter and has it read the dev split in every way."""
    folder = RUNS / f"{task}-{method}-{seed}"
    files = {split: data_dir / "text2mdt" / f"{task}_{split}.json" for split in ("train", "dev")}
    with quiet(bars=True):
        settings = {**LANGUAGES[task], **SETTINGS, **METHODS[method]}
        recipe, trained = train_once(folder, files, method, settings, seed)
        published = read_items(files["dev"])
        texts = [item["text"] for item in published]
        extractor = Extractor.load(folder / "run" / "adapter", max_new_tokens=MAX_NEW_TOKENS, batch_size=DECODING_BATCH)
        forced = forced_metrics(extractor, files["dev"])
        decodings = {name: measured(published, written(extractor, texts, task, name, folder)) for name in DECODINGS}
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "decodings": decodings,
        **forced,
        **trained,
        "recipe": {**recipe.model_dump(mode="json"), "data": {"max_length": recipe.data.max_length}},
    }


# ---- training ----


def train_once(
    folder: Path, files: dict[str, Path], method: str, settings: dict[str, Any], seed: int
) -> tuple[Any, dict[str, Any]]:
    """The recipe, and what its training came to; one that was stopped is gone on with, one that ended is not repeated."""
    rows = {split: folder / "rows" / f"{split}.jsonl" for split in files}
    copies = settings.pop("copies")
    own = {"seed": seed, "data.train": str(rows["train"]), "data.dev": str(rows["dev"]), "data.limit_dev": 2, **settings}
    changes = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    base = next(name for name in ("pi-lora", "alora", "lora") if method == name or method.startswith(f"{name}-"))
    recipe = load_recipe(ROOT / "recipes" / f"mdt-{base}.yaml", changes)
    output, ended = folder / "run", folder / "trained.json"
    if ended.is_file():
        done = json.loads(ended.read_text())
        if load_recipe(output / "recipe.yaml") != recipe or done["copies"] != copies:
            raise SystemExit(f"the run in {folder} had another recipe: remove the folder to make it anew")
        return recipe, done
    for split, file in files.items():
        rows[split].parent.mkdir(parents=True, exist_ok=True)
        records = list(read_trees(file, repair=True).records)
        if split == "train":
            records += swapped_copies(records, copies, seed=seed)
        lines = (json.dumps(row, ensure_ascii=False) for row in training_rows(records))
        rows[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    kept = what_is_kept(output, recipe.parts()[1]) is not None and not (output / "metrics.json").is_file()
    began = time.process_time()
    result = train(recipe, output, resume=kept, overwrite=not kept)
    # Of a training that was stopped, only the last part is timed: the whole is taken to have gone at its speed.
    share = 1 - (result.resumed_from or 0) / result.steps
    made = {
        "parameters": result.parameters["adapter"],
        "ranks": result.ranks,
        "copies": copies,
        "steps": result.steps,
        "resumed_from": result.resumed_from,
        "training_seconds": round((time.process_time() - began) / share, 1),
    }
    write_json(ended, made)
    shutil.rmtree(folder / "rows")
    return recipe, made


# ---- reading the dev split ----


def forced_metrics(extractor: Any, file: Path) -> dict[str, float]:
    """Loss and accuracy of each next token of the gold outputs, which tell methods apart with less noise than whole trees do."""
    rows = training_rows(read_trees(file, repair=True).records)
    features = encode(Records("generation", rows, None, file.name), extractor.tokenizer, extractor.template, max_length=1024)
    made = teacher_forced(extractor.model, features, PadCollator(extractor.tokenizer))
    return {"loss": round(made["loss"], 4), "token_accuracy": round(made["token_accuracy"], 4)}


def written(extractor: Any, texts: Sequence[str], language: str, decoding: str, folder: Path) -> list[dict[str, Any]]:
    """What was read from each text, in their order; kept in the folder, and not read again."""
    file = folder / f"{decoding}.json"
    if not file.is_file():
        began = time.process_time()
        found = dataclasses.replace(extractor, **DECODINGS[decoding])(texts, language=language)
        seconds = (time.process_time() - began) / len(texts)
        made = []
        for text, one in zip(texts, found, strict=True):
            if isinstance(one, GatewiseError):
                said: dict[str, Any] = {"tree": [], "failed": str(one)}
            else:
                said = {"tree": one.tree.to_preorder(), "written": one.written, "warnings": one.warnings}
                said["absent"] = [list(triple) for triple in one.absent]
            made.append({"text": text, **said, "seconds": round(seconds, 2)})
        write_json(file, made)
    return json.loads(file.read_text())


def measured(published: Sequence[dict[str, Any]], predicted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that is measured of one way of writing."""
    trees = [one["tree"] for one in predicted]
    metrics, as_published = (evaluate(published, trees, repair=repair).to_json() for repair in (True, False))
    errors = {kind: one for kind, one in count_mistakes(published, trees, repair=True).items() if one["count"]}
    return {
        "metrics": {name: round(value, 4) for name, value in metrics.items()},
        "as_published": {name: round(value, 4) for name, value in as_published.items()},
        "errors": errors,
        "absent": sum(bool(one.get("absent")) for one in predicted),
        "warned": sum(bool(one.get("warnings")) for one in predicted),
        "seconds": round(sum(one["seconds"] for one in predicted), 1),
    }


# ---- the report ----


def report(runs: list[dict[str, Any]]) -> None:
    """Prints a table a task, with the errors of what was written verbatim, means over seeds."""
    for task in [task for task in LANGUAGES if any(run["task"] == task for run in runs)]:
        held = [run for run in runs if run["task"] == task]
        print(f"\n{task} (dev, {held[0]['decodings']['verbatim']['metrics']['n']} passages, {held[0]['recipe']['model']})")
        for method in METHODS:
            group = [run for run in held if run["method"] == method]
            if group:
                print(_trained_line(method, group))
            for decoding in DECODINGS if group else ():
                print(_decoding_line(decoding, [run["decodings"][decoding] for run in group]))
            for kind, one in errors_of([run["decodings"]["verbatim"] for run in group]).items() if group else ():
                print(f"      {kind:16} {one['count']:6.1f} in {one['trees']:5.1f} trees, alone in {one['alone']:5.1f}")


def errors_of(group: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean counts of each kind of error, the commonest first."""
    kinds = dict.fromkeys(kind for one in group for kind in one["errors"])
    none = {"count": 0, "trees": 0, "alone": 0}
    means = {kind: {name: statistics.mean(one["errors"].get(kind, none)[name] for one in group) for name in none} for kind in kinds}
    return dict(sorted(means.items(), key=lambda item: -item[1]["count"]))


def _trained_line(method: str, group: list[dict[str, Any]]) -> str:
    size, minutes = (statistics.mean(run[key] for run in group) for key in ("parameters", "training_seconds"))
    loss, tokens = (spread([run[key] for run in group], 4) for key in ("loss", "token_accuracy"))
    return (
        f"  {method:12} loss {loss}   token accuracy {tokens}   {size / 1e6:.2f}M parameters   {minutes / 60:.0f} core minutes of"
        f" training   seeds {len(group)}"
    )


def _decoding_line(decoding: str, group: list[dict[str, Any]]) -> str:
    metrics = [one["metrics"] for one in group]
    shown = "   ".join(f"{name} {spread([one[name] for one in metrics], 3)}" for name in SHOWN)
    malformed = spread([one["malformed"] / one["n"] for one in metrics], 2)
    minutes = statistics.mean(one["seconds"] for one in group) / 60
    return f"    {decoding:11} {shown}   malformed {malformed}   {minutes:.1f} core minutes"


def _told(run: dict[str, Any]) -> str:
    ways = (f"{name}: tree accuracy {one['metrics']['tree_acc']}" for name, one in run["decodings"].items())
    return f"loss {run['loss']}, {', '.join(ways)}, {run['training_seconds']} s"


if __name__ == "__main__":
    campaign(__doc__, f"{ROOT}/benchmarks/results/mdt.jsonl", LANGUAGES, METHODS, one_run, _told, report)
