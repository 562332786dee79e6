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
# An order of "no antibiotics", or of "stop aspirin" as a drug, would be an order of the wrong thing; only the relation says for
# certain that something is not to be done. Names ("no-spa", "stop-smoking aids") and amounts ("not more than") are no negations.
_BEGINS_NEGATED = re.compile(r"\W*(?:(?:no|neither|avoid|avoiding|without)(?![\w.-])|禁|忌|避免)", re.IGNORECASE)
_NEGATED = re.compile(
    r"(?<![\w-])(?:no(?![.]|$)"  # nitric oxide is in capitals
    r"|(?i:not(?! only\b| (?:to )?exceed| (?:more|less|fewer) than\b)|never|cannot|nor|[a-z]+n['’]t|contra[- ]?indicated"
    r"|(?:advis|recommend|warn)\w* against|discouraged|inadvisable|inappropriate|unsuitable|unnecessary))(?![\w-])"
    r"|不(?!饱和|同(?!意)|全|足|稳定|良|孕|育|典型|明|溶|对称|规则|宁|断|仅|但|限|均|等|少于|超过|大于|小于|低于|高于|多于|间断|可逆"
    r"|适(?![用合宜当]))|勿|无需|无须|无必要|没有?必要"
)
_STOPPED = re.compile(
    r"(?<![\w-])(?:(?:stop(?:s|ped|ping)?(?! (?:the )?(?:bleeding|ha?emorrhage|seizures?|smoking)\b)|discontinu\w+|withh[eo]ld\w*"
    r"|withdr[ae]w(?:s|n|ing|al of)?|ceas(?:e|es|ed|ing)|(?<!smoking )(?<!tobacco )(?<!alcohol )cessation|halt(?:s|ed|ing)?"
    r"|suspend(?:s|ing|ed(?! in\b))?|interrupt(?:s|ed|ing|ion)?|omit(?:s|ted|ting)?|refrain(?:s|ed|ing)?|abstain(?:s|ed|ing)?"
    r"|forgo|avoid(?:s|ed|ing|ance)?|prohibit(?:s|ed)?|forbid(?:den)?|banned|be held|hold(?! on)))(?![\w-])"
    r"|停(?![搏跳经])|(?<!无)禁|(?<![无禁])忌|避[免开]|[回规]避|[中终]止(?!妊娠)|中断|撤[除药用停]|暂缓|弃用|取消",
    re.IGNORECASE,
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
    if kind == "avoid" and _is_negated(triple.object, stopped=True):
        return Order(triple, "text", doses, "has a negation, so that it is not certain whether the drug is to be avoided or given")
    if kind != "avoid" and _is_negated(triple.object, stopped=kind == "drug"):
        return Order(
            triple, "text", doses, "has a negation or stops something, and only prohibited drugs are taken as not to be done"
        )
    return Order(triple, kind, doses)


def _is_negated(words: str, *, stopped: bool) -> bool:
    """Whether words say that something is not done, or with ``stopped`` that it is ended. To stop something may be a measure."""
    return bool(_BEGINS_NEGATED.match(words) or _NEGATED.search(words) or (stopped and _STOPPED.search(words)))


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
    return join == "or" and not _is_prohibition(order)


def _is_prohibition(order: Order) -> bool:
    """Whether its relation is that of prohibited drugs, even where its words are too doubtful for more than a text."""
    return _kind(order.triple) == "avoid"


def notes_of_choices(tree: DecisionTree) -> list[str]:
    """A sentence for each decision with prohibited drugs that its triples join by "or"."""
    return [
        f"node {number}: its triples are joined by 'or'; prohibited drugs are none of the choices, but always hold"
        for number, node in enumerate(tree.nodes, start=1)
        if not node.is_condition and node.logical_rel == "or" and len(orders := orders_of(node)) > 1
        if any(map(_is_prohibition, orders))
    ]
