"""The sample of passages that ships with the package."""

from collections import Counter

from gatewise_mdt import RELATIONS, evaluate, linearise, locate_tree, parse, sample


def test_the_passages_are_varied() -> None:
    records = sample()
    assert len({record.text for record in records}) == len(records) >= 40
    assert len({record.more["specialty"] for record in records}) >= 15
    sizes = Counter(len(record.tree.nodes) for record in records)
    assert set(sizes) == {3, 5, 7, 9}
    assert max(sizes.values()) <= len(records) / 2
    relations = Counter(triple.relation for record in records for triple in record.tree.triples)
    assert set(relations) == set(RELATIONS)
    assert min(relations.values()) >= 20


def test_every_passage_has_its_note_and_a_tree_of_its_own_words_that_goes_through_lines_and_metrics() -> None:
    for record in sample():
        assert record.more["note"] == "for demonstration, not medical advice"
        assert record.population
        assert all(None not in spans for row in locate_tree(record.text, record.tree) for spans in row)
        assert parse(linearise(record.tree, text=record.text)) == record.tree
    trees = [record.tree for record in sample()]
    assert evaluate(trees, trees).tree_acc == 1
