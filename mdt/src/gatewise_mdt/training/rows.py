"""Rows for ``gatewise train``: a record's prompt and the tree that is to be written after it."""

from collections.abc import Iterable

from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.formats.lines import linearise
from gatewise_mdt.records import TreeRecord


def training_rows(records: Iterable[TreeRecord]) -> list[dict[str, str]]:
    """Rows of kind "generation" for ``gatewise train``: ``source`` is the whole prompt, ``target`` the lines of the tree.

    Its recipe says ``template: {prompt: "{source}"}``.

    Raises:
        GatewiseError: a tree without triples has a text that is in neither language.
    """
    rows = []
    for record in records:
        language = record.tree.language if record.tree.triples else detect_language(record.text, f"record {record.number}")
        target = linearise(record.tree, text=record.text)
        rows.append({"source": prompt(record.text, language), "target": target, "language": language})
    return rows
