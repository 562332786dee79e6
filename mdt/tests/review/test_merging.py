"""Passages with one text, in a second review: each has its own tree and its own approval again, whatever was done to the others."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import render
from gatewise_mdt.records import CARRIED_KEY, read_trees
from gatewise_mdt.review.passage import Version
from gatewise_mdt.review.session import By, Session
from mdt_trees import TEXT, node, triple
from review_serving import tick_all

from gatewise.errors import GatewiseError

Nodes = list[dict[str, Any]]
DRUGS = ("colchicine", "naproxen", "rest")


def drug(name: str) -> Nodes:
    return [node("D", triple(name, "drug therapy"))]


def trees(folder: Path, *names: str, **more: list[Any]) -> str:
    """A file of trees for one text, each of which recommends a drug; ``more`` gives a key its value for each."""
    items = [{"text": TEXT, "tree": drug(name), **{key: held[i] for key, held in more.items()}} for i, name in enumerate(names)]
    file = folder / "dup.json"
    file.write_text(json.dumps(items))
    return str(file)


def edit(session: Session, number: int, name: str) -> None:
    """Corrects the tree of a passage so that it recommends another drug."""
    arguments = {"node": 0, "triple": 0, "parts": triple(name, "drug therapy")}
    session.edit(number, session.passage(number).version, "set_triple", arguments)


def approve(session: Session, number: int) -> None:
    session.approve(number, tick_all(session, number))


def name_of(nodes: Nodes | None) -> str:
    assert nodes is not None
    return str(nodes[0]["triples"][0][2])


def shown(session: Session) -> list[tuple[str, str, bool]]:
    """The drug, the state, and whether the file of corrections has it, of every passage."""
    return [(name_of(one.now.nodes), one.now.state, one.saved is not None) for one in session.passages]


def left(session: Session, lose_draft: bool = False) -> None:
    session.close()
    if lose_draft:
        session.files.history.unlink(missing_ok=True)


def records(session: Session) -> list[dict[str, Any]]:
    return [json.loads(line) for line in session.files.out.read_text().splitlines()]


def rewrite(session: Session, *items: dict[str, Any]) -> None:
    """Another program writes the file of corrections."""
    session.files.out.write_text("".join(json.dumps(item) + "\n" for item in items))


def record(name: str, **more: Any) -> dict[str, Any]:
    return {"text": TEXT, "tree": drug(name), **more}


ACTIONS = ("nothing", "approve", "edit", "edit and approve", "like the next")


@pytest.mark.parametrize("save", [False, True])
def test_whatever_was_done_is_there_again(tmp_path: Path, save: bool) -> None:
    for number, actions in enumerate(product(ACTIONS, repeat=2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert_all_is_there_again(trees(folder, *DRUGS[:2]), actions, save)


def assert_all_is_there_again(file: str, actions: tuple[str, ...], save: bool) -> None:
    session = Session.open(file)
    for number, action in enumerate(actions, start=1):
        if "edit" in action:
            edit(session, number, f"drug {number}")
        if action == "like the next":
            edit(session, number, DRUGS[number % 2])
        if "approve" in action:
            approve(session, number)
    if save:
        session.save()
    before = shown(session)
    left(session)
    again = Session.open(file)
    assert again.notes == [], actions
    assert shown(again) == before, actions
    left(again, lose_draft=True)
    third = Session.open(file)
    if save:  # what was saved is shown once
        reviewed = sorted((name, state) for name, state, _ in shown(third) if state != "drafted")
        assert reviewed == sorted((name, state) for name, state, _ in before if state != "drafted"), actions
    if "like the next" not in actions:  # what nobody touched is there as it came
        untouched = {name for name, action in zip(DRUGS[:2], actions, strict=True) if action == "nothing"}
        assert untouched <= {name for name, state, _ in shown(third) if state == "drafted"}, actions
    third.close()


def test_records_that_were_moved_or_taken_out_by_another_program(tmp_path: Path) -> None:
    file = trees(tmp_path, "colchicine", "naproxen")
    session = Session.open(file)
    approve(session, 1)
    edit(session, 2, "ibuprofen")
    session.save()
    first, second = records(session)
    rewrite(session, second, first)
    left(session)
    again = Session.open(file)
    assert shown(again) == [("colchicine", "approved", True), ("ibuprofen", "corrected", True)]
    rewrite(again, second)
    left(again)
    third = Session.open(file)
    assert shown(third) == [("colchicine", "approved", False), ("ibuprofen", "corrected", True)]
    assert third.notes == []
    third.close()


def test_a_record_that_was_added_by_another_program_takes_no_passage_over(tmp_path: Path) -> None:
    file = trees(tmp_path, *DRUGS)
    session = Session.open(file)
    approve(session, 3)
    session.save()
    rewrite(session, record("ibuprofen", review="approved"), *records(session))
    left(session)
    again = Session.open(file)
    untouched = [("colchicine", "drafted", False), ("naproxen", "drafted", False)]
    assert shown(again) == [*untouched, ("rest", "approved", True), ("ibuprofen", "approved", True)]
    approve(again, 1)
    again.save()
    left(again)
    third = Session.open(file)  # it stays a passage of its own
    assert shown(third) == [("colchicine", "approved", True), *shown(again)[1:]]
    (note,) = third.notes
    assert note.startswith("approved, but with open items")  # as the other program wrote it
    third.close()


def test_a_tree_that_was_extracted_again_is_not_replaced_by_that_of_the_file(tmp_path: Path) -> None:
    file = trees(tmp_path, "colchicine", "naproxen")
    session = Session.open(file)
    session.put(1, Version(drug("ibuprofen"), "drafted"), 0)
    left(session)
    again = Session.open(file)
    assert shown(again) == [("ibuprofen", "drafted", False), ("naproxen", "drafted", False)]
    again.undo(1, again.passage(1).version)
    assert name_of(again.passage(1).now.nodes) == "colchicine"
    left(again)
    file = trees(tmp_path, "rest", "naproxen")  # the file was made anew
    assert shown(Session.open(file)) == [("rest", "drafted", False), ("naproxen", "drafted", False)]


# ---- documents: the same one, one that was saved anew, and one of a review of an earlier gatewise ----

GUIDE = "# Adults\n\nGive colchicine to them.\n\n# ADULTS\n\nGive colchicine to them.\n\n# Children\n\nGive rest to them.\n"


def guide(folder: Path, text: str = GUIDE) -> str:
    file = folder / "guide.md"
    file.write_text(text)
    return str(file)


def open_guide(file: str) -> Session:
    return Session.open(file, population="people")


def headings(session: Session) -> list[tuple[str, str]]:
    """The heading and the state of every passage."""
    return [("›".join(one.more["headings"]), one.now.state) for one in session.passages]


def write_and_approve(session: Session, number: int, name: str) -> None:
    held = session.begin(number, session.passage(number).version)
    session.edit(number, held.version, "add_triple", {"node": 0, "parts": triple(name, "drug therapy")})
    approve(session, number)


PREFACE = "# Preface\n\nGive all of it to people.\n\n"


@pytest.mark.parametrize("text", [f"{GUIDE}\n\n", PREFACE + GUIDE])
def test_passages_of_a_document_that_was_saved_anew_are_the_same(tmp_path: Path, text: str) -> None:
    session = open_guide(guide(tmp_path))
    write_and_approve(session, 2, "colchicine")
    session.save()
    left(session)
    again = open_guide(guide(tmp_path, text))
    there = [("Adults", "empty"), ("ADULTS", "approved"), ("Children", "empty")]
    assert headings(again) == [("Preface", "empty")] * (PREFACE in text) + there
    assert again.notes == []
    again.save()
    assert [name_of(one["tree"]) for one in records(again)] == ["colchicine"]
    again.close()


@pytest.mark.parametrize("text", [f"{GUIDE}\n\n", PREFACE + GUIDE])
def test_a_record_is_found_by_its_headings_without_a_history(tmp_path: Path, text: str) -> None:
    session = open_guide(guide(tmp_path))
    write_and_approve(session, 2, "colchicine")
    session.save()
    left(session, lose_draft=True)
    rewrite(session, *({key: value for key, value in one.items() if key != "passage_id"} for one in records(session)))
    again = open_guide(guide(tmp_path, text))
    assert [one for one in headings(again) if one[1] == "approved"] == [("ADULTS", "approved")]
    assert len(again.passages) == 3 + (PREFACE in text)
    again.close()


def doses(*numbers: int) -> str:
    """A document of sections with one text, which have numbers in their headings."""
    return "# Adults\n\n" + "".join(f"## {number}. Dose\n\nGive it daily.\n\n" for number in numbers)


def two_doses(folder: Path) -> Session:
    """A review of two sections with one text, whose trees are approved and saved."""
    session = open_guide(guide(folder, doses(1, 2)))
    for number, name in ((1, "colchicine"), (2, "naproxen")):
        write_and_approve(session, number, name)
    session.save()
    return session


@pytest.mark.parametrize("lose_history", [False, True])
def test_a_tree_that_comes_from_another_review_stays_at_its_place(tmp_path: Path, lose_history: bool) -> None:
    session = two_doses(tmp_path)
    left(session, lose_draft=True)
    session.files.out.write_text("".join(json.dumps({**one, CARRIED_KEY: {"from": "old"}}) + "\n" for one in records(session)))
    session = open_guide(guide(tmp_path, doses(1, 2)))  # all of it is in the history now
    session.approve(1, tick_all(session, 1), by=By("Ada"))
    session.save()
    left(session, lose_draft=lose_history)
    again = open_guide(guide(tmp_path, doses(2)))
    assert [(one.more["headings"][-1], name_of(one.now.nodes)) for one in again.passages] == [
        ("2. Dose", "naproxen"),
        ("1. Dose", "colchicine"),
    ]
    again.close()


def test_nothing_says_which_of_two_trees_is_of_the_one_section_that_is_left(tmp_path: Path) -> None:
    session = two_doses(tmp_path)
    left(session)
    new = guide(tmp_path, "# Adults\n\n## 3. Dose\n\nGive it daily.\n")
    again = open_guide(new)
    parts = [("Adults›3. Dose", "corrected"), ("Adults›2. Dose", "corrected")]
    assert headings(again) == parts
    assert [
        "comes another number of times, or under other headings, in the document since its tree was" in note for note in again.notes
    ] == [True] * 2
    again.save()
    assert [one["review"] for one in records(again)] == ["corrected"] * 2
    left(again)
    third = open_guide(new)
    assert (headings(third), third.notes) == (parts, [])
    third.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("Dose", "Other", "Dose"), ("Other", "Dose")),  # whose is told apart by its number alone
        (("1. Dose", "2. Dose"), ("1. Other", "2. Dose", "3. Dose")),  # one that is numbered like the one before it was
    ],
)
def test_no_section_has_the_approved_tree_of_another(tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    def text(parts: tuple[str, ...]) -> str:
        return "# Adults\n\n" + "".join(f"## {one}\n\nGive {'rest' if 'Other' in one else 'it'} daily.\n\n" for one in parts)

    session = open_guide(guide(tmp_path, text(before)))
    doses = [one.number for one in session.passages if "Dose" in one.more["headings"][-1]]
    for number, name in zip(doses, ("colchicine", "naproxen"), strict=True):
        write_and_approve(session, number, name)
    session.save()
    left(session)
    again = open_guide(guide(tmp_path, text(after)))
    assert [one.now.state for one in again.passages if one.now.nodes] == ["corrected"] * 2
    assert len(again.notes) == 2
    number = next(one.number for one in again.passages if one.now.nodes)
    approve(again, number)
    again.save()
    left(again)
    same = open_guide(guide(tmp_path, text(after)))
    assert [one.number for one in same.passages if one.now.state == "approved"] == [number]
    same.close()


def test_a_corrected_tree_that_becomes_a_draft_is_told_of(tmp_path: Path) -> None:
    session = open_guide(guide(tmp_path))
    held = session.begin(3, session.passage(3).version)
    session.edit(3, held.version, "add_triple", {"node": 0, "parts": triple("rest", "drug therapy")})
    session.save()
    left(session)
    again = open_guide(guide(tmp_path, GUIDE.replace("Give rest to them.", "Give rest to them all.")))
    assert headings(again)[2] == ("Children", "drafted")
    assert len(again.notes) == 1
    assert "changed in the document since its tree was corrected: it is a draft now" in again.notes[0]
    again.close()


def test_an_approved_tree_runs_nowhere_while_another_is_worked_on(tmp_path: Path) -> None:
    session = Session.open(trees(tmp_path, "colchicine"), reviewer="Ada")
    approve(session, 1)
    session.save()
    before = records(session)
    assert "colchicine" in render(read_trees(session.files.out).records, "dmn")
    edit(session, 1, "naproxen")
    session.save()
    session.put(1, Version(drug("rest"), "drafted"), 0)
    session.take(1, session.passage(1).version, 1, replaced=True)
    session.save()
    (record,) = records(session)
    assert record["changed"]
    session.undo(1, session.passage(1).version)
    session.save()
    (record,) = records(session)
    assert (record["review"], name_of(record["tree"])) == ("approved", "colchicine")
    assert record["changed"]["by"] == "Ada"
    with pytest.raises(GatewiseError, match="is not approved as it is"):
        render(read_trees(session.files.out).records, "dmn")
    left(session)
    again = Session.open(str(tmp_path / "dup.json"), reviewer="Ada")
    assert again.unsaved == 1
    again.undo(1, again.passage(1).version)
    assert (again.passage(1).now.state, again.unsaved) == ("approved", 1)  # the file says still that it was changed
    again.save()
    assert (records(again), again.unsaved) == (before, 0)
    again.close()


def test_who_approved_read_the_document_as_it_was_then(tmp_path: Path) -> None:
    session = open_guide(guide(tmp_path))
    write_and_approve(session, 2, "colchicine")
    session.save()
    first = session.passage(2).more
    assert records(session)[0]["reviewed"]["sha256"] == first["sha256"]
    left(session)
    again = open_guide(guide(tmp_path, PREFACE + GUIDE))
    moved = again.passage(2).more
    assert moved["sha256"] != first["sha256"]
    assert moved["offsets"] == [at + len("Preface\nGive all of it to people.\n") for at in first["offsets"]]
    assert again.unsaved == 0  # no decision has changed
    again.save()
    (record,) = records(again)  # where the passage is now, and what was read when it was approved
    assert {key: record[key] for key in moved} == moved
    assert record["reviewed"]["sha256"] == first["sha256"]
    approve(again, 2)
    assert again.unsaved == 1
    again.save()
    assert records(again)[0]["reviewed"]["sha256"] == moved["sha256"]
    left(again, lose_draft=True)
    third = open_guide(guide(tmp_path, PREFACE + GUIDE))
    assert third.passage(3).record().to_json() == {**records(third)[0], "review": "approved"}
    third.close()


def test_an_approval_that_another_program_took_out_of_the_file_does_not_come_back(tmp_path: Path) -> None:
    file = trees(tmp_path, "colchicine")
    session = Session.open(file)
    approve(session, 1)
    session.save()
    left(session)
    rewrite(session, record("colchicine"))
    again = Session.open(file)
    assert shown(again) == [("colchicine", "drafted", True)]
    approve(again, 1)  # not saved
    left(again)
    third = Session.open(file)
    assert shown(third) == [("colchicine", "approved", True)]
    left(third)


def test_a_correction_that_was_not_saved_outlives_a_change_of_the_document(tmp_path: Path) -> None:
    def correct(session: Session, name: str) -> None:
        held = session.passage(3)
        session.edit(3, held.version, "set_triple", {"node": 0, "triple": 0, "parts": triple(name, "drug therapy")})

    session = open_guide(guide(tmp_path))
    held = session.begin(3, session.passage(3).version)
    session.edit(3, held.version, "add_triple", {"node": 0, "parts": triple("rest", "drug therapy")})
    session.save()
    correct(session, "naproxen")  # not saved
    left(session)
    moved = open_guide(guide(tmp_path, PREFACE + GUIDE))  # every passage is at another place
    write_and_approve(moved, 2, "colchicine")  # not saved either; the history says now where each is
    left(moved)
    again = open_guide(guide(tmp_path, PREFACE + GUIDE))
    assert (name_of(again.passage(3).now.nodes), again.notes, again.unsaved) == ("naproxen", [], 2)
    again.save()
    assert [name_of(one["tree"]) for one in records(again)] == ["colchicine", "naproxen"]
    again.close()


def test_a_tree_that_was_changed_since_its_approval_in_another_review_is_approved_no_more(tmp_path: Path) -> None:
    file = trees(tmp_path, "rest")
    session = Session.open(file)
    approve(session, 1)
    session.save()
    edit(session, 1, "naproxen")
    session.save()
    left(session, lose_draft=True)
    (held,) = records(session)
    assert held["changed"]
    session.files.out.unlink()
    session = Session.open(file)
    edit(session, 1, "colchicine")  # a review that does not know that approval
    left(session)
    rewrite(session, held)
    again = Session.open(file)
    assert shown(again) == [("rest", "corrected", True)]
    again.save()
    with pytest.raises(GatewiseError, match="is not approved as it is"):
        render(read_trees(again.files.out).records, "dmn")
    again.close()


def test_the_approved_tree_of_a_section_that_is_doubtful_stays_under_a_draft(tmp_path: Path) -> None:
    session = two_doses(tmp_path)
    session.put(1, Version(drug("rest"), "drafted"), 0)
    session.take(1, session.passage(1).version, 1, replaced=True)
    session.save()
    left(session)
    again = open_guide(guide(tmp_path, "# Adults\n\n## 3. Dose\n\nGive it daily.\n"))
    first = next(one for one in again.passages if one.more["headings"][-1] == "3. Dose")
    assert (name_of(first.now.nodes), first.now.state, first.now.approved) == ("colchicine", "corrected", None)
    assert first.beside is not None
    assert (name_of(first.beside.nodes), first.beside.state) == ("rest", "drafted")
    again.close()


@pytest.mark.parametrize("saved", [False, True])
def test_an_approval_that_went_for_doubt_is_not_there_beside_it(tmp_path: Path, saved: bool) -> None:
    left(two_doses(tmp_path))
    new = guide(tmp_path, doses(4, 5, 6))
    parts = [("Adults›4. Dose", "corrected"), ("Adults›5. Dose", "corrected"), ("Adults›6. Dose", "empty")]
    again = open_guide(new)
    assert headings(again) == parts
    assert len(again.notes) == 2
    if saved:
        again.save()
    else:
        again.begin(3, again.passage(3).version)  # the history has the new places, and the file the old ones
        parts[2] = ("Adults›6. Dose", "corrected")
    left(again)
    third = open_guide(new)
    assert (headings(third), third.notes) == (parts, [])
    third.close()


@pytest.mark.parametrize("numbers", [(4, 5), (2, 3), (1, 4)])
def test_without_a_history_the_records_tell_of_doubt(tmp_path: Path, numbers: tuple[int, int]) -> None:
    left(two_doses(tmp_path), lose_draft=True)
    again = open_guide(guide(tmp_path, doses(*numbers)))
    assert "approved" not in [state for _, state in headings(again)]
    assert len(again.notes) == 2
    again.close()


@pytest.mark.parametrize("changed", ["another section", "nothing"])
def test_without_a_history_places_that_are_there_still_keep_their_approvals(tmp_path: Path, changed: str) -> None:
    session = open_guide(guide(tmp_path, doses(1, 2, 3)))
    for number, name in ((1, "colchicine"), (3, "naproxen")):
        write_and_approve(session, number, name)
    session.save()
    left(session, lose_draft=True)
    again = open_guide(guide(tmp_path, doses(1, 2, 3) + ("# Children\n\nGive rest.\n" if changed == "another section" else "")))
    assert [state for _, state in headings(again)][:3] == ["approved", "empty", "approved"]
    assert again.notes == []
    again.close()


def test_corrections_of_doubtful_places_are_told(tmp_path: Path) -> None:
    session = open_guide(guide(tmp_path, doses(1, 2)))
    for number, name in ((1, "colchicine"), (2, "naproxen")):
        held = session.begin(number, session.passage(number).version)
        session.edit(number, held.version, "add_triple", {"node": 0, "parts": triple(name, "drug therapy")})
    left(session)
    again = open_guide(guide(tmp_path, doses(3)))
    assert [state for _, state in headings(again)] == ["corrected", "corrected"]
    assert [note.endswith("since its tree was corrected: look at it again") for note in again.notes] == [True, True]
    again.close()


def test_approvals_of_one_place_each_are_doubtful_though_both_have_one_draft(tmp_path: Path) -> None:
    session = two_doses(tmp_path)
    for number in (1, 2):
        session.put(number, Version(drug("rest"), "drafted"), 0)
        session.take(number, session.passage(number).version, 1, replaced=True)
    session.save()
    left(session)
    again = open_guide(guide(tmp_path, doses(3)))
    assert [one.now.standing for one in again.passages] == [None, None]
    assert len(again.notes) == 2
    again.close()
