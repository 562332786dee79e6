"""Splits by document: no document on both sides, nothing lost, and a share near to what was asked for."""

from itertools import combinations

import pytest
from gatewise_mdt import DecisionTree, TreeRecord
from gatewise_mdt.training.splitting import by_document, split
from hypothesis import given
from hypothesis import strategies as st
from mdt_trees import TEXT, gout, properties

from gatewise.errors import GatewiseError

TREE = DecisionTree.from_preorder(gout())


def records(names: list[str | None]) -> list[TreeRecord]:
    """Records of documents by name; those without one have texts of their own."""
    return [
        TreeRecord(f"{TEXT} {number}", TREE, number, {} if name is None else {"source": name})
        for number, name in enumerate(names, start=1)
    ]


@properties
@given(
    st.lists(st.sampled_from(["a.pdf", "b.pdf", "c.md", "d.md", None]), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_no_document_is_on_both_sides(names: list[str | None], share: float, seed: int) -> None:
    given_records = records(names)
    documents = len({name for name in names if name is not None}) + names.count(None)
    assert len(by_document(given_records)) == documents
    if documents < 2:
        with pytest.raises(GatewiseError, match="expected two or more"):
            split(given_records, share, seed=seed)
        return
    train, dev = split(given_records, share, seed=seed)
    assert train
    assert dev
    assert sorted(one.number for one in train + dev) == list(range(1, len(names) + 1))
    assert [one.number for one in dev] == sorted(one.number for one in dev)
    sides = [{one.more["source"] for one in side if "source" in one.more} for side in (train, dev)]
    assert not sides[0] & sides[1]
    assert (train, dev) == split(given_records, share, seed=seed)
    # Of documents of one record each the share is met to half a record, as far as each side needs one.
    if names.count(None) == len(names):
        assert abs(len(dev) - min(max(share * len(names), 1), len(names) - 1)) <= 0.5 + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_a_large_document_does_not_overrun_the_share(seed: int) -> None:
    sizes = {"large.pdf": 60, "a.pdf": 7, "b.pdf": 9, "c.pdf": 11, "d.pdf": 13}
    _, dev = split(records([name for name, size in sizes.items() for _ in range(size)]), 0.2, seed=seed)
    # 20 of 100 records: the best that sets of whole documents can do is 20; each order of drawing comes within half a small one.
    best = min(abs(20 - sum(some)) for k in range(1, 5) for some in combinations(sizes.values(), k))
    assert best <= abs(20 - len(dev)) <= 7
    assert "large.pdf" not in {one.more["source"] for one in dev}


def test_seeds_draw_other_documents() -> None:
    held = records([f"{number}.pdf" for number in range(20) for _ in range(3)])
    assert len({tuple(one.number for one in split(held, 0.2, seed=seed)[1]) for seed in range(5)}) > 1


def test_one_document_goes_by_several_spellings_and_a_text_that_comes_twice_by_none() -> None:
    named = [TreeRecord(TEXT, TREE, n, {"source": name}) for n, name in enumerate(["a/x.pdf", "./b/X.pdf", " a//x.pdf "])]
    assert len(by_document(named)) == 1
    nameless = [TreeRecord(text, TREE, 1, more) for text in ("one", "two", "one") for more in ({}, {"source": " "}, {"source": 5})]
    assert [len(document) for document in by_document(nameless)] == [6, 3]


def test_a_file_at_several_paths_is_one_document_and_so_are_its_versions() -> None:
    origins = [
        ("a.pdf", "1f"),
        ("b.pdf", "2e"),
        ("/home/ada/a.pdf", "1F"),
        ("b.pdf", "3d"),
        ("c.pdf", "2e"),
        ("", "3d"),
        ("d.pdf", ""),
    ]
    held = [TreeRecord(TEXT, TREE, n, {"source": name, "sha256": sha256}) for n, (name, sha256) in enumerate(origins)]
    assert [[one.number for one in document] for document in by_document(held)] == [[0, 2], [1, 3, 4, 5], [6]]


@pytest.mark.parametrize("share", [0, 1, -0.5, 2, float("nan")])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(GatewiseError, match="between 0 and 1"):
        split(records(["a", "b"]), share)
