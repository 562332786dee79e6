"""Reads the lines that a causal model writes for a tree, see :mod:`gatewise.mdt.linearise`: strictly, or as well as it goes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.mdt import checks
from gatewise.mdt.relations import from_short, nearest
from gatewise.mdt.tree import DecisionTree, LogicalRel, Node, Role, Triple

_SECTIONS = ("triples", "nodes", "tree")
_NUMBERED = re.compile(r"(\d{1,6})\.\s*(.*)", re.DOTALL)
_NAMED = re.compile(r"([A-Z]{1,6})\.\s*(.*)", re.DOTALL)
_NODE = re.compile(r"([CD])()(?::(.*))?", re.DOTALL)
_LOOSE_NODE = re.compile(r"[-*\s]*([CD])\b[\s,]*(and\b|or\b|null\b|)\s*(?::(.*))?", re.DOTALL | re.IGNORECASE)
_UNESCAPED = {"n": "\n", "r": "\r"}
_MOST_NOTES = 50


@dataclass(frozen=True)
class Parsed:
    """What could be read of a model's output.

    Attributes:
        tree: the tree; None when there is none to be had, and the last note says why.
        notes: what was wrong, and what was done about it, each with its line; none for a clean output.
        triples: all triples read, in a tree or not, each once.
        nodes: the nodes that were given a name, in their order (level 2 and the pipeline), as far as they are sound.
    """

    tree: DecisionTree | None
    notes: tuple[str, ...] = ()
    triples: tuple[Triple, ...] = ()
    nodes: tuple[Node, ...] = ()


def parse(output: str, where: str = "") -> DecisionTree:
    """The tree in a model's output, which must be exactly as :func:`gatewise.mdt.linearise.linearise` writes it.

    Raises:
        GatewiseError: names the line, what was given and what was expected.
    """
    reader = _Reader(output, lenient=False, where=where)
    reader.read()
    nodes = [reader.checked(node) for node in reader.tree]
    return DecisionTree.from_preorder(nodes, where)


def parse_lenient(output: Any) -> Parsed:
    """The tree in a model's output, as well as it can be read. Raises nothing, whatever the output.

    Lines that say nothing are left out; relations may be misspelt; a triple that cannot be read is left out; children that are
    missing at the end are taken as "no recommendation"; nodes after the tree is complete are left out. Every such step is noted. A
    condition that has no triple left gives no tree, as no side of it can be trusted.
    """
    if not isinstance(output, str):
        return Parsed(None, (f"the output is {checks.shown(output)}, expected text",))
    reader = _Reader(output, lenient=True)
    reader.read()
    triples, nodes = tuple(reader.seen), tuple(reader.named_nodes())
    try:
        tree = DecisionTree.from_preorder(reader.completed())
    except GatewiseError as error:
        return Parsed(None, (*reader.notes, f"no tree: {error}"), triples, nodes)
    return Parsed(tree, tuple(reader.notes), triples, nodes)


@dataclass
class _Line:
    number: int
    role: Role
    logical_rel: LogicalRel
    triples: list[Triple] = field(default_factory=list)


class _Reader:
    """Reads line by line; a fault is raised, or noted in a lenient reading."""

    def __init__(self, output: str, *, lenient: bool, where: str = "") -> None:
        self.lines = output.strip("\n").split("\n")
        self.lenient, self.where = lenient, where
        self.notes: list[str] = []
        self.main: str | None = None
        self.numbered: dict[int, Triple] = {}
        self.named: dict[str, _Line] = {}
        self.tree: list[_Line] = []
        self.seen: dict[Triple, None] = {}

    def read(self) -> None:
        section = "tree"
        for number, raw in enumerate(self.lines, start=1):
            line = raw.strip()
            heading = line.removesuffix(":").lower()
            if line.endswith(":") and heading in _SECTIONS:
                section = heading
            elif section == "triples":
                self._numbered(number, line)
            elif section == "nodes":
                self._named(number, line)
            elif (known := self.named.get(line.rstrip("."))) is not None:
                self.tree.append(_Line(number, known.role, known.logical_rel, list(known.triples)))
            elif (node := self._node(number, line)) is not None:
                self.tree.append(node)

    def fault(self, number: int, message: str) -> None:
        """Raises, or notes and goes on."""
        sentence = ", ".join(filter(None, (self.where, f"line {number}"))) + f": {message}"
        if not self.lenient:
            raise GatewiseError(sentence)
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(sentence)

    def _numbered(self, number: int, line: str) -> None:
        match = _NUMBERED.fullmatch(line)
        if match is None:
            self.fault(number, f'found {checks.shown(line)}, expected a numbered triple or "tree:"')
            return
        count = int(match[1])
        if count != len(self.numbered) + 1 and not self.lenient:
            self.fault(number, f"the triple has the number {count}, expected {len(self.numbered) + 1}")
        triple = self._triple(number, match[2])
        if triple is not None:
            self.numbered[count] = triple

    def _named(self, number: int, line: str) -> None:
        match = _NAMED.fullmatch(line)
        if match is None:
            self.fault(number, f'found {checks.shown(line)}, expected a node with its name, such as "A. C: 1", or "tree:"')
            return
        node = self._node(number, match[2])
        if node is not None:
            self.named[match[1]] = node

    def _node(self, number: int, line: str) -> _Line | None:
        match = (_LOOSE_NODE if self.lenient else _NODE).fullmatch(line)
        if match is None:
            if line or not self.lenient:
                self.fault(number, f'found {checks.shown(line)}, expected a node such as "C: subject | relation | object"')
            return None
        role: Role = "C" if match[1].upper() == "C" else "D"
        node, joined = _Line(number, role, "null"), match[2].lower()
        items = [] if match[3] is None else list(_split(match[3], ";"))
        if self.lenient and len(items) > 1 and not items[-1].strip():
            items.pop()
        for place, item in enumerate(items, start=1):
            if self.lenient or place == len(items):
                item, after = self._join(item)
                joined = after or joined
            triple = self._item(number, item)
            if triple is not None and triple in node.triples:
                self.fault(number, f"the triple {checks.shown(list(triple))} comes twice, expected each triple once in a node")
            elif triple is not None:
                node.triples.append(triple)
        node.logical_rel = "and" if joined == "and" else "or" if joined == "or" else "null"
        return node

    def _join(self, item: str) -> tuple[str, str]:
        """An item without the join after it, which is one part more than a triple or its number has; and the join, or nothing."""
        *parts, end = _split(item, "|")
        word = end.strip().lower() if self.lenient else end.strip()
        if len(parts) in (1, 3) and word in (("and", "or", "null") if self.lenient else ("and", "or")):
            return "|".join(parts), word
        return item, ""

    def _item(self, number: int, item: str) -> Triple | None:
        """A triple, or the number of one."""
        text = item.strip()
        if not (text.isascii() and text.isdigit()):
            return self._triple(number, item)
        known = self.numbered.get(int(text)) if len(text) <= 6 else None
        if known is None:
            self.fault(number, f"the triple {text[:20]} was not written above, expected one of 1 to {len(self.numbered)}")
        return known

    def _triple(self, number: int, item: str) -> Triple | None:
        raw = [part.strip() for part in _split(item, "|")]
        if len(raw) != 3:
            self.fault(number, f"found {checks.shown(item.strip())}, expected subject | relation | object")
            return None
        if raw[0] == "~" and self.main is None:
            self.fault(number, 'the first triple has "~" for its subject, expected the subject itself')
            return None
        subject = self.main if raw[0] == "~" else _unescaped(raw[0])
        relation = from_short(raw[1]) or (self.lenient and nearest(raw[1])) or raw[1]
        try:
            parts = checks.triple_parts([subject, relation, _unescaped(raw[2])])
        except checks.TreeError as fault:
            self.fault(number, fault.message)
            return None
        triple = Triple(subject=parts[0], relation=parts[1], object=parts[2])
        self.main = self.main or triple.subject
        self.seen[triple] = None
        return triple

    def checked(self, line: _Line) -> dict[str, Any]:
        """A node in the published format; its own faults are named with its line."""
        try:
            checks.check_node(line.role, [(t.subject, t.relation, t.object) for t in line.triples], line.logical_rel)
        except checks.TreeError as fault:
            self.fault(line.number, fault.message)
        triples = [list(triple) for triple in line.triples]
        return {"role": line.role, "triples": triples, "logical_rel": line.logical_rel}

    def named_nodes(self) -> Iterator[Node]:
        """The nodes of the part "nodes" that can stand in a tree."""
        for line in self.named.values():
            self.mend(line)
            if line.triples:
                yield Node(role=line.role, triples=tuple(line.triples), logical_rel=line.logical_rel)

    def mend(self, line: _Line) -> None:
        """Makes the join fit the number of triples."""
        joined = line.logical_rel
        if len(line.triples) <= 1:
            line.logical_rel = "null"
        elif joined == "null":
            line.logical_rel = "and"
        if line.logical_rel != joined:
            self.fault(line.number, f'"{joined}" does not fit the number of triples and is read as "{line.logical_rel}"')

    def completed(self) -> list[dict[str, Any]]:
        """The nodes in the published format, with what is missing or over put right where that can be done."""
        lines = list(self.tree)
        if lines and lines[-1].role == "C" and not lines[-1].triples:
            self.fault(lines.pop().number, "the last condition has no triple that can be read, and is left out")
        nodes: list[dict[str, Any]] = []
        waiting = 1
        for line in lines:
            if not waiting:
                self.fault(line.number, "the tree is complete above; this node and what follows is left out")
                break
            waiting += 1 if line.role == "C" else -1
            self.mend(line)
            triples = [list(triple) for triple in line.triples]
            nodes.append({"role": line.role, "triples": triples, "logical_rel": line.logical_rel})
        if waiting and nodes:
            self.fault(len(self.lines), f"the output ends with {waiting} nodes missing, which are read as no recommendation")
            # No more than makes the depth check refuse the tree.
            nodes += [{"role": "D", "triples": [], "logical_rel": "null"}] * waiting
        return nodes


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
