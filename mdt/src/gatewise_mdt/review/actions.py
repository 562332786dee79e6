"""What the page can ask for, as a name and a JSON object, and what it is answered. Nothing here knows of HTTP.

Every change says of which version of a passage it is (``number``, ``version``); it may say which page asks (``window``) and why
(``comment``), and of which review its numbers are (``run``). Who asks is told by whatever carries the request.
"""

import base64
import binascii
import secrets
from dataclasses import replace
from typing import Any

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, is_whole
from gatewise.errors import GatewiseError
from gatewise_mdt.formats.views import FORMATS
from gatewise_mdt.review.extracting import Extracting
from gatewise_mdt.review.passage import Passage
from gatewise_mdt.review.session import By, Session
from gatewise_mdt.review.shown import found_in, passage_json, session_json, source_json

# Changes of a passage, methods of Session: what each takes beside the passage's number and version.
_CHANGES: dict[str, dict[str, type]] = {
    "edit": {"edit": str, "arguments": dict},
    "begin": {},
    "undo": {},
    "redo": {},
    "approve": {"approved": bool},
    "tick": {"item": int, "ticked": bool, "why": str},
    "take": {"extraction": int, "replaced": bool},
    "leave": {"extraction": int},
}


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

    def show(self, what: str, asked: dict[str, Any], reviewer: str = "") -> dict[str, Any]:
        """Something to look at: "session"; "passage" with its ``number``; "source", the part of the document that this comes from;
        "page", a picture of a ``page`` of that; or "search", the numbers of the passages with ``words``.

        Args:
            reviewer: who asks; empty for the one who started the review.

        Raises:
            GatewiseError: there is no such thing, or the page is of another review.
        """
        self._check_run(asked)
        if what == "session":
            return self.session_json(reviewer)
        if what == "passage":
            return self.passage(self.session.passage(_integer(asked, "number")))
        if what == "source":
            return source_json(self.session, self.session.passage(_integer(asked, "number")))
        if what == "page":
            passage = self.session.passage(_integer(asked, "number"))
            if (original := self.session.original(passage)) is not None:
                return original.picture(_integer(asked, "page"))
        if what == "search":
            return {"numbers": found_in(self.session.passages, _text(asked, "words"))}
        raise NothingThereError("there is nothing at this address")

    def do(self, action: str, asked: dict[str, Any], reviewer: str = "") -> dict[str, Any]:
        """Something that changes the review, or gives a part of it away; answered with what changed and the present session.

        Args:
            reviewer: who asks; empty for the one who started the review.

        Raises:
            OldPageError: the passage has changed since the version that is named.
            GatewiseError: there is no such action, or it cannot be done, or the page is of another review.
        """
        self._check_run(asked)
        by = By(reviewer, _text(asked, "window"), _text(asked, "comment"))
        return {**self._do(action, asked, by), "session": self.session_json(reviewer)}

    def _do(self, action: str, asked: dict[str, Any], by: By) -> dict[str, Any]:
        session = self.session
        if action in _CHANGES:
            more = [_given(asked, name, kind) for name, kind in _CHANGES[action].items()]
            change = getattr(session, action)
            return {"passage": self.passage(change(_integer(asked, "number"), _integer(asked, "version"), *more, by=by))}
        match action:
            case "comment":
                return {"passage": self.passage(session.comment(_integer(asked, "number"), by))}
            case "paste":
                return _added(*session.paste(_text(asked, "text"), _text(asked, "population").strip(), by))
            case "load":
                try:
                    content = base64.b64decode(_text(asked, "content"), validate=True)
                except (binascii.Error, ValueError):
                    raise GatewiseError("the file did not arrive whole: try again") from None
                return _added(*session.load(content, _text(asked, "name"), _text(asked, "population").strip(), by))
            case "extract":
                self._extract(asked.get("passages"), by)
                return {}
            case "cancel":
                if self.extracting is not None:
                    self.extracting.cancel()
                return {}
            case "save":
                saved = session.save()
                return {"saved": {**saved._asdict(), "path": str(saved.path)}}
            case "export":
                format, which = _text(asked, "format"), asked.get("which")
                if format not in FORMATS:
                    raise GatewiseError(f"the format is {format!r}: expected one of {', '.join(FORMATS)}")
                file = session.export(format, which if is_whole(which) else str(which), asked.get("drafts") is True)
                return {"file": dict(zip(("name", "content"), file, strict=True))}
        raise NothingThereError("there is nothing at this address")

    def _extract(self, passages: Any, by: By) -> None:
        if self.extracting is None:
            raise GatewiseError(self.reason or "there is no model to extract with")
        pairs: list[Any] = passages if isinstance(passages, list) else [None]
        if not all(isinstance(one, list) and len(one) == 2 and is_whole(one[1]) for one in pairs):
            raise GatewiseError("the passages are missing, expected for each its number and the version that is shown")
        wanted = [replace(self.session.passage(number), version=version) for number, version in pairs]
        for passage in wanted:  # a reviewer's tree, or that of the text before this one, may not go unread for a model's
            if passage.beside is not None:
                whose = f"the tree of {passage.beside.of}" if passage.beside.of else "a tree"
                raise GatewiseError(
                    f"{whose} lies beside that of passage {passage.number}: take it or leave it before you extract again"
                )
        self.extracting.ask(wanted, by)

    def _check_run(self, asked: dict[str, Any]) -> None:
        if _text(asked, "run") not in ("", self.run):
            raise GatewiseError(
                "the review was started again since this page was loaded, so nothing was changed: keep a copy of what you are"
                " writing, and load the page again"
            )

    def passage(self, passage: Passage) -> dict[str, Any]:
        """A passage with its history."""
        return passage_json(passage, self.session.history(passage), self.extracting)

    def session_json(self, reviewer: str = "") -> dict[str, Any]:
        """The passages, how far the extraction is, and who asks."""
        return {
            **session_json(self.session, self.extracting),
            "run": self.run,
            "you": reviewer or self.session.reviewer,
            "progress": self.extracting.progress() if self.extracting else None,
            "extracts": self.extracting is not None,
            "reason": self.reason,
        }


def _added(passages: list[Passage], faults: list[str]) -> dict[str, Any]:
    return {"added": [passage.number for passage in passages], "faults": faults}


def _given(asked: dict[str, Any], name: str, kind: type) -> Any:
    value = asked.get(name, False if kind is bool else None)
    if not isinstance(value, kind):
        raise GatewiseError(f"{name} is {str(value)[:40]!r}, expected {kind.__name__}")
    return _text(asked, name) if kind is str else value


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
    if has_half_a_pair(value):
        raise GatewiseError(f"the {name} {HALF_A_PAIR}")
    return value
