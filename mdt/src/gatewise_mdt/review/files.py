"""The files of a review: the corrections, a JSONL in the published format, and beside it the history of all that was done.

guideline.pdf                        what is reviewed
guideline.pdf.review.jsonl           trees that a person corrected or approved: written by "save", read by every command
guideline.pdf.review.history.jsonl   who did what and when, a line each, with the tree that it led to: unfinished trees too

The history only grows: a line is added with every change, and nothing that is in there is ever written again. The state of a review
is what its lines lead to, one after another, see :func:`_replayed`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of
from gatewise_mdt.json_lines import JsonLines
from gatewise_mdt.records import TreeRecord, confidence_values, read_trees, write_trees
from gatewise_mdt.review.edits import Nodes, check_shape
from gatewise_mdt.review.passage import STATES, Passage, Version

SUFFIX = ".review.jsonl"
_FORMAT = 4  # of the history


class Entry(NamedTuple):
    """What was done, by whom and when, without the tree that it led to.

    Attributes:
        time: in UTC, as ISO 8601 writes it.
        action: "edit", "undo", "approve", ...: the name of the method of the session, see there.
        passage: its number; 0 where it is about no single one.
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


@dataclass
class Draft:
    """What earlier reviews left.

    Attributes:
        passages: by their numbers.
        entries: what was done, in its order.
        seen: for each passage all trees that it ever had, with their states.
        last: the largest number that a passage ever had.
        notes: what has to be said of it, a sentence each.
    """

    passages: dict[int, Passage] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    seen: dict[int, list[tuple[Nodes | None, str]]] = field(default_factory=lambda: defaultdict(list))
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
        return file if file.name.endswith(SUFFIX) else file.parent / f"{file.name}{SUFFIX}"

    def open(self) -> None:
        """Takes the files for this process.

        Raises:
            GatewiseError: another review has them, or the folder cannot be written.
        """
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise GatewiseError(f"{self.out} is open in another review: close that one, or name another file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            said = getattr(error, "strerror", None) or error
            raise GatewiseError(f"cannot write {self.out}: {said}; name another file") from error

    def close(self) -> None:
        """Gives the files free."""
        if not self._lock.is_locked:
            return  # by now the files, and the lock's own, may be another review's
        with suppress(OSError):  # Windows lets nobody remove what is open
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def read_saved(self) -> tuple[TreeRecord, ...]:
        """What was saved before; nothing where there is no such file.

        Raises:
            GatewiseError: it cannot be read, or one of its records has a fault.
        """
        self._digest = self._digest_now()
        if self._digest is None or not self.out.stat().st_size:
            return ()
        read = read_trees(self.out)
        if read.faults:
            raise GatewiseError(f"{next(iter(read.faults.values()))}; mend the record, or name another file with --out")
        return read.records

    def read_draft(self) -> Draft:
        """What earlier reviews left, by the history.

        Raises:
            GatewiseError: the history cannot be read, or is damaged: it may hold work that is nowhere else.
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
        if self._digest_now() != self._digest:
            raise GatewiseError(
                f"{self.out} was changed by another program since it was read, so it is left alone: end this review and start it"
                " again; your edits are kept"
            )
        try:
            write_trees(self.out, records)
        finally:  # an error may come after it was written
            self._digest = self._digest_now()

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise GatewiseError(f"the review of {self.out} has ended, so nothing is written any more: start it again")

    def _digest_now(self) -> str | None:
        return hashlib.sha256(content_of(self.out)).hexdigest() if self.out.exists() else None


# ---- lines of the history, beside what an entry says of each ----


def opening_row(passages: Iterable[Passage]) -> dict[str, Any]:
    """At the beginning: the passages in their order."""
    return {"format": _FORMAT, "passages": [passage.number for passage in passages]}


def passage_row(passage: Passage) -> dict[str, Any]:
    """A passage that comes into the review, or comes back another than it was."""
    return {"text": passage.text, "more": passage.more, **change_row(passage)}


def change_row(passage: Passage) -> dict[str, Any]:
    """What a change of a passage led to."""
    beside = {"beside": _version(passage.beside), "extractions": passage.extractions} if passage.extractions else {}
    return {"version": passage.version, "now": _version(passage.now), **beside}


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    held = version._asdict() | {
        "approved": _version(version.approved),
        "warnings": list(version.warnings),
        "ticks": list(version.ticks) or None,
    }
    held["tree"] = held.pop("nodes")
    return {name: value for name, value in held.items() if name in ("tree", "warnings") or value not in (None, "")}


def _replayed(rows: Sequence[Mapping[str, Any]]) -> Draft:
    """What the lines of a history lead to."""
    draft = Draft()
    held = draft.passages
    for row in rows:
        entry = Entry(**{name: row[name] for name in Entry._fields if name in row})
        draft.entries.append(entry)
        draft.last = max(draft.last, entry.passage)
        if entry.action == "open":
            if row["format"] != _FORMAT:
                raise GatewiseError(f"its format is {row['format']!r}, expected {_FORMAT}")
            draft.passages = held = {number: held[number] for number in row["passages"]}
        elif entry.action == "save":
            draft.passages |= {number: replace(held[number], saved=held[number].kept) for number in row["saved"]}
        elif "now" in row:
            made = held[entry.passage] = _changed(held.get(entry.passage), entry, row)
            draft.seen[entry.passage].append((made.now.nodes, made.now.state))
    return draft


def _changed(before: Passage | None, entry: Entry, row: Mapping[str, Any]) -> Passage:
    """A passage after a line of the history, with what can be undone."""
    now = _read_version(row["now"])
    if now is None:
        raise GatewiseError(f"passage {entry.passage} has no version")
    is_new = before is None
    if before is None:
        before = Passage(entry.passage, row["text"], now, row["more"])
    past = before.past[:-1] if entry.action == "undo" else before.with_version(now).past
    if entry.action == "text":  # the document has another text, or none: what was said of the old one does not come back
        past = ()
    made = replace(before, text=row.get("text", before.text), more=row.get("more", before.more), now=now, past=past)
    beside, extractions = _read_version(row.get("beside")), int(row.get("extractions", 0))
    # A tree that comes in may be that of the file of corrections; where only the place of the passage is another, it is not saved.
    saved = now if entry.action == "come" and (is_new or now != before.now) else before.saved
    return replace(made, version=entry.version, beside=beside, extractions=extractions, saved=saved)


def _read_version(held: dict[str, Any] | None) -> Version | None:
    if held is None:
        return None
    if held["state"] not in STATES or (held["tree"] is None) != (held["state"] == "empty"):
        raise GatewiseError(f"the state {held['state']!r} does not fit its tree")
    nodes, confidence = None if held["tree"] is None else check_shape(held["tree"]), confidence_values(held.get("confidence"))
    return Version(
        nodes,
        held["state"],
        tuple(str(warning) for warning in held["warnings"]),
        approved=_read_version(held.get("approved")),
        extraction=held.get("extraction"),
        reviewed=held.get("reviewed"),
        of=str(held.get("of", "")),
        ticks=tuple(one for one in held.get("ticks") or () if isinstance(one, dict)),
        confidence=confidence if confidence and nodes and len(confidence) == len(nodes) else None,
    )
