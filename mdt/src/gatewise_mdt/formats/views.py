"""Trees as people look at them, hand them on and run them. Each format asks for review by a clinician."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.files import finite, whole_file
from gatewise_mdt.formats import cpg, tables
from gatewise_mdt.formats.gate import cleared
from gatewise_mdt.formats.mermaid import mermaid_of
from gatewise_mdt.formats.origin import confidence_of, origin_of
from gatewise_mdt.formats.page import page_of
from gatewise_mdt.formats.svg import drawing_of, pathway_drawing_of
from gatewise_mdt.formats.vignettes import vignettes_json, vignettes_text
from gatewise_mdt.formats.words import words_for
from gatewise_mdt.pathway import Link, Pathway
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import TripleSpans, absent_triples, locate_tree, part_of
from gatewise_mdt.tree import Triple, on_one_line

FORMATS = {
    "text": ".txt",
    "json": ".json",
    "mermaid": ".mmd",
    "svg": ".svg",
    "html": ".html",
    "vignettes": ".vignettes.txt",
    "vignettes-json": ".vignettes.json",
    "fhir-r4": ".r4.json",
    "fhir-r5": ".r5.json",
    "dmn": ".dmn",
}
"""Formats that are one text, with the suffix of a file."""
WORKBOOKS = {"dak": ".xlsx"}
"""Formats that are no text, and can only be written."""
ONE_TREE = {"mermaid": "a Mermaid chart", "svg": "an SVG"}
"""Formats that show one tree, with what messages call them."""


def render(records: Sequence[TreeRecord], format: str, *, drafts: bool = False, links: Sequence[Link] | None = None) -> str:
    """Records in a format, as one text that ends in a line break.

    Args:
        format: a key of ``FORMATS``. Those of ``ONE_TREE`` take one record, the others any number; "json" can be read back by
            :func:`gatewise_mdt.read_trees`. :func:`notes_of` says what those of FHIR and "dmn" cannot hold.
        drafts: formats that systems run take trees that are not approved, or have open items, too, and say DRAFT.
        links: between the records, which are then one pathway: in FHIR a plan, in DMN decisions that require each other, in SVG a
            picture. Those are followed that were accepted, with ``drafts`` those that are proposed, too.

    Raises:
        GatewiseError: the format is no text, or cannot hold several, or a tree may not go out in it, or the links make no pathway.
    """
    if not records:
        raise GatewiseError("there are no trees to write, expected at least one")
    records = cleared(records, format, drafts)
    if links is not None:
        return _pathway(records, links, format, drafts)
    if format in WORKBOOKS:
        raise GatewiseError(f"the format {format} is a workbook and no text: write it to a file, with --out")
    if format in ONE_TREE and len(records) > 1:
        advice = "name one of them with --record, or a folder for all with --out"
        raise GatewiseError(f"{ONE_TREE[format]} shows one tree, but {len(records)} were given: {advice}")
    makers: dict[str, Callable[[Sequence[TreeRecord]], str]] = {
        "text": lambda records: f"# {words_for(records[0].tree.language).notice}\n{_with_comments(records)}",
        "json": lambda records: _json([_as_json(record) for record in records]),
        "mermaid": lambda records: mermaid_of(records[0]),
        "svg": lambda records: _drawing(records[0]),
        "html": page_of,
        "vignettes": vignettes_text,
        "vignettes-json": lambda records: _json(vignettes_json(records)),
        "fhir-r4": lambda records: _json(cpg.bundle_of(records, "R4")),
        "fhir-r5": lambda records: _json(cpg.bundle_of(records, "R5")),
        "dmn": tables.dmn_of,
    }
    return makers[format](records)


def _pathway(records: Sequence[TreeRecord], links: Sequence[Link], format: str, drafts: bool) -> str:
    makers: dict[str, Callable[[Pathway], str]] = {
        "svg": pathway_drawing_of,
        "fhir-r4": lambda pathway: _json(cpg.pathway_bundle_of(pathway, "R4")),
        "fhir-r5": lambda pathway: _json(cpg.pathway_bundle_of(pathway, "R5")),
        "dmn": tables.pathway_dmn_of,
    }
    if format not in makers:
        raise GatewiseError(f"a pathway cannot be shown as {format}: expected one of {', '.join(makers)}")
    followed = [link for link in links if link.state == "accepted" or (drafts and link.state == "proposed")]
    return makers[format](Pathway(tuple(records), tuple(followed)))


def _drawing(record: TreeRecord) -> str:
    return drawing_of(
        record.tree,
        record.text,
        warnings=record.warnings,
        headings=record.headings,
        origin=origin_of(record),
        confidence=confidence_of(record),
    )


def notes_of(records: Sequence[TreeRecord], format: str) -> list[str]:
    """What a format cannot say as the trees do: a sentence each, after the records and nodes that it is true of.

    What is made of the trees says it, too.
    """
    made = {"fhir-r4": cpg.notes_of, "fhir-r5": cpg.notes_of, "dmn": tables.notes_of, "dak": tables.notes_of}
    notes = made.get(format)
    if notes is None:
        return []
    places: dict[str, list[str]] = {}
    for record in records:
        for note in notes(record):
            nodes, found, said = note.partition(": ")
            place, said = (f"record {record.number}, {nodes}", said) if found else (f"record {record.number}", note)
            places.setdefault(said, []).append(place)
    return [f"{'; '.join(where)}: {said}" for said, where in places.items()]


def write_view(
    records: Sequence[TreeRecord], format: str, path: str | Path, *, drafts: bool = False, links: Sequence[Link] | None = None
) -> Path:
    """Writes what :func:`render` gives, or the workbook "dak", whole or not at all.

    Raises:
        GatewiseError: as :func:`render`, or the place cannot be written.
    """
    if format in WORKBOOKS and links is None:
        content = tables.dak_of(cleared(records, format, drafts))
    else:
        content = render(records, format, drafts=drafts, links=links).encode()
    with whole_file(path) as part:
        part.write_bytes(content)
    return Path(path)


def _with_comments(records: Sequence[TreeRecord]) -> str:
    """Outlines with what does not count as comments: above each node how sure the model was of it, and after the outline where it
    comes from, its warnings and what is not in its text."""
    made = []
    for record in records:
        missing = absent_triples(record.text, record.tree) if record.text.strip() else ()
        words = words_for(record.tree.language)
        sure = [words.sure(one) for one in confidence_of(record)]
        comments = [words.confidence_means] if any(sure) else []
        comments += [on_one_line(phrase) for phrase in origin_of(record, words)]
        comments += [f"{words.warnings}: {on_one_line(warning)}" for warning in record.warnings]
        for triple in missing:
            comments.append(f"{on_one_line(words.why_absent(record.text, triple))}: {' | '.join(map(on_one_line, triple))}")
        outline = f"text: {on_one_line(record.text)}\n{record.tree.to_outline(sure)}"
        made.append(outline + "".join(f"# {comment}\n" for comment in comments))
    return "---\n".join(made)


def _as_json(record: TreeRecord) -> dict[str, Any]:
    """The published format with what a program may want beside it: the phrases' places in the text."""
    located = locate_tree(record.text, record.tree)
    spans = [
        [_places(record.text, triple, found) for triple, found in zip(node.triples, row, strict=True)]
        for node, row in zip(record.tree.nodes, located, strict=True)
    ]
    first = {"text": record.text, "tree": record.tree.to_preorder(), "notice": words_for("en").notice}
    # What is ours comes twice: before a record's own keys, and after them, so that none of these takes its place.
    return {**first, **record.more, **first, "spans": spans}


def _places(text: str, triple: Triple, found: TripleSpans) -> dict[str, Any]:
    """Where subject and object stand, and for one that is but a part of other words these words."""
    places: dict[str, Any] = {"subject": found.subject, "object": found.object}
    for name, phrase in (("subject", triple.subject), ("object", triple.object)):
        if places[name] is None and (whole := part_of(text, phrase)) is not None:
            places[f"{name}_part_of"] = whole
    return places


def _json(value: Any) -> str:
    made = json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n"
    # JSON escapes only those below the space, and these a terminal obeys as well.
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", made)
