"""The files of a review: the corrections, a JSONL in the published format, and beside it the draft of all that is not in there.

guideline.pdf                     what is reviewed
guideline.pdf.review.jsonl        trees that a person corrected or approved: written by "save", read by every command
guideline.pdf.review.draft.json   everything as it stands, unfinished trees too: written after every change
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.mdt.records import TreeRecord, read_trees, write_trees
from gatewise.mdt.review.edits import check_shape
from gatewise.mdt.review.passage import STATES, Passage, Version

SUFFIX = ".review.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Draft:
    """What a draft remembers.

    Attributes:
        removed: the texts of passages that were taken out of the review.
    """

    passages: list[Passage] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


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
        self.draft = out.with_suffix(".draft.json")
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

    def read_saved(self) -> list[TreeRecord]:
        """The records that were saved before.

        Raises:
            GatewiseError: one of them cannot be read: saving would lose it.
        """
        if not self.out.exists():
            return []
        self._digest = _digest(self.out)
        if self.out.stat().st_size == 0:
            return []
        read = read_trees(self.out)
        if read.faults:
            raise GatewiseError(f"{next(iter(read.faults.values()))}; mend the record, or name another file with --out")
        return list(read.records)

    def read_draft(self) -> Draft:
        """What the last review left.

        Raises:
            GatewiseError: the draft is damaged.
        """
        if not self.draft.exists():
            return Draft()
        try:
            held = writable(json.loads(self.draft.read_text(encoding="utf-8")))
            if held["format"] != _FORMAT:
                raise GatewiseError(f"its format is {held['format']!r}, expected {_FORMAT}")
            passages = [_passage(item, number) for number, item in enumerate(held["passages"], start=1)]
            return Draft(passages, [str(text) for text in held["removed"]])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, GatewiseError) as error:
            said = str(error) or type(error).__name__
            raise GatewiseError(
                f"{self.draft}, the draft of a review, cannot be read ({said}): move it away to begin anew"
            ) from error

    def write_draft(self, passages: Iterable[Passage], removed: Sequence[str]) -> None:
        """Keeps everything as it stands.

        Raises:
            GatewiseError: the place cannot be written, or the review has ended.
        """
        self._check_open()
        held = {"format": _FORMAT, "passages": [_item(passage) for passage in passages], "removed": list(removed)}
        with whole_file(self.draft) as part:
            part.write_text(json.dumps(held, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")

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
        write_trees(self.out, records)
        self._digest = _digest(self.out)

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise GatewiseError(f"the review of {self.out} has ended, so nothing is written any more: start it again")


def _item(passage: Passage) -> dict[str, Any]:
    versions = {"now": _version(passage.now), "saved": _version(passage.saved), "came": passage.came}
    return {"text": passage.text, **versions, "more": passage.more}


def _version(version: Version | None) -> dict[str, Any] | None:
    return None if version is None else {"tree": version.nodes, "state": version.state, "warnings": list(version.warnings)}


def _passage(item: dict[str, Any], number: int) -> Passage:
    if not isinstance(item["text"], str) or not item["text"].strip() or not isinstance(item["more"], dict):
        raise GatewiseError(f"passage {number} has no text")
    now = _read_version(item["now"])
    if now is None:
        raise GatewiseError(f"passage {number} has no version")
    came = item.get("came", now.nodes if now.state == "drafted" else None)  # drafts of earlier versions do not tell
    came = None if came is None else check_shape(came)
    return Passage(number, item["text"], now, item["more"], _read_version(item["saved"]), came=came)


def _read_version(held: dict[str, Any] | None) -> Version | None:
    if held is None:
        return None
    if held["state"] not in STATES or (held["tree"] is None) != (held["state"] == "empty"):
        raise GatewiseError(f"the state {held['state']!r} does not fit its tree")
    nodes = None if held["tree"] is None else check_shape(held["tree"])
    return Version(nodes, held["state"], tuple(str(warning) for warning in held["warnings"]))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise GatewiseError(f"{path} cannot be read: {error.strerror or error}; name another file with --out") from error
