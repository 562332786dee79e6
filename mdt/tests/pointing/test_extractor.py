"""Trees from texts: a model that learns four passages by heart, stages from gold, odd texts, batches, and damage."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gatewise_mdt import DecisionTree, Extraction, Extractor, load_extractor, measure
from gatewise_mdt.extraction.extractor import Text
from gatewise_mdt.pointing import extractor as extractor_module
from gatewise_mdt.pointing.calibration import Calibration, fitted
from gatewise_mdt.pointing.decoding import Found
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.heads import HeadSettings
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_records
from gatewise_mdt.pointing.targets import KINDS, NOBODY, POPULATION, Mention, Pointed
from gatewise_mdt.pointing.units import Units
from gatewise_mdt.records import TreeRecord
from mdt_models import random_adapter_folder
from mdt_trees import node
from pointing_models import RECORDS, encoder, pointing_model
from tiny_run import byte_tokenizer

from gatewise.errors import GatewiseError

TEXTS = [record.text for record in RECORDS]
NOTE: dict[str, Any] = {"task": "text2mdt", "heads": {"hidden": 16, "width": 16, "longest": 8, "dropout": 0.0}}


@pytest.fixture(scope="module")
def learnt() -> PointingExtractor:
    """Has learnt RECORDS by heart."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = PointingModel(encoder(), HeadSettings(hidden=16, width=32, longest=8, dropout=0.0)).train()
    batch = PointingCollator(tokenizer)(encode_records(RECORDS, tokenizer, 8)[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return PointingExtractor(model.eval(), tokenizer, calibration=Calibration())


@pytest.fixture(scope="module")
def untrained() -> PointingExtractor:
    return PointingExtractor(pointing_model(), byte_tokenizer(), calibration=Calibration())


def sound(found: list[Extraction | GatewiseError]) -> list[Extraction]:
    assert all(isinstance(one, Extraction) for one in found), found
    return [one for one in found if isinstance(one, Extraction)]


# ---- what was learnt ----


def test_it_learns_four_passages_by_heart(learnt: PointingExtractor) -> None:
    found = sound(learnt(TEXTS))
    assert [one.tree for one in found] == [record.tree for record in RECORDS]
    values = measure(learnt, RECORDS)
    assert (values["tree_acc"], values["ter"], values["failed"]) == (1.0, 0.0, 0)
    for one in found:
        assert one.absent == ()
        assert one.confidence is not None
        assert [value is None for value in one.confidence] == [node.is_empty for node in one.tree.nodes]
        assert all(0.9 < value <= 1 for value in one.confidence if value is not None)
        assert one.made_with is not None
        assert one.made_with["settings"]["pointing"] is True


def test_batches_change_nothing(learnt: PointingExtractor, untrained: PointingExtractor) -> None:
    for extractor in (learnt, untrained):
        texts = [*TEXTS, "a@b", "cool burns", f"{TEXTS[0]} {TEXTS[2]}"]
        one_by_one = sound(replace(extractor, batch_size=1)(texts, language="en"))
        order = random.Random(1).sample(range(len(texts)), len(texts))
        shuffled = sound(replace(extractor, batch_size=3)([texts[i] for i in order], language="en"))
        for i, other in zip(order, shuffled, strict=True):
            assert other.tree == one_by_one[i].tree
            assert other.confidence == pytest.approx(one_by_one[i].confidence, abs=1e-4)


# ---- odd texts ----


def test_texts_that_give_no_tree_say_why_in_their_place(untrained: PointingExtractor) -> None:
    odd = ["", " \n", "@", "adults@", "half a pair \ud83d", "word " * 5000]
    found = untrained([TEXTS[0], *odd, TEXTS[1]], language="en")
    assert [isinstance(one, GatewiseError) for one in found] == [False, *[True] * len(odd), False]
    said = [str(one) for one in found[1:-1]]
    assert "the text is empty" in said[0]
    assert 'a population before the "@" and no passage' in said[3]
    assert said[5] == "the text has 25000 tokens, but the model reads at most 512: cut it into passages"


_ODD = [
    "gout",
    "@",
    "or",
    "成人",
    "发热",
    "，",
    "5\u2009mg",
    "if\u00a0not",
    "\n",
    "\u200b",
    "👩‍⚕️",
    "é",
    "½",
    "~",
    "D:",
    "\u00ad",
    "１",
]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_heads_say_is_a_tree_of_the_text(seed: int) -> None:
    draw = random.Random(seed)
    model = pointing_model(["llama", "bert"][seed % 2])
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=[0.05, 0.3, 1.0][seed % 3])
    texts = ["x@y" + "".join(draw.choice(_ODD) + draw.choice([" ", ""]) for _ in range(draw.randrange(1, 30))) for _ in range(5)]
    extractor = PointingExtractor(model, byte_tokenizer(), calibration=Calibration())
    found = sound(extractor(texts, language="en"))
    for one in found:
        assert one.absent == ()
        assert (one.confidence is None) == one.is_empty
        assert one.confidence is None or len(one.confidence) == len(one.tree.nodes)
        assert all(value is None or 0 <= value <= 1 for value in one.confidence or ())


def test_a_decision_without_a_place_is_said(untrained: PointingExtractor) -> None:
    """Two decisions and no condition between them: a tree has room for one. What is said of nobody asks for no room."""
    text = "adults with gout@Give colchicine. Give aspirin."
    units = Units.of(text)
    words = [text[span.start : span.end] for span in units.spans]
    drugs = [words.index(drug) for drug in ("colchicine", "aspirin")]
    mentions = tuple(Mention(at, at + 1, KINDS.index(("drug therapy", "D"))) for at in drugs)
    both = Pointed(mentions, (POPULATION, POPULATION), ((0,), (1,)), (0, 1), ("null", "null"), 0, (None, None))
    found = untrained._tree(Text(text, "en"), units, Found(both))
    assert [triple.object for triple in found.tree.triples] == ["colchicine"]
    assert found.warnings == ("1 of the 2 nodes found have no place in the tree",)
    assert not untrained._tree(Text(text, "en"), units, Found(replace(both, subjects=(POPULATION, NOBODY)))).warnings
    alone = replace(both, subjects=(NOBODY, POPULATION), nodes=((1,),), own=(-1, 0), joins=("null",), children=(None,))
    (warning,) = untrained._tree(Text(text, "en"), units, Found(alone)).warnings
    assert warning.startswith("1 of the phrases found have no subject and are left out")


def test_no_phrase_is_a_single_empty_leaf(untrained: PointingExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractor_module.decoding, "best_phrases", lambda scores, lengths: [[] for _ in lengths])
    found = sound(untrained(TEXTS))
    assert all(one.tree == DecisionTree.from_preorder([node("D")]) for one in found)
    assert [one.confidence for one in found] == [None] * len(TEXTS)
    assert all(one.is_empty for one in found)


def test_too_many_phrases_are_a_fault_of_their_text_alone(untrained: PointingExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    def every_unit(scores: Any, lengths: torch.Tensor) -> list[list[tuple[int, int, int]]]:
        return [[(i, i + 1, 0) for i in range(int(length))] for length in lengths]

    monkeypatch.setattr(extractor_module.decoding, "best_phrases", every_unit)
    short, long = untrained(["a@b c d", "a@" + "b " * 80], language="en")
    assert isinstance(short, Extraction)
    assert str(long).startswith("82 phrases of the text would go into its tree, and at most 64 can: cut it into passages")


def test_progress_counts_texts_and_its_interrupt_goes_through(untrained: PointingExtractor) -> None:
    told: list[tuple[int, int]] = []
    replace(untrained, batch_size=3)(TEXTS, progress=lambda *what: told.append(what))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        untrained(TEXTS, progress=stop)


# ---- confidence ----


def test_unsure_nodes_are_warned_of_where_confidence_is_fitted(learnt: PointingExtractor) -> None:
    doubting = replace(learnt, calibration=Calibration((1.0, 0.0, 0.0, 0.0), -3.0))
    found = sound(doubting([TEXTS[1]]))[0]
    assert found.warnings == ("3 of the 3 nodes are more likely wrong than right",)
    assert all(value is not None and value < 0.5 for value in found.confidence or ())
    assert found.record().more["confidence"] == [round(value, 3) for value in found.confidence or () if value is not None]
    assert sound(learnt([TEXTS[1]]))[0].warnings == ()


def test_there_is_no_confidence_that_nobody_measured(learnt: PointingExtractor) -> None:
    found = sound(replace(learnt, calibration=None)(TEXTS))
    assert [one.tree for one in found] == [one.tree for one in sound(learnt(TEXTS))]
    assert all(one.confidence is None and "confidence" not in one.record().more for one in found)


def test_nodes_are_judged_against_gold(learnt: PointingExtractor) -> None:
    logs, right = learnt.judged(RECORDS)
    assert right == [True] * sum(not one.is_empty for record in RECORDS for one in record.tree.nodes)
    assert all(len(one) == 4 and max(one) <= 1e-6 for one in logs)
    wrong = [TreeRecord(RECORDS[0].text, RECORDS[3].tree), TreeRecord("@", RECORDS[3].tree)]
    assert set(learnt.judged(wrong)[1]) == {False}
    assert fitted(logs, right) is None  # all are right


# ---- loading ----


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a model that writes."""
    return random_adapter_folder(tmp_path_factory.mktemp("writer"))


@pytest.mark.parametrize("load", [PointingExtractor.load, load_extractor])
def test_each_extractor_takes_its_own_adapters(load: Callable[..., Any], writer: Path) -> None:
    if load is load_extractor:
        assert isinstance(load(writer, verbatim=True), Extractor)
        return
    with pytest.raises(GatewiseError, match="does not point at the text: expected an adapter of a run with task: text2mdt"):
        load(writer)
    (writer / "gatewise.json").write_text(json.dumps(NOTE))
    try:
        with pytest.raises(GatewiseError, match="points at the text: expected an adapter that was trained to write trees"):
            Extractor.load(writer)
    finally:
        (writer / "gatewise.json").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": None}, "gatewise.json is damaged"),
        ({"heads": {"hidden": 16, "depth": 3}}, "gatewise.json is damaged"),
        ({"heads": {"hidden": 16, "width": 10}}, "gatewise.json is damaged"),
        ({"calibration": {"weights": [1.0]}}, "gatewise.json is damaged"),
        ({"heads": {"hidden": 8}}, "the heads are made for states of 8 numbers, but the base model's have 16"),
        ({}, "the adapter has no weights for|does not fit"),  # those of the writer
    ],
)
def test_damaged_notes_say_one_sentence(change: dict[str, Any], said: str, writer: Path) -> None:
    (writer / "gatewise.json").write_text(json.dumps(NOTE | change))
    try:
        with pytest.raises(GatewiseError, match=said) as error:
            PointingExtractor.load(writer)
        assert len(str(error.value).splitlines()) == 1
    finally:
        (writer / "gatewise.json").unlink()
