import csv
import json
import re
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from gatewise.errors import GatewiseError
from gatewise.files import write_json_lines
from gatewise.tasks import final_number, load_records
from gatewise.tasks.encoding import references

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
    with pytest.raises(GatewiseError, match="limit is -1"):
        load_records(write(LABELLED), limit=-1)
    records = load_records(write(LABELLED), limit=2)
    assert [row["label"] for row in records.rows] == ["good", "bad"]
    assert records.labels == ["bad", "good", "mixed"]
    assert records.gold == [1, 0]


def test_given_labels_set_the_order_and_refuse_others(write: Write) -> None:
    path = write(LABELLED)
    assert load_records(path, labels=["mixed", "good", "bad", "more"]).labels == ["mixed", "good", "bad", "more"]
    with pytest.raises(
        GatewiseError, match=r"rows.jsonl, line 3: the label is 'mixed', expected one of bad, good: take the row out"
    ):
        load_records(path, labels=["bad", "good"])
    with pytest.raises(GatewiseError, match="each name once"):
        load_records(path, labels=["bad", "bad"])
    assert load_records(write([{"source": "a", "target": "b"}]), labels=["bad"]).labels is None


def test_labels_may_be_whole_numbers(write: Write) -> None:
    path = write([{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}])
    assert load_records(path).labels == ["0", "1"]
    assert load_records(path, labels=["1", "0"]).rows[0] == {"text": "a", "label": "1"}


def _second(line: str, first: str = '{"text": "a", "label": "x"}') -> str:
    return f"{first}\n{line}\n"


CHOICE = '{"question": "q", "choices": ["a", "b"], "answer": 0}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_second('{"text": "a"}'), "line 2: field 'label' is missing; expected text, label, as in the first row"),
        (_second('{"text": "a", "label": "x"'), "line 2: not valid JSON: Expecting ',' delimiter"),
        (_second("[" * 100_000), "line 2: not valid JSON"),
        (_second('["a"]'), 'line 2: expected an object such as {"text": ..., "label": ...}'),
        (
            _second('{"text": 3, "label": "x"}'),
            "line 2: field 'text': expected a text that is not empty",
        ),
        (
            _second('{"text": "a", "label": null}'),
            "line 2: field 'label': expected a text that is not empty",
        ),
        (_second('{"text": "  ", "label": "x"}'), "line 2: field 'text': expected a text that is not empty"),
        (_second('{"text": "\\ud83d", "label": "x"}'), "line 2: field 'text': expected a text"),
        (_second('{"source": "a", "target": "b"}'), "line 2: field 'text' is missing"),
        (_second('{"question": "q", "choices": ["a", "b"], "answer": 2}', CHOICE), "line 2: field 'answer' is 2, but"),
        (_second('{"question": "q", "choices": ["a", "b"], "answer": -1}', CHOICE), "line 2: field 'answer'"),
        (_second('{"question": "q", "choices": ["a", "b"], "answer": true}', CHOICE), "line 2: field 'answer'"),
        (_second('{"question": "q", "choices": ["a"], "answer": 0}', CHOICE), "line 2: field 'choices'"),
        (_second('{"question": "q", "choices": "ab", "answer": 0}', CHOICE), "line 2: field 'choices'"),
        (_second('{"question": "q", "choices": ["a", 1], "answer": 0}', CHOICE), "line 2: field 'choices'"),
        ('{"source": "a", "targets": []}', "line 1: field 'target' is missing"),
        ('{"source": "a", "target": "b", "targets": ["c", 5]}', "line 1: field 'targets'"),
        ('{"question": "q", "answer": "none"}', "line 1: field 'answer': expected a text that ends in '#### 42'"),
        ('{"question": "q", "answer": 1}', "line 1: field 'answer'"),
        ('{"sentence": "a", "class": "x"}', "line 1: the fields are sentence, class; expected question, choices, answer; or"),
        ('{"instruction": "a", "output": "x"}', "prompt, completion; if your columns have other names, map them: data.columns"),
        ("\n  \n", "has no rows"),
        (b'{"text": "a", "label": "x"}\n{"text": "caf\xe9", "label": "x"}\n', "line 2: not UTF-8"),
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
    with pytest.raises(GatewiseError, match=r"rows.json: expected a list of objects"):
        load_records(write("{}", "rows.json"))


def test_csv(write: Write) -> None:
    """Within quotes a blank or a quote is text; a blank between comma and quote is not."""
    path = write('text, label\n"two\nlines, one cell",good\n灯坏了, bad\n\n" ""Hello"" ", "good"\n', "rows.csv")
    rows = [
        {"text": "two\nlines, one cell", "label": "good"},
        {"text": "灯坏了", "label": "bad"},
        {"text": ' "Hello" ', "label": "good"},
    ]
    assert load_records(path).rows == rows
    for other in ";\t":
        assert load_records(write(f'text{other}label\n"a, b"{other}good\n', "rows.csv")).rows == [{"text": "a, b", "label": "good"}]
    before = csv.field_size_limit()
    assert len(load_records(write(f"text,label\n{'a' * 200_000},good\n", "rows.csv")).rows[0]["text"]) == 200_000
    assert csv.field_size_limit() == before == 131_072


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a\nb",x\nc,\n', "line 4: field 'label'"),
        ("text,label\na\n", "line 2: expected 2 cells, as in the header"),
        ("text,label\na,b,c\n", "line 2: expected 2 cells, as in the header"),
        ('text,label\n"a,b\n', "not valid CSV"),
        ('text,label\na,b\nc,"d"e\n', "after line 2: not valid CSV"),
        ("text,label\n", "has no rows"),
        ("text,label,text\na,b,c\n", "two columns have the same name"),
    ],
)
def test_bad_csv(write: Write, content: str, message: str) -> None:
    with pytest.raises(GatewiseError, match=re.escape(message)):
        load_records(write(content, "rows.csv"))


def test_json_under_the_name_of_lines_and_values_that_are_no_text(write: Write) -> None:
    row = {"text": "a", "label": "good"}
    for content, name, message in (
        (json.dumps([row], indent=1), "rows.jsonl", "rows.jsonl is a JSON list over several lines: name it .json"),
        (f"{json.dumps(row)}\n{json.dumps(row)}", "rows.json", "(one object a line is .jsonl)"),
        (json.dumps({**row, "label": 1.0}), "rows.jsonl", "that UTF-8 can write, got 1.0"),
    ):
        with pytest.raises(GatewiseError, match=re.escape(message)):
            load_records(write(content, name))
    with pytest.raises(GatewiseError, match="need their right answers; `gatewise serve` answers rows without"):
        load_records(write([{"text": "a"}]), columns={"label": "category"})


def test_a_row_may_have_one_right_answer_or_several(write: Write) -> None:
    rows = [{"source": "q", "target": "a", "targets": targets} for targets in (None, "", [], ["b", "c"])]
    assert [references(row) for row in load_records(write([*rows, {"source": "q", "targets": ["d"]}])).rows] == [
        ["a"], ["a"], ["a"], ["b", "c"], ["d"]
    ]  # fmt: skip


def test_sources_that_are_not_there(tmp_path: Path, write: Write) -> None:
    for source, split, message in (
        ("nowhere.jsonl", None, r"nowhere\.jsonl: there is no such file"),
        (tmp_path, None, "cannot be read: Is a directory"),
        (write("a", "rows.txt"), None, r"rows\.txt: expected a name that ends in \.jsonl, \.json, \.csv"),
        (write(LABELLED), "train", "rows.jsonl is not a Hugging Face dataset, .*: leave the split out"),
        ("owner/name", None, "owner/name is no file here, and a Hugging Face dataset, which needs a split such as 'train'"),
        ("sample:supprt", None, r"no sample 'supprt'; the samples are .*guideline-trees-dev, .*, support-dev, support-train"),
    ):
        with pytest.raises(GatewiseError, match=message):
            load_records(source, split=split)


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


NAMED_OTHERWISE = [
    {"id": 7, "message": "a lamp", "category": "good", "sent": datetime(2026, 1, 2)},
    {"id": 8, "message": "灯坏了", "category": "bad", "sent": None},
]
COLUMNS = {"text": "message", "label": "category"}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "parts-*", "hub", "own names"])
def test_columns_are_read_as_fields_from_every_source(
    kind: str, tmp_path: Path, hub: Callable[[Any], list[tuple[Any, ...]]]
) -> None:
    table = datasets.Dataset.from_list(NAMED_OTHERWISE)
    source, split = str(tmp_path / f"rows.{kind}"), None
    if kind == "hub":
        hub(table)
        source, split = "owner/name", "train"
    elif kind == "parts-*":
        source = str(tmp_path / "rows-*.parquet")
        for number in (0, 1):
            table.select([number]).to_parquet(tmp_path / f"rows-{number}.parquet")
    elif kind == "own names":
        source = str(tmp_path / "rows.csv")
        table.rename_columns({"message": "text", "category": "label"}).to_csv(source)
    elif kind == "json":
        table.to_json(source, lines=False)
    else:
        getattr(table, {"jsonl": "to_json"}.get(kind, f"to_{kind}"))(source)
    records = load_records(source, split=split, columns=COLUMNS)
    assert [(str(row["id"]), row["text"], row["label"]) for row in records.rows] == [
        ("7", "a lamp", "good"),
        ("8", "灯坏了", "bad"),
    ]
    assert records.rows[0].keys() == {"id", "text", "label", "sent"}  # a prompt can show the others, and not the answer's column
    assert records.labels == ["bad", "good"]
    write_json_lines(tmp_path / "answers.jsonl", records.rows)


def test_columns_may_take_the_place_of_others(write: Write, hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    path = write(
        [
            {
                "label": "a lamp",
                "text": "good",
                "conversation": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            }
        ]
    )
    assert load_records(path, columns={"text": "label", "label": "text"}).rows[0].items() >= {("text", "a lamp"), ("label", "good")}
    assert load_records(path, columns={"messages": "conversation"}).kind == "chat"
    hub(_classified([1, 0]).rename_column("label", "stars"))
    assert load_records("name", split="train", columns={"label": "stars"}).labels == ["mid", "neg", "pos"]


def test_an_unknown_column_is_named_with_those_there_are(write: Write) -> None:
    path = write("id,mesage,category\n7,a lamp,good\n", "rows.csv")
    said = "rows.csv, line 2: there is no column 'message' for 'text'; there are id, mesage, category; did you mean mesage?"
    with pytest.raises(GatewiseError, match=re.escape(said)):
        load_records(path, columns=COLUMNS)
    with pytest.raises(GatewiseError, match=r"line 3: field 'label' \(column 'category'\): expected a text that is not empty"):
        load_records(write("message,category\na,b\nc,\n", "other.csv"), columns=COLUMNS)
    with pytest.raises(GatewiseError, match=r"the fields are id, mesage, category; expected question"):
        load_records(path)
    for content in (b"PAR1", b""):
        with pytest.raises(GatewiseError, match=r"rows\.parquet: not a Parquet file, or a damaged one: "):
            load_records(write(content, "rows.parquet"))
    with pytest.raises(GatewiseError, match=r"none-\*\.csv: there is no such file"):
        load_records(path.parent / "none-*.csv")


def test_hub_faults(hub: Callable[[Any], list[tuple[Any, ...]]]) -> None:
    hub(_classified([1, -1]))
    with pytest.raises(GatewiseError, match=r"name \(test\), row 2: it has no label"):
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
