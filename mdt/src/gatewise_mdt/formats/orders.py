"""What a decision asks a system to do: a drug with its doses, a drug that is not to be used, another measure, or plain text."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from gatewise_mdt.relations import relation_in
from gatewise_mdt.tree import DecisionTree, Node, Triple

_KINDS: dict[str, Literal["drug", "avoid", "measure", "dose"]] = {
    "drug therapy": "drug",
    "prohibited drugs": "avoid",
    "therapeutic schedule": "measure",
    "dosage and administration": "dose",
}
# An order of "no antibiotics", or of "stop aspirin" as a drug, would be an order of the wrong thing; only the relation says for
# certain that something is not to be done. In doubt what begins with a negation is text, and one inside a name or a purpose none.
_MORE = "more|less|fewer|longer|shorter|later|earlier|sooner|higher|lower|greater|larger|smaller|older|younger"
_STATE = "血吸跳搏颤速扑作厥搐"  # the last signs of what stops by itself, as 出血 or 发作
_HARM = (  # what a drug is given to end; not a list of what may be stopped
    r"(?:bleeding|ha?emorrhage|contractions?|labou?r|seizures?|convulsions?|vomiting|diarrho?ea|tachycardia|arrhythmias?"
    r"|fibrillation|thrombosis|embolism|strokes?|infections?|relapses?|recurrence|complications?|smoking|drinking|alcohol"
    r"|tobacco|nicotine)\b"
)
_HARM_OF = (  # "menstrual bleeding", but not "in bleeding"
    r"(?:the )?(?:(?!(?:in|on|at|if|when|while|with|for|from|by|during|before|after|given|despite|because|until|and|or)\b)[\w-]+ )?"
    + _HARM
)
_NO_NEGATION = re.compile(
    # Amounts: "no more than", "not below 120 mmHg", "not to be exceeded", 不得超过, 不足6周.
    rf"(?<![\w-])(?:(?:no|not) (?:{_MORE}) than(?![\w-])|not (?:above|below|over|under|beyond) (?=(?:about )?\d)"
    r"|(?:not|never|cannot|[a-z]+n['’ʼ]t) (?:to )?(?:be )?exceed\w*"
    # Names and phrases: "vitamin B no. 1", "if not contraindicated", "amoxicillin suspended in water".
    r"|no\. ?(?=\d)|not only\b"
    r"|(?:unless (?:(?:it|they|is|are) ){0,2}|(?:if|when) (?:(?:it|they|there|is|are) ){0,2}not? )contra[- ]?indicat\w+"
    rf"|stop (?:the )?{_HARM}|(?:smoking|tobacco|alcohol) cessation\b|suspended in\b"
    # Purposes and times of a drug: "to stop menstrual bleeding", "for withdrawal of alcohol", "until bleeding stops".
    rf"|(?:(?<=\S to )(?:stop|avoid|halt|interrupt)|(?<=\S for )(?:cessation|withdrawal|avoidance) of) {_HARM_OF}"
    r"|(?<=\w )(?:until|till) (?:(?!then\b|and\b)\w+ ){1,4}(?:stops|stopped|stop(?=\W*$)|cease[sd]|cease(?=\W*$)))"
    r"|不[得应宜可能要须需]{0,2}(?:超[过出]|[大小多少高低长短早晚迟]于|[足到满超] ?(?=[\d一二三四五六七八九十两半]))"
    r"|不(?:饱和|稳定|可逆|对称|同的|孕|育|典型|良|规则|宁腿|溶性|明原因|间断|仅|但)"
    # What would be a verb at the beginning: 肾功能不全, but 不全身使用.
    r"|(?<=[^\W暂])不(?:全(?![身部程面切])|同(?![意时步用服])|断(?=[加增])|限(?=于|$)|适(?=[感者]|$)|足(?!以)|明|宁|均|等(?![同待]))"
    rf"|停[搏跳经]|[{_STATE}][停终]止(?=$|[后时者为]|\W)|(?:无|没有)禁忌|(?<=\w)以避[免开](?![使应用服给])"
    r"|终止(?=妊娠|早产|发作|室|房|心[动律]|阵发|折返|癫痫|惊厥|抽搐|哮喘)",
    re.IGNORECASE,
)
_UNFIT = "inadvisable|inappropriate|unsuitable|unnecessary"
_BEGINS_NEGATED = re.compile(rf"\W*(?:(?:no|neither|avoid|avoiding|without|{_UNFIT})(?![\w.-])|禁|忌|避免)", re.IGNORECASE)
_NEGATED = re.compile(
    r"(?i:[:;,=–—-]\s*no(?=\s*(?:$|[.,;!])))"
    r"|(?<![\w-])(?:(?<!inhaled )[Nn]o"  # nitric oxide is in capitals
    r"|(?i:not|never|cannot|nor|none|nothing|nil|[a-z]+n['’ʼ]t|contra[- ]?indicated"
    rf"|(?:advis|recommend|warn)\w* against|discouraged|(?:is|are|be|was|were) (?:\w+ )?(?:{_UNFIT})"
    # Not "unnecessary catheters", which are removed.
    rf"|(?:{_UNFIT})(?=\W*$|[^\w\s]| (?:in|for|if|when|as|to|and|or|because|unless|at|after|during|before)\b)))(?![\w-])"
    r"|(?i:\b(?:be|been|is|are|was|were) (?:\w+ )?(?:avoided|prohibited|forbidden|banned)\b)"
    r"|(?:应|须|需|宜|尽量)避[免开]|禁[忌止](?![证症])"
    r"|不|勿|无需|无须|无必要|没有?必要"
)
_STOPPED = re.compile(
    r"(?<![\w-])(?:stop(?:s|ped|ping)?|discontinu\w+|withh[eo]ld\w*|withdr[ae]w(?:s|n|ing|al of)?|ceas(?:e|es|ed|ing)|cessation"
    r"|halt(?:s|ed|ing)?|suspend(?:s|ing|ed)?|interrupt(?:s|ed|ing|ion)?|omit(?:s|ted|ting)?|refrain(?:s|ed|ing)?"
    r"|abstain(?:s|ed|ing)?|forgo|avoid(?:s|ed|ing|ance)?|prohibit(?:s|ed)?|forbid(?:den)?|banned|be held|hold(?! on))(?![\w-])"
    # Not 易蒙停, the name of a drug.
    r"|停(?:[用药止服]|(?= ?\d))|(?:^|[暂应须需要该即可宜先再前后时者日天周月并均则请\W])停"
    r"|禁|忌|避[免开]|[回规]避|[中终]止|中断|撤[除药用停]|暂缓|弃用|取消",
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
    if kind == "avoid" and is_negated(triple.object, stopped=True):
        return Order(triple, "text", doses, "has a negation, so that it is not certain whether the drug is to be avoided or given")
    if kind != "avoid" and is_negated(triple.object, stopped=kind == "drug"):
        return Order(
            triple, "text", doses, "has a negation or stops something, and only prohibited drugs are taken as not to be done"
        )
    return Order(triple, kind, doses)


def is_negated(words: str, *, stopped: bool) -> bool:
    """Whether words say that something is not done, or with ``stopped`` that it is ended. To stop something may be a measure."""
    left = _NO_NEGATION.sub("·", words)
    return bool(_BEGINS_NEGATED.match(left) or _NEGATED.search(left) or (stopped and _STOPPED.search(left)))


def _kind(triple: Triple) -> Literal["drug", "avoid", "measure", "dose", "fact"]:
    return _KINDS.get(relation_in(triple.relation, "en"), "fact")


def order_words(order: Order, join: str) -> str:
    """An order on one line: what is done, or not to be done, the doses, then relation and subject."""
    triple = order.triple
    doses = f" {join} ".join(dose.object for dose in order.doses)
    what = f"{triple.object}: {doses}" if doses else triple.object
    return f"{'DO NOT USE: ' if order.kind == 'avoid' else ''}{what} ({triple.relation}; {triple.subject})"


def choices_of(orders: Sequence[Order], join: str) -> list[bool]:
    """For each order of a decision whether it is one of several to choose from.

    "Do not use A, or B" leaves no choice among what is not to be done. A dose that is text is no alternative to a drug, which may
    be its own; doses are alternatives where they are all that the decision says.
    """
    only_doses = all(map(_is_dose, orders))
    return [join == "or" and not _is_prohibition(order) and (only_doses or not _is_dose(order)) for order in orders]


def _is_dose(order: Order) -> bool:
    return _kind(order.triple) == "dose"


def _is_prohibition(order: Order) -> bool:
    """Whether its relation is that of prohibited drugs, even where its words are too doubtful for more than a text."""
    return _kind(order.triple) == "avoid"


def notes_of_choices(tree: DecisionTree) -> list[str]:
    """A sentence for each decision that its triples join by "or" and of which something is no choice."""
    notes = []
    for number, node in enumerate(tree.nodes, start=1):
        orders = () if node.is_condition or node.logical_rel != "or" else orders_of(node)
        always = [order for order, is_choice in zip(orders, choices_of(orders, "or"), strict=True) if not is_choice]
        said = f"node {number}: its triples are joined by 'or'"
        if len(orders) > 1 and any(map(_is_prohibition, always)):
            notes.append(f"{said}; prohibited drugs are none of the choices, but always hold")
        if len(orders) > 1 and any(map(_is_dose, always)):
            notes.append(
                f"{said}; a dose of which it is not certain which drug it is of is none of the choices, but stands beside them"
            )
    return notes
