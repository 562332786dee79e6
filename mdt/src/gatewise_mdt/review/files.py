"""The files of a review: the corrections, a JSONL in the published format, and beside it the history of all that was done.

guideline.pdf                        what is reviewed
guideline.pdf.review.jsonl           trees that a person corrected or approved: written by "save", read by every command
guideline.pdf.review.history.jsonl   who did what and when, a line each, with the tree that it led to: unfinished trees too

The history only grows: a line is added with every change, and nothing that is in there is ever written again. The state of a review
is what its lines lead to, one after another, see :func:`_replayed`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise_mdt.documents.passages import PASSAGE_ID
from gatewise_mdt.json_lines import JsonLines
from gatewise_mdt.records import TreeFile, TreeRecord, confidence_values, read_trees, write_trees
from gatewise_mdt.review.edits import check_shape
from gatewise_mdt.review.passage import STATES, Passage, Version

SUFFIX = ".review.jsonl"
_FORMAT = 3  # of the history
_FORMATS = (2, _FORMAT)  # that are read; 2 has no names beside trees


class Entry(NamedTuple):
    """What was done, by whom and when, without the tree that it led to.

    Attributes:
        time: in UTC, as ISO 8601 writes it.
        action: "edit", "undo", "approve", ...: the name of the method of the session, see there.
        passage: its id; 0 where it is about no single one.
        version: the number of the version that it led to.
        comment: what the reviewer said of it, mostly nothing.
        window: names the page that asked for it, so that a page knows its own changes; not kept on disk.
    """

    time: str
    reviewer: str
    action: str
    passage: int = 0
    version: int = 0
    comment: str = ""
    window: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a line of the history begins."""
        held = {name: value for name, value in self._asdict().items() if name != "window"}
        return {name: value for name, value in held.items() if value or name in ("time", "reviewer", "action")}


@dataclass(frozen=True)
class Draft:
    """What earlier reviews left.

    Attributes:
        removed: the ids of passages that were taken out of the review; in histories of earlier versions their texts.
        entries: what was done, in its order.
        last: the largest id that a passage ever had.
        notes: what has to be said of it, a sentence each.
    """

    passages: list[Passage] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    last: int = 0
    notes: list[str] = field(default_factory=list)


class ReviewFiles:
    """The files of one review, of one process at a time.

    Args:
        out: the file of corrections.

    Raises:
        GatewiseError: its name does not end in .jsonl.
    """

    def __init__(self, out: Path) -> None:
        if out.suffix.lower() != ".jsonl":
            raise GatewiseError(f"{out}: the name ends in {out.suffix!r}, expected .jsonl for the file of corrections")
        self.out = out
        self.history = out.with_suffix(".history.jsonl")
        self._lines = JsonLines(self.history)
        self._lock = FileLock(out.with_name(f".{out.name}.lock"), thread_local=False)  # the page is served by several
        self._digest: str | None = None

    @staticmethod
    def default_out(file: Path | None) -> Path:
        """Where corrections go: beside the file, or into the present folder."""
        if file is None:
            return Path(f"trees{SUFFIX}")
        return file if file.name.endswith(SUFFIX) else file.with_name(file.name + SUFFIX)

    def open(self) -> None:
        """Takes the files for this process.

        Raises:
            GatewiseError: another review has them, or the folder cannot be written.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise GatewiseError(f"{self.out} is open in another review: close that one, or name another file with --out") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            said = getattr(error, "strerror", None) or error
            raise GatewiseError(f"cannot write {self.out}: {said}; name another file with --out") from error

    def close(self) -> None:
        """Gives the files free."""
        if not self._lock.is_locked:
            return  # by now the files, and the lock's own, may be another review's
        with suppress(OSError):  # Windows lets nobody remove what is open
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def read_saved(self, repair: bool = False) -> TreeFile:
        """What was saved before; no records where there is no such file.

        Args:
            repair: put right what has one plain meaning.

        Raises:
            GatewiseError: one of them cannot be read: saving would lose it.
        """
        self._digest = _digest(self.out) if self.out.exists() else None
        if self._digest is None or self.out.stat().st_size == 0:
            return TreeFile(str(self.out), (), {}, (), 0)
        read = read_trees(self.out, repair=repair)
        if read.faults:
            raise GatewiseError(f"{next(iter(read.faults.values()))}; mend the record, or name another file with --out")
        return read

    def read_draft(self) -> Draft:
        """What the last review left.

        Raises:
            GatewiseError: the history is damaged.
        """
        if not self.history.exists():
            return Draft()
        try:
            draft = _replayed(writable(self._lines.read()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, GatewiseError) as error:
            said = str(error) or type(error).__name__
            raise GatewiseError(
                f"{self.history}, which has the work of earlier reviews, cannot be read ({said}): move it away to begin anew"
            ) from error
        if self._lines.cut:
            draft.notes.append(
                f"the last line of {self.history} was torn by an interruption, and is left out: its change was never confirmed"
            )
        return draft

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to the history, and returns when they are on disk.

        Raises:
            GatewiseError: the place cannot be written, or the review has ended.
        """
        self._check_open()
        self._lines.append(rows)

    def save(self, records: Sequence[TreeRecord]) -> None:
        """Writes the file of corrections, whole or not at all.

        Raises:
            GatewiseError: the file was changed by somebody else since it was read, or cannot be written, or the review has ended.
        """
        self._check_open()
        if (_digest(self.out) if self.out.exists() else None) != self._digest:
            raise GatewiseError(
                f"{self.out} was changed by another program since it was read, so it is left alone: end this review and start it"
                " again; your edits are kept"
            )
        try:
            write_trees(self.out, records)
        finally:  # an error may come after it was written
            self._digest = _digest(self.out) if self.out.exists() else None

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise GatewiseError(f"the review of {self.out} has ended, so nothing is written any more: start it again")


# ---- lines of the history, beside what an entry says of each ----


def opening_row(passages: Iterable[Passage], removed: Sequence[str]) -> dict[str, Any]:
    """At the beginning: the passages in their order."""
    return {"format": _FORMAT, "passages": [passage.id for passage in passages], "removed": list(removed)}


def passage_row(passage: Passage) -> dict[str, Any]:
    """A passage that comes into the review, or comes back another than it was."""
    return {
        "text": passage.text,
        "more": passage.more,
        "came": passage.came,
        "saved": _version(passage.saved),
        **change_row(passage),
    }


def change_row(passage: Passage) -> dict[str, Any]:
    """What a change of a passage led to."""
    beside = {"beside": _version(passage.beside), "extractions": passage.extractions} if passage.extractions else {}
    return {"version": passage.version, "now": _version(passage.now), **beside}


def _replayed(rows: Sequence[Mapping[str, Any]]) -> Draft:
    """What the lines of a history lead to."""
    held: dict[int, dict[str, Any]] = {}
    removed: list[str] = []
    entries: list[Entry] = []
    last = 0
    for row in rows:
        entry = Entry(**{name: row[name] for name in Entry._fields if name in row})
        entries.append(entry)
        last = max(last, entry.passage)
        if entry.action == "open":
            if row["format"] not in _FORMATS:
                raise GatewiseError(f"its format is {row['format']!r}, expected {_FORMAT}")
            held, removed = {number: held[number] for number in row["passages"]}, list(row["removed"])
        elif entry.action == "save":
            for number in row["saved"]:
                passage = _passage(held[number], number)
                if (version := passage.kept) is not None:
                    passage = passage.after_save(version)
                held[number] |= {"saved": _version(passage.saved), "now": _version(passage.now)}
        elif entry.action == "comment":
            continue
        elif entry.action == "remove":
            row = held.pop(entry.passage)
            removed.append(row["more"].get(PASSAGE_ID) or row["text"])
        else:
            if entry.action == "add" and (name := row["more"].get(PASSAGE_ID) or row["text"]) in removed:
                removed.remove(name)
            held.setdefault(entry.passage, {"id": entry.passage}).update(row)
    return Draft([_passage(item, number) for number, item in enumerate(held.values(), start=1)], removed, entries, last)


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    held = version._asdict() | {"approved": _version(version.approved), "warnings": list(version.warnings)}
    held["tree"] = held.pop("nodes")
    return {name: value for name, value in held.items() if name in ("tree", "warnings") or value not in (None, "", False)}


def _passage(item: dict[str, Any], number: int) -> Passage:
    if not isinstance(item["text"], str) or not item["text"].strip() or not isinstance(item["more"], dict):
        raise GatewiseError(f"passage {number} has no text")
    now = _read_version(item["now"])
    if now is None:
        raise GatewiseError(f"passage {number} has no version")
    came = None if item.get("came") is None else check_shape(item["came"])
    beside, extractions = _read_version(item.get("beside")), int(item.get("extractions", 0))
    made = Passage(number, item["text"], now, item["more"], _read_version(item["saved"]), came)
    made = replace(made, version=int(item.get("version", 0)), id=int(item.get("id", 0)))
    return replace(made, beside=beside, extractions=extractions)


def _read_version(held: dict[str, Any] | None) -> Version | None:
    if held is None:
        return None
    if held["state"] not in STATES or (held["tree"] is None) != (held["state"] == "empty"):
        raise GatewiseError(f"the state {held['state']!r} does not fit its tree")
    nodes = None if held["tree"] is None else check_shape(held["tree"])
    confidence, approved = confidence_values(held.get("confidence")), held.get("approved")
    if isinstance(approved, list):  # format 2 has the nodes alone
        approved = {"tree": approved, "state": "approved", "warnings": []}
    return Version(
        nodes,
        held["state"],
        tuple(str(warning) for warning in held["warnings"]),
        approved=None if held["state"] == "approved" else _read_version(approved),
        extraction=_object(held.get("extraction")),
        reviewed=_object(held.get("reviewed")),
        of=str(held.get("of", "")),
        confidence=confidence if confidence and nodes and len(confidence) == len(nodes) else None,
        undone=held.get("undone") is True,
    )


def _object(held: Any) -> dict[str, Any] | None:
    if held is not None and not isinstance(held, dict):
        raise GatewiseError("what is said of a tree is no object")
    return held


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise GatewiseError(f"{path} cannot be read: {error.strerror or error}; name another file with --out") from error
