import json
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, read_trees, write_trees
from mdt_trees import TEXT, gout, node

from gatewise.errors import GatewiseError

TREE = DecisionTree.from_preorder(gout())


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    records = [TreeRecord(TEXT, TREE, 1, {"source": "by hand"}), TreeRecord("两行\n文字 | a", TREE.in_language("zh"), 2)]
    write_trees(tmp_path / f"x{suffix}", records)
    read = read_trees(tmp_path / f"x{suffix}")
    assert list(read.records) == records
    assert (read.count, read.faults, read.notes) == (2, {}, ())
    assert list(tmp_path.iterdir()) == [tmp_path / f"x{suffix}"]


def test_population_and_passage_are_parted_at_the_first_at_sign() -> None:
    record = TreeRecord("adults @ take 5 @ night", TREE)
    assert (record.population, record.passage) == ("adults", "take 5 @ night")
    assert (TreeRecord("take 5", TREE).population, TreeRecord("take 5", TREE).passage) == ("", "take 5")


def test_a_record_with_a_fault_does_not_stop_the_others(tmp_path: Path) -> None:
    good = {"text": TEXT, "tree": gout()}
    wrong: list[Any] = [
        good,
        {"text": TEXT, "tree": [*gout(), node("D")]},
        {"text": " ", "tree": gout()},
        {"tree": gout()},
        {"text": TEXT},
        7,
        {"text": "\ud800", "tree": gout()},
        good,
    ]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(wrong))
    read = read_trees(path)
    assert [record.number for record in read.records] == [1, 8]
    assert list(read.faults) == [2, 3, 4, 5, 6, 7]
    for number, said in ((2, "node 6"), (3, "text is ' '"), (4, '"text" is missing'), (5, '"tree" is missing'), (6, "found 7")):
        assert f"some.json, record {number}" in read.faults[number]
        assert said in read.faults[number]

    lines = tmp_path / "some.jsonl"
    lines.write_text(f"{json.dumps(good)}\n\n{{nonsense\n{json.dumps(good)}\n")
    read = read_trees(lines)
    assert [record.number for record in read.records] == [1, 3]
    assert "line 3: not valid JSON" in read.faults[2]
    (tmp_path / "one.json").write_text(json.dumps(good))  # without a list around it
    assert read_trees(tmp_path / "one.json").records[0].tree == TREE


def test_repair_is_noted_by_record(tmp_path: Path) -> None:
    path = tmp_path / "joined.json"
    path.write_text(json.dumps([{"text": TEXT, "tree": [node("D", joined="or")]}]))
    assert read_trees(path).faults
    read = read_trees(path, repair=True)
    assert read.notes == (f'{path}, record 1: node 1: logical_rel "or" with no triples is read as "null"',)


def test_an_approval_does_not_hold_for_a_tree_that_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "reviewed.json"
    wrong = gout()
    wrong[1]["logical_rel"] = "null"
    held: list[dict[str, Any]] = [{"text": TEXT, "tree": tree} for tree in (wrong, gout(), wrong, wrong)]
    for one, state in zip(held, ("approved", "approved", "corrected"), strict=False):
        one |= {"review": state, "reviewed": {"by": "Ada"}, "page": 7}
    path.write_text(json.dumps(held))
    read = read_trees(path, repair=True)
    assert [record.more for record in read.records] == [
        {"review": "corrected", "page": 7},
        {"review": "approved", "reviewed": {"by": "Ada"}, "page": 7},
        {"review": "corrected", "page": 7},
        {},
    ]
    said = "that was approved by Ada is another one after the repair, so it counts as corrected: read it and approve it anew"
    assert [note for note in read.notes if "approved" in note] == [f'{path}, record 1: the tree of "{TEXT[:40]}…" {said}']


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", b"[", "not valid JSON"),
        ("x.json", b"[]", "has no records"),
        ("x.json", b"3", "expected a list of records"),
        ("x.json", b"\xff", "not UTF-8"),
        ("x.json", b"[" * 100_000, "not valid JSON"),
        ("x.jsonl", b"\n \n", "has no records"),
        ("x.csv", b"", "'.csv', expected .json"),
        ("missing.json", None, "no such file"),
        ("folder.json", "folder", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(GatewiseError, match=said):
        read_trees(path)
    with pytest.raises(GatewiseError, match=r"expected \.json"):
        write_trees(tmp_path / "x.csv", [])


def test_the_confidence_of_a_tree_is_a_number_or_null_for_each_of_its_nodes() -> None:
    def of(said: Any) -> Any:
        return TreeRecord(TEXT, TREE, more={"confidence": said}).confidence

    assert of([0, 0.25, None, 1, None]) == of((0, 0.25, None, 1.0, None)) == (0.0, 0.25, None, 1.0, None)
    assert TreeRecord(TEXT, TREE).confidence is None
    faults = ("0.5", True, float("nan"), float("inf"), -0.01, 1.01, 10**400, [0.5], {})
    for said in (None, 0.5, "high", {}, [], [0.5] * 4, [0.5] * 6, *([0.5, one, None, 1, 0] for one in faults)):
        assert of(said) is None, said
