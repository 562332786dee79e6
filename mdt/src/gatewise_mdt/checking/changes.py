"""What changed in a text since its tree was made, for trees that were carried over to a newer one."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

from gatewise_mdt.wholes import pieces

_NEAR = 12  # bytes between two changes that are one for who reads them: two short words, four characters in Chinese


class Change(NamedTuple):
    """What stands in a text from ``start`` to ``end``, and what stood there before; one of the two may be empty."""

    start: int
    end: int
    gone: str
    new: str


def difference(old: str, new: str) -> list[tuple[str, str]]:
    """Two texts in pieces, in the order of reading: "same" that both have, "gone" that only the old one has, "new" that only the
    new one has.

    Words, numbers with their units, ranges and fractions are taken whole (:mod:`gatewise_mdt.wholes`): "5 mg" became "50 mg", and
    not "5" "50".
    """
    before, after = pieces(old)[0], pieces(new)[0]
    made: list[tuple[str, str]] = []
    for operation, i, k, j, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if operation == "equal":
            made.append(("same", "".join(before[i:k])))
        else:
            made += [("gone", "".join(before[i:k])), ("new", "".join(after[j:m]))]
    return [one for one in made if one[1]]


@lru_cache(maxsize=256)
def changes(old: str, new: str) -> tuple[Change, ...]:
    """What changed from one text to another, without what is white space alone; what is near to each other is one."""
    return tuple(one for one in _changes(old, new) if one.gone.split() != one.new.split())


def _changes(old: str, new: str) -> Iterator[Change]:
    held: Change | None = None
    at, between = 0, ""
    for kind, piece in difference(old, new):
        if kind == "same":
            at, between = at + len(piece), piece
            continue
        if held is not None and len(between.encode()) > _NEAR:
            yield held
            held = None
        held = held._replace(gone=held.gone + between, new=held.new + between) if held else Change(at, at, "", "")
        between = ""
        if kind == "gone":
            held = held._replace(gone=held.gone + piece)
        else:
            at += len(piece)
            held = held._replace(end=at, new=held.new + piece)
        held = held._replace(end=at)
    if held is not None:
        yield held
