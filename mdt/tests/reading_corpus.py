"""Random documents with known rows, lists and conditions, made from a seed, and the count of what reading tears apart in them.

`content` draws what a document says, in no format: headings, sentences, tables, lists. A writer of a format prints it; that of PDF
is `reading_pdf`. Each sentence, row and item is a `Fact`: words that belong together, as a drug and its dose, or an order and its
condition. `count` reads the document and cuts it into passages as `gatewise mdt extract` does, and looks each fact up in them.

A fact is torn if no passage says all of its words with none of another fact's between them. It is noted if each passage that has a
part of it says that it should be compared with the document. What is torn without a note misleads the reader, and is to be 0.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from gatewise_mdt.documents.passages import Passage, split_passages
from gatewise_mdt.documents.reading import document_of
from reading_words import CHINESE, ENGLISH, Words

_HAN = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Fact:
    """Words that belong together.

    Attributes:
        pieces: words that must stand together, in any order; the first ones name the fact.
        labelled: of a row: pairs of a header that is a condition and the value under it. The header must come before its value,
            with no other such header between.
        under: conditions that must be the last to come before it, as the line that a list is of.
        listed: it is said by a list, or after one: of the conditions of lists none but its own may come before it in its passage.
    """

    pieces: tuple[str, ...]
    labelled: tuple[tuple[str, str], ...] = ()
    under: tuple[str, ...] = ()
    listed: bool = False


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 1


@dataclass(frozen=True)
class Prose:
    """A paragraph; those of its sentences that are facts are whole pieces."""

    sentences: tuple[str, ...]

    def facts(self) -> Iterator[Fact]:
        yield from (Fact((sentence,)) for sentence in self.sentences if sentence not in (*ENGLISH.fillers, *CHINESE.fillers))


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headers: its first row; none if all are empty.
        rows: all others; a row with one cell alone stands over all columns, and is a condition of the rows below it. A first cell
            that is empty is that of the row above.
        bands: how many of the last headers are conditions.
        over: a header over all of them, in a row above, or none.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bands: int = 0
    over: str = ""
    caption: str = ""

    def facts(self) -> Iterator[Fact]:
        group: tuple[str, ...] = ()
        first = ""
        for row in self.rows:
            if len(row) == 1:
                group = row
                continue
            first = row[0] or first
            plain = len(row) - self.bands
            labelled = tuple(zip(self.headers[plain:], row[plain:], strict=True))
            yield Fact(tuple(filter(None, (first, *row[1:plain]))), tuple(pair for pair in labelled if pair[1]), group)


@dataclass(frozen=True)
class Item:
    """An item of a list.

    Attributes:
        text: what it says.
        fact: the words of it that belong together; empty for a condition, which its items are said of.
        condition: the words that its items are said of.
        inner: the items of a list in it.
        more: a second paragraph of it, which is an order.
    """

    text: str
    fact: tuple[str, ...] = ()
    condition: str = ""
    inner: tuple["Item", ...] = ()
    more: "Item | None" = None

    def facts(self, under: tuple[str, ...]) -> Iterator[Fact]:
        if self.fact:
            yield Fact(self.fact, (), under, listed=True)
        below = (*under, self.condition) if self.condition else under
        for item in (*self.inner, *filter(None, (self.more,))):
            yield from item.facts(below)


@dataclass(frozen=True)
class Listing:
    """A list, with a line before it that it is of, or none, and an order after it that it says nothing of.

    Attributes:
        numbered: whether the outer items have numbers.
    """

    items: tuple[Item, ...]
    lead: Item | None = None
    after: Item | None = None
    numbered: bool = False

    def facts(self) -> Iterator[Fact]:
        under = (self.lead.condition,) if self.lead else ()
        for item in self.items:
            yield from item.facts(under)
        if self.after:
            yield from self.after.facts(())


Part = Heading | Prose | Table | Listing


class Draw:
    """Draws words that come once in a document, so that each is known by itself."""

    def __init__(self, random: Random, words: Words = ENGLISH) -> None:
        self.random, self.words = random, words
        self.drugs = random.sample(words.drugs, len(words.drugs))
        again = [f"{words.again}{one[:1].lower()}{one[1:]}" for one in words.conditions]
        self.conditions = [*random.sample(again, len(again)), *random.sample(words.conditions, len(words.conditions))]
        amounts = [*range(1, 100), *range(100, 1000, 25), 0.5, 1.25, 2.5, 7.5, 12.5, 62.5]
        self.amounts = random.sample(amounts, len(amounts))

    def drug(self) -> str:
        name = self.drugs.pop()
        return name.capitalize() if self.random.random() < 0.4 else name

    def condition(self) -> str:
        return self.conditions.pop()

    def number(self) -> str:
        return str(self.amounts.pop())

    def dose(self) -> str:
        return f"{self.number()}{self.random.choice(self.words.units)}"

    def frequency(self) -> str:
        return self.random.choice(self.words.frequencies)

    def order(self) -> str:
        """A sentence that says what to give, and when."""
        said, condition = self.random.choice(self.words.orders), self.condition()
        condition = condition if said.startswith("{") else f"{condition[:1].lower()}{condition[1:]}"
        return said.format(condition=condition, drug=self.drug(), dose=self.dose(), frequency=self.frequency())

    def comment(self) -> str:
        return self.random.choice(self.words.comments).format(self.number())

    def heading(self) -> str:
        return self.random.choice(self.words.headings)


def content(random: Random, shapes: Sequence[str], words: Words = ENGLISH) -> list[Part]:
    """What a document says: a heading, sentences, and a table of each shape, mostly with sentences after it."""
    draw = Draw(random, words)
    parts: list[Part] = [Heading(draw.heading()), prose(draw)]
    for shape in shapes:
        if random.random() < 0.5:
            parts.append(Heading(draw.heading(), 2))
        if random.random() < 0.5:
            parts.append(prose(draw))
        parts.append(table(draw, shape))
        if shape == shapes[-1] or random.random() < 0.7:
            parts.append(prose(draw))
    return parts


def content_with_lists(random: Random, shapes: Sequence[str], lists: Sequence[str]) -> list[Part]:
    """What a document says that has lists of some kinds as well."""
    parts = content(random, shapes)
    draw = Draw(random)
    for known in (*ENGLISH.drugs, *ENGLISH.conditions):  # each comes once in a document
        said = repr(parts).lower()
        draw.drugs = [one for one in draw.drugs if one != known or known.lower() not in said]
        draw.conditions = [one for one in draw.conditions if one != known or known.lower() not in said]
    draw.amounts = [one for one in draw.amounts if not re.search(rf"(?<![\d.]){re.escape(str(one))}(?![\d.])", repr(parts))]
    for kind in lists:
        # Not beside another list, of which it would be a part.
        places = [at for at in range(1, len(parts) + 1) if not any(isinstance(one, Listing) for one in parts[at - 1 : at + 1])]
        at = random.choice(places)
        parts[at:at] = [Heading(draw.heading(), 2)] * (random.random() < 0.3) + [listing(draw, kind)]
    return parts


LISTS = ("nested", "deep", "steps", "lead", "paragraphs", "terms")


def listing(draw: Draw, kind: str) -> Listing:
    """A list of a kind: "nested" has items under some of its items, and "lead" a line before it."""
    random = draw.random

    def order(number: str = "") -> Item:
        drug, dose, often = draw.drug(), draw.dose(), draw.frequency()
        said = random.choice((f"Give {drug} {dose} {often}", f"{drug} {dose} {often}", f"start {drug} at {dose}"))
        return Item(f"{said}{random.choice(('', '', '.'))}", (f"{number} {said}",) if number else (drug, dose))

    def condition(inner: Sequence[Item], more: Item | None = None) -> Item:
        name = draw.condition()
        said = random.choice((f"In {name}:", f"{name}:", name, f"If there is {name}:", f"People with {name}"))
        return Item(said, (), name, tuple(inner), more)

    def some(most: int = 3) -> list[Item]:
        return [order() for _ in range(random.randint(1, most))]

    def mixed() -> list[Item]:
        return random.sample([condition(some()), *some(), condition(some(2)), order()], k=random.randint(3, 4))

    after = order() if random.random() < 0.5 else None
    if kind == "deep":
        inner = [order(), condition(some(2)), order()]
        return Listing((condition(random.sample(inner, 3)), order(), condition(some(2)), order()), after=after)
    if kind == "steps":
        items = [order(f"{number}.") for number in range(1, random.randint(4, 6))]
        place = random.randint(1, len(items) - 1)
        said = f"If it helps, skip step {place} and give {draw.drug()} {draw.dose()}"
        items[place] = Item(said, (f"{place + 1}. {said}",))
        return Listing(tuple(items), numbered=True, after=after)
    if kind == "lead":
        return Listing(tuple(random.choice((mixed, some))()), condition([]), after)
    if kind == "paragraphs":
        return Listing((condition([], order()), order(), condition(some(2), order()), order()), after=after)
    return Listing(tuple(mixed()), after=after, numbered=random.random() < 0.3)


def prose(draw: Draw) -> Prose:
    """A paragraph of two to six sentences, of which some say what to do."""
    sentences = draw.random.sample(draw.words.fillers, draw.random.randint(1, 3))
    for _ in range(draw.random.randint(1, 3)):
        sentences.insert(draw.random.randint(0, len(sentences)), draw.order())
    return Prose(tuple(sentences))


SHAPES = ("short", "three columns", "wrapped", "numeric", "conditions", "groups", "first cell once", "sentences", "no headers")


def table(draw: Draw, shape: str) -> Table:
    """A table of a shape: "short" has a drug and a dose, and "conditions" doses under headers that are conditions."""
    random, words, count = draw.random, draw.words, draw.random.randint(3, 6)
    drug, dose = random.choice(words.dosing)
    headers, bands, over = (drug, dose), 0, ""
    rows: list[tuple[str, ...]] = []
    if shape in ("short", "no headers"):
        rows += [(draw.drug(), draw.dose()) for _ in range(count)]
        headers = headers if shape == "short" else ("", "")
    elif shape == "three columns":
        headers = (words.indication, drug, dose)
        rows += [(draw.condition(), draw.drug(), f"{draw.dose()} {draw.frequency()}") for _ in range(count)]
    elif shape == "wrapped":
        headers = (drug, dose, words.remarks)
        rows += [(draw.drug(), draw.dose(), draw.comment()) for _ in range(count)]
    elif shape == "numeric":
        units = random.choice(words.counted)
        headers, bands = (drug, *units), len(units)
        rows += [(draw.drug(), *(draw.number() for _ in units)) for _ in range(count)]
    elif shape == "conditions":
        named = random.choice(words.bands)
        headers, bands, over = (drug, *named), len(named), random.choice(("", "", words.most))
        rows += [(draw.drug(), *(draw.dose() for _ in named)) for _ in range(count)]
    elif shape == "groups":
        headers = (drug, dose, words.frequency)
        for _ in range(random.randint(2, 3)):
            rows.append((draw.condition(),))
            rows += [(draw.drug(), draw.dose(), draw.frequency()) for _ in range(random.randint(1, 3))]
    elif shape == "first cell once":
        headers = (drug, words.indication, dose)
        for _ in range(random.randint(2, 3)):
            more = random.randint(1, 2)
            rows += [(draw.drug() if not number else "", draw.condition(), draw.dose()) for number in range(1 + more)]
    elif shape == "sentences":
        headers = (words.indication, words.advice)
        rows += [(draw.condition(), f"{draw.order()} {draw.comment()}") for _ in range(count)]
    else:
        raise ValueError(shape)
    caption = f"{words.table}{random.randint(1, 9)}. {random.choice(words.captions)}" if random.random() < 0.5 else ""
    return Table(headers, tuple(rows), bands, over, caption)


def facts_of(parts: Sequence[Part]) -> list[Fact]:
    """All facts of a document."""
    return [fact for part in parts if not isinstance(part, Heading) for fact in part.facts()]


# ---- what is torn ----


def count(file: bytes, suffix: str, facts: Sequence[Fact]) -> Counter[str]:
    """How many facts of a document there are, and how many are "torn", "torn, noted", and "kept, noted"."""
    passages = split_passages(document_of(file, f"a{suffix}", suffix))
    counts: Counter[str] = Counter(facts=len(facts))
    for fact in facts:
        kept, noted = is_kept(fact, facts, passages), is_noted(fact, passages)
        if not kept:
            counts["torn, noted" if noted else "torn"] += 1
        elif noted:
            counts["kept, noted"] += 1
    return counts


def torn(file: bytes, suffix: str, facts: Sequence[Fact]) -> list[Fact]:
    """The facts of a document that are torn without a note."""
    passages = split_passages(document_of(file, f"a{suffix}", suffix))
    return [fact for fact in facts if not is_kept(fact, facts, passages) and not is_noted(fact, passages)]


def is_kept(fact: Fact, facts: Sequence[Fact], passages: Sequence[Passage]) -> bool:
    """Whether a passage says all of a fact together."""
    own = {*fact.pieces, *(value for _, value in fact.labelled)}
    conditions = {label for one in facts for label, _ in one.labelled}
    others = {word for one in facts if one != fact for word in (*one.pieces, *(value for _, value in one.labelled))} - own
    groups = {condition for one in facts for condition in one.under}
    of_lists = {condition for one in facts for condition in one.under if one.listed}
    for passage in passages:
        found = sorted(_places(passage.text, own | others | conditions | groups))
        for place, (at, word) in enumerate(found):
            if word != fact.pieces[0]:
                continue
            first, last = place, place
            while first > 0 and found[first - 1][1] not in others:
                first -= 1
            while last + 1 < len(found) and found[last + 1][1] not in others:
                last += 1
            held = [said for _, said in found[first : last + 1]]
            before = [said for where, said in found if where < at and said in groups]
            has_labels = all(label in _labels_before(held, value, conditions) for label, value in fact.labelled)
            over = [said for said in before if said in of_lists] if fact.listed else before[len(before) - len(fact.under) :]
            if own <= set(held) and has_labels and tuple(over) == fact.under:
                return True
    return False


def _labels_before(words: Sequence[str], value: str, labels: set[str]) -> set[str | None]:
    """The last label before each place of a value."""
    places = [place for place, word in enumerate(words) if word == value]
    return {next((word for word in reversed(words[:place]) if word in labels), None) for place in places}


def is_noted(fact: Fact, passages: Sequence[Passage]) -> bool:
    """Whether each passage that has a part of a fact says that it should be compared with the document."""
    doses = [
        piece for piece in fact.pieces if re.search(r"\d", piece) and piece not in (*ENGLISH.frequencies, *CHINESE.frequencies)
    ]
    names = {fact.pieces[0], *doses, *(value for _, value in fact.labelled)}
    having = {id(one): one for name in names for one in _having(name, passages)}
    return bool(having) and all(any("compare" in note for note in one.notes) for one in having.values())


def _having(name: str, passages: Sequence[Passage]) -> list[Passage]:
    """The passages that have words, or where none has them whole, half of their letters."""
    if whole := [one for one in passages if any(True for _ in _places(one.text, {name}))]:
        return whole
    if len(name) < 40 and (dose := re.match(r"[\d.]+\s?[a-z/]+", name)):
        return [one for one in passages if any(True for _ in _places(one.text, {dose[0]}))]
    letters = re.sub(r"\s", "", name)
    parts = [letters[at : at + 6] for at in range(0, len(letters), 6)]
    return [one for one in passages if 2 * sum(part in re.sub(r"\s", "", one.text) for part in parts) >= len(parts)]


def _places(text: str, words: set[str]) -> Iterator[tuple[int, str]]:
    """Where words stand in a text, whatever white stands in them; of one inside another only the longer one."""
    taken: list[tuple[int, int]] = []
    for word in sorted(words, key=len, reverse=True):
        pattern = r"\s*".join(map(re.escape, re.sub(r"\s", "", word))) if _HAN.search(word) else re.escape(word)
        before = r"(?<![A-Za-z0-9.])" if re.match(r"[!-~]", word) else ""
        after = r"(?![A-Za-z0-9]|\.\d)" if re.search(r"[!-~]$", word) else ""
        for found in re.finditer(f"{before}{pattern}{after}", text):
            if not any(start <= found.start() < end for start, end in taken):
                taken.append(found.span())
                yield found.start(), word
