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

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import from_short, nearest, short
from gatewise_mdt.spans import in_text_order, locate
from gatewise_mdt.tree import DecisionTree, LogicalRel, Node, Role, Triple

Level = Literal[0, 1, 2]
LEVELS: tuple[Level, ...] = (0, 1, 2)

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


# ---- the way back ----

_SECTIONS = ("triples", "nodes", "tree")
_NUMBERED = re.compile(r"(\d{1,6})\.\s*(.*)", re.DOTALL)
_NAMED = re.compile(r"([A-Z]{1,6})\.\s*(.*)", re.DOTALL)
_LOOSE_NAMED = re.compile(r"([A-Z]{1,6})[.)]\s*(.*)", re.DOTALL | re.IGNORECASE)
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
        nodes: the nodes that were given a name, in their order (level 2 and the pipeline), as far as they are valid.
    """

    tree: DecisionTree | None
    notes: tuple[str, ...] = ()
    triples: tuple[Triple, ...] = ()
    nodes: tuple[Node, ...] = ()


def parse(output: str, where: str = "") -> DecisionTree:
    """The tree in a model's output, which must be exactly as :func:`gatewise_mdt.formats.lines.linearise` writes it.

    Raises:
        GatewiseError: names the line, what was given and what was expected.
    """
    reader = _Reader(output, lenient=False, where=where)
    reader.read()
    nodes = [reader.checked(node) for node in reader.tree]
    return DecisionTree.from_preorder(nodes, where)


def parse_lenient(output: Any) -> Parsed:
    """The tree in a model's output, as well as it can be read. Raises nothing, whatever the output.

    Lines that say nothing are left out; relations may be misspelt; a triple that cannot be read is left out, and so is one that is
    named by a number which several have; children that are missing at the end are taken as "no recommendation"; nodes after the
    tree is complete are left out. All of this is noted. No tree is given where it could say something else than was meant: with a
    condition that has no triple left, a name that several nodes have, or a node that is joined both by "and" and by "or".
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
    """A node.

    Attributes:
        unclear: why nobody can tell what it says; empty for most.
    """

    number: int
    role: Role
    logical_rel: LogicalRel
    triples: list[Triple] = field(default_factory=list)
    unclear: str = ""

    def says(self) -> tuple[Any, ...]:
        """What it says, wherever it stands."""
        return self.role, self.logical_rel, set(self.triples), self.unclear


class _Reader:
    """Reads line by line; a fault is raised, or noted in a lenient reading."""

    def __init__(self, output: str, *, lenient: bool, where: str = "") -> None:
        self.lines = output.strip("\n").split("\n")
        self.lenient, self.where = lenient, where
        self.notes: list[str] = []
        self.main: str | None = None
        # None: it could not be read, or was given to several.
        self.numbered: dict[int, Triple | None] = {}
        self.named: dict[str, _Line | None] = {}
        self.nodes: list[_Line] = []
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
            elif (name := self._name(line)) is not None:
                self.tree.append(self._called(number, name))
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
        if count in self.numbered:
            self.fault(number, f"the number {count} was given to a triple above already")
            triple = triple if triple == self.numbered[count] else None
        self.numbered[count] = triple

    def _named(self, number: int, line: str) -> None:
        match = (_LOOSE_NAMED if self.lenient else _NAMED).fullmatch(line)
        if match is None:
            self.fault(number, f'found {checks.shown(line)}, expected a node with its name, such as "A. C: 1", or "tree:"')
            if (letter := re.match(r"([A-Z])\b", line, re.IGNORECASE)) and (name := letter[1].upper()) not in ("C", "D"):
                self.named.setdefault(name, None)
            return
        name = match[1].upper()
        if name != letters(len(self.named)) and not self.lenient:
            self.fault(number, f"the node has the name {name}, expected {letters(len(self.named))}")
        node = self._node(number, match[2])
        known = self.named.get(name)
        same = node is not None and known is not None and node.says() == known.says()
        if node is not None and not same:
            self.nodes.append(node)
        if name in self.named:
            self.fault(number, f"the name {name} was given to a node above already")
            node = node if same else None
        if name == "D":
            self.fault(number, "the node has the name D, which is an empty decision too")
            node = None
        self.named[name] = node

    def _name(self, line: str) -> str | None:
        """The name of a node that a line of the tree is; leniently also in small letters, before a colon, or that no node has."""
        name = line.rstrip(".:").upper() if self.lenient else line.rstrip(".")
        if name in self.named:
            return name
        longest = max(map(len, self.named), default=0)
        is_one = self.lenient and name.isascii() and name.isalpha() and len(name) <= longest and name not in ("C", "D")
        return name if is_one else None

    def _called(self, number: int, name: str) -> _Line:
        """The node of a name, at another place."""
        known = self.named.get(name)
        if known is not None:
            return replace(known, number=number, triples=list(known.triples))
        # Without it the nodes below would come to other places.
        return _Line(
            number, "D", "null", unclear=f"nobody can tell which node {name} is, which is missing, could not be read or is several"
        )

    def _node(self, number: int, line: str) -> _Line | None:
        match = (_LOOSE_NODE if self.lenient else _NODE).fullmatch(line)
        if match is None:
            if line or not self.lenient:
                self.fault(number, f'found {checks.shown(line)}, expected a node such as "C: subject | relation | object"')
            return None
        role: Role = "C" if match[1].upper() == "C" else "D"
        node, joined = _Line(number, role, "null"), [match[2].lower()]
        items = [] if match[3] is None else list(_split(match[3], ";"))
        if self.lenient and len(items) > 1 and not items[-1].strip():
            items.pop()
        for place, item in enumerate(items, start=1):
            if self.lenient or place == len(items):
                item, after = self._join(item)
                joined.append(after)
            triple = self._item(number, item)
            if triple is not None and triple in node.triples:
                self.fault(number, f"the triple {checks.shown(list(triple))} comes twice, expected each triple once in a node")
            elif triple is not None:
                node.triples.append(triple)
        joins = dict.fromkeys(filter(None, joined))
        if len(joins) > 1:
            said = " and ".join(f'"{word}"' for word in joins)
            self.fault(number, f"the triples are joined by {said}, expected one of them")
        if "and" in joins and "or" in joins:
            node.unclear = 'its triples are joined both by "and" and by "or"'
        node.logical_rel = "and" if "and" in joins else "or" if "or" in joins else "null"
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
        count = int(text) if len(text) <= 6 else -1
        known = self.numbered.get(count)
        if known is None and count in self.numbered:
            self.fault(number, f"no one triple has the number {count}: it could not be read, or several have it")
        elif known is None:
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
        if relation != raw[1] and from_short(" ".join(raw[1].casefold().split())) is None:
            self.fault(number, f'the relation {checks.shown(raw[1])} is read as "{relation}"')
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
        for line in self.nodes:
            self.mend(line)
            if line.triples and not line.unclear:
                yield Node(role=line.role, triples=tuple(line.triples), logical_rel=line.logical_rel)

    def mend(self, line: _Line) -> None:
        """Makes the join fit the number of triples."""
        joined = line.logical_rel
        line.logical_rel = checks.fitting_join(joined, len(line.triples))
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
            if line.unclear:
                raise GatewiseError(f"line {line.number}: {line.unclear}")
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
