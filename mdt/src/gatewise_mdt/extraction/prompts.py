"""What a causal model reads and what it is to write: for the whole tree at once, and for each stage of the pipeline.

| stage     | the prompt shows       | the model writes                                                       |
|-----------|------------------------|------------------------------------------------------------------------|
| (none)    | the text               | level 0 the tree; 1 triples, then the tree; 2 triples, nodes, then the tree |
| `triples` | the text               | the triples, numbered                                                  |
| `nodes`   | text, triples          | the nodes, named by letters, each with the numbers of its triples      |
| `tree`    | text, nodes            | the tree as the nodes' letters in pre-order, ``D`` for an empty leaf    |

Everything written is of :mod:`gatewise_mdt.formats.lines`. The prompt of the whole tree is the same for all levels: an adapter was
trained for one of them and begins as it learnt to. The stages' prompts list triples and nodes in the order of the text, never in
that of the tree, which would give the answer away.
"""

from collections.abc import Sequence
from typing import Literal

from gatewise_mdt.formats.lines import node_lines, triple_lines
from gatewise_mdt.relations import Language
from gatewise_mdt.spans import in_text_order, locate
from gatewise_mdt.tree import DecisionTree, Node, Triple

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
        stage: of the pipeline; None for the whole tree.
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
