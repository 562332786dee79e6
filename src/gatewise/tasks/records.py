"""Rows to train and measure on: from JSONL, JSON, CSV, Parquet, a shipped sample or a Hugging Face dataset, each row checked.

| kind       | fields of a row                                              |
|------------|--------------------------------------------------------------|
| label      | ``text``, ``label``; or ``premise``, ``hypothesis``, ``label`` |
| choice     | ``question``, ``choices`` (a list), ``answer`` (an index into it) |
| number     | ``question``, ``answer`` (text that ends in ``#### n``)        |
| generation | ``source``, ``target``; or ``source``, ``targets`` (a list)    |
| chat       | ``messages``; or ``prompt``, ``completion``: see ``chat.py``     |

A label may be a whole number. A row may have more fields; a template can write them into its prompt. Lists cannot be read from CSV.
Where a source calls its fields otherwise, ``columns`` says how: ``{"text": "message"}`` reads the column "message" as "text".
"""

import csv
import io
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from difflib import get_close_matches
from importlib import resources
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from gatewise.errors import GatewiseError, reason_of
from gatewise.tasks.chat import conversation, is_conversation

Kind = Literal["label", "choice", "generation", "number", "chat"]
Row = dict[str, Any]
Fields = dict[str, TypeAdapter[Any]]
"""What each field of a row must be."""
SAMPLE_PREFIX = "sample:"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass
class Records:
    """Rows of one kind, in the order of their source.

    Attributes:
        labels: the label names in a fixed order (kind "label"), else None. The position in it is a label's class index.
        source: where the rows came from, as the user wrote it.
        columns: field -> the source's name for it, where that is another; None for none.
        shown: further fields that are a part of what a row asks, such as those that a prompt of one's own shows.
        gold: of each row, the position of the right answer among its candidates (kinds "label" and "choice"); else empty.
    """

    kind: Kind
    rows: list[Row]
    labels: list[str] | None
    source: str
    columns: Mapping[str, str] | None = None
    shown: tuple[str, ...] = ()
    gold: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.labels is not None:
            self.gold = [self.labels.index(row["label"]) for row in self.rows]
        else:
            self.gold = [int(row["answer"]) for row in self.rows] if self.kind == "choice" else []

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, at: Iterable[int]) -> "Records":
        """Some of the rows, by their positions."""
        return replace(self, rows=[self.rows[one] for one in at])


def load_records(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    labels: list[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Records:
    """Reads and checks all rows of a source.

    Args:
        source: a ``.jsonl``, ``.json`` (a list), ``.csv`` or ``.parquet`` file, or several with ``*`` in the name; ``sample:NAME``,
            a sample shipped with the package; or the name of a Hugging Face dataset, ``name`` or ``name:config``.
        split: the split of a Hugging Face dataset, such as "train"; needed there and refused elsewhere.
        limit: keep only the first ``limit`` rows. The label set is still that of the whole source.
        labels: the label names in their order, for instance those of the training set; otherwise the sorted labels
            found. Ignored for rows without labels.
        columns: field of a row -> the column that it is read from. A source that has the field and no such column is read as it is.

    Raises:
        GatewiseError: the source cannot be read, or a row is not what its kind needs: names the file, line and field.
    """
    name = str(source)
    if labels is not None and len(set(labels)) < len(labels):
        raise GatewiseError(f"labels are {', '.join(labels)}: expected each name once")
    if limit is not None and limit < 1:
        raise GatewiseError(f"limit is {limit}: expected at least 1 row, or None for all")
    is_hub = is_data_set(name)
    if is_hub != (split is not None):
        raise GatewiseError(
            f"{name} is {'no file here, and a' if is_hub else 'not a'} Hugging Face dataset, which needs a split such as 'train': "
            f"{'give one, or the name of a file' if is_hub else 'leave the split out'}"
        )
    if split is not None:
        numbered, hub_labels = _read_hub(name, split, (columns or {}).get("label", "label"))
        labels = labels or hub_labels
    else:
        sample = name.removeprefix(SAMPLE_PREFIX)
        files = files_of_source(name) if sample == name else [_sample(sample)]
        numbered = chain.from_iterable(_read_file(file, str(file) if "*" in name else name) for file in files)
    kind: Kind | None = None
    rows: list[Row] = []
    for where, row in numbered:
        if not isinstance(row, dict):
            raise GatewiseError(f'{where}: expected an object such as {{"text": ..., "label": ...}}')
        if columns:
            row = _renamed(row, columns, where if kind is None else None)
        if kind is None:
            kind, fields = _shape_of(row, where)
        if kind == "generation":  # each row may have one right answer or several
            fields = _TARGETS if row.get("targets") else _TARGET
        rows.append(_with_messages(row, where) if kind == "chat" else _checked(row, fields, where, columns or {}))
        if kind == "label" and labels is not None and rows[-1]["label"] not in labels:
            raise GatewiseError(
                f"{where}: the label is {rows[-1]['label']!r}, expected one of {', '.join(labels)}: take the row out, "
                "or name all labels"
            )
    if kind is None:
        raise GatewiseError(f"{name} has no rows")
    if kind != "label":
        return Records(kind, rows[:limit], None, name, columns)
    return Records(kind, rows[:limit], list(labels or sorted({row["label"] for row in rows})), name, columns)


def files_of_source(source: str) -> list[Path]:
    """The files of a source: where its name has a ``*``, those that there are. What is no file is returned as a path to none."""
    path = Path(os.path.expanduser(source))
    return (sorted(path.parent.glob(path.name)) if "*" in path.name else []) or [path]


def is_data_set(source: str) -> bool:
    """Whether a source is a Hugging Face dataset: no sample, and no file."""
    path = Path(os.path.expanduser(source))
    return not source.startswith(SAMPLE_PREFIX) and path.suffix.lower() not in SUFFIXES and not path.exists()


def check_labels(records: Records, advice: str) -> None:
    """Refuses rows that leave nothing to choose between.

    Raises:
        GatewiseError: there is one label only.
    """
    if records.labels is not None and len(records.labels) == 1:
        raise GatewiseError(
            f"all rows of {records.source} have the label {records.labels[0]!r}, so that any answer would be right: {advice}"
        )


def _renamed(row: Row, columns: Mapping[str, str], first: str | None) -> Row:
    """A row with the fields' own names.

    Args:
        first: where the row is, if it is the first, which shows the columns that there are.

    Raises:
        GatewiseError: the first row has neither a column nor the field that it would be.
    """
    for field_name, column in columns.items() if first else ():
        if column not in row and field_name not in row:
            near = get_close_matches(column, map(str, row), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if not near and field_name in ("label", "target", "answer"):
                hint = ": rows to train or measure on need their right answers; `gatewise serve` answers rows without"
            raise GatewiseError(
                f"{first}: there is no column {column!r} for {field_name!r}; there are {', '.join(map(str, row))}{hint}"
            )
    found = {name: row[column] for name, column in columns.items() if column in row}
    return {**{name: value for name, value in row.items() if name not in columns.values()}, **found}


# ---- sources: each yields (where, row), unchecked ----


def _read_file(path: Any, name: str) -> Iterator[tuple[str, Any]]:
    suffix = path.suffix.lower()
    try:
        content = path.read_bytes()
        if suffix == ".parquet":
            yield from _read_parquet(content, name)
            return
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise GatewiseError(f"{name}, line {line}: not UTF-8; save the file as UTF-8") from error
    except FileNotFoundError:
        raise GatewiseError(f"{name}: there is no such file") from None
    except OSError as error:
        raise GatewiseError(f"{name} cannot be read: {error.strerror}") from error
    if suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                if number == 1 and line.strip() == "[":
                    raise GatewiseError(f"{name} is a JSON list over several lines: name it .json (.jsonl has one object a line)")
                yield f"{name}, line {number}", _parsed(line, f"{name}, line {number}")
    elif suffix == ".json":
        items = _parsed(text, name)
        if not isinstance(items, list):
            raise GatewiseError(f"{name}: expected a list of objects (one object a line is .jsonl)")
        yield from ((f"{name}, item {number}", item) for number, item in enumerate(items, start=1))
    elif suffix == ".csv":
        yield from _read_csv(text, name)
    else:
        raise GatewiseError(f"{name}: expected a name that ends in {', '.join(SUFFIXES)}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = " (one object a line is .jsonl)" if "Extra data" in str(error) else ""
        raise GatewiseError(f"{where}: not valid JSON: {error}{advice}") from error


def _read_csv(text: str, name: str) -> Iterator[tuple[str, Row]]:
    # A blank between comma and quote is not part of the text. Some countries' spreadsheets write semicolons for commas.
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process, and by default shorter than a long document
    try:
        rows = [(f"{name}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise GatewiseError(f"{name}, after line {reader.line_num}: not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    columns = list(reader.fieldnames or ())
    if len(set(columns)) < len(columns):
        raise GatewiseError(f"{name}: two columns have the same name, of {', '.join(columns)}")
    for where, row in rows:
        if None in row or None in row.values():  # how csv marks too many and too few cells
            raise GatewiseError(f"{where}: expected {len(columns)} cells, as in the header")
        yield where, row


def _read_parquet(content: bytes, name: str) -> Iterator[tuple[str, Row]]:
    """Rows of a Parquet file. Arrow's types are data alone: nothing in it is unpickled or run."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise GatewiseError(f"{name}: not a Parquet file, or a damaged one: {reason_of(error)}") from error
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(name: str, split: str, label: str) -> tuple[Iterator[tuple[str, Row]], list[str] | None]:
    """Rows and, when its column of labels names them, the labels of a Hugging Face dataset."""
    import datasets

    path, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such name, config or split, a broken script
        raise GatewiseError(f"the Hugging Face dataset {name} (split {split!r}) could not be loaded: {reason_of(error)}") from error
    feature = dataset.features.get(label)
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def rows() -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(dataset, start=1):
            where = f"{name} ({split}), row {number}"
            if names is not None:
                if row[label] in (None, -1):
                    raise GatewiseError(f"{where}: it has no label")
                row[label] = names[row[label]]
            yield where, row

    return rows(), None if names is None else sorted(names)


def _sample(name: str) -> Any:
    """The file of a sample: one of gatewise's, or of a package with an entry point in the group ``gatewise.samples``."""
    others = [point.value for point in entry_points(group="gatewise.samples")]
    folders = [resources.files("gatewise") / "samples", *map(resources.files, others)]
    files = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".jsonl")]
    samples = {file.name.removesuffix(".jsonl").replace("_", "-"): file for file in files}
    if name not in samples:
        raise GatewiseError(f"there is no sample {name!r}; the samples are {', '.join(sorted(samples))}")
    return samples[name]


# ---- numbers ----

_NUMBER = re.compile(
    r"(?<![\w.])(?:[-+−–]?[$€£¥]\s?)?[-+−–]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3}(?!\w))?", re.ASCII
)
# What makes the number before it only a part of one: a fraction, time or power, thousands separated by blanks, other decimals.
_MORE_OF_IT = re.compile(r"[ \t]*[/:^×*][ \t]*\d|[ \t\u00a0\u202f'’]\d{3}(?!\d)|[ \t]\d+/\d|[.,]\d|[ \t]?[¼½¾⅓⅔⅛]")


def final_number(text: str) -> Decimal | None:
    """The number a worked answer ends with: the one after ``####``, else the last one in the text; None without any.

    Thousands commas, currency signs, a plus and a full stop after the number do not count: "#### $1,250.00." is 1250. What is more
    than a number after ``####``, such as "1/2", "10:30" or "5 000", is none.
    """
    _, marked, after = text.partition("####")
    after = re.sub(r"^[ \t]*([-−–])[ \t]+(?=[\d.$€£¥])", r"\1", after)
    found = _NUMBER.search(after) if marked else None
    if found is not None and _MORE_OF_IT.match(after, found.end()):
        return None
    numbers = [found.group()] if found else _NUMBER.findall(text)
    return Decimal(re.sub(r"[,\s$€£¥+]", "", numbers[-1]).replace("−", "-").replace("–", "-")) if numbers else None


# ---- what a row must have: the type of each field, by kind; the first kind whose fields a row has is its own ----


def _worked(text: str) -> str:
    if final_number(text) is None:
        raise ValueError("expected a text that ends in '#### 42'")
    return text


# Without half of a surrogate pair, which JSON can write and UTF-8 cannot: pydantic refuses it where there is a pattern.
_Text = Annotated[str, Field(pattern=r"\S")]
_Label = Annotated[_Text, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(str.strip)]
_Worked = Annotated[_Text, AfterValidator(_worked)]
_text, _label = TypeAdapter(_Text), TypeAdapter(_Label)
_TARGET: Fields = {"source": _text, "target": _text}
_TARGETS: Fields = {"source": _text, "targets": TypeAdapter(Annotated[list[_Text], Field(min_length=1)])}
_SHAPES: tuple[tuple[Kind, Fields], ...] = (
    (
        "choice",
        {
            "question": _text,
            "choices": TypeAdapter(Annotated[list[_Text], Field(min_length=2)]),
            "answer": TypeAdapter(Annotated[int, Field(ge=0)]),
        },
    ),
    ("label", {"text": _text, "label": _label}),
    ("label", {"premise": _text, "hypothesis": _text, "label": _label}),
    ("number", {"question": _text, "answer": TypeAdapter(_Worked)}),
    ("generation", _TARGET),
    ("generation", _TARGETS),
)


def _shape_of(row: Row, where: str) -> tuple[Kind, Fields]:
    """The kind of a file by its first row, and what each field of such a row must be."""
    if is_conversation(row):
        return "chat", {}
    for kind, fields in _SHAPES:
        if fields.keys() <= row.keys():
            return kind, fields
    known = "; or ".join(", ".join(fields) for _, fields in _SHAPES)
    known += "; or messages; or prompt, completion"
    advice = "if your columns have other names, map them: data.columns in a recipe, --columns on the command line"
    raise GatewiseError(f"{where}: the fields are {', '.join(map(str, row)) or 'none'}; expected {known}; {advice}")


def _with_messages(row: Row, where: str) -> Row:
    try:
        return {**row, "messages": conversation(row)}
    except GatewiseError as error:
        raise GatewiseError(f"{where}: {error}") from error


def _checked(row: Row, fields: Fields, where: str, columns: Mapping[str, str]) -> Row:
    checked = dict(row)
    for name, wanted in fields.items():
        called = f"field {name!r} (column {columns[name]!r})" if name in columns else f"field {name!r}"
        if name not in row:
            raise GatewiseError(f"{where}: {called} is missing; expected {', '.join(fields)}, as in the first row")
        try:
            checked[name] = wanted.validate_python(row[name], strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            reason = f"expected a text that is not empty and that UTF-8 can write, got {reprlib.repr(row[name])}"
            if fault["type"] not in ("string_pattern_mismatch", "string_type", "string_unicode"):
                reason = fault["msg"].removeprefix("Value error, ")
            raise GatewiseError(f"{where}: {called}: {reason}") from error
    if "choices" in fields and checked["answer"] >= len(checked["choices"]):
        raise GatewiseError(f"{where}: field 'answer' is {checked['answer']}, but choices are numbered from 0")
    return checked
