"""Files of texts with their trees in the published format.

A ``.json`` file has a list of ``{"text": "population@passage", "tree": [nodes in pre-order]}``, or one of them; a ``.jsonl`` file
one a line. Other keys of a record are kept, and written back, as far as a file can hold them: NaN comes back as null, and half of
a surrogate pair as the replacement character.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gatewise.checks import HALF_A_PAIR, has_half_a_pair, writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of, finite, write_json, write_json_lines
from gatewise_mdt import checks
from gatewise_mdt.tree import DecisionTree

SUFFIXES = (".json", ".jsonl")
_OWN_KEYS = ("text", "tree")
CARRIED_KEY = "carried"
"""The key of a record that says where its tree was carried over from: "from" is the name of the file that had it, "sha256" and
"place" those of its document where they are known, "text" the text that a person last read the tree against, where that was another
one, "replaces" the text that the file of corrections had a record for, and "reviewed" who had approved or corrected it there,
where nobody has yet for the newer text."""
DOUBTFUL = 0.5
"""A node of less confidence is more likely wrong than right."""
_REVIEWED = ("approved", "corrected")  # what a record's "review" may be, see gatewise_mdt.review.passage


@dataclass(frozen=True)
class TreeRecord:
    """A text and its tree.

    Attributes:
        text: "population@passage"; without an "@" all of it is the passage.
        number: place in the file, from 1.
        more: other keys of the record.
        draft: what a system runs says DRAFT of it, see :mod:`gatewise_mdt.formats.gate`; no key of a file.
    """

    text: str
    tree: DecisionTree
    number: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    draft: bool = False

    @property
    def population(self) -> str:
        """Whom the passage is about: what stands before the first "@"; empty without one."""
        before, at, _ = self.text.partition("@")
        return before.strip() if at else ""

    @property
    def passage(self) -> str:
        """The text after the population."""
        before, at, after = self.text.partition("@")
        return (after if at else before).strip()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an extraction said of its tree: what was put right, left out or cut short."""
        return self._texts("warnings")

    @property
    def headings(self) -> tuple[str, ...]:
        """The headings above its passage in the document that it comes from, the outermost first."""
        return self._texts("headings")

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be known of how its passage was read."""
        return self._texts("notes")

    @property
    def sha256(self) -> str:
        """Of the bytes of the document that its passage is of; empty where it is not known."""
        said = self.more.get("sha256")
        return said if isinstance(said, str) else ""

    @property
    def extraction(self) -> dict[str, Any] | None:
        """What a model's tree was made with, see :attr:`gatewise_mdt.Extraction.made_with`; None for other trees."""
        return self._object("extraction")

    @property
    def is_approved(self) -> bool:
        """Whether a person stands for the tree and its text as they are. Approvals of earlier versions do not say of which."""
        return self.more.get("review") == "approved" and (self.reviewed or {}).get("of") in (None, self.digest)

    @property
    def digest(self) -> str:
        """Of the text, but for its white space, and the tree: what an approval is of."""
        said = json.dumps([self.text.split(), self.tree.to_preorder()])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @property
    def ticks(self) -> tuple[dict[str, Any], ...]:
        """What a person said of items of the check, see :mod:`gatewise_mdt.checking.ticks`."""
        said = self.more.get("ticks")
        return tuple(one for one in said if isinstance(one, dict)) if isinstance(said, list | tuple) else ()

    @property
    def older_text(self) -> str:
        """The text that its tree was made for, where the document has another one now; else empty."""
        said = (self._object(CARRIED_KEY) or {}).get("text")
        return said if isinstance(said, str) else ""

    @property
    def reviewed(self) -> dict[str, Any] | None:
        """Who approved or corrected the tree last: "by", "at" (UTC), "comment" where there was one, "sha256", the document that
        they read, where it is known, and of an approval "of", the :attr:`digest` of what it is of. None where it is not known, or
        nobody did."""
        return self._object("reviewed")

    @property
    def confidence(self) -> tuple[float | None, ...] | None:
        """For each node, in pre-order, how likely it is right as the model gave it, in [0, 1], see
        :attr:`gatewise_mdt.Extraction.confidence`; None for an empty leaf and a node that a person changed. None as a whole where
        it is not known."""
        said = confidence_values(self.more.get("confidence"))
        return said if said and len(said) == len(self.tree.nodes) else None

    def _object(self, key: str) -> dict[str, Any] | None:
        said = self.more.get(key)
        return said if isinstance(said, dict) else None

    def _texts(self, key: str) -> tuple[str, ...]:
        said = self.more.get(key)
        return tuple(one for one in said if isinstance(one, str) and one.strip()) if isinstance(said, list | tuple) else ()

    def to_json(self) -> dict[str, Any]:
        """The record in the published format, with its other keys after it."""
        return {"text": self.text, "tree": self.tree.to_preorder(), **self.more}


def confidence_values(said: Any) -> tuple[float | None, ...] | None:
    """A list of numbers in [0, 1] and nulls; None for anything else, which a file may hold as well."""

    def fits(one: Any) -> bool:
        return one is None or (isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1)

    if not isinstance(said, list | tuple) or not all(map(fits, said)):
        return None
    return tuple(one if one is None else float(one) for one in said)


@dataclass(frozen=True)
class TreeFile:
    """What a file holds.

    Attributes:
        records: those that could be read, in their order.
        faults: number of a record -> what is wrong with it, a whole sentence.
        notes: what was put right, a whole sentence each (only where repair was asked for).
        count: records in the file, read or not.
        repairs: how often each kind of thing was put right, see :class:`gatewise_mdt.checks.Repair`.
        changed: the notes on trees whose approval does not hold for what the repair made of them.
    """

    source: str
    records: tuple[TreeRecord, ...]
    faults: dict[int, str]
    notes: tuple[str, ...]
    count: int
    repairs: Mapping[str, int] = field(default_factory=dict)
    changed: tuple[str, ...] = ()


def read_trees(path: str | Path, *, repair: bool = False) -> TreeFile:
    """Reads texts with trees; a record with a fault does not stop the others.

    Args:
        repair: put right what has one plain meaning, see :meth:`DecisionTree.repaired`. Nobody has read the tree as that leaves
            it, so one that was approved then counts as corrected.

    Raises:
        GatewiseError: the file cannot be read at all, or has no records.
    """
    return _checked(read_items(path), str(path), repair)


def trees_of(content: bytes, name: str, suffix: str, *, repair: bool = False) -> TreeFile:
    """Like :func:`read_trees`, from the content of a file.

    Args:
        name: what messages call it.
        suffix: what kind of file it is, one of ``SUFFIXES``; case does not matter.

    Raises:
        GatewiseError: the content cannot be read at all, or has no records.
    """
    return _checked(_items(content, name, suffix), name, repair)


def _checked(items: list[Any], name: str, repair: bool) -> TreeFile:
    records: list[TreeRecord] = []
    faults: dict[int, str] = {}
    notes: list[str] = []
    changed: list[str] = []
    repairs: Counter[str] = Counter()
    for number, item in enumerate(items, start=1):
        where = f"{name}, record {number}"
        try:
            record, made = _record(item, number, where, repair)
        except GatewiseError as error:
            faults[number] = str(error)
            continue
        if made:
            record, more = _unapproved(record, where)
            notes += [*(f"{where}: {one.note}" for one in made), *more]
            changed += more
            repairs.update(one.kind for one in made)
        records.append(record)
    return TreeFile(name, tuple(records), faults, tuple(notes), len(items), repairs, tuple(changed))


def repairs_of(items: Iterable[Any]) -> dict[str, int]:
    """How often each kind of thing is put right in the trees of unchecked records."""
    trees = (item.get("tree") for item in items if isinstance(item, dict))
    return dict(Counter(one.kind for tree in trees for one in checks.repaired_parts(tree)[1]))


def repairs_in_words(source: str, repairs: Mapping[str, int]) -> str:
    """What was put right in a file, in a sentence."""
    times = [f"{'once' if count == 1 else f'{count} times'} {kind}" for kind, count in repairs.items()]
    return f"{source}: {', '.join(times)}; --strict refuses such trees"


def _unapproved(record: TreeRecord, where: str) -> tuple[TreeRecord, list[str]]:
    """A repaired record, which counts as corrected if it was reviewed before, and a note if it was approved."""
    state = record.more.get("review")
    if state not in _REVIEWED:
        return record, []
    by = (record.reviewed or {}).get("by")
    said = f"{where}: the tree of {quoted_beginning(record.text)} that was approved{f' by {by}' if by else ''}"
    said += " is another one after the repair, so it counts as corrected: read it and approve it anew"
    more = {key: value for key, value in record.more.items() if key != "reviewed"}
    return replace(record, more={**more, "review": "corrected"}), [said] if state == "approved" else []


def quoted_beginning(text: str) -> str:
    """The beginning of a text, in quotation marks, for a sentence about it."""
    return f'"{text[:40]}{"…" if len(text) > 40 else ""}"'


def clipped(text: str, most: int) -> str:
    """A text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def read_items(path: str | Path) -> list[Any]:
    """The records of a file, unchecked. For a line of a JSONL file that is no JSON comes the error that says so.

    Raises:
        GatewiseError: the file cannot be read, is no JSON, or has no records.
    """
    _check_suffix(Path(path).suffix, str(path))
    return _items(content_of(path), str(path), Path(path).suffix)


def _items(content: bytes, name: str, suffix: str) -> list[Any]:
    _check_suffix(suffix, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GatewiseError(f"{name}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
    if suffix.lower() == ".jsonl":
        lines = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        items = [_line(line, f"{name}, line {number}") for number, line in lines]
    else:
        whole = _parsed(text, name)
        items = [whole] if isinstance(whole, dict) else whole
        if not isinstance(items, list):
            raise GatewiseError(f'{name}: expected a list of records {{"text", "tree"}}, found {checks.shown(whole)}')
    if not items:
        raise GatewiseError(f"{name} has no records")
    return items


def _line(line: str, where: str) -> Any:
    try:
        return _parsed(line, where)
    except GatewiseError as error:
        return error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise GatewiseError(f"{where}: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise GatewiseError(f"{where}: not valid JSON: {error}") from None


def write_trees(path: str | Path, records: Iterable[TreeRecord]) -> None:
    """Writes records as JSON or JSONL, as the suffix says, whole or not at all.

    Raises:
        GatewiseError: the place cannot be written, or the suffix is unknown.
    """
    _check_suffix(Path(path).suffix, str(path))
    items = [finite(record.to_json()) for record in records]
    if Path(path).suffix.lower() == ".jsonl":
        write_json_lines(path, items)
    else:
        write_json(path, items)


def _check_suffix(suffix: str, name: str) -> None:
    if suffix.lower() not in SUFFIXES:
        raise GatewiseError(f"{name}: the name ends in {suffix!r}, expected {', '.join(SUFFIXES)}")


def _record(item: Any, number: int, where: str, repair: bool) -> tuple[TreeRecord, list[checks.Repair]]:
    """A record, and what was put right in its tree."""
    if isinstance(item, GatewiseError):
        raise item
    if not isinstance(item, dict):
        raise GatewiseError(f'{where}: found {checks.shown(item)}, expected an object with "text" and "tree"')
    for key in _OWN_KEYS:
        if key not in item:
            raise GatewiseError(f'{where}: the key "{key}" is missing, expected "text" and "tree"')
    text = item["text"]
    if not isinstance(text, str) or not text.strip():
        raise GatewiseError(f"{where}: text is {checks.shown(text)}, expected the passage, such as 'adults with asthma@If …'")
    if has_half_a_pair(text):
        raise GatewiseError(f"{where}: text {HALF_A_PAIR}")
    more = writable({key: value for key, value in item.items() if key not in _OWN_KEYS})
    nodes, made = checks.repaired_parts(item["tree"]) if repair else (item["tree"], [])
    return TreeRecord(text, DecisionTree.from_preorder(nodes, where), number, more), made
