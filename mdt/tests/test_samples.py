"""The sample of passages that ships with the package."""

from collections import Counter

from gatewise_mdt import RELATIONS, evaluate, linearise, locate_tree, parse, sample


def test_subjects_and_objects_are_verbatim_pieces_of_their_passage() -> None:
    for record in sample():
        for node, row in zip(record.tree.nodes, locate_tree(record.text, record.tree), strict=True):
            for triple, spans in zip(node.triples, row, strict=True):
                assert triple.subject in record.text
                assert triple.object in record.text
                assert None not in spans


def test_the_passages_are_varied() -> None:
    records = sample()
    assert len(records) >= 40
    assert len({record.text for record in records}) == len(records)
    assert len({record.more["specialty"] for record in records}) >= 15
    sizes = Counter(len(record.tree.nodes) for record in records)
    depths = Counter(record.tree.depth for record in records)
    assert set(sizes) == {3, 5, 7, 9}
    assert set(depths) == {2, 3, 4, 5}
    assert max(sizes.values()) <= len(records) / 2
    relations = Counter(triple.relation for record in records for triple in record.tree.triples)
    assert set(relations) == set(RELATIONS)
    assert min(relations.values()) >= 20
    joints = Counter(node.logical_rel for record in records for node in record.tree.nodes)
    assert min(joints[name] for name in ("and", "or", "null")) >= 20


def test_every_passage_says_what_it_is_for() -> None:
    for record in sample():
        assert record.more["note"] == "for demonstration, not medical advice"
        assert record.population
        assert record.passage.endswith(".")


def test_the_sample_goes_through_linearisation_and_metrics() -> None:
    trees = [record.tree for record in sample()]
    for record in sample():
        assert parse(linearise(record.tree, text=record.text)) == record.tree
    assert evaluate(trees, trees).tree_acc == 1


def test_callers_cannot_spoil_the_sample() -> None:
    sample().clear()
    assert sample()
