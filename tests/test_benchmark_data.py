"""benchmarks/data.py: the parts of a task share no question, and public sets get the columns of our rows. Nothing is fetched."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from scripts import ROOT, script

from gatewise.tasks import load_records


@pytest.fixture(scope="module")
def data() -> Any:
    return script("benchmarks/data.py")


def items(count: int) -> list[dict[str, Any]]:
    """Each question comes twice."""
    return [{"question": f"{i // 2} legs", "answer": str(i // 2), "metadata": {}} for i in range(count)]


def test_parts_have_the_rows_asked_for_and_no_question_in_common(data: Any) -> None:
    made = data.Made("legs", {}, lambda item: item["question"])
    parts = data.rows_of(made, items(40), (5, 3, 2))
    assert [len(part) for part in parts] == [5, 3, 2]
    assert parts[1][0] == {"question": "5 legs", "answer": "5"}
    assert len({row["question"] for part in parts for row in part}) == 10
    with pytest.raises(SystemExit, match="there are 4 different questions"):
        data.rows_of(made, items(8), (3, 1, 1))


RAW = {
    "trec": {"text": "Who ?", "label": 7, "label_coarse_original": "HUM"},
    "subj": {"text": "he leaves .", "label": 0},
    "mr": {"text": "a joy .", "label": 1},
    "sst2": {"text": "a bore .", "label": 0},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 3},
    "arc_easy": {"question": "What falls?", "choices": {"text": ["rain", "sky"], "label": ["1", "2"]}, "answerKey": "1"},
    "openbookqa": {"question_stem": "what is hot", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
}
"""A row of each set as the hub has it."""
OURS = {
    "trec": {"text": "Who ?", "label": "human"},
    "subj": {"text": "he leaves .", "label": "objective"},
    "mr": {"text": "a joy .", "label": "positive"},
    "sst2": {"text": "a bore .", "label": "negative"},
    "rte": {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
    "arc_easy": {"question": "What falls?", "choices": ["rain", "sky"], "answer": 0},
    "openbookqa": {"question": "what is hot", "choices": ["ice", "fire"], "answer": 1},
}


def local(data: Any, name: str, folder: Path, rows: int = 2, **changed: Any) -> Any:
    """A public set whose splits are Parquet files of a folder, read as the hub's are; a row's place stands in its first field."""
    public, first = data.PUBLIC[name], next(iter(RAW[name]))
    (folder / "data").mkdir(parents=True)
    for split in public.splits:
        lines = [{**RAW[name], first: f"{split} {i} {RAW[name][first]}", **changed} for i in range(rows)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "data" / f"{split}-00000-of-00001.parquet")
    return dataclasses.replace(public, name=str(folder), config=None, counts=(len(public.splits) * rows - 1, 1))


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("name", sorted(RAW))
def test_a_public_set_gets_the_columns_that_its_recipe_reads(data: Any, name: str, tmp_path: Path) -> None:
    public = local(data, name, tmp_path)
    train, dev = parts = data.public_rows(public, seed=0)
    assert [len(part) for part in parts] == list(public.counts)
    first = next(iter(OURS[name]))
    assert sorted(row.pop(first) for row in (*train, *dev)) == sorted(
        f"{split} {i} {OURS[name][first]}" for split in public.splits for i in range(2)
    )
    rest = {field: value for field, value in OURS[name].items() if field != first}
    assert all(row == rest for row in (*train, *dev))
    recipe = yaml.safe_load((ROOT / f"benchmarks/recipes/{name}.yaml").read_text(encoding="utf-8"))
    assert recipe["data"]["train"] == f"data/{name}/train.jsonl"


@pytest.mark.usefixtures("no_cache")
def test_rows_are_dealt_out_by_the_seed_and_those_of_sst2_stay_where_they_were(data: Any, tmp_path: Path) -> None:
    mr, sst2 = local(data, "mr", tmp_path / "mr", rows=20), local(data, "sst2", tmp_path / "sst2")
    assert data.public_rows(mr, 0) == data.public_rows(mr, 0) != data.public_rows(mr, 1)
    assert data.public_rows(sst2, 0)[1] == [{"text": "validation 1 a bore .", "label": "negative"}]


@pytest.mark.usefixtures("no_cache")
def test_a_set_that_cannot_be_read_or_has_changed_is_told_in_a_sentence(data: Any, tmp_path: Path) -> None:
    public = local(data, "mr", tmp_path)
    with pytest.raises(SystemExit, match="it has 6 rows, and 7 are needed"):
        data.public_rows(dataclasses.replace(public, counts=(6, 1)), 0)
    with pytest.raises(SystemExit, match=r"a row has other columns or labels \('sentence'\)"):
        data.public_rows(dataclasses.replace(public, row=lambda item: item["sentence"]), 0)
    with pytest.raises(SystemExit, match=r"nowhere could not be read from the Hugging Face hub \(.*\): run this on a machine"):
        data.public_rows(dataclasses.replace(public, name=str(tmp_path / "nowhere")), 0)


def test_facts_are_asked_for_in_other_words_where_they_are_measured(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["data.py", "--tasks", "facts", "--data-dir", str(tmp_path)])
    data.main()
    parts = [list(load_records(tmp_path / f"facts/{split}.jsonl").rows) for split in data.SPLITS]
    known = []
    for rows, asked in zip(parts, data.ASKED, strict=True):
        answers: dict[str, set[str]] = {}
        for row in rows:
            (name,) = (word.strip("?.:") for word in row["text"].split() if word.strip("?.:") not in " ".join(asked))
            answers.setdefault(name, set()).add(row["label"])
        assert len(rows) == data.FACTS * len(asked)
        known.append(answers)
    assert known[0] == known[1] == known[2]
    assert all(len(lands) == 1 for lands in known[0].values())
    assert len({row["text"] for rows in parts for row in rows}) == 4 * data.FACTS
    assert data.facts(0) == data.facts(0) != data.facts(1)


def test_without_reasoning_gym_it_says_what_to_install(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(sys, "argv", ["data.py", "--tasks", "matrix", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"pip install '.\[benchmarks\]'"):
        data.main()


@pytest.mark.usefixtures("no_cache")
def test_the_rows_are_written_where_recipes_look(data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.PUBLIC, "sst2", local(data, "sst2", tmp_path / "hub"))
    monkeypatch.setattr(sys, "argv", ["data.py", "--tasks", "sst2", "--data-dir", str(tmp_path)])
    data.main()
    made = load_records(tmp_path / "sst2/train.jsonl")
    assert (made.kind, made.labels, len(made)) == ("label", ["negative"], 3)
    assert len(load_records(tmp_path / "sst2/dev.jsonl")) == 1
