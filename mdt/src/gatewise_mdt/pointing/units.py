"""A text in units, which a phrase is made of, and as the tokens of a model; where each unit begins and ends among the tokens.

A unit is a piece of :func:`gatewise_mdt.wholes.pieces` without the white space around it and what is not to be seen: a word, a
dose, a Chinese character, a mark. Every phrase that may stand in a text is some units that follow each other, and no other rule of
spelling is needed.

Tokens may be shorter than units, or longer: of a Chinese token with two characters each is a unit of its own.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise_mdt.spans import Span
from gatewise_mdt.wholes import pieces

MOST_INSIDE = 3
"""From this many characters on, units that begin (or end) later in their token count as beginning here."""
_NEAR = 4 * MOST_INSIDE
"""Characters beside a unit that are looked at for that, so that a token of a whole long text takes no time."""


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
            begin, end = at, at + len(piece)
            at = end
            while begin < end and _is_invisible(text[begin]):
                begin += 1
            while begin < end and _is_invisible(text[end - 1]):
                end -= 1
            if begin < end:
                spans.append(Span(begin, end))
        return cls(text, tuple(spans))

    def __len__(self) -> int:
        return len(self.spans)

    def phrase(self, begin: int, end: int) -> str:
        """The text of units ``begin`` to ``end - 1``, on one line; empty for none."""
        if begin >= end:
            return ""
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
    """The tokens of a text, all of them, and where among them its units are.

    Whether there are more ``input_ids`` than a model can read is for the caller to see. A unit of which the tokenizer makes
    nothing, as many do of control characters, is where the last one before it is, or else at the first token.

    Returns:
        ``input_ids`` (and ``token_type_ids``, where the tokenizer has them), one a token; ``unit_first`` and ``unit_last``, for
        each unit the first token that its first character is in and the last one of its last character; ``unit_begins`` and
        ``unit_ends``, how many characters, at most ``MOST_INSIDE``, stand before it in the former and after it in the latter.

    Raises:
        GatewiseError: the tokenizer does not say where its tokens stand, or has none at all for a text with units.
    """
    name = tokenizer.name_or_path or "the model"
    if not tokenizer.is_fast:
        raise GatewiseError(
            f"the tokenizer of {name} does not say where in a text its tokens stand: give a model with a fast tokenizer"
            " (tokenizer.json)"
        )
    # Half of a surrogate pair is no text for a tokenizer. The replacement character is as long.
    text = "".join("\ufffd" if unicodedata.category(one) == "Cs" else one for one in units.text)
    encoded: Mapping[str, Any] = tokenizer(
        text, truncation=False, padding=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    places: Sequence[tuple[int, int]] = encoded["offset_mapping"]
    if units.spans and not places:
        raise GatewiseError(f"the tokenizer of {name} makes no token of this text: give a model that reads its language")
    firsts: dict[int, int] = {}
    lasts: dict[int, int] = {}
    for token, (begin, end) in enumerate(places):
        for at in range(begin, end):
            firsts.setdefault(at, token)
            lasts[at] = token
    made: dict[str, list[int]] = {key: list(encoded[key]) for key in ("input_ids", "token_type_ids") if key in encoded}
    made.update(unit_first=[], unit_last=[], unit_begins=[], unit_ends=[])
    first = last = 0
    for span in units.spans:
        seen = [at for at in range(span.start, span.end) if at in firsts]
        first = firsts[seen[0]] if seen else last
        last = max(first, lasts[seen[-1]]) if seen else last
        made["unit_first"].append(first)
        made["unit_last"].append(last)
        # What stands in a token before a unit: not the space that tokens of many models begin with.
        before = text[max(places[first][0], span.start - _NEAR) : span.start].strip()
        after = text[span.end : min(places[last][1], span.end + _NEAR)].strip()
        made["unit_begins"].append(min(len(before), MOST_INSIDE))
        made["unit_ends"].append(min(len(after), MOST_INSIDE))
    return made


def _is_invisible(character: str) -> bool:
    """Whether it is white space, or a joiner or mark of direction, which nobody sees: no phrase begins or ends with it."""
    return character.isspace() or unicodedata.category(character) == "Cf"
