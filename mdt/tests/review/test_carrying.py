"""A review of an older guideline carried over to a newer one: nothing approved is lost, and nothing else is approved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, read_trees
from gatewise_mdt.checking.changes import difference
from gatewise_mdt.records import CARRIED_KEY, TreeRecord
from gatewise_mdt.review.carrying import Carried, carry
from gatewise_mdt.review.passage import Passage, Version
from gatewise_mdt.review.session import By, Session
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, node, properties, triple
from review_serving import tick_all

OTHER = "children with fever@If the fever lasts, give paracetamol."
CHANGED = TEXT.replace("0.5 mg", "1 mg")
SHORT = [node("D", triple("rest", "therapeutic schedule"))]


ADA = {"by": "Ada", "at": "2024-05-01T10:00:00.000+00:00", "sha256": "ab"}


def record(text: str = TEXT, tree: list[dict[str, Any]] | None = None, number: int = 1, **more: Any) -> TreeRecord:
    return TreeRecord(text, DecisionTree.from_preorder(tree or gout()), number, more)


def passages(*texts: str) -> list[Passage]:
    return [Passage(number, text, more={"source": "new.pdf"}) for number, text in enumerate(texts, start=1)]


def one(texts: list[str], *records: TreeRecord) -> tuple[list[Passage], Carried]:
    return carry(passages(*texts), records, "old.review.jsonl")


# One passage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["approved", "corrected"])
def test_the_same_text_keeps_its_tree_and_its_state(state: str) -> None:
    old = record(review=state, reviewed=ADA, source="old.pdf", place="page 1", sha256="ab", warnings=["w"], code="R12")
    (made,), done = one([TEXT], old)
    assert (made.now.nodes, made.now.state) == (gout(), state)
    assert done.same == [1]
    assert made.more == {
        "code": "R12",
        "source": "new.pdf",
        CARRIED_KEY: {"from": "old.review.jsonl", "sha256": "ab", "place": "page 1"},
    }
    # Who approved it has read the older document, and that stays to be seen.
    assert (made.record().more["review"], made.record().more["reviewed"]) == (state, ADA)


def test_a_changed_text_gets_the_old_tree_as_a_draft_with_the_old_text() -> None:
    (made,), done = one([CHANGED], record(review="approved", reviewed=ADA))
    assert (made.now.nodes, made.now.state, made.now.approved) == (gout(), "drafted", None)
    assert made.now.reviewed is None
    assert made.more[CARRIED_KEY]["text"] == TEXT
    assert made.more[CARRIED_KEY]["reviewed"] == ADA
    assert (done.changed, done.same, done.gone) == ([1], [], [])
    assert made.kept is None  # no save takes it for reviewed


@pytest.mark.parametrize("text", [TEXT.replace("adults", "children"), TEXT.replace("0.5 mg", "0.50 mg"), TEXT.upper()])
def test_another_population_a_number_or_a_letter_is_a_change(text: str) -> None:
    (made,), _ = one([text], record(review="approved"))
    assert made.now.state == "drafted"


def test_what_has_no_counterpart_is_new_or_gone() -> None:
    (made,), done = one([OTHER], record(review="approved"))
    assert made == passages(OTHER)[0]
    assert (done.new, [old.text for old in done.gone]) == ([1], [TEXT])


@pytest.mark.parametrize("state", ["corrected", "approved"])
def test_what_a_person_did_in_the_newer_review_stays(state: Any) -> None:
    other = [node("D", triple("rest", "therapeutic schedule"))]
    for text in (TEXT, CHANGED):
        (before,) = passages(text)
        before = replace(before, now=Version(other, state, (), other if state == "approved" else None))
        (made,), done = carry([before], [record(review="approved")], "old")
        assert made is before
        assert done.kept == [1]
        # The older tree is in no list else, so it is named where it is another one.
        assert [(number, old.tree.to_preorder()) for number, old in done.unlike] == [(1, gout())]
        assert carry([before], [record(tree=other, review="approved")], "old")[1].unlike == []


def test_an_old_draft_that_a_reviewer_did_not_want_stays_away() -> None:
    newer = Version(SHORT, "drafted")
    (made,), _ = carry([replace(passages(CHANGED)[0], now=newer)], [record(review="approved")], "old.review.jsonl")
    for unwanted in (made.settle_extraction(1, take=False), one([CHANGED], record(review="approved"))[0][0].step(back=True)):
        (again,), done = carry([unwanted], [record(review="approved")], "old.review.jsonl")
        assert again is unwanted
        assert (done.kept, [number for number, _ in done.unlike]) == ([1], [1])
        # It is another one once the older review says more of it.
        (again,), _ = carry([unwanted], [record(review="approved", reviewed=ADA)], "old.review.jsonl")
        assert gout() in [again.now.nodes, again.beside and again.beside.nodes]


def test_an_approval_that_was_taken_back_in_the_newer_review_is_not_carried_over_again() -> None:
    old = record(review="approved", reviewed=ADA)
    (made,), _ = carry([replace(passages(TEXT)[0], now=Version(gout(), "drafted"))], [old], "old")
    assert made.now.state == "approved"
    withdrawn = made.set_approval(False)
    assert withdrawn.now.state == "drafted"
    (again,), done = carry([withdrawn], [old], "old")
    assert again is withdrawn
    assert (done.same, done.kept, done.unlike) == ([], [1], [])


def test_a_newer_draft_gives_way_to_an_approved_tree_of_the_same_text_and_can_be_had_back() -> None:
    (before,) = passages(TEXT)
    draft = [node("D", triple("rest", "therapeutic schedule"))]
    (made,), _ = carry([replace(before, now=Version(draft, "drafted"))], [record(review="approved")], "old")
    assert made.now.nodes == gout()
    assert made.step(back=True).now.nodes == draft


def test_beside_a_newer_draft_of_a_changed_text_lies_the_old_tree() -> None:
    (before,) = passages(CHANGED)
    draft = Version([node("D", triple("rest", "therapeutic schedule"))], "drafted")
    before = replace(before, now=draft)
    (made,), done = carry([before], [record(review="approved")], "old")
    assert made.now == draft
    assert made.beside is not None
    assert (made.beside.nodes, made.beside.state) == (gout(), "drafted")
    assert done.changed == [1]
    assert carry([made], [record(review="approved")], "old")[0] == [made]


@pytest.mark.parametrize("text", [TEXT, CHANGED])
def test_of_two_reviewers_trees_none_gives_way_to_an_old_one(text: str) -> None:
    (before,) = passages(text)
    ben = Version([node("D", triple("sleep", "therapeutic schedule"))], "drafted", of="Ben")
    before = replace(before, now=Version(SHORT, "drafted"), beside=ben, extractions=1)
    (made,), done = carry([before], [record(review="approved")], "old")
    assert made is before
    assert (done.kept, [(number, old.tree.to_preorder()) for number, old in done.unlike]) == ([1], [(1, gout())])


# Several passages -----------------------------------------------------------------------------------------------------


def test_a_text_that_comes_less_often_with_several_trees_is_read_anew() -> None:
    made, done = one([TEXT], record(review="approved"), record(tree=SHORT, number=2, review="approved"))
    assert made[0].now.state == "drafted"
    assert done.changed == [1]
    assert [old.number for old in done.gone] == [2]


def test_a_text_that_comes_more_often_with_one_tree_has_it_everywhere() -> None:
    made, done = one([TEXT, TEXT], record(review="approved"))
    assert [passage.now.state for passage in made] == ["approved", "approved"]
    assert not done.gone


def test_a_moved_passage_is_found_and_each_tree_is_used_once() -> None:
    # The unchanged one takes its own tree though the changed one, which comes first, is like it, too.
    made, done = one([CHANGED, OTHER, TEXT], record(review="approved"), record(OTHER, SHORT, 2, review="approved"))
    assert [passage.now.state for passage in made] == ["empty", "approved", "approved"]
    assert done.new == [1]


def test_of_two_changed_ones_each_gets_the_likest() -> None:
    first = "adults with gout@For an acute flare, give colchicine 0.5 mg twice daily, and rest the joint."
    second = "adults with gout@For an acute flare, give naproxen 500 mg twice daily, and a proton pump inhibitor."
    old = [record(second, SHORT, 1), record(first, gout(), 2)]
    made, _ = one([first.replace("0.5", "0.6"), second.replace("500", "250")], *old)
    assert [passage.now.nodes for passage in made] == [gout(), SHORT]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("12", "12", "ab"),
        ("12", "21", "ba"),  # the sections were moved
        ("12", "23", ""),  # one was taken out and one added, or both have other numbers now
        ("11", "12", ""),
        ("11", "11", "ab"),
    ],
)
def test_trees_of_one_text_stay_under_their_headings(old: str, new: str, wanted: str) -> None:
    records = [
        record(TEXT, [node("D", triple(name, "drug therapy"))], review="approved", headings=[f"{number}. Flares"])
        for name, number in zip("ab", old, strict=True)
    ]
    newer = [Passage(at, TEXT, more={"headings": [f"{number}. Flares"]}) for at, number in enumerate(new, 1)]
    made, done = carry(newer, records, "old")
    approved = [one.now.nodes for one in made if one.now.state == "approved"]
    assert "".join(nodes[0]["triples"][0][2] for nodes in approved if nodes) == wanted
    assert (done.changed, done.gone) == ([] if wanted else [1, 2], [])


def test_each_row_of_a_table_that_changed_in_all_rows_gets_the_tree_of_its_row() -> None:
    rows = [f"adults with gout@Doses of colchicine: give {step} mg twice daily" for step in range(100, 130)]
    old = [record(text, [node("D", triple(f"{i}", "drug therapy"))], i) for i, text in enumerate(rows)]
    made, done = one([row.replace(" mg", "5 mg") for row in rows], *old)
    assert [passage.now.nodes for passage in made] == [record.tree.to_preorder() for record in old]
    assert (done.new, done.gone) == ([], [])


@properties
@given(st.lists(st.sampled_from([TEXT, CHANGED, OTHER, OTHER + " Or not.", "x y z"]), max_size=6), st.data())
def test_no_tree_is_approved_for_a_text_it_was_not_approved_for(texts: list[str], data: st.DataObject) -> None:
    trees = st.sampled_from([gout(), SHORT])
    held = data.draw(
        st.lists(st.tuples(st.sampled_from([TEXT, CHANGED, OTHER]), trees, st.sampled_from(["approved", None])), max_size=6)
    )
    records = [record(text, tree, n, **({"review": state} if state else {})) for n, (text, tree, state) in enumerate(held, 1)]
    made, done = carry(passages(*texts), records, "old")
    for passage in made:
        if passage.now.state == "approved":
            assert (passage.text, passage.now.nodes, "approved") in held
    numbers = [*done.same, *done.changed, *done.kept, *done.new]
    assert sorted(numbers) == list(range(1, len(texts) + 1))
    # Every older tree is in the newer review, or is said to be gone.
    there = {json.dumps(passage.now.nodes) for passage in made} | {json.dumps(old.tree.to_preorder()) for old in done.gone}
    assert {json.dumps(tree) for _, tree, _ in held} <= there


# The change -----------------------------------------------------------------------------------------------------------


def test_numbers_with_their_units_change_whole() -> None:
    assert difference("give 5 mg daily", "give 50 mg daily") == [
        ("same", "give "),
        ("gone", "5 mg"),
        ("new", "50 mg"),
        ("same", " daily"),
    ]


TEXTS = st.text(st.sampled_from("ab 5.0mg-½@。药片\n"), max_size=30)


@properties
@given(TEXTS, TEXTS)
def test_a_difference_has_both_texts_whole(old: str, new: str) -> None:
    parts = difference(old, new)
    assert "".join(text for kind, text in parts if kind != "new") == old
    assert "".join(text for kind, text in parts if kind != "gone") == new


# In a review ----------------------------------------------------------------------------------------------------------


def open_new(tmp_path: Path, text: str) -> Session:
    (tmp_path / "new.txt").write_text(text)
    return Session.open(str(tmp_path / "new.txt"), reviewer="Ben")


def test_a_review_keeps_what_was_carried_over(tmp_path: Path) -> None:
    with_other = CHANGED + "\n\n" + OTHER
    old = [record(review="approved"), record(OTHER, SHORT, 2, review="approved")]
    session = open_new(tmp_path, with_other)
    done = session.carry(old, "old.review.jsonl", By("Cleo"))
    assert (done.changed, done.same) == ([1], [2])
    states = [(passage.now, passage.more) for passage in session.passages]
    session.close()  # as after a kill: nothing was saved

    session = open_new(tmp_path, with_other)
    assert [(passage.now, passage.more) for passage in session.passages] == states
    rows = [json.loads(line) for line in session.files.history.read_text().splitlines()]
    assert [(row["reviewer"], row["passage"]) for row in rows if row["action"] == "carry"] == [("Cleo", 1), ("Cleo", 2)]

    before = session.files.history.read_bytes()
    session.carry(old, "old.review.jsonl")
    assert session.files.history.read_bytes() == before  # once more changes nothing
    session.save()
    session.close()
    saved = read_trees(session.files.out).records
    assert [(one.text, one.more["review"]) for one in saved] == [(OTHER, "approved")]

    session = open_new(tmp_path, with_other)
    assert [passage.now.state for passage in session.passages] == ["drafted", "approved"]
    session.approve(1, tick_all(session, 1))
    session.save()
    session.close()
    assert {one.text: one.more["review"] for one in read_trees(session.files.out).records} == {
        CHANGED: "approved",
        OTHER: "approved",
    }


SURE = (0.9, 0.41, 0.72, 0.5, None)


def test_how_sure_a_model_was_is_carried_over_for_the_same_text_alone() -> None:
    old = record(review="corrected", confidence=[0.9, None, 0.72, 0.5, None])
    (made,), _ = one([TEXT], old)
    assert made.now.confidence == old.confidence
    assert "confidence" not in made.more
    assert made.record().more["confidence"] == list(old.confidence or ())
    (made,), _ = one([CHANGED], old)
    assert (made.now.nodes, made.now.confidence) == (gout(), None)
    # A draft of the newer text has its own, though it is the same tree.
    newer = replace(passages(CHANGED)[0], now=Version(gout(), "drafted", confidence=SURE))
    (made,), _ = carry([newer], [old], "old.review.jsonl")
    assert made.now.confidence == SURE
    assert carry([made], [old], "old.review.jsonl")[0] == [made]
