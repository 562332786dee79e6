"""From text to tree with tiny models, and what is said when it does not go well."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, Extraction, Extractor, TreeRecord, linearise, measure, render, sample, training_rows
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.extractor import made_with
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.spans import locate_tree
from mdt_models import dictated, random_model
from mdt_trees import TEXT, gout, node

from gatewise import __version__
from gatewise.errors import GatewiseError
from gatewise.tasks import Template

pytest.importorskip("llguidance")

TREE = DecisionTree.from_preorder(gout())


def extract(model: Any, tokenizer: Any, text: str, language: Any = None, **settings: Any) -> Extraction:
    (found,) = Extractor(model, tokenizer, **settings)([text], language=language)
    assert isinstance(found, Extraction), found
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("settings", [{}, {"verbatim": True}])
def test_every_output_of_a_random_model_is_a_tree(seed: int, settings: dict) -> None:
    model, tokenizer = random_model(seed)
    for one in Extractor(model, tokenizer, max_new_tokens=200, **settings)([record.text for record in sample()[:3]]):
        assert isinstance(one, Extraction)
        assert DecisionTree.from_preorder(one.tree.to_preorder()) == one.tree
        assert not settings or not one.absent
        assert one.warnings or not one.is_empty or one.written.endswith("D")


def test_what_a_model_has_learnt_comes_through() -> None:
    model, tokenizer = dictated({prompt(TEXT, "en"): linearise(TREE, text=TEXT)})
    found = extract(model, tokenizer, TEXT, max_new_tokens=900)
    assert found.tree == TREE
    assert (found.language, found.absent, found.warnings) == ("en", (), ())


def test_an_extraction_says_what_it_was_made_with() -> None:
    model, tokenizer = random_model()
    before = datetime.now(UTC).replace(microsecond=0)
    found = extract(model, tokenizer, TEXT, max_new_tokens=150, base="maker/model-1b")
    assert found.made_with is not None
    made = dict(found.made_with)
    assert before <= datetime.fromisoformat(made.pop("date")) <= datetime.now(UTC)
    assert made == {
        "base": "maker/model-1b",
        "gatewise": __version__,
        "settings": {"verbatim": False, "max_new_tokens": 150, "dtype": "float32", "device": "cpu"},
    }
    assert found.record().extraction == found.made_with
    assert made_with(model, "", {"name": "a", "sha256": "b"}, {})["adapter"] == {"name": "a", "sha256": "b"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("maker/model-1b", "maker/model-1b"),
        ("smollm2-135m", "smollm2-135m"),
        ("/home/ada/models/small", "small"),
        ("~/models/small", "small"),
        ("..\\models\\small", "small"),
        ("./runs/a/adapter/", "adapter"),
        ("here/base", "base"),
        ("/models/sm\udcffll", "sm\ufffdll"),  # a file name of another encoding than UTF-8
    ],
)
def test_of_a_folder_only_its_own_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/base").mkdir(parents=True)
    assert made_with(None, given, None, {})["base"] == said


def test_spans_are_those_of_the_text_and_what_is_not_in_it_is_marked() -> None:
    model, tokenizer = dictated({"tree:": "C: adults with gout | sign | acute flare\nD: ~ | drug | aspirin\nD"})
    found = extract(model, tokenizer, TEXT)
    spans = locate_tree(TEXT, found.tree)
    assert [TEXT[span.start : span.end] for span in spans[0][0] if span] == ["adults with gout", "acute flare"]
    assert spans[1][0].object is None
    assert [triple.object for triple in found.absent] == ["aspirin"]
    record = found.record(4, {"source": "x.md"})
    assert record.to_json()["absent"] == [["adults with gout", "drug therapy", "aspirin"]]
    assert (record.number, record.more["source"]) == (4, "x.md")
    assert "# not in the text: adults with gout | drug therapy | aspirin\n" in render([record], "text")
    assert "<b>aspirin</b><br/>(not in the text)" in render([record], "mermaid")
    assert json.loads(render([record], "json"))[0]["spans"][1][0] == {"subject": [0, 16], "object": None}
    for format in ("svg", "html"):
        assert "not in the text" in render([record], format)
    kept = extract(model, tokenizer, TEXT, verbatim=True, max_new_tokens=300)
    assert kept.absent == ()


def test_chinese_comes_in_and_out() -> None:
    text = "成人患者@轻度脱水可以口服生理盐水。"
    model, tokenizer = dictated({"诊疗决策树：": "C: 成人患者 | 临床表现 | 轻度脱水\nD: ~ | 治疗药物 | 生理盐水\nD"})
    found = extract(model, tokenizer, text, verbatim=True)
    assert found.language == "zh"
    assert [triple.relation for triple in found.tree.triples] == ["临床表现", "治疗药物"]


def test_an_output_that_is_cut_is_closed_and_says_so() -> None:
    written = "C: adults with gout | sign | acute flare\nD: ~ | drug | colchicine and much more that goes on and on"
    model, tokenizer = dictated({"tree:": written})
    found = extract(model, tokenizer, TEXT, max_new_tokens=110)
    assert [node.role for node in found.tree.nodes] == ["C", "D", "D"]
    assert (
        "the output ended before it was whole: allow more new tokens" in found.warnings[0]
        or "brought to a close" in found.warnings[0]
    )
    nothing = extract(model, tokenizer, TEXT, max_new_tokens=12)
    assert nothing.is_empty
    assert nothing.warnings


def test_a_text_with_a_fault_does_not_stop_the_others() -> None:
    model, tokenizer = dictated({"tree:": "D: adults with gout | drug | colchicine"})
    texts = ["", TEXT, "gout@", "日本語のテキストです。", "Пациенты с подагрой", "x " * 3000, "\ud800 and more", "123"]
    found = Extractor(model, tokenizer)(texts)
    assert isinstance(found[1], Extraction)
    said = [str(one) for one in found if isinstance(one, GatewiseError)]
    wanted = [
        "is empty",
        "no passage after it",
        "another script",
        "another script",
        "tokens of the 2048",
        "surrogate",
        "no letters",
    ]
    assert len(said) == len(wanted)
    for sentence, part in zip(said, wanted, strict=True):
        assert part in sentence


def test_what_cannot_be_meant_is_refused() -> None:
    model, tokenizer = dictated({"tree:": "D"})
    with pytest.raises(GatewiseError, match=r"without \{source\}"):
        extract(model, tokenizer, TEXT, template=Template("Text: {text}"))
    with pytest.raises(GatewiseError, match="language is 'de'"):
        extract(model, tokenizer, TEXT, language="de")


def test_the_model_stays_as_it_was() -> None:
    model, tokenizer = random_model()
    model.train()
    extract(model, tokenizer, TEXT, max_new_tokens=5)
    assert model.training


def test_trees_are_measured_and_what_fails_counts_as_nothing_found() -> None:
    model, tokenizer = dictated({prompt(TEXT, "en"): linearise(TREE)})
    extractor = Extractor(model, tokenizer, max_new_tokens=900)
    record, too_long = TreeRecord(TEXT, TREE), TreeRecord(f"a@{'x ' * 3000}", TREE)
    values = measure(extractor, [record, too_long], mistakes=True)
    assert (values["tree_acc"], values["n"], values["failed"], values["mistakes"]["malformed"]["count"]) == (0.5, 2, 1, 1)
    assert values["intervals"]["tree_acc"] == {"low": 0, "high": 1}
    with pytest.raises(GatewiseError, match="no gold trees"):
        measure(extractor, [])


def test_a_gold_tree_without_a_triple_is_asked_for_in_the_language_of_its_text() -> None:
    """As in training: what was learnt of the Chinese prompt is found."""
    record = TreeRecord("高血压患者@高血压是最常见的慢性病之一。", DecisionTree.from_preorder([node("D")]))
    (row,) = training_rows([record])
    model, tokenizer = dictated({row["source"]: row["target"]})
    assert row["source"] == prompt(record.text, "zh")
    assert measure(Extractor(model, tokenizer), [record])["failed"] == 0


def test_a_text_that_cannot_be_kept_to_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Course.grammar
    monkeypatch.setattr(Course, "grammar", lambda self, hurry=False: "(" if "huge" in self._parts else whole(self, hurry))
    model, tokenizer = dictated({"tree:": linearise(TREE)})
    found = Extractor(model, tokenizer, verbatim=True, max_new_tokens=900)(["adults@huge", TEXT], language="en")
    assert "cannot be built" in str(found[0])
    assert isinstance(found[1], Extraction)
    assert found[1].tree == TREE
