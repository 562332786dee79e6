"""What the page can ask for, as a name and a JSON object, and what it is answered. Nothing here knows of HTTP.

Every change says of which version of a passage it is (``number``, ``version``); it may say which page asks (``window``) and why
(``comment``), and of which review its numbers are (``run``). Who asks is told by whatever carries the request.
"""

import base64
import binascii
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise_mdt.formats.views import FORMATS
from gatewise_mdt.review.extracting import Extracting
from gatewise_mdt.review.passage import Passage
from gatewise_mdt.review.session import By, OldPageError, Session
from gatewise_mdt.review.shown import changes, overview, whole


class NothingThereError(GatewiseError):
    """There is nothing of the name that was asked for."""


class Review:
    """A session as the page sees it.

    Args:
        extracting: None where there is no model; ``reason`` then says why.

    Attributes:
        run: names this review among those that were before it at the same address. A page that stayed open is of another one, in
            which the numbers of passages may be other passages'.
    """

    def __init__(self, session: Session, extracting: Extracting | None = None, reason: str = "") -> None:
        self.session, self.extracting, self.reason = session, extracting, reason
        self.run = secrets.token_hex(8)

    def shown(self, what: str, asked: dict[str, Any], reviewer: str = "") -> dict[str, Any]:
        """Something to look at: "session", or "passage" with its ``number``.

        Args:
            reviewer: who asks; empty for the one who started the review.

        Raises:
            GatewiseError: there is no such thing, or the page is of another review.
        """
        self._check_run(asked)
        if what == "session":
            return self.overview(reviewer)
        if what == "passage":
            return self.passage(self.session.passage(_integer(asked, "number")))
        raise NothingThereError("there is nothing at this address")

    def done(self, action: str, asked: dict[str, Any], reviewer: str = "") -> dict[str, Any]:
        """Something that changes the review, or gives a part of it away; answered with what changed and the present session.

        Args:
            reviewer: who asks; empty for the one who started the review.

        Raises:
            OldPageError: the passage has changed since the version that is named.
            GatewiseError: there is no such action, or it cannot be done, or the page is of another review.
        """
        self._check_run(asked)
        if action not in _ACTIONS:
            raise NothingThereError("there is nothing at this address")
        by = By(reviewer, _text(asked, "window"), _text(asked, "comment"))
        return {**_ACTIONS[action](self, by, asked), "session": self.overview(reviewer)}

    def _check_run(self, asked: dict[str, Any]) -> None:
        if _text(asked, "run") not in ("", self.run):
            raise GatewiseError(
                "the review was started again since this page was loaded, so nothing was changed: keep a copy of what you are"
                " writing, and load the page again"
            )

    def passage(self, passage: Passage) -> dict[str, Any]:
        """A passage with its history."""
        return whole(passage, self.session.history(passage))

    def overview(self, reviewer: str = "") -> dict[str, Any]:
        """The passages, how far the extraction is, and who asks."""
        return {
            **overview(self.session),
            "run": self.run,
            "you": reviewer or self.session.reviewer,
            "progress": self.extracting.progress() if self.extracting else None,
            "extracts": self.extracting is not None,
            "reason": self.reason,
        }


def refused(error: OldPageError) -> dict[str, Any]:
    """What a page has to know whose change was refused: the passage as it is, and what was done to it meanwhile."""
    return {"passage": whole(error.passage), "since": changes(error.since)}


def _edit(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    arguments = asked.get("arguments")
    if not isinstance(arguments, dict):
        raise GatewiseError("the arguments of the edit are missing")
    return _changed(review, review.session.edit(*_which(asked), _text(asked, "edit"), arguments, by))


def _undo(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.undo(*_which(asked), by))


def _redo(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.redo(*_which(asked), by))


def _begin(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.begin(*_which(asked), by))


def _approve(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.approve(*_which(asked), asked.get("approved") is True, by))


def _comment(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.comment(_integer(asked, "number"), by))


def _take(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    number, version = _which(asked)
    extraction, replaced = _integer(asked, "extraction"), asked.get("replaced") is True
    return _changed(review, review.session.take(number, version, extraction, replaced, by))


def _leave(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _changed(review, review.session.leave(*_which(asked), _integer(asked, "extraction"), by))


def _remove(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    review.session.remove(*_which(asked), by)
    return {}


def _paste(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    return _added(*review.session.paste(_text(asked, "text"), _text(asked, "population").strip(), by))


def _load(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        content = base64.b64decode(_text(asked, "content"), validate=True)
    except (binascii.Error, ValueError):
        raise GatewiseError("the file did not arrive whole: try again") from None
    return _added(*review.session.load(content, _text(asked, "name"), _text(asked, "population").strip(), by))


def _extract(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    if review.extracting is None:
        raise GatewiseError(review.reason or "there is no model to extract with")
    passages = asked.get("passages")
    if not isinstance(passages, list) or not all(isinstance(one, list) and len(one) == 2 and is_whole(one[1]) for one in passages):
        raise GatewiseError("the passages are missing, expected for each its number and the number of the version that is shown")
    wanted = [replace(review.session.passage(number), version=version) for number, version in passages]
    for passage in wanted:  # of two reviewers' trees none may go unread for a model's
        if passage.beside is not None and passage.beside.of:
            raise GatewiseError(
                f"the tree of {passage.beside.of} lies beside that of passage {passage.number}: take it or leave it before you"
                " extract again"
            )
    review.extracting.ask(wanted, by)
    return {}


def _cancel(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    if review.extracting is not None:
        review.extracting.cancel()
    return {}


def _save(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    saved = review.session.save(by)
    return {"saved": {**saved._asdict(), "path": str(saved.path)}}


def _export(review: Review, by: By, asked: dict[str, Any]) -> dict[str, Any]:
    format, which = _text(asked, "format"), asked.get("which")
    if format not in FORMATS:
        raise GatewiseError(f"the format is {format!r}: expected one of {', '.join(FORMATS)}")
    made = review.session.export(format, which if is_whole(which) else str(which))
    return {"file": {"name": made.name, "content": made.content}}


_ACTIONS: dict[str, Callable[[Review, By, dict[str, Any]], dict[str, Any]]] = {
    "edit": _edit,
    "undo": _undo,
    "redo": _redo,
    "begin": _begin,
    "approve": _approve,
    "comment": _comment,
    "take": _take,
    "leave": _leave,
    "remove": _remove,
    "paste": _paste,
    "load": _load,
    "extract": _extract,
    "cancel": _cancel,
    "save": _save,
    "export": _export,
}


def _changed(review: Review, passage: Passage) -> dict[str, Any]:
    return {"passage": review.passage(passage)}


def _added(passages: list[Passage], faults: list[str]) -> dict[str, Any]:
    return {"added": [passage.number for passage in passages], "faults": faults}


def _which(asked: dict[str, Any]) -> tuple[int, int]:
    return _integer(asked, "number"), _integer(asked, "version")


def _integer(asked: dict[str, Any], name: str) -> int:
    value = asked.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if not is_whole(value):
        raise GatewiseError(f"{name} is {str(value)[:40]!r}, expected a number")
    return value


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name, "")
    if not isinstance(value, str):
        raise GatewiseError(f"{name} is {str(value)[:40]!r}, expected text")
    return value
