"""A document cut into passages of a size for the model, each with the population that its headings or the author name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gatewise.errors import GatewiseError
from gatewise.mdt.documents.document import Block, Document, sections
from gatewise.mdt.documents.headings import is_said_by_heading, population_mark, population_of

# Characters of a passage; the published ones have about 70 (Chinese) and 250 (English). Chinese says more with one.
MOST_CHARACTERS = {"en": 800, "zh": 300}
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        population: whom it is about; empty where neither the text nor a heading says.
        headings: the headings above it, the outermost first.
        where: its place in the document, such as "page 3".
    """

    passage: str
    population: str = ""
    headings: tuple[str, ...] = ()
    where: str = ""

    @property
    def text(self) -> str:
        """As records have it: "population@passage"."""
        # An "@" of the passage's own would pass for the one that ends a population.
        return f"{self.population}@{self.passage}" if self.population or "@" in self.passage else self.passage


def split_passages(document: Document, *, population: str | None = None, most: int | None = None) -> list[Passage]:
    """The passages of a document, in order.

    Paragraphs under one heading go together as far as they fit; a longer one is cut between sentences. A heading with nothing under
    it that says what to do is a passage too; others are named in the document's notes.

    Args:
        population: of all passages, instead of what the document says.
        most: characters of a passage; None takes 800 of English and 300 of Chinese.

    Raises:
        GatewiseError: the document has headings only, or ``most`` is too small.
    """
    if most is not None and most < 50:
        raise GatewiseError(f"a passage of at most {most} characters was asked for: expected 50 or more")
    found: list[Passage] = []
    for above, held in sections(document.blocks):
        alone = is_said_by_heading(above, held)
        headings = tuple(block.text for block in (above[:-1] if alone else above))
        about = population_of(headings)
        for group in _groups([above[-1]] if alone else held, most):
            mark = population_mark(group[0].text)
            whole = "\n".join(block.text for block in group)
            named = whole[:mark].strip() if mark > 0 else about
            passage = whole[mark + 1 :].strip() if mark > 0 else whole
            named = population if population is not None else named
            for piece in _pieces(passage, most or _most(passage)):
                if any(map(str.isalnum, piece)):
                    found.append(Passage(piece, " ".join(named.replace("@", " ").split()), headings, group[0].where))
    if not found:
        raise GatewiseError(
            f"{document.name} has no passage, only headings or a few words: expected a text that says what to do and when"
        )
    return found


def _groups(blocks: list[Block], most: int | None) -> Iterator[list[Block]]:
    held: list[Block] = []
    size = 0
    for block in blocks:
        alone = population_mark(block.text) > 0 or (held and population_mark(held[0].text) > 0)
        if held and (alone or size + len(block.text) > (most or _most(block.text))):
            yield held
            held, size = [], 0
        held.append(block)
        size += len(block.text)
    if held:
        yield held


def _pieces(text: str, most: int) -> Iterator[str]:
    """A text cut between sentences, or between words where a sentence is longer than a passage may be."""
    held = ""
    for sentence in _SENTENCE.split(text.replace("\n", " ")):
        gap = " " if held and not _is_chinese(held[-1]) and held[-1] not in "。！？；" else ""
        if held and len(held) + len(gap) + len(sentence) > most:
            yield held
            held, gap = "", ""
        held += gap + sentence
        while len(held) > most:
            cut = held.rfind(" ", most // 2, most)
            cut = cut if cut > 0 else most
            yield held[:cut].strip()
            held = held[cut:].strip()
    if held.strip():
        yield held.strip()


def _most(text: str) -> int:
    return MOST_CHARACTERS["zh" if _is_chinese(text) else "en"]


def _is_chinese(text: str) -> bool:
    return 3 * sum("\u3400" <= character <= "\u9fff" for character in text) >= sum(character.isalpha() for character in text) > 0
