"""Is the tree that is most like other drawn ones better than the most probable one? And does their agreement say how good it is?

For the adapter of a run of mdt.py, so many trees are drawn for every dev passage, constrained, at a temperature. Each number of
candidates is then measured as ``gatewise mdt extract --candidates N`` would choose: the greedy tree and the first N - 1 drawn, one
draw for all numbers, so that they can be compared. What was drawn is kept in the folder of the run, where one that is stopped goes
on.

    OMP_NUM_THREADS=1 python mdt/benchmarks/mdt_candidates.py --data-dir DATA --run en-cot0-lora-0 [--temperature 0.7] [--draws 8]
    python mdt/benchmarks/mdt_candidates.py --report
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from campaign import RESULTS, append, read

from mdt import DECODING_BATCH, MAX_NEW_TOKENS, RUNS, loaded

RESULTS_FILE = RESULTS / "mdt_candidates.jsonl"
NUMBERS = (1, 3, 5, 9)


def draw(folder: Path, texts: list[str], language: Any, level: Any, temperature: float, draws: int) -> list[list[Any]]:
    """For each text its drawn trees, in pre-order, or None for what is no tree."""
    import torch
    from gatewise_mdt import parse_lenient
    from gatewise_mdt.extraction.course import Course
    from gatewise_mdt.extraction.prompts import prompt
    from gatewise_mdt.extraction.writing import Written, write

    from gatewise.progress import quiet

    file = folder / f"drawn-{temperature}.jsonl"
    done = {one["round"] for one in read(file)}
    with quiet(bars=True):
        extractor = None
        for number in range(draws):
            if number in done:
                continue
            extractor = extractor or loaded(folder / "run" / "adapter", level)
            torch.manual_seed(number)
            outputs = write(
                extractor.model,
                extractor.tokenizer,
                [prompt(text, language) for text in texts],
                [Course(language, levels=(level,)) for _ in texts],
                template=extractor.template,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=DECODING_BATCH,
                temperature=temperature,
            )
            trees = []
            for one in outputs:
                tree = parse_lenient(one.text).tree if isinstance(one, Written) else None
                trees.append(None if tree is None else tree.to_preorder())
            append({"round": number, "trees": trees}, file)
            print(f"  {number + 1} of {draws} rounds", flush=True)
    rounds = sorted(read(file), key=lambda one: one["round"])[:draws]
    return [[one["trees"][i] for one in rounds] for i in range(len(texts))]


def measured(run: str, data_dir: Path, temperature: float, draws: int) -> dict[str, Any]:
    """The metrics of every number of candidates, and how right trees and wrong ones agree with the others."""
    from gatewise_mdt import DecisionTree, evaluate
    from gatewise_mdt.extraction.extractor import most_alike
    from gatewise_mdt.records import read_items

    task = run.partition("-cot")
    language, level = task[0], int(task[2][0])
    folder = RUNS / run
    published = read_items(data_dir / "text2mdt" / f"{language}_dev.json")
    greedy = [one["tree"] for one in sorted(read(folder / "constrained.jsonl"), key=lambda one: one["number"])]
    drawn = draw(folder, [item["text"] for item in published], language, level, temperature, draws)
    found: dict[str, Any] = {"run": run, "temperature": temperature, "numbers": {}}
    for number in (n for n in NUMBERS if n <= draws + 1):
        kept, agreements = [], []
        for first, others in zip(greedy, drawn, strict=True):
            trees = [DecisionTree.from_preorder(tree) for tree in [first, *others[: number - 1]] if tree]
            best, agreement = most_alike(trees, number) if trees and number > 1 else (0, 0.0)
            kept.append(trees[best].to_preorder() if trees else [])
            agreements.append(agreement)
        metrics = evaluate(published, kept, repair=True).to_json()
        right = [evaluate([gold], [tree], repair=True).tree_acc for gold, tree in zip(published, kept, strict=True)]
        found["numbers"][number] = {
            "metrics": {name: round(value, 4) for name, value in metrics.items()},
            "by_agreement": by_agreement(agreements, right) if number > 1 else [],
        }
    return found


def by_agreement(agreements: list[float], right: list[float]) -> list[dict[str, float]]:
    """Quarters of the trees, the least agreed on first: their agreement, and the share that is right."""
    order = sorted(range(len(right)), key=lambda i: agreements[i])
    quarters = [order[i * len(order) // 4 : (i + 1) * len(order) // 4] for i in range(4)]
    return [
        {
            "agreement": round(statistics.mean(agreements[i] for i in quarter), 3),
            "right": round(statistics.mean(right[i] for i in quarter), 3),
        }
        for quarter in quarters
    ]


def report(runs: list[dict[str, Any]]) -> None:
    """A table a run."""
    for run in runs:
        print(f"\n{run['run']}, temperature {run['temperature']}")
        for number, one in run["numbers"].items():
            shown = "   ".join(
                f"{name} {one['metrics'][name]:.3f}" for name in ("triplet_f1", "node_f1", "tree_acc", "path_f1", "ter")
            )
            print(f"  {number} candidates   {shown}")
            for quarter in one["by_agreement"]:
                print(f"      agreement {quarter['agreement']:.2f}: {quarter['right']:.2f} right")


def main() -> None:
    """Draws and measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--run", help="the folder of a run in runs/mdt")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None or options.run is None:
            parser.error("--data-dir and --run are needed")
        made = measured(options.run, options.data_dir, options.temperature, options.draws)
        append(made, RESULTS_FILE)
    report(read(RESULTS_FILE))


if __name__ == "__main__":
    main()
