"""The state of a review: its passages, every change to them, saving and exporting. Nothing here knows of HTTP or of models.

A change goes three ways, under one lock: it is checked against the version that it is of, written into the history, and made. Only
then the caller is told. What cannot be written is not done. A change of an older version is refused with what was done since.
"""

import getpass
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from typing import Any, NamedTuple

from gatewise.checks import has_half_a_pair, is_whole, printable, writable
from gatewise.errors import GatewiseError
from gatewise_mdt.checking.ticks import items_in_words
from gatewise_mdt.formats.gate import RUN, check_documents
from gatewise_mdt.formats.views import FORMATS, ONE_TREE, render
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.review import carrying, edits
from gatewise_mdt.review.files import Draft, Entry, ReviewFiles, change_row, opening_row, passage_row
from gatewise_mdt.review.merging import merge
from gatewise_mdt.review.original import Original
from gatewise_mdt.review.passage import Passage, Version, with_ids
from gatewise_mdt.review.sources import Source, original_of_record, read_source, source_of

_LONGEST_NAME = 100


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
        unlike: numbers of the passages that the file does not have as they stand: unfinished ones, and those for which it keeps a
            tree that was approved or saved before, until the present one is.
    """

    path: Path
    records: int
    unlike: list[int]


class Session:
    """A review. Every method may be called from any thread.

    Attributes:
        reviewer: who is at work, where a change does not say.
        originals: the documents that passages come from, by their SHA-256; None for one that is not to be had.
        notes: what has to be said of what was read, a sentence each.
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
        self.files, self.notes = files, [*notes, *draft.notes]
        self.reviewer = checked_name(_login_name() if reviewer is None else reviewer)
        self.originals: dict[str, Original | None] = {}
        self._lock, self._reading = RLock(), Lock()
        self._entries, self._last = list(draft.entries), draft.last
        self._passages = {passage.number: passage for passage in self._numbered(passages)}
        held = [str(number) for number, one in self._passages.items() if one.now.state == "approved" and one.open_items]
        if held:
            self.notes.append(
                f"approved, but with open items, so that systems that run trees do not get them until each item is ticked: passage"
                f" {', '.join(held)}"
            )
        # What the history does not have yet. It is made with the first change.
        self._opening: list[tuple[Entry, Mapping[str, Any]]] = []
        for number, passage in self._passages.items():
            known = draft.passages.get(number)
            if known is None or passage_row(known) != passage_row(passage):
                # What was said of another text of the document is not to be had back.
                is_text = known is not None and (known.text != passage.text or (known.now != passage.now and not passage.past))
                self._opening.append((self._entry("text" if is_text else "come", NOBODY, passage), passage_row(passage)))
        self._opening.append((self._entry("open", NOBODY), opening_row(self._passages.values())))

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
            repair: put right in a file of trees what has one plain meaning.
            reviewer: the name that stands in the history beside what is done; None takes the login name.

        Raises:
            GatewiseError: a file cannot be read or is damaged, another review is open on the same files, or the name cannot be one.
        """
        path = None if file is None else Path(file.removeprefix("sample:"))
        files = ReviewFiles(out or ReviewFiles.default_out(path))
        source = Source([], [])
        # The file of corrections itself is read as such, and not twice.
        own = file is not None and os.path.exists(file) and os.path.exists(files.out) and os.path.samefile(file, files.out)
        if file is not None and not own:
            # Before anything is made for it: a file that cannot be read leaves no folder and no lock behind.
            source = read_source(file, population=population, repair=repair)
        files.open()
        try:
            saved, draft = files.read_saved(), files.read_draft()
            passages, notes = merge(source.passages, saved, draft)
            made = cls(files, passages, [*source.notes, *notes], draft, reviewer)
            made._take_original(source.original)
            return made
        except BaseException:
            files.close()
            raise

    def close(self) -> None:
        """Gives the files free; the history has everything already."""
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
        return sum(passage.is_unsaved for passage in self.passages)

    def history(self, passage: Passage, since: int = -1) -> list[Entry]:
        """What was done to a passage after a version, and said of it."""
        with self._lock:
            return [entry for entry in self._entries if entry.passage == passage.number and entry.version > since]

    def entries(self) -> Counter[int]:
        """How long the history of each passage is, by its number."""
        with self._lock:
            return Counter(entry.passage for entry in self._entries)

    def original(self, passage: Passage) -> Original | None:
        """The document that a passage comes from, if this review has it."""
        key = str(passage.more.get("sha256"))
        with self._reading:  # a long document takes minutes: others who ask for it meanwhile wait
            if key not in self.originals:
                self.originals[key] = original_of_record(passage.more, self.files.out.parent)
            return self.originals[key]

    def _take_original(self, original: Original | None) -> None:
        if original is not None:
            self.originals[original.document.sha256] = original

    # ---- adding and removing ----

    def paste(self, text: str, population: str | None = None, by: By = NOBODY) -> tuple[list[Passage], list[str]]:
        """Adds a text, cut into passages; and says what of it was left out.

        Raises:
            GatewiseError: there is no passage in it.
        """
        return self.load(text.encode(errors="replace"), "pasted text.txt", population, by)

    def load(self, content: bytes, name: str, population: str | None = None, by: By = NOBODY) -> tuple[list[Passage], list[str]]:
        """Adds a document, or the records of a file of trees; and says what of it could not be read or was left out.

        Raises:
            GatewiseError: nothing could be read.
        """
        source = source_of(content, name, population=population)
        self._take_original(source.original)
        return self.add([(passage, by.comment) for passage in source.passages], by), source.notes

    def add(self, passages: Sequence[tuple[Passage, str]], by: By = NOBODY) -> list[Passage]:
        """Adds passages with their trees, and with what the history is to say of each."""
        with self._lock:
            added = self._numbered(with_ids([*self.passages, *(passage for passage, _ in passages)])[len(self._passages) :])
            self._keep(
                [
                    (self._entry("add", by._replace(comment=comment), made), passage_row(made))
                    for (_, comment), made in zip(passages, added, strict=True)
                ]
            )
            self._passages |= {passage.number: passage for passage in added}
            return added

    def carry(self, records: Sequence[TreeRecord], source: str, by: By = NOBODY) -> carrying.Carried:
        """Carries what a review of an older version of the guideline decided over to the passages of this one, see
        :mod:`gatewise_mdt.review.carrying`. Doing it again changes nothing.

        Args:
            records: of the older review's file of corrections.
            source: the name of that file.
        """
        with self._lock:
            made, done = carrying.carry(self.passages, records, source)
            changed = [one for one in made if one != self._passages[one.number]]
            self._keep([(self._entry("carry", by, one), {"source": source, **passage_row(one)}) for one in changed])
            self._passages |= {passage.number: passage for passage in changed}
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
        """Gives a passage without a tree an empty one, to be written by hand."""
        return self._change("begin", number, version, by, Passage.begin)

    def undo(self, number: int, version: int, by: By = NOBODY) -> Passage:
        """Takes the last change of a passage back."""
        return self._change("undo", number, version, by, lambda passage, by: passage.step(True, by["by"]))

    def redo(self, number: int, version: int, by: By = NOBODY) -> Passage:
        """Makes a change again that was taken back."""
        return self._change("redo", number, version, by, lambda passage, by: passage.step(False, by["by"]))

    def approve(self, number: int, version: int, approved: bool = True, by: By = NOBODY) -> Passage:
        """Marks a passage as read and right, or takes the mark away."""
        action = "approve" if approved else "withdraw"
        return self._change(action, number, version, by, lambda passage, reviewed: passage.set_approval(approved, reviewed))

    def tick(self, number: int, version: int, item: int, ticked: bool, why: str = "", by: By = NOBODY) -> Passage:
        """Ticks an item of the check, or takes the tick back, see :meth:`Passage.tick`. The history says which item it was."""
        with self._lock:
            known = self._seen(number, version).looked_at
            said = items_in_words([known[item][0]]) if 0 <= item < len(known) else ""
            by = by._replace(comment=f"{said}: {why.strip()}" if why.strip() else said)
            action = "tick" if ticked else "untick"
            return self._change(action, number, version, by, lambda passage, by: passage.tick(item, ticked, why, by))

    def take(self, number: int, version: int, extraction: int, replaced: bool = False, by: By = NOBODY) -> Passage:
        """Puts the extraction that lies beside a tree in its place, see :meth:`Passage.settle_extraction`."""
        return self._change("take", number, version, by, lambda passage, _: passage.settle_extraction(extraction, True, replaced))

    def leave(self, number: int, version: int, extraction: int, by: By = NOBODY) -> Passage:
        """Takes the extraction away that lies beside a tree. The history keeps it."""
        return self._change("leave", number, version, by, lambda passage, _: passage.settle_extraction(extraction, False))

    def comment(self, number: int, by: By) -> Passage:
        """Keeps what somebody says of a passage, which is no change of it: the version that others see stays the present one."""
        with self._lock:
            return self._change("comment", number, self.passage(number).version, by, lambda passage, _: passage)

    def put(self, number: int, found: Version, of: int, by: By = NOBODY) -> None:
        """A tree that was extracted, see :meth:`Passage.put_extraction`; a passage that was removed meanwhile gets none.

        Args:
            of: the number of the version that there was when it was asked for.
        """
        found = found._replace(warnings=tuple(map(writable, found.warnings)), extraction=writable(found.extraction))
        with self._lock:
            if (passage := self._passages.get(number)) is not None:
                self._change("extract", number, passage.version, by, lambda passage, _: passage.put_extraction(found, of))

    def _change(
        self,
        action: str,
        number: int,
        version: int,
        by: By,
        change: Callable[[Passage, dict[str, Any]], Passage],
        more: Mapping[str, Any] | None = None,
    ) -> Passage:
        with self._lock:
            passage, time = self._seen(number, version), _now()
            said = {"by": by.reviewer or self.reviewer, "at": time, "comment": by.comment, "sha256": passage.more.get("sha256")}
            made = change(passage, {name: value for name, value in said.items() if isinstance(value, str) and value})
            if made is not passage:
                self._keep([(self._entry(action, by, made, time), {**(more or {}), **change_row(made)})])
            elif by.comment.strip():  # what changes nothing may still be said something of
                self._keep([(self._entry("comment", by, passage, time), {})])
            self._passages[number] = made
            return made

    def _seen(self, number: int, version: int) -> Passage:
        """The passage, if it is as the user sees it."""
        passage = self.passage(number)
        if passage.version != version:
            raise OldPageError(passage, self.history(passage, version))
        return passage

    # ---- the history ----

    def _numbered(self, passages: Sequence[Passage]) -> list[Passage]:
        further = count(self._last + 1)
        made = [passage if passage.number else replace(passage, number=next(further)) for passage in passages]
        self._last = next(further) - 1
        return made

    def _entry(self, action: str, by: By, passage: Passage | None = None, time: str | None = None) -> Entry:
        if by.reviewer:
            by = by._replace(reviewer=checked_name(by.reviewer))
        about = {} if passage is None else {"passage": passage.number, "version": passage.version}
        return Entry(time or _now(), by.reviewer or self.reviewer, action, **about, comment=by.comment, window=by.window)

    def _keep(self, lines: Sequence[tuple[Entry, Mapping[str, Any]]], *, opened: bool = False) -> None:
        """Adds lines to the history, and returns when they are on disk.

        Args:
            opened: also where there are none, what the history does not have of the passages yet.

        Raises:
            GatewiseError: they cannot be written; then nothing may be changed.
        """
        lines = [*self._opening, *lines] if lines or opened else []
        if lines:
            self.files.append([{**entry.to_json(), **more} for entry, more in lines])
            self._entries += [entry for entry, _ in lines]
            self._opening = []

    # ---- giving away ----

    def save(self) -> Saved:
        """Writes the file of corrections: what was approved, what was corrected and is valid, and what it had before.

        Raises:
            GatewiseError: the file was changed by another program, or cannot be written.
        """
        with self._lock:
            kept = {passage.number: version for passage in self.passages if (version := passage.kept) is not None}
            if any(one.now.nodes is not None and number not in kept for number, one in self._passages.items()):
                self._keep([], opened=True)  # what the file has no more is in the history before
            self.files.save([self._passages[number].record(version) for number, version in kept.items()])
            saved = {
                number: replace(one := self._passages[number], saved=version, marked=version is one.now.approved)
                for number, version in kept.items()
            }
            changed = [number for number, passage in saved.items() if passage.saved != self._passages[number].saved]
            self._passages |= saved
            with suppress(GatewiseError):  # the trees are saved all the same
                self._keep([(self._entry("save", NOBODY), {"saved": changed})] if changed else [])
            return Saved(self.files.out, len(kept), [one.number for one in self.passages if one.is_unsaved])

    def export(self, format: str, which: str | int, drafts: bool = False) -> tuple[str, str]:
        """A file of trees in a format of :func:`gatewise_mdt.render`: its name and content.

        Args:
            which: the number of a passage, "all" for all with a valid tree, or "approved".
            drafts: see :func:`gatewise_mdt.render`.

        Raises:
            GatewiseError: there is no tree to export, or the format cannot hold it, or may not.
        """
        if which in ("all", "approved"):
            chosen = [one for one in self.passages if which == "all" or one.now.state == "approved"]
        elif isinstance(which, int):
            chosen = [self.passage(which)]
        else:
            raise GatewiseError(f'which is {which!r}, expected the number of a passage, "all" or "approved"')
        records = [passage.record() for passage in chosen if passage.is_valid]
        if not records:
            raise GatewiseError("there is no valid tree to export: none was approved yet, or it is unfinished")
        if format in ONE_TREE and len(records) > 1:
            raise GatewiseError(f"{ONE_TREE[format]} shows one tree: export this passage alone, or take another format")
        if format in RUN and not drafts:
            check_documents(self.files.out, records)
        stem = self.files.out.name.removesuffix(".jsonl").removesuffix(".review")
        return f"{stem}{'' if which == 'all' else f'-{which}'}{FORMATS[format]}", render(records, format, drafts=drafts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
