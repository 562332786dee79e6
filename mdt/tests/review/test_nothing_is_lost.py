"""Nobody's work is lost: two who change one passage, an extraction that lands meanwhile, a server that is killed, a full disk.

What "lost" means here: what was answered with success is there after any restart; a tree that was approved stays in the file of
corrections until a reviewer approves another one or takes the approval back; and a change that was refused is one that was told so.
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, Extraction, read_trees
from gatewise_mdt.review import Extracting, Review, Session
from gatewise_mdt.review.passage import Version
from gatewise_mdt.review.server import ReviewServer
from gatewise_mdt.review.session import NOBODY, By, OldPageError
from gatewise_mdt.review.shown import passage_json, session_json
from mdt_trees import TEXT, gout, node, triple
from review_serving import Client, tick_all

from gatewise.errors import GatewiseError

OTHER = "children with fever@If the fever lasts, give paracetamol."
DRAFT = [node("D", triple("rest", "therapeutic schedule"))]


def file_of(folder: Path, count: int = 2) -> str:
    file = folder / "trees.json"
    file.write_text(json.dumps([{"text": f"{TEXT} ({i})", "tree": gout()} for i in range(count)]))
    return str(file)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    opened = Session.open(file_of(tmp_path), reviewer="ada")
    yield opened
    opened.close()


def correct(session: Session, number: int, words: str, by: By = NOBODY) -> None:
    arguments = {"node": 1, "triple": 0, "parts": [None, None, words]}
    session.edit(number, session.passage(number).version, "set_triple", arguments, by)


def rows(session: Session) -> list[dict[str, Any]]:
    return [json.loads(line) for line in session.files.history.read_text(encoding="utf-8").splitlines()]


def records(session: Session) -> list[dict[str, Any]]:
    return [json.loads(line) for line in session.files.out.read_text(encoding="utf-8").splitlines()]


# An approval is a person's word ---------------------------------------------------------------------------------------


def act(session: Session, what: str, who: str, *more: Any) -> Any:
    return getattr(session, what)(1, session.passage(1).version, *more, by=By(who))


def approver(session: Session) -> str | None:
    standing = session.passage(1).now.standing
    return standing.reviewed["by"] if standing and standing.reviewed else None


@pytest.mark.parametrize("what", ["approve", "withdraw"])
def test_nobody_else_undoes_or_redoes_what_is_about_an_approval(session: Session, what: str) -> None:
    act(session, "approve", "Ada", True)
    if what == "withdraw":
        act(session, "approve", "Bea", False)
    for back in ("undo", "redo"):
        with pytest.raises(GatewiseError, match="only Ada can undo or redo their own approval"):
            act(session, back, "Bea")
        stood = approver(session)
        act(session, back, "Ada")
        assert {stood, approver(session)} == {None, "Ada"}


def test_an_approval_over_that_of_another_is_undone_by_who_gave_it(session: Session) -> None:
    act(session, "approve", "Ada", True)
    correct(session, 1, "ibuprofen", By("Bea"))
    act(session, "undo", "Cleo")  # of an edit: what Ada approved stood under it
    assert (session.passage(1).now.state, approver(session)) == ("approved", "Ada")
    act(session, "approve", "Bea", True)
    with pytest.raises(GatewiseError, match="only Bea can undo or redo"):
        act(session, "undo", "Ada")
    act(session, "undo", "Bea")
    assert approver(session) == "Ada"


# An extraction that lands ---------------------------------------------------------------------------------------------


def test_an_extraction_lands_beside_a_tree_that_was_edited_meanwhile(session: Session) -> None:
    seen = session.passage(1).version
    correct(session, 1, "ibuprofen")
    session.put(1, Version(DRAFT, "drafted"), seen)
    assert session.passage(1).now.nodes[1]["triples"][0][2] == "ibuprofen"  # type: ignore[index]
    assert session.passage(1).beside == Version(DRAFT, "drafted")
    session.undo(1, 1)  # a draft again, but not the version that the extraction was asked for
    session.put(1, Version([*DRAFT], "drafted", ("hurried",)), seen)
    assert session.passage(1).now.nodes == gout()
    with pytest.raises(GatewiseError, match="is not here any more"):  # it is another one by now
        session.take(1, 2, extraction=1)
    session.take(1, 2, extraction=2)
    assert session.passage(1).now == Version(DRAFT, "drafted", ("hurried",))
    assert session.passage(1).beside is None


def test_what_lies_beside_a_tree_is_there_after_a_restart(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    session = Session.open(file)
    session.approve(1, 0)
    session.put(1, Version(DRAFT, "drafted", ("hurried",)), 0)
    for left in (False, True):
        session.close()
        session = Session.open(file)
        assert session.passage(1).beside == (None if left else Version(DRAFT, "drafted", ("hurried",)))
        if not left:
            session.leave(1, 1, extraction=1)
            session.put(2, Version(DRAFT, "drafted"), 0)
    assert [one.now.state for one in session.passages] == ["approved", "drafted"]
    session.put(1, Version(DRAFT, "drafted"), 0)
    assert session.passage(1).extractions == 2
    session.close()


def test_only_a_word_of_the_reviewer_takes_an_approval_out_of_the_file(session: Session) -> None:
    session.approve(1, 0)
    session.save()
    correct(session, 1, "ibuprofen")
    assert session.save().unlike == [1]
    assert (records(session)[0]["review"], records(session)[0]["tree"]) == ("approved", gout())
    session.approve(1, 2, approved=False)  # of a tree that was changed since
    assert session.save().unlike == []
    assert (records(session)[0]["review"], session.passage(1).now.state) == ("corrected", "corrected")
    session.approve(1, 3)
    session.save()
    session.approve(1, 4, approved=False)
    session.put(1, Version(DRAFT, "drafted"), 0)
    session.take(1, 5, extraction=1, replaced=True)
    session.save()
    assert records(session)[0]["review"] == "corrected"  # no longer approved, and no draft either
    assert records(session)[0]["tree"][1]["triples"][0][2] == "ibuprofen"


def test_a_correction_that_the_file_keeps_under_a_taken_extraction_does_not_pass_for_an_approved_tree(session: Session) -> None:
    correct(session, 1, "ibuprofen")
    session.save()
    session.put(1, Version(DRAFT, "drafted"), 0)
    session.take(1, 1, extraction=1, replaced=True)
    saved = session.save()
    assert (saved.records, saved.unlike) == (1, [1])
    # Nor does it go by undoing what was done to the extraction, or by taking that once more.
    session.edit(1, 2, "add_triple", {"node": 0})
    for back in (session.undo, session.undo, session.redo):
        back(1, session.passage(1).version)
    assert session.passage(1).now.nodes == DRAFT
    assert session.save().unlike == [1]
    assert records(session)[0]["tree"][1]["triples"][0][2] == "ibuprofen"


# Who stands for a tree ----------------------------------------------------------------------------------------------


def stands(session: Session, number: int = 1) -> tuple[Any, ...] | None:
    """Who, when and with what words stands for what the file of corrections gets."""
    kept = session.passage(number).kept
    return None if kept is None or kept.reviewed is None else tuple(kept.reviewed.get(key) for key in ("by", "at", "comment"))


def test_the_last_who_corrected_or_approved_a_tree_stands_for_it(session: Session) -> None:
    assert stands(session) is None
    correct(session, 1, "ibuprofen", By("ben", comment="see page 3"))
    assert stands(session) == ("ben", rows(session)[-1]["time"], "see page 3")
    assert passage_json(session.passage(1))["reviewed"] == session.passage(1).now.reviewed
    session.approve(1, 1, by=By("cleo"))
    approval = ("cleo", rows(session)[-1]["time"], None)
    assert stands(session) == approval
    correct(session, 1, "rest", By("ben"))  # the approved tree stays hers, until another is approved
    assert stands(session) == approval
    assert session.passage(1).now.reviewed != session.passage(1).kept.reviewed  # type: ignore[union-attr]
    session.save()
    reviewed = records(session)[0]["reviewed"]
    assert (reviewed["by"], reviewed["at"]) == approval[:2]
    session.undo(1, 3, by=By("ben"))
    assert stands(session) == approval
    session.redo(1, 4, by=By("cleo"))
    assert session.passage(1).now.reviewed["by"] == "ben"  # type: ignore[index]
    session.approve(1, 5, approved=False, by=By("cleo"))  # now it is a correction of ben's
    assert stands(session)[0] == "ben"  # type: ignore[index]
    session.approve(1, 6, by=By("cleo"))
    session.approve(1, 7, by=By("dora"))  # who approves it too
    assert stands(session)[0] == "dora"  # type: ignore[index]


def test_nobody_stands_for_a_draft_whose_approval_was_taken_back(session: Session) -> None:
    session.approve(1, 0, by=By("ben"))
    session.save()
    session.approve(1, 1, approved=False, by=By("ben"))
    assert (session.passage(1).now.state, stands(session)) == ("drafted", None)
    session.save()
    assert "reviewed" not in records(session)[0]
    session.approve(1, 2, by=By("ben"))
    session.put(1, Version(DRAFT, "drafted"), 0)
    session.take(1, 3, extraction=1, replaced=True)
    assert stands(session)[0] == "ben"  # type: ignore[index]  # of the tree that he approved
    session.save()
    session.approve(1, 4, approved=False, by=By("cleo"))  # that of the file is approved no more, and she did not correct it
    session.save()
    assert (records(session)[0]["review"], records(session)[0].get("reviewed")) == ("corrected", None)


@pytest.mark.parametrize("save", [True, False])
def test_who_stands_for_a_tree_is_there_after_a_restart(tmp_path: Path, save: bool) -> None:
    file = file_of(tmp_path, 3)
    session = Session.open(file)
    correct(session, 1, "ibuprofen", By("ben", comment="see page 3"))
    session.approve(2, 0, by=By("cleo"))
    correct(session, 2, "rest", By("ben"))
    if save:
        session.save()
    before = [(one.now, one.kept) for one in session.passages]
    session.close()
    again = Session.open(file)
    assert [(one.now, one.kept) for one in again.passages] == before
    assert again.unsaved == (1 if save else 2)
    again.save()
    written = records(again)
    again.close()
    again.files.history.unlink()
    third = Session.open(file)  # from what was saved alone
    corrected, changed = written  # the second one's approved tree, which was changed since: to be looked at again
    kept = {key: value for key, value in changed.items() if key not in ("reviewed", "changed")}
    both = [corrected, {**kept, "review": "corrected"}]
    assert [one.record().to_json() for one in third.passages if one.now.state != "drafted"] == both
    third.close()


# What a draft was made with -------------------------------------------------------------------------------------------

MADE, MADE_LATER = ({"base": "maker/model", "date": date} for date in ("2026-01-01T00:00:00+00:00", "2026-02-02T00:00:00+00:00"))


def test_what_a_draft_was_made_with_stays_with_its_tree(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    session = Session.open(str(text))
    session.begin(1, 0)
    assert session.passage(1).now.extraction is None  # by hand
    session.undo(1, 1)
    found = Extraction(TEXT, DecisionTree.from_preorder(gout()), "en", made_with=MADE)
    extracting = Extracting(session, lambda *_: found)
    extracting.ask(session.passages)
    while extracting.progress():
        time.sleep(0.01)
    extracting.end()
    assert passage_json(session.passage(1))["made_with"] == MADE
    correct(session, 1, "ibuprofen")
    session.approve(1, session.passage(1).version)
    session.save()
    assert records(session)[0]["extraction"] == MADE
    session.put(1, Version(DRAFT, "drafted", extraction=MADE_LATER), 0)
    assert passage_json(session.passage(1))["extraction"]["made_with"] == MADE_LATER
    session.take(1, session.passage(1).version, extraction=1, replaced=True)
    assert (session.passage(1).now.extraction, session.passage(1).kept.extraction) == (MADE_LATER, MADE)  # type: ignore[union-attr]
    session.save()
    session.close()
    again = Session.open(str(text))
    assert (again.passage(1).now.extraction, records(again)[0]["extraction"]) == (MADE_LATER, MADE)
    again.undo(1, again.passage(1).version)
    assert (again.passage(1).now.state, again.passage(1).now.extraction) == ("approved", MADE)
    again.close()
    again.files.history.unlink()
    third = Session.open(str(text))
    # The approved tree, in whose place another one stood: to be looked at again.
    assert (third.passage(1).now.state, third.passage(1).now.extraction) == ("corrected", MADE)
    third.close()


# Two who change one passage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["edit", "undo", "redo", "approve", "begin", "take", "leave"])
def test_a_stale_change_is_refused_with_what_was_done_since(session: Session, change: str) -> None:
    correct(session, 1, "ibuprofen", By("ben", "w1", "see page 3"))
    more: dict[str, list[Any]] = {"edit": ["swap", {"node": 0}], "take": [1], "leave": [1]}
    with pytest.raises(OldPageError, match="has changed since the page showed it, so your change was not made") as refused:
        getattr(session, change)(1, 0, *more.get(change, []))
    assert [one[1:] for one in refused.value.since] == [("ben", "edit", 1, 1, "see page 3", "w1")]
    assert session.passage(1).version == 1


def test_the_history_says_who_did_what_and_when_and_only_grows(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    session = Session.open(file, reviewer="Ada Müller")
    correct(session, 1, "ibuprofen", By(comment="as on page 3"))
    before = session.files.history.read_bytes()
    session.approve(1, 1, by=By("Ben"))
    session.save()
    session.close()
    again = Session.open(file, reviewer="Cleo")
    again.approve(1, 2, approved=False)
    assert again.files.history.read_bytes().startswith(before)
    found = rows(again)
    assert [(row["reviewer"], row["action"], row.get("passage"), row.get("version")) for row in found] == [
        ("Ada Müller", "come", 1, 0),
        ("Ada Müller", "come", 2, 0),
        ("Ada Müller", "open", None, None),
        ("Ada Müller", "edit", 1, 1),
        ("Ben", "approve", 1, 2),
        ("Ada Müller", "save", None, None),
        ("Cleo", "open", None, None),
        ("Cleo", "withdraw", 1, 3),
    ]
    assert found[3]["comment"] == "as on page 3"
    times = [row["time"] for row in found]
    assert times == sorted(times)
    assert all(time.endswith("+00:00") for time in times)
    again.paste(OTHER)
    assert rows(again)[-1]["passage"] == 3
    again.close()


def test_a_comment_stays_with_a_change_that_changes_nothing(session: Session) -> None:
    words = gout()[1]["triples"][0][2]
    correct(session, 1, f"{words} ", By("ben", "w1", "is this the right dose?"))
    correct(session, 1, f"{words} ", By("ben", "w1"))
    assert session.passage(1).version == 0
    assert [(row["reviewer"], row["action"]) for row in rows(session)][2:] == [("ada", "open"), ("ben", "comment")]
    assert [entry.comment for entry in session.history(session.passage(1))] == ["", "is this the right dose?"]


@pytest.mark.parametrize("name", ["", " ", "x" * 101, "a\nb", "\x1b[2J", "\ud800"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(GatewiseError, match=r"the reviewer is .*, expected a name of at most 100 characters in one line"):
        Session.open(file_of(tmp_path), reviewer=name)
    Session.open(file_of(tmp_path)).close()


# Over HTTP ------------------------------------------------------------------------------------------------------------


# A server that is killed ----------------------------------------------------------------------------------------------


class Killed:
    """A review in a process of its own, with two clients at work, that is killed after a moment.

    Attributes:
        told: (passage, version) -> the nodes and the state that were answered.
        saved: passages that were approved before a save that was answered.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.told: dict[tuple[int, int], tuple[Any, str]] = {}
        self.saved: set[int] = set()
        self.answers = 0
        self.faults: list[str] = []

    def round(self, answers: int, seconds: float, seed: int) -> None:
        """So many changes are answered, then it is killed after so many seconds."""
        enough = self.answers + answers
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                server = ReviewServer(Review(Session.open(self.file, reviewer="ada")))
                os.write(writing, f"{server.port} {server.url.partition('#token=')[2]}\n".encode())
                server.run()
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as said:
            port, token = said.readline().split()
        clients = [threading.Thread(target=self.work, args=(Client(int(port), token, str(i)), seed + i)) for i in range(2)]
        for one in clients:
            one.start()
        end = time.monotonic() + 20
        while self.answers < enough and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for one in clients:
            one.join()

    def work(self, client: Client, seed: int) -> None:
        """Changes at random until the server is gone; what is answered is noted."""
        chance = random.Random(seed)
        try:
            while True:
                self.step(client, chance)
        except (OSError, HTTPException, json.JSONDecodeError):
            return
        except AssertionError as error:
            self.faults.append(str(error))

    def step(self, client: Client, chance: random.Random) -> None:
        before = {one["number"] for one in client.get("session")[1]["passages"] if one["state"] == "approved"}
        number = chance.randint(1, 4)
        passage = client.get(f"passage?number={number}")[1]
        version = passage["version"]
        parts = [None, None, f"drug {chance.random()}"]
        edit = {"edit": "set_triple", "arguments": {"node": 3, "triple": 0, "parts": parts}}
        action, body = chance.choice([("edit", edit), ("edit", edit), ("approve", {"approved": True}), ("save", {})])
        if action == "save":
            status, answer = client("save")
            assert status == 200, answer
            self.saved |= before
            return
        asked = [(action, body)]
        if action == "approve":  # which takes that every open item is ticked
            open_ = [place for place, item in enumerate(passage["items"]) if not item["hint"] and not item["tick"]]
            asked = [*(("tick", {"item": place, "ticked": True, "why": "so"}) for place in open_), *asked]
        for name, held in asked:
            status, answer = client(name, number=number, version=version, **held)
            assert status in (200, 409), answer
            if status == 409:
                return
            self.answers += 1
            shown = answer["passage"]
            version = shown["version"]
            nodes = [[triple["parts"] for triple in one["triples"]] for one in shown["nodes"]]
            self.told[number, version] = (nodes, shown["state"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    file = file_of(tmp_path, 4)
    review, chance = Killed(file), random.Random(7)
    for i in range(6):
        review.round(chance.randint(5, 12), chance.uniform(0, 0.03), 100 * i)
        assert review.faults == []
        session = Session.open(file)
        held = {
            (row["passage"], row["version"]): ([one["triples"] for one in row["now"]["tree"]], row["now"]["state"])
            for row in rows_or_none(session)
            if "now" in row and row["action"] != "come"
        }
        assert {key: held.get(key) for key in review.told} == review.told  # every change that was answered is there
        for number in range(1, 5):
            last = max((version for passage, version in review.told if passage == number), default=0)
            assert session.passage(number).version >= last
            if (number, session.passage(number).version) in review.told:
                now = session.passage(number).now
                assert ([one["triples"] for one in now.nodes or ()], now.state) == review.told[
                    number, session.passage(number).version
                ]
        # What was approved and saved is in the file, as a tree that was approved at some time.
        read = read_trees(session.files.out) if session.files.out.exists() else None
        assert not (read and read.faults)
        approved = {one.text: one.tree.to_preorder() for one in (read.records if read else ()) if one.more["review"] == "approved"}
        texts = {one.number: one.text for one in session.passages}
        assert {texts[number] for number in review.saved} <= approved.keys()
        ever = [row["now"]["tree"] for row in rows_or_none(session) if row["action"] == "approve"]
        assert all(tree in ever for tree in approved.values())
        session.close()
    assert review.answers > 15
    assert review.saved


def rows_or_none(session: Session) -> list[dict[str, Any]]:
    if not session.files.history.exists():
        return []
    content = session.files.history.read_text(encoding="utf-8")
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]


# How sure a model was of each node --------------------------------------------------------------------------------------

SURE = (0.9, 0.41, 0.72, 0.499, None)


def test_the_confidence_of_a_node_stays_until_somebody_changes_it(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    session = Session.open(str(text))
    found = Extraction(TEXT, DecisionTree.from_preorder(gout()), "en", made_with=MADE, confidence=(0.9, 0.40996, 0.72, 0.499, None))
    extracting = Extracting(session, lambda *_: found)
    extracting.ask(session.passages)
    while extracting.progress():
        time.sleep(0.01)
    extracting.end()
    assert session.passage(1).now.confidence == SURE
    shown = [one["confidence"] for one in passage_json(session.passage(1))["nodes"]]
    assert [one and (one["percent"], one["doubtful"]) for one in shown] == [
        (90, False), (41, True), (72, False), (49, True), None
    ]  # fmt: skip
    assert session_json(session)["passages"][0]["least"] == {"percent": 41, "doubtful": True}

    def do(edit: str, **arguments: Any) -> tuple[float | None, ...] | None:
        session.edit(1, session.passage(1).version, edit, arguments)
        return session.passage(1).now.confidence

    assert do("swap", node=0) == (0.9, 0.72, 0.499, None, 0.41)
    assert do("put_above", node=4, side="true") == (0.9, 0.72, 0.499, None, None, 0.41, None)
    assert do("keep_branch", node=4, side="true") == (0.9, 0.72, 0.499, None, 0.41)
    assert do("set_triple", node=4, triple=0, parts=triple("ibuprofen", "drug therapy")) == (0.9, 0.72, 0.499, None, None)
    kept = session.passage(1).now.confidence
    assert session_json(session)["passages"][0]["least"] == {"percent": 49, "doubtful": True}
    session.undo(1, session.passage(1).version)
    assert session.passage(1).now.confidence == (0.9, 0.72, 0.499, None, 0.41)
    session.redo(1, session.passage(1).version)
    session.approve(1, tick_all(session, 1))
    session.save()
    assert (session.passage(1).now.confidence, records(session)[0]["confidence"]) == (kept, list(kept or ()))
    session.put(1, Version(gout(), "drafted", confidence=SURE), 0)  # beside it
    session.close()
    again = Session.open(str(text))
    assert (again.passage(1).now.confidence, again.passage(1).beside.confidence) == (kept, SURE)  # type: ignore[union-attr]
    again.take(1, again.passage(1).version, extraction=1, replaced=True)
    assert (again.passage(1).now.confidence, again.passage(1).kept.confidence) == (SURE, kept)  # type: ignore[union-attr]
    again.close()
    again.files.history.unlink()
    third = Session.open(str(text))  # from what was saved alone
    assert third.passage(1).now.confidence == kept
    for _ in range(5):  # what remains is a tree that is all a person's
        third.edit(1, third.passage(1).version, "delete", {"node": 0})
    assert third.passage(1).now.confidence is None
    third.close()


def test_a_file_brings_confidence_and_what_only_looks_like_it_is_none(tmp_path: Path) -> None:
    file = tmp_path / "trees.json"
    held = [list(SURE), "high", {"all": 0.5}, [0.5] * 4, [*SURE[:4], 7]]
    file.write_text(json.dumps([{"text": f"{TEXT} {i}", "tree": gout(), "confidence": one} for i, one in enumerate(held)]))
    session = Session.open(str(file))
    assert [one.now.confidence for one in session.passages] == [SURE, None, None, None, None]
    for number in range(1, 6):
        session.approve(number, 0)
    session.save()
    assert [one.get("confidence") for one in records(session)] == [list(SURE), None, None, None, None]
    session.close()
