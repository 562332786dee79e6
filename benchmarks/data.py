"""Makes the rows of the benchmarks' reasoning tasks, with the package reasoning-gym: questions of one kind at one difficulty.

A task is a data set of reasoning-gym with its dials. Its questions are cut down to what changes from one to the next, so that a
row has some twenty tokens, and a run with SmolLM2-135M takes minutes on one processor core. Train, dev and test have no question
in common. The same seed makes the same rows.

    pip install '.[benchmarks]'
    python benchmarks/data.py                          # all tasks, into benchmarks/recipes/data, where the recipes look for them
    python benchmarks/data.py --tasks spiral --data-dir DATA --rows 3000 300 500 --seed 0
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.files import whole_file

Item = Mapping[str, Any]
Row = dict[str, str]
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Made:
    """A task: its data set of reasoning-gym, the dials, and how an item of it is asked and answered."""

    dataset: str
    dials: dict[str, Any]
    ask: Callable[[Item], str]
    answer: Callable[[Item], str] = lambda item: str(item["answer"])


def _joined(rows: Iterable[Iterable[Any]]) -> str:
    """A matrix of digits in a line: ``417 503 982``."""
    return " ".join("".join(map(str, row)) for row in rows)


def _operation(item: Item) -> str:
    """A transformation with its numbers: ``rotate 90``."""
    (operation,) = item["metadata"]["operations"]
    return " ".join(str(value) for name, value in operation.items() if name != "instruction")


def _digits(item: Item) -> str:
    """All digits of the answer, in a row: a single number, which is judged as a whole."""
    return "".join(filter(str.isdigit, item["answer"]))


def _between(**dials: int) -> dict[str, int]:
    """Dials of which the least and the most are the same."""
    return {f"{end}_{name}": value for name, value in dials.items() for end in ("min", "max")}


TASKS = {
    "spiral": Made("spiral_matrix", _between(n=3), lambda item: _joined(item["metadata"]["matrix"]), _digits),
    "matrix": Made(
        "manipulate_matrix",
        _between(rows=2, cols=2, transforms=1),
        lambda item: f"{_operation(item)} {_joined(item['metadata']['matrix'])}",
        _digits,
    ),
    "rotate": Made(
        "rotate_matrix",
        {**_between(n=3), "min_rotations": 1, "max_rotations": 3},
        lambda item: f"{90 * item['metadata']['num_rotations']} {_joined(item['metadata']['matrix'])}",
        _digits,
    ),
    "digits": Made(
        "number_sorting",
        {**_between(numbers=6, decimals=0), "min_value": 0.0, "max_value": 9.0},
        lambda item: f"{item['metadata']['direction']} {''.join(str(int(float(n))) for n in item['metadata']['original_numbers'])}",
        lambda item: "".join(str(int(float(n))) for n in item["metadata"]["sorted_numbers"]),
    ),
}


def rows_of(made: Made, items: Iterable[Item], counts: Sequence[int]) -> list[list[Row]]:
    """As many rows as each part is to have, in the items' order; what was asked before is passed over.

    Raises:
        SystemExit: the items do not have so many different questions.
    """
    answers: dict[str, str] = {}
    for item in items:
        answers.setdefault(made.ask(item), made.answer(item))
        if len(answers) == sum(counts):
            break
    else:
        raise SystemExit(f"{sum(counts)} rows were asked for, and there are {len(answers)} different questions: lower --rows")
    rows = [{"question": question, "answer": answer} for question, answer in answers.items()]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).parent / "recipes" / "data")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs=3, type=int, default=[3000, 300, 500], metavar=("TRAIN", "DEV", "TEST"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from reasoning_gym import create_dataset

    for name in options.tasks:
        made = TASKS[name]
        items = create_dataset(made.dataset, size=20 * sum(options.rows), seed=options.seed, **made.dials)
        (folder := options.data_dir / name).mkdir(parents=True, exist_ok=True)
        for split, rows in zip(SPLITS, rows_of(made, items, options.rows), strict=True):
            with whole_file(folder / f"{split}.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}: {', '.join(f'{n} {s}' for n, s in zip(options.rows, SPLITS, strict=True))} rows in {folder}", flush=True)


if __name__ == "__main__":
    main()
