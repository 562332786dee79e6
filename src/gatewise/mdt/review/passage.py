"""A passage under review: its tree as it is now, the trees before and after it, and how far the review has come."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.mdt.documents.language import detect_language
from gatewise.mdt.records import TreeRecord
from gatewise.mdt.relations import Language
from gatewise.mdt.review.edits import Fault, Nodes, fault_of
from gatewise.mdt.tree import DecisionTree

# empty: no tree yet; drafted: as a model or a file gave it, seen by nobody; then what a person did.
State = Literal["empty", "drafted", "corrected", "approved"]
STATES: tuple[State, ...] = get_args(State)
REVIEWED: tuple[State, ...] = ("corrected", "approved")
REVIEW_KEY = "review"
_MOST_STEPS = 200
# What `gatewise mdt extract` writes beside a tree is no longer true of a corrected one.
_OF_THE_TREE = ("notice", "nested", "spans", "absent", "warnings", REVIEW_KEY)


class Version(NamedTuple):
    """A tree at one moment, None where there is none, with its state and what its extraction warned of."""

    nodes: Nodes | None = None
    state: State = "empty"
    warnings: tuple[str, ...] = ()


NOTHING = Version()


@dataclass
class Passage:
    """A text with its tree, as far as it has come.

    Attributes:
        number: names it in the session; never used again.
        more: other keys of its record.
        saved: the tree that the file of corrections has for it; None while it has none.
        came: the tree that the reviewed file had for it; None where that was a text.
        changes: grows with every change, so that a page that shows an older tree is told.
        waiting: an extraction was asked for.
        error: why there is no tree, a sentence.
    """

    number: int
    text: str
    now: Version = NOTHING
    more: dict[str, Any] = field(default_factory=dict)
    saved: Version | None = None
    came: Nodes | None = None
    past: list[Version] = field(default_factory=list)
    future: list[Version] = field(default_factory=list)
    changes: int = 0
    waiting: bool = False
    error: str = ""
    _checked: tuple[Version, Fault | None] | None = field(default=None, repr=False, compare=False)

    def set(self, version: Version) -> None:
        """A new version; the one before it can be had back."""
        if version == self.now:
            return
        self.past = [*self.past, self.now][-_MOST_STEPS:]
        self.future = []
        self._go(version)

    def undo(self) -> None:
        """Back to the version before.

        Raises:
            GatewiseError: there is none.
        """
        if not self.past:
            raise GatewiseError("there is nothing to undo in this passage")
        self.future.append(self.now)
        self._go(self.past.pop())

    def redo(self) -> None:
        """Forward again to the version that was undone.

        Raises:
            GatewiseError: there is none.
        """
        if not self.future:
            raise GatewiseError("there is nothing to do again in this passage")
        self.past.append(self.now)
        self._go(self.future.pop())

    def edit(self, change: Callable[[Nodes], Nodes]) -> None:
        """Corrects the tree; an approved tree is approved no more.

        Raises:
            GatewiseError: there is no tree, or the edit does not fit it.
        """
        if self.now.nodes is None:
            raise GatewiseError("this passage has no tree yet: extract one, or begin with an empty one")
        nodes = change(self.now.nodes)
        if nodes != self.now.nodes:
            self.set(Version(nodes, "corrected", self.now.warnings))

    def approve(self, approved: bool) -> None:
        """Says that a person has read the tree and stands for it, or takes that back: it is then what it was before.

        Raises:
            GatewiseError: there is no tree, or it is not valid.
        """
        if self.now.nodes is None:
            raise GatewiseError("this passage has no tree yet, so there is nothing to approve")
        if approved and (fault := self.fault) is not None:
            where = "" if fault.node is None else f"node {fault.node + 1}: "
            raise GatewiseError(f"the tree cannot be approved yet: {where}{fault.message}")
        self.set(self.now._replace(state="approved" if approved else self._state_before))

    @property
    def _state_before(self) -> State:
        """The state without the approval. Of one of an earlier review nothing tells; "corrected" is what no extraction replaces."""
        states = (one.state for one in (self.now, *reversed(self.past)) if one.nodes == self.now.nodes)
        return next((state for state in states if state != "approved"), "corrected")

    def _go(self, version: Version) -> None:
        self.now = version
        self.changes += 1
        self.error = ""

    @property
    def fault(self) -> Fault | None:
        """What keeps the nodes from being a tree; None for a valid one, and where there are none yet."""
        if self._checked is None or self._checked[0] is not self.now:  # asked for more often than it changes
            self._checked = self.now, None if self.now.nodes is None else fault_of(self.now.nodes)
        return self._checked[1]

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
    def kept(self) -> Version | None:
        """The version that belongs into the file of corrections.

        Of a tree that is unfinished, or that nobody has corrected or approved, that is the one which the file already has, if any.
        """
        if self.is_valid and (self.now.state in REVIEWED or self.saved is not None):
            return self.now
        return self.saved

    @property
    def is_unsaved(self) -> bool:
        """Whether the file of corrections has something else than what a save would write, or the tree is unfinished."""
        touched = self.now.state in REVIEWED or self.saved is not None
        return touched and (not self.is_valid or _content(self.kept) != _content(self.saved))

    def record(self, version: Version | None = None) -> TreeRecord:
        """A valid version as a record of the published format, the present one if none is given.

        Raises:
            GatewiseError: it is not valid.
        """
        version = version or self.now
        more = others(self.more)
        if version.warnings and version.state not in REVIEWED:
            more["warnings"] = list(version.warnings)
        if version.state in REVIEWED:
            more[REVIEW_KEY] = version.state
        return TreeRecord(self.text, DecisionTree.from_preorder(version.nodes, f"passage {self.number}"), self.number, more)


def version_of(record: TreeRecord, otherwise: State) -> Version:
    """The version that a record of a file holds; ``otherwise`` where it names no state."""
    state = record.more.get(REVIEW_KEY)
    return Version(record.tree.to_preorder(), state if state in REVIEWED else otherwise, tuple(map(writable, record.warnings)))


def others(more: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record that stay true when its tree is corrected, as a file can hold them."""
    return dict(writable({key: value for key, value in more.items() if key not in _OF_THE_TREE}))


def _content(version: Version | None) -> tuple[Nodes | None, State] | None:
    return None if version is None else (version.nodes, version.state)
