import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from gatewise.errors import GatewiseError
from gatewise.tasks import Records, final_number, load_records, sample_names

Write = Callable[..., Path]
LABELLED = [
    {"text": "a lamp", "label": "good"},
    {"text": "灯坏了", "label": "bad"},
    {"text": "three", "label": "mixed"},
]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a", "label": "x"}, "label"),
        ({"premise": "a", "hypothesis": "b", "label": "x"}, "label"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "choice"),
        ({"question": "a", "answer": "2 + 2 = 4\n#### 4"}, "number"),
        ({"source": "a", "target": "b"}, "generation"),
        ({"source": "a", "targets": ["b", "c"]}, "generation"),
        ({"text": "a", "label": "x", "source": "the web", "answer": 3}, "label"),
    ],
)
def test_kind_follows_the_fields(write: Write, row: dict[str, Any], kind: str) -> None:
    records = load_records(write([row]))
    assert records.kind == kind
    assert records.rows == [row]
    assert (records.labels is not None) == (kind == "label")


def test_labels_are_sorted_and_cover_the_whole_file_even_when_limited(write: Write) -> None:
    records = load_records(write(LABELLED), limit=2)
    assert [row["label"] for row in records.rows] == ["good", "bad"]
    assert records.labels == ["bad", "good", "mixed"]
    assert records.gold_index(records.rows[0]) == 1


def test_given_labels_set_the_order_and_refuse_others(write: Write) -> None:
    path = write(LABELLED)
    assert load_records(path, labels=["mixed", "good", "bad", "more"]).labels == ["mixed", "good", "bad", "more"]
    with pytest.raises(GatewiseError, match=r"rows.jsonl, line 3: field 'label' is 'mixed', expected 'bad' or 'good'"):
        load_records(path, labels=["bad", "good"])
    with pytest.raises(GatewiseError, match="each name once"):
        load_records(path, labels=["bad", "bad"])
    with pytest.raises(GatewiseError, match="labels were given"):
        load_records(write([{"source": "a", "target": "b"}]), labels=["bad"])


def test_labels_may_be_whole_numbers(write: Write) -> None:
    path = write([{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}])
    assert load_records(path).labels == ["0", "1"]
    assert load_records(path, labels=["1", "0"]).rows[0] == {"text": "a", "label": "1"}


def test_limit_stops_reading_where_no_label_set_is_needed(write: Write) -> None:
    path = write('{"source": "a", "target": "b"}\n{"source": "c", "target": "d"}\nnot json\n')
    assert len(load_records(path, limit=2)) == 2
    with pytest.raises(GatewiseError, match="line 3"):
        load_records(path)
    with pytest.raises(GatewiseError, match="limit is 0"):
        load_records(path, limit=0)


def _second(line: str, first: str = '{"text": "a", "label": "x"}') -> str:
    return f"{first}\n{line}\n"


CHOICE = '{"question": "q", "choices": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_second('{"text": "a"}'), """line 2: field 'label' is missing (a line needs "text" and "label")"""),
        (_second('{"text": "a", "label": "x"'), "line 2: not valid JSON: Expecting ',' delimiter at column 27"),
        (_second("[" * 100_000), "line 2: not valid JSON"),
        (_second('["a"]'), 'line 2: expected an object such as {"text": ..., "label": ...}, found a list'),
        (_second('{"text": 3, "label": "x"}'), "line 2: field 'text' must be a string, found a number"),
        (_second('{"text": "a", "label": null}'), "line 2: field 'label' must be a string, found null"),
        (_second('{"text": "  ", "label": "x"}'), "line 2: field 'text' is empty"),
        (_second('{"text": "\\ud83d", "label": "x"}'), "line 2: field 'text' has half of a surrogate pair"),
        (_second('{"source": "a", "target": "b"}'), 'line 2: this row has "source" and "target", but'),
        (_second('{"question": "q", "choices": ["a", "b"], "answer": 2}', CHOICE), "line 2: field 'answer' is 2, but"),
        (
            _second('{"question": "q", "choices": ["a", "b"], "answer": -1}', CHOICE),
            "the 2 choices are numbered 0 to 1",
        ),
        (
            _second('{"question": "q", "choices": ["a", "b"], "answer": true}', CHOICE),
            "must be an index into the choices",
        ),
        (_second('{"question": "q", "choices": ["a"], "answer": 0}', CHOICE), "has 1 entries, expected at least 2"),
        (
            _second('{"question": "q", "choices": "ab", "answer": 0}', CHOICE),
            "must be a list of strings, found a string",
        ),
        (_second('{"question": "q", "choices": ["a", 1], "answer": 0}', CHOICE), "entry 1 of field 'choices' must be"),
        ('{"source": "a", "targets": []}', "line 1: field 'targets' has 0 entries"),
        ('{"question": "q", "answer": "none"}', "line 1: field 'answer' has no number in it"),
        ('{"question": "q", "answer": 1}', """must be a string, found a number (an index needs "choices" beside it)"""),
        ('{"sentence": "a", "class": "x"}', "line 1: the fields are sentence and class; a line needs"),
        ('{"hypothesis": "a", "label": "x"}', "line 1: field 'premise' is missing"),
        ("", "is empty: expected rows with"),
        ("\n  \n", "is empty: expected rows with"),
        (
            b'{"text": "a", "label": "x"}\n{"text": "caf\xe9", "label": "x"}\n',
            "line 2: not UTF-8 (byte 14 of the line)",
        ),
    ],
)
def test_a_bad_line_is_reported_with_file_line_and_field(write: Write, content: str | bytes, message: str) -> None:
    path = write(content)
    with pytest.raises(GatewiseError, match=re.escape(message)) as caught:
        load_records(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_line_numbers_count_blank_lines_and_not_unicode_separators(write: Write) -> None:
    line = json.dumps({"text": "one\u2028two\x85three", "label": "x"}, ensure_ascii=False)
    path = write(f"\ufeff{line}\r\n\r\n" + '{"text": "a"}\n')
    with pytest.raises(GatewiseError, match="line 3: field 'label' is missing"):
        load_records(path)


def test_json_list(write: Write) -> None:
    assert load_records(write(json.dumps(LABELLED, indent=1), "rows.json")).rows == LABELLED
    with pytest.raises(GatewiseError, match=r"rows\.json, item 2: field 'label' is missing"):
        load_records(write(json.dumps([LABELLED[0], {"text": "a"}]), "rows.json"))
    with pytest.raises(GatewiseError, match=r"rows.json: expected a list of objects, found an object"):
        load_records(write("{}", "rows.json"))
    with pytest.raises(GatewiseError, match=r"rows.json: not valid JSON: .* at line 2, column 1"):
        load_records(write("[\n", "rows.json"))


def test_csv(write: Write) -> None:
    path = write('text,label\n"two\nlines, one cell",good\n灯坏了, bad\n', "rows.csv")
    records = load_records(path)
    assert records.rows == [{"text": "two\nlines, one cell", "label": "good"}, {"text": "灯坏了", "label": "bad"}]
    path = write('question,choices,answer\nq,"[""a"", ""b""]",1\n', "rows.csv")
    assert load_records(path).rows == [{"question": "q", "choices": ["a", "b"], "answer": 1}]
    path = write("question,answer\nq,#### 7\n", "rows.csv")
    assert load_records(path).rows == [{"question": "q", "answer": "#### 7"}]
    before = csv.field_size_limit()
    assert len(load_records(write(f"text,label\n{'a' * 200_000},good\n", "rows.csv")).rows[0]["text"]) == 200_000
    assert csv.field_size_limit() == before == 131_072


@pytest.mark.parametrize("targets", [None, "", []])
def test_targets_that_say_nothing_are_left_out(write: Write, targets: object) -> None:
    rows = load_records(write(json.dumps({"source": "q", "target": "a long answer", "targets": targets}) + "\n")).rows
    assert rows == [{"source": "q", "target": "a long answer"}]


@pytest.mark.parametrize("targets", ["a long answer", ["other", 5], [""]])
def test_targets_beside_a_target_are_checked_too(write: Write, targets: object) -> None:
    with pytest.raises(GatewiseError, match="targets"):
        load_records(write(json.dumps({"source": "q", "target": "a long answer", "targets": targets}) + "\n"))


def test_records_without_rows_are_refused() -> None:
    with pytest.raises(GatewiseError, match="nothing has no rows"):
        Records("generation", [], None, "nothing")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a\nb",x\nc,\n', "line 4: field 'label' is empty"),
        ("text,label\na\n", "line 2: 1 cells, but the header has 2 columns"),
        ('text,label\n"a,b\n', "line 2: not valid CSV"),
        ("question,choices,answer\nq,a|b,1\n", "line 2: field 'choices' must be a JSON list"),
        ('question,choices,answer\nq,"[""a"", ""b""]",b\n', "line 2: field 'answer' must be an index"),
        ("text,label\n", "is empty"),
        ("text,label,text\na,b,c\n", "line 1: the column 'text' is there twice"),
        ('source,target,targets\na,b,"[1]"\n', "entry 0 of field 'targets' must be a string"),
        ("review,stars\na,b\n", "line 2: the fields are review and stars"),
    ],
)
def test_bad_csv(write: Write, content: str, message: str) -> None:
    with pytest.raises(GatewiseError, match=re.escape(message)):
        load_records(write(content, "rows.csv"))


def test_a_csv_text_may_begin_with_a_blank_and_a_quote(write: Write) -> None:
    """Within quotes it is the text; a blank between comma and quote is not."""
    rows = load_records(write('text, label\n" ""Hello"" ", "pos"\n"\t""a, b""\n",neg\nc,pos\n', "rows.csv")).rows
    assert [row["text"] for row in rows] == [' "Hello" ', '\t"a, b"\n', "c"]
    assert [row["label"] for row in rows] == ["pos", "neg", "pos"]


def test_sources_that_are_not_there(tmp_path: Path, write: Write) -> None:
    with pytest.raises(GatewiseError, match="the data's name is empty: give a file, sample:NAME or a data set's name"):
        load_records(" ")
    with pytest.raises(GatewiseError, match=r"nowhere\.jsonl: there is no such file"):
        load_records("nowhere.jsonl")
    with pytest.raises(GatewiseError, match="there is no such file"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(GatewiseError, match="is a folder"):
        load_records(tmp_path)
    with pytest.raises(GatewiseError, match=r"ends in '\.txt', expected \.jsonl, \.json or \.csv"):
        load_records(write("a", "rows.txt"))
    with pytest.raises(GatewiseError, match="only a Hugging Face dataset has splits"):
        load_records(write(LABELLED), split="train")
    with pytest.raises(GatewiseError, match="needs a split"):
        load_records("owner/name")
    with pytest.raises(GatewiseError, match="neither a file"):
        load_records("two words", split="train")


# ---- Hugging Face datasets: the library is there, the network is not ----


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(path: str, name: str | None = None, *, split: str | None = None) -> Any:
            calls.append((path, name, split))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def _classified(labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "mid"])})
    return datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features=features)


def test_hub_class_labels_become_names(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    calls = hub(_classified([1, 0, 1]))
    records = load_records("owner/name:config", split="train", limit=2)
    assert calls == [("owner/name", "config", "train")]
    assert [row["label"] for row in records.rows] == ["pos", "neg"]
    assert records.labels == ["mid", "neg", "pos"]


def test_hub_faults(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    hub(_classified([1, -1]))
    with pytest.raises(GatewiseError, match=r"name \(test\), row 2: field 'label' is -1"):
        load_records("name", split="test")
    hub(datasets.Dataset.from_dict({"sentence": ["a"], "label": ["x"]}))
    with pytest.raises(GatewiseError, match=r'has the columns sentence and label; expected "question", "choices"'):
        load_records("name", split="test")
    hub(ConnectionError("cannot reach the hub\nlong trace"))
    with pytest.raises(GatewiseError, match=r"could not be loaded: cannot reach the hub long trace$"):
        load_records("name", split="test")


# ---- numbers ----


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", "4"),
        ("#### 5\nQuestion: what? #### 8", "5"),
        ("so it costs $1,250.00.", "1250"),
        ("#### -$3.50 in all", "-3.5"),
        ("between 10-15", "15"),
        ("10 - 5", "5"),
        ("x=-7.", "-7"),
        ("−7", "-7"),
        ("#### .5", "0.5"),
        ("#### +12%", "12"),
        ("答案是5个", "5"),
        ("1,000,000 people and 1,2345", "2345"),
        ("model v2 has 3 wheels", "3"),
        ("#### none, but 6 before", "6"),
        ("9 apples ####", "9"),
        ("#### - 5", "-5"),
        ("#### –5", "-5"),
        ("pages 10–20", "20"),
        ("1e-3", "0.001"),
        ("#### 2.5E4 m", "25000"),
        ("#### 42\n1. Next", "42"),
        ("#### 10, 20", "10"),
        ("#### 100 3-inch nails", "100"),
        ("#### 18 18 18", "18"),
        ("####\n- 5 apples", "5"),
        ("12e99999999999999999999", "12"),
        ("room 12e3f", "12"),
        ("#### 5 m^2", "5"),
        ("#### 12.", "12"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


WHOLE_OF_NONE = [
    "#### 1/2",
    "#### 10:30",
    "#### 5 000",
    "#### 1'000",
    "#### 1.000.000",
    "#### 3 1/2",
    "#### 12,5",
    "#### 1,00,000",
    "#### 2½",
    "5 is #### 5 × 10^3",
]


@pytest.mark.parametrize("text", ["", "none", "####", "v2", "-", "$", ".", *WHOLE_OF_NONE])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


# ---- the samples ----


def test_samples_are_listed() -> None:
    trees = ["guideline-trees-dev", "guideline-trees-train"]
    assert sample_names() == [*trees, "reminder-dev", "reminder-train", "support-dev", "support-train"]
    with pytest.raises(GatewiseError, match=r"no sample 'supprt'; the samples are guideline-trees-dev, .* and support-train"):
        load_records("sample:supprt")


def test_support_sample_is_balanced_varied_and_has_no_row_twice() -> None:
    train = load_records("sample:support-train")
    dev = load_records("sample:support-dev", labels=train.labels)
    assert len(train) >= 200
    assert len(dev) >= 80
    for records in (train, dev):
        counts = Counter(row["label"] for row in records.rows)
        assert set(counts) == set(train.labels or ())
        assert len(counts) == 5
        assert len(set(counts.values())) == 1
        assert all(6 <= len(row["text"].split()) <= 40 for row in records.rows)
        # Every stretch of five rows has all five labels, so a limited sample stays balanced.
        assert all(len({row["label"] for row in records.rows[i : i + 5]}) == 5 for i in range(0, len(records), 5))
    texts = [re.sub(r"\W", "", row["text"].lower()) for row in train.rows + dev.rows]
    assert len(set(texts)) == len(texts)
