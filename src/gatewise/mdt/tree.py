"""A medical decision tree: triples in nodes, nodes in pre-order (Text2MDT, arXiv 2401.02034).

A condition (role ``C``) has two children, the left for "true" and the right for "false"; a decision (role ``D``) is a leaf, and an
empty one means "no recommendation". A :class:`DecisionTree` in memory always keeps the rules of :mod:`gatewise.mdt.checks`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from gatewise.errors import GatewiseError
from gatewise.mdt import checks
from gatewise.mdt.relations import Language, language_of, relation_in

if TYPE_CHECKING:
    from gatewise.mdt.decide import Decision

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
        """What makes two triples the same fact: case, spaces and the language of the relation do not matter."""
        subject, object_ = (" ".join(part.casefold().split()) for part in (self.subject, self.object))
        return subject, relation_in(self.relation, "en"), object_


class Node(BaseModel):
    """A condition or a decision. Two nodes are equal when they differ at most in the order of their triples.

    Attributes:
        logical_rel: how the triples are joined; "null" when there is at most one.

    Raises:
        pydantic.ValidationError: the parts do not fit together, see :func:`gatewise.mdt.checks.check_node`.
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
    def language(self) -> Language:
        """The language of the relations' names; English for a tree without a triple."""
        return language_of(self.triples[0].relation) if self.triples else "en"

    def in_language(self, language: Language) -> "DecisionTree":
        """The same tree with the relations' names in a language; subjects and objects stay as they are.

        Raises:
            GatewiseError: the language is neither "en" nor "zh".
        """
        nodes = [
            {**node.to_json(), "triples": [[s, relation_in(r, language), o] for s, r, o in node.triples]} for node in self.nodes
        ]
        return DecisionTree.from_preorder(nodes)

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
        """Walks from the root to the decision that holds, see :func:`gatewise.mdt.decide.decide`.

        Raises:
            GatewiseError: a fact that is needed on the way is not known.
        """
        from gatewise.mdt.decide import decide

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
            checked = checks.preorder_parts(nodes)
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
        """Like :meth:`from_preorder`, but puts right what has one plain meaning, and says what it did.

        "and" or "or" over at most one triple becomes "null"; "null" over several becomes "and"; a triple given twice counts once;
        the names of relations may differ in case and spaces. Everything else is refused as ever.

        Raises:
            GatewiseError: the tree is wrong in another way; names the node.
        """
        mended, notes = checks.repaired_parts(nodes)
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
        """A tree from the outline that :meth:`to_outline` writes, see :mod:`gatewise.mdt.outline`.

        Raises:
            GatewiseError: names the line, what was given and what was expected.
        """
        from gatewise.mdt.outline import tree_of

        return tree_of(text, where)

    def to_outline(self) -> str:
        """The tree as indented lines that people read and edit, see :mod:`gatewise.mdt.outline`."""
        from gatewise.mdt.outline import outline_of

        return outline_of(self)


def leaf_words(node: Node) -> str:
    """A leaf in a few words: its triples, or that it recommends nothing."""
    if node.is_empty:
        return "no recommendation"
    return joined_words(node)


def joined_words(node: Node) -> str:
    """The triples of a node on one line, joined as the node joins them."""
    return f" {node.logical_rel} ".join(f"({triple})" for triple in node.triples) if len(node.triples) > 1 else str(node.triples[0])
