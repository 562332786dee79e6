"""The state of a review: its passages, every change to them, saving and exporting. Nothing here knows of HTTP or of models.

A change goes three ways, under one lock: it is checked against the version that it is of, made, and written into the history. Only
then the caller is told. A change of an older version is refused with what was done since.
"""

import getpass
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, is_whole, printable, writable
from gatewise.errors import GatewiseError
from gatewise_mdt.documents.passages import PASSAGE_ID
from gatewise_mdt.formats.views import FORMATS, ONE_TREE, render
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.review import carrying, edits
from gatewise_mdt.review.files import Draft, Entry, ReviewFiles, change_row, opening_row, passage_row
from gatewise_mdt.review.merging import merge
from gatewise_mdt.review.passage import Passage, Version, with_ids
from gatewise_mdt.review.sources import Source, path_of, population_error, read_source, source_of, source_of_text

_MOST_PASSAGES = 5000
_LONGEST_NAME, _LONGEST_COMMENT = 100, 4000


class OldPageError(GatewiseError):
    """A change was asked for on a tree that is no longer the present one.

    Attributes:
        passage: as it is now.
        since: what was done to it since the version that the change is of.
    """

    def __init__(self, passage: Passage, since: Sequence[Entry]) -> None:
        super().__init__("this passage has changed since the page showed it, so your change was not made: look at the present tree")
        self.passage, self.since = passage, list(since)


class By(NamedTuple):
    """Who asks for a change.

    Attributes:
        reviewer: their name; empty for the one who started the review.
        window: names the page, so that it knows its own changes.
        comment: what they say of it.
    """

    reviewer: str = ""
    window: str = ""
    comment: str = ""


NOBODY = By()


class Saved(NamedTuple):
    """What a save wrote.

    Attributes:
        records: how many the file has.
        unfinished: numbers of the passages whose trees are not valid yet, so that the file does not have them as they stand.
        unapproved: numbers of those of which the file keeps the tree that was approved, until the present one is.
        earlier: numbers of those of which it keeps a tree that was saved before, until the present one is corrected or approved.
    """

    path: Path
    records: int
    unfinished: list[int]
    unapproved: list[int]
    earlier: list[int]


class Export(NamedTuple):
    """A file to give to the user."""

    name: str
    content: str


class Session:
    """A review. Every method may be called from any thread.

    Attributes:
        reviewer: who is at work, where a change does not say.
        notes: what has to be said of what was read, a sentence each.
        trouble: why the history could not be written, empty while it can.
    """

    def __init__(
        self,
        files: ReviewFiles,
        passages: Sequence[Passage] = (),
        notes: Sequence[str] = (),
        draft: Draft | None = None,
        reviewer: str | None = None,
    ) -> None:
        draft = draft or Draft()
        self.files, self.notes, self.trouble = files, [*notes, *draft.notes], ""
        self.reviewer = checked_name(_login_name() if reviewer is None else reviewer)
        self._lock = RLock()
        self._removed, self._entries = list(draft.removed), list(draft.entries)
        self._last, self._last_id = len(passages), draft.last
        self._passages = {passage.number: self._with_id(passage) for passage in passages}
        # What the history does not have yet: it is made with the first change, and a line that could not be written waits.
        known = {passage.id: passage_row(passage) for passage in draft.passages}
        came = [("come", one, passage_row(one)) for one in self._passages.values() if known.get(one.id) != passage_row(one)]
        self._waiting = [self._row(action, NOBODY, one, more) for action, one, more in came]
        self._waiting.append(self._row("open", NOBODY, None, opening_row(self._passages.values(), self._removed)))

    @classmethod
    def open(
        cls,
        file: str | None,
        out: Path | None = None,
        *,
        population: str | None = None,
        repair: bool = False,
        reviewer: str | None = None,
    ) -> "Session":
        """A review of a file, with all that earlier reviews left of it. :meth:`close` gives its files free.

        Args:
            file: a document, a file of trees, or "sample:guidelines"; None begins without one.
            out: the file of corrections; None puts it beside ``file``.
            population: of all passages of a document, instead of what headings say.
            repair: put right in a file of trees, and in the file of corrections, what has one plain meaning.
            reviewer: the name that stands in the history beside what is done; None takes the login name.

        Raises:
            GatewiseError: a file cannot be read or is damaged, another review is open on the same files, or the name cannot be one.
        """
        if reviewer is not None:
            checked_name(reviewer)
        # Read before anything is made for it: a file that cannot be read leaves no folder and no lock behind.
        files, source = _come_in(file, out, population, repair)
        files.open()
        try:
            passages, notes, draft = _put_together(files, source, repair)
        except BaseException:
            files.close()
            raise
        return cls(files, passages, notes, draft, reviewer)

    @staticmethod
    def look(file: str, out: Path | None, *, population: str | None = None) -> tuple[list[Passage], list[str]]:
        """What :meth:`open` would begin with, passages and notes; nothing is written, and no other review is kept out.

        Raises:
            GatewiseError: a file cannot be read or is damaged.
        """
        passages, notes, draft = _put_together(*_come_in(file, out, population, repair=False))
        return passages, [*notes, *draft.notes]

    def close(self) -> None:
        """Gives the files free; the history has everything already, but for what :attr:`trouble` then says of it."""
        with self._lock:  # a change that is on its way is kept first
            if self.trouble:
                self._keep([])
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

    def since(self, passage: Passage, version: int) -> list[Entry]:
        """What was done to a passage after a version."""
        with self._lock:
            return [entry for entry in self._entries if entry.passage == passage.id and entry.version > version]

    def history(self, passage: Passage) -> list[Entry]:
        """All that was done to a passage, and said of it."""
        with self._lock:
            return [entry for entry in self._entries if entry.passage == passage.id]

    def entries(self) -> Counter[int]:
        """How long the history of each passage is, by its id."""
        with self._lock:
            return Counter(entry.passage for entry in self._entries)

    # ---- adding and removing ----

    def paste(self, text: str, population: str | None = None, by: By = NOBODY) -> tuple[list[Passage], list[str]]:
        """Adds a text, cut into passages; and says what of it was left out.

        Raises:
            GatewiseError: there is no passage in it.
        """
        source = source_of_text(text, population)
        return self._add(source.passages, by), source.faults

    def load(self, content: bytes, name: str, population: str | None = None, by: By = NOBODY) -> tuple[list[Passage], list[str]]:
        """Adds a document, or the records of a file of trees; and says what of it could not be read or was left out.

        Raises:
            GatewiseError: nothing could be read.
        """
        source = source_of(content, name, population=population)
        return self._add(source.passages, by), source.faults

    def _add(self, passages: Sequence[Passage], by: By) -> list[Passage]:
        return self.add([(passage, by.comment) for passage in passages], by)

    def add(self, passages: Sequence[tuple[Passage, str]], by: By = NOBODY) -> list[Passage]:
        """Adds passages with their trees, and with what the history is to say of each.

        Raises:
            GatewiseError: there would be too many.
        """
        by = _checked(by)
        with self._lock:
            if len(self._passages) + len(passages) > _MOST_PASSAGES:
                raise GatewiseError(f"this would make more than {_MOST_PASSAGES} passages: start a review of its own for this text")
            added = []
            for passage in with_ids([*self.passages, *(passage for passage, _ in passages)])[len(self._passages) :]:
                self._last += 1
                added.append(self._with_id(replace(passage, number=self._last)))
                if passage.more[PASSAGE_ID] in self._removed:
                    self._removed.remove(passage.more[PASSAGE_ID])
            self._passages |= {passage.number: passage for passage in added}
            said = [by._replace(comment=comment) for _, comment in passages]
            self._keep([self._row("add", one, passage, passage_row(passage)) for one, passage in zip(said, added, strict=True)])
            return added

    def remove(self, number: int, version: int | None = None, by: By = NOBODY) -> None:
        """Takes a passage out of the review. One that the file of corrections holds stays there.

        Args:
            version: the number of the version that the user sees; None removes whatever there is.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is no such passage, or the file of corrections holds it.
        """
        by = _checked(by)
        with self._lock:
            passage = self.passage(number)
            if version is not None:
                self._check_seen(passage, version)
            if passage.saved is not None:
                raise GatewiseError(
                    f"passage {number} is in {self.files.out}: take it out there, so that no correction is lost by a slip"
                )
            del self._passages[number]
            self._removed.append(passage.more[PASSAGE_ID])
            self._keep([self._row("remove", by, passage, {})])

    def carry(self, records: Sequence[TreeRecord], source: str, by: By = NOBODY) -> carrying.Carried:
        """Carries what a review of an older version of the guideline decided over to the passages of this one, see
        :mod:`gatewise_mdt.review.carrying`. Doing it again changes nothing.

        Args:
            records: of the older review's file of corrections.
            source: the name of that file.
        """
        by = _checked(by)
        with self._lock:
            made, done = carrying.carry(self.passages, records, source)
            changed = [one for one in made if one != self._passages[one.number]]
            self._passages |= {passage.number: passage for passage in changed}
            if changed:
                self._keep([self._row("carry", by, one, {"source": source, **passage_row(one)}) for one in changed])
            return done

    # ---- changing: each names the version that it is of ----

    def edit(self, number: int, version: int, edit: str, arguments: dict[str, Any], by: By = NOBODY) -> Passage:
        """One of :data:`gatewise_mdt.review.edits.EDITS` on the tree of a passage.

        Args:
            version: the number of the version that the user sees.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: the edit does not fit.
        """

        def change(passage: Passage, reviewed: dict[str, Any]) -> Passage:
            return passage.edit(lambda nodes: edits.apply(nodes, edit, arguments, passage.language), reviewed)

        return self._change("edit", number, version, by, change, {"edit": edit})

    def begin(self, number: int, version: int, by: By = NOBODY) -> Passage:
        """Gives a passage without a tree an empty one, to be written by hand.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: it has a tree.
        """
        return self._change("begin", number, version, by, Passage.begin)

    def undo(self, number: int, version: int, by: By = NOBODY) -> Passage:
        """Takes the last change of a passage back.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is none.
        """
        return self._change("undo", number, version, by, lambda passage, by: passage.undo(by["by"]))

    def redo(self, number: int, version: int, by: By = NOBODY) -> Passage:
        """Makes a change again that was taken back.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is none.
        """
        return self._change("redo", number, version, by, lambda passage, by: passage.redo(by["by"]))

    def approve(self, number: int, version: int, approved: bool = True, by: By = NOBODY) -> Passage:
        """Marks a passage as read and right, or takes the mark away.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: its tree is not valid.
        """
        action = "approve" if approved else "withdraw"
        return self._change(action, number, version, by, lambda passage, reviewed: passage.set_approval(approved, reviewed))

    def take(self, number: int, version: int, extraction: int, replaced: bool = False, by: By = NOBODY) -> Passage:
        """Puts the extraction that lies beside a tree in its place, see :meth:`Passage.take_extraction`.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is no such extraction, or a reviewed tree would go without a word.
        """
        return self._change("take", number, version, by, lambda passage, _: passage.take_extraction(extraction, replaced))

    def leave(self, number: int, version: int, extraction: int, by: By = NOBODY) -> Passage:
        """Takes the extraction away that lies beside a tree. The history keeps it.

        Raises:
            OldPageError: the passage has changed since.
            GatewiseError: there is no such extraction.
        """
        return self._change("leave", number, version, by, lambda passage, _: passage.leave_extraction(extraction))

    def comment(self, number: int, by: By) -> Passage:
        """Keeps what somebody says of a passage, which is no change of it: the version that others see stays the present one.

        Raises:
            GatewiseError: they say nothing.
        """
        by = _checked(by)
        if not by.comment.strip():
            raise GatewiseError("the comment is empty: write what there is to say of this passage")
        with self._lock:
            passage = self.passage(number)
            self._keep([self._row("comment", by, passage, {})])
            return passage

    def put(self, number: int, found: Version, of: int | None = None, by: By = NOBODY) -> None:
        """A tree that was extracted, see :meth:`Passage.put_extraction`; a passage that was removed meanwhile gets none.

        Args:
            of: the number of the version that there was when it was asked for; None is the present one.
        """
        found = found._replace(warnings=tuple(map(writable, found.warnings)), extraction=writable(found.extraction))
        with self._lock:
            if (passage := self._passages.get(number)) is not None:
                self._change(
                    "extract",
                    number,
                    passage.version,
                    by,
                    lambda passage, _: passage.put_extraction(found, passage.version if of is None else of),
                )

    def mark(self, number: int, *, waiting: bool, error: str | None = None) -> None:
        """Says that an extraction was asked for, or no more, and why it failed. That is of the moment, and not in the history."""
        with self._lock:
            if (passage := self._passages.get(number)) is not None:
                said = passage.error if error is None else error
                self._passages[number] = replace(passage, waiting=waiting, error=said)

    def _change(
        self,
        action: str,
        number: int,
        version: int,
        by: By,
        change: Callable[[Passage, dict[str, Any]], Passage],
        more: Mapping[str, Any] | None = None,
    ) -> Passage:
        by = _checked(by)
        with self._lock:
            passage = self.passage(number)
            self._check_seen(passage, version)
            time = _now()
            said = {"by": by.reviewer or self.reviewer, "at": time, "comment": by.comment, "sha256": passage.more.get("sha256")}
            made = change(passage, {name: value for name, value in said.items() if isinstance(value, str) and value})
            if made is not passage:
                self._passages[number] = made
                self._keep([self._row(action, by, made, {**(more or {}), **change_row(made)}, time)])
            elif by.comment.strip():  # what changes nothing may still be said something of
                self._keep([self._row("comment", by, passage, {}, time)])
            return made

    def _check_seen(self, passage: Passage, version: int) -> None:
        if passage.version != version:
            raise OldPageError(passage, self.since(passage, version))

    # ---- the history ----

    def _with_id(self, passage: Passage) -> Passage:
        if passage.id:
            return passage
        self._last_id += 1
        return replace(passage, id=self._last_id)

    def _row(
        self, action: str, by: By, passage: Passage | None, more: Mapping[str, Any], time: str | None = None
    ) -> dict[str, Any]:
        """A line of the history, and the entry of it for those who ask what was done."""
        about = {} if passage is None else {"passage": passage.id, "version": passage.version}
        entry = Entry(time or _now(), by.reviewer or self.reviewer, action, **about, comment=by.comment, window=by.window)
        self._entries.append(entry)
        return {**entry.to_json(), **more}

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        """Adds to the history. That it cannot be written stops nobody from working, but has to be seen; it is tried again then."""
        self._waiting += rows
        try:
            self.files.append(self._waiting)
            self._waiting, self.trouble = [], ""
        except GatewiseError as error:
            self.trouble = str(error)
        except Exception as error:  # whatever it is: the change itself was made, and goes on
            self.trouble = f"cannot write {self.files.history} ({type(error).__name__}: {error})"

    # ---- giving away ----

    def save(self, by: By = NOBODY) -> Saved:
        """Writes the file of corrections: what was approved, what was corrected and is valid, and what it had before.

        Raises:
            GatewiseError: the file was changed by another program, or cannot be written.
        """
        by = _checked(by)
        with self._lock:
            kept = [(passage, version) for passage in self._passages.values() if (version := passage.kept) is not None]
            self.files.save([passage.record(version) for passage, version in kept])
            written = [(passage, passage.after_save(version)) for passage, version in kept]
            changed = [before.id for before, after in written if before != after]
            self._passages |= {after.number: after for _, after in written}
            if changed:
                self._keep([self._row("save", by, None, {"saved": changed})])
            left = [passage for passage in self._passages.values() if passage.is_unsaved]
            unfinished = [one.number for one in left if one.now.nodes is not None and not one.is_valid]
            rest = [one for one in left if one.number not in unfinished]
            unapproved = [one.number for one in rest if one.now.standing is not None]
            earlier = [one.number for one in rest if one.now.standing is None]
            return Saved(self.files.out, len(kept), unfinished, unapproved, earlier)

    def export(self, format: str, which: str | int) -> Export:
        """Trees in a format of :func:`gatewise_mdt.render`.

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
        return Export(f"{stem}{part}{FORMATS[format]}", render(records, format))

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


def _come_in(file: str | None, out: Path | None, population: str | None, repair: bool) -> tuple[ReviewFiles, Source]:
    """The files of a review, and what is reviewed in it."""
    is_sample = file is not None and file.startswith("sample:")
    path = None if file is None or is_sample else path_of(file)
    files = ReviewFiles(out or ReviewFiles.default_out(Path("guidelines") if is_sample else path))
    # A file of corrections that is to be reviewed again is read as such, and not twice.
    own = path is not None and _same(files.out, path)
    if own and population:
        raise population_error(str(path))
    return files, Source([], []) if file is None or own else read_source(file, population=population, repair=repair)


def _put_together(files: ReviewFiles, source: Source, repair: bool = False) -> tuple[list[Passage], list[str], Draft]:
    saved, draft = files.read_saved(repair), files.read_draft()
    passages, notes = merge(source.passages, saved, draft)
    return passages, [*source.faults, *saved.notes, *notes], draft


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _same(out: Path, file: Path) -> bool:
    try:
        return out.samefile(file)
    except (OSError, ValueError):  # mostly there is no such file yet; a name that cannot be one is told when it is opened
        return False


def _checked(by: By) -> By:
    if has_half_a_pair(by.comment):
        raise GatewiseError(f"the comment {HALF_A_PAIR}")
    if len(by.comment) > _LONGEST_COMMENT:
        raise GatewiseError(f"the comment has {len(by.comment)} characters, expected at most {_LONGEST_COMMENT}")
    return by._replace(reviewer=checked_name(by.reviewer)) if by.reviewer else by


def checked_name(name: str) -> str:
    """The name of a reviewer without blanks around it.

    Raises:
        GatewiseError: it cannot be one.
    """
    if not name.strip() or len(name) > _LONGEST_NAME or has_half_a_pair(name) or printable(name) != name or "\n" in name:
        raise GatewiseError(f"the reviewer is {name[:40]!r}, expected a name of at most {_LONGEST_NAME} characters in one line")
    return name.strip()


def _login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # where the system has no names
        return "unknown"
