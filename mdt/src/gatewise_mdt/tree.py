"""A medical decision tree: triples in nodes, nodes in pre-order (Text2MDT, arXiv 2401.02034).

A condition (role ``C``) has two children, the left for "true" and the right for "false"; a decision (role ``D``) is a leaf, and an
empty one means "no recommendation". A :class:`DecisionTree` in memory always keeps the rules of :mod:`gatewise_mdt.checks`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import Language, expected_relations, is_relation, language_of, relation_in
from gatewise_mdt.wholes import fold

Role = Literal["C", "D"]
LogicalRel = Literal["and", "or", "null"]


class Triple(BaseModel):
    """One fact: subject, relation, object. Spaces around the three are taken off.

    Raises:
        pydantic.ValidationError: one of the three is empty or no text, or the relation is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    subject: str
    relation: str
    object: str

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"subject", "relation", "object"}:
            value = [value["subject"], value["relation"], value["object"]]
        if isinstance(value, list | tuple):
            subject, relation, object_ = checks.triple_parts(value)
            return {"subject": subject, "relation": relation, "object": object_}
        return value

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        """Subject, relation and object, in this order."""
        return iter((self.subject, self.relation, self.object))

    def __str__(self) -> str:
        return " | ".join(self)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two triples the same fact: case, spaces and the language of the relation do not matter.

        Nor does what :func:`gatewise_mdt.wholes.fold` leaves out, which keeps "MU" and "mU" apart.
        """
        return _plain(self.subject), relation_in(self.relation, "en"), _plain(self.object)


@lru_cache(maxsize=4096)
def _plain(phrase: str) -> str:
    """A phrase to be compared."""
    return fold(phrase).text.strip()


class Node(BaseModel):
    """A condition or a decision. Two nodes are equal when they differ at most in the order of their triples.

    Attributes:
        logical_rel: how the triples are joined; "null" when there is at most one.

    Raises:
        pydantic.ValidationError: the parts do not fit together, see :func:`gatewise_mdt.checks.check_node`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    triples: tuple[Triple, ...] = ()
    logical_rel: LogicalRel = "null"

    @model_validator(mode="after")
    def _fits(self) -> "Node":
        checks.check_node(self.role, [(t.subject, t.relation, t.object) for t in self.triples], self.logical_rel)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str, frozenset[Triple]]:
        return self.role, self.logical_rel, frozenset(self.triples)

    @property
    def is_condition(self) -> bool:
        return self.role == "C"

    @property
    def is_empty(self) -> bool:
        """Whether this is the leaf that means "no recommendation"."""
        return not self.triples

    def to_json(self) -> dict[str, Any]:
        """The node as the published format has it."""
        return {"role": self.role, "triples": [list(triple) for triple in self.triples], "logical_rel": self.logical_rel}


class Path(NamedTuple):
    """A way from the root to a leaf: the conditions with the answer taken at each, and the decision at the end."""

    turns: tuple[tuple[Node, bool], ...]
    leaf: Node


class DecisionTree(BaseModel):
    """A whole tree, its nodes in pre-order. Two trees are equal when they differ at most in the order of triples within nodes.

    Raises:
        pydantic.ValidationError: the nodes are no complete pre-order of one binary tree. The ``from_…`` functions raise
            :class:`~gatewise.errors.GatewiseError` instead, with the place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: tuple[Node, ...]

    @field_validator("nodes")
    @classmethod
    def _complete(cls, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        checks.check_preorder([node.role for node in nodes])
        return nodes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecisionTree) and self.nodes == other.nodes

    def __hash__(self) -> int:
        return hash(self.nodes)

    @cached_property
    def children(self) -> tuple[tuple[int, int] | None, ...]:
        """For each node its (true, false) children as positions in ``nodes``; None for a leaf."""
        return checks.children_of([node.role for node in self.nodes])

    @property
    def depth(self) -> int:
        """Nodes on the longest path; 1 for a leaf alone."""
        depths = [1] * len(self.nodes)
        # In pre-order, children come after their parent, so backwards they are done before it.
        for i in range(len(self.nodes) - 1, -1, -1):
            if (both := self.children[i]) is not None:
                depths[i] = 1 + max(depths[child] for child in both)
        return depths[0]

    @property
    def triples(self) -> tuple[Triple, ...]:
        """All triples, each once, in the order in which they first come."""
        return tuple(dict.fromkeys(triple for node in self.nodes for triple in node.triples))

    @property
    def facts(self) -> tuple[Triple, ...]:
        """What has to be known to walk the tree: the triples of its conditions, of those with one :attr:`Triple.key` the first."""
        conditions = (triple for node in self.nodes if node.is_condition for triple in node.triples)
        first: dict[tuple[str, str, str], Triple] = {}
        for triple in conditions:
            first.setdefault(triple.key, triple)
        return tuple(first.values())

    @property
    def language(self) -> Language:
        """The language of the relations' names; English for a tree without a triple."""
        return language_of(self.triples[0].relation) if self.triples else "en"

    def in_language(self, language: Language) -> "DecisionTree":
        """The same tree with the relations' names in a language; subjects and objects stay as they are.

        Two triples of a node that differ only in the language of their relations are then one.

        Raises:
            GatewiseError: the language is neither "en" nor "zh".
        """
        nodes = [
            {**node.to_json(), "triples": [[s, relation_in(r, language), o] for s, r, o in node.triples]} for node in self.nodes
        ]
        return DecisionTree.repaired(nodes)[0]

    def paths(self) -> list[Path]:
        """All ways from the root to a leaf, from the leftmost (always true) to the rightmost."""
        found: list[Path] = []
        to_do: list[tuple[int, tuple[tuple[Node, bool], ...]]] = [(0, ())]
        while to_do:
            i, turns = to_do.pop()
            node, both = self.nodes[i], self.children[i]
            if both is None:
                found.append(Path(turns, node))
            else:
                to_do += [(both[1], (*turns, (node, False))), (both[0], (*turns, (node, True)))]
        return found

    def decide(self, facts: "Mapping[Any, bool] | Callable[[Triple], bool | None]") -> "Decision":
        """Walks from the root to the decision that holds, see :func:`gatewise_mdt.tree.decide`.

        Raises:
            GatewiseError: a fact that is needed on the way is not known.
        """
        return decide(self, facts)

    # ---- from and to other shapes ----

    @classmethod
    def from_preorder(cls, nodes: Any, where: str = "") -> "DecisionTree":
        """A tree from the published format: a list of ``{"role", "triples", "logical_rel"}`` in pre-order.

        Args:
            where: what the message names first, such as "trees.json, record 3".

        Raises:
            GatewiseError: names the node (counted from 1), what was given and what was expected.
        """
        try:
            checked = checks.tree_parts(nodes)
        except checks.TreeError as fault:
            raise GatewiseError(fault.at(where)) from None
        made = [
            {"role": role, "triples": tuple(Triple(subject=s, relation=r, object=o) for s, r, o in triples), "logical_rel": joined}
            for role, triples, joined in checked
        ]
        return cls.model_validate({"nodes": made})

    def to_preorder(self) -> list[dict[str, Any]]:
        """The tree in the published format."""
        return [node.to_json() for node in self.nodes]

    @classmethod
    def repaired(cls, nodes: Any, where: str = "") -> tuple["DecisionTree", list[str]]:
        """Like :meth:`from_preorder`, but puts right what has one plain meaning, and says what it did; nested JSON is taken, too.

        "and" or "or" over at most one triple becomes "null"; "null" over several becomes "and"; a triple given twice counts once;
        the names of relations may differ in case and spaces. Everything else is refused as ever.

        Raises:
            GatewiseError: the tree is wrong in another way; names the node.
        """
        try:
            mended, notes = checks.repaired_parts(checks.flattened(nodes, unchecked=True) if isinstance(nodes, dict) else nodes)
        except checks.TreeError as fault:
            raise GatewiseError(fault.at(where)) from None
        tree = cls.from_preorder(mended, where)
        return tree, [f"{where}: {note}" if where else note for note in notes]

    @classmethod
    def from_nested(cls, root: Any, where: str = "") -> "DecisionTree":
        """A tree from nested JSON: a condition has its children under the keys ``"true"`` and ``"false"``.

        Raises:
            GatewiseError: names the way to the node, such as "root.true.false", what was given and what was expected.
        """
        try:
            return cls.from_preorder(checks.flattened(root), where)
        except checks.TreeError as fault:
            raise GatewiseError(fault.at(where)) from None

    def to_nested(self) -> dict[str, Any]:
        """The tree as nested JSON: a condition has its children under the keys ``"true"`` and ``"false"``."""
        made = self.to_preorder()
        for node, both in zip(made, self.children, strict=True):
            if both is not None:
                node["true"], node["false"] = (made[child] for child in both)
        return made[0]

    @classmethod
    def from_outline(cls, text: str, where: str = "") -> "DecisionTree":
        """A tree from the outline that :meth:`to_outline` writes, see :mod:`gatewise_mdt.outline`.

        Raises:
            GatewiseError: names the line, what was given and what was expected.
        """
        from gatewise_mdt.outline import tree_of

        return tree_of(text, where)

    def to_outline(self) -> str:
        """The tree as indented lines that people read and edit, see :mod:`gatewise_mdt.outline`."""
        from gatewise_mdt.outline import outline_of

        return outline_of(self)


def leaf_words(node: Node) -> str:
    """A leaf in a few words: its triples, or that it recommends nothing."""
    if node.is_empty:
        return "no recommendation"
    return joined_words(node)


def joined_words(node: Node) -> str:
    """The triples of a node on one line, joined as the node joins them."""
    return f" {node.logical_rel} ".join(f"({triple})" for triple in node.triples) if len(node.triples) > 1 else str(node.triples[0])


# ---- walking a tree with known facts ----

Facts = Mapping[Any, bool] | Callable[[Triple], bool | None]
NOTICE = "Needs review by a clinician; not medical advice."


@dataclass(frozen=True)
class Turn:
    """One condition on the way.

    Attributes:
        node: its position in the tree's pre-order, from 0.
        holds: the answer, which says the child taken.
        known: what each of its triples was; None for one that was not known and did not matter.
    """

    node: int
    condition: Node
    holds: bool
    known: tuple[tuple[Triple, bool | None], ...]


@dataclass(frozen=True)
class Decision:
    """The decision that holds and the way to it. Needs review by a clinician.

    Attributes:
        leaf: position of the leaf in the tree's pre-order, from 0.
    """

    leaf: int
    node: Node
    turns: tuple[Turn, ...]

    @property
    def explanation(self) -> str:
        """The way taken, a condition a line, then the decision, then that it needs review by a clinician."""
        lines = []
        for turn in self.turns:
            facts = ", ".join(
                f"{triple.object}: {'not known' if value is None else 'yes' if value else 'no'}" for triple, value in turn.known
            )
            lines.append(f"node {turn.node + 1}: {joined_words(turn.condition)} is {'true' if turn.holds else 'false'} ({facts})")
        lines.append(f"node {self.leaf + 1}: {leaf_words(self.node)}")
        return "\n".join([*lines, NOTICE])


def decide(tree: DecisionTree, facts: Facts) -> Decision:
    """Walks from the root to the decision that holds.

    A condition joined by "and" is true when all its triples are, one joined by "or" when any is. A triple that is not known
    stops the walk only where the answer hangs on it: one false is enough for "and", one true for "or".

    Args:
        facts: a mapping from triples (``Triple`` or a sequence of three texts, compared as :attr:`Triple.key` says) to bool, or a
            function from a triple to bool, or to None where it does not know.

    Raises:
        GatewiseError: a fact on which the way hangs is not known, a fact is no bool or its relation none of the six, or two facts
            contradict each other.
    """
    known = facts if callable(facts) else _look_up(facts)
    turns: list[Turn] = []
    at = 0
    while (both := tree.children[at]) is not None:
        node = tree.nodes[at]
        values = tuple((triple, _checked(known(triple), triple)) for triple in node.triples)
        holds = _joined([value for _, value in values], node.logical_rel)
        if holds is None:
            missing = "; ".join(str(triple) for triple, value in values if value is None)
            raise GatewiseError(f"node {at + 1}: it is not known whether this holds: {missing}; give it as true or false")
        turns.append(Turn(at, node, holds, values))
        at = both[0] if holds else both[1]
    return Decision(at, tree.nodes[at], tuple(turns))


def _joined(values: list[bool | None], logical_rel: str) -> bool | None:
    """Kleene's three-valued logic, where None is "not known"."""
    decisive = logical_rel == "or"
    if decisive in values:
        return decisive
    return None if None in values else not decisive


def _look_up(facts: Mapping[Any, bool]) -> Callable[[Triple], bool | None]:
    plain: dict[tuple[str, str, str], bool] = {}
    for triple, value in facts.items():
        if plain.setdefault(_key(triple), value) is not value:
            raise GatewiseError(f"the fact {triple} is given as true and as false, perhaps in other words: give it once")
    return lambda triple: plain.get(triple.key)


def _key(triple: Any) -> tuple[str, str, str]:
    parts = tuple(triple) if isinstance(triple, Triple | tuple | list) else ()
    if len(parts) != 3 or not all(isinstance(part, str) for part in parts):
        raise GatewiseError(f"a fact is about {triple!r}, expected a triple of subject, relation and object")
    relation = " ".join(parts[1].casefold().split())
    if not is_relation(relation):
        raise GatewiseError(f"a fact is about {parts!r}, whose relation is none: expected {expected_relations()}")
    return _plain(parts[0]), relation_in(relation, "en"), _plain(parts[2])


def _checked(value: Any, triple: Triple) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise GatewiseError(f"the fact {triple} is {value!r}, expected true or false")
    return value
