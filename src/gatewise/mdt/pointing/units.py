"""A text in units, which a phrase is made of, and as the tokens of a model; where each unit begins and ends among the tokens.

A unit is a piece of :func:`gatewise.mdt.wholes.pieces` that is no white space: a word, a dose, a Chinese character, a mark.
Every phrase that may stand in a text is some units that follow each other, and no other rule of spelling is needed.

Tokens may be shorter than units, or longer: of a Chinese token with two characters each is a unit of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.mdt.spans import Span
from gatewise.mdt.wholes import pieces

MOST_INSIDE = 3
"""From this many characters on, units that begin (or end) later in their token count as beginning here."""


@dataclass(frozen=True)
class Units:
    """A text and the places of its units, in order."""

    text: str
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str) -> "Units":
        """Parts a text."""
        spans, at = [], 0
        for piece in pieces(text)[0]:
            bare = piece.strip()
            if bare:
                begin = at + piece.index(bare)
                spans.append(Span(begin, begin + len(bare)))
            at += len(piece)
        return cls(text, tuple(spans))

    def __len__(self) -> int:
        return len(self.spans)

    def phrase(self, begin: int, end: int) -> str:
        """The text of units ``begin`` to ``end - 1``, on one line."""
        return " ".join(self.text[self.spans[begin].start : self.spans[end - 1].end].split())

    def of_span(self, span: Span) -> tuple[int, int] | None:
        """The units (first, after the last) of which a span is made; None where it cuts one."""
        begin, end = self._begins.get(span.start), self._ends.get(span.end)
        return None if begin is None or end is None or begin >= end else (begin, end)

    @property
    def population(self) -> int:
        """How many units stand before the first "@"; 0 where there is none."""
        mark = self.text.find("@")
        return sum(span.end <= mark for span in self.spans) if mark >= 0 else 0

    @cached_property
    def _begins(self) -> dict[int, int]:
        return {span.start: i for i, span in enumerate(self.spans)}

    @cached_property
    def _ends(self) -> dict[int, int]:
        return {span.end: i + 1 for i, span in enumerate(self.spans)}


def tokens_of(units: Units, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The tokens of a text, and where among them its units are.

    Returns:
        ``input_ids`` (and ``token_type_ids``, where the tokenizer has them), one a token; ``unit_first`` and ``unit_last``, for
        each unit the tokens that its first and last character are in; ``unit_begins`` and ``unit_ends``, how many characters,
        at most ``MOST_INSIDE``, stand before it in the former and after it in the latter.

    Raises:
        GatewiseError: the tokenizer does not say where its tokens stand, or has none for a unit.
    """
    if not tokenizer.is_fast:
        raise GatewiseError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} does not say where in a text its tokens stand: give a"
            " model with a fast tokenizer (tokenizer.json)"
        )
    encoded: Mapping[str, Any] = tokenizer(units.text, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    places: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    of_character: dict[int, int] = {}
    for token, (begin, end) in enumerate(places):
        for at in range(begin, end):
            of_character.setdefault(at, token)
    made: dict[str, list[int]] = {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}
    made.update(unit_first=[], unit_last=[], unit_begins=[], unit_ends=[])
    for span in units.spans:
        found = [of_character[at] for at in range(span.start, span.end) if at in of_character]
        if not found:
            raise GatewiseError(f"the tokenizer has no token for {units.text[span.start : span.end]!r}")
        first, last = found[0], found[-1]
        made["unit_first"].append(first)
        made["unit_last"].append(last)
        # What stands in a token before a unit: not the space that tokens of many models begin with.
        before = units.text[places[first][0] : span.start].strip()
        after = units.text[span.end : places[last][1]].strip()
        made["unit_begins"].append(min(len(before), MOST_INSIDE))
        made["unit_ends"].append(min(len(after), MOST_INSIDE))
    return made
