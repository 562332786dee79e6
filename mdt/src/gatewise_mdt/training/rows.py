"""Rows for ``gatewise train``: a record's prompt and what is to be written after it, end to end or for a stage of the pipeline."""

from collections.abc import Iterable
from typing import Any, Literal

from gatewise.errors import GatewiseError
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.extraction.prompts import STAGES, Stage, nodes_in_order, prompt
from gatewise_mdt.formats.lines import LEVELS, Level, letters, linearise, node_lines, triple_lines, triples_in_order
from gatewise_mdt.records import TreeRecord


def completion(record: TreeRecord, level: Level = 0, stage: Stage | None = None) -> str:
    """What the model is to write for a record, see :func:`prompt`; empty for the first two stages of a tree without a triple.

    Raises:
        GatewiseError: the level is unknown.
    """
    text, tree = record.text, record.tree
    if stage is None:
        return linearise(tree, level, text=text)
    triples = triples_in_order(text, tree)
    if stage == "triples":
        return "\n".join(triple_lines(triples))
    nodes = nodes_in_order(text, tree)
    if stage == "nodes":
        return "\n".join(node_lines(nodes, triples))
    names = {node: letters(i) for i, node in enumerate(nodes)}
    return "\n".join(names.get(node, "D") for node in tree.nodes)


def training_rows(
    records: Iterable[TreeRecord], *, level: Level = 0, stage: Stage | Literal["all"] | None = None
) -> list[dict[str, Any]]:
    """Rows of kind "generation" for ``gatewise train``: ``source`` is the whole prompt, ``target`` what is to be written.

    Its recipe says ``template: {prompt: "{source}"}``. A tree without any triple gives no row for a stage of the pipeline.

    Args:
        stage: of the pipeline, or "all" for the three of each record one after the other.

    Raises:
        GatewiseError: level or stage is unknown, or a tree without triples has a text that is in neither language.
    """
    if level not in LEVELS:
        raise GatewiseError(f"the level is {level!r}: expected 0 (tree), 1 (triples, tree) or 2 (triples, nodes, tree)")
    if stage is not None and stage not in (*STAGES, "all"):
        raise GatewiseError(f"the stage is {stage!r}: expected one of {', '.join(STAGES)}, or all")
    stages: tuple[Stage | None, ...] = STAGES if stage == "all" else (stage,)
    rows = []
    for record in records:
        language = record.tree.language if record.tree.triples else detect_language(record.text, f"record {record.number}")
        triples, nodes = triples_in_order(record.text, record.tree), nodes_in_order(record.text, record.tree)
        for one in stages:
            if one is not None and not triples:
                continue
            source = prompt(record.text, language, one, triples=triples, nodes=nodes)
            kind = {"level": level} if one is None else {"stage": one}
            rows.append({"source": source, "target": completion(record, level, one), "language": language, **kind})
    return rows
