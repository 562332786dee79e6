"""Trees by pointing and by writing, both together: does each other's judgement find the better tree?

Both models read the dev passages. The candidates for a passage are the pointing model's tree, what the writing model writes
(verbatim, the most probable tokens), and so many trees that it draws. Each candidate is judged twice: by the pointing model, minus
the loss that it would have as a gold tree, and by the writing model, the log-probability of its text. What the pointing model
cannot say (phrases that overlap, or that do not stand in the text) it does not judge, and such a tree is taken only where there is
nothing else. Measured are each model alone; what each judge takes, from the written candidates and from all; what the sum of both
takes, with the weight of the least TER on the other four fifths of the passages; and the best of the candidates, the limit of all
that.

    python mdt/benchmarks/mdt_both.py --data-dir DATA --language en --pointing both-gemma3-lora-1 --writing en-cot0-lora-0
    python mdt/benchmarks/mdt_both.py --report

The adapters are those that mdt_pointing.py and mdt.py leave in runs/; they are named by their folders there. What was written is
kept in the folder of the writing run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from campaign import RESULTS, append, read
from mdt_pointing import RUNS as POINTING_RUNS

from mdt import RUNS as WRITING_RUNS
from mdt import loaded

RESULTS_FILE = RESULTS / "mdt_both.jsonl"
SHOWN = ("triplet_f1", "node_f1", "path_f1", "tree_acc", "ter")
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
FOLDS = 5


@dataclass(frozen=True)
class Candidate:
    """A tree for a passage, whence it comes ("pointing", "written", "drawn"), and what each model says of it, in nats.

    ``pointing`` is None where the pointing model cannot say the tree.
    """

    tree: Any
    sources: frozenset[str]
    pointing: float | None
    writing: float


def candidates(
    language: Any, pointing: str, writing: str, data_dir: Path, draws: int
) -> tuple[list[Any], list[list[Candidate]], Any]:
    """The gold records, the candidates for each, and the seconds that they took of a processor for a passage."""
    from gatewise_mdt import PointingExtractor
    from gatewise_mdt.extraction.extractor import Asked
    from gatewise_mdt.pointing.together import TogetherExtractor
    from gatewise_mdt.pointing.training import read_records

    records = read_records(str(data_dir / "text2mdt" / f"{language}_dev.json"))
    folder = WRITING_RUNS / writing
    writer = loaded(folder / "run" / "adapter", 0)
    seconds: dict[str, float] = {}
    trees: list[dict[Any, set[str]]] = [{} for _ in records]

    def add(source: str, found: Sequence[Any]) -> None:
        for held, tree in zip(trees, found, strict=True):
            if tree is not None:
                held.setdefault(tree, set()).add(source)

    def read_by(source: str, extractor: Any) -> None:
        began = time.process_time()
        found = extractor([record.text for record in records], language=language)
        seconds[source] = round((time.process_time() - began) / len(records), 3)
        add(source, [getattr(one, "tree", None) for one in found])  # an error is no tree

    pointer = PointingExtractor.load(POINTING_RUNS / pointing / "run" / "adapter")
    read_by("pointing", pointer)
    read_by("written", replace(writer, verbatim=True))
    for found in drawn(writer, folder, records, language, draws):
        add("drawn", found)
    both, judged = TogetherExtractor(pointer, replace(writer, verbatim=True)), []
    for name, judge in (("pointing", both.said_by_pointer), ("writing", both.said_by_writer)):
        began = time.process_time()
        judged.append([judge(Asked(record.text, language), list(held)) for record, held in zip(records, trees, strict=True)])
        seconds[f"judged by {name}"] = round((time.process_time() - began) / len(records), 3)
    made = [
        [Candidate(tree, frozenset(sources), *both) for (tree, sources), *both in zip(held.items(), *says, strict=True)]
        for held, *says in zip(trees, *judged, strict=True)
    ]
    return records, made, seconds


def drawn(writer: Any, folder: Path, records: Sequence[Any], language: str, draws: int) -> list[list[Any]]:
    """In each round a tree for each passage, drawn verbatim by the writing model, or None; a round on disk is not drawn again."""
    import torch
    from gatewise_mdt import DecisionTree, parse_lenient
    from gatewise_mdt.extraction.course import Course
    from gatewise_mdt.extraction.prompts import prompt
    from gatewise_mdt.extraction.writing import Written, write

    file = folder / "drawn-verbatim.jsonl"
    done = {one["round"]: one["trees"] for one in read(file)}
    for number in range(draws):
        if number not in done:
            torch.manual_seed(number)
            outputs = write(
                writer.model,
                writer.tokenizer,
                [prompt(record.text, language) for record in records],
                [Course(language, levels=(0,), within=record.text) for record in records],
                template=writer.template,
                max_new_tokens=writer.max_new_tokens,
                batch_size=writer.batch_size,
                temperature=writer.temperature,
            )
            found = [parse_lenient(one.text).tree if isinstance(one, Written) else None for one in outputs]
            done[number] = [None if tree is None else tree.to_preorder() for tree in found]
            append({"round": number, "trees": done[number]}, file)
            print(f"  {number + 1} of {draws} rounds drawn", flush=True)
    return [[DecisionTree.from_preorder(one) if one else None for one in done[number]] for number in range(draws)]


# ---- what is taken ----


def taken(held: Sequence[Candidate], worth: Callable[[Candidate], float], sources: Sequence[str] = ()) -> Any:
    """The tree of the most worth, from these sources, by what both models can judge if there is such a one."""
    some = [one for one in held if not sources or one.sources & set(sources)]
    judged = [one for one in some if one.pointing is not None] or some
    return max(judged, key=worth).tree if judged else []


def by_pointing(one: Candidate) -> float:
    return one.writing if one.pointing is None else one.pointing


def by_both(weight: float) -> Callable[[Candidate], float]:
    return lambda one: weight * one.writing + (one.pointing or 0.0)


def cross_fitted(records: Sequence[Any], held: Sequence[Sequence[Candidate]]) -> tuple[list[Any], list[float]]:
    """What the sum of both takes for each passage, with the weight that is best on the other folds; and the weights."""
    from gatewise_mdt.evaluation.metrics import tree_edit_ratio

    by_weight = [[taken(one, by_both(weight)) for one in held] for weight in WEIGHTS]
    ratios = [[tree_edit_ratio(record.tree, tree) for record, tree in zip(records, row, strict=True)] for row in by_weight]
    made, weights = [], []
    for fold in range(FOLDS):
        others = [i for i in range(len(records)) if i % FOLDS != fold]
        best = min(range(len(WEIGHTS)), key=lambda k: sum(ratios[k][i] for i in others))
        weights.append(WEIGHTS[best])
    for i in range(len(records)):
        made.append(by_weight[WEIGHTS.index(weights[i % FOLDS])][i])
    return made, weights


def measured(language: str, pointing: str, writing: str, data_dir: Path, draws: int) -> dict[str, Any]:
    """All that is measured of two models together."""
    from gatewise_mdt.evaluation.intervals import intervals
    from gatewise_mdt.evaluation.metrics import count_trees, metrics_of, tree_edit_ratio

    from gatewise.progress import quiet

    with quiet(bars=True):
        records, held, seconds = candidates(language, pointing, writing, data_dir, draws)
    both, weights = cross_fitted(records, held)
    ways = {
        "pointing alone": [of_source(found, "pointing") for found in held],
        "writing alone": [of_source(found, "written") for found in held],
        "written, judged by pointing": [taken(one, by_pointing, ("written", "drawn")) for one in held],
        "written, judged by writing": [taken(one, lambda c: c.writing, ("written", "drawn")) for one in held],
        "all, judged by pointing": [taken(one, by_pointing) for one in held],
        "all, judged by writing": [taken(one, lambda c: c.writing) for one in held],
        "all, judged by both": both,
        "the best of them": [
            min((one.tree for one in found), key=lambda tree: tree_edit_ratio(record.tree, tree))
            for record, found in zip(records, held, strict=True)
        ],
    }
    gold = [record.tree for record in records]
    told = {}
    for name, trees in ways.items():
        counts = count_trees(gold, trees)
        metrics = metrics_of(counts).to_json()
        told[name] = {key: round(metrics[key], 4) for key in SHOWN}
        told[name]["intervals"] = intervals(counts)
    return {
        "language": language,
        "pointing": pointing,
        "writing": writing,
        "draws": draws,
        "candidates": round(statistics.mean(map(len, held)), 2),
        "judged": round(statistics.mean(sum(one.pointing is not None for one in found) / len(found) for found in held), 3),
        "weights": weights,
        "seconds": seconds,
        "ways": told,
    }


def of_source(held: Sequence[Candidate], source: str) -> Any:
    return next((one.tree for one in held if source in one.sources), [])


def report(runs: Sequence[dict[str, Any]]) -> None:
    """A table of each pair of models."""
    for run in runs:
        print(f"\n{run['language']}: {run['pointing']} and {run['writing']}; {run['candidates']} candidates a passage")
        print(f"pointing judges {run['judged']:.0%} of them; weights {run['weights']}; seconds {json.dumps(run['seconds'])}")
        print(f"| | {' | '.join(SHOWN)} |\n|{'---|' * (len(SHOWN) + 1)}")
        for name, one in run["ways"].items():
            print(f"| {name} | {' | '.join(f'{one[key]:.3f}' for key in SHOWN)} |")


def main() -> None:
    """Measures two models together, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--language", choices=["en", "zh"])
    parser.add_argument("--pointing", help="a run's folder in runs/mdt-pointing")
    parser.add_argument("--writing", help="a run's folder in runs/mdt")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        if None in (options.data_dir, options.language, options.pointing, options.writing):
            parser.error("--data-dir, --language, --pointing and --writing are needed")
        key = {name: getattr(options, name) for name in ("language", "pointing", "writing", "draws")}
        if not any(key.items() <= run.items() for run in read(options.results)):
            append(measured(**key, data_dir=options.data_dir), options.results)
    report(read(options.results))


if __name__ == "__main__":
    main()
