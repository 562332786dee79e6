"""A small guideline of four passages whose trees make one pathway."""

import random

from gatewise_mdt import DecisionTree, Link, Pathway, TreeRecord
from mdt_trees import node, random_tree, triple

_PEOPLE = "adults with type 2 diabetes"
_KIDNEYS = "Chronic kidney disease"


def guideline() -> list[TreeRecord]:
    def fact(words: str) -> list[str]:
        return triple(words, subject=_PEOPLE)

    def drug(words: str) -> list[str]:
        return triple(words, "drug therapy", _PEOPLE)

    def plan(words: str) -> list[str]:
        return triple(words, "therapeutic schedule", _PEOPLE)

    kidneys = plan("treat as in chronic kidney disease")
    said = [
        (
            "First treatment",
            "Give metformin. If the eGFR is below 30, treat as in chronic kidney disease.",
            [node("C", fact("eGFR is below 30")), node("D", kidneys), node("D", drug("metformin"))],
        ),
        (
            "Second treatment",
            "If metformin is not tolerated, give semaglutide in obesity and else sitagliptin.",
            [
                node("C", fact("metformin is not tolerated")),
                node("C", fact("obesity")),
                node("D", drug("semaglutide")),
                node("D", drug("sitagliptin")),
                node("D"),
            ],
        ),
        (
            _KIDNEYS,
            "If the eGFR is below 30 and there is albuminuria, give losartan.",
            [node("C", fact("eGFR is below 30"), fact("albuminuria"), joined="and"), node("D", drug("losartan")), node("D")],
        ),
        (_KIDNEYS, "Check the potassium every year.", [node("D", plan("Check the potassium every year"))]),
    ]
    records = []
    for number, (heading, text, tree) in enumerate(said, start=1):
        more = {
            "passage_id": f"{number:016x}",
            "source": "diabetes.pdf",
            "sha256": "ab" * 32,
            "place": f"page {number}",
            "headings": ["Type 2 diabetes", heading],
        }
        whole = f"{_PEOPLE}@{heading}: {text}"
        records.append(TreeRecord(whole, DecisionTree.from_preorder(tree), number, {**more, "review": "approved"}))
    return records


def random_pathway(draw: random.Random) -> Pathway:
    """Trees that share facts, and links from any decision to any later passage."""
    records = [TreeRecord("", random_tree(draw), number) for number in range(1, 7)]
    links = []
    for record in records:
        leaves = [i for i, one in enumerate(record.tree.nodes) if not one.is_condition]
        ends = range(record.number + 1, 7)
        links += [Link(record.number, draw.choice(leaves), end, "accepted") for end in ends if draw.random() < 0.4]
    return Pathway(tuple(records), tuple(links))
