"""Decision trees by pointing: how good they are by base model, language and method, where trees are lost, and how fast it is.

A task is a language and a base model: en-minilm, en-smollm2, zh-gemma3, zh-qwen05; both-gemma3 and both-qwen05 are one model for
both languages, measured on each. A number behind it, as in en-minilm-75, is how many passages of a language it learns from, drawn
by the seed, in as many steps at the same rate. A run is what `gatewise train mdt/recipes/mdt-pointing.yaml` does with other data,
model, method and budget, the base model in bfloat16 where the machine computes in it by itself (a row says in which). The adapter
that it wrote then reads the dev passages. Mistakes are counted by kind. Confidence is fitted on four fifths of the dev passages and
measured on the other fifth, in turn. Seconds are those of a processor for a passage, one at a time and sixteen at once.

    python mdt/benchmarks/mdt_pointing.py --data-dir DATA --tasks en-minilm --seeds 0 1 2      # DATA/text2mdt/en_train.json, ...
    python mdt/benchmarks/mdt_pointing.py --report

A run that is stopped goes on where it was: runs/mdt-pointing has its checkpoints. Gemma's terms have to be accepted first
(`gatewise models fetch gemma3-270m`). What generators make of the same passages is in results/mdt.jsonl (mdt/benchmarks/mdt.py).
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from campaign import campaign, spread
from gatewise_mdt import measure
from gatewise_mdt.pointing.calibration import Calibration, fitted
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.task import read_records

from gatewise.progress import quiet
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train, what_is_kept

ROOT = Path(__file__).parents[1]  # of gatewise-mdt
RUNS = ROOT / "runs" / "mdt-pointing"
SETTINGS: dict[str, Any] = {
    "peft.r": 16, "peft.lora_alpha": 32, "peft.lora_dropout": 0.0, "training.batch_size": 8,
    "training.learning_rate": 1e-3, "training.group_by_length": False, "training.save_every": 50,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "en-minilm": {"model": "minilm-l6", "training.max_steps": 450},
    "en-smollm2": {"model": "smollm2-135m-instruct", "training.max_steps": 450, "training.learning_rate": 5e-4},
    "zh-gemma3": {"model": "gemma3-270m", "training.max_steps": 450, "training.learning_rate": 5e-4},
    "zh-qwen05": {"model": "qwen2.5-coder-0.5b-instruct", "training.max_steps": 450, "training.learning_rate": 5e-4},
    "both-gemma3": {"model": "gemma3-270m", "training.max_steps": 600, "training.learning_rate": 5e-4},
    "both-qwen05": {"model": "qwen2.5-coder-0.5b-instruct", "training.max_steps": 600, "training.learning_rate": 5e-4},
}
ROUNDS: dict[str, Any] = {"allocation.rounds": 3, "allocation.first_round": 0.5, "allocation.recover": 0.125}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-plain": {"pointing.swapped": 0},  # in as many steps
    "alora": ROUNDS,
    "pi-lora": ROUNDS,
}
FOLDS = 5
SHOWN = ("triplet_f1", "node_f1", "path_f1", "tree_acc", "ter")


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any]:
    """Trains one adapter and measures it."""
    languages = ("en", "zh") if task.startswith("both") else (task.split("-")[0],)
    folder, (name, passages) = RUNS / f"{task}-{method}-{seed}", base_and_passages(task)
    with quiet(bars=True):
        settings = {**SETTINGS, **TASKS[name], **METHODS[method]}
        recipe, trained = train_once(folder, languages, method, settings, seed, data_dir, passages)
        extractor = PointingExtractor.load(folder / "run" / "adapter")
        made = {}
        for language in languages:
            records = read_records(str(data_dir / "text2mdt" / f"{language}_dev.json"))
            made[language] = measured(extractor, records)
    return {
        "task": task, "method": method, "seed": seed, "languages": made, **trained,
        "recipe": {**recipe.model_dump(mode="json"), "data": {"max_length": recipe.data.max_length}},
    }  # fmt: skip


def base_and_passages(task: str) -> tuple[str, int | None]:
    """A task's key in ``TASKS``, and how many passages of a language it learns from; None for all."""
    name, _, number = task.rpartition("-")
    return (name, int(number)) if number.isdecimal() else (task, None)


def train_once(
    folder: Path,
    languages: Sequence[str],
    method: str,
    settings: dict[str, Any],
    seed: int,
    data_dir: Path,
    passages: int | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The recipe, and what its training came to; one that was stopped is gone on with."""
    files = {}
    for split in ("train", "dev"):
        items = []
        for name in languages:
            own = json.loads((data_dir / "text2mdt" / f"{name}_{split}.json").read_text())
            if split == "train" and passages is not None:
                if passages >= len(own):
                    raise SystemExit(f"{passages} passages of {name} were asked for, expected fewer than the {len(own)} there are")
                own = random.Random(seed).sample(own, len(own))[:passages]  # a larger number holds those of a smaller one
            items += own
        files[split] = folder / f"{split}.json"
        files[split].parent.mkdir(parents=True, exist_ok=True)
        files[split].write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    own = {"method": method.partition("-plain")[0], "seed": seed, "data.train": str(files["train"]), "data.dev": str(files["dev"])}
    changes = [f"{key}={json.dumps(value)}" for key, value in {**own, **settings}.items()]
    recipe = load_recipe(ROOT / "recipes" / "mdt-pointing.yaml", changes)
    output = folder / "run"
    if (output / "metrics.json").is_file():
        if load_recipe(output / "recipe.yaml") != recipe:
            raise SystemExit(f"the run in {folder} had another recipe: remove the folder to make it anew")
    else:
        kept = what_is_kept(output, recipe.parts()[1]) is not None
        train(recipe, output, resume=kept, overwrite=not kept)
    told = json.loads((output / "metrics.json").read_text())
    return recipe, {
        "parameters": told["parameters"]["adapter"],
        "steps": told["steps"],
        "resumed_from": told["resumed_from"],
        "training_seconds": told["seconds"]["training"],
        "dtype": told["dtype"],
    }


def measured(extractor: Any, records: Sequence[Any]) -> dict[str, Any]:
    """Everything that is measured on the passages of one language."""
    found: dict[str, Any] = {"all": measure(extractor, records, mistakes=True)}
    found["near_f1"] = near_f1(records, extractor([record.text for record in records], language=records[0].tree.language))
    found["confidence"] = confidence(extractor, records)
    found["seconds"] = {}
    for size in (1, 16):
        texts = [record.text for record in records][: 32 * min(size, 3)]
        began = time.process_time()
        for start in range(0, len(texts), size):
            extractor(texts[start : start + size], language=records[0].tree.language)
        found["seconds"][str(size)] = round((time.process_time() - began) / len(texts), 4)
    return found


def near_f1(records: Sequence[Any], found: Sequence[Any]) -> float:
    """F1 of triples whose phrases need not end at the same words: of one relation, and of each two phrases one holds the other.

    Each triple counts for one of the other side at most, equal ones first.
    """
    both = total = 0
    for record, one in zip(records, found, strict=True):
        gold, made = (
            [tuple(part.strip().lower() for part in triple) for triple in tree.triples] for tree in (record.tree, one.tree)
        )
        total += len(gold) + len(made)
        pairs = [
            (a != b, i, j)
            for i, a in enumerate(gold)
            for j, b in enumerate(made)
            if a[1] == b[1] and all(x in y or y in x for x, y in ((a[0], b[0]), (a[2], b[2])))
        ]
        used: set[tuple[str, int]] = set()
        for _, i, j in sorted(pairs):
            if not used & {("gold", i), ("made", j)}:
                used |= {("gold", i), ("made", j)}
                both += 1
    return round(2 * both / max(1, total), 4)


def confidence(extractor: Any, records: Sequence[Any]) -> dict[str, Any]:
    """How well confidence tells right nodes from wrong ones; each fifth of the passages with what was fitted on the others.

    ``bins``: of ten equal parts of [0, 1], how many nodes, their mean confidence, and the share of them that is right;
    ``error``: the mean distance of the two over all nodes (expected calibration error); ``area``: under the ROC curve.
    """
    pairs: list[tuple[float, bool]] = []
    judged = [extractor.judged([record]) for record in records]
    for fold in range(FOLDS):
        others = [one for i, one in enumerate(judged) if i % FOLDS != fold]
        made = fitted([log for logs, _ in others for log in logs], [one for _, right in others for one in right]) or Calibration()
        for logs, right in judged[fold::FOLDS]:
            pairs += [(made.confidence(log), one) for log, one in zip(logs, right, strict=True)]
    bins = []
    for part in range(10):
        inside = [one for one in pairs if part <= 10 * one[0] < part + 1 or (part == 9 and one[0] == 1)]
        if inside:
            means = [round(statistics.mean(column), 4) for column in zip(*inside, strict=True)]
            bins.append({"part": part, "n": len(inside), "confidence": means[0], "right": means[1]})
    wrong, right = ([one for one, is_right in pairs if is_right == wanted] for wanted in (False, True))
    won = sum((a > b) + (a == b) / 2 for a in right for b in wrong)
    return {
        "n": len(pairs),
        "error": round(sum(one["n"] * abs(one["confidence"] - one["right"]) for one in bins) / max(1, len(pairs)), 4),
        "area": round(won / max(1, len(right) * len(wrong)), 4),
        "bins": bins,
    }


def tell(run: dict[str, Any]) -> str:
    """A finished run in a line."""
    told = [
        f"{name}: triples {one['all']['triplet_f1']:.3f}, trees {one['all']['tree_acc']:.2f}"
        for name, one in run["languages"].items()
    ]
    return f"{run['task']} {run['method']} seed {run['seed']}: {'; '.join(told)}; {run['training_seconds'] / 60:.0f} minutes"


def report(runs: list[dict[str, Any]]) -> None:
    """A table a language: means over seeds, and their standard deviations."""
    for language in ("en", "zh"):
        print(f"\n{language}: mean over seeds (standard deviation); near triples: phrases may end at other words")
        print("| task, method | seeds | triples | nodes | paths | trees | TER | s alone | s of 16 | near triples |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs if language in run["languages"]):
            own = [run["languages"][language] for run in runs if (run["task"], run["method"]) == (task, method)]
            columns = [[one["all"][name] for one in own] for name in SHOWN]
            columns += [[one["seconds"][size] for one in own] for size in ("1", "16")]
            columns += [[one["near_f1"] for one in own]]
            print(f"| {task}, {method} | {len(own)} | {' | '.join(spread(column, 3) for column in columns)} |")
            kinds: dict[str, list[int]] = {}
            for one in own:
                for kind, count in one["all"]["mistakes"].items():
                    kinds.setdefault(kind, []).append(count["count"])
            most = sorted(kinds.items(), key=lambda item: -statistics.mean(item[1]))
            told = ", ".join(f"{kind} {statistics.mean(counts):.0f}" for kind, counts in most if any(counts))
            sure = [one["confidence"] for one in own]
            print(f"  mistakes: {told}")
            print(
                f"  confidence: calibration error {statistics.mean(one['error'] for one in sure):.3f}, area under ROC"
                f" {statistics.mean(one['area'] for one in sure):.3f}"
            )


if __name__ == "__main__":
    campaign(__doc__ or "", f"{ROOT}/benchmarks/results/mdt_pointing.jsonl", TASKS, ["lora"], one_run, tell, report)
