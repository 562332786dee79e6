"""What a causal model reads and what it is to write: for the whole tree at once, and for each step of the pipeline.

| stage     | the prompt shows       | the model writes                                                       |
|-----------|------------------------|------------------------------------------------------------------------|
| (none)    | the text               | level 0 the tree; 1 triples, then the tree; 2 triples, nodes, then the tree |
| `triples` | the text               | the triples, numbered                                                  |
| `nodes`   | text, triples          | the nodes, named by letters, each with the numbers of its triples      |
| `tree`    | text, nodes            | the tree as the nodes' letters in pre-order, ``D`` for an empty leaf    |

Everything written is of :mod:`gatewise.mdt.linearise`. The prompt of the whole tree is the same for all levels: an adapter was
trained for one of them and begins as it learnt to. The steps' prompts list triples and nodes in the order of the text, never in
that of the tree, which would give the answer away.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from gatewise.errors import GatewiseError
from gatewise.mdt.language import detect_language
from gatewise.mdt.linearise import LEVELS, Level, letters, linearise, node_lines, triple_lines, triples_in_order
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.relations import Language
from gatewise.mdt.spans import in_text_order, locate
from gatewise.mdt.tree import DecisionTree, Node, Triple

Stage = Literal["triples", "nodes", "tree"]
STAGES: tuple[Stage, ...] = ("triples", "nodes", "tree")

_WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "population": "Population: ",
        "passage": "Passage: ",
        "triples": "Triples:",
        "nodes": "Nodes:",
        "tree": "Tree:",
        "whole": "Decision tree:",
    },
    "zh": {
        "population": "人群：",
        "passage": "原文：",
        "triples": "三元组：",
        "nodes": "节点：",
        "tree": "树：",
        "whole": "诊疗决策树：",
    },
}


def prompt(
    text: str,
    language: Language,
    stage: Stage | None = None,
    *,
    triples: Sequence[Triple] = (),
    nodes: Sequence[Node] = (),
) -> str:
    """What the model reads.

    Args:
        text: "population@passage"; without an "@" all of it is the passage.
        stage: a step of the pipeline; None for the whole tree.
        triples: for stage "nodes", the triples to group.
        nodes: for stage "tree", the nodes to put together.
    """
    words = _WORDS[language]
    population, passage = parted(text)
    lines = [words["population"] + population] if population else []
    lines.append(words["passage"] + passage)
    if stage == "nodes":
        lines += [words["triples"], *triple_lines(triples)]
    if stage == "tree":
        lines += [words["nodes"], *node_lines(nodes)]
    return "\n".join([*lines, words[stage or "whole"]])


def parted(text: str) -> tuple[str, str]:
    """Population and passage of a text, each on one line."""
    before, at, after = text.partition("@")
    return (" ".join(before.split()) if at else "", " ".join((after if at else before).split()))


def nodes_in_order(text: str, tree: DecisionTree) -> list[Node]:
    """The nodes of a tree that have triples, each once, in the order in which their first objects stand in the text."""

    def place(node: Node) -> int:
        spans = [locate(text, triple).object for triple in node.triples]
        return min((span.start for span in spans if span is not None), default=len(text))

    ordered = in_text_order(text, tree)
    return sorted(dict.fromkeys(node for node in ordered.nodes if not node.is_empty), key=place)


def completion(record: TreeRecord, level: Level = 0, stage: Stage | None = None) -> str:
    """What the model is to write for a record, see :func:`prompt`; empty for the first two steps of a tree without a triple.

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

    Its recipe says ``template: {prompt: "{source}"}``. A tree without any triple gives no row for a step of the pipeline.

    Args:
        stage: a step of the pipeline, or "all" for the three of each record one after the other.

    Raises:
        GatewiseError: level or stage is unknown, or a tree without triples has a text that is in neither language.
    """
    if level not in LEVELS:
        raise GatewiseError(f"the level is {level!r}: expected 0 (tree), 1 (triples, tree) or 2 (triples, nodes, tree)")
    if stage is not None and stage not in (*STAGES, "all"):
        raise GatewiseError(f"the stage is {stage!r}: expected one of {', '.join(STAGES)}, or all")
    steps: tuple[Stage | None, ...] = STAGES if stage == "all" else (stage,)
    rows = []
    for record in records:
        language = record.tree.language if record.tree.triples else detect_language(record.text, f"record {record.number}")
        triples, nodes = triples_in_order(record.text, record.tree), nodes_in_order(record.text, record.tree)
        for step in steps:
            if step is not None and not triples:
                continue
            source = prompt(record.text, language, step, triples=triples, nodes=nodes)
            kind = {"level": level} if step is None else {"stage": step}
            rows.append({"source": source, "target": completion(record, level, step), "language": language, **kind})
    return rows
