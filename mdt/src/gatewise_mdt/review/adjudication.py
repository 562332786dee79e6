"""A review in which a third person decides where two reviewers differ.

It has all passages of both. Where the trees are the same there is one, approved if both approved it. Where they differ A's tree is
to review, and B's lies beside it, to be taken, left or written anew from. The history begins with whose trees they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise_mdt.evaluation.agreement import Agreement, PassageAgreement
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.review.files import ReviewFiles
from gatewise_mdt.review.passage import ADJUDICATED_KEY, Passage, lasting_keys, version_of
from gatewise_mdt.review.session import Session
from gatewise_mdt.wholes import fold


class Prepared(NamedTuple):
    """What was prepared: passages with the same tree, those of them that both approved, that differ, and that only one has."""

    out: Path
    same: int
    approved: int
    differing: int
    alone: int

    @property
    def said(self) -> list[str]:
        """What was written, and what to do with it, a line each."""
        decide = "1 passage" if self.differing == 1 else f"{self.differing} passages"
        alone = f", {self.alone} that only one has" if self.alone else ""
        return [
            f"written: {self.out}: {decide} to decide, {self.same} with the same tree ({self.approved} approved by both){alone}",
            f"to adjudicate: gatewise mdt review {self.out}",
        ]


def check_new(out: Path) -> None:
    """Refuses a file of corrections that is there, or that a history is there for: it may hold what an adjudicator decided.

    Raises:
        GatewiseError: one of the files is there, or the name cannot be one.
    """
    files = ReviewFiles(out)
    for path in (files.out, files.history):
        if path.exists():
            raise GatewiseError(
                f"{path} is there already, and may hold an adjudicator's work: open it with gatewise mdt review --out {out}, or"
                " name another file with --adjudicate"
            )


def prepare(agreement: Agreement, out: Path, reviewer: str | None = None) -> Prepared:
    """Writes the review of an agreement, for ``gatewise mdt review OUT``.

    Args:
        out: the file of corrections, which must be new, as its history must.
        reviewer: who prepares it, for the history; None takes the login name.

    Raises:
        GatewiseError: one of the files is there already, or cannot be written.
    """
    check_new(out)
    with TemporaryDirectory() as folder:
        made = ReviewFiles(Path(folder) / "third.review.jsonl")
        session = Session.open(None, made.out, reviewer=reviewer)
        try:
            session.add(list(_passages(agreement)))
            if session.trouble:
                raise GatewiseError(f"the review could not be prepared: {session.trouble}")
            saved = session.save()
        finally:
            session.close()
        files = ReviewFiles(out)
        files.open()
        try:
            check_new(out)  # again, now that no other review has the files
            # Each whole or not at all, so that no passage is missing from what an adjudicator opens.
            for one, place in ((made.history, files.history), (made.out, files.out)):
                with whole_file(place) as part:
                    copyfile(one, part)
        finally:
            files.close()
    same = sum(map(_agreed, agreement.passages))
    alone = len(agreement.only_a) + len(agreement.only_b)
    return Prepared(out, same, saved.records, len(agreement.passages) - same, alone)


def _passages(agreement: Agreement) -> Iterator[tuple[Passage, str]]:
    """The passages, each with whose trees it has."""
    a, b = agreement.names
    both = {"files": list(agreement.files), "names": [a, b]}
    for passage in agreement.passages:
        approved = all(version_of(record, "drafted").state == "approved" for record in (passage.a, passage.b))
        agreed = _agreed(passage)
        origin = {**both, "reviewed": [passage.a.reviewed, passage.b.reviewed], "agreed": agreed}
        made = _passage(passage.a, origin, approved=agreed and approved)
        if agreed:
            yield made, f"the tree of {a} and {b}"
            continue
        other = version_of(passage.b, "drafted")._replace(state="drafted", reviewed=None, of=b)
        yield replace(made, beside=other, extractions=1), f"{a}'s tree; beside it {b}'s tree"
    for i, records in enumerate((agreement.only_a, agreement.only_b)):
        alone = {"files": [agreement.files[i]], "names": [agreement.names[i]]}
        for record in records:
            origin = {**alone, "reviewed": [record.reviewed], "agreed": False}
            yield _passage(record, origin, approved=False), f"{agreement.names[i]}'s tree; there is no other"


def _agreed(passage: PassageAgreement) -> bool:
    """Whether two trees are the same for who reads them. The measures leave case out, in which "10 MU" and "10 mU" differ."""
    a, b = ([{(fold(s).text, r, fold(o).text) for s, r, o in node.triples} for node in tree.nodes] for tree in passage.trees)
    return passage.same and a == b


def _passage(record: TreeRecord, origin: dict[str, Any], *, approved: bool) -> Passage:
    version = version_of(record, "drafted")
    if not approved:
        version = version._replace(state="drafted", reviewed=None)
    return Passage(0, record.text, version, {**lasting_keys(record.more), ADJUDICATED_KEY: origin}, came=version.nodes)
