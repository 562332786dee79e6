"""The state of a review: its passages, every change to them, saving and exporting. Nothing here knows of HTTP or of models."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from gatewise.checks import is_whole, writable
from gatewise.errors import GatewiseError
from gatewise.mdt.formats.views import FORMATS, ONE_TREE, render
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.review import edits
from gatewise.mdt.review.files import Draft, ReviewFiles
from gatewise.mdt.review.merging import merged
from gatewise.mdt.review.passage import Passage, Version
from gatewise.mdt.review.sources import pasted, path_of, read_source, source_of

_MOST_PASSAGES = 5000


class OldPageError(GatewiseError):
    """A change was asked for on a tree that is no longer the present one."""


class Saved(NamedTuple):
    """What a save wrote.

    Attributes:
        records: how many the file has.
        unfinished: numbers of the passages whose trees are not valid yet, so that the file does not have them as they stand.
    """

    path: Path
    records: int
    unfinished: list[int]


class Export(NamedTuple):
    """A file to give to the user."""

    name: str
    content: str


class Session:
    """A review. Every method may be called from any thread.

    Attributes:
        notes: what has to be said of what was read, a sentence each.
        trouble: why the draft could not be written, empty while it can.
    """

    def __init__(self, files: ReviewFiles, passages: Sequence[Passage] = (), notes: Sequence[str] = (), draft: Draft | None = None):
        self.files, self.notes, self.trouble = files, list(notes), ""
        self._lock = RLock()
        self._passages = {passage.number: passage for passage in passages}
        self._removed = list(draft.removed) if draft else []
        self._last = max(self._passages, default=0)

    @classmethod
    def open(cls, file: str | None, out: Path | None = None, *, population: str | None = None, repair: bool = False) -> "Session":
        """A review of a file, with all that earlier reviews left of it. :meth:`close` gives its files free.

        Args:
            file: a document, a file of trees, or "sample:guidelines"; None begins without one.
            out: the file of corrections; None puts it beside ``file``.
            population: of all passages of a document, instead of what headings say.
            repair: put right in a file of trees what has one plain meaning.

        Raises:
            GatewiseError: a file cannot be read or is damaged, or another review is open on the same files.
        """
        is_sample = file is not None and file.startswith("sample:")
        path = None if file is None or is_sample else path_of(file)
        files = ReviewFiles(out or ReviewFiles.default_out(Path("guidelines") if is_sample else path))
        # A file of corrections that is to be reviewed again is read as such, and not twice.
        own = path is not None and _same(files.out, path)
        # Read before anything is made for it: a file that cannot be read leaves no folder and no lock behind.
        source = None if file is None or own else read_source(file, population=population, repair=repair)
        files.open()
        try:
            saved = files.read_saved()
            draft = files.read_draft()
            passages, notes = merged(source.passages if source else (), saved, draft)
        except BaseException:
            files.close()
            raise
        return cls(files, passages, [*(source.faults if source else ()), *notes], draft)

    def close(self) -> None:
        """Gives the files free; the draft has everything already."""
        with self._lock:  # a change that is on its way is kept first
            self.files.close()

    # ---- reading ----

    @property
    def passages(self) -> list[Passage]:
        """The passages in their order."""
        with self._lock:
            return list(self._passages.values())

    def passage(self, number: int) -> Passage:
        """The passage of a number.

        Raises:
            GatewiseError: there is none.
        """
        with self._lock:
            if not is_whole(number) or number not in self._passages:
                raise GatewiseError(f"there is no passage {number!r} in this review: load the page again")
            return self._passages[number]

    @property
    def unsaved(self) -> int:
        """How many passages the file of corrections does not have as they stand."""
        with self._lock:
            return sum(passage.is_unsaved for passage in self._passages.values())

    # ---- adding and removing ----

    def paste(self, text: str, population: str | None = None) -> tuple[list[Passage], list[str]]:
        """Adds a text, cut into passages; and says what of it was left out.

        Raises:
            GatewiseError: there is no passage in it.
        """
        source = pasted(text, population)
        return self._add(source.passages), source.faults

    def load(self, content: bytes, name: str, population: str | None = None) -> tuple[list[Passage], list[str]]:
        """Adds a document, or the records of a file of trees; and says what of it could not be read or was left out.

        Raises:
            GatewiseError: nothing could be read.
        """
        source = source_of(content, name, population=population)
        return self._add(source.passages), source.faults

    def _add(self, passages: list[Passage]) -> list[Passage]:
        with self._lock:
            if len(self._passages) + len(passages) > _MOST_PASSAGES:
                raise GatewiseError(f"this would make more than {_MOST_PASSAGES} passages: start a review of its own for this text")
            for passage in passages:
                self._last += 1
                passage.number = self._last
                self._passages[passage.number] = passage
                if passage.text in self._removed:
                    self._removed.remove(passage.text)
            self._keep()
            return passages

    def remove(self, number: int, changes: int | None = None) -> None:
        """Takes a passage out of the review. One that the file of corrections holds stays there.

        Args:
            changes: the passage's count of changes that the user sees; None removes whatever there is.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is no such passage, or the file of corrections holds it.
        """
        with self._lock:
            passage = self.passage(number)
            if changes is not None:
                _check_seen(passage, changes)
            if passage.saved is not None:
                raise GatewiseError(
                    f"passage {number} is in {self.files.out}: take it out there, so that no correction is lost by a slip"
                )
            del self._passages[number]
            self._removed.append(passage.text)
            self._keep()

    # ---- changing ----

    def edit(self, number: int, changes: int, edit: str, arguments: dict[str, Any]) -> Passage:
        """One of :data:`gatewise.mdt.review.edits.EDITS` on the tree of a passage.

        Args:
            changes: the passage's count of changes that the user sees.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: the edit does not fit.
        """
        with self._changing(number, changes) as passage:
            passage.edit(lambda nodes: edits.apply(nodes, edit, arguments, passage.language))
        return passage

    def begin(self, number: int, changes: int) -> Passage:
        """Gives a passage without a tree an empty one, to be written by hand.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: it has a tree.
        """
        with self._changing(number, changes) as passage:
            if passage.now.nodes is not None:
                raise GatewiseError("this passage has a tree already")
            passage.set(Version(edits.empty_tree(), "corrected"))
        return passage

    def undo(self, number: int, changes: int) -> Passage:
        """Takes the last change of a passage back.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is none.
        """
        with self._changing(number, changes) as passage:
            passage.undo()
        return passage

    def redo(self, number: int, changes: int) -> Passage:
        """Makes a change again that was taken back.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is none.
        """
        with self._changing(number, changes) as passage:
            passage.redo()
        return passage

    def approve(self, number: int, changes: int, approved: bool = True) -> Passage:
        """Marks a passage as read and right, or takes the mark away.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: its tree is not valid.
        """
        with self._changing(number, changes) as passage:
            passage.approve(approved)
        return passage

    def put(self, number: int, version: Version) -> None:
        """A tree that was extracted; a passage that was removed meanwhile gets none."""
        said = tuple(map(writable, version.warnings))
        with self._lock:
            passage = self._passages.get(number)
            if passage is not None:
                passage.set(version._replace(warnings=said))
                self._keep()

    @contextmanager
    def _changing(self, number: int, changes: int) -> Iterator[Passage]:
        """A change of a passage as the user saw it; kept in the draft when it went well."""
        with self._lock:
            passage = self.passage(number)
            _check_seen(passage, changes)
            yield passage
            self._keep()

    def _keep(self) -> None:
        """Writes the draft. That it cannot be written stops nobody from working, but has to be seen."""
        try:
            self.files.write_draft(self._passages.values(), self._removed)
            self.trouble = ""
        except GatewiseError as error:
            self.trouble = str(error)
        except Exception as error:  # whatever it is: the change itself was made, and goes on
            self.trouble = f"cannot write {self.files.draft} ({type(error).__name__}: {error})"

    # ---- giving away ----

    def save(self) -> Saved:
        """Writes the file of corrections: what was corrected or approved and is valid, and what it had before.

        Raises:
            GatewiseError: the file was changed by another program, or cannot be written.
        """
        with self._lock:
            kept = [(passage, version) for passage in self._passages.values() if (version := passage.kept) is not None]
            self.files.save([passage.record(version) for passage, version in kept])
            for passage, version in kept:
                passage.saved = version
            self._keep()
            unfinished = [passage.number for passage in self._passages.values() if passage.is_unsaved]
            return Saved(self.files.out, len(kept), unfinished)

    def export(self, format: str, which: str | int) -> Export:
        """Trees in a format of :func:`gatewise.mdt.render`.

        Args:
            which: the number of a passage, "all" for all with a valid tree, or "approved".

        Raises:
            GatewiseError: there is no tree to export, or the format cannot hold it.
        """
        with self._lock:
            records = self._records(which)
        if not records:
            what = "tree was approved yet" if which == "approved" else "passage has a valid tree yet"
            raise GatewiseError(f"no {what}, so there is nothing to export")
        if format in ONE_TREE and len(records) > 1:
            raise GatewiseError(f"{ONE_TREE[format]} shows one tree: export this passage alone, or take another format")
        stem = self.files.out.name.removesuffix(".jsonl").removesuffix(".review")
        part = f"-{which}" if isinstance(which, int) or which == "approved" else ""
        content = render(records, format)
        return Export(f"{stem}{part}{'.fhir' if format == 'fhir' else ''}{FORMATS[format]}", content)

    def _records(self, which: str | int) -> list[TreeRecord]:
        if isinstance(which, int):
            passage = self.passage(which)
            if not passage.is_valid:
                raise GatewiseError(f"passage {which} has no valid tree yet, so there is nothing to export")
            return [passage.record()]
        if which not in ("all", "approved"):
            raise GatewiseError(f'which is {which!r}, expected the number of a passage, "all" or "approved"')
        chosen = [passage for passage in self._passages.values() if which == "all" or passage.now.state == "approved"]
        return [passage.record() for passage in chosen if passage.is_valid]


def _same(out: Path, file: Path) -> bool:
    try:
        return out.samefile(file)
    except (OSError, ValueError):  # mostly there is no such file yet; a name that cannot be one is told when it is opened
        return False


def _check_seen(passage: Passage, changes: int) -> None:
    if passage.changes != changes:
        raise OldPageError("this passage has changed since the page showed it; the present tree is shown now: look again")
