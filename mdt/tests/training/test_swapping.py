"""Copies of records whose phrases are those of other records."""

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, in_text_order, sample, swapped_copies
from gatewise_mdt.spans import absent_triples
from mdt_trees import TEXT, gout, node, triple

ASTHMA = "children with asthma@For night cough, give montelukast 5 mg. Without night cough, see a specialist."
RECORDS = [
    TreeRecord(TEXT, DecisionTree.from_preorder(gout()), 1, {"source": "ours"}),
    TreeRecord(
        ASTHMA,
        DecisionTree.from_preorder(
            [
                node("C", triple("night cough", subject="children with asthma")),
                node("D", triple("montelukast", "drug therapy", "children with asthma")),
                node("D", triple("see a specialist", "therapeutic schedule", "children with asthma")),
            ]
        ),
        2,
    ),
]


def test_every_phrase_changes_place_in_text_and_tree() -> None:
    first, second = swapped_copies(RECORDS, 1, chance=1.0)
    # In the second record every kind of phrase has one or two to be exchanged for, and "night cough" stands in it twice.
    assert second.population == "adults with gout"
    assert second.tree.nodes[1].triples[0].object in ("colchicine", "naproxen")
    assert second.tree.nodes[2].triples[0].object == "check uric acid"
    finding = second.tree.nodes[0].triples[0].object
    assert finding in ("acute flare", "Without a flare")
    assert second.text == (
        f"adults with gout@For {finding}, give {second.tree.nodes[1].triples[0].object} 5 mg. Without {finding}, check uric acid."
    )
    # In the first, both drugs want the only other one: one gets it, and its dose goes with it.
    drugs = {t.object for t in first.tree.triples if t.relation == "drug therapy"}
    dose = next(t for t in first.tree.triples if t.relation == "dosage and administration")
    assert "montelukast" in drugs
    assert dose.subject in drugs
    assert first.number == 1
    assert first.more == {"source": "ours"}


def _order(record: TreeRecord) -> list[list[int]]:
    """For each node, which of its triples is written first, second, ..."""
    written = in_text_order(record.text, record.tree)
    return [
        [node.triples.index(t) for t in ordered.triples] for node, ordered in zip(record.tree.nodes, written.nodes, strict=True)
    ]


def test_copies_are_as_sound_as_what_they_were_made_of() -> None:
    records = [*RECORDS, *sample()]
    copies = swapped_copies(records, 3, seed=1)
    assert len(copies) == 3 * len(records)
    for number, copy in enumerate(copies):
        record = records[number // 3]
        assert len(absent_triples(copy.text, copy.tree)) == len(absent_triples(record.text, record.tree))
        assert [(n.role, n.logical_rel, [t.relation for t in n.triples]) for n in copy.tree.nodes] == [
            (n.role, n.logical_rel, [t.relation for t in n.triples]) for n in record.tree.nodes
        ]
        # The order in which the triples are to be written is that of the record.
        assert _order(copy) == _order(record)
    assert sum(copy.text != records[number // 3].text for number, copy in enumerate(copies)) > 0.9 * len(copies)


def test_seeds_and_chances() -> None:
    records = sample()
    assert swapped_copies(records, 2, seed=3) == swapped_copies(records, 2, seed=3)
    assert swapped_copies(records, 2, seed=3) != swapped_copies(records, 2, seed=4)
    assert swapped_copies(records, 1, chance=0.0) == list(records)
    assert swapped_copies(records, 0) == []


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("adults with gout@Give antibiotics at night.", "antibiotic"),  # the beginning of a longer word
        ("adults with gout@Nothing is said of it.", "antibiotic"),  # not there
        ("adults with gout@Those with gout take rest.", "gout"),  # a part of another phrase
    ],
)
def test_what_cannot_be_exchanged_stays(text: str, phrase: str) -> None:
    tree = DecisionTree.from_preorder([node("C", triple(phrase)), node("D"), node("D")])
    others = [
        TreeRecord(
            f"adults with gout@If {word}, rest.", DecisionTree.from_preorder([node("C", triple(word)), node("D"), node("D")])
        )
        for word in ("fever", "pain")
    ]
    made = swapped_copies([TreeRecord(text, tree), *others], 1, chance=1.0)[0]
    assert made.tree.nodes[0].triples[0].object == phrase
    assert made.passage == text.partition("@")[2]


def test_a_phrase_is_exchanged_as_the_prompt_shows_it() -> None:
    spaced = TreeRecord(
        "adults@If acute\n flare, rest.",
        DecisionTree.from_preorder([node("C", triple("acute flare", subject="adults")), node("D"), node("D")]),
    )
    other = TreeRecord(
        "men@If tired, rest.", DecisionTree.from_preorder([node("C", triple("tired", subject="men")), node("D"), node("D")])
    )
    assert swapped_copies([spaced, other], 1, chance=1.0)[1].text == "adults@If acute flare, rest."


def test_a_phrase_never_grows_together_with_what_follows_in_chinese() -> None:
    def record(text: str, dose: str) -> TreeRecord:
        nodes = [node("C", ["成人", "临床表现", "发热"]), node("D", ["成人", "用法用量", dose]), node("D")]
        return TreeRecord(text, DecisionTree.from_preorder(nodes))

    records = [record("成人@发热时口服PPI治疗", "口服"), record("成人@发热时每日40 mg。", "每日40 mg")]
    assert all("mgPPI" not in copy.text for seed in range(9) for copy in swapped_copies(records, 2, seed=seed, chance=1.0))


def test_a_phrase_of_two_kinds_stays() -> None:
    nodes = [node("C", triple("surgery")), node("D", triple("surgery", "therapeutic schedule")), node("D")]
    twice = TreeRecord("adults with gout@After surgery, surgery again.", DecisionTree.from_preorder(nodes))
    made = swapped_copies([twice, *RECORDS], 1, chance=1.0)[0]
    assert [t.object for t in made.tree.triples] == ["surgery", "surgery"]
