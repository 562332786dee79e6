"""Walking a decision tree with known facts: which decision holds, and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gatewise.errors import GatewiseError
from gatewise.mdt.relations import is_relation, relation_in
from gatewise.mdt.tree import DecisionTree, Node, Triple, joined_words, leaf_words

Facts = Mapping[Any, bool] | Callable[[Triple], bool | None]
NOTICE = "Needs review by a clinician; not medical advice."


@dataclass(frozen=True)
class Step:
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
    steps: tuple[Step, ...]

    @property
    def explanation(self) -> str:
        """The way taken, a condition a line, then the decision, then that it needs review by a clinician."""
        lines = []
        for step in self.steps:
            facts = ", ".join(
                f"{triple.object}: {'not known' if value is None else 'yes' if value else 'no'}" for triple, value in step.known
            )
            lines.append(f"node {step.node + 1}: {joined_words(step.condition)} is {'true' if step.holds else 'false'} ({facts})")
        lines.append(f"node {self.leaf + 1}: {leaf_words(self.node)}")
        return "\n".join([*lines, NOTICE])


def decide(tree: DecisionTree, facts: Facts) -> Decision:
    """Walks from the root to the decision that holds.

    A condition joined by "and" is true when all its triples are, one joined by "or" when any is. A triple that is not known
    stops the walk only where the answer hangs on it: one false is enough for "and", one true for "or".

    Args:
        facts: a mapping from triples (``Triple`` or a sequence of three texts; case, spaces and the language of the relation do
            not matter) to bool, or a function from a triple to bool, or to None where it does not know.

    Raises:
        GatewiseError: a fact on which the way hangs is not known, a fact is no bool, or two facts contradict each other.
    """
    known = facts if callable(facts) else _look_up(facts)
    steps: list[Step] = []
    at = 0
    while (both := tree.children[at]) is not None:
        node = tree.nodes[at]
        values = tuple((triple, _checked(known(triple), triple)) for triple in node.triples)
        holds = _joined([value for _, value in values], node.logical_rel)
        if holds is None:
            missing = "; ".join(str(triple) for triple, value in values if value is None)
            raise GatewiseError(f"node {at + 1}: it is not known whether this holds: {missing}; give it as true or false")
        steps.append(Step(at, node, holds, values))
        at = both[0] if holds else both[1]
    return Decision(at, tree.nodes[at], tuple(steps))


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
    if not is_relation(parts[1]):
        return parts  # of no tree, so it decides nothing
    subject, object_ = (" ".join(part.casefold().split()) for part in (parts[0], parts[2]))
    return subject, relation_in(parts[1], "en"), object_


def _checked(value: Any, triple: Triple) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise GatewiseError(f"the fact {triple} is {value!r}, expected true or false")
    return value
