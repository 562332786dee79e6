r"""A tree as the lines of text that a causal model writes, and the way back.

One line a node, in pre-order: role, the triples and, of several, how they are joined.

    C: adults with gout | sign | acute flare
    D: ~ | drug | colchicine; ~ | drug | naproxen | or
    D

A model decides whether there is one more triple when it comes to its place, and how they are joined when it has written them. (With
"D or:" at the head it has to know both before it has read on, and then writes the commonest, no join: on Text2MDT every first
condition of a model had a single triple, where 58 of 100 gold ones have several.)

``~`` stands for the subject of the first triple written, which most triples share; relations are one word each
(:data:`gatewise.mdt.relations.SHORT`; in Chinese their names). ``\`` takes the meaning of ``|``, ``;``, ``~`` and ``\`` away;
``\n`` and ``\r`` are line breaks. An empty ``D`` recommends nothing.

With chain of thought (Zhu et al., arXiv 2401.02034) the model first writes the triples (level 1), then the nodes too (level 2):

    triples:                                   triples:
    1. adults with gout | sign | acute flare   1. adults with gout | sign | acute flare
    2. ~ | drug | colchicine                   2. ~ | drug | colchicine
    tree:                                      nodes:
    C: 1                                       A. C: 1
    D: 2                                       B. D: 2
    D                                          tree:
                                               A
                                               B
                                               D

Later parts name what earlier ones wrote, so that nothing is written twice. ``by_number=False`` writes everything out instead; the
parser reads both.
"""

from collections.abc import Sequence
from typing import Literal

from gatewise.errors import GatewiseError
from gatewise.mdt.parse import Parsed, parse, parse_lenient
from gatewise.mdt.relations import short
from gatewise.mdt.spans import in_text_order, locate
from gatewise.mdt.tree import DecisionTree, Node, Triple

Level = Literal[0, 1, 2]
LEVELS: tuple[Level, ...] = (0, 1, 2)
__all__ = [
    "LEVELS",
    "Level",
    "Parsed",
    "escaped",
    "letters",
    "linearise",
    "node_lines",
    "parse",
    "parse_lenient",
    "triple_lines",
    "triples_in_order",
]

_LETTERS = "ABEFGHIJKLMNOPQRSTUVWXYZ"
_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", ";": "\\;", "\n": "\\n", "\r": "\\r"})


def linearise(tree: DecisionTree, level: int = 0, *, text: str | None = None, by_number: bool = True) -> str:
    """The lines that a model is to write for a tree; no line break at the end.

    Args:
        level: 0 the tree; 1 triples, then the tree; 2 triples, nodes, then the tree.
        text: the passage. If given, triples are in the order of their objects in it, in each node and in the list of triples.
        by_number: in levels 1 and 2, name triples by number and nodes by letter instead of writing them again.

    Raises:
        GatewiseError: the level is none of the three.
    """
    if level not in LEVELS:
        raise GatewiseError(f"the level is {level!r}: expected 0 (tree), 1 (triples, tree) or 2 (triples, nodes, tree)")
    if text is not None:
        tree = in_text_order(text, tree)
    written = _Written()
    if level == 0:
        return "\n".join(written.node(node) for node in tree.nodes)
    triples = _ordered(tree.triples, text)
    lines = ["triples:", *(f"{number}. {written.triple(triple)}" for number, triple in enumerate(triples, start=1))]
    if by_number:
        written.numbers = {triple: number for number, triple in enumerate(triples, start=1)}
    names: dict[Node, str] = {}
    if level == 2:
        nodes = dict.fromkeys(node for node in tree.nodes if not node.is_empty)
        names = {node: letters(i) for i, node in enumerate(nodes)}
        lines += ["nodes:", *(f"{name}. {written.node(node)}" for node, name in names.items())]
    short_names = names if by_number else {}
    return "\n".join([*lines, "tree:", *(short_names.get(node) or written.node(node) for node in tree.nodes)])


def triple_lines(triples: Sequence[Triple]) -> list[str]:
    """The triples as numbered lines, as level 1 begins."""
    written = _Written()
    return [f"{number}. {written.triple(triple)}" for number, triple in enumerate(triples, start=1)]


def node_lines(nodes: Sequence[Node], triples: Sequence[Triple] = ()) -> list[str]:
    """The nodes as named lines, as level 2 has them: with the numbers of their triples in a list, or written out without one."""
    written = _Written()
    written.numbers = {triple: number for number, triple in enumerate(triples, start=1)}
    return [f"{letters(i)}. {written.node(node)}" for i, node in enumerate(nodes)]


def triples_in_order(text: str, tree: DecisionTree) -> list[Triple]:
    """The triples of a tree, each once, in the order of their objects in the text."""
    return _ordered(in_text_order(text, tree).triples, text)


def letters(number: int) -> str:
    """The name of a node, from 0: A, B, E, …, Z, AA, AB, …; without C and D, which are roles."""
    name = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, len(_LETTERS))
        name = _LETTERS[digit] + name
    return name


def _ordered(triples: Sequence[Triple], text: str | None) -> list[Triple]:
    if text is None:
        return list(triples)
    ends = len(text)

    def place(triple: Triple) -> int:
        found = locate(text, triple).object
        return found.start if found else ends

    return sorted(triples, key=place)


class _Written:
    """Writes triples and nodes one after the other; triples that have a number are named by it.

    Attributes:
        main: the subject of the first triple written, for which "~" stands from then on.
    """

    def __init__(self) -> None:
        self.main: str | None = None
        self.numbers: dict[Triple, int] = {}

    def triple(self, triple: Triple) -> str:
        subject = "~" if triple.subject == self.main else escaped(triple.subject)
        self.main = self.main or triple.subject
        return f"{subject} | {short(triple.relation)} | {escaped(triple.object)}"

    def node(self, node: Node) -> str:
        if node.is_empty:
            return node.role
        items = [str(self.numbers[triple]) if self.numbers else self.triple(triple) for triple in node.triples]
        joined = "" if node.logical_rel == "null" else f" | {node.logical_rel}"
        return f"{node.role}: {'; '.join(items)}{joined}"


def escaped(part: str) -> str:
    """A subject or object as it is written between the marks."""
    made = part.translate(_ESCAPES)
    return "\\~" if made == "~" else made
