import pytest
from gatewise_mdt import DecisionTree, Triple, locate, locate_tree, read_trees
from gatewise_mdt.spans import find
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, properties, published, trees


@pytest.mark.parametrize(
    ("text", "phrase", "expected"),
    [
        ("Give Iron daily, iron weekly", "iron", ["Iron", "iron"]),
        ("the environment needs iron", "iron", ["iron"]),  # a word of its own before a piece of one
        ("antibiotics", "antibiotic", ["antibiotic"]),
        ("non-surgical treatment", "surgical treatment", []),
        ("post-surgical treatment", "surgical treatment", ["surgical treatment"]),
        ("the environment", "iron", []),
        ("200 mg", "00 mg", []),
        ("take  two\n tablets", "take two tablets", ["take  two\n tablets"]),
        ("10 mg or 100 mg", "10 mg", ["10 mg"]),
        ("eGFR ≥ 60 mL／min", "egfr ≥ 60 ml/min", ["eGFR ≥ 60 mL／min"]),
        ("400–800 IU", "400-800 iu", ["400–800 IU"]),
        ("the patient’s wish", "patient's wish", ["patient’s wish"]),
        ("血压１４０／９０ｍｍＨｇ", "140/90mmhg", ["１４０／９０ｍｍＨｇ"]),
        ("每日口服 100 mg", "每日口服100mg", ["每日口服 100 mg"]),
        ("CAP患者，中度", "中度", ["中度"]),
        ("cafe\u0301 au lait", "café", ["cafe\u0301"]),
        ("STRASSE", "straße", ["STRASSE"]),
        ("aspirin", "ibuprofen", []),
        ("", "x", []),
        ("x", " ", []),
    ],
)
def test_phrases_are_found_as_people_read_them(text: str, phrase: str, expected: list[str]) -> None:
    assert [text[span.start : span.end] for span in find(text, phrase)] == expected


def test_a_hyphen_makes_another_word() -> None:
    text = "non-surgical treatment, or surgical treatment"
    assert [span.start for span in find(text, "surgical treatment")] == [text.index("or surgical") + 3]


def test_the_nearest_occurrences_are_taken() -> None:
    text = "iron, then zinc 5 mg and iron 9 mg; zinc 5 mg"
    spans = locate(text, Triple(subject="iron", relation="dosage and administration", object="9 mg"))
    assert spans.subject is not None
    assert spans.subject.start == text.index("iron 9")
    twice = "osteoporosis in patients with osteoporosis: calcium"
    spans = locate(twice, Triple(subject="patients with osteoporosis", relation="clinical manifestation", object="osteoporosis"))
    assert spans.object is not None
    assert spans.object.start == 0  # not the one inside the subject


def test_objects_of_a_node_are_looked_for_together() -> None:
    text = "Adults@Pain with a hazy cornea is urgent. In lens wearers with pain, refer."
    nodes = [
        {
            "role": "C",
            "triples": [["Adults", "basic condition", "lens wearers"], ["Adults", "clinical manifestation", "pain"]],
            "logical_rel": "and",
        },
        {"role": "D", "triples": [["Adults", "therapeutic schedule", "refer"]], "logical_rel": "null"},
        {"role": "D", "triples": [], "logical_rel": "null"},
    ]
    spans = locate_tree(text, DecisionTree.from_preorder(nodes))[0][1].object
    assert spans is not None
    assert spans.start == text.index("with pain") + 5


def test_what_is_not_in_the_text_has_no_span() -> None:
    spans = locate("adults@give iron", Triple(subject="adults", relation="drug therapy", object="zinc"))
    assert spans.subject == (0, 6)
    assert spans.object is None
    assert locate("give iron", Triple(subject="adults", relation="drug therapy", object="iron")).subject is None


@properties
@given(trees, st.text(max_size=30))
def test_a_text_made_of_the_phrases_has_them_all(tree: DecisionTree, between: str) -> None:
    text = f" @{between}; ".join(part for triple in tree.triples for part in (triple.subject, triple.object))
    for node, row in zip(tree.nodes, locate_tree(text, tree), strict=True):
        for triple, spans in zip(node.triples, row, strict=True):
            for phrase, span in ((triple.subject, spans.subject), (triple.object, spans.object)):
                if span is None:  # nothing to be seen, or no beginning of a word, such as an accent alone
                    assert not find(f" {phrase} ", phrase)
                else:
                    assert 0 <= span.start < span.end <= len(text)


def test_every_phrase_of_the_hand_written_tree_is_found() -> None:
    for row in locate_tree(TEXT, DecisionTree.from_preorder(gout())):
        assert all(None not in spans for spans in row)


def test_published_phrases_are_nearly_all_found() -> None:
    for file in published():
        spans = [
            span
            for record in read_trees(file, repair=True).records
            for row in locate_tree(record.text, record.tree)
            for both in row
            for span in both
        ]
        # In the Chinese all are verbatim; in the English some were put into other words by the annotators.
        assert sum(span is not None for span in spans) / len(spans) >= (1 if file.name.startswith("zh") else 0.97)


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("give 2.5 mg daily", "5 mg", False),
        ("give 2.5 mg daily", "2", False),
        ("give 2.5 mg daily", "2.5 mg", True),
        ("give 0.5-1 mg", "1 mg", False),
        ("give 1,500 mg", "500 mg", False),
        ("give 1,500 mg", "1", False),
        ("give 1,500 mg", "1,500 mg", True),
        ("give 50 mg", "5", False),
        ("stages 1,2 and 3", "2", True),
        ("give 2·5 mg", "5 mg", False),
        ("ｇｉｖｅ ２．５ ｍｇ", "5 mg", False),
        ("ｇｉｖｅ ２．５ ｍｇ", "2.5 mg", True),
        ("每次 2.5 mg 口服", "5mg口服", False),
        ("每次 2.5 mg 口服", "2.5mg口服", True),
        ("Take 5. 10 days later stop", "5", True),
    ],
)
def test_a_number_is_found_whole_or_not_at_all(text: str, phrase: str, found: bool) -> None:
    assert bool(find(text, phrase)) == found
