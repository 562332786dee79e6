"""A pointing and a writing model that judge each other's trees, against judgements made one row at a time by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from gatewise_mdt import DecisionTree, Extraction, Extractor, linearise
from gatewise_mdt.extraction.extractor import Asked
from gatewise_mdt.extraction.measuring import measure
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.pointing.calibration import Calibration
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.model import PointingCollator, encode_records
from gatewise_mdt.pointing.together import TogetherExtractor
from gatewise_mdt.records import TreeRecord
from mdt_models import random_model
from pointing_models import RECORDS, pointing_model
from tiny_run import byte_tokenizer

from gatewise.errors import GatewiseError

pytest.importorskip("llguidance")

TEXTS = [record.text for record in RECORDS]


@pytest.fixture(scope="module")
def both() -> TogetherExtractor:
    pointer = PointingExtractor(pointing_model(), byte_tokenizer(), calibration=Calibration(), adapter={"name": "points"})
    writer = Extractor(*random_model(3), verbatim=True, level=0, max_new_tokens=120, adapter={"name": "writes"})
    return TogetherExtractor(pointer, writer, written=4)


def candidates(both: TogetherExtractor, text: str) -> list[DecisionTree]:
    """All trees of a text, as the extractor sees them."""
    found = [both.pointer([text], language="en")[0], *both.writer.several([Asked(text, "en")], both.written)[0]]
    return list(dict.fromkeys(one.tree for one in found if isinstance(one, Extraction)))


@torch.no_grad()
def by_hand(both: TogetherExtractor, text: str, tree: DecisionTree, room: int = 10_000) -> tuple[float | None, float]:
    """What the two models say of a tree: of one row at a time, the writing one token by token, with room for so much prompt."""
    tokenizer = both.pointer.tokenizer
    (row,), (pointed,) = encode_records([TreeRecord(text, tree)], tokenizer, 8)
    points = None
    if pointed.has_tree and not pointed.left_out:
        points = -float(both.pointer.model(**PointingCollator(tokenizer)([row])).loss)
    writing = both.writer.tokenizer
    before = writing(prompt(text, "en"), add_special_tokens=False)["input_ids"][-room:]
    answer = [*writing(f" {linearise(tree, 0, text=text)}", add_special_tokens=False)["input_ids"], writing.eos_token_id]
    total = 0.0
    for place, token in enumerate(answer):
        logits = both.writer.model(torch.tensor([[*before, *answer[:place]]])).logits[0, -1]
        total += float(logits.log_softmax(dim=-1)[token])
    return points, total


def test_both_judge_as_they_do_alone(both: TogetherExtractor) -> None:
    text = TEXTS[1]
    trees = [*candidates(both, text)[:3], RECORDS[1].tree, DecisionTree.from_preorder(elsewhere())]
    asked = Asked(text, "en")
    expected = [by_hand(both, text, tree) for tree in trees]
    points, writes = both.said_by_pointer(asked, trees), both.said_by_writer(asked, trees)
    assert points[-1] is None
    assert points[3] is not None
    for (one, other), point, write in zip(expected, points, writes, strict=True):
        assert (one is None) == (point is None)
        if one is not None:
            assert point == pytest.approx(one, rel=1e-4)
        assert write == pytest.approx(other, rel=1e-4)


def test_a_prompt_that_is_cut_is_cut_alike_for_all(both: TogetherExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    text, trees = TEXTS[1], [RECORDS[1].tree, DecisionTree.from_preorder(elsewhere())]
    tokenizer = both.writer.tokenizer
    longest = 1 + max(len(tokenizer(f" {linearise(tree)}", add_special_tokens=False)["input_ids"]) for tree in trees)
    monkeypatch.setattr(both.writer.model.config, "max_position_embeddings", longest + 9)
    expected = [by_hand(both, text, tree, room=9)[1] for tree in trees]
    assert both.said_by_writer(Asked(text, "en"), trees) == pytest.approx(expected, rel=1e-4)
    # Without any room the writing model judges nothing, and the other texts of the batch go on.
    monkeypatch.setattr(both.writer.model.config, "max_position_embeddings", longest)
    monkeypatch.setattr(Extractor, "several", lambda self, asked, count, progress=None: [written for _ in asked])
    written = [Extraction(text, tree, "en", (), ()) for tree in trees]
    found = both(TEXTS[1:3], language="en")
    assert [one.tree for one in found if isinstance(one, Extraction)] == [
        one.tree for one in both.pointer(TEXTS[1:3], language="en") if isinstance(one, Extraction)
    ]


def elsewhere() -> list[dict[str, Any]]:
    """A tree whose phrase does not stand in the text."""
    return [{"role": "D", "triples": [["children with cough", "drug therapy", "aspirin"]], "logical_rel": "null"}]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1000.0])
def test_the_tree_of_the_highest_sum_is_kept(both: TogetherExtractor, weight: float) -> None:
    both = replace(both, weight=weight)
    kept = both(TEXTS, language="en")
    pointed = both.pointer(TEXTS, language="en")
    written = both.writer.several([Asked(text, "en") for text in TEXTS], both.written)  # draws of this batch
    several = 0
    for text, one, first, more in zip(TEXTS, kept, pointed, written, strict=True):
        assert isinstance(one, Extraction)
        trees = list(dict.fromkeys(each.tree for each in (first, *more) if isinstance(each, Extraction)))
        several += len(trees) > 1
        says = zip(
            trees, both.said_by_pointer(Asked(text, "en"), trees), both.said_by_writer(Asked(text, "en"), trees), strict=True
        )
        sums = {tree: points + weight * writes for tree, points, writes in says if points is not None}
        # Of a random model some trees cannot be said by itself; then its own stands.
        assert one.tree == (max(sums, key=lambda tree: sums[tree]) if sums else first.tree)  # type: ignore[union-attr]
    assert several > 1


def test_what_a_tree_was_made_with_names_both(both: TogetherExtractor) -> None:
    found = both(TEXTS, language="en")
    for one in found:
        assert isinstance(one, Extraction)
        made = one.made_with or {}
        assert {made["adapter"]["name"], made["settings"]["together"]["name"]} == {"points", "writes"}
        assert (made["settings"]["together"]["written"], made["settings"]["together"]["weight"]) == (4, both.weight)
        assert (one.confidence is not None) == (made["adapter"]["name"] == "points")


def test_where_one_fails_the_others_tree_is_taken(both: TogetherExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = GatewiseError("the text is too long")
    with monkeypatch.context() as patch:
        patch.setattr(PointingExtractor, "__call__", lambda self, texts, **_: [fault] * len(texts))
        (one,) = both(TEXTS[:1], language="en")
        assert isinstance(one, Extraction)
        assert (one.made_with or {})["adapter"]["name"] == "writes"
    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "several", lambda self, asked, count, progress=None: [[fault] * count for _ in asked])
        (one,) = both(TEXTS[:1], language="en")
        assert isinstance(one, Extraction)
        assert (one.made_with or {})["adapter"]["name"] == "points"
        patch.setattr(PointingExtractor, "__call__", lambda self, texts, **_: [fault] * len(texts))
        assert both(TEXTS[:1], language="en") == [fault]


def test_stages_are_the_pointing_models(both: TogetherExtractor) -> None:
    for stage in ("triples", "nodes", "tree"):
        assert measure(both, RECORDS, stage) == measure(both.pointer, RECORDS, stage)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"written": 0}, "written is 0"), ({"weight": -1.0}, "weight is -1.0"), ({"weight": float("nan")}, "weight is nan")],
)
def test_settings_out_of_range(both: TogetherExtractor, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(GatewiseError, match=expected):
        replace(both, **settings)


@pytest.mark.parametrize("settings", [{"level": 1}, {"pipeline": True, "level": None}, {"candidates": 3}])
def test_another_way_of_writing(both: TogetherExtractor, settings: dict[str, Any]) -> None:
    with pytest.raises(GatewiseError, match="writes a tree"):
        replace(both, writer=replace(both.writer, **settings))
