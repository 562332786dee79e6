"""A review in which a third person decides where two reviewers differ.

It has all passages of both. Where the trees are the same there is one, approved if both approved it. Where they differ A's tree is
to review, and B's lies beside it, to be taken, left or written anew from. The history begins with whose trees they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError
from gatewise_mdt.evaluation.agreement import Agreement
from gatewise_mdt.records import TreeRecord
from gatewise_mdt.review.files import ReviewFiles
from gatewise_mdt.review.passage import ADJUDICATED_KEY, Passage, passage_of, version_of
from gatewise_mdt.review.session import Session


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


def prepare(agreement: Agreement, out: Path, reviewer: str | None = None) -> list[str]:
    """Writes the review of an agreement, for ``gatewise mdt review OUT``.

    Args:
        out: the file of corrections, which must be new, as its history must.
        reviewer: who prepares it, for the history; None takes the login name.

    Returns:
        What was written, and what to do with it, a line each.

    Raises:
        GatewiseError: one of the files is there already, or cannot be written.
    """
    check_new(out)
    session = Session.open(None, out, reviewer=reviewer)
    try:
        session.add(list(_passages(agreement)))
        saved = session.save()
    finally:
        session.close()
    same, alone = sum(passage.same for passage in agreement.passages), len(agreement.only_a) + len(agreement.only_b)
    return [
        f"written: {out}: passages to decide: {len(agreement.passages) - same}, with the same tree: {same}"
        f" ({saved.records} approved by both), that only one has: {alone}",
        f"to adjudicate: gatewise mdt review {out}",
    ]


def _passages(agreement: Agreement) -> Iterator[tuple[Passage, str]]:
    """The passages, each with whose trees it has."""
    a, b = agreement.names
    both = {"files": list(agreement.files), "names": [a, b]}
    for passage in agreement.passages:
        origin = {**both, "reviewed": [passage.a.reviewed, passage.b.reviewed], "agreed": passage.same}
        approved = passage.same and version_of(passage.b).state == "approved"
        made = _passage(passage.a, origin, may_be_approved=approved)
        if passage.same:
            yield made, f"the tree of {a} and {b}"
            continue
        other = version_of(passage.b)._replace(state="drafted", reviewed=None, of=b, ticks=())
        yield replace(made, beside=other, extractions=1), f"{a}'s tree; beside it {b}'s tree"
    for i, records in enumerate((agreement.only_a, agreement.only_b)):
        for record in records:
            origin = {"files": [agreement.files[i]], "names": [agreement.names[i]], "reviewed": [record.reviewed], "agreed": False}
            yield _passage(record, origin, may_be_approved=False), f"{agreement.names[i]}'s tree; there is no other"


def _passage(record: TreeRecord, origin: dict[str, Any], *, may_be_approved: bool) -> Passage:
    made = passage_of(record)
    made = replace(made, more={**made.more, ADJUDICATED_KEY: origin})
    if may_be_approved and made.now.state == "approved":
        return made
    return replace(made, now=made.now._replace(state="drafted", reviewed=None, ticks=()))
