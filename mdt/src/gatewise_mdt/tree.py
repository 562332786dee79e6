"""A medical decision tree: triples in nodes, nodes in pre-order (Text2MDT, arXiv 2401.02034).

A condition (role ``C``) has two children, the left for "true" and the right for "false"; a decision (role ``D``) is a leaf, and an
empty one means "no recommendation". :meth:`DecisionTree.from_preorder` holds a tree to the rules of :mod:`gatewise_mdt.checks`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

from gatewise.errors import GatewiseError
from gatewise_mdt import checks
from gatewise_mdt.relations import Language, language_of, relation_in
from gatewise_mdt.wholes import fold

Role = Literal["C", "D"]
LogicalRel = Literal["and", "or", "null"]


class Triple(NamedTuple):
    """One fact."""

    subject: str
    relation: str
    object: str

    def __str__(self) -> str:
        return " | ".join(self)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two triples the same fact: case, spaces and the language of the relation do not matter.

        Nor does what :func:`gatewise_mdt.wholes.fold` leaves out, which keeps "MU" and "mU" apart.
        """
        return plain(self.subject), relation_in(self.relation, "en"), plain(self.object)


@lru_cache(maxsize=1 << 16)
def plain(phrase: str) -> str:
    """A phrase to be compared."""
    return fold(phrase).text.strip()


@dataclass(frozen=True, eq=False)
class Node:
    """A condition or a decision. Two nodes are equal when they differ at most in the order of their triples.

    Attributes:
        logical_rel: how the triples are joined; "null" when there is at most one.
    """

    role: Role
    triples: tuple[Triple, ...] = ()
    logical_rel: LogicalRel = "null"

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

    @property
    def words(self) -> str:
        """The triples on one line, joined as the node joins them."""
        if self.is_empty:
            return "no recommendation"
        if len(self.triples) == 1:
            return str(self.triples[0])
        return f" {self.logical_rel} ".join(f"({triple})" for triple in self.triples)

    def to_json(self) -> dict[str, Any]:
        """The node as the published format has it."""
        return {"role": self.role, "triples": [list(triple) for triple in self.triples], "logical_rel": self.logical_rel}


@dataclass(frozen=True)
class DecisionTree:
    """A whole tree, its nodes in pre-order. Two trees are equal when they differ at most in the order of triples within nodes."""

    nodes: tuple[Node, ...]

    @classmethod
    def from_preorder(cls, nodes: Any, where: str = "") -> "DecisionTree":
        """A tree from the published format: a list of ``{"role", "triples", "logical_rel"}`` in pre-order.

        Args:
            where: what the message names first, such as "trees.json, record 3".

        Raises:
            GatewiseError: names the node (counted from 1), what was given and what was expected.
        """
        try:
            checked: list[Any] = checks.tree_parts(nodes)
        except checks.TreeError as fault:
            raise GatewiseError(fault.at(where)) from None
        return cls(tuple(Node(role, tuple(Triple(*parts) for parts in triples), joined) for role, triples, joined in checked))

    @classmethod
    def repaired(cls, nodes: Any, where: str = "") -> tuple["DecisionTree", list[str]]:
        """Like :meth:`from_preorder`, but puts right what has one plain meaning, and says what it did.

        "and" or "or" over at most one triple becomes "null"; "null" over several becomes "and"; a triple given twice counts once.

        Raises:
            GatewiseError: the tree is wrong in another way; names the node.
        """
        mended, notes = checks.repaired_parts(nodes)
        return cls.from_preorder(mended, where), [f"{where}: {one.note}" if where else one.note for one in notes]

    def to_preorder(self) -> list[dict[str, Any]]:
        """The tree in the published format."""
        return [node.to_json() for node in self.nodes]

    def to_outline(self, comments: "list[str] | tuple[str, ...]" = ()) -> str:
        """The tree as indented lines that people read.

        Args:
            comments: a line for each node, shown above it behind "#"; empty for none.
        """
        lines: list[str] = []
        to_do: list[tuple[int | str, int]] = [(0, 0)]
        while to_do:
            what, depth = to_do.pop()
            pad = "  " * depth
            if isinstance(what, str):
                lines.append(f"{pad}{what}:")
                continue
            node = self.nodes[what]
            lines += [f"{pad}# {comments[what]}"] if comments and comments[what] else []
            head = f"{'if' if node.is_condition else 'do'}{_JOINED[node.logical_rel]}:"
            lines.append(pad + ("no recommendation" if node.is_empty else head))
            lines += [f"{pad}  - {' | '.join(map(on_one_line, triple))}" for triple in node.triples]
            if (both := self.children[what]) is not None:
                to_do += [(both[1], depth + 1), ("no", depth), (both[0], depth + 1), ("yes", depth)]
        return "\n".join(lines) + "\n"

    @cached_property
    def children(self) -> tuple[tuple[int, int] | None, ...]:
        """For each node its (true, false) children as positions in ``nodes``; None for a leaf."""
        return checks.children_of([node.role for node in self.nodes])

    @cached_property
    def paths(self) -> tuple[dict[int, bool], ...]:
        """For each node what holds of the conditions above it, the nearest last; all by their positions in ``nodes``."""
        paths: list[dict[int, bool]] = [{} for _ in self.nodes]
        for at, both in enumerate(self.children):  # in pre-order what is above comes first
            for child, side in zip(both or (), (True, False), strict=False):
                paths[child] = {**paths[at], at: side}
        return tuple(paths)

    @cached_property
    def ways(self) -> dict[int, dict[int, bool]]:
        """For each decision, in pre-order, its :attr:`paths`."""
        return {at: path for at, (path, both) in enumerate(zip(self.paths, self.children, strict=True)) if both is None}

    @property
    def triples(self) -> tuple[Triple, ...]:
        """All triples, each once, in the order in which they first come."""
        return tuple(dict.fromkeys(triple for node in self.nodes for triple in node.triples))

    @property
    def facts(self) -> tuple[Triple, ...]:
        """What has to be known to walk the tree: the triples of its conditions, of those with one :attr:`Triple.key` the first."""
        return firsts(triple for node in self.nodes if node.is_condition for triple in node.triples)

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

    def decide(self, facts: "Mapping[Any, bool] | Callable[[Triple], bool | None]") -> "Decision":
        """Walks from the root to the decision that holds.

        A condition joined by "and" is true when all its triples are, one joined by "or" when any is. A triple that is not known
        stops the walk only where the answer depends on it: one false is enough for "and", one true for "or".

        Args:
            facts: bool by triple (subject, relation, object; compared as :attr:`Triple.key` says), or a function from a triple to
                bool, or to None where it does not know.

        Raises:
            NotKnown: a fact that is needed on the way is not known.
            GatewiseError: a fact is no bool, its relation none of the six, or two facts contradict each other.
        """
        known = known_facts(facts)
        turns: list[Turn] = []
        at = 0
        while (both := self.children[at]) is not None:
            node = self.nodes[at]
            values = tuple((triple, known(triple)) for triple in node.triples)
            for triple, value in values:
                if value not in (True, False, None):
                    raise GatewiseError(f"the fact {triple} is {value!r}, expected true or false")
            holds = _joined([value for _, value in values], node.logical_rel)
            if holds is None:
                missing = "; ".join(str(triple) for triple, value in values if value is None)
                raise NotKnown(f"node {at + 1}: it is not known whether this holds: {missing}; give it as true or false")
            turns.append(Turn(at, node, holds, values))
            at = both[0] if holds else both[1]
        return Decision(at, self.nodes[at], tuple(turns))


_JOINED = {"null": "", "and": " all", "or": " any"}


def on_one_line(part: str) -> str:
    r"""A text for an outline: without line breaks and without a bare ``|``."""
    return part.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "\\n").replace("\r", "\\r")


# ---- walking a tree with known facts ----

NOTICE = "Needs review by a clinician; not medical advice."


def firsts(triples: Iterable[Triple]) -> tuple[Triple, ...]:
    """Of triples with one :attr:`Triple.key` the first."""
    made: dict[tuple[str, str, str], Triple] = {}
    for triple in triples:
        made.setdefault(triple.key, triple)
    return tuple(made.values())


class NotKnown(GatewiseError):  # noqa: N818
    """A fact that is needed is not known."""


def known_facts(facts: "Mapping[Any, bool] | Callable[[Triple], bool | None]") -> "Callable[[Triple], bool | None]":
    """What is known of a triple, see :meth:`DecisionTree.decide`."""
    if callable(facts):
        return facts
    by_key: dict[tuple[str, ...], bool] = {}
    for fact, given in facts.items():
        if not isinstance(fact, list | tuple) or len(fact) != 3:
            raise GatewiseError(f"the fact {fact!r} is no triple: expected (subject, relation, object)")
        if by_key.setdefault(Triple(*fact).key, given) != given:
            raise GatewiseError(f"the fact {fact} is given as true and as false, perhaps in other words: give it once")
    return lambda triple: by_key.get(triple.key)


class Turn(NamedTuple):
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


class Decision(NamedTuple):
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
        answers = {True: "yes", False: "no", None: "not known"}
        lines = []
        for turn in self.turns:
            facts = ", ".join(f"{triple.object}: {answers[value]}" for triple, value in turn.known)
            lines.append(f"node {turn.node + 1}: {turn.condition.words} is {'true' if turn.holds else 'false'} ({facts})")
        return "\n".join([*lines, f"node {self.leaf + 1}: {self.node.words}", NOTICE])


def _joined(values: list[bool | None], logical_rel: str) -> bool | None:
    """Kleene's three-valued logic, where None is "not known"."""
    decisive = logical_rel == "or"
    if decisive in values:
        return decisive
    return None if None in values else not decisive
