r"""What may be written next, piece by piece, so that the whole is a valid tree in the format of :mod:`gatewise_mdt.formats.lines`.

A piece is a line, or in a node of several triples one of them with its ``;``. What may follow depends on all before it (how many
nodes are still to come, that no triple comes twice in a node), which no context-free grammar says. So a grammar is made for each
piece when its turn comes: one regular expression, in the Lark dialect of ``llguidance``.

The tree is bounded on all sides, so that a model that loops comes to an end.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise_mdt.extraction.prompts import parted
from gatewise_mdt.formats.lines import escaped
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
ARGUMENT = "gatewise_tree"
"""The name of a course among what a request to a server says (vLLM's ``vllm_xargs``)."""
_JOIN = re.compile(r" \| (?:and|or)$")


class Course:
    """The course of one output.

    Args:
        within: the text in which subjects and objects have to stand word for word; None leaves them free.
    """

    # The most that is written. The published trees have up to 5 levels, 9 nodes, 10 triples in a node and 91 characters.
    most_depth, most_conditions, most_triples, most_characters = 10, 16, 12, 200

    def __init__(self, language: Language, *, within: str | None = None) -> None:
        self.finished = False
        self.pieces: list[str] = []
        self._relations = list(RELATIONS.values()) if language == "zh" else list(SHORT.values())
        # A ";" promises one more triple, so there has to be one that was not taken: of any object there is one a relation.
        self._different, self._parts = 10**9, _FREE % (self.most_characters - 2)
        if within is not None:
            wholes, plurals = _wholes(within)
            objects = {whole for part in wholes for whole in part} - {" ", "~"} - ((plurals and {"s", "es"}) or set())
            self._different = len(objects) * len(self._relations)
            self._parts = _spans(wholes, plurals) + _SPAN % self.most_characters
        self._main: str | None = None
        self._role = ""  # of the node that is being written, and its triples so far, as they were written
        self._taken: list[str] = []
        self._waiting = [1]  # the depths of the nodes that are still to come, that being written among them
        self._conditions = 0

    @classmethod
    def from_json(cls, told: str) -> "Course":
        """The course that a request to a server asks for: ``language``, and perhaps ``within``.

        Raises:
            GatewiseError: it is none.
        """
        try:
            held: Any = json.loads(told)
            text = held.get("within")
            fits = held["language"] in ("en", "zh") and (text is None or any(parted(text)))
            if not fits or held.keys() - {"language", "within"}:
                raise ValueError("expected language, en or zh, and perhaps within, a passage")
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise GatewiseError(f"the constraint of the request is none of gatewise's ({reason_of(error)})") from error
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

    def add_piece(self, piece: str) -> None:
        """Notes a piece that was written, which the grammar allowed."""
        items = piece.removeprefix(" ")
        self.pieces.append(piece)
        if not self._role:
            self._role, colon, items = items[0], items[1:2] == ":", items[3:]
            if not colon:
                self._close()
                return
        goes_on = items.endswith(";") and (len(items) - 1 - len(items[:-1].rstrip("\\"))) % 2 == 0
        item = items[:-1] if goes_on else items.removesuffix("\n")
        # After a single triple there is no join, and what looks like one is its object.
        self._taken.append(_JOIN.sub("", item) if self._taken and not goes_on else item)
        self._main = self._main or item.partition(" | ")[0]
        if not goes_on:
            self._close()

    def _close(self) -> None:
        depth = self._waiting.pop()
        if self._role == "C":
            self._conditions += 1
            self._waiting += [depth + 1] * 2
        self._role, self._taken, self.finished = "", [], not self._waiting

    def _choices(self, hurry: bool) -> Iterator[str]:
        if self._role:
            yield f'" " ITEM (" | and" | " | or") {self._end(self._role)}'
            if not hurry and len(self._taken) + 1 < min(self.most_triples, self._different):
                yield '" " ITEM ";"'
            return
        yield f'"D" {self._end("D")}'
        may_branch = self._waiting[-1] < self.most_depth and self._conditions < self.most_conditions
        for role in () if hurry else "DC" if may_branch else "D":
            yield f'"{role}: " ITEM {self._end(role)}'
            yield f'"{role}: " ITEM ";"'

    def _end(self, role: str) -> str:
        """The Lark expression of what ends a node's line: nothing after the last leaf."""
        return "" if role == "D" and len(self._waiting) == 1 else '"\\n"'

    def _definitions(self) -> str:
        subject = '"~" | PART' if self._main is not None else "PART"
        same = [_quoted(form) for item in self._taken for form in self._forms(item)]
        others = f" & ~({' | '.join(same)})" if same else ""
        words = " | ".join(map(_quoted, self._relations))
        return f'ITEM: WHOLE{others}\nWHOLE: SUBJECT " | " WORD " | " PART\nSUBJECT: {subject}\nWORD: {words}\n{self._parts}'

    def _forms(self, item: str) -> list[str]:
        """A triple as it can be written: with its subject, or "~" for it."""
        main = self._main or ""
        if item.startswith("~ | "):
            return [item, main + item[1:]]
        return [item, f"~{item[len(main) :]}"] if item.startswith(f"{main} | ") else [item]


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
