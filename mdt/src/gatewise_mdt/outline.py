r"""The outline of a tree: indented lines that people read and edit, and that are read back to the same tree.

    if all:
      - adults with gout | clinical manifestation | acute flare
      - adults with gout | basic condition | normal kidney function
    yes:
      do:
        - adults with gout | drug therapy | colchicine
    no:
      no recommendation

``if``, ``if all`` and ``if any`` head a condition with one triple, several joined by "and", several joined by "or"; ``do``, ``do
all`` and ``do any`` a decision. Indentation only has to show what is inside what. A ``\`` before ``|`` or ``\`` takes its meaning
away, ``\n`` and ``\r`` are line breaks. Lines that begin with ``#`` and empty lines do not count.
"""

import re
from collections.abc import Sequence
from typing import Any

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.tree import DecisionTree, Node

_JOINED = {"null": "", "and": " all", "or": " any"}
_HEAD = re.compile(r"(if|do)(?: (all|any))?:", re.IGNORECASE)
_RELS = {None: "null", "all": "and", "any": "or"}
_EMPTY = "no recommendation"
_UNESCAPED = {"\\": "\\", "|": "|", "n": "\n", "r": "\r"}


def outline_of(tree: DecisionTree, comments: Sequence[str] = ()) -> str:
    """The outline of a tree, ending in a line break.

    Args:
        comments: for each node a line that does not count, to stand above it; empty for none.
    """
    lines: list[str] = []
    to_do: list[tuple[int | str, int]] = [(0, 0)]
    while to_do:
        what, depth = to_do.pop()
        pad = "  " * depth
        if isinstance(what, str):
            lines.append(f"{pad}{what}:")
            continue
        node = tree.nodes[what]
        lines += [f"{pad}# {comments[what]}"] if comments and comments[what] else []
        lines += [pad + line for line in _node_lines(node)]
        if (both := tree.children[what]) is not None:
            to_do += [(both[1], depth + 1), ("no", depth), (both[0], depth + 1), ("yes", depth)]
    return "\n".join(lines) + "\n"


def _node_lines(node: Node) -> list[str]:
    if node.is_empty:
        return [_EMPTY]
    head = f"{'if' if node.is_condition else 'do'}{_JOINED[node.logical_rel]}:"
    return [head, *("  - " + " | ".join(map(escaped, triple)) for triple in node.triples)]


def tree_of(text: str, where: str = "") -> DecisionTree:
    """The tree that an outline describes.

    Raises:
        GatewiseError: names the line, what was given and what was expected.
    """
    reader = _Reader(text, where)
    return _checked(reader, _numbered(reader))


def repaired_tree(text: str, where: str = "") -> tuple[DecisionTree, list[str]]:
    """:meth:`DecisionTree.repaired` of an outline: the tree, and what was put right in its triples and how they are joined.

    Raises:
        GatewiseError: as :func:`tree_of`.
    """
    reader = _Reader(text, where, unchecked=True)
    lines, nodes = zip(*_numbered(reader), strict=True)
    mended, notes = checks.repaired_parts(nodes)
    tree = _checked(reader, list(zip(lines, mended, strict=True)))
    return tree, [f"{where}: {note}" if where else note for note in notes]


def _checked(reader: "_Reader", lines_and_nodes: list[tuple[int, dict[str, Any]]]) -> DecisionTree:
    for number, node in lines_and_nodes:
        try:
            checks.check_node(node["role"], [checks.triple_parts(triple) for triple in node["triples"]], node["logical_rel"])
        except checks.TreeError as fault:
            raise GatewiseError(reader.at(number, fault.message)) from None
    return DecisionTree.from_preorder([node for _, node in lines_and_nodes], reader.where)


def _numbered(reader: "_Reader") -> list[tuple[int, dict[str, Any]]]:
    """The nodes in pre-order, each with its first line."""
    nodes: list[tuple[int, dict[str, Any]]] = []
    # What is still to come: a node, or the word that heads a child, each inside a line of this indentation.
    waiting: list[tuple[str, int]] = [("node", -1)]
    while waiting:
        what, outside = waiting.pop()
        number, indent, content = reader.next(what, outside)
        if what != "node":
            if content.lower() != f"{what}:":
                raise reader.fault(number, content, f'"{what}:"')
            waiting.append(("node", indent))
            continue
        if content.lower().rstrip(".") == _EMPTY:
            nodes.append((number, {"role": "D", "triples": [], "logical_rel": "null"}))
            continue
        head = _HEAD.fullmatch(content)
        if head is None:
            raise reader.fault(number, content, '"if:", "if all:", "if any:", "do:", "do all:", "do any:" or "no recommendation"')
        word, joined = head[1].lower(), (head[2] or "").lower() or None
        triples = reader.triples(number)
        nodes.append((number, {"role": "C" if word == "if" else "D", "triples": triples, "logical_rel": _RELS[joined]}))
        if word == "if":
            waiting += [("no", indent - 1), ("yes", indent - 1)]
    reader.expect_end()
    return nodes


class _Reader:
    """The lines that count, one after the other."""

    def __init__(self, text: str, where: str, *, unchecked: bool = False) -> None:
        self.where, self.unchecked = where, unchecked
        self.lines: list[tuple[int, int, str]] = []
        for number, line in enumerate(text.split("\n"), start=1):
            content = line.strip()
            if content and not content.startswith("#"):
                wide = line.expandtabs(4)
                self.lines.append((number, len(wide) - len(wide.lstrip()), content))
        self.position = 0

    def next(self, what: str, outside: int) -> tuple[int, int, str]:
        expected = "a condition or decision" if what == "node" else f'"{what}:"'
        if self.position == len(self.lines):
            after = self.lines[-1][0] if self.lines else 1
            raise GatewiseError(self.at(after, f"the outline ends here, expected {expected}"))
        number, indent, content = self.lines[self.position]
        if indent <= outside:
            raise self.fault(number, content, f"{expected}, further to the right")
        self.position += 1
        return number, indent, content

    def triples(self, head: int) -> list[list[str]]:
        found = []
        while self.position < len(self.lines) and self.lines[self.position][2].startswith("-"):
            number, _, content = self.lines[self.position]
            parts = split(content[1:])
            try:
                found.append(parts if self.unchecked else list(checks.triple_parts(parts)))
            except checks.TreeError as fault:
                raise GatewiseError(self.at(number, fault.message)) from None
            self.position += 1
        if not found:
            raise GatewiseError(self.at(head, 'no triple follows, expected lines such as "- subject | relation | object"'))
        return found

    def expect_end(self) -> None:
        if self.position < len(self.lines):
            number, _, content = self.lines[self.position]
            raise self.fault(number, content, "the end: the tree is complete above")

    def at(self, number: int, message: str) -> str:
        return ", ".join(filter(None, (self.where, f"line {number}"))) + f": {message}"

    def fault(self, number: int, content: str, expected: str) -> GatewiseError:
        return GatewiseError(self.at(number, f"found {checks.shown(content)}, expected {expected}"))


def escaped(part: str) -> str:
    r"""A part of a triple on one line, without a bare ``|``."""
    return part.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n").replace("\r", "\\r")


def split(line: str) -> list[str]:
    r"""The parts between bare ``|``, with what was escaped put back. A ``\`` before any other character stays."""
    parts, current, characters = [], [], iter(line)
    for character in characters:
        if character == "\\":
            following = next(characters, "")
            current.append(_UNESCAPED.get(following, character + following))
        elif character == "|":
            parts.append("".join(current).strip())
            current = []
        else:
            current.append(character)
    return [*parts, "".join(current).strip()]
