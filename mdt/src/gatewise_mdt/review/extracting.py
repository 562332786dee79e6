"""Extraction beside the review: a thread that takes passages one after another, tells how far it is, and can be stopped."""

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
    from gatewise_mdt.extraction.extractor import Extraction, Extracts

# Called with every token that was written.
Tick = Callable[[], None]
# The text, its language where it is known for sure, and what to call with every token.
Extract = Callable[[str, Language | None, Tick], "Extraction"]
NOTHING_FOUND = "no decision was found in this passage"


class _Asked(NamedTuple):
    """A passage in the queue, in the version that was seen when it was asked for, and who asked."""

    number: int
    version: int
    by: By


class CancelledError(BaseException):
    """The user does not want the tree any more. Goes through what an extractor does about faults, which it is none of."""


def model_extract(extractor: "Extracts") -> Extract:
    """Extraction with a model, one passage at a time, in a form that can be watched and stopped between two tokens."""

    def extract(text: str, language: Language | None, tick: Tick) -> "Extraction":
        # A model reads its embeddings once for every token it writes; `generate` has no place to stop it from another thread.
        handle = extractor.model.get_input_embeddings().register_forward_pre_hook(lambda *_: tick())
        try:
            (found,) = extractor([text], language=language)
        finally:
            handle.remove()
        if isinstance(found, GatewiseError):
            raise found
        return found

    return extract


class Extracting:
    """Extracts passages of a session in a thread of its own.

    Args:
        language: of all texts; None finds it out.
        most: tokens that are written for a passage at most, for showing how far it is.
    """

    def __init__(self, session: Session, extract: Extract, *, language: Language | None = None, most: int = 0) -> None:
        self.session, self.extract, self.language, self.most = session, extract, language, most
        self._news = Condition()
        self._queue: list[_Asked] = []
        self._now: _Asked | None = None
        self._done = self._tokens = 0
        self._started = 0.0
        self._cancelled = self._ended = False
        self._thread = Thread(target=self._run, name="extracting", daemon=True)
        self._thread.start()

    def ask(self, passages: Iterable[Passage], by: By = NOBODY) -> None:
        """Puts passages into the queue, in the versions in which they are given; those that are in it stay where they are."""
        with self._news:
            if not self._queue and self._now is None:
                self._done = 0
            waiting = {asked.number for asked in (*self._queue, *filter(None, [self._now]))}
            for passage in passages:
                if passage.number not in waiting:
                    self.session.mark(passage.number, waiting=True, error="")
                    self._queue.append(_Asked(passage.number, passage.version, by))
            self._news.notify_all()

    def cancel(self) -> None:
        """Empties the queue and stops what is written now. Trees that are done stay."""
        with self._news:
            for asked in self._queue:
                self.session.mark(asked.number, waiting=False)
            self._queue.clear()
            self._cancelled = self._now is not None

    def end(self, wait: float = 5) -> None:
        """Stops for good, with at most so many seconds of waiting for the model."""
        self.cancel()
        with self._news:
            self._ended = True
            self._news.notify_all()
        self._thread.join(wait)

    def progress(self) -> dict[str, Any] | None:
        """How far it is; None when there is nothing to do."""
        with self._news:
            if self._now is None and not self._queue:
                return None
            at = (0 if self._now is None else 1) + self._done
            return {
                "passage": self._now.number if self._now else None,
                "at": at,
                "of": self._done + len(self._queue) + (self._now is not None),
                "tokens": self._tokens,
                "most": self.most,
                "seconds": round(time.monotonic() - self._started) if self._now is not None else 0,
                "cancelling": self._cancelled,
            }

    # ---- in the thread ----

    def _run(self) -> None:
        while (asked := self._next()) is not None:
            error = self._one(asked)
            with self._news:
                self.session.mark(asked.number, waiting=False, error=error)
                self._now = None
                self._done += 1
                self._cancelled = False

    def _next(self) -> "_Asked | None":
        with self._news:
            while not self._queue and not self._ended:
                self._news.wait()
            if self._ended:
                return None
            self._now = self._queue.pop(0)
            self._tokens, self._started, self._cancelled = 0, time.monotonic(), False
            return self._now

    def _one(self, asked: "_Asked") -> str | None:
        """Why there is no tree, a sentence; None where there is one, or nobody wants it any more."""
        try:
            passage = self.session.passage(asked.number)
        except GatewiseError:  # it was removed while it waited
            return None
        try:
            found = self.extract(passage.text, self.language, self._tick)
            warnings = found.warnings if found.tree.triples else (*found.warnings, NOTHING_FOUND)
            made_with = None if found.made_with is None else dict(found.made_with)
            sure = found.confidence and tuple(one if one is None else round(one, 3) for one in found.confidence)
            version = Version(found.tree.to_preorder(), "drafted", tuple(warnings), extraction=made_with, confidence=sure)
            self.session.put(asked.number, version, asked.version, asked.by)
        except CancelledError:
            return None
        except GatewiseError as error:
            return str(error)
        except BaseException as error:  # whatever it is, a panic of a library too: the others go on, and it says what happened
            with suppress(Exception):  # there may be no terminal any more
                traceback.print_exc(file=sys.stderr)
            return f"the extraction failed ({type(error).__name__}: {error}): see the terminal, and write the tree by hand"
        return None

    def _tick(self) -> None:
        with self._news:
            if self._cancelled:
                raise CancelledError
            self._tokens += 1
