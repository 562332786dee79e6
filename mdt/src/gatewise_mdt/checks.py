"""The rules of a decision tree, on plain lists and dictionaries, with messages that name the node.

A tree is a complete pre-order of binary nodes: role ``C`` (condition) has exactly two children and at least one triple, role ``D``
(decision) has no child and may be empty. ``logical_rel`` is "null" for at most one triple and "and" or "or" for more. A triple is
three texts, the middle one a relation of :mod:`gatewise_mdt.relations`, and comes once in a node.

:func:`tree_parts` is the one validation of trees. Two kinds of nodes are held to fewer rules: those that a person is still writing
(``unfinished``), and those of another program that are only to be compared (``foreign``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from gatewise.checks import HALF_A_PAIR, has_half_a_pair
from gatewise_mdt.relations import expected_relations, is_relation

TripleParts = tuple[str, str, str]
NodeParts = tuple[str, list[TripleParts], str]

AS_AND = '"null" over several triples read as "and"'
AS_NULL = '"and" or "or" over at most one triple read as "null"'
ONCE = "a triple given twice counted once"
MAX_DEPTH = 100  # FHIR nests as deep as the tree, and Python's JSON gives up at about 1000
_NODE_KEYS = ("role", "triples", "logical_rel")


class TreeError(ValueError):
    """What is wrong with a tree, and at which node (counted from 1)."""

    def __init__(self, message: str, node: int | None = None) -> None:
        super().__init__(message)
        self.message, self.node = message, node

    def at(self, where: str) -> str:
        """The whole sentence: where, node and what is wrong."""
        place = ", ".join(filter(None, (where, "" if self.node is None else f"node {self.node}")))
        return f"{place}: {self.message}" if place else self.message

    def __str__(self) -> str:
        return self.at("")


def triple_parts(value: Any, *, unfinished: bool = False, foreign: bool = False) -> TripleParts:
    """The three texts of a triple, without the spaces around them.

    Args:
        unfinished: subject and object may still be empty.
        foreign: each of the three may be any text.

    Raises:
        TreeError: it is not three texts that say something, or the relation is unknown.
    """
    if not isinstance(value, list | tuple):
        raise TreeError(f"a triple is {shown(value)}, expected a list of subject, relation and object")
    if len(value) != 3:
        raise TreeError(f"a triple has {len(value)} parts, {shown(value)}, expected three: subject, relation, object")
    for part, name in zip(value, ("subject", "relation", "object"), strict=True):
        if not isinstance(part, str):
            raise TreeError(f"the {name} of a triple is {shown(part)}, expected text")
        if not (unfinished or foreign or part.strip()):
            raise TreeError(f"the {name} of the triple {shown(value)} is empty, expected text")
        if not foreign and has_half_a_pair(part):
            raise TreeError(f"the {name} of a triple {HALF_A_PAIR}")
    subject, relation, object_ = (part.strip() for part in value)
    if not foreign and not is_relation(relation):
        raise TreeError(f"the relation is {shown(relation)}, expected {expected_relations()}")
    return subject, relation, object_


def check_node(role: str, triples: Sequence[TripleParts], logical_rel: str) -> None:
    """Whether role, triples and logical_rel of one node fit together.

    Raises:
        TreeError: an empty condition, a triple that comes twice, or a logical_rel that does not fit the number of triples.
    """
    count = len(triples)
    _check_condition(role, count)
    if len(set(triples)) < count:
        twice = next(triple for i, triple in enumerate(triples) if triple in triples[:i])
        raise TreeError(f"the triple {shown(list(twice))} comes twice, expected each triple once in a node")
    if count <= 1 and logical_rel != "null":
        raise TreeError(f'logical_rel is "{logical_rel}" with {_triples(count)}, expected "null" (it joins two or more)')
    if count > 1 and logical_rel == "null":
        raise TreeError(f'logical_rel is "null" with {_triples(count)}, expected "and" or "or"')


def _check_condition(role: str, count: int) -> None:
    if role == "C" and not count:
        raise TreeError("a condition (role C) without triples, expected at least one (only a decision, role D, may be empty)")


def fitting_join(logical_rel: Any, count: int) -> Any:
    """The logical_rel that goes with the number of triples: "null" for at most one, "and" where nothing joins several."""
    if count <= 1 and logical_rel in ("and", "or", None):
        return "null"
    return "and" if count > 1 and logical_rel in ("null", None) else logical_rel


def check_preorder(roles: Sequence[str]) -> None:
    """Whether roles in pre-order are exactly one binary tree, not too deep.

    Raises:
        TreeError: too few nodes, too many, or more than ``MAX_DEPTH`` levels.
    """
    if not roles:
        raise TreeError("the tree has no nodes, expected at least one (an empty leaf, role D, means no recommendation)")
    waiting = [1]  # the depths at which children are still to come
    for number, role in enumerate(roles, start=1):
        if not waiting:
            over = len(roles) - number + 1
            raise TreeError(
                f"the tree is complete with node {number - 1}, but {over} more {'nodes follow' if over > 1 else 'node follows'}:"
                " expected two children for each condition (role C) and none for a decision (role D)",
                number,
            )
        depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise TreeError(f"the tree is deeper than {MAX_DEPTH} levels, expected a tree that people can read", number)
        if role == "C":
            waiting += [depth + 1, depth + 1]
    if waiting:
        missing = len(waiting)
        raise TreeError(
            f"the tree ends after {len(roles)} nodes with {missing} {'children' if missing > 1 else 'child'} missing: expected"
            " two children for each condition (role C)",
            len(roles),
        )


def children_of(roles: Sequence[str]) -> tuple[tuple[int, int] | None, ...]:
    """For each node of a complete pre-order the positions of its (true, false) children; None for a leaf."""
    children: list[tuple[int, int] | None] = [None] * len(roles)
    done: list[int] = []  # roots of the subtrees behind, the nearest last
    for i in range(len(roles) - 1, -1, -1):
        if roles[i] == "C":
            children[i] = (done.pop(), done.pop())
        done.append(i)
    return tuple(children)


def tree_parts(nodes: Any, *, unfinished: bool = False, foreign: bool = False) -> list[NodeParts]:
    """The checked parts of a tree in the published format.

    Args:
        unfinished: somebody is still writing it: phrases may be empty, a condition may have no triple yet, and what joins the
            triples need not fit their number.
        foreign: it is only to be compared: relations and logical_rel may be any texts, roles in small letters, phrases empty, and a
            triple may come twice.

    Raises:
        TreeError: names the node.
    """
    if not isinstance(nodes, list | tuple):
        raise TreeError(f"the tree is {shown(nodes)}, expected a list of nodes in pre-order")
    checked = []
    for number, node in enumerate(nodes, start=1):
        try:
            checked.append(_node_parts(node, unfinished, foreign))
        except TreeError as fault:
            raise TreeError(fault.message, number) from None
    check_preorder([role for role, _, _ in checked])
    return checked


def _node_parts(node: Any, unfinished: bool, foreign: bool) -> NodeParts:
    if not isinstance(node, dict):
        raise TreeError(f"the node is {shown(node)}, expected an object with role, triples and logical_rel")
    for key in _NODE_KEYS:
        if key not in node:
            raise TreeError(f'the key "{key}" is missing, expected role, triples and logical_rel')
    role, triples, logical_rel = (node[key] for key in _NODE_KEYS)
    if foreign and isinstance(role, str):
        role = role.strip().upper()
    if role not in ("C", "D"):
        raise TreeError(f'role is {shown(role)}, expected "C" (condition) or "D" (decision)')
    if logical_rel not in ("and", "or", "null") and not (foreign and isinstance(logical_rel, str)):
        raise TreeError(f'logical_rel is {shown(logical_rel)}, expected "and", "or" or "null"')
    if not isinstance(triples, list | tuple):
        raise TreeError(f"triples is {shown(triples)}, expected a list of triples")
    parts = [triple_parts(triple, unfinished=unfinished, foreign=foreign) for triple in triples]
    if foreign:
        _check_condition(role, len(parts))
    elif not unfinished:
        check_node(role, parts, logical_rel)
    return role, parts, logical_rel


class Repair(NamedTuple):
    """What was put right in a node.

    Attributes:
        kind: ``AS_AND``, ``AS_NULL`` or ``ONCE``.
        note: names the node.
    """

    kind: str
    note: str


def repaired_parts(nodes: Any) -> tuple[Any, list[Repair]]:
    """The nodes with what has one plain meaning put right, and all that was. What is wrong otherwise stays, to be refused."""
    if not isinstance(nodes, list | tuple):
        return nodes, []
    mended: list[Any] = []
    notes: list[Repair] = []
    for number, node in enumerate(nodes, start=1):
        if not isinstance(node, dict) or not isinstance(node.get("triples"), list | tuple):
            mended.append(node)
            continue
        triples: list[Any] = []
        said: list[Any] = []
        for triple in node["triples"]:
            plain = (
                [part.strip() if isinstance(part, str) else part for part in triple] if isinstance(triple, list | tuple) else triple
            )
            if plain in said:
                notes.append(Repair(ONCE, f"node {number}: the triple {shown(triple)} came twice and counts once"))
            else:
                triples.append(triple)
                said.append(plain)
        given = node.get("logical_rel")
        fitting = fitting_join(given, len(triples))
        if fitting != given:
            note = f'node {number}: logical_rel "{given or "null"}" with {_triples(len(triples))} is read as "{fitting}"'
            notes.append(Repair(AS_AND if fitting == "and" else AS_NULL, note))
        mended.append({**node, "triples": triples, "logical_rel": fitting})
    return mended, notes


def shown(value: Any) -> str:
    """A value in a message: short, on one line."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def _triples(count: int) -> str:
    return "one triple" if count == 1 else f"{count or 'no'} triples"
