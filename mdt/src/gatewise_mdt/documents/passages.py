"""A document cut into passages of a size for the model, each with whom it is about and all the headings above it.

A passage reads "population@Heading: heading: text", as near as can be to what models are trained on ("adults with gout@Give …")
with nothing lost: headings that name people are the population, and the others begin the text.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gatewise.errors import GatewiseError
from gatewise_mdt.documents.document import Block, Document, sections
from gatewise_mdt.documents.headings import (
    is_instruction_alone,
    is_order,
    lead_of,
    population_mark,
    population_of,
    reads_as_sentence,
)
from gatewise_mdt.documents.language import has_han, is_chinese

# Characters of a passage; the published ones have about 70 (Chinese) and 250 (English). Chinese says more with one.
MOST_CHARACTERS = {"en": 800, "zh": 300}
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])(?![”’）)])")
_ENDS = re.compile(r"[.!?;:,。！？；：，][\"'”’)）\]]*$")
# After these no sentence ends, or one cannot tell: "e.g.", "b.i.d.", "approx.", and the number of an item, "1.".
_NO_END = re.compile(
    r"(?:(?:^|[\s(\[/])(?:(?:[A-Za-z]\.){2,}|(?:approx|ca|cf|vs|resp|incl|excl|max|min|esp|dr|prof|st|fig|tab|no|nr|vol|sect?|ch|pp?"
    r"|ref|eq|al|spp?|subsp|var|inj|subcut|caps?|susp|sol|wk|hr|hrs|mins?|secs?|mo|yrs?|avg|temp|wt|ht|dept|viz|op|pt|pts)\.)"
    r"|(?:^|\s)\(?(?:\d{1,2}|[a-z]|[ivx]{1,4})\.)$",
    re.IGNORECASE,
)
# A sentence that begins so says nothing without the one before.
_DEPENDENT = re.compile(
    r"(?:otherwise|else|if\s+(?:not|so|this|that|these|those|none|neither)\b|if\s+(?:it|they|both)\s+\w+|if\s+still\b|in\s+(?:this|that)\s+case"
    r"|in\s+(?:these|those|such)\s+cases|failing\s+(?:this|that)|alternatively|then|instead|however|but|except|even\s+(?:then|so)"
    r"|and|or)\b|否则|不然|反之|若不|如不|若无效|如无效|若仍|如仍|若无|如无|此时|但",
    re.IGNORECASE,
)


_NUMBER = re.compile(r"[(（]?(?:\d{1,3}|[a-z]|[ivx]{1,4})(?:[.)]\s+|[、）]\s*)|[①-⑳]\s*")  # of an item
_STEP = re.compile(r"\bsteps?\s+(\d{1,2})\b|步骤\s*(\d{1,2})|第\s*(\d{1,2})\s*步", re.IGNORECASE)
_COLON = re.compile(r"[:：]$")
_REFERS = re.compile(r"(?:otherwise|else|if\s+(?:not|so)|in\s+(?:this|that)\s+case)\b|否则|不然|反之", re.IGNORECASE)


PASSAGE_ID = "passage_id"
# What a record says of the document that its passage is of, see `Passage.origin`.
ORIGIN = (PASSAGE_ID, "source", "sha256", "place", "headings", "offsets", "notes")


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        passage: what the model reads: the headings that do not name the population, and the text.
        population: whom it is about; empty where neither the text nor a heading says.
        headings: all headings above it, the outermost first.
        where: its place in the document, such as "page 3".
        start, end: the characters of the document's text as gatewise reads it (:attr:`Document.text`) that it is made of: from the
            first to the one after the last. Headings that are said before it, and what is said again, stand elsewhere.
        notes: what has to be known of how it was read and cut, a sentence each.
        sha256: of the document's bytes, see :class:`Document`.
        id: names it in the records of its trees, see :func:`passage_ids`.
    """

    passage: str
    population: str = ""
    headings: tuple[str, ...] = ()
    where: str = ""
    start: int = 0
    end: int = 0
    notes: tuple[str, ...] = ()
    sha256: str = ""
    id: str = ""

    @property
    def text(self) -> str:
        """As records have it: "population@passage"."""
        # An "@" of the passage's own would pass for the one that ends a population.
        return f"{self.population}@{self.passage}" if self.population or "@" in self.passage else self.passage

    def origin(self, source: str) -> dict[str, Any]:
        """Where it comes from and what has to be known of it, as the records of its trees say it beside their text.

        "sha256" names the document's bytes, and "offsets" are ``[start, end]``, which count characters of :attr:`Document.text`.
        """
        document = {PASSAGE_ID: self.id, "source": source, **({"sha256": self.sha256} if self.sha256 else {})}
        said = {**document, "place": self.where, "headings": list(self.headings), "offsets": [self.start, self.end]}
        return {**said, "notes": list(self.notes)} if self.notes else said


@dataclass(frozen=True)
class _Unit:
    """A sentence, or what else is not cut unless it is too long by itself.

    Attributes:
        block: the number of its block.
        bound: it says nothing without the unit before.
        apart: it has to begin a passage, as what the one before stands under is not said of it.
        head: what has to be said again where it comes to begin a passage; empty for the unit before.
        stem: of a row its own beginning, which its later parts are said of.
        joint: what stands between the unit before and this one.
    """

    text: str
    start: int
    end: int
    where: str
    block: int = 0
    bound: bool = False
    apart: bool = False
    head: str = ""
    stem: str = ""
    joint: str = " "
    notes: tuple[str, ...] = ()


def split_passages(document: Document, *, population: str | None = None, most: int | None = None) -> list[Passage]:
    """The passages of a document, in order.

    Paragraphs under one heading go together as far as they fit; a longer one is cut between sentences. "Otherwise …" stays with
    what it refers to, an item with what its list is of; where that does not fit, what comes before is said again, and a note says
    so. A heading with nothing under it that says what to do is a passage too; others are named in the document's notes.

    Args:
        population: of all passages, instead of what the document says.
        most: characters of a passage, headings and all; None takes 800 of English and 300 of Chinese. Headings never take more
            than half of them from the text.

    Raises:
        GatewiseError: the document has headings only, or ``most`` is too small.
    """
    if most is not None and most < 50:
        raise GatewiseError(f"a passage of at most {most} characters was asked for: expected 50 or more")
    starts = {id(block): at for block, at in zip(document.blocks, document.starts, strict=False)}
    found: list[Passage] = []
    for above, held in sections(document.blocks):
        alone = is_instruction_alone(above, held)
        headings = tuple(block.text for block in (above[:-1] if alone else above))
        for group in _groups([above[-1]] if alone else held):
            found += _of_group(group, starts, headings, population, most)
    if not found:
        raise GatewiseError(
            f"{document.name} has no passage, only headings or a few words: expected a text that says what to do and when"
        )
    ids = passage_ids([(one.text, one.headings) for one in found])
    return [replace(one, sha256=document.sha256, id=name) for one, name in zip(found, ids, strict=True)]


def passage_ids(passages: Sequence[tuple[str, Any]]) -> list[str]:
    """Ids of passages, given in their order as text and headings.

    The same text under the same headings has the same id, also in another version of the document. Of several that are alike in
    both, each has one of its own, by its place among them.
    """
    times: Counter[str] = Counter()
    made = []
    for text, headings in passages:
        said = json.dumps([" ".join(text.split()), list(headings or ())], ensure_ascii=False)
        times[said] += 1
        made.append(hashlib.sha256(f"{times[said]} {said}".encode("utf-8", "surrogatepass")).hexdigest()[:16])
    return made


def _groups(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks together, but those that name their own population ("population@passage") by themselves, with what belongs to them."""
    held: list[Block] = []
    for block in blocks:
        marked = population_mark(block.text) > 0
        apart = held and population_mark(held[0].text) > 0 and not _DEPENDENT.match(block.text)
        if held and (marked or apart):
            yield held
            held = []
        held.append(block)
    if held:
        yield held


def _of_group(
    group: Sequence[Block], starts: dict[int, int], headings: tuple[str, ...], given: str | None, most: int | None
) -> Iterator[Passage]:
    mark = max(population_mark(group[0].text), 0)
    named, others = population_of(headings)
    if mark:
        named, others = group[0].text[:mark], list(headings)
    if given is not None:
        named, others = given, [one for one in headings if one.strip().lower() != given.strip().lower()]
    lead = lead_of(others)
    units = list(_units(group, starts, mark + 1 if mark else 0))
    about = " ".join(named.replace("@", " ").split())
    numbered = {found[1] for block in group if block.kind == "item" and (found := re.match(r"[(（]?(\d{1,2})[.)、）]", block.text))}
    for packed in _pack(units, lead, most):
        if any(map(str.isalnum, packed.text)):
            notes = tuple(dict.fromkeys([*packed.notes, *_steps_elsewhere(packed.text, numbered)]))
            yield Passage(f"{lead}{packed.text}", about, headings, packed.where, packed.start, packed.end, notes)


@dataclass
class _Over:
    """What blocks may stand under: an item of a list, or a line that ends in a colon.

    Attributes:
        depth: of an item its own; of a line that of the item that it stands in, -1 without one.
        listed: whether an item stands under it.
        nested: whether what stands under it stands deeper, so that the next item beside it does not.
    """

    text: str
    depth: int
    is_item: bool
    used: bool = False
    listed: bool = False
    nested: bool = False

    def holds(self, block: Block) -> bool:
        if self.is_item:
            # "- In pregnancy:" and then items beside it, as where no one knows how deep an item is.
            flat = block.kind == "item" and block.depth == self.depth and not self.nested and bool(_COLON.search(self.text))
            return block.depth > self.depth or flat
        return block.depth > self.depth and (block.kind == "item" or block.depth > self.depth + 1 or not self.used)

    @property
    def is_confusing(self) -> bool:
        """Whether what comes after all that stands under it would be read as standing under it too."""
        return self.nested if self.is_item else self.listed and not is_order(self.text)


def _under(over: list[_Over], block: Block) -> bool:
    """Takes away what a block does not stand under; whether it has to be parted from what did."""
    parted = False
    while over and not over[-1].holds(block):
        parted |= over.pop().is_confusing
    if over:
        last = over[-1]
        last.used = True
        last.listed |= block.kind == "item"
        last.nested |= block.depth > last.depth and (block.kind == "item" or not re.search(r"[.!?。！？]$", last.text))
    return parted


def _said_of(over: Sequence[_Over]) -> str:
    """What a block stands under, as the beginning of its text."""
    texts = [one.text if _ENDS.search(one.text) else f"{one.text}{'：' if has_han(one.text[-1]) else ':'}" for one in over]
    return "".join(text if text[-1] in "：，。；" else f"{text} " for text in texts).strip()


def _steps_elsewhere(text: str, numbered: set[str]) -> Iterator[str]:
    """Notes on steps that a passage refers to and that stand in another one."""
    for number in dict.fromkeys(filter(None, (one for found in _STEP.finditer(text) for one in found.groups()))):
        if number in numbered and not re.search(rf"(?<![\d.]){number}(?:[.)]\s|[、）])", text):
            yield f"it refers to step {number}, which stands in another passage"


def _units(group: Sequence[Block], starts: dict[int, int], skipped: int) -> Iterator[_Unit]:
    before = ""  # the unit before
    over: list[_Over] = []
    for number, block in enumerate(group):
        skip = skipped if number == 0 else 0
        parted = _under(over, block)
        head = _said_of(over)
        whole = block.kind == "row" and bool(block.stem)
        spans = [(skip, len(block.text))] if whole else [(skip + i, skip + j) for i, j in _sentences(block.text[skip:])]
        for place, (first, last) in enumerate(spans):
            text = block.text[first:last].strip()
            start = starts[id(block)] + block.text.index(text, first)
            opens, refers = place == 0 and number > 0, bool(_DEPENDENT.match(_NUMBER.sub("", text, count=1)))
            apart = opens and parted and not refers and block.kind != "footnote"
            notes = block.notes if place == 0 else ()
            if not before and _REFERS.match(text):
                notes = (*notes, f'"{text[:40]}{"…" if len(text) > 40 else ""}" refers to something that is not under its heading')
            yield _Unit(
                text,
                start,
                start + len(text),
                block.where,
                number,
                bool(before) and not apart and (refers or bool(head) or (opens and block.kind == "footnote")),
                apart,
                "" if refers else head,
                block.stem if whole else "",
                _joint(before, text, opens, _beside(group, number) if opens else ""),
                notes,
            )
            before = text
        if block.kind == "item" and spans:
            over.append(_Over(before, block.depth, is_item=True))
        elif block.kind != "row" and (_COLON.search(before) or _leads(group, number)):
            over.append(_Over(before, block.depth - 1, is_item=False))


def _leads(group: Sequence[Block], number: int) -> bool:
    """Whether a block names what a list after it is of, though no colon says so: "In pregnancy"."""
    block, after = group[number], group[number + 1] if number + 1 < len(group) else None
    if after is None or block.kind != "paragraph" or (after.kind, after.depth) != ("item", block.depth):
        return False
    return not (_ENDS.search(block.text) or reads_as_sentence(block.text))


def _beside(group: Sequence[Block], number: int) -> str:
    """What parts a block from the one before that has no full stop, as English has it; empty where that is not known."""
    first, second = group[number - 1], group[number]
    if second.kind == "footnote" or first.kind not in ("item", "paragraph"):
        return ""
    if first.kind == "item":
        if second.depth <= first.depth:
            return ";" if second.kind == "item" or second.text[:1].islower() else "."
        named = reads_as_sentence(second.text) and not reads_as_sentence(first.text)
        return ":" if second.kind == "item" or named else ""
    return (":" if _leads(group, number - 1) else ".") if second.kind == "item" else ""


def _joint(before: str, text: str, opens: bool, sign: str) -> str:
    """What stands between two sentences, or between two blocks of which the first may have no full stop.

    Args:
        sign: see :func:`_beside`.
    """
    if not before:
        return ""
    chinese = has_han(before[-1]) or before[-1] in "。！？；：，、）”"
    if not opens or _ENDS.search(before):
        return "" if chinese else " "
    if sign and not re.search(r"\b(?:and|or)$|[和或]$", before):
        return {";": "；", ":": "：", ".": "。"}[sign] if chinese else f"{sign} "
    if re.match(r"[\"“(]?(?:[A-Z\u3400-\u9fff]|\d+(?:\.\d+)+\s|\d{1,2}(?:[.)]\s|、)|（\d)", text):
        return "。" if chinese else ". "
    return "" if chinese else " "


def _sentences(text: str) -> list[tuple[int, int]]:
    """The sentences of a text; none ends after an abbreviation."""
    cuts, start = [], 0
    for found in _SENTENCE.finditer(text):
        if found.start() > start and not _NO_END.search(text[max(start, found.start() - 20) : found.start()]):
            cuts.append((start, found.start()))
            start = found.end()
    return [(first, last) for first, last in [*cuts, (start, len(text))] if text[first:last].strip()]


@dataclass
class _Packed:
    """A passage that is being filled; without an end it has nothing of its own yet."""

    text: str = ""
    where: str = ""
    start: int = 0
    end: int = 0
    notes: list[str] = field(default_factory=list)

    def grown(self, units: Sequence[_Unit]) -> int:
        """The length that it would have with more units."""
        return len(self.text) + sum(
            len(unit.joint if number else self._joint(unit)) + len(unit.text) for number, unit in enumerate(units)
        )

    def _joint(self, unit: _Unit) -> str:
        """What stands before the next unit: nothing at the beginning, and what is said again ends as it did before."""
        if not self.text or self.end:
            return unit.joint if self.text else ""
        return "" if self.text[-1] in "：，。；" else " "

    def begin(self, unit: _Unit, head: str, room: int) -> None:
        """Says again what a unit stands under that begins the passage."""
        if head and (len(head) + 1 + len(unit.text) <= room or 3 * len(head) <= room < len(unit.text)):
            self.text, self.where, self.start = head, unit.where, unit.start
            self.notes.append(f'"{head[:60]}{"…" if len(head) > 60 else ""}" is said again, as the text was cut after it')
        elif unit.bound or head:
            self.notes.append("the passage begins with the end of the one before")

    def add(self, unit: _Unit) -> None:
        if not self.text:
            self.where, self.start = unit.where, unit.start
        self.text += self._joint(unit) + unit.text
        self.end = unit.end
        self.notes += unit.notes


def _pack(units: Sequence[_Unit], lead: str, most: int | None) -> Iterator[_Packed]:
    """Units put together to passages: whole blocks first, then clusters of what belongs together, then single units."""
    held = _Packed()
    for chain in _chains(units, blocks=True):
        room = _room(chain, lead, most)
        if held.end and (chain[0].apart or held.grown(chain) > room):
            yield held
            held = _Packed()
        if chain[0].apart:
            held.begin(chain[0], chain[0].head, room)
        for cluster in [chain] if held.grown(chain) <= room else _chains(chain, blocks=False):
            if held.end and held.grown(cluster) > room:
                yield held
                held = _Packed()
            if held.grown(cluster) <= room:
                for unit in cluster:
                    held.add(unit)
                continue
            yield from _pack_too_long(cluster, room, held)
            held = _Packed()
    if held.end:
        yield held


def _chains(units: Sequence[_Unit], *, blocks: bool) -> list[list[_Unit]]:
    """Units that stay together: those bound to the one before, and for ``blocks`` all of one block."""
    chains: list[list[_Unit]] = []
    for unit in units:
        if chains and (unit.bound or (blocks and unit.block == chains[-1][-1].block)):
            chains[-1].append(unit)
        else:
            chains.append([unit])
    return chains


def _room(units: Sequence[_Unit], lead: str, most: int | None) -> int:
    whole = most or MOST_CHARACTERS["zh" if is_chinese("".join(unit.text for unit in units)) else "en"]
    return max(whole - len(lead), whole // 2)


def _pack_too_long(cluster: Sequence[_Unit], room: int, held: _Packed) -> Iterator[_Packed]:
    """What belongs together and does not fit into one passage: each further one begins with what it refers to."""
    before = ""
    for unit in [part for one in cluster for part in _parts(one, room)]:
        if held.end and held.grown([unit]) > room:
            yield held
            held = _Packed()
            held.begin(unit, unit.head or (before if unit.bound else ""), room)
        rest = unit
        while held.grown([rest]) > room:
            cut = _between_words(rest.text, room - len(held.text) - bool(held.text))
            held.add(_part(rest, 0, cut))
            held.notes.append("a sentence that is longer than a passage was cut between words")
            yield held
            held = _Packed()
            rest = _part(rest, cut, len(rest.text))
            if unit.bound or unit.head:
                held.begin(rest, unit.head, room)
        held.add(rest)
        before = unit.text
    if held.end:
        yield held


def _parts(unit: _Unit, room: int) -> list[_Unit]:
    """A unit, or its sentences where it is a row that is too long."""
    spans = _sentences(unit.text) if len(unit.text) > room and unit.stem else []
    return [_part(unit, first, last) for first, last in spans] or [unit]


def _part(unit: _Unit, first: int, last: int) -> _Unit:
    text = unit.text[first:last]
    start = unit.start + first + len(text) - len(text.lstrip())
    said, later = text.strip(), first > 0
    part = replace(unit, text=said, start=start, end=start + len(said))
    if not later:
        return part
    head = " ".join(filter(None, (unit.head, unit.stem)))
    return replace(part, bound=unit.bound or bool(unit.stem), apart=False, head=head, joint=" ", notes=())


def _between_words(text: str, room: int) -> int:
    """Where to cut a text that is too long: at the last space that parts no number from its unit, else between signs."""
    at = text.rfind(" ", room // 2, room + 1)
    while at > 0 and re.search(r"[\d<>≤≥=±]$", text[:at]):
        at = text.rfind(" ", room // 2, at)
    cut = at if at > 0 else _between_signs(text, room)
    # What is left must have a word, or it would be no passage and be lost: a full stop alone.
    last = next((place for place in reversed(range(cut)) if text[place].isalnum()), 0)
    return cut if last == 0 or any(map(str.isalnum, text[cut:])) else last


def _between_signs(text: str, room: int) -> int:
    """At the last Chinese comma, else anywhere but within a Latin word or a number and its unit: "100毫克" stays whole."""
    cut = max((found.end() for found in re.finditer("[，、；：]", text[:room]) if found.end() > room // 2), default=room)
    within = re.search(r"[\dA-Za-z.,/<>≤≥=±]+(?:(?<=\d)[毫微千国际单小公米汞摩]{1,3})?$", text[:cut])
    if within and within.start() > room // 2 and (re.match(r"[\dA-Za-z.,/]", text[cut:]) or re.search(r"[^A-Za-z.,/]$", within[0])):
        return within.start()
    return cut
