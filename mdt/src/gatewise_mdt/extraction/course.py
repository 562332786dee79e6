r"""What may be written next, piece by piece, so that the whole is a valid tree in the format of :mod:`gatewise_mdt.formats.lines`.

A piece is a line, or in a node of several triples one of them with its ``;``. What may follow depends on all before it (which
triples have numbers, how many nodes are still to come, that no triple comes twice in a node), which no context-free grammar says.
So a grammar is made for each piece when its turn comes: one regular expression, in the Lark dialect of ``llguidance``.

The tree is bounded on all sides (:class:`Limits`), so that a model that loops comes to an end.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatewise.checks import is_whole
from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.extraction.prompts import STAGES, Stage, parted
from gatewise_mdt.formats.lines import LEVELS, Level, escaped, letters
from gatewise_mdt.relations import RELATIONS, SHORT, Language
from gatewise_mdt.wholes import ENDING, pieces

# Neither blank, nor a mark of the format, nor "~" alone, which stands for a subject.
_FREE = r"""
PART: FIRST (INNER{0,%d} LAST)? | "\\~"
FIRST: /[^|;\\~\s\x00-\x1f\x7f]/ | /\\[|;\\]/
INNER: /[^|;\\\n\r\x00-\x1f\x7f]/ | /\\[|;\\]/
LAST: /[^|;\\\s\x00-\x1f\x7f]/ | /\\[|;\\]/
"""
_SPAN = r"""
PART: SPAN & /[^ ~](.*[^ ])?|~.*[^ ]/ & /.{1,%d}/
"""
_HEADINGS: dict[str, str] = {"triples:\n": "triples", "nodes:\n": "nodes", "tree:\n": "tree"}
_NUMBERED = re.compile(r"\d+\. (.*?)\n?", re.DOTALL)
ARGUMENT = "gatewise_tree"
"""The name of a course among what a request to a server says (vLLM's ``vllm_xargs``)."""
_MOST_CHARACTERS = 20_000
_TOLD: dict[str, Callable[[Any], bool]] = {
    "language": lambda value: value in ("en", "zh"),
    "stage": lambda value: value is None or value in STAGES,
    "levels": lambda value: isinstance(value, list) and bool(value) and all(one in LEVELS for one in value),
    "within": lambda value: value is None or (isinstance(value, str) and len(value) <= _MOST_CHARACTERS and any(parted(value))),
    "triples": lambda value: is_whole(value) and 0 <= value <= 1000,
    "roles": lambda value: isinstance(value, list) and len(value) <= 100 and all(one in ("C", "D") for one in value),
}
"""Whether each argument of a course that a request asks for is one."""
_LINE = re.compile(r"(?:([A-Z]+)\. )?([CD])(?:: (.*))?", re.DOTALL)
_JOIN = re.compile(r" \| (?:and|or)$")


@dataclass(frozen=True)
class Limits:
    """The most that is written. The published trees have up to 5 levels, 9 nodes, 10 triples in a node and 91 characters."""

    depth: int = 10
    conditions: int = 16
    triples_in_node: int = 12
    triples: int = 60
    nodes: int = 33
    characters: int = 200


@dataclass
class _Open:
    """A node that is being written.

    Attributes:
        end: the Lark expression of what ends its line: a line break, nothing, or either.
        taken: its triples so far, as they were written.
    """

    role: str
    name: str | None
    end: str
    taken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """A child that is still to come: its depth, and the names of the conditions above it."""

    depth: int = 1
    above: frozenset[str] = frozenset()


class Course:
    """The course of one output.

    Args:
        stage: of the pipeline; None for the whole tree.
        levels: the chain-of-thought levels the output may have; it shows with its first lines which it takes.
        within: the text in which subjects and objects have to stand word for word; None leaves them free.
        triples: for stage "nodes", how many triples there are to group.
        roles: for stage "tree", the roles of the nodes to put together, in their order.
    """

    def __init__(
        self,
        language: Language,
        stage: Stage | None = None,
        *,
        levels: Sequence[Level] = (0, 1, 2),
        within: str | None = None,
        triples: int = 0,
        roles: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self.stage, self.levels, self.limits = stage, tuple(levels), limits or Limits()
        self.section: str = stage or ("start" if 0 in self.levels else "")
        self.count = triples
        self.names: dict[str, str] = {letters(i): role for i, role in enumerate(roles)}
        self.by_name = stage == "tree"
        self.finished = False
        self.pieces: list[str] = []
        self._relations = list(RELATIONS.values()) if language == "zh" else list(SHORT.values())
        # A ";" promises one more triple, so there has to be one that was not taken: of any object there is one a relation.
        self._different, self._parts = 10**9, _FREE % (self.limits.characters - 2)
        if within is not None:
            wholes, plurals = _wholes(within)
            objects = {whole for part in wholes for whole in part} - {" ", "~"} - ((plurals and {"s", "es"}) or set())
            self._different, self._parts = (
                len(objects) * len(self._relations),
                _spans(wholes, plurals) + _SPAN % self.limits.characters,
            )
        self._main: str | None = None
        self._listed: list[str] = []
        self._open: _Open | None = None
        self._waiting = [_Place()]
        self._conditions = 0

    @classmethod
    def from_json(cls, told: str) -> "Course":
        """The course that a request to a server asks for: the arguments of the class by name, without ``limits``.

        Raises:
            GatewiseError: it is none, or its text is longer than any passage.
        """
        try:
            held = json.loads(told)
            if not isinstance(held, dict) or not held.keys() <= _TOLD.keys() or "language" not in held:
                raise ValueError("expected an object with language, and perhaps stage, levels, within, triples and roles")
            if wrong := next((name for name, value in held.items() if not _TOLD[name](value)), None):
                raise ValueError(f"{wrong} is not what a course can have")
        except (ValueError, RecursionError) as error:
            raise GatewiseError(f"what may be written in a tree was not told as gatewise tells it ({reason_of(error)})") from error
        return cls(**held)

    @property
    def written(self) -> str:
        """All whole pieces, one after the other; no line break at the end."""
        return "".join(self.pieces).strip()

    @property
    def lines_to_close(self) -> int:
        """The fewest lines that complete the output from here."""
        return 3 + len(self._waiting)

    def grammar(self, hurry: bool = False) -> str:
        """The Lark grammar of the next piece. Where the output may end, its end is no part of the piece.

        Args:
            hurry: leave only what completes the output soonest.
        """
        lead = "" if self.pieces else '" " '
        return f"start: PIECE\nPIECE: {lead}({' | '.join(self._choices(hurry))})\n{self._definitions()}"

    def take(self, piece: str) -> None:
        """Notes a piece that was written, which the grammar allowed."""
        line = piece if self.pieces else piece.removeprefix(" ")
        self.pieces.append(piece)
        if self._open is not None:
            self._items(line.removeprefix(" "))
        elif (heading := _HEADINGS.get(line)) is not None:
            self.section = heading
            self.by_name = self.by_name or heading == "nodes"
        elif self.section == "triples":
            match = _NUMBERED.fullmatch(line)
            self.count += 1
            self._item(match[1] if match else "", self._listed)
            self.finished = self.stage == "triples" and not line.endswith("\n")
        else:
            self._line(line)

    # ---- what may come ----

    def _choices(self, hurry: bool) -> Iterator[str]:
        if self._open is not None:
            yield from self._more_items(self._open, hurry)
        elif self.section in ("start", ""):
            if self.section == "start":
                yield from self._nodes(hurry)
            if self.levels != (0,) and not (hurry and self.section):
                yield _quoted("triples:\n")
        elif self.section == "triples":
            yield from self._numbered(hurry)
        elif self.section == "nodes":
            if self.stage is None:
                yield _quoted("tree:\n")
            if self.stage is not None or (self.count and len(self.names) < self.limits.nodes and not hurry):
                yield from self._named(hurry)
        elif self.by_name:
            yield from self._letters(hurry)
        else:
            yield from self._nodes(hurry)

    def _numbered(self, hurry: bool) -> Iterator[str]:
        full = self.count >= min(self.limits.triples, self._different) - 1 or hurry
        number = f'"{self.count + 1}. " ITEM'
        if self.stage == "triples":
            yield number if full else f'{number} "\\n"?'
            return
        if 1 in self.levels:
            yield _quoted("tree:\n")
        if 2 in self.levels:
            yield _quoted("nodes:\n")
        if not full:
            yield f'{number} "\\n"'

    def _named(self, hurry: bool) -> Iterator[str]:
        """The line of a node with a name."""
        end = '"\\n"'
        if self.stage is not None:
            end = "" if hurry or len(self.names) >= self.limits.nodes - 1 else '"\\n"?'
        for role in ("C", "D"):
            yield from self._heads(f"{letters(len(self.names))}. {role}", end, hurry)

    def _nodes(self, hurry: bool) -> Iterator[str]:
        """The line of a node of the tree, written out or with the numbers of its triples."""
        end = self._end_of_leaf()
        yield f'"D" {end}'
        if hurry or (self.section == "tree" and not self.count):
            return
        yield from self._heads("D", end, hurry)
        if self._may_branch():
            yield from self._heads("C", '"\\n"', hurry)

    def _letters(self, hurry: bool) -> Iterator[str]:
        place, end = self._waiting[-1], self._end_of_leaf()
        yield f'"D" {end}'
        for name, role in self.names.items() if not hurry else ():
            if role == "D":
                yield f'"{name}" {end}'
            elif self._may_branch() and name not in place.above:  # the answer is known there
                yield f'"{name}\\n"'

    def _heads(self, role: str, end: str, hurry: bool) -> Iterator[str]:
        by_number = self.section in ("nodes", "tree")
        yield f'"{role}: " ITEM {end}'
        if not hurry and (not by_number or self.count > 1):
            yield f'"{role}: " ITEM ";"'

    def _more_items(self, node: _Open, hurry: bool) -> Iterator[str]:
        yield f'" " ITEM (" | and" | " | or") {node.end}'
        most = min(self.limits.triples_in_node, self._different if self.section == "start" else self.count)
        if not hurry and len(node.taken) + 1 < most:
            yield '" " ITEM ";"'

    def _end_of_leaf(self) -> str:
        return "" if len(self._waiting) == 1 else '"\\n"'

    def _may_branch(self) -> bool:
        return self._waiting[-1].depth < self.limits.depth and self._conditions < self.limits.conditions

    def _definitions(self) -> str:
        taken = self._open.taken if self._open is not None else []
        if self.section in ("nodes", "tree"):
            left = [str(number) for number in range(1, self.count + 1) if str(number) not in taken]
            return f"ITEM: {' | '.join(map(_quoted, left))}\n" if left else ""
        if self.section == "triples":
            taken = self._listed
        elif self.section == "":
            return ""
        subject = '"~" | PART' if self._main is not None else "PART"
        same = [_quoted(form) for item in taken for form in self._forms(item)]
        others = f" & ~({' | '.join(same)})" if same else ""
        words = " | ".join(map(_quoted, self._relations))
        return f'ITEM: WHOLE{others}\nWHOLE: SUBJECT " | " WORD " | " PART\nSUBJECT: {subject}\nWORD: {words}\n{self._parts}'

    def _forms(self, item: str) -> list[str]:
        """A triple as it can be written: with its subject, or "~" for it."""
        if self._main is None:
            return [item]
        if item.startswith("~ | "):
            return [item, self._main + item[1:]]
        return [item, f"~{item[len(self._main) :]}"] if item.startswith(f"{self._main} | ") else [item]

    # ---- what was written ----

    def _line(self, line: str) -> None:
        """A line of the tree, or of the part "nodes"; it may stay open."""
        text = line.removesuffix("\n")
        if self.section == "start":
            self.levels = (0,)
        if self.by_name and self.section == "tree":
            self._advance(self.names.get(text, "D"), text)
            return
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"the piece {line!r} is none that the grammar allows")
        name, role, items = match.groups()
        end = '"\\n"'
        if self.section == "nodes":
            end = '"\\n"?' if self.stage is not None and len(self.names) < self.limits.nodes - 1 else "" if self.stage else end
        elif role == "D":
            end = self._end_of_leaf()
        self._open = _Open(role, name, end)
        if items is None:
            self._close(line)
        else:
            self._items(items + "\n" * line.endswith("\n"))

    def _items(self, items: str) -> None:
        """One more triple of the open node; without ";" after it, the last."""
        assert self._open is not None
        goes_on = items.endswith(";") and (len(items) - 1 - len(items[:-1].rstrip("\\"))) % 2 == 0
        item = items.removesuffix("\n") if not goes_on else items[:-1]
        # After a single triple there is no join, and what looks like one is its object.
        self._item(_JOIN.sub("", item) if self._open.taken and not goes_on else item, self._open.taken)
        if not goes_on:
            self._close(items)

    def _item(self, item: str, taken: list[str]) -> None:
        taken.append(item)
        if self._main is None and " | " in item:
            self._main = item.partition(" | ")[0]

    def _close(self, line: str) -> None:
        assert self._open is not None
        node, self._open = self._open, None
        if self.section == "nodes":
            self.names[node.name or ""] = node.role
            self.finished = self.stage == "nodes" and not line.endswith("\n")
        else:
            self._advance(node.role, "")

    def _advance(self, role: str, name: str) -> None:
        place = self._waiting.pop()
        if role == "C":
            self._conditions += 1
            self._waiting += [_Place(place.depth + 1, place.above | {name} if name else place.above)] * 2
        self.finished = not self._waiting


def _wholes(text: str) -> tuple[list[list[str]], bool]:
    """The pieces of population and passage, as the prompt shows them, and whether there are plurals among them."""
    parts = [part for part in parted(text) if part]
    found, plurals = pieces("@".join(parts))
    if len(parts) == 1:
        return [found], plurals
    mark = found.index("@")
    return [found[:mark], found[mark + 1 :]], plurals


def _spans(wholes: list[list[str]], plurals: bool) -> str:
    """The Lark terminal SPAN: wholes that follow each other in the population, or in the passage."""
    made = ""
    for i, part in enumerate(wholes):
        chunks = ", ".join(_quoted(escaped(chunk) if chunk != "~" else chunk) for chunk in part)
        made += f'SPAN{i}: %regex {{ "substring_chunks": [{chunks}] }}\n'
    begun = f" & ~/{ENDING}/" if plurals else ""
    return f"{made}SPAN: ({' | '.join(f'SPAN{i}' for i in range(len(wholes)))}){begun}\n"


def _quoted(text: str) -> str:
    """A string of the Lark dialect, which are those of JSON, with control characters escaped that JSON leaves as they are."""
    return json.dumps(text).replace("\x7f", "\\u007f")
