"""Extraction beside the review: a thread that takes passages one after another, says how far it is, and can be stopped."""

import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from gatewise.errors import GatewiseError
from gatewise_mdt.relations import Language
from gatewise_mdt.review.passage import Passage, Version
from gatewise_mdt.review.session import NOBODY, By, Session

if TYPE_CHECKING:
    from gatewise_mdt.extraction.extractor import Extraction

Extract = Callable[[str, Language | None], "Extraction | GatewiseError"]
"""Called with a text, and its language where it is known for sure; gives its tree, or why there is none."""
NOTHING_FOUND = "no decision was found in this passage"


class _Asked(NamedTuple):
    """A passage in the queue, in the version that was seen when it was asked for, and who asked."""

    number: int
    version: int
    by: By


class Extracting:
    """Extracts passages of a session in a thread of its own.

    Args:
        language: of all texts; None finds it out.
    """

    def __init__(self, session: Session, extract: Extract, *, language: Language | None = None) -> None:
        self.session, self.extract, self.language = session, extract, language
        self._news = Condition()
        self._queue: list[_Asked] = []
        self._now: _Asked | None = None
        self._faults: dict[int, tuple[int, str]] = {}  # number -> version, and why no tree was made of it
        self._done, self._started = 0, 0.0
        self._cancelled = self._ended = False
        self._thread = Thread(target=self._run, name="extracting", daemon=True)
        self._thread.start()

    def ask(self, passages: Iterable[Passage], by: By = NOBODY) -> None:
        """Puts passages into the queue, in the versions in which they are given; those that are in it stay where they are."""
        with self._news:
            if not self._queue and self._now is None:
                self._done = 0
            for passage in passages:
                if not self.is_waiting(passage):
                    self._faults.pop(passage.number, None)
                    self._queue.append(_Asked(passage.number, passage.version, by))
            self._news.notify_all()

    def cancel(self) -> None:
        """Empties the queue, and drops the tree that is made now when it is there. Trees that are done stay."""
        with self._news:
            self._queue.clear()
            self._cancelled = self._now is not None

    def end(self, wait: float = 5) -> None:
        """Stops for good, with at most so many seconds of waiting for the model."""
        self.cancel()
        with self._news:
            self._ended = True
            self._news.notify_all()
        self._thread.join(wait)

    def is_waiting(self, passage: Passage) -> bool:
        """True if the passage is in the queue, or its tree is made now."""
        with self._news:
            return any(passage.number == asked.number for asked in (*self._queue, *filter(None, [self._now])))

    def fault(self, passage: Passage) -> str:
        """Why no tree was made of this version of a passage, a sentence; empty where nothing failed."""
        version, said = self._faults.get(passage.number, (-1, ""))
        return said if version == passage.version else ""

    def progress(self) -> dict[str, Any] | None:
        """How far it is; None when there is nothing to do."""
        with self._news:
            if self._now is None and not self._queue:
                return None
            running = self._now is not None
            return {
                "passage": self._now.number if self._now else None,
                "at": running + self._done,
                "of": self._done + len(self._queue) + running,
                "seconds": round(time.monotonic() - self._started) if running else 0,
                "cancelling": self._cancelled,
            }

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._queue and not self._ended:
                    self._news.wait()
                if self._ended:
                    return
                asked = self._now = self._queue.pop(0)
                self._started, self._cancelled = time.monotonic(), False
            fault = self._one(asked)
            with self._news:
                if fault:
                    self._faults[asked.number] = asked.version, fault
                self._now = None
                self._done += 1

    def _one(self, asked: _Asked) -> str:
        """Why there is no tree, a sentence; empty where there is one, or nobody wants it any more."""
        try:
            passage = self.session.passage(asked.number)
        except GatewiseError:  # it was removed while it waited
            return ""
        try:
            found = self.extract(passage.text, self.language or passage.language)
            if isinstance(found, GatewiseError):
                return str(found)
            warnings = found.warnings if found.tree.triples else (*found.warnings, NOTHING_FOUND)
            made_with = None if found.made_with is None else dict(found.made_with)
            sure = found.confidence and tuple(one if one is None else round(one, 3) for one in found.confidence)
            version = Version(found.tree.to_preorder(), "drafted", tuple(warnings), extraction=made_with, confidence=sure)
            if not self._cancelled:
                self.session.put(asked.number, version, asked.version, asked.by)
        except GatewiseError as error:
            return str(error)
        except BaseException as error:  # whatever it is, a panic of a library too: the others go on, and it says what happened
            with suppress(Exception):  # there may be no terminal any more
                traceback.print_exc(file=sys.stderr)
            return f"the extraction failed ({type(error).__name__}: {error}): see the terminal, and write the tree by hand"
        return ""
