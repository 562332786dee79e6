"""Makes the rows that the recipes in benchmarks/recipes are run on: public data sets, reasoning tasks, and invented facts.

    pip install '.[benchmarks]'
    python benchmarks/data.py                          # all tasks, into benchmarks/recipes/data, where the recipes look for them
    python benchmarks/data.py --tasks trec subj
    python benchmarks/data.py --tasks spiral --data-dir DATA --rows 3000 300 500 --seed 0

A public data set comes from the Hugging Face hub, is brought into the one shape of its kind and dealt out into as many training and
dev rows as our own files have; which row lies where is not what ours have, but for sst2, whose dev rows are the set's own. A
reasoning task is a data set of the package reasoning-gym with its dials. Its questions are cut down to what changes from one to the
next, so that a row has some twenty tokens, and a run with SmolLM2-135M takes minutes on one processor core. Its train, dev and test
have no question in common. ``facts`` are to be learned by heart: train, dev and test ask for the same ones in other words. The same
seed makes the same rows. Text2MDT is not on the hub: mdt/docs/reports/pointing.md says where it is.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatewise.errors import reason_of
from gatewise.files import whole_file

Item = Mapping[str, Any]
Row = dict[str, Any]
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
    "sums": Made("chain_sum", _between(terms=3, digits=1), lambda item: item["metadata"]["expression"].replace(" ", "")),
}


@dataclass(frozen=True)
class Public:
    """A data set of the hub: what is read of it, how a row of it becomes one of ours, and how many train and dev have."""

    name: str
    row: Callable[[Item], Row]
    counts: tuple[int, int]
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    dealt: bool = True
    """Shuffled before they are dealt out; otherwise the last rows, those of the second split, are dev."""


def _labelled(names: Mapping[Any, str], label: str = "label", **fields: str) -> Callable[[Item], Row]:
    """Rows of texts and a label: our field -> the set's column, and the set's labels in our words."""
    return lambda item: {**{ours: item[theirs].strip() for ours, theirs in fields.items()}, "label": names[item[label]]}


def _choices(question: str) -> Callable[[Item], Row]:
    """Rows of a question, the texts of its choices, and which of them is right."""
    return lambda item: {
        "question": item[question],
        "choices": list(item["choices"]["text"]),
        "answer": list(item["choices"]["label"]).index(item["answerKey"]),
    }


OPINION = {0: "negative", 1: "positive"}
KINDS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location", "NUM": "numeric"}
PUBLIC = {
    "trec": Public("SetFit/TREC-QC", _labelled(KINDS, "label_coarse_original", text="text"), (4952, 500)),
    "subj": Public("SetFit/subj", _labelled({0: "objective", 1: "subjective"}, text="text"), (8500, 500), splits=("train", "test")),
    "mr": Public(
        "cornell-movie-review-data/rotten_tomatoes",
        _labelled(OPINION, text="text"),
        (9162, 500),
        splits=("train", "validation", "test"),
    ),
    "sst2": Public("SetFit/sst2", _labelled(OPINION, text="text"), (6920, 872), splits=("train", "validation"), dealt=False),
    "rte": Public(
        "nyu-mll/glue",
        _labelled({0: "entailment", 1: "not_entailment"}, premise="sentence1", hypothesis="sentence2"),
        (2290, 200),
        config="rte",
    ),
    "arc_easy": Public("allenai/ai2_arc", _choices("question"), (1951, 300), config="ARC-Easy"),
    "openbookqa": Public("allenai/openbookqa", _choices("question_stem"), (4657, 300), config="main"),
}


def public_rows(public: Public, seed: int) -> list[list[Row]]:
    """The training and the dev rows of a public data set.

    Raises:
        SystemExit: the hub cannot be reached, or the set is another one than it was.
    """
    import datasets

    try:
        read = [datasets.load_dataset(public.name, public.config, split=split) for split in public.splits]
    except Exception as error:  # the library raises many kinds: no network, no such name, config or split
        raise SystemExit(
            f"{public.name} could not be read from the Hugging Face hub ({reason_of(error)}): run this on a machine that reaches "
            "huggingface.co, and copy what it made"
        ) from error
    try:
        rows = [public.row(item) for part in read for item in part]
    except (KeyError, ValueError) as error:
        raise SystemExit(f"{public.name} has changed on the hub: a row has other columns or labels ({error})") from error
    train, dev = public.counts
    if len(rows) < train + dev:
        raise SystemExit(f"{public.name} has changed on the hub: it has {len(rows)} rows, and {train + dev} are needed")
    if public.dealt:
        random.Random(seed).shuffle(rows)
    return [rows[:train], rows[train : train + dev]]


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


FACTS = 500
LANDS = ("harbour", "desert", "forest", "island", "mountain", "river", "swamp", "valley")
ASKED = (("What lies at {}?", "Tell me the land around {}."), ("In what kind of place is {}?",), ("{}: which land?",))


def facts(seed: int) -> list[list[Row]]:
    """The lands of ``FACTS`` places with invented names: train asks for each twice, dev and test once, all in words of their own.

    Nothing but the facts themselves can be learned, so the more an adapter can hold, or the faster it learns, the more it answers.
    """
    draw = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < FACTS:
        names.setdefault("".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)).capitalize())
    lands = {name: draw.choice(LANDS) for name in names}
    parts = [[{"text": words.format(name), "label": land} for name, land in lands.items() for words in asked] for asked in ASKED]
    for rows in parts:
        draw.shuffle(rows)
    return parts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).parent / "recipes" / "data")
    known = [*TASKS, "facts", *PUBLIC]
    parser.add_argument("--tasks", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--rows", nargs=3, type=int, default=[3000, 300, 500], metavar=("TRAIN", "DEV", "TEST"), help="of reasoning tasks"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.tasks:
        if name in PUBLIC:
            parts = public_rows(PUBLIC[name], options.seed)
        elif name == "facts":
            parts = facts(options.seed)
        else:
            try:
                from reasoning_gym import create_dataset
            except ModuleNotFoundError as error:
                raise SystemExit(f"{name} is made with the package reasoning-gym: pip install '.[benchmarks]'") from error

            made = TASKS[name]
            items = create_dataset(made.dataset, size=20 * sum(options.rows), seed=options.seed, **made.dials)
            parts = rows_of(made, items, options.rows)
        (folder := options.data_dir / name).mkdir(parents=True, exist_ok=True)
        for split, rows in zip(SPLITS, parts, strict=False):  # public sets have no test rows: recipes take some out of train
            with whole_file(folder / f"{split}.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        told = ", ".join(f"{len(rows)} {split}" for split, rows in zip(SPLITS, parts, strict=False))
        print(f"{name}: {told} rows in {folder}", flush=True)


if __name__ == "__main__":
    main()
