"""Trees as people look at them and hand them on: text, JSON, Mermaid, SVG, HTML, FHIR. Each asks for review by a clinician."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.files import finite, whole_file
from gatewise.mdt.formats.fhir import bundle_of
from gatewise.mdt.formats.mermaid import mermaid_of
from gatewise.mdt.formats.page import page_of
from gatewise.mdt.formats.svg import drawing_of
from gatewise.mdt.formats.words import words_for
from gatewise.mdt.outline import escaped
from gatewise.mdt.records import TreeRecord, outlines_of
from gatewise.mdt.spans import Span, absent_triples, locate_tree

FORMATS = {"text": ".txt", "json": ".json", "mermaid": ".mmd", "svg": ".svg", "html": ".html", "fhir": ".json"}
ONE_TREE = {"mermaid": "a Mermaid chart", "svg": "an SVG"}
"""Formats that show one tree, with what messages call them."""
NOTICE = "Needs review by a clinician. Not medical advice."


def render(records: Sequence[TreeRecord], format: str) -> str:
    """Records in a format, as one text that ends in a line break.

    Args:
        format: a key of ``FORMATS``. Those of ``ONE_TREE`` take one record, the others any number: "json" and "text" can be read
            back by :func:`gatewise.mdt.read_trees`, "fhir" makes a Bundle of several.

    Raises:
        GatewiseError: there is no record, the format is unknown or cannot hold several, or fhir.resources is missing.
    """
    if format not in FORMATS:
        raise GatewiseError(f"the format is {format!r}: expected one of {', '.join(FORMATS)}")
    if not records:
        raise GatewiseError("there is no tree to show: give at least one record")
    if format in ONE_TREE and len(records) > 1:
        raise GatewiseError(f"{ONE_TREE[format]} shows one tree, but {len(records)} were given: name one of them")
    makers: dict[str, Callable[[Sequence[TreeRecord]], str]] = {
        "text": lambda records: f"# {words_for(records[0].tree.language).notice}\n{_with_comments(records)}",
        "json": lambda records: _json([_as_json(record) for record in records]),
        "mermaid": lambda records: mermaid_of(records[0].tree, records[0].text, records[0].warnings),
        "svg": lambda records: drawing_of(records[0].tree, records[0].text, warnings=records[0].warnings).svg,
        "html": page_of,
        "fhir": lambda records: _json(bundle_of(records)),
    }
    return makers[format](records)


def write_view(records: Sequence[TreeRecord], format: str, path: str | Path) -> Path:
    """Writes what :func:`render` gives, whole or not at all.

    Raises:
        GatewiseError: as :func:`render`, or the place cannot be written.
    """
    content = render(records, format)
    with whole_file(path) as part:
        part.write_text(content, encoding="utf-8", newline="\n")
    return Path(path)


def _with_comments(records: Sequence[TreeRecord]) -> str:
    """Outlines, each followed by its warnings and by what does not stand in its text, in lines that do not count."""
    made = []
    for record in records:
        missing = absent_triples(record.text, record.tree) if record.text.strip() else ()
        words = words_for(record.tree.language)
        comments = [f"{words.warnings}: {escaped(warning)}" for warning in record.warnings]
        comments += [f"{words.absent}: {' | '.join(map(escaped, triple))}" for triple in missing]
        made.append(outlines_of([record]) + "".join(f"# {comment}\n" for comment in comments))
    return "---\n".join(made)


def _as_json(record: TreeRecord) -> dict[str, Any]:
    """The published format with what a program may want beside it: the nested tree and the phrases' places in the text."""
    spans = [
        [{"subject": _pair(found.subject), "object": _pair(found.object)} for found in row]
        for row in locate_tree(record.text, record.tree)
    ]
    first = {"text": record.text, "tree": record.tree.to_preorder(), "notice": NOTICE}
    # What is ours comes twice: before a record's own keys, and after them, so that none of these takes its place.
    return {**first, **record.more, **first, "nested": record.tree.to_nested(), "spans": spans}


def _pair(span: Span | None) -> list[int] | None:
    return None if span is None else list(span)


def _json(value: Any) -> str:
    made = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    # JSON escapes only those below the space, and these a terminal obeys as well.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", made)
