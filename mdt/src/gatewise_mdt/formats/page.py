"""Trees as one HTML page that needs no network: the text on the left, the tree on the right, each marking the other.

The page is ``page.html``, its looks are ``page.css``, its script is ``marking.js``. Its Content-Security-Policy names the two by
their hashes, so that a browser runs and applies nothing else, whatever the texts of the records hold.
"""

import hashlib
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from importlib import resources
from itertools import pairwise
from typing import Any

from gatewise.checks import printable
from gatewise_mdt.formats.origin import confidence_of, origin_of
from gatewise_mdt.formats.svg import drawing_of, name_of
from gatewise_mdt.formats.words import words_for
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import locate_tree
from gatewise_mdt.tree import DecisionTree


def page_of(records: Sequence[TreeRecord]) -> str:
    """A page with one article a record. Everything that comes from the records is escaped."""
    words, several = words_for(records[0].tree.language), len(records) > 1
    style, script = content_of(__package__, "page.css"), content_of(__package__, "marking.js")
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    pages = Environment(
        loader=FunctionLoader(partial(content_of, __package__)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("page.html").render(
        words=words,
        several=several,
        title=words.title if several else f"{words.title}: {name_of(records[0])}",
        style=style,
        script=script,
        style_hash=source_of_policy(style),
        script_hash=source_of_policy(script),
        articles=[{**_article(record), "id": f"record-{i}"} for i, record in enumerate(records, start=1)],
    )


def content_of(room: str, name: str) -> str:
    """A page, style sheet or script that lies in a room of the package, such as "gatewise_mdt.formats"."""
    return (resources.files(room) / name).read_text(encoding="utf-8")


def source_of_policy(content: str) -> str:
    """A source of a Content-Security-Policy that allows an inline style sheet or script of this content and no other."""
    return f"sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _article(record: TreeRecord) -> dict[str, Any]:
    """What the page says of a record."""
    words = words_for(record.tree.language)
    mark = record.text.find("@")
    pieces: list[dict[str, Any]] = [
        {"start": start, "text": printable(piece), "names": names, "label": _label(names, words.language)}
        for start, piece, names in pieces_of(record.text, record.tree)
    ]
    note = record.more.get("note")
    return {
        "words": words,
        "number": record.number,
        "name": name_of(record),
        "population": [piece for piece in pieces if piece["start"] < mark] if mark >= 0 else None,
        "passage": [piece for piece in pieces if piece["start"] > mark] if record.text.strip() else None,
        "note": note if isinstance(note, str) else "",
        "headings": printable(" › ".join(record.headings)),
        "origin": origin_of(record, words),
        "notes": record.notes,
        "warnings": record.warnings,
        "outline": printable(record.tree.to_outline()),
        "svg": drawing_of(record.tree, record.text, focusable=True, confidence=confidence_of(record)),
    }


def _label(names: Sequence[str], language: str) -> str:
    nodes = ", ".join(dict.fromkeys(str(int(name.split(".")[0]) + 1) for name in names))
    return f"节点 {nodes}" if language == "zh" else f"node {nodes}"


def pieces_of(text: str, tree: DecisionTree) -> list[tuple[int, str, list[str]]]:
    """The text in pieces, (start, piece, names of the triples that rest on it as "node.triple"), without the population's "@"."""
    rests: list[tuple[int, int, str]] = []
    for i, row in enumerate(locate_tree(text, tree)):
        for j, spans in enumerate(row):
            rests += [(span.start, span.end, f"{i}.{j}") for span in spans if span is not None]
    mark = text.find("@")
    cuts = {0, len(text), *(edge for start, end, _ in rests for edge in (start, end))}
    cuts |= {mark, mark + 1} if mark >= 0 else set()
    pieces = []
    for start, end in pairwise(sorted(cuts)):
        if start == mark:
            continue
        names = dict.fromkeys(name for begin, stop, name in rests if begin <= start and end <= stop)
        pieces.append((start, text[start:end], list(names) if text[start:end].strip() else []))
    return pieces
