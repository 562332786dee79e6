r"""A tree as the lines of text that a causal model writes, and the way back.

One line a node, in pre-order: role, the triples and, of several, how they are joined.

    C: adults with gout | sign | acute flare
    D: ~ | drug | colchicine; ~ | drug | naproxen | or
    D

A model decides whether there is one more triple when it comes to its place, and how they are joined when it has written them. (With
"D or:" at the head it has to know both before it has read on, and then writes the commonest, no join: on Text2MDT every first
condition of a model had a single triple, where 58 of 100 gold ones have several.)

``~`` stands for the subject of the first triple written, which most triples share; relations are one word each
(:data:`gatewise_mdt.relations.SHORT`; in Chinese their names). ``\`` takes the meaning of ``|``, ``;``, ``~`` and ``\`` away;
``\n`` and ``\r`` are line breaks. An empty ``D`` recommends nothing.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import from_short, short
from gatewise_mdt.spans import in_text_order
from gatewise_mdt.tree import DecisionTree

_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", ";": "\\;", "\n": "\\n", "\r": "\\r"})
_UNESCAPED = {"n": "\n", "r": "\r"}
_NODE = re.compile(r"[-*\s]*([CD])\s*(?::(.*))?", re.DOTALL | re.IGNORECASE)
_MOST_NOTES = 50


def linearise(tree: DecisionTree, *, text: str | None = None) -> str:
    """The lines that a model is to write for a tree; no line break at the end.

    Args:
        text: the passage. If given, the triples of each node are in the order of their objects in it.
    """
    if text is not None:
        tree = in_text_order(text, tree)
    main = None  # the subject of the first triple, for which "~" stands from then on
    lines = []
    for node in tree.nodes:
        items = []
        for triple in node.triples:
            subject = "~" if triple.subject == main else escaped(triple.subject)
            main = main or triple.subject
            items.append(f"{subject} | {short(triple.relation)} | {escaped(triple.object)}")
        joined = "" if node.logical_rel == "null" else f" | {node.logical_rel}"
        lines.append(node.role if node.is_empty else f"{node.role}: {'; '.join(items)}{joined}")
    return "\n".join(lines)


def escaped(part: str) -> str:
    """A subject or object as it is written between the marks."""
    made = part.translate(_ESCAPES)
    return "\\~" if made == "~" else made


# ---- the way back ----


class Parsed(NamedTuple):
    """What could be read of a model's output.

    Attributes:
        tree: the tree; None when there is none to be had, and the last note says why.
        notes: what was wrong, and what was done about it, each with its line; none for a clean output.
    """

    tree: DecisionTree | None
    notes: tuple[str, ...] = ()


def parse(output: str) -> DecisionTree:
    """The tree in a model's output, which must have nothing that :func:`parse_lenient` notes.

    Raises:
        GatewiseError: names the line, what was given and what was expected.
    """
    tree, notes = parse_lenient(output)
    if tree is None or notes:
        raise GatewiseError(notes[0])
    return tree


def parse_lenient(output: str) -> Parsed:
    """The tree in a model's output, as well as it can be read. Raises nothing, whatever the text.

    Lines that are no nodes and triples that cannot be read are left out, a join is made to fit the number of triples, children that
    are missing at the end are taken as "no recommendation", and nodes after the tree is complete are left out. All of this is
    noted. There is no tree where a condition has no triple left.
    """
    reader = _Reader()
    try:
        tree = DecisionTree.from_preorder(reader.completed(output))
    except GatewiseError as error:
        return Parsed(None, (*reader.notes, f"no tree: {error}"))
    return Parsed(tree, tuple(reader.notes))


class _Line(NamedTuple):
    """A node and the number of its line."""

    number: int
    role: str
    triples: list[tuple[str, str, str]]
    join: str


class _Reader:
    """Reads line by line, and notes what is wrong."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.main: str | None = None  # the subject for which "~" stands

    def note(self, number: int, message: str) -> None:
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(f"line {number}: {message}")

    def completed(self, output: str) -> list[dict[str, Any]]:
        """The nodes in the published format, with what is missing or over put right where that can be done."""
        lines = []
        for number, raw in enumerate(output.strip("\n").split("\n"), start=1):
            if found := _NODE.fullmatch(raw.strip()):
                lines.append(self._node(number, found[1].upper(), found[2]))
            elif raw.strip():
                self.note(number, f'found {checks.shown(raw.strip())}, expected a node such as "C: subject | relation | object"')
                if "|" in raw:  # a node: without it all that follows would stand on another side
                    lines.append(_Line(number, "C", [], "null"))
        if lines and lines[-1].role == "C" and not lines[-1].triples:
            self.note(lines.pop().number, "the last condition has no triple that can be read, and is left out")
        nodes: list[dict[str, Any]] = []
        waiting = 1
        for line in lines:
            if not waiting:
                self.note(line.number, "the tree is complete above; this node and what follows is left out")
                break
            waiting += 1 if line.role == "C" else -1
            join = checks.fitting_join(line.join, len(line.triples))
            if join != line.join:
                self.note(line.number, f'"{line.join}" does not fit the number of triples and is read as "{join}"')
            nodes.append({"role": line.role, "triples": line.triples, "logical_rel": join})
        if waiting and nodes:
            self.note(lines[-1].number, f"the output ends with {waiting} nodes missing, which are read as no recommendation")
            nodes += [{"role": "D", "triples": [], "logical_rel": "null"}] * waiting
        return nodes

    def _node(self, number: int, role: str, said: str | None) -> _Line:
        items = [] if said is None else list(_split(said, ";"))
        if len(items) > 1 and not items[-1].strip():
            items.pop()
        join = "null"
        if items:
            *parts, last = _split(items[-1], "|")
            if len(parts) == 3 and last.strip().lower() in ("and", "or"):
                items[-1], join = "|".join(parts), last.strip().lower()
        triples: list[tuple[str, str, str]] = []
        for item in items:
            triple = self._triple(number, item)
            if triple is not None and triple in triples:
                self.note(number, f"the triple {checks.shown(list(triple))} comes twice, expected each triple once in a node")
            elif triple is not None:
                triples.append(triple)
        return _Line(number, role, triples, join)

    def _triple(self, number: int, item: str) -> tuple[str, str, str] | None:
        raw = [part.strip() for part in _split(item, "|")]
        is_first = self.main is None
        if is_first and len(raw) > 1 and raw[0] not in ("", "~"):  # though it may be no triple that can be taken
            self.main = _unescaped(raw[0])
        if len(raw) != 3:
            self.note(number, f"found {checks.shown(item.strip())}, expected subject | relation | object")
            return None
        if raw[0] == "~" and is_first:
            self.note(number, 'the first triple has "~" for its subject, expected the subject itself')
            return None
        subject = self.main if raw[0] == "~" else _unescaped(raw[0])
        try:
            triple = checks.triple_parts([subject, from_short(raw[1]) or raw[1], _unescaped(raw[2])])
        except checks.TreeError as fault:
            self.note(number, fault.message)
            return None
        return triple


def _split(text: str, mark: str) -> Iterator[str]:
    """The pieces between bare marks, escapes left as they are."""
    start = i = 0
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == mark:
            yield text[start:i]
            start = i + 1
        i += 1
    yield text[start:]


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _UNESCAPED.get(match[1], match[1]), text, flags=re.DOTALL)
