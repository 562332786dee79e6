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

_DRUGS = (
    "amlodipine ramipril bisoprolol colchicine naproxen metformin gliclazide warfarin apixaban digoxin furosemide prednisolone"
    " salbutamol tiotropium amoxicillin doxycycline cefalexin gentamicin fluconazole aciclovir morphine oxycodone ondansetron"
    " omeprazole levothyroxine carbimazole lithium sertraline mirtazapine haloperidol valproate lamotrigine phenytoin allopurinol"
    " febuxostat methotrexate azathioprine enoxaparin dabigatran spironolactone losartan diltiazem verapamil simvastatin"
)
_CONDITIONS = (
    "Renal failure|Pregnancy|Liver disease|Heart failure|Acute flare|Severe pain|Atrial fibrillation|Deep vein thrombosis"
    "|Penicillin allergy|Chronic cough|Septic shock|Status epilepticus|Type 2 diabetes|Active ulcer|Bleeding disorder"
    "|High fracture risk|Early rheumatoid arthritis|Resistant hypertension|Mild asthma|Severe asthma|Acute mania|Late-onset sepsis"
    "|Cellulitis|Pyelonephritis|Otitis media|Panic disorder|Cluster headache|Gout with tophi|Night-time symptoms|Low sodium"
)
DRUGS, CONDITIONS = _DRUGS.split(), _CONDITIONS.split("|")
FREQUENCIES = ("once daily", "twice daily", "every 8 hours", "every 12 hours", "at night", "weekly", "every 7 days", "before meals")
BANDS = (
    ("eGFR 60 or more", "eGFR 30 to 59", "eGFR below 30"),
    ("Adults", "Children"),
    ("First week", "Later"),
    ("Oral", "Intravenous"),
    ("Below 50 kg", "50 to 80 kg", "Above 80 kg"),
)
COMMENTS = (
    "Stop it if the potassium is above {} mmol/L, and measure it again after two days.",
    "Measure the creatinine after {} days, and halve the dose if it has doubled.",
    "Not together with a second drug of the same group for more than {} weeks",
    "Increase every {} days as tolerated; tell the patient to report a rash or fever at once.",
    "Only on the advice of a specialist if the patient is older than {} years",
    "with food, for at most {} days; then review whether it is still needed",
)
FILLERS = (
    "This chapter was written by the working group and was reviewed by patients, nurses and general practitioners.",
    "The evidence comes from several trials, most of which were small and lasted less than one year.",
    "Ask about other medicines at each visit, and write the answers into the record.",
    "Many people have the disease for years before it is found, and most of them live a normal life.",
    "Advice on diet, exercise and smoking is part of every visit, whatever else is done.",
    "The group found no study of older people who live in care homes, and asks for one.",
)
HEADINGS = (
    "Treatment",
    "Doses",
    "Follow-up",
    "First choice",
    "Further options",
    "Background",
    "Adults with symptoms",
    "Monitoring",
)


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
        yield from (Fact((sentence,)) for sentence in self.sentences if sentence not in FILLERS)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headers: its first row.
        rows: all others; a row with one cell alone stands over all columns, and is a condition of the rows below it.
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
        for row in self.rows:
            if len(row) == 1:
                group = row
                continue
            plain = len(row) - self.bands
            labelled = tuple(zip(self.headers[plain:], row[plain:], strict=True))
            yield Fact(tuple(filter(None, row[:plain])), tuple(pair for pair in labelled if pair[1]), group)


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

    def __init__(self, random: Random) -> None:
        self.random = random
        self.drugs, self.conditions = random.sample(DRUGS, len(DRUGS)), random.sample(CONDITIONS, len(CONDITIONS))
        amounts = [*range(1, 100), *range(100, 1000, 25), 0.5, 1.25, 2.5, 7.5, 12.5, 62.5]
        self.amounts = random.sample(amounts, len(amounts))

    def drug(self) -> str:
        name = self.drugs.pop()
        return name.capitalize() if self.random.random() < 0.4 else name

    def condition(self) -> str:
        return self.conditions.pop()

    def dose(self) -> str:
        return f"{self.amounts.pop()} {self.random.choice(('mg', 'mg', 'mg', 'micrograms', 'g', 'mg/kg'))}"

    def comment(self) -> str:
        return self.random.choice(COMMENTS).format(self.amounts.pop())


def content(random: Random, shapes: Sequence[str]) -> list[Part]:
    """What a document says: a heading, sentences, a table of each shape with sentences after it."""
    draw = Draw(random)
    parts: list[Part] = [Heading(random.choice(HEADINGS)), prose(draw)]
    for shape in shapes:
        if random.random() < 0.5:
            parts.append(Heading(random.choice(HEADINGS), 2))
        if random.random() < 0.5:
            parts.append(prose(draw))
        parts += [table(draw, shape), prose(draw)]
    return parts


def content_with_lists(random: Random, shapes: Sequence[str], lists: Sequence[str]) -> list[Part]:
    """What a document says that has lists of some kinds as well."""
    parts = content(random, shapes)
    draw = Draw(random)
    for known in DRUGS + CONDITIONS:  # each comes once in a document
        said = repr(parts).lower()
        draw.drugs = [one for one in draw.drugs if one != known or known.lower() not in said]
        draw.conditions = [one for one in draw.conditions if one != known or known.lower() not in said]
    draw.amounts = [one for one in draw.amounts if not re.search(rf"(?<![\d.]){re.escape(str(one))}(?![\d.])", repr(parts))]
    for kind in lists:
        # Not beside another list, of which it would be a part.
        places = [at for at in range(1, len(parts) + 1) if not any(isinstance(one, Listing) for one in parts[at - 1 : at + 1])]
        at = random.choice(places)
        parts[at:at] = [Heading(random.choice(HEADINGS), 2)] * (random.random() < 0.3) + [listing(draw, kind)]
    return parts


LISTS = ("nested", "deep", "steps", "lead", "paragraphs", "terms")


def listing(draw: Draw, kind: str) -> Listing:
    """A list of a kind: "nested" has items under some of its items, and "lead" a line before it."""
    random = draw.random

    def order(number: str = "") -> Item:
        drug, dose, often = draw.drug(), draw.dose(), random.choice(FREQUENCIES)
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
    sentences = draw.random.sample(FILLERS, draw.random.randint(1, 3))
    for _ in range(draw.random.randint(1, 3)):
        condition, drug = draw.condition(), draw.drug()
        order = f"{drug} {draw.dose()} {draw.random.choice(FREQUENCIES)}"
        said = (f"In {condition[:1].lower()}{condition[1:]} give {order}.", f"Give {order} to people with {condition.lower()}.")
        sentences.insert(draw.random.randint(0, len(sentences)), draw.random.choice(said))
    return Prose(tuple(sentences))


SHAPES = ("short", "three columns", "wrapped", "numeric", "conditions", "groups")


def table(draw: Draw, shape: str) -> Table:
    """A table of a shape: "short" has a drug and a dose, and "conditions" doses under headers that are conditions."""
    random, count = draw.random, draw.random.randint(3, 6)
    caption = f"Table {random.randint(1, 9)}. {random.choice(('Doses', 'Drugs and doses', 'What to give and when'))}"
    caption = caption if random.random() < 0.5 else ""
    drug, dose = random.choice((("Drug", "Dose"), ("Medicine", "Dosage"), ("Agent", "Starting dose")))
    if shape == "short":
        return Table((drug, dose), tuple((draw.drug(), draw.dose()) for _ in range(count)), caption=caption)
    if shape == "three columns":
        cells = ((draw.condition(), draw.drug(), f"{draw.dose()} {random.choice(FREQUENCIES)}") for _ in range(count))
        return Table(("Indication", drug, dose), tuple(cells), caption=caption)
    if shape == "wrapped":
        cells = ((draw.drug(), draw.dose(), draw.comment()) for _ in range(count))
        return Table((drug, dose, "Comments"), tuple(cells), caption=caption)
    if shape == "numeric":
        units = random.choice((("Start (mg)", "Target (mg)"), ("mg per day", "Tablets", "Weeks")))
        made = ((draw.drug(), *(str(draw.amounts.pop()) for _ in units)) for _ in range(count))
        return Table((drug, *units), tuple(made), len(units), caption=caption)
    if shape == "conditions":
        bands = random.choice(BANDS)
        made = ((draw.drug(), *(draw.dose() for _ in bands)) for _ in range(count))
        return Table((drug, *bands), tuple(made), len(bands), random.choice(("", "", "Maximum dose")), caption)
    if shape == "groups":
        rows: list[tuple[str, ...]] = []
        for _ in range(random.randint(2, 3)):
            rows.append((draw.condition(),))
            rows += [(draw.drug(), draw.dose(), random.choice(FREQUENCIES)) for _ in range(random.randint(1, 3))]
        return Table((drug, dose, "Frequency"), tuple(rows), caption=caption)
    raise ValueError(shape)


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
    doses = [piece for piece in fact.pieces if re.search(r"\d", piece) and piece not in FREQUENCIES]
    names = {fact.pieces[0], *doses, *(value for _, value in fact.labelled)}
    having = [one for one in passages if any(True for _ in _places(one.text, names))]
    return bool(having) and all(any("compare" in note for note in one.notes) for one in having)


def _places(text: str, words: set[str]) -> Iterator[tuple[int, str]]:
    """Where words stand in a text; of one inside another only the longer one."""
    taken: list[tuple[int, int]] = []
    for word in sorted(words, key=len, reverse=True):
        for found in re.finditer(rf"(?<![\w.]){re.escape(word)}(?![\w]|\.\d)", text):
            if not any(start <= found.start() < end for start, end in taken):
                taken.append(found.span())
                yield found.start(), word
