"""A passage under review: its tree as it is now, the trees before and after it, and how far the review has come.

Passages are values: a change makes a new one, so that whoever reads one sees it whole, whatever is done meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise_mdt.checking.items import Item
from gatewise_mdt.checking.ticks import Tick, how_to_tick, items_in_words, key_of, looked_at, open_of, tick_in
from gatewise_mdt.documents.language import detect_language
from gatewise_mdt.documents.passages import PASSAGE_ID, passage_ids
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.relations import Language
from gatewise_mdt.review.edits import Fault, Nodes, empty_tree, fault_of
from gatewise_mdt.tree import DecisionTree

# empty: no tree yet; drafted: as a model or a file gave it, seen by nobody; then what a person did.
State = Literal["empty", "drafted", "corrected", "approved"]
STATES: tuple[State, ...] = get_args(State)
REVIEWED: tuple[State, ...] = ("corrected", "approved")
# The key of a record whose review chose between two: "files" and "names", those of A and B, or of the one who had the passage,
# "reviewed", what their records said under this key, and "agreed", whether both had the same tree.
ADJUDICATED_KEY = "adjudicated"
_MOST_STEPS = 200
# What is said of one version of a tree, and is no longer true of the next.
_OF_THE_TREE = (
    "notice",
    "nested",
    "spans",
    "absent",
    "warnings",
    "review",
    "extraction",
    "reviewed",
    "confidence",
    "ticks",
    "changed",
)


class Version(NamedTuple):
    """A tree at one moment, None where there is none, with its state and what its extraction warned of.

    Attributes:
        approved: of one that is not approved itself, the version that was approved last, which is that of the file of corrections
            until another one is approved or the approval is taken back.
        extraction: what a model's tree was made with, see :attr:`gatewise_mdt.Extraction.made_with`; it stays when the tree is
            corrected. None for one that was written by hand, and where it is not known.
        reviewed: who approved or corrected the tree last, as it stands: "by", "at" (the time in UTC that the history has),
            "comment" where there was one, "sha256", which document they read, where it is known, and of an approval "of", see
            :attr:`gatewise_mdt.TreeRecord.digest`. None where nobody did, and for
            what was reviewed before gatewise noted it.
        of: of the tree of another reviewer that lies beside one, whose it is.
        confidence: for each node how likely it is right as the model gave it, see :attr:`gatewise_mdt.Extraction.confidence`; None
            for one that a person changed, and as a whole where no node has any.
        ticks: what a person said of items of the check, see :mod:`gatewise_mdt.checking.ticks`; also of items that are there no
            more, which may come back.
    """

    nodes: Nodes | None = None
    state: State = "empty"
    warnings: tuple[str, ...] = ()
    approved: "Version | None" = None
    extraction: dict[str, Any] | None = None
    reviewed: dict[str, Any] | None = None
    of: str = ""
    confidence: tuple[float | None, ...] | None = None
    ticks: tuple[Tick, ...] = ()

    @property
    def least(self) -> float | None:
        """The least confidence of a node; None where no node has any."""
        return min((one for one in self.confidence or () if one is not None), default=None)

    @property
    def standing(self) -> "Version | None":
        """The version that a person stands for: this one, if it is approved, or the one that was."""
        return self if self.state == "approved" else self.approved

    @property
    def approver(self) -> str:
        """Who stands for it or for the one that was approved; empty where nobody does, and where it is not known."""
        by = ((self.standing and self.standing.reviewed) or {}).get("by")
        return by if isinstance(by, str) else ""

    def after(self, before: "Version") -> "Version":
        """In the place of another version, whose approved tree stays that of the file of corrections, and whose ticks stay under a
        tree that brings none."""
        made = self._replace(ticks=self.ticks or before.ticks)
        return made if made.state == "approved" else made._replace(approved=before.standing)


NOTHING = Version()


@dataclass(frozen=True)
class Passage:
    """A text with its tree, as far as it has come.

    Attributes:
        number: names it in the review and its history for good; 0 while it is not in there.
        more: other keys of its record.
        saved: the tree that the file of corrections has for it; None while it has none.
        marked: the file says of that tree, which is approved, that it was changed since.
        version: the number of its present version, which grows with every change: whoever changes something names the one that
            the change is of.
        beside: a tree that was extracted, and waits for a reviewer's word.
        extractions: how many trees have lain beside it, the number of the one that does.
    """

    number: int
    text: str
    now: Version = NOTHING
    more: dict[str, Any] = field(default_factory=dict)
    saved: Version | None = None
    marked: bool = False
    past: tuple[Version, ...] = ()
    future: tuple[Version, ...] = ()
    version: int = 0
    beside: Version | None = None
    extractions: int = 0

    def with_version(self, version: Version) -> "Passage":
        """A new version; the one before it can be had back."""
        if version == self.now:
            return self
        return self._at(version, past=(*self.past, self.now)[-_MOST_STEPS:], future=())

    def _at(self, version: Version, past: tuple[Version, ...], future: tuple[Version, ...]) -> "Passage":
        return replace(self, now=version, past=past, future=future, version=self.version + 1)

    def step(self, back: bool, by: str = "") -> "Passage":
        """Back to the version before (undo), or forward again to the one that was undone (redo).

        Args:
            by: who asks for it.

        Raises:
            GatewiseError: there is none, or an approval of somebody else would go or come back by it.
        """
        versions = self.past if back else self.future
        if not versions:
            raise GatewiseError(f"there is nothing to {'undo' if back else 'do again'} in this passage")
        # An approval is a person's word: only they undo or redo what gave it or took it back.
        earlier, later = (versions[-1], self.now) if back else (self.now, versions[-1])
        concerned = later.approver if later.standing else earlier.approver
        words = [(one.standing and one.standing.nodes, one.approver) for one in (earlier, later)]
        if words[0] != words[1] and concerned not in ("", by):
            raise GatewiseError(
                f"only {concerned} can undo or redo their own approval: take it back with its button, or approve the tree yourself"
            )
        if back:
            return self._at(versions[-1], past=versions[:-1], future=(*self.future, self.now))
        return self._at(versions[-1], past=(*self.past, self.now), future=versions[:-1])

    def begin(self, reviewed: dict[str, Any] | None = None) -> "Passage":
        """With an empty tree, to be written by hand.

        Args:
            reviewed: who does it and when, see :class:`Version`.

        Raises:
            GatewiseError: it has a tree.
        """
        if self.now.nodes is not None:
            raise GatewiseError("this passage has a tree already")
        return self.with_version(self.now._replace(nodes=empty_tree(), state="corrected", reviewed=reviewed))

    def edit(self, change: Callable[[Nodes], Nodes], reviewed: dict[str, Any] | None = None) -> "Passage":
        """Corrects the tree; an approved tree is approved no more. Nodes that the change leaves as they were keep their confidence.

        Args:
            reviewed: who does it and when, see :class:`Version`.

        Raises:
            GatewiseError: there is no tree, or the edit does not fit it.
        """
        if self.now.nodes is None:
            raise GatewiseError("this passage has no tree yet: extract one, or begin with an empty one")
        nodes = change(self.now.nodes)
        if nodes == self.now.nodes:
            return self
        known = {id(node): sure for node, sure in zip(self.now.nodes, self.now.confidence or (), strict=False)}
        confidence = tuple(known.get(id(node)) for node in nodes)
        made = self.now._replace(nodes=nodes, state="corrected", reviewed=reviewed)
        return self.with_version(made._replace(confidence=confidence if set(confidence) - {None} else None).after(self.now))

    def set_approval(self, approved: bool, reviewed: dict[str, Any] | None = None) -> "Passage":
        """Says that a person has read the tree and stands for it, or takes that back: it is then what it was before.

        Args:
            reviewed: who does it and when, see :class:`Version`. One that is approved already is then approved by them.

        Raises:
            GatewiseError: there is no tree, or it is not valid, or has open items, with which it could not go out.
        """
        if self.now.nodes is None:
            raise GatewiseError("this passage has no tree yet, so there is nothing to approve")
        if not approved:
            same = (one for one in (self.now, *reversed(self.past)) if one.nodes == self.now.nodes and one.state != "approved")
            # Where nothing tells what it was: "corrected" is what no extraction replaces.
            before = next(same, Version(state="corrected"))
            return self.with_version(self.now._replace(state=before.state, approved=None, reviewed=before.reviewed))
        if (fault := self.fault) is not None:
            where = "" if fault.node is None else f"node {fault.node + 1}: "
            raise GatewiseError(f"the tree cannot be approved yet: {where}{fault.message}")
        if items := self.open_items:
            raise GatewiseError(
                f"the tree cannot be approved yet, it has open items: {items_in_words(items)}: {how_to_tick(items)}"
            )
        ticks = tuple(tick for _, tick in self.looked_at if tick is not None)
        reviewed = reviewed and {**reviewed, "of": self.record().digest}
        return self.with_version(self.now._replace(state="approved", approved=None, reviewed=reviewed, ticks=ticks))

    def tick(self, item: int, ticked: bool, why: str, reviewed: Mapping[str, Any]) -> "Passage":
        """Says of an item of the check that a person looked at it, and why it is no mistake, or takes that back.

        Args:
            item: its place in ``looked_at``.
            reviewed: who does it and when, see :class:`Version`.

        Raises:
            GatewiseError: there is no such item, or no word why; or the tick of an approved tree would go.
        """
        if not 0 <= item < len(self.looked_at) or self.looked_at[item][0].hint:
            raise GatewiseError("there is no such item to tick: look at what there is now")
        key = key_of(found := self.looked_at[item][0], self.text)
        if ticked and not why.strip() and not found.is_change:
            raise GatewiseError(
                f"{items_in_words([found])} is ticked with a word why it is no mistake: give one, or correct the tree"
            )
        if not ticked and self.now.state == "approved":
            raise GatewiseError("the tree is approved, and its ticks with it: take the approval back first")
        others = tuple(tick for tick in self.now.ticks if tick_in([tick], key) is None)
        said = {"why": why.strip(), **{name: reviewed[name] for name in ("by", "at") if name in reviewed}}
        return self.with_version(self.now._replace(ticks=(*others, {**key, **said}) if ticked else others))

    def unapproved(self) -> "Passage":
        """With the tree that was approved for a text which is not there any more, and beside it the one that was worked on over it,
        if nothing lies there; *Undo* brings no approval of it back."""
        kept = (self.now.standing or self.now)._replace(state="corrected", approved=None, reviewed=None)
        made = self._at(kept, past=(), future=())
        if self.now.nodes in (kept.nodes, None) or self.beside is not None:
            return made
        return replace(made, beside=self.now._replace(approved=None, reviewed=None), extractions=self.extractions + 1)

    def put_extraction(self, version: Version, of: int) -> "Passage":
        """With a tree that was extracted: in the place of one that no person touched, else beside it.

        Args:
            of: the number of the version that there was when it was asked for.
        """
        if self.version == of and self.now.state not in REVIEWED:
            return self.with_version(version.after(self.now))
        return replace(self, beside=version, extractions=self.extractions + 1)

    def settle_extraction(self, extraction: int, take: bool, replaced: bool = False) -> "Passage":
        """The tree that lies beside takes its place, or goes; an approved tree stays that of the file of corrections.

        Args:
            extraction: the number of the one that lies beside.
            replaced: a reviewer says that the tree may go that a person corrected or approved.

        Raises:
            GatewiseError: another tree lies beside, or none; or a reviewed tree would go without a word.
        """
        if self.beside is None or self.extractions != extraction:
            raise GatewiseError("that extraction is not here any more: look at what there is now")
        if not take:
            return replace(self, beside=None)
        if self.now.state in REVIEWED and not replaced:
            raise GatewiseError(f"a person {self.now.state} this tree: say that it may be replaced")
        return replace(self.with_version(self.beside._replace(of="").after(self.now)), beside=None)

    @cached_property
    def fault(self) -> Fault | None:
        """What keeps the nodes from being a tree; None for a valid one, and where there are none yet."""
        return None if self.now.nodes is None else fault_of(self.now.nodes)

    @cached_property
    def looked_at(self) -> list[tuple[Item, Tick | None]]:
        """The items of a valid tree, each with its tick, see :func:`gatewise_mdt.checking.ticks.looked_at`."""
        return looked_at(self.record()) if self.is_valid else []

    @property
    def open_items(self) -> list[Item]:
        """The items that are to be ticked before the tree is approved."""
        return open_of(self.looked_at)

    @property
    def is_valid(self) -> bool:
        return self.now.nodes is not None and self.fault is None

    @property
    def language(self) -> Language:
        """The language of its relations, else of the text."""
        for node in self.now.nodes or ():
            for _, relation, _ in node["triples"]:
                return "en" if relation.isascii() else "zh"
        try:
            return detect_language(self.text.partition("@")[2] or self.text)
        except GatewiseError:
            return "en"

    @property
    def headings(self) -> list[str]:
        """The headings of the document above it."""
        return texts(self.more.get("headings"))

    @property
    def kept(self) -> Version | None:
        """The version that belongs into the file of corrections.

        That is what was approved last and not taken back since; else the tree if it is valid and a person corrected it; else what
        the file already has, if any.
        """
        now, saved = self.now, self.saved
        if now.standing is not None:
            return now.standing
        if self.is_valid and (now.state == "corrected" or (saved is not None and now.nodes == saved.nodes)):
            return now
        if saved is not None and saved.state == "approved":  # which somebody took back
            return saved._replace(state="corrected", reviewed=None)
        return saved

    @property
    def is_unsaved(self) -> bool:
        """True if the file of corrections has something else than the tree as it stands, or lacks the approved one under it."""
        now, kept, saved = (one and (one.nodes, one.state, one.reviewed, one.ticks) for one in (self.now, self.kept, self.saved))
        is_marked = self.kept is not None and self.kept is self.now.approved
        return kept != saved or (now != saved and (self.now.state in REVIEWED or saved is not None)) or self.marked != is_marked

    def record(self, version: Version | None = None) -> TreeRecord:
        """A valid version as a record of the published format, the present one if none is given.

        Raises:
            GatewiseError: it is not valid.
        """
        version = version or self.now
        reviewed = version.state in REVIEWED
        said = {
            "warnings": [] if reviewed else list(version.warnings),
            "extraction": version.extraction,
            "confidence": list(version.confidence or ()),
            "ticks": list(version.ticks),
            "review": version.state if reviewed else None,
            "reviewed": version.reviewed if reviewed else None,
            # Of an approved tree in whose place another stands, who put that there.
            "changed": (self.now.reviewed or {"by": ""}) if version is self.now.approved else None,
        }
        more = lasting_keys(self.more) | {name: value for name, value in said.items() if value not in (None, [])}
        return TreeRecord(self.text, DecisionTree.from_preorder(version.nodes, f"passage {self.number}"), self.number, more)


def ids_of(held: Sequence[Passage | TreeRecord]) -> list[str]:
    """The ids of passages or records: those that they carry, else those of their texts and headings; none comes twice."""
    made: dict[str, None] = {}
    for one, computed in zip(held, passage_ids([(one.text, one.more.get("headings")) for one in held]), strict=True):
        carried = one.more.get(PASSAGE_ID)
        name = carried if isinstance(carried, str) and carried else computed
        while name in made:  # of files that were put together, or a text that was pasted twice
            name += "+"
        made[name] = None
    return list(made)


def with_ids(passages: Sequence[Passage]) -> list[Passage]:
    """The passages, each of which carries its id."""
    return [replace(one, more={**one.more, PASSAGE_ID: name}) for one, name in zip(passages, ids_of(passages), strict=True)]


def passage_of(record: TreeRecord, **fields: Any) -> Passage:
    """A passage with the tree of a record."""
    return Passage(0, record.text, version_of(record), lasting_keys(record.more), **fields)


def texts(held: object) -> list[str]:
    """What a record holds under a key that is to be a list of texts; a file may have anything there."""
    return [str(one) for one in held] if isinstance(held, list) else []


def version_of(record: TreeRecord) -> Version:
    """The version that a record of a file holds: a draft, if it says of no person who corrected or approved it."""
    named = record.more.get("review")
    state: State = named if named in REVIEWED else "drafted"
    reviewed = writable(record.reviewed) if state in REVIEWED else None
    if state == "approved" and (not record.is_approved or record.more.get("changed")):  # by another program, or in its review
        state, reviewed = "corrected", None
    return Version(
        record.tree.to_preorder(),
        state,
        tuple(map(writable, record.warnings)),
        extraction=writable(record.extraction),
        reviewed=reviewed,
        confidence=record.confidence,
        ticks=tuple(map(writable, record.ticks)),
    )


def lasting_keys(more: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record that stay true when its tree is corrected, as a file can hold them."""
    return dict(writable({key: value for key, value in more.items() if key not in _OF_THE_TREE}))
