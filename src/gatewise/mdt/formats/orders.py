"""What a decision asks a system to do: a drug with its doses, a drug that is not to be used, another measure, or plain text."""

import re
from typing import Literal, NamedTuple

from gatewise.mdt.relations import relation_in
from gatewise.mdt.tree import DecisionTree, Node, Triple

_DOSE = "dosage and administration"
_KINDS: dict[str, Literal["drug", "avoid", "measure"]] = {
    "drug therapy": "drug",
    "prohibited drugs": "avoid",
    "therapeutic schedule": "measure",
}
# An order of "no antibiotics" would be an order; only the relation says for certain that something is not to be done.
_NEGATED = re.compile(
    r"(?:do not|don['’]?t|no|not|never|neither|avoid|avoiding|without|contraindicated)\b|不|禁|勿|忌|避免|无需|无须", re.IGNORECASE
)


class Order(NamedTuple):
    """One thing that a decision says.

    Attributes:
        triple: what it is about: the drug, the measure.
        doses: of the drug, in the tree's order; what joins them is what joins the node.
        why_text: why it is "text" and no order, for a note; else empty.
    """

    triple: Triple
    kind: Literal["drug", "avoid", "measure", "text"]
    doses: tuple[Triple, ...] = ()
    why_text: str = ""


def orders_of(node: Node) -> tuple[Order, ...]:
    """The orders of a decision, in the order of its triples.

    A dose goes with the one drug of the node that is its subject. A dose of the people ("adults with gout") goes with the drug that
    they are given, if that is all there is to do, or not to do, in the node. Any other dose stands alone, as text.
    """
    drugs = [triple for triple in node.triples if _kind(triple) in ("drug", "avoid")]
    done = [triple for triple in node.triples if _kind(triple) in ("drug", "avoid", "measure")]
    doses: dict[Triple, list[Triple]] = {drug: [] for drug in drugs}
    placed = set()
    for triple in node.triples:
        if _kind(triple) != "dose":
            continue
        about = triple.key[0]
        fitting = [drug for drug in drugs if drug.key[2] == about]
        if not fitting and len(done) == 1 and _order(done[0], ()).kind == "drug" and done[0].key[0] == about:
            fitting = done
        if len(fitting) == 1:
            doses[fitting[0]].append(triple)
            placed.add(triple)
    return tuple(_order(triple, tuple(doses.get(triple, ()))) for triple in node.triples if triple not in placed)


def _order(triple: Triple, doses: tuple[Triple, ...]) -> Order:
    kind = _kind(triple)
    if kind == "dose":
        return Order(triple, "text", why_text="is a dose of which it is not certain which drug of the decision it is of")
    if kind == "fact":
        return Order(triple, "text", why_text=f"is no order ({relation_in(triple.relation, 'en')})")
    if kind != "avoid" and _NEGATED.match(triple.object):
        return Order(triple, "text", doses, "begins with a negation, and only prohibited drugs are taken as something not to do")
    return Order(triple, kind, doses)


def _kind(triple: Triple) -> Literal["drug", "avoid", "measure", "dose", "fact"]:
    relation = relation_in(triple.relation, "en")
    return "dose" if relation == _DOSE else _KINDS.get(relation, "fact")


def order_words(order: Order, join: str) -> str:
    """An order on one line: what is done, or not to be done, the doses, then relation and subject."""
    triple = order.triple
    doses = f" {join} ".join(dose.object for dose in order.doses)
    what = f"{triple.object}: {doses}" if doses else triple.object
    return f"{'DO NOT USE: ' if order.kind == 'avoid' else ''}{what} ({triple.relation}; {triple.subject})"


def is_choice(order: Order, join: str) -> bool:
    """Whether an order is one of several to choose from: "do not use A, or B" leaves no choice among what is not to be done."""
    return join == "or" and order.kind != "avoid"


def notes_of_choices(tree: DecisionTree) -> list[str]:
    """A sentence for each decision with prohibited drugs that its triples join by "or"."""
    return [
        f"node {number}: its triples are joined by 'or'; prohibited drugs are none of the choices, but always hold"
        for number, node in enumerate(tree.nodes, start=1)
        if not node.is_condition and node.logical_rel == "or" and len(orders := orders_of(node)) > 1
        if any(order.kind == "avoid" for order in orders)
    ]
