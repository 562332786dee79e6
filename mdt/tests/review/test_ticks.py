"""What has to be ticked before a tree is approved, what a tick belongs to, and that an approval is of a text."""

import json
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, open_items, read_trees
from gatewise_mdt.checking.items import items_of
from gatewise_mdt.review.actions import Review
from gatewise_mdt.review.extracting import Extracting
from gatewise_mdt.review.passage import Version
from gatewise_mdt.review.session import By, Session
from gatewise_mdt.review.shown import passage_json
from mdt_trees import node, triple
from refusals import assert_refused
from review_serving import tick_all
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError

GUIDE = "# Adults with gout\n\nGive colchicine 0.5 mg twice daily. In renal failure 0.5 mg is enough.\n"
DOSE = triple("0.5 mg twice daily", "dosage and administration", "colchicine")
TREE = [node("D", triple("colchicine", "drug therapy"), DOSE, joined="and")]
WHY = "of renal failure alone"


def opened(file: Path, text: str = GUIDE, reviewer: str = "Ada") -> Session:
    file.write_text(text)
    return Session.open(str(file), reviewer=reviewer)


def drafted(session: Session, nodes: list[dict[str, Any]] = TREE, number: int = 1) -> None:
    session.put(number, Version(nodes, "drafted"), session.passage(number).version)


def approve(session: Session, number: int = 1) -> None:
    session.approve(number, session.passage(number).version)


def kinds(session: Session, number: int = 1) -> list[tuple[str, str]]:
    return [(item.kind, item.words) for item in session.passage(number).open_items]


@pytest.mark.parametrize(
    ("text", "leaf", "kind"),
    [
        ("Do not give naproxen for an acute flare.", [triple("naproxen", "drug therapy")], "given though forbidden"),
        (
            "Give ramipril 2.5 mg twice daily. Give bisoprolol 1.25 mg once daily.",
            [triple("bisoprolol", "drug therapy"), triple("2.5 mg twice daily", "dosage and administration", "bisoprolol")],
            "dose of another drug",
        ),
        (
            "Give bisoprolol. The maximum dose of bisoprolol is 5 mg once daily.",
            [triple("bisoprolol", "drug therapy"), triple("5 mg once daily", "dosage and administration", "bisoprolol")],
            "limit",
        ),
        (
            "Give amoxicillin 5 mg (per kg).",
            [triple("amoxicillin", "drug therapy"), triple("5 mg", "dosage and administration", "amoxicillin")],
            "dose",
        ),
        (
            "Give methotrexate 7.5 mg every 7 days.",
            [triple("methotrexate", "drug therapy"), triple("7.5 mg", "dosage and administration", "methotrexate")],
            "frequency",
        ),
        ("Give colchicine 0.5 mg. If eGFR is below 30, give 0.25 mg.", [], "empty tree"),
    ],
)
def test_a_tree_that_lost_or_turned_something_is_neither_approved_nor_exported(
    tmp_path: Path, text: str, leaf: list[list[str]], kind: str
) -> None:
    session = opened(tmp_path / "g.md", f"# Adults with gout\n\n{text}\n")
    drafted(session, [node("D", *leaf, joined="and" if len(leaf) > 1 else "null")])
    assert kind in dict(kinds(session))
    with pytest.raises(GatewiseError, match=f"cannot be approved yet, it has open items: .*{kind} "):
        approve(session)
    record = session.passage(1).record()
    out = tmp_path / "old.review.jsonl"  # approved before there were ticks
    reviewed = {"by": "Ada", "of": record.digest}
    out.write_text(json.dumps({**record.to_json(), "review": "approved", "reviewed": reviewed}))
    assert_refused(CliRunner().invoke(app, ["mdt", "show", str(out), "--format", "dmn"]), "in passage 1", kind)
    old = Session.open(str(out))
    assert (old.passage(1).now.state, old.notes) == (
        "approved",
        ["approved, but with open items, so that systems that run trees do not get them until each item is ticked: passage 1"],
    )
    with pytest.raises(GatewiseError, match=f"passage 1 .*{kind}"):
        old.export("fhir-r4", "approved")
    assert json.loads(old.export("fhir-r4", "approved", drafts=True)[1])["meta"]["tag"][0]["code"] == "DRAFT"
    tick_all(old, 1)
    assert "DRAFT" not in old.export("fhir-r4", "approved")[1]
    assert old.passage(1).now.reviewed == reviewed
    assert old.unsaved == 1


def test_a_tick_says_who_when_and_why_in_page_file_history_and_check(tmp_path: Path) -> None:
    session = opened(tmp_path / "g.md")
    drafted(session)
    review = Review(session)
    asked: dict[str, Any] = {"number": 1, "version": session.passage(1).version, "item": 0, "ticked": True, "why": " "}
    with pytest.raises(GatewiseError, match=r'dose "0\.5 mg" is ticked with a word why it is no mistake'):
        review.do("tick", asked)
    for item in (7, -1, 1):  # 1 is a hint
        with pytest.raises(GatewiseError, match="no such item"):
            review.do("tick", {**asked, "item": item, "why": WHY})
    made = review.do("tick", {**asked, "why": WHY}, "Ben")["passage"]
    assert (made["items"][0]["tick"]["by"], made["items"][0]["tick"]["why"]) == ("Ben", WHY)
    session.tick(1, made["version"], 0, False, by=By("Ben"))
    assert kinds(session) == [("dose", "0.5 mg")]
    session.undo(1, session.passage(1).version, by=By("Ben"))
    approve(session)
    with pytest.raises(GatewiseError, match="take the approval back first"):
        session.tick(1, session.passage(1).version, 0, False)
    done = [(one.action, one.reviewer, one.comment) for one in session.history(session.passage(1)) if "tick" in one.action]
    assert done == [("tick", "Ben", f'dose "0.5 mg": {WHY}'), ("untick", "Ben", 'dose "0.5 mg"')]
    session.save()
    assert session.unsaved == 0
    (tick,) = read_trees(session.files.out).records[0].ticks
    assert (tick["kind"], tick["words"], tick["by"], tick["why"], tick["at"][:2]) == ("dose", "0.5 mg", "Ben", WHY, "20")
    said = CliRunner().invoke(app, ["mdt", "check", str(session.files.out)]).stdout
    assert "dose: No triple has " in said
    assert f"; ticked: Ben, {tick['at']}, {WHY}\n" in said
    assert "0 items open in 0 of 1 records, 1 ticked" in said
    found = json.loads(CliRunner().invoke(app, ["mdt", "check", str(session.files.out), "--json"]).stdout)
    assert [item["tick"] and item["tick"]["by"] for item in found["records"][0]["items"]] == ["Ben", None]
    session.close()
    again = Session.open(str(tmp_path / "g.md"))
    assert (again.passage(1).now.ticks, kinds(again)) == ((tick,), [])


def test_a_tick_stays_when_nodes_come_and_go_and_falls_with_its_triple(tmp_path: Path) -> None:
    text = "# Adults with gout\n\nGive colchicine. The maximum dose is 5 mg daily. If it fails, do not give naproxen.\n"
    dose = triple("5 mg daily", "dosage and administration", "colchicine")
    tree = [node("C", triple("it fails")), node("D"), node("D", triple("colchicine", "drug therapy"), dose, joined="and")]
    session = opened(tmp_path / "g.md", text)
    drafted(session, tree)
    assert ("limit", "maximum dose is 5 mg") in kinds(session)
    tick_all(session, 1)

    def changed(nodes: list[dict[str, Any]]) -> set[str]:
        """The kinds that are open when the tree becomes another one."""
        passage = session.passage(1).edit(lambda _: nodes)
        return {item.kind for item in passage.open_items}

    other = [node("C", triple("gout")), node("D", triple("naproxen", "prohibited drugs")), *tree]
    assert "limit" not in changed(other)  # node 3 is node 5 now
    more = [*tree[:2], node("D", *tree[2]["triples"], triple("rest", "therapeutic schedule"), joined="and")]
    assert "limit" not in changed(more)
    assert "limit" in changed([*tree[:2], node("D", triple("colchicine", "drug therapy"), [*dose[:2], "5 mg"], joined="and")])
    record = session.passage(1).record()
    assert open_items(record) == []
    assert open_items(TreeRecord(record.text + " ", record.tree, 1, record.more)) == []
    assert open_items(TreeRecord(record.text.replace("fails", "failed"), record.tree, 1, record.more)) != []


def test_of_two_items_that_are_alike_one_goes_and_the_other_is_open(tmp_path: Path) -> None:
    leaf = node("D", triple("7 mg", "dosage and administration", "colchicine"))
    tree = DecisionTree.from_preorder([node("C", triple("it hurts")), leaf, leaf])
    record = TreeRecord("adults@If it hurts, give colchicine 5 mg.", tree)
    first, second = (item for item in open_items(record) if item.kind == "number not in the text")
    assert (first.node, second.node, first.again, second.again, first.about) == (1, 2, 0, 1, second.about)
    session = opened(tmp_path / "g.md", "# adults\n\nIf it hurts, give colchicine 5 mg.\n")
    drafted(session, tree.to_preorder())
    tick_all(session, 1)
    one = session.passage(1).edit(lambda nodes: [nodes[0], nodes[1], node("D")])
    assert [item.node for item in one.open_items if item.kind == "number not in the text"] == [1]


def test_items_are_computed_once_a_version(tmp_path: Path) -> None:
    session = Session.open(None, tmp_path / "x.review.jsonl")
    session.load("\n\n".join(f"# Group {i}\n\nGive drug{i} 5 mg daily." for i in range(500)).encode(), "many.md")
    tree = [node("D", triple("it", "drug therapy", "Group"))]
    for number in range(1, 6):
        drafted(session, tree, number)
    items_of.cache_clear()
    for _ in range(3):
        for passage in session.passages:
            passage_json(passage)
    assert items_of.cache_info().misses == 5
    session.comment(1, By(comment="hm"))
    passage_json(session.passage(1))
    assert items_of.cache_info().misses == 5


# An approval is of a text -------------------------------------------------------------------------------------------------------


def test_a_text_that_changed_in_the_document_is_to_be_looked_at_again(tmp_path: Path) -> None:
    """5 mg for 0.5 mg: it stayed approved at its line, and went out."""
    file = tmp_path / "g.md"
    session = opened(file)
    drafted(session)
    tick_all(session, 1)
    approve(session)
    out = session.save().path
    session.close()
    show = ["mdt", "show", str(out), "--format", "dmn"]
    assert CliRunner().invoke(app, show).exit_code == 0
    file.write_text(GUIDE.replace("0.5 mg twice", "5 mg twice"))
    assert_refused(CliRunner().invoke(app, show), f"{file} has changed since its review was saved")
    without = Session.open(str(out))  # opened without its document
    with pytest.raises(GatewiseError, match=r"g\.md has changed since its review was saved"):
        without.export("dmn", "approved")
    without.close()
    again = Session.open(str(file), reviewer="Ben")
    assert [(one.text.partition("@")[2][:20], one.now.state) for one in again.passages] == [("Give colchicine 5 mg", "drafted")]
    assert "changed in the document since its tree was approved by Ada: it is approved no more" in again.notes[0]
    shown = passage_json(again.passage(1))
    assert [part for part in shown["carried"]["difference"] if part[0] != "same"] == [("gone", "0.5 mg"), ("new", "5 mg")]
    assert ("changed text", "5 mg") in kinds(again)
    assert ("dose", "0.5 mg") not in kinds(again)  # which stands behind "In renal failure", and a rule lists with it
    for export in ("approved", 1):
        with pytest.raises(GatewiseError):
            again.export("dmn", export)
    with pytest.raises(GatewiseError, match="nothing to undo"):
        again.undo(1, again.passage(1).version)
    again.comment(1, By(comment="to be asked"))  # the history has it now, and the file of corrections the old one still
    again.close()
    third = Session.open(str(file), reviewer="Ben")
    assert [(one.number, one.now.state, one.past) for one in third.passages] == [(1, "drafted", ())]
    place = next(place for place, (item, _) in enumerate(third.passage(1).looked_at) if item.kind == "changed text")
    third.tick(1, third.passage(1).version, place, True)  # looked at, which needs no word
    tick_all(third, 1)
    approve(third)
    third.save()
    third.close()
    assert CliRunner().invoke(app, show).exit_code == 0
    (record,) = read_trees(out).records
    assert (record.reviewed or {})["by"] == "Ben"


def test_an_approval_of_what_the_document_no_longer_has_is_none(tmp_path: Path) -> None:
    file = tmp_path / "g.md"
    session = opened(file)
    drafted(session)
    tick_all(session, 1)
    approve(session)
    pasted = session.paste("adults@Give rest.")[0][0].number
    drafted(session, [node("D", triple("rest", "therapeutic schedule", "adults"))], pasted)
    approve(session, pasted)
    session.save()
    session.close()
    again = opened(file, "# Adults with gout\n\nDrink water.\n")
    assert [(one.now.state, len(one.past)) for one in again.passages][:2] == [("empty", 0), ("corrected", 0)]
    assert again.passage(pasted).now.state == "approved"
    assert "is gone from the document since its tree was approved by Ada" in again.notes[0]
    again.save()
    assert [record.more["review"] for record in read_trees(again.files.out).records] == ["corrected", "approved"]
    again.close()
    shown = CliRunner().invoke(app, ["mdt", "show", str(again.files.out), "--format", "dmn"])
    assert (shown.exit_code, "Give rest" in shown.stdout, "left out" in shown.stderr) == (0, True, True)


def test_an_unfinished_correction_goes_on_and_what_was_approved_under_it_lies_beside(tmp_path: Path) -> None:
    file = tmp_path / "g.md"
    session = opened(file)
    drafted(session)
    tick_all(session, 1)
    approve(session)
    session.edit(1, session.passage(1).version, "to_condition", {"node": 0})
    session.edit(1, session.passage(1).version, "remove_triple", {"node": 0, "triple": 0})
    session.edit(1, session.passage(1).version, "remove_triple", {"node": 0, "triple": 0})
    unfinished = session.passage(1).now.nodes
    session.close()
    passage = opened(file, GUIDE.replace("0.5 mg twice", "5 mg twice")).passage(1)
    assert (passage.now.nodes, passage.is_valid, passage.now.approved) == (unfinished, False, None)
    assert passage.beside is not None
    assert (passage.beside.nodes, passage.beside.state, passage.beside.ticks) == (TREE, "drafted", ())


def test_of_a_text_that_came_with_a_newer_tree_the_old_one_lies_beside(tmp_path: Path) -> None:
    file = tmp_path / "trees.json"
    file.write_text(json.dumps([{"text": "adults@Give colchicine 0.5 mg twice daily.", "tree": TREE}]))
    session = Session.open(str(file))
    approve(session)
    session.close()
    new = [node("D", triple("colchicine", "drug therapy"))]
    file.write_text(json.dumps([{"text": "adults@Give colchicine 5 mg twice daily.", "tree": new}]))
    (passage,) = Session.open(str(file)).passages
    assert (passage.now.nodes, passage.now.state) == (new, "drafted")
    assert passage.beside is not None
    assert (passage.beside.nodes, passage.beside.state, passage.beside.reviewed) == (TREE, "drafted", None)


def test_what_changed_is_an_item_after_carry(tmp_path: Path) -> None:
    """0.6 mg for 0.5 mg, which stands in the next sentence as well."""
    session = opened(tmp_path / "old.md")
    drafted(session)
    tick_all(session, 1)
    approve(session)
    session.save()
    session.close()
    new = tmp_path / "new.md"
    new.write_text(GUIDE.replace("0.5 mg twice", "0.6 mg twice"))
    result = CliRunner().invoke(app, ["mdt", "carry", str(tmp_path / "old.md"), str(new)])
    assert result.exit_code == 0, result.output
    again = Session.open(str(new))
    item = again.passage(1).open_items[0]
    assert (item.kind, item.words, item.sentence) == ("changed text", "0.6 mg", 'The text had "0.5 mg" here and has "0.6 mg" now.')
    assert again.passage(1).text.partition("@")[2][item.start : item.end] == "0.6 mg"
    with pytest.raises(GatewiseError, match=r'changed text "0\.6 mg"'):
        approve(again)


def saved(file: Path) -> Session:
    """Approved, saved and closed."""
    session = opened(file)
    drafted(session)
    tick_all(session, 1)
    approve(session)
    session.save()
    session.close()
    return session


def test_ticks_that_came_back_with_the_file_of_corrections_are_not_lost(tmp_path: Path) -> None:
    """Ben got the file without its history, ticked, and sent it back."""
    session = opened(tmp_path / "g.md")
    drafted(session)
    session.edit(1, session.passage(1).version, "join", {"node": 0, "join": "or"})
    out = session.save().path
    session.close()
    bens = Session.open(str(out), tmp_path / "bens.review.jsonl", reviewer="Ben")
    tick_all(bens, 1)
    out.write_text(bens.save().path.read_text())
    again = Session.open(str(tmp_path / "g.md"))
    assert kinds(again) == []
    assert "or other ticks" in again.notes[0]
    assert again.save().records == 1
    assert read_trees(out).records[0].ticks[0]["by"] == "Ben"


def reworded(file: Path) -> Session:
    """Approved at 0.5 mg, then 0.6 mg in the document, corrected there and saved, but the change not ticked."""
    saved(file)
    session = opened(file, GUIDE.replace("0.5 mg twice", "0.6 mg twice"))
    session.edit(1, session.passage(1).version, "join", {"node": 0, "join": "or"})
    session.save()
    return session


def test_a_change_that_nobody_ticked_stays_open_when_the_text_changes_again(tmp_path: Path) -> None:
    reworded(tmp_path / "g.md").close()
    text = (tmp_path / "g.md").read_text()
    for file in ("same.md", "new.md"):
        (tmp_path / file).write_text(text if file == "same.md" else f"{text.strip()} Measure urate.\n")
        assert CliRunner().invoke(app, ["mdt", "carry", str(tmp_path / "g.md"), str(tmp_path / file)]).exit_code == 0
        assert ("changed text", "0.6 mg") in kinds(Session.open(str(tmp_path / file)))
    for end in ("Measure urate.", "Weigh."):  # of which the file of corrections gets none
        session = opened(tmp_path / "g.md", f"{text.strip()} {end}\n")
        assert [one.number for one in session.passages] == [1]
        assert {("changed text", "0.6 mg"), ("changed text", end)} <= set(kinds(session))
        session.comment(1, By(comment="to be asked"))
        session.close()
    session = Session.open(str(tmp_path / "g.md"))
    tick_all(session, 1)
    session.close()
    session = opened(tmp_path / "g.md", f"{text.strip()} Drink.\n")
    assert [one.number for one in session.passages] == [1]
    assert [one for one in kinds(session) if one[0] == "changed text"] == [("changed text", "Drink")]


def test_a_document_is_the_same_by_whichever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "g.md"
    saved(file)
    file.write_text(GUIDE.replace("0.5 mg twice", "5 mg twice"))
    monkeypatch.chdir(tmp_path)
    assert [one.now.state for one in Session.open("g.md").passages] == ["drafted"]


def test_a_tree_that_leaves_the_file_of_corrections_is_in_the_history(tmp_path: Path) -> None:
    """Of a colleague's file, which came without a history."""
    file = tmp_path / "g.md"
    saved(file).files.history.unlink()
    session = opened(file, GUIDE.replace("0.5 mg twice", "5 mg twice"))
    assert session.save().records == 0
    session.close()
    assert Session.open(str(file)).passage(1).now.nodes == TREE


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a@Give 5 mg daily.", "a@Give 5  mg\ndaily.", []),
        ("a@Give it twice a day for a flare.", "a@Give it three times a day for a flare.", [("three times a day", True)]),
        ("a@Give it. Avoid it in renal failure.", "a@Give it.", [("Avoid it in renal failure.", False)]),
        ("adults@Give it.", "children@Give it.", [("children", False)]),
        ("成人@给予泼尼松10mg，每日1次。", "成人@给予泼尼松20mg，每日1次。", [("20mg", True)]),
    ],
)
def test_changes_of_a_text_are_items_at_their_places(old: str, new: str, said: list[tuple[str, bool]]) -> None:
    leaf = node("D", triple("it", "drug therapy", "a"))
    record = TreeRecord(new, DecisionTree.from_preorder([leaf]), 1, {"carried": {"from": "x", "text": old}})
    found = [item for item in open_items(record) if item.is_change]
    assert [(item.words, item.start is not None) for item in found] == said
    assert all(record.passage[item.start : item.end] == item.words for item in found if item.start is not None)


@pytest.mark.parametrize(
    ("old", "new"), [("Give colchicine", "Take colchicine"), ('"logical_rel": "and"', '"logical_rel": "or"')], ids=["text", "tree"]
)
def test_an_approval_is_of_a_text_and_a_tree_whoever_changes_the_file(tmp_path: Path, old: str, new: str) -> None:
    out = saved(tmp_path / "g.md").files.out
    show = ["mdt", "show", str(out), "--format", "dmn"]
    out.write_text(out.read_text().replace("In renal failure", "In renal  failure"))  # white space makes no other text
    assert CliRunner().invoke(app, show).exit_code == 0
    assert "approved by Ada" in CliRunner().invoke(app, show[:3]).stdout
    out.write_text(out.read_text().replace(old, new))
    assert_refused(CliRunner().invoke(app, show), "is not approved as it is")
    assert "approved by Ada" not in CliRunner().invoke(app, show[:3]).stdout
    (passage,) = Session.open(str(out), tmp_path / "other.review.jsonl").passages
    assert (passage.now.state, passage.now.reviewed) == ("corrected", None)


def test_ticks_stay_under_a_tree_that_is_extracted_again(tmp_path: Path) -> None:
    session = opened(tmp_path / "g.md")
    drafted(session)
    tick_all(session, 1)
    ticks, of = session.passage(1).now.ticks, session.passage(1).version
    assert ticks
    again = session.passage(1).put_extraction(Version(TREE, "drafted"), of)
    assert (again.now.ticks, again.open_items) == (ticks, [])
    beside = session.passage(1).put_extraction(Version(TREE, "drafted"), of - 1)
    assert beside.settle_extraction(beside.extractions, take=True).now.ticks == ticks


def test_a_tree_that_lies_beside_is_not_extracted_away(tmp_path: Path) -> None:
    """As the approved one does after the document changed."""
    session = opened(tmp_path / "g.md")
    drafted(session)
    drafted(session, TREE[:1])
    of = session.passage(1).version
    session.put(1, Version(TREE, "drafted"), of - 1)
    assert session.passage(1).beside is not None
    extracting = Extracting(session, lambda text, language: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(GatewiseError, match="a tree lies beside that of passage 1: take it or leave it before you extract again"):
        Review(session, extracting).do("extract", {"passages": [[1, of]]})
    extracting.end()
