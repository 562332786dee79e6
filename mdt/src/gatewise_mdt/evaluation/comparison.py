"""An agreement as people read it: the measures as rows, each difference as a line, and all of it as an HTML page.

The page is ``comparison.html`` with ``comparison.css`` after the looks of all trees; it has no script, and its
Content-Security-Policy allows none.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from gatewise_mdt.evaluation.agreement import Agreement, Difference, Kappa, Part, PassageAgreement, reviewer_of, state_of
from gatewise_mdt.evaluation.intervals import DRAWS
from gatewise_mdt.formats.page import SMALLEST, content_of, source_of_policy, template_of
from gatewise_mdt.formats.svg import drawing_of, main_subject
from gatewise_mdt.formats.words import words_for
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.spans import locate_tree
from gatewise_mdt.tree import DecisionTree

NOTICE = "Needs review by a clinician. Not medical advice. Agreement says nothing of whether both are right."
_MEASURES = {
    "triplet_f1": "F1 of triples",
    "node_f1": "F1 of nodes",
    "path_f1": "F1 of paths",
    "tree_agreement": "same trees",
    "ter": "tree edit ratio",
}


class Row(NamedTuple):
    """A measure: its name, its value, its interval if it has one, and what it is of."""

    name: str
    value: str
    interval: str
    said: str


class Line(NamedTuple):
    """A difference: what kind it is of, and its words with whose they are, "a", "b" or nobody's."""

    label: str
    words: tuple[tuple[str, str], ...]


def rows_of(agreement: Agreement) -> list[Row]:
    """The measures over all passages."""
    same = sum(passage.same for passage in agreement.passages)
    said = {"tree_agreement": f"{same} of {len(agreement.passages)}", "ter": "0 is best"}
    rows = [
        Row(label, f"{agreement.values[name]:.3f}", _interval(agreement, name), said.get(name, ""))
        for name, label in _MEASURES.items()
    ]
    kappa = agreement.kappa
    rows.append(Row("kappa of characters", _value(kappa), _interval(agreement, "kappa"), f"{kappa.units:,} characters"))
    return rows


def remarks_of(agreement: Agreement) -> list[str]:
    """What has to be known of the measures, a sentence each."""
    made = []
    if agreement.intervals:
        made.append(f"95% intervals from {DRAWS:,} bootstrap draws of the {len(agreement.passages)} passages.")
    if agreement.kappa.value is None:
        made.append("Kappa is not defined, as both put everything into one and the same class.")
    (both, *_), *_ = agreement.states
    approved = [sum(agreement.states[0]), sum(row[0] for row in agreement.states)]
    if any(approved):
        a, b = agreement.names
        made.append(f"Approved: {approved[0]} by {a}, {approved[1]} by {b}, {both} by both.")
    for name, records in zip(agreement.names, (agreement.only_a, agreement.only_b), strict=True):
        if records:
            made.append(f"Only {name} has {_listed(records)}.")
    return [*made, *(f"{note[:1].upper()}{note[1:]}." for note in agreement.notes)]


def heading_of(passage: PassageAgreement) -> str:
    """Which passage it is, on one line."""
    numbers = str(passage.a.number) if passage.a.number == passage.b.number else f"{passage.a.number}/{passage.b.number}"
    population = f"{passage.a.population}: " if passage.a.population else ""
    return f"{numbers}. {population}{clipped(passage.a.passage, 70)}"


def figures_of(passage: PassageAgreement) -> str:
    """How far two trees agree, on one line."""
    values = passage.values
    kappa = f", kappa of characters {_value(passage.kappa)}"
    return (
        f"F1 of triples {values['triplet_f1']:.2f}, nodes {values['node_f1']:.2f}, paths {values['path_f1']:.2f},"
        f" TER {values['ter']:.2f}{kappa}"
    )


def lines_of(passage: PassageAgreement, names: tuple[str, str]) -> list[Line]:
    """What differs in a passage, a line each."""
    teller = _Teller(passage, names)
    return [teller.line(difference) for difference in passage.differences]


def clipped(text: str, most: int) -> str:
    """A text on one line, cut where it is longer."""
    plain = " ".join(text.split())
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _interval(agreement: Agreement, name: str) -> str:
    ends = agreement.intervals.get(name)
    return f"{ends['low']:.3f} to {ends['high']:.3f}" if ends else ""


def _value(kappa: Kappa) -> str:
    return "not defined" if kappa.value is None else f"{kappa.value:.3f}"


def _listed(records: Iterable[TreeRecord]) -> str:
    return "; ".join(f'record {record.number}, "{clipped(record.text, 40)}"' for record in records)


class _Teller:
    """Says what differs between two trees."""

    def __init__(self, passage: PassageAgreement, names: tuple[str, str]) -> None:
        self.trees, self.names = passage.trees, names
        self.main = main_subject(passage.trees[0]) or main_subject(passage.trees[1])

    def line(self, difference: Difference) -> Line:
        """One difference."""
        kind, a, b = difference
        if kind == "one only":
            side, part = ("a", a[0]) if a else ("b", b[0])
            return Line(self._only(side), ((self.triples(part), side), (f" ({part.role})", "")))
        if kind == "node of one":
            side, part = ("a", a[0]) if a else ("b", b[0])
            return Line(f"{self._only(side)}, once more", ((self.triples(part), side), (f" ({self.way(side, part)})", "")))
        if kind in ("span", "subject"):
            (one, relation, object_), (other, _, object_b) = a[0].triples[0], b[0].triples[0]
            differ = [pair for pair in ((one, other), (object_, object_b)) if pair[0].lower() != pair[1].lower()]
            about = f" of {object_}" if object_.lower() == object_b.lower() else ""
            said = [" → ".join(f'"{pair[side]}"' for pair in differ) for side in (0, 1)]
            return self._both("other words" if kind == "span" else "other subject", f"{relation}{about}", *said)
        if kind == "relation":
            (_, one, object_), (_, other, _) = a[0].triples[0], b[0].triples[0]
            return self._both("other relation", object_, one, other)
        if kind == "several parts":
            return self._both("alike", "", self.triples(a[0]), self.triples(b[0]))
        if kind == "grouping":
            return self._both("other grouping", "", self.triples(a[0]), " and apart ".join(map(self.triples, b)))
        if kind == "join":
            shared = {_lower(triple) for triple in b[0].triples}
            both = a[0]._replace(join="null", triples=tuple(t for t in a[0].triples if _lower(t) in shared))
            joined = {"and": "all of them", "or": "any of them"}
            return self._both("and / or", self.triples(both), joined[a[0].join], joined[b[0].join])
        if kind == "role":
            return self._both("condition or decision", self.triples(a[0]), a[0].role, b[0].role)
        return self._both("other branch", self.triples(a[0]), self.way("a", a[0]), self.way("b", b[0]))

    def _only(self, side: str) -> str:
        return f"only {self.names[side == 'b']}"

    def _both(self, label: str, about: str, one: str, other: str) -> Line:
        last = f": {about}" if about else ""
        return Line(label, ((f"{self.names[0]} {one}", "a"), (", ", ""), (f"{self.names[1]} {other}", "b"), (last, "")))

    def triples(self, part: Part) -> str:
        """The triples of a part, each without the subject that most have."""
        said = [
            f"{relation}: {object_}" if subject == self.main else f"{subject} → {relation}: {object_}"
            for subject, relation, object_ in part.triples
        ]
        joined = "; ".join(said)
        return {"and": f"all of ({joined})", "or": f"any of ({joined})"}.get(part.join, joined)

    def way(self, side: str, part: Part) -> str:
        """Where a node stands: the answers on the way to it, and to what the last is one."""
        tree = self.trees[side == "b"]
        at, above = 0, 0
        for turn in part.turns:
            both = tree.children[at]
            assert both is not None
            above, at = at, both[0] if turn else both[1]
        if not part.turns:
            return "first of all"
        asked = " / ".join(triple.object for triple in tree.nodes[above].triples)
        return f'{" › ".join("yes" if turn else "no" for turn in part.turns)} (at "{clipped(asked, 40)}")'


def _lower(triple: tuple[str, str, str]) -> tuple[str, ...]:
    return tuple(part.lower() for part in triple)


# ---- the page ----


def page_of(agreement: Agreement) -> str:
    """A page with the measures, and for each passage its text and both trees side by side. All that comes from files is escaped.

    Raises:
        GatewiseError: Jinja2 is not installed (the extra ``mdt``).
    """
    articles, rules = [], []
    for i, passage in enumerate(agreement.passages, start=1):
        sides = []
        for j, (side, tree) in enumerate(zip("ab", passage.trees, strict=True)):
            if passage.same and j:
                break
            prefix = f"passage-{i}{side}-"
            drawing = drawing_of(tree, passage.text, prefix=prefix)
            parts = [part for difference in passage.differences for part in (difference.a, difference.b)[j]]
            boxes = ",".join(f"#{prefix}node-{node + 1} .box" for node in sorted({part.node for part in parts}))
            rules += [f"#{prefix}tree svg{{min-width:{SMALLEST * drawing.width:.0f}px}}"] + (
                [f"{boxes}{{{_DIFFERS}}}"] if boxes else []
            )
            sides.append({"id": f"{prefix}tree", "who": _who(agreement, passage, j), "svg": drawing.svg})
        articles.append(
            {
                "id": f"passage-{i}",
                "heading": heading_of(passage),
                "figures": figures_of(passage),
                "same": passage.same,
                "headings": " › ".join(passage.a.headings),
                "pieces": _pieces(passage.text, passage.trees, agreement.names),
                "lines": lines_of(passage, agreement.names),
                "sides": sides,
            }
        )
    style = "\n".join([content_of("gatewise_mdt.formats", "page.css"), content_of(__package__, "comparison.css"), *rules, ""])
    chinese = any(tree.language == "zh" for passage in agreement.passages for tree in passage.trees)
    return template_of(content_of(__package__, "comparison.html")).render(
        title=f"{agreement.names[0]} and {agreement.names[1]}: do they agree?",
        notice=words_for("zh").notice if chinese else "",
        notice_english=NOTICE,
        names=agreement.names,
        rows=rows_of(agreement),
        remarks=remarks_of(agreement),
        articles=articles,
        style=style,
        style_hash=source_of_policy(style),
    )


_DIFFERS = "stroke:var(--warn);stroke-width:4"


def _who(agreement: Agreement, passage: PassageAgreement, side: int) -> str:
    """Over a tree: whose it is, and how far its review is."""
    records = [passage.a, passage.b]
    reviewers = [reviewer_of(record) for record in records]
    said = [
        f"{name}, {state_of(record)}{f' by {reviewer}' if reviewer and reviewer != name else ''}"
        for name, record, reviewer in zip(agreement.names, records, reviewers, strict=True)
    ]
    return " and ".join(said) if passage.same else said[side]


def _pieces(text: str, trees: tuple[DecisionTree, DecisionTree], names: tuple[str, str]) -> list[dict[str, Any]]:
    """The text in pieces, each with who has it in a phrase: "a", "b", "ab" or nobody; without the population's "@"."""
    covered = [
        [(span.start, span.end) for row in locate_tree(text, tree) for spans in row for span in spans if span is not None]
        for tree in trees
    ]
    mark = text.find("@")
    cuts = {0, len(text), *(edge for spans in covered for span in spans for edge in span)}
    cuts |= {mark, mark + 1} if mark >= 0 else set()
    pieces = []
    for start, end in pairwise(sorted(cuts)):
        whose = "".join(
            side for side, spans in zip("ab", covered, strict=True) if any(begin <= start and end <= stop for begin, stop in spans)
        )
        label = {"a": names[0], "b": names[1], "ab": f"{names[0]} and {names[1]}"}.get(whose, "")
        pieces.append({"text": ": " if start == mark else text[start:end], "whose": "" if start == mark else whose, "label": label})
    return pieces
