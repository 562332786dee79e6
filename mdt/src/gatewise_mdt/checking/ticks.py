"""Ticks: a person's word that an item of the check was looked at, and why it is no mistake.

A tick belongs to what it was given for, and not to a place in the tree: to the text of the passage, the kind and words of the item,
how often these stand before it, and the triples that the item speaks of. When one of these changes, the item is open again; nodes
that come and go elsewhere change nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from gatewise.errors import some
from gatewise_mdt.checking.items import Item, items
from gatewise_mdt.records import TreeRecord, clipped

Tick = dict[str, Any]
"""What it was given for, see :func:`key_of`, with "why", "by" (who) and "at" (when, in UTC)."""
_MOST = 10  # items that a sentence names


def key_of(item: Item, text: str) -> Tick:
    """What a tick of an item is kept under, in the record of a text "population@passage"."""
    plain = " ".join(text.split())  # white space does not make another text
    return {
        "kind": item.kind,
        "words": " ".join(item.words.split()),
        "again": item.again,
        "alike": item.alike,
        "about": [list(triple) for triple in item.about],
        "text": hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16],
    }


def looked_at(record: TreeRecord) -> list[tuple[Item, Tick | None]]:
    """The items of a record with their ticks, None where there is none; hints have none."""
    ticks = record.ticks
    return [(item, tick_in(ticks, key_of(item, record.text)) if ticks and not item.hint else None) for item in items(record)]


def tick_in(ticks: Sequence[Tick], key: Tick) -> Tick | None:
    """The tick that was given under a key."""
    return next((tick for tick in ticks if all(tick.get(name) == value for name, value in key.items())), None)


def open_items(record: TreeRecord) -> list[Item]:
    """What somebody has to look at before the tree may be approved, or go out to systems that run it."""
    return open_of(looked_at(record))


def open_of(found: Iterable[tuple[Item, Tick | None]]) -> list[Item]:
    """Of items with their ticks those that are to be ticked."""
    return [item for item, tick in found if tick is None and not item.hint]


def text_read(record: TreeRecord) -> str:
    """The text that a person last read a tree against: the one before its own, as long as a change since then is open."""
    return record.older_text if any(item.is_change for item in open_items(record)) else record.text


def items_in_words(items: Sequence[Item]) -> str:
    """Items for a sentence: their kinds and words."""
    return some((f'{item.kind} "{clipped(item.words, 60)}"' for item in items), _MOST)


def how_to_tick(items: Sequence[Item]) -> str:
    """What is to be done about open items."""
    return (
        f"tick {'each' if len(items) > 1 else 'it'} in gatewise mdt review, with a word why it is no mistake, or correct the tree"
    )
