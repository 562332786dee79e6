"""One source of rows dealt out to train, dev and test: by a hash of what a row asks, so that each always falls on the same side.

A row's side follows from its own content, not from its place or a seed: it is the same in the next run, and stays when rows are
added. Rows that ask the same, whatever their spacing, label or fields that no prompt shows, are one unit; with a group all its
rows are. Where prompts show other fields, so that rows ask something else, the sides are others too: to compare prompts give
dev and test files of their own. With ``dev: 0.1`` a unit is in dev if its hash, a number in [0, 1), is below 0.1, and with
``test: 0.1`` in test from 0.9 on. Each label is seen to by itself: one without such a unit gives its lowest, or highest, if
another is left to train on. So no row that was trained on is measured on when there are more rows, unless its label had no
other to train on.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gatewise.errors import GatewiseError, some
from gatewise.tasks.records import Records, Row, is_data_set, load_records

# What a row asks, by kind. Its answer is no part of it: two answers to one question stay together.
_ASKED = {"label": ("text", "premise", "hypothesis"), "choice": ("question",), "number": ("question",), "generation": ("source",)}
_TAKEN_FIRST = ("test", "dev", "train")


def deal_out(records: Records, parts: Mapping[str, float], group: str | None = None) -> tuple[dict[str, Records], list[str]]:
    """Rows to train on, and for "dev", "test" or both about as large a part of the rows as ``parts`` says.

    Args:
        group: the column, or field, whose value is the same in rows that belong together; a row without one stands for itself.

    Returns:
        "train" and the parts, each in the order of the source, and lines that are worth telling: how many rows there are of each,
        which labels one lacks, and how many were left out because one on another side, of another group, asks the same.

    Raises:
        GatewiseError: too few rows, or none has the group's field.
    """
    asked = asks_of(records)
    units = units_of(records, group, asked)
    of_label: dict[str, set[str]] = {}
    for unit, row in zip(units, records.rows, strict=True):
        of_label.setdefault(row["label"] if records.labels else "", set()).add(unit)
    side = _sides([of_label[label] for label in sorted(of_label)], parts)
    sides = [side.get(unit, "train") for unit in units]
    taken: dict[str, str] = {}
    for name in _TAKEN_FIRST:
        taken |= {text: name for text, one in zip(asked, sides, strict=True) if one == name and text not in taken}
    rows: dict[str, list[Row]] = {name: [] for name in ("train", *parts)}
    for text, name, row in zip(asked, sides, records.rows, strict=True):
        if taken[text] == name:
            rows[name].append(row)
    different = f"{len(set(units))} {'groups of rows' if group else 'different rows'}"
    for name in rows:
        if not rows[name]:
            beside = " and ".join(f"data.{other}: {part:g}" for other, part in parts.items())
            raise GatewiseError(
                f"{records.source} has {different}, of which none is left for data.{name} with {beside}: give more rows, another "
                "part, or a file of its own"
            )
    told = [f"{records.source}: " + ", ".join(f"{len(own)} rows for {name}" for name, own in rows.items())]
    for name, own in rows.items():
        if missing := sorted(set(of_label) - {row["label"] for row in own}) if records.labels else []:
            told.append(f"data.{name} has no row with label {some(missing)}: there are too few to have some in each part")
    if left_out := len(sides) - sum(map(len, rows.values())):
        told.append(f"{left_out} of them are left out: they ask what a row on another side asks, which is of another group")
    return {name: replace(records, rows=own) for name, own in rows.items()}, told


def units_of(records: Records, group: str | None = None, asked: Sequence[str] | None = None) -> list[str]:
    """What each row asks, or the value of its group: rows of which it is the same stay together.

    Args:
        group: as for ``deal_out``. asked: what ``asks_of`` says of the rows, where it is known.

    Raises:
        GatewiseError: none has the group's field.
    """
    group = {column: name for name, column in (records.columns or {}).items()}.get(group or "", group)
    if group and all(row.get(group) in (None, "") for row in records.rows):
        raise GatewiseError(
            f"data.group is {group}, which no row of {records.source} has: its fields are {', '.join(records.rows[0])}"
        )
    return [
        json.dumps({group: str(row[group])}) if group and row.get(group) not in (None, "") else ask
        for row, ask in zip(records.rows, asked or asks_of(records), strict=True)
    ]


def taken_out(units: Sequence[str], count: int) -> set[int]:
    """The positions of about ``count`` rows, never more and a quarter at most: whole units, those of the lowest hashes."""
    members: dict[str, list[int]] = {}
    for at, unit in enumerate(units):
        members.setdefault(unit, []).append(at)
    most, taken = min(count, len(units) // 4), set[int]()
    for unit in sorted(members, key=_place):
        if len(taken) + len(members[unit]) <= most:
            taken.update(members[unit])
    return taken


def set_aside(units: Sequence[str], asks: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """The positions of rows that stay, and of those that ``taken_out`` takes. A row that asks what one of these does is in neither.

    Args:
        units: of each row, which stay together. asks: what each row asks.
    """
    taken = sorted(taken_out(units, count))
    gone = {asks[at] for at in taken}
    return [at for at, ask in enumerate(asks) if ask not in gone], taken


def selected(rows: Any, at: Sequence[int]) -> Any:
    """Some of the rows of ``Records``, a ``datasets.Dataset`` or a list, by their positions."""
    return rows.select(at) if hasattr(rows, "select") else [rows[one] for one in at]


def load_part(
    source: str,
    split: str | None,
    note: Mapping[str, Any],
    *,
    limit: int | None = None,
    labels: list[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Records:
    """``load_records`` for an adapter: of a file ``split`` may be what the adapter's run dealt out, "train", "dev" or "test".

    Args:
        note: the adapter's, which says how its run dealt its rows out.
    """
    parts = note.get("parts")
    if split is None or not parts or is_data_set(source):
        return load_records(source, split=split, limit=limit, labels=labels, columns=columns)
    whole = replace(load_records(source, labels=labels, columns=columns), shown=tuple(note.get("shown", ())))
    found, _ = deal_out(whole, parts, note.get("group"))
    if split not in found:
        raise GatewiseError(
            f"the split is {split}, but the adapter's run dealt its rows out to {', '.join(found)}: take one of them"
        )
    return replace(found[split], rows=found[split].rows[:limit])


def asked_again(records: Records, other: Records) -> int:
    """How many of some rows ask what others of the same kind ask."""
    asks = asks_of(replace(other, rows=[*records.rows, *other.rows]))
    seen = {*asks[len(records) :]}
    return sum(ask in seen for ask in asks[: len(records)])


def shown_of(kind: str, fields: Iterable[str]) -> tuple[str, ...]:
    """Of the fields that a prompt shows, those that are a part of what a row asks beside the usual one: see ``Records.shown``."""
    names = {*fields, *(("choices",) if kind == "choice" else ())}
    return tuple(sorted(names.difference(_ASKED.get(kind, ()))))


def asks_of(records: Records) -> list[str]:
    """What each row asks, whatever the spacing. A conversation that another one begins with asks the same as that."""
    kind = records.kind
    fields = [
        [one["content"] for one in row["messages"]]
        if kind == "chat"
        else [row.get(name, "") for name in (*_ASKED[kind], *records.shown)]
        for row in records.rows
    ]
    texts = [[*map(_text, row)] for row in fields]
    if kind == "chat":  # each ends with an answer
        whole = {tuple(row) for row in texts}
        texts = [row[: next(end for end in range(1, len(row) + 1) if tuple(row[:end]) in whole) - 1] for row in texts]
    return [json.dumps(row) for row in texts]


def _text(value: Any) -> str:
    """A field's value as text, whatever its spacing; what is no text, such as a date or choices, as JSON."""
    return " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())


def _place(unit: str) -> float:
    """The hash, a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big") / 2**64


def _sides(labels: Iterable[set[str]], parts: Mapping[str, float]) -> dict[str, str]:
    """Unit -> the part that it is in, but for those to train on.

    Args:
        labels: the units of each label; a unit may have several.
    """
    in_order = [sorted(units, key=_place) for units in labels]
    # dev from below, test from above: neither changes when the other part does.
    wanted = {"test": lambda at: at >= 1 - parts["test"], "dev": lambda at: at < parts["dev"]}
    wanted = {name: within for name, within in wanted.items() if name in parts}
    side = {unit: name for name, within in wanted.items() for units in in_order for unit in units if within(_place(unit))}
    for units in in_order:
        if all(unit in side for unit in units):  # what is measured has to be learned first
            del side[units[len(units) // 2]]
        for name in wanted:
            free = [unit for unit in units if unit not in side]
            if len(free) > 1 and all(side.get(unit) != name for unit in units):
                side[free[-1 if name == "test" else 0]] = name
    return side
