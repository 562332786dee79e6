"""Several trees for one text, of which the one most like the others is kept."""

import statistics
from typing import Any

import pytest
import torch
from gatewise_mdt import DecisionTree, Extraction, Extractor, extract, linearise, sample, tree_edit_ratio
from gatewise_mdt.extraction import extractor as extraction_module
from gatewise_mdt.extraction.extractor import most_alike
from gatewise_mdt.extraction.writing import Written
from hypothesis import given
from hypothesis import strategies as st
from mdt_models import dictated, random_model
from mdt_trees import TEXT, gout, node, properties, trees, triple

from gatewise.errors import GatewiseError

GOUT = DecisionTree.from_preorder(gout())
NOTHING = DecisionTree.from_preorder([node("D")])
SHORT = DecisionTree.from_preorder([node("C", triple("acute flare")), node("D", triple("naproxen", "drug therapy")), node("D")])


@properties
@given(st.lists(trees, min_size=2, max_size=5))
def test_the_kept_tree_has_the_least_mean_distance(drawn: list[DecisionTree]) -> None:
    means = [statistics.mean(tree_edit_ratio(one, other) for j, other in enumerate(drawn) if j != i) for i, one in enumerate(drawn)]
    best, agreement = most_alike(drawn, len(drawn))
    assert means[best] == pytest.approx(min(means))
    assert agreement == pytest.approx(1 - means[best])
    assert 0 <= agreement <= 1


def test_the_first_of_equals_is_kept() -> None:
    assert most_alike([GOUT, GOUT, GOUT], 3) == (0, 1.0)
    assert most_alike([NOTHING, GOUT], 2) == (0, 0.0)
    assert most_alike([NOTHING, GOUT, SHORT, GOUT], 4)[0] == 1
    assert most_alike([GOUT, GOUT], 3) == (0, 0.5)
    assert most_alike([GOUT], 3) == (0, 0.0)


def written_in_turn(monkeypatch: pytest.MonkeyPatch, first: DecisionTree | str, *drawn: DecisionTree | str) -> list[Any]:
    """Has the model write these trees for a text; gives the temperatures it was asked with."""
    asked: list[Any] = []

    def write(model: Any, tokenizer: Any, prompts: Any, courses: Any, *, temperature: float | None, **settings: Any) -> list[Any]:
        asked.append(temperature)
        outputs = [first] if temperature is None else drawn
        assert len(prompts) == len(outputs)
        return [Written(one if isinstance(one, str) else linearise(one)) for one in outputs]

    monkeypatch.setattr(extraction_module, "write", write)
    return asked


def test_the_extraction_is_that_of_the_kept_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dictated({})
    asked = written_in_turn(monkeypatch, NOTHING, GOUT, SHORT, GOUT)
    found = extract(model, tokenizer, TEXT, candidates=4, temperature=0.5, constrained=False)
    assert asked == [None, 0.5]
    assert found.tree == GOUT
    assert found.written == (linearise(GOUT),)
    wanted = 1 - (tree_edit_ratio(GOUT, NOTHING) + tree_edit_ratio(GOUT, SHORT)) / 3
    assert found.agreement == pytest.approx(wanted)
    assert wanted < 0.75
    assert found.warnings == (f"the 4 outputs that were written for this text differ much: they agree by {wanted:.2f} of 1",)
    assert found.record().to_json()["agreement"] == round(wanted, 3)


def test_trees_that_agree_are_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dictated({})
    written_in_turn(monkeypatch, GOUT, GOUT, SHORT, GOUT, GOUT, GOUT)
    found = extract(model, tokenizer, TEXT, candidates=6, constrained=False)
    assert found.agreement is not None
    assert 0.75 < found.agreement < 1
    assert found.warnings == ()


def test_what_is_no_tree_is_like_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dictated({})
    settings: dict[str, Any] = {"candidates": 3, "constrained": False}
    written_in_turn(monkeypatch, "no", GOUT, GOUT)
    found = extract(model, tokenizer, TEXT, **settings)
    differ = "the 3 outputs that were written for this text differ much: they agree by 0.50 of 1"
    assert found.agreement == 0.5
    assert found.warnings == ("1 of the 3 outputs that were written for this text are no tree", differ)
    written_in_turn(monkeypatch, "no", "nothing", GOUT)
    found = extract(model, tokenizer, TEXT, **settings)
    assert (found.tree, found.agreement) == (GOUT, 0.0)
    written_in_turn(monkeypatch, "no", "nothing", "never")
    with pytest.raises(GatewiseError, match="is no tree"):
        extract(model, tokenizer, TEXT, **settings)


def test_draws_depend_on_the_seed_alone() -> None:
    pytest.importorskip("llguidance")
    model, tokenizer = random_model()
    texts = [record.text for record in sample()[:2]]

    def drawn(seed: int, **settings: Any) -> list[Any]:
        extractor = Extractor(model, tokenizer, max_new_tokens=200, candidates=3, seed=seed, verbatim=True, **settings)
        return [(one.written, one.agreement) for one in extractor(texts) if isinstance(one, Extraction)]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    once = drawn(0, temperature=9.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert drawn(0, temperature=9.0) == once
    assert any(drawn(seed, temperature=9.0) != once for seed in (1, 2, 3))
    single = [
        (one.written, 1.0)
        for one in Extractor(model, tokenizer, max_new_tokens=200, verbatim=True)(texts)
        if isinstance(one, Extraction)
    ]
    assert drawn(0, temperature=1e-4) == single


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"candidates": 0}, "candidates is 0: expected at least 1"),
        ({"candidates": 2}, "or at least 3"),
        ({"candidates": 3, "pipeline": True}, "leave one of the two out"),
        ({"candidates": 3, "temperature": 0.0}, "temperature is 0.0: expected a number above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, said: str) -> None:
    model, tokenizer = dictated({})
    with pytest.raises(GatewiseError, match=said):
        extract(model, tokenizer, TEXT, constrained=False, **settings)
