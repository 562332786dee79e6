"""A whole guideline as one pathway: the trees of its passages, and which decision leads on to which other passage.

A link leads from a decision of one tree to the first condition of another. :func:`propose_links` finds links by headings,
populations, conditions and order, with a reason each; a person accepts or refuses them in a JSON file (:func:`read_links`), and
only those that were accepted are followed. A passage that links lead to is decided once one of them comes to it, every other from
the start.
"""

import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from gatewise.checks import is_whole, writable
from gatewise.errors import GatewiseError
from gatewise.files import content_of, finite, write_json
from gatewise_mdt.records import TreeRecord, quoted_beginning
from gatewise_mdt.relations import GIVES, relation_in
from gatewise_mdt.spans import find
from gatewise_mdt.tree import NOTICE, Decision, NotKnown, Triple, firsts, known_facts, plain

State = Literal["proposed", "accepted", "refused"]
_NUMBER = re.compile(  # of a heading
    r"^\s*(?:\d{1,2}(?:\.\d+)*[.)]?\s+|(?:\d{1,2}|[一二三四五六七八九十]+)[、.)）]\s*|[（(]\w{1,2}[)）]\s*|第\w{1,3}[章节]\s*)"
)
_DECIDE = 'For each link, set "state" to "accepted" or "refused". Only accepted links are followed.'


class Link(NamedTuple):
    """From a decision of one passage to another passage.

    Attributes:
        start, end: the numbers of the two records.
        node: position of the decision in the tree of ``start``, from 0.
        reason: why it was proposed.
    """

    start: int
    node: int
    end: int
    state: State = "proposed"
    reason: str = ""


class PathwayDecision(NamedTuple):
    """What holds in a whole pathway. Needs review by a clinician.

    Attributes:
        decisions: by the number of each passage that was come to, in the pathway's order.
        open: of each passage that was come to but not decided what is not known, a sentence.
    """

    decisions: dict[int, Decision]
    open: dict[int, str]

    @property
    def explanation(self) -> str:
        """The way taken in each passage, then what is not known, then that it needs review by a clinician."""
        said = [f"passage {number}:\n{one.explanation.removesuffix(NOTICE).rstrip()}" for number, one in self.decisions.items()]
        return "\n".join([*said, *(f"passage {number}: {one}" for number, one in self.open.items()), NOTICE])


@dataclass(frozen=True)
class Pathway:
    """Records and the links that are followed between them.

    Raises:
        GatewiseError: two records have one number, a link was refused, or is not between a decision and a passage of these, or
            links lead back to where they came from.
    """

    records: tuple[TreeRecord, ...]
    links: tuple[Link, ...] = ()

    @cached_property
    def numbered(self) -> dict[int, TreeRecord]:
        return {record.number: record for record in self.records}

    def __post_init__(self) -> None:
        numbered = self.numbered
        if len(numbered) < len(self.records):
            raise GatewiseError("two records have the same number: a pathway needs records with numbers of their own")
        for link in self.links:
            if link.state == "refused":
                raise GatewiseError(f"{_named(link)} is refused, so it is not followed: leave it out")
            for number in (link.start, link.end):
                if number not in numbered:
                    raise GatewiseError(
                        f"{_named(link)} is accepted, but passage {number} is not among the trees that are taken: approve it,"
                        " or refuse the link"
                    )
            nodes = numbered[link.start].tree.nodes
            if not 0 <= link.node < len(nodes) or nodes[link.node].is_condition:
                raise GatewiseError(f"{_named(link)} begins at a node that is no decision of passage {link.start}")
        _ = self.order

    @cached_property
    def into(self) -> dict[int, tuple[Link, ...]]:
        """The links to each passage."""
        return {record.number: tuple(link for link in self.links if link.end == record.number) for record in self.records}

    @cached_property
    def order(self) -> tuple[TreeRecord, ...]:
        """The records, each after those that lead to it, and otherwise as they were given."""
        places = {record.number: place for place, record in enumerate(self.records)}
        sorter = TopologicalSorter({number: [link.start for link in links] for number, links in self.into.items()})
        try:
            sorter.prepare()
        except CycleError as error:
            around = " to ".join(f"passage {number}" for number in error.args[1])
            raise GatewiseError(f"the links lead round in a circle, from {around}: refuse one of them") from None
        ready: list[int] = []
        order = []
        while sorter.is_active():
            for number in sorter.get_ready():
                heapq.heappush(ready, places[number])
            order.append(self.records[heapq.heappop(ready)])
            sorter.done(order[-1].number)
        return tuple(order)

    @cached_property
    def facts(self) -> tuple[Triple, ...]:
        """The facts of all trees, each once: a fact of two passages is one."""
        return firsts(fact for record in self.order for fact in record.tree.facts)

    def decide(self, facts: "Mapping[Any, bool] | Callable[[Triple], bool | None]") -> PathwayDecision:
        """The decision of each passage that is come to, see :meth:`gatewise_mdt.DecisionTree.decide`.

        Where a fact that is needed is not known, that passage stays open, and those that only it leads to are not come to.

        Raises:
            GatewiseError: a fact is no bool, its relation none of the six, or two facts contradict each other.
        """
        known = known_facts(facts)
        decided = PathwayDecision({}, {})
        for record in self.order:
            links = self.into[record.number]
            leaves = {number: one.leaf for number, one in decided.decisions.items()}
            if links and not any(leaves.get(link.start) == link.node for link in links):
                continue
            try:
                decided.decisions[record.number] = record.tree.decide(known)
            except NotKnown as missing:
                decided.open[record.number] = str(missing)
        return decided


def _named(link: Link) -> str:
    return f"the link from passage {link.start}, node {link.node + 1}, to passage {link.end}"


# ---- what the program proposes ----


def propose_links(records: Sequence[TreeRecord]) -> list[Link]:
    """Links between passages of one document, each to a later one, with its reason."""
    made = []
    seen = [_Seen(record) for record in records]
    for place, one in enumerate(seen):
        later = [other for other in seen[place + 1 :] if other.document == one.document]
        for leaf, way in one.ways.items():
            for other in later:
                reasons = _reasons(one, leaf, way, other) or _follows(one, leaf, other, other is later[0])
                if reasons:
                    reason = "; ".join(filter(None, [*dict.fromkeys(reasons), one.nearness(other)]))
                    made.append(Link(one.record.number, leaf, other.record.number, "proposed", reason))
    return made


class _Seen:
    """What is asked of a record again and again."""

    def __init__(self, record: TreeRecord) -> None:
        self.record = record
        self.document = record.sha256 or record.more.get("source")
        self.heading = _NUMBER.sub("", record.headings[-1]) if record.headings else ""
        root = record.tree.nodes[0]
        self.asked = [part for triple in root.triples for part in (triple.subject, triple.object)] if root.is_condition else []
        self.ways = {  # of each decision what holds on the way to it
            leaf: [triple for at, side in way.items() if side for triple in record.tree.nodes[at].triples]
            for leaf, way in record.tree.ways.items()
        }

    def is_about_the_same(self, other: "_Seen") -> bool:
        return plain(self.record.population) == plain(other.record.population)

    def is_above(self, other: "_Seen") -> bool:
        """Whether another passage stands under the headings of this one."""
        own = self.record.headings
        return bool(own) and other.record.headings[: len(own)] == own

    def nearness(self, other: "_Seen") -> str:
        if self.record.headings == other.record.headings:
            return "the same section" if self.record.headings else ""
        return "a section within its own" if self.is_above(other) else "another section"


def _reasons(one: _Seen, leaf: int, way: Sequence[Triple], other: _Seen) -> list[str]:
    """What in the words of a decision, or of the way to it, speaks for another passage."""
    made = []
    own = [one.heading, one.record.population]
    abouts = [about for about in dict.fromkeys((other.heading, other.record.population)) if about and about not in own]
    for triple in one.record.tree.nodes[leaf].triples:
        made += [f'the decision names "{about}"' for about in abouts if _has(triple.object, about)]
        if relation_in(triple.relation, "en") in GIVES and (one.is_about_the_same(other) or one.is_above(other)):
            named = any(_has(asked, triple.object) for asked in other.asked)
            made += [f'the condition speaks of "{triple.object}", which the decision gives'] if named else []
    for triple in way:
        fits = [about for about in abouts if _has(about, triple.object) or _has(triple.object, about)]
        made += [f'it is about "{about}", and "{triple.object}" holds on the way to the decision' for about in fits]
    return made


def _follows(one: _Seen, leaf: int, other: _Seen, is_next: bool) -> list[str]:
    is_near = one.is_about_the_same(other) and (one.is_above(other) or one.record.headings == other.record.headings)
    fits = is_next and is_near and one.record.tree.nodes[leaf].is_empty and leaf > 0
    return ["nothing is recommended, and it follows"] if fits else []


def _has(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as a whole; asked of most pairs of passages, so that the quick answer comes first."""
    return plain(phrase) in plain(text) and bool(find(text, phrase))


# ---- the file in which a person decides ----


def write_links(
    path: str | Path, records: Sequence[TreeRecord], links: Sequence[Link], outdated: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes links as JSON, whole or not at all, each with the words that it was proposed for.

    Args:
        outdated: what :func:`read_links` found to be, which is kept.

    Raises:
        GatewiseError: the place cannot be written.
    """
    numbered = {record.number: record for record in records}
    items = []
    for link in links:
        start, end = numbered[link.start], numbered[link.end]
        said = {"decision": start.tree.nodes[link.node].words, "way": _way(start, link.node)}
        begins = {**_where(start), "node": link.node + 1, **said}
        ends = {**_where(end), "begins": end.tree.nodes[0].words}
        items.append({"state": link.state, "reason": link.reason, "from": begins, "to": ends})
    write_json(path, finite(writable({"notice": f"{_DECIDE} {NOTICE}", "links": items, "outdated": list(outdated)})))


def _way(record: TreeRecord, node: int) -> list[str]:
    """What holds and what does not on the way to a decision, in words."""
    nodes, way = record.tree.nodes, record.tree.ways.get(node, {})
    return [f"{nodes[at].words}: {'yes' if side else 'no'}" for at, side in way.items()]


def _where(record: TreeRecord) -> dict[str, Any]:
    known: dict[str, Any] = {
        key: record.more[key] for key in ("passage_id", "source", "sha256", "place") if isinstance(record.more.get(key), str)
    }
    # The id of a passage is of its text; without one, the text itself says which one it was.
    return {"record": record.number, **known, "text": quoted_beginning(record.text) if known.get("passage_id") else record.text}


def read_links(path: str | Path, records: Sequence[TreeRecord], *, outdated: list[dict[str, Any]] | None = None) -> list[Link]:
    """The links of a file, decided or not.

    Args:
        outdated: takes the links whose passages, or their words, are no longer what they were, with "outdated" saying why, in
            place of an error.

    Raises:
        GatewiseError: the file cannot be read, or is none of links; names the link.
    """
    try:
        held = json.loads(content_of(path))
        items = held["links"]
    except (ValueError, RecursionError, KeyError, TypeError):
        items = None
    if not isinstance(items, list):
        raise GatewiseError(f'{path}: expected JSON with a list of "links", as gatewise mdt pathway writes it')
    if outdated is not None:
        before = held.get("outdated")
        outdated += [one for one in before if isinstance(one, dict) and "outdated" in one] if isinstance(before, list) else []
    made: list[Link] = []
    for number, item in enumerate(items, start=1):
        where = f"{path}, link {number}"
        if not isinstance(item, dict) or not all(isinstance(item.get(key), dict) for key in ("from", "to")):
            raise GatewiseError(f'{where}: expected an object with "state", "from" and "to"')
        if item.get("state") not in get_args(State):
            raise GatewiseError(f"{where}: the state is {item.get('state')!r}, expected one of {', '.join(get_args(State))}")
        try:
            link = _link(item, where, records)
            if any(one[:3] == link[:3] and one.state != link.state for one in made):
                raise GatewiseError(f"{where}: {_named(link)} is decided twice, in two ways: leave one of them")
            made.append(link)
        except _OutdatedError as error:
            if outdated is None:
                raise
            outdated.append({**item, "outdated": str(error)})
    return made


class _OutdatedError(GatewiseError):
    """A link was decided over something else."""


def _link(item: dict[str, Any], where: str, records: Sequence[TreeRecord]) -> Link:
    start, end = (_record(item[key], f'{where}, "{key}"', records) for key in ("from", "to"))
    node = item["from"].get("node")
    if not is_whole(node) or not 1 <= node <= len(start.tree.nodes):
        raise _OutdatedError(f"{where}: the node is {node!r}, expected a decision of passage {start.number}, nodes counted from 1")
    for key, said, now in (
        ("decision", item["from"].get("decision"), start.tree.nodes[node - 1].words),
        ("way", item["from"].get("way"), _way(start, node - 1)),
        ("begins", item["to"].get("begins"), end.tree.nodes[0].words),
    ):
        if said is not None and said != now:
            raise _OutdatedError(f'{where}: "{key}" is {said!r}, but the tree now has {now!r}: look at the link again')
    return Link(start.number, node - 1, end.number, item["state"], str(item.get("reason") or ""))


def _record(said: dict[str, Any], where: str, records: Sequence[TreeRecord]) -> TreeRecord:
    key, value = ("passage_id", said["passage_id"]) if said.get("passage_id") else ("record", said.get("record"))
    fits = [one for one in records if value == (one.more.get(key) if key == "passage_id" else one.number)]
    if len(fits) != 1:
        raise _OutdatedError(f"{where}: {len(fits)} of the trees have the {key} {value!r}, expected one: look at the link again")
    if key == "record" and said.get("text") not in (None, fits[0].text):
        raise _OutdatedError(f"{where}: passage {value} has another text now: look at the link again")
    return fits[0]
