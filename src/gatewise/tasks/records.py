"""Rows to train and measure on: from JSONL, JSON, CSV, a shipped sample or a Hugging Face dataset, each row checked.

| kind       | fields of a row                                              |
|------------|--------------------------------------------------------------|
| label      | ``text``, ``label``; or ``premise``, ``hypothesis``, ``label`` |
| choice     | ``question``, ``choices`` (a list), ``answer`` (an index into it) |
| number     | ``question``, ``answer`` (text that ends in ``#### n``)        |
| generation | ``source``, ``target``; or ``source``, ``targets`` (a list)    |

A label may be a whole number. A row may have more fields; a template can write them into its prompt.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, is_whole
from gatewise.errors import GatewiseError, reason_of

Kind = Literal["label", "choice", "generation", "number"]
Row = dict[str, Any]
SAMPLE_PREFIX = "sample:"
_SUFFIXES = (".jsonl", ".json", ".csv")
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")
_NUMBER = re.compile(
    r"(?<![\w.])(?:[-+−–]?[$€£¥]\s?)?[-+−–]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d{1,3}(?!\w))?", re.ASCII
)
# After a number, which is then only a part: a fraction, time or power, thousands parted by blanks, other decimals.
_MORE_OF_IT = re.compile(r"[ \t]*[/:^×*][ \t]*\d|[ \t\u00a0\u202f'’]\d{3}(?!\d)|[ \t]\d+/\d|[.,]\d|[ \t]?[¼½¾⅓⅔⅛]")


@dataclass(frozen=True)
class Records:
    """Rows of one kind, in the order of their source.

    Attributes:
        labels: the label names in a fixed order (kind "label"), else None. The position in it is a label's class index.
        source: where the rows came from, as the user wrote it.
    """

    kind: Kind
    rows: list[Row]
    labels: list[str] | None
    source: str

    def __post_init__(self) -> None:
        if not self.rows:
            raise GatewiseError(f"{self.source} has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def gold_index(self, row: Row) -> int:
        """Position of the right answer among the row's candidates (kinds "label" and "choice")."""
        return int(row["answer"]) if self.labels is None else self.labels.index(row["label"])


@dataclass(frozen=True)
class _Shape:
    kind: Kind
    fields: tuple[str, ...]

    def complete_in(self, fields: Iterable[str]) -> bool:
        return set(self.fields) <= set(fields)

    def __str__(self) -> str:
        return _listing(f'"{field}"' for field in self.fields)


# The first complete shape wins, so "choices" decides between a choice and a number.
_SHAPES = (
    _Shape("choice", ("question", "choices", "answer")),
    _Shape("label", ("text", "label")),
    _Shape("label", ("premise", "hypothesis", "label")),
    _Shape("number", ("question", "answer")),
    _Shape("generation", ("source", "target")),
    _Shape("generation", ("source", "targets")),
)

_TYPE_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def load_records(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    labels: list[str] | None = None,
) -> Records:
    """Reads and checks the rows of a source.

    Args:
        source: a ``.jsonl``, ``.json`` (a list) or ``.csv`` file; ``sample:NAME``, a sample shipped with the package;
            or the name of a Hugging Face dataset, ``name`` or ``name:config``.
        split: the split of a Hugging Face dataset, such as "train"; needed there and refused elsewhere.
        limit: keep only the first ``limit`` rows. The label set is still that of the whole source.
        labels: the label names in their order, for instance those of the training set; otherwise the sorted labels
            found.

    Raises:
        GatewiseError: the source cannot be read, or a row is not what its kind needs: names the file, line and field.
    """
    name = str(source)
    if not name.strip():  # an unset variable of a shell
        raise GatewiseError("the data's name is empty: give a file, sample:NAME or a data set's name")
    if limit is not None and limit < 1:
        raise GatewiseError(f"limit is {limit}: expected a whole number of rows, at least 1")
    if labels is not None and (len(set(labels)) < len(labels) or not labels):
        raise GatewiseError(f"labels are {labels!r}: expected at least one name, and each name once")
    known = labels
    if name.startswith(SAMPLE_PREFIX):
        _refuse_split(name, split)
        numbered = _read_jsonl(_sample_lines(name), name)
    elif (path := Path(name).expanduser()).exists() or isinstance(source, Path) or _looks_like_path(name):
        _refuse_split(name, split)
        numbered = _read_file(path, name)
    else:
        numbered, hub_labels = _read_hub(name, split)
        known = known or hub_labels
    return _collect(numbered, name, limit, known, given=labels is not None)


def load_like(source: str | Path, labels: list[str] | None, *, split: str | None = None, limit: int | None = None) -> Records:
    """``load_records`` with the labels of other records, in the same order, if both have labels at all."""
    records = load_records(source, split=split, limit=limit)
    if records.labels is None or labels is None:
        return records
    return load_records(source, split=split, limit=limit, labels=labels)


def check_labels(records: Records, advice: str) -> None:
    """Refuses rows that leave nothing to choose between.

    Raises:
        GatewiseError: there is one label only.
    """
    if records.labels is not None and len(records.labels) == 1:
        raise GatewiseError(
            f"all rows of {records.source} have the label {records.labels[0]!r}, so that any answer would be right: {advice}"
        )


def sample_names() -> list[str]:
    """The names that ``sample:NAME`` knows."""
    return sorted(_samples())


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
    numbers = [_number(found.group())] if found else []
    numbers = numbers or [_number(match) for match in _NUMBER.findall(text)]
    return numbers[-1] if numbers else None


def _number(written: str) -> Decimal:
    return Decimal(re.sub(r"[,\s$€£¥+]", "", written).replace("−", "-").replace("–", "-"))


# ---- sources: each yields (where, row), unchecked ----


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise GatewiseError(f"split {split!r} was given for {name}: only a Hugging Face dataset has splits; leave it out")


def _looks_like_path(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) or name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def _sample_lines(name: str) -> Iterable[bytes]:
    wanted, known = name.removeprefix(SAMPLE_PREFIX), _samples()
    if wanted not in known:
        raise GatewiseError(f"there is no sample {wanted!r}; the samples are {_listing(sorted(known))}")
    return known[wanted].read_bytes().splitlines()


def _samples() -> dict[str, Any]:
    """Name -> file of every sample: gatewise's, and those of packages with an entry point in the group ``gatewise.samples``."""
    others = [point.value for point in entry_points(group="gatewise.samples")]
    folders = [resources.files("gatewise") / "samples", *map(resources.files, others)]
    files = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".jsonl")]
    return {file.name.removesuffix(".jsonl").replace("_", "-"): file for file in files}


def _read_file(path: Path, name: str) -> Iterator[tuple[str, Row]]:
    if path.is_dir():
        raise GatewiseError(f"{name} is a folder: expected a file that ends in {_listing(_SUFFIXES, 'or')}")
    if not path.exists():
        raise GatewiseError(f"{name}: there is no such file")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise GatewiseError(f"{name}: the name ends in {path.suffix!r}, expected {_listing(_SUFFIXES, 'or')}")
    try:
        with path.open("rb") as file:
            yield from reader(file, name)
    except OSError as error:
        raise GatewiseError(f"{name} cannot be read: {error.strerror or error}") from error


def _read_jsonl(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Row]]:
    for where, line in _decoded(lines, name):
        if line.strip():
            yield where, _object(_parsed(line.rstrip("\r\n"), where), where)


def _read_json(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Row]]:
    items = _parsed("".join(line for _, line in _decoded(lines, name)), name)
    if not isinstance(items, list):
        raise GatewiseError(f"{name}: expected a list of objects, found {_type_name(items)} (one object a line is .jsonl)")
    for number, item in enumerate(items, start=1):
        where = f"{name}, item {number}"
        yield where, _object(item, where)


def _read_csv(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, Row]]:
    # A blank between comma and quote is none of the text.
    reader = csv.reader((line for _, line in _decoded(lines, name)), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        where = f"{name}, line {reader.line_num + 1}"
        try:
            limit = csv.field_size_limit(2**31 - 1)  # of the whole process, and by default shorter than a long document
            cells = next(reader, None)
        except csv.Error as error:
            raise GatewiseError(f"{where}: not valid CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if twice := next((cell for cell in header if header.count(cell) > 1), None):
                raise GatewiseError(f"{where}: the column {twice!r} is there twice: give each its own name")
        elif len(cells) != len(header):
            raise GatewiseError(f"{where}: {len(cells)} cells, but the header has {len(header)} columns")
        else:
            yield where, _typed_cells(dict(zip(header, cells, strict=True)), where)


def _typed_cells(row: Row, where: str) -> Row:
    """CSV knows only text: lists are written as JSON in their cell, and the answer of a choice is an index."""
    for field in ("choices", "targets"):
        if row.get(field):
            try:
                row[field] = json.loads(row[field])
            except (ValueError, RecursionError) as error:
                raise GatewiseError(f"{where}: field {field!r} must be a JSON list of strings in its cell") from error
    if "choices" in row and re.fullmatch(r"\s*\d{1,9}\s*", row.get("answer", "")):
        row["answer"] = int(row["answer"])
    return row


def _read_hub(name: str, split: str | None) -> tuple[Iterator[tuple[str, Row]], list[str] | None]:
    """Rows and, when its ``label`` column names them, the labels of a Hugging Face dataset."""
    if not _HUB_NAME.fullmatch(name):
        raise GatewiseError(
            f"{name!r} is neither a file ({_listing(_SUFFIXES, 'or')}), nor sample:NAME, nor a Hugging Face dataset"
        )
    if split is None:
        raise GatewiseError(f"{name} is no file here, and as a Hugging Face dataset it needs a split, such as 'train'")
    import datasets

    path, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such name, config or split, a broken script
        raise GatewiseError(f"the Hugging Face dataset {name} (split {split!r}) could not be loaded: {reason_of(error)}") from error
    columns = list(dataset.column_names)
    if not any(shape.complete_in(columns) for shape in _SHAPES):
        raise GatewiseError(f"the Hugging Face dataset {name} has the columns {_listing(columns)}; expected {_all_shapes()}")
    feature = dataset.features.get("label")
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def rows() -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(dataset, start=1):
            where = f"{name} ({split}), row {number}"
            if names is not None and row["label"] is not None:
                if not 0 <= row["label"] < len(names):
                    raise GatewiseError(f"{where}: field 'label' is {row['label']}, which means that the row has no label")
                row = {**row, "label": names[row["label"]]}
            yield where, row

    return rows(), sorted(names) if names is not None else None


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise GatewiseError(f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
        yield where, text


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise GatewiseError(f"{where}: not valid JSON: {error.msg} at {at}") from error
    except (ValueError, RecursionError) as error:
        raise GatewiseError(f"{where}: not valid JSON: {error}") from error


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise GatewiseError(f'{where}: expected an object such as {{"text": ..., "label": ...}}, found {_type_name(item)}')
    return item


# ---- checks ----


def _collect(
    numbered: Iterator[tuple[str, Row]], name: str, limit: int | None, labels: list[str] | None, *, given: bool
) -> Records:
    first = next(numbered, None)
    if first is None:
        raise GatewiseError(f"{name} is empty: expected rows with {_all_shapes()}")
    shape = _shape_of(*first)
    if given and shape.kind != "label":
        raise GatewiseError(f"{name} holds rows with {shape}, which have no labels, but labels were given")
    rows: list[Row] = []
    found: set[str] = set()
    for where, row in chain([first], numbered):
        checked = _checked(row, shape, first[0], where)
        if shape.kind == "label":
            found.add(checked["label"])
            if labels is not None and checked["label"] not in labels:
                expected = _listing((repr(label) for label in labels), "or")
                raise GatewiseError(f"{where}: field 'label' is {checked['label']!r}, expected {expected}")
        if limit is None or len(rows) < limit:
            rows.append(checked)
        # Past the limit, rows are read on only to learn what labels there are.
        if len(rows) == limit and (shape.kind != "label" or labels is not None):
            break
    if shape.kind == "label":
        return Records("label", rows, list(labels) if labels is not None else sorted(found), name)
    return Records(shape.kind, rows, None, name)


def _shape_of(where: str, row: Row) -> _Shape:
    """The shape of the first row: a complete one, else the one that it comes closest to."""
    present = [sum(field in row for field in shape.fields) for shape in _SHAPES]
    if not any(present):
        raise GatewiseError(f"{where}: the fields are {_listing(row) or 'none'}; a line needs {_all_shapes()}")
    complete = next((shape for shape in _SHAPES if shape.complete_in(row)), None)
    return complete or _SHAPES[present.index(max(present))]


def _checked(row: Row, shape: _Shape, first: str, where: str) -> Row:
    missing = [field for field in shape.fields if field not in row]
    if missing:
        other = next((other for other in _SHAPES if other.complete_in(row)), None)
        if other is None:
            raise GatewiseError(f"{where}: field {missing[0]!r} is missing (a line needs {shape})")
        if other.kind != shape.kind or other.kind != "generation":
            raise GatewiseError(f"{where}: this row has {other}, but {first} has {shape}; keep one shape in a file")
        shape = other
    if shape.kind == "label" and type(row["label"]) is int:
        row = {**row, "label": str(row["label"])}
    for field in shape.fields:
        value = row[field]
        if field in ("choices", "targets"):
            _check_texts(value, field, where, at_least=2 if field == "choices" else 1)
        elif shape.kind == "choice" and field == "answer":
            _check_index(value, row["choices"], where)
        else:
            hint = ' (an index needs "choices" beside it)' if shape.kind == "number" and field == "answer" else ""
            _check_text(value, f"field {field!r}", where, hint)
    if shape.kind == "generation" and "targets" not in shape.fields and "targets" in row:
        if row["targets"] in (None, "", []):
            row = {field: value for field, value in row.items() if field != "targets"}
        else:
            _check_texts(row["targets"], "targets", where, at_least=1)
    if shape.kind == "number" and final_number(row["answer"]) is None:
        raise GatewiseError(f"{where}: field 'answer' has no number in it that stands alone, expected text that ends in '#### 42'")
    if shape.kind == "label":
        return {**row, "label": row["label"].strip()}
    return row


def _check_text(value: Any, what: str, where: str, hint: str = "") -> None:
    if not isinstance(value, str):
        raise GatewiseError(f"{where}: {what} must be a string, found {_type_name(value)}{hint}")
    if not value.strip():
        raise GatewiseError(f"{where}: {what} is empty")
    if not value.isascii() and has_half_a_pair(value):
        raise GatewiseError(f"{where}: {what} {HALF_A_PAIR}")


def _check_texts(value: Any, field: str, where: str, *, at_least: int) -> None:
    if not isinstance(value, list):
        raise GatewiseError(f"{where}: field {field!r} must be a list of strings, found {_type_name(value)}")
    if len(value) < at_least:
        raise GatewiseError(f"{where}: field {field!r} has {len(value)} entries, expected at least {at_least}")
    for number, text in enumerate(value):
        _check_text(text, f"entry {number} of field {field!r}", where)


def _check_index(value: Any, choices: list[str], where: str) -> None:
    if not is_whole(value):
        raise GatewiseError(f"{where}: field 'answer' must be an index into the choices, found {_type_name(value)}")
    if not 0 <= value < len(choices):
        raise GatewiseError(
            f"{where}: field 'answer' is {value}, but the {len(choices)} choices are numbered 0 to {len(choices) - 1}"
        )


def _type_name(value: Any) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def _all_shapes() -> str:
    return "; or ".join(str(shape) for shape in _SHAPES)


def _listing(names: Iterable[str], word: str = "and") -> str:
    items = list(names)
    return f" {word} ".join(filter(None, (", ".join(items[:-1]), items[-1]))) if items else ""
