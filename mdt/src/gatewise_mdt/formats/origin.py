"""Where a tree comes from, in words for people: who stands for it, of which document it is, and what drafted it.

A record may come from anywhere, and hold anything under the keys that gatewise writes: what is no text there is not said.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gatewise.checks import is_whole, printable
from gatewise_mdt.formats.words import Words, words_for
from gatewise_mdt.records import TreeRecord, clipped

DRAFT = "DRAFT: "
BEFORE_USE = "Needs review by a clinician before any use. Drafted from the text by software; not medical advice."
"""Stands in everything that a system runs, see :func:`before_use`."""
# What XML has no way to write, in which FHIR's resources come as well as in JSON.
_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_DIGITS = 12  # of a SHA-256, as people compare them
_MOST = 300  # characters of a comment


def origin_of(record: TreeRecord, words: Words | None = None) -> list[str]:
    """Up to three phrases, each on one line: who approved or corrected the tree, its place in a document, and how it was drafted.

    Args:
        words: of what language; None takes the tree's.
    """
    words = words or words_for(record.tree.language)
    source = _text(record.more, "source")
    document = words.comma.join([words.origin["from"].format(source=source), *_places(record, words)]) if source else ""
    found = (_review_phrase(record, words), document, _draft_phrase(record, words))
    return [one for one in found if one]


def sentences_beside(record: TreeRecord) -> list[str]:
    """What a record says of its passage and its tree beside these, a sentence each, for what a system runs."""
    headings = [f"Headings: {' › '.join(record.headings)}"] if record.headings else []
    notes = [f"Note of the reading: {one}" for one in record.notes]
    notes += [f"Origin: {phrase}" for phrase in origin_of(record, words_for("en"))]
    return [*headings, *notes, *(f"Warning of the extraction: {one}" for one in record.warnings)]


def marked(record: TreeRecord, title: str) -> str:
    """A title, which says DRAFT where the record went out as one."""
    return f"{DRAFT}{title}" if record.draft else title


def before_use(record: TreeRecord) -> str:
    """What stands in everything that a system runs."""
    return marked(record, f"exported to be tried, not to be used. {BEFORE_USE}" if record.draft else BEFORE_USE)


def clean(text: str) -> str:
    """A text as FHIR and any other XML may hold it."""
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def reviewer_of(record: TreeRecord) -> tuple[str, str, str]:
    """Whether a tree was "approved" or "corrected", by whom, and on which day (UTC, ISO 8601); each empty where it is not known."""
    held, state = record.reviewed or {}, record.more.get("review")
    if state == "approved" and not record.is_approved:
        held, state = {}, None
    moment = _moment(_text(held, "at"))
    return state if state in ("approved", "corrected") else "", _text(held, "by"), moment.date().isoformat() if moment else ""


def confidence_of(record: TreeRecord) -> tuple[float | None, ...]:
    """For each node how likely it is right as the model gave it; empty where that is not known, and for a tree that a person
    approved, who stands for all of it."""
    return () if record.is_approved else record.confidence or ()


def document_of(record: TreeRecord) -> tuple[str, str]:
    """The file of a tree's document, and the place of its passage in it with the whole SHA-256, in English; empty without one."""
    return _text(record.more, "source"), ", ".join(_places(record, words_for("en"), len(record.sha256)))


def _review_phrase(record: TreeRecord, words: Words) -> str:
    said, state = words.origin, reviewer_of(record)[0]
    if not state:
        return ""
    by, at, comment, read = (_text(record.reviewed or {}, key) for key in ("by", "at", "comment", "sha256"))
    parts = [said[f"{state}_by"].format(by=by) if by else said[state], *([_minute(at)] if at else [])]
    if read and record.sha256 and read != record.sha256:
        parts.append(said["read"].format(sha256=_short(read)))
    return words.comma.join(parts) + (said["comment"].format(comment=comment) if comment else "")


def _places(record: TreeRecord, words: Words, digits: int = _DIGITS) -> list[str]:
    offsets = record.more.get("offsets")
    parts = [_text(record.more, "place")]
    if isinstance(offsets, list) and len(offsets) == 2 and all(map(is_whole, offsets)):
        parts.append(words.origin["characters"].format(start=offsets[0], end=offsets[1]))
    if sha256 := _text(record.more, "sha256"):
        parts.append(f"SHA-256 {_short(sha256, digits)}")
    return [part for part in parts if part]


def _draft_phrase(record: TreeRecord, words: Words) -> str:
    held, said = record.extraction or {}, words.origin
    base, version, date = (_text(held, key) for key in ("base", "gatewise", "date"))
    adapter = held.get("adapter")
    name, sha256 = (_text(adapter, key) if isinstance(adapter, dict) else "" for key in ("name", "sha256"))
    if name and sha256:
        name += f" (SHA-256 {_short(sha256)})"
    model = said["on"].format(adapter=name, base=base) if name and base else name or base
    parts = [said["drafted"].format(model=model)] if model else []
    parts += [said["version"].format(version=version)] if version else []
    return "".join(parts) + (f"{words.comma}{_minute(date)}" if date else "") if parts else ""


def _text(held: Mapping[str, Any], key: str) -> str:
    """What a record holds under a key, on one line, and as much of it as people read."""
    said = held.get(key)
    return clipped(printable(said), _MOST) if isinstance(said, str) else ""


def _short(sha256: str, digits: int = _DIGITS) -> str:
    return sha256 if len(sha256) <= digits else f"{sha256[:digits]}…"


def _moment(said: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(said)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _minute(said: str) -> str:
    moment = _moment(said)
    return said if moment is None else f"{moment.date().isoformat()} {moment:%H:%M} UTC"
