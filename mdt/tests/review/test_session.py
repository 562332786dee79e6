"""A review without its page: what is kept, what is saved, and that nothing is lost between two of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, read_trees, sample
from gatewise_mdt.review.extracting import NOTHING_FOUND, Extracting
from gatewise_mdt.review.session import Session
from mdt_trees import TEXT, gout, node, triple
from review_serving import tick_all

from gatewise.errors import GatewiseError

OTHER = "children with fever@If the fever lasts, give paracetamol."
CHINESE = "高血压患者@若血压仍高，加用氨氯地平。"


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    """A file of two trees, as `gatewise mdt extract` writes them."""
    file = tmp_path / "trees.json"
    tree = [node("C", triple("fever", subject="children")), node("D", triple("paracetamol", "drug therapy", "children")), node("D")]
    items = [
        {
            "notice": "x",
            "text": TEXT,
            "tree": gout(),
            "absent": [],
            "warnings": ["cut short"],
            "source": "a.pdf",
            "spans": [],
            "nested": {},
        },
        {"text": OTHER, "tree": tree},
    ]
    file.write_text(json.dumps(items))
    return file


def correct(session: Session, number: int = 1) -> None:
    passage = session.passage(number)
    arguments = {"node": 1, "triple": 0, "parts": triple("naproxen or colchicine", "drug therapy")}
    session.edit(number, passage.version, "set_triple", arguments)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def reopened(session: Session, file: Path | None) -> Session:
    out = session.files.out
    session.close()
    return Session.open(None if file is None else str(file), out)


# Saving ---------------------------------------------------------------------------------------------------------------


def test_only_what_a_person_saw_is_saved_in_the_published_format(trees: Path) -> None:
    session = Session.open(str(trees))
    assert [passage.now.state for passage in session.passages] == ["drafted", "drafted"]
    assert session.save().records == 0
    correct(session)
    session.approve(2, 0)
    assert session.unsaved == 2
    saved = session.save()
    assert (saved.path, saved.records, saved.unlike, session.unsaved) == (trees.with_name("trees.json.review.jsonl"), 2, [], 0)
    first, second = lines(saved.path)
    # What was true of the extracted tree is not said of the corrected one; where it comes from is.
    assert first.keys() == {"text", "tree", "source", "review", "reviewed", "passage_id"}
    assert (first["text"], first["review"], second["review"]) == (TEXT, "corrected", "approved")
    assert first["tree"][1]["triples"][0][2] == "naproxen or colchicine"
    read = read_trees(saved.path)
    assert (len(read.records), read.faults) == (2, {})


def test_an_unfinished_tree_is_not_saved_and_not_lost(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.save()
    session.edit(1, session.passage(1).version, "to_condition", {"node": 4})
    assert not session.passage(1).is_valid
    assert session.unsaved == 1
    with pytest.raises(GatewiseError, match="cannot be approved yet: node 5: a condition"):
        session.approve(1, session.passage(1).version)
    saved = session.save()
    assert (saved.records, saved.unlike) == (1, [1])
    assert len(lines(saved.path)[0]["tree"]) == 5  # the version that was saved before
    again = reopened(session, trees)
    assert len(again.passage(1).now.nodes or ()) == 7
    assert again.passage(1).saved is not None
    again.undo(1, again.passage(1).version)  # back to what was saved
    assert again.passage(1).is_valid
    assert again.unsaved == 0


def test_a_file_that_another_program_changed_is_left_alone(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    out = session.save().path
    session.approve(2, 0)
    changed = lines(out)[0]
    changed["tree"][1]["triples"][0][2] = "ibuprofen"
    out.write_text(json.dumps(changed) + "\n")
    with pytest.raises(GatewiseError, match="changed by another program"):
        session.save()
    assert lines(out) == [changed]
    again = reopened(session, trees)
    assert (again.passage(1).now.nodes or [])[1]["triples"][0][2] == "ibuprofen"
    assert "another tree than before" in again.notes[0]
    again.undo(1, again.passage(1).version)
    assert (again.passage(1).now.nodes or [])[1]["triples"][0][2] == "naproxen or colchicine"
    assert again.passage(2).now.state == "approved"
    assert again.save().records == 2


# Keeping --------------------------------------------------------------------------------------------------------------


def test_everything_is_there_again_without_a_save(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.approve(2, 0)
    added = session.paste(CHINESE)[0][0]
    assert added.language == "zh"
    session.begin(added.number, 0)
    session.edit(added.number, 1, "add_triple", {"node": 0})
    again = reopened(session, trees)
    assert [passage.now.state for passage in again.passages] == ["corrected", "approved", "corrected"]
    assert [passage.text for passage in again.passages] == [TEXT, OTHER, CHINESE]
    assert again.passage(3).now.nodes == [{"role": "D", "triples": [["", "治疗方案", ""]], "logical_rel": "null"}]
    assert not again.files.out.exists()
    # Without the file it came from, too.
    assert len(reopened(again, None).passages) == 3


def test_the_file_of_corrections_itself_can_be_reviewed(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.save()
    again = reopened(session, session.files.out)
    assert again.files.out == session.files.out
    assert len(again.passages) == 2  # the draft knows of the other
    again.close()
    session.files.history.unlink()
    alone = Session.open(str(session.files.out))
    assert [passage.now.state for passage in alone.passages] == ["corrected"]


def test_no_record_of_the_file_of_corrections_is_lost_by_a_save(trees: Path) -> None:
    """Any file of trees may be named: records that nobody reviewed stay in it as well."""
    out = trees.with_suffix(".jsonl")
    out.write_text("".join(json.dumps({"text": text, "tree": gout(), "mine": 1}) + "\n" for text in (TEXT, OTHER, OTHER)))
    session = Session.open(str(trees), out)
    assert len(session.passages) == 4  # nothing says which record of two is of the one passage
    session.approve(4, tick_all(session, 4))
    assert session.save().records == 3
    assert [record.get("review") for record in lines(out)] == [None, None, "approved"]
    assert all(record["mine"] == 1 for record in lines(out))


def test_a_fresh_extraction_replaces_only_what_nobody_touched(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.close()
    items = json.loads(trees.read_text())
    for item in items:
        item["tree"] = [node("D", triple("rest", "therapeutic schedule"))]
    trees.write_text(json.dumps(items))
    again = Session.open(str(trees))
    assert [len(passage.now.nodes or ()) for passage in again.passages] == [5, 1]


# Changing -------------------------------------------------------------------------------------------------------------


def test_undo_and_redo(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.approve(1, 1)
    for state in ("corrected", "drafted"):
        session.undo(1, session.passage(1).version)
        assert session.passage(1).now.state == state
    with pytest.raises(GatewiseError, match="nothing to undo"):
        session.undo(1, session.passage(1).version)
    assert session.passage(1).now.warnings == ("cut short",)
    for state in ("corrected", "approved"):
        session.redo(1, session.passage(1).version)
        assert session.passage(1).now.state == state
    with pytest.raises(GatewiseError, match="nothing to do again"):
        session.redo(1, session.passage(1).version)
    session.edit(1, session.passage(1).version, "swap", {"node": 0})
    assert session.passage(1).now.state == "corrected"  # approved no more


def test_undo_goes_back_over_a_restart(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    session.approve(1, 1)
    session.close()
    again = Session.open(str(trees))
    assert (again.notes, again.passage(1).now) == ([], session.passage(1).now)
    for state in ("corrected", "drafted"):
        assert again.undo(1, again.passage(1).version).now.state == state
    again.close()


def test_sources_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Give colchicine for a flare.")
    assert Session.open(str(tmp_path / "text.txt")).passages[0].now.nodes is None
    session = Session.open("sample:guidelines", tmp_path / "x.jsonl")
    assert len(session.passages) == len(sample())
    passages, faults = session.load(json.dumps([{"text": OTHER, "tree": gout()}, {"text": OTHER}]).encode(), "more.json")
    assert (len(passages), "record 2" in faults[0]) == (1, True)
    assert session.load(b"# Adults\n\nGive naproxen.\n", "a.md", "men")[0][0].text == "men@Adults: Give naproxen."


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("none.json", None, "there is no such file"),
        ("bad.json", "{", "not valid JSON"),
        ("empty.jsonl", "", "has no records"),
        ("wrong.json", '[{"text": "a", "tree": []}]', "record 1: the tree has no nodes"),
        ("x.exe", "x", "expected a text"),
        ("sample:nothing", None, "no sample"),
        ("trees.json.review.jsonl", '{"text": "a"}\n', 'the key "tree" is missing'),
    ],
)
def test_what_cannot_be_reviewed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(file).write_text(content)
    for _ in range(2):  # the files are free again
        with pytest.raises(GatewiseError, match=said):
            Session.open(file)
    Path("folder.jsonl").mkdir()
    with pytest.raises(GatewiseError, match=r"folder\.jsonl cannot be read"):
        Session.open(None, Path("folder.jsonl"))
    with pytest.raises(GatewiseError, match="for the file of corrections"):
        Session.open(None, Path("out.json"))


def test_a_damaged_history_is_refused_not_overwritten(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    correct(session, 2)
    session.close()
    whole = session.files.history.read_text()
    for old, new in (('"corrected"', '"great"'), ('"format": 4', '"format": 5'), ('{"time"', '"time"'), ('"reviewer"', '"x"')):
        damaged = whole.replace(old, new)
        session.files.history.write_text(damaged)
        with pytest.raises(GatewiseError, match=r"history\.jsonl, which has the work of earlier reviews, cannot be read"):
            Session.open(str(trees))
        assert session.files.history.read_text() == damaged


def test_a_torn_end_of_the_history_costs_only_what_was_never_confirmed(trees: Path) -> None:
    session = Session.open(str(trees))
    correct(session)
    before = session.files.history.read_bytes()
    session.approve(2, 0)
    whole = session.files.history.read_bytes()
    session.close()
    for end in range(len(before), len(whole), 37):
        session.files.history.write_bytes(whole[:end])
        again = Session.open(str(trees))
        assert [passage.now.state for passage in again.passages] == ["corrected", "drafted"]
        assert ("was torn by an interruption" in " ".join(again.notes)) == (end > len(before))
        again.approve(2, 0)
        third = reopened(again, trees)
        assert [passage.now.state for passage in third.passages] == ["corrected", "approved"]
        assert third.notes == []
        third.close()
    session.files.history.write_bytes(b"")  # the file was made, and no more
    assert [passage.now.state for passage in Session.open(str(trees)).passages] == ["drafted", "drafted"]


def test_exports(trees: Path) -> None:
    session = Session.open(str(trees))
    assert session.export("html", 1)[0] == "trees.json-1.html"
    assert "cut short" in session.export("html", 1)[1]
    assert json.loads(session.export("json", "all")[1])[1]["text"] == OTHER
    with pytest.raises(GatewiseError, match="no valid tree to export: none was approved"):
        session.export("json", "approved")
    with pytest.raises(GatewiseError, match="an SVG shows one tree"):
        session.export("svg", "all")
    correct(session)
    assert "cut short" not in session.export("html", 1)[1]
    session.edit(1, 1, "add_triple", {"node": 0})
    with pytest.raises(GatewiseError, match="no valid tree to export"):
        session.export("text", 1)


# Extracting -----------------------------------------------------------------------------------------------------------


def extraction(nodes: list[dict[str, Any]], *warnings: str) -> Any:
    return SimpleNamespace(tree=DecisionTree.from_preorder(nodes), warnings=warnings, made_with=None, confidence=None)


def wait(extracting: Extracting) -> None:
    import time

    end = time.monotonic() + 20
    while extracting.progress() is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert extracting.progress() is None


def test_passages_are_extracted_one_after_another(tmp_path: Path) -> None:
    session = Session.open(None, tmp_path / "x.jsonl")
    session.paste(f"{TEXT}\n\n{OTHER}\n\nwomen@This is broken.\n\nmen@Nothing is said.\n\nboys@This is wrong.")

    def extract(text: str, language: Any) -> Any:
        if "broken" in text:
            raise GatewiseError("the passage is too long")
        if "wrong" in text:
            raise RuntimeError("a fault")
        return extraction([node("D")] if "Nothing" in text else gout(), "hurried")

    extracting = Extracting(session, extract)
    extracting.ask(session.passages)
    wait(extracting)
    assert [passage.now.state for passage in session.passages] == ["drafted", "drafted", "empty", "drafted", "empty"]
    assert [extracting.fault(passage)[:26] for passage in session.passages] == [
        "",
        "",
        "the passage is too long",
        "",
        "the extraction failed (Run",
    ]
    assert session.passage(4).now.warnings == ("hurried", NOTHING_FOUND)
    assert not any(map(extracting.is_waiting, session.passages))
    session.edit(1, 1, "swap", {"node": 0})
    extracting.ask([session.passage(1)])
    wait(extracting)
    assert session.passage(1).now.state == "corrected"  # what a person did is not replaced
    session.take(1, 2, extraction=1, replaced=True)
    assert session.passage(1).now.state == "drafted"
    session.undo(1, session.passage(1).version)
    assert session.passage(1).now.state == "corrected"
    extracting.end()


def test_a_cancelled_extraction_leaves_no_tree(tmp_path: Path) -> None:
    import threading

    session = Session.open(None, tmp_path / "x.jsonl")
    session.paste(f"{TEXT}\n\n{OTHER}")
    begun, go_on = threading.Event(), threading.Event()

    def extract(text: str, language: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return extraction(gout())

    extracting = Extracting(session, extract)
    extracting.ask(session.passages)
    assert begun.wait(20)
    progress = extracting.progress()
    assert progress is not None
    assert (progress["passage"], progress["at"], progress["of"]) == (1, 1, 2)
    extracting.cancel()
    go_on.set()
    wait(extracting)
    assert [passage.now.state for passage in session.passages] == ["empty", "empty"]
    extracting.ask([session.passage(2)])
    wait(extracting)
    assert [passage.now.state for passage in session.passages] == ["empty", "drafted"]
    extracting.end(20)
    assert not extracting._thread.is_alive()


def test_what_a_document_leaves_out_is_said(tmp_path: Path) -> None:
    text = f"Treatment\n\n{TEXT}\n\nReferences\n"
    said = "nothing stands under"
    session = Session.open(None, tmp_path / "out.jsonl")
    assert said in session.paste(text)[1][0]
    assert said in session.load(text.encode(), "a.txt")[1][0]
    session.close()
    (tmp_path / "a.txt").write_text(text)
    assert said in Session.open(str(tmp_path / "a.txt")).notes[0]
