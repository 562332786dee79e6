"""What goes wrong around a review costs nobody's work: odd names and characters, a full disk, a model that fails, an older page."""

import errno
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gatewise_mdt import DecisionTree
from gatewise_mdt.review import Extracting, Session, sources
from gatewise_mdt.review.passage import Version
from mdt_trees import TEXT, gout, triple
from review_serving import tick_all

from gatewise.errors import GatewiseError

OTHER = "children with fever@If the fever lasts, give paracetamol."
HALF = "\ud800"


def file_of(folder: Path, *items: dict[str, Any]) -> str:
    file = folder / "trees.json"
    file.write_text(json.dumps(items or [{"text": TEXT, "tree": gout()}, {"text": OTHER, "tree": gout()}]))
    return str(file)


def correct(session: Session, number: int = 1) -> None:
    arguments = {"node": 1, "triple": 0, "parts": triple("ibuprofen", "drug therapy")}
    session.edit(number, session.passage(number).version, "set_triple", arguments)


def found(*warnings: str) -> Any:
    return SimpleNamespace(tree=DecisionTree.from_preorder(gout()), warnings=warnings, made_with=None, confidence=None)


def assert_all_done(extracting: Extracting) -> None:
    end = time.monotonic() + 20
    while extracting.progress() is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert extracting.progress() is None
    assert not any(map(extracting.is_waiting, extracting.session.passages))
    assert extracting._thread.is_alive()


# Characters that no file takes ----------------------------------------------------------------------------------------


def test_half_a_pair_in_other_keys_of_a_record_stops_no_edit(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"text": TEXT, "tree": gout(), "note": [HALF], HALF: {"x": f"a{HALF}b"}, "warnings": [f"cut {HALF}"]})
    session = Session.open(file)
    assert session.passage(1).now.warnings == ("cut \ufffd",)
    correct(session)
    assert session.save().records == 1
    (line,) = session.files.out.read_text(encoding="utf-8").splitlines()
    assert (json.loads(line)["note"], json.loads(line)["\ufffd"]) == (["\ufffd"], {"x": "a\ufffdb"})
    session.close()
    assert Session.open(file).passage(1).now.state == "corrected"


# A disk that is full, a draft that cannot be written ------------------------------------------------------------------


def test_a_full_disk_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(file_of(tmp_path))
    session.approve(1, 0)
    session.save()
    before = session.files.out.read_bytes()
    session.approve(2, tick_all(session, 2))
    with monkeypatch.context() as full:
        opened = Path.open

        def open_(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            if "w" not in mode:
                return opened(self, mode, *more, **named)
            self.touch()  # the file is made, and nothing more fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def write(*_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(Path, "open", open_)
        full.setattr(os, "write", write)
        with pytest.raises(GatewiseError, match="No space left on device; nothing was changed"):
            session.save()
        before_edit = session.passage(1)
        with pytest.raises(GatewiseError, match="No space left on device"):
            correct(session)
        assert session.passage(1) is before_edit  # what cannot be written is not done
    assert session.files.out.read_bytes() == before
    assert (session.unsaved, session.passage(2).saved) == (1, None)
    assert session.save().records == 2
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_review_that_has_ended_writes_nothing_any_more(tmp_path: Path) -> None:
    """Its files may be those of the next review, which a model that is still at work must not write over."""
    file = file_of(tmp_path)
    session = Session.open(file)
    session.close()
    again = Session.open(file)
    again.approve(2, tick_all(again, 2))
    kept = again.files.history.read_bytes()
    with pytest.raises(GatewiseError, match="has ended"):
        session.put(1, Version(gout(), "drafted", ("late",)), 0)
    with pytest.raises(GatewiseError, match="has ended, so nothing is written any more"):
        session.save()
    session.close()  # once more, which must not give the next review's files free
    with pytest.raises(GatewiseError, match="open in another review"):
        Session.open(file)
    assert again.files.history.read_bytes() == kept


# A model that fails ---------------------------------------------------------------------------------------------------


class PanicError(BaseException):
    """As a library in Rust raises it, which is no Exception."""


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), PanicError("a panic"), SystemExit(3), KeyboardInterrupt(), RecursionError()]
)
def test_any_error_of_an_extraction_is_the_fault_of_its_passage(tmp_path: Path, error: BaseException) -> None:
    def extract(text: str, *_: Any) -> Any:
        if text == TEXT:
            raise error
        return found()

    session = Session.open(None, tmp_path / "x.jsonl")
    session.paste(f"{TEXT}\n\n{OTHER}")
    extracting = Extracting(session, extract)
    extracting.ask(session.passages)
    assert_all_done(extracting)
    assert extracting.fault(session.passage(1)).startswith(f"the extraction failed ({type(error).__name__}: ")
    assert [passage.now.state for passage in session.passages] == ["empty", "drafted"]
    extracting.end()


# Names that cannot be those of files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("x" * 300, "cannot be read: File name too long"),
        (f"{'x' * 300}.json", "cannot be read: File name too long"),
        ("a\0b.json", "cannot be read: embedded null"),
        ("trees.json/x.pdf", "cannot be read: Not a directory"),
        ("/", "cannot be read: Is a directory"),
        ("none/deep/er/x.pdf", "there is no such file"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the messages are others there")
def test_a_name_that_is_no_file_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path)
    for out in (None, Path("new/deep/out.jsonl")):
        with pytest.raises(GatewiseError, match=said):
            Session.open(file, out)
        with pytest.raises(GatewiseError, match=said):
            sources.read_source(file)
    assert os.listdir() == ["trees.json"]


@pytest.mark.parametrize("out", [f"{'x' * 300}.jsonl", f"{'x' * 300}/a.jsonl", "a\0b.jsonl", "a\0b/x.jsonl"])
@pytest.mark.parametrize("with_file", [False, True])
def test_a_file_of_corrections_that_cannot_be_is_one_sentence(tmp_path: Path, out: str, with_file: bool) -> None:
    file = file_of(tmp_path) if with_file else None
    with pytest.raises(GatewiseError, match=r"cannot write .*; name another file$"):
        Session.open(file, tmp_path / out)


# Approvals, and a page that is opened twice ---------------------------------------------------------------------------


def test_an_approval_that_is_taken_back_leaves_what_was_before(tmp_path: Path) -> None:
    """A tree that nobody corrected is not written as a corrected one because somebody approved it by a slip."""
    file = file_of(tmp_path)
    session = Session.open(file)
    session.approve(1, 0)
    session.approve(1, 1, approved=False)
    correct(session, 2)
    version = tick_all(session, 2)
    session.approve(2, version)
    session.approve(2, version + 1, approved=False)
    assert [passage.now.state for passage in session.passages] == ["drafted", "corrected"]
    session.approve(1, 2, approved=False)  # of what is not approved there is nothing to take back
    assert session.passage(1).version == 2
    assert session.save().records == 1
    session.approve(2, version + 2)
    session.close()
    again = Session.open(file)
    again.approve(2, again.passage(2).version, approved=False)
    assert again.passage(2).now.state == "corrected"
