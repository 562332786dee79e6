"""What may go out to systems that run it: trees that a person approved, with all items of the check ticked; drafts if asked for.

Every export passes :func:`cleared`, from the command line, the page of a review and Python alike; the first two know where the
documents may be, and ask :func:`check_documents`, too.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gatewise.errors import GatewiseError, some
from gatewise.files import content_of
from gatewise_mdt.checking.ticks import how_to_tick, items_in_words, open_items
from gatewise_mdt.records import TreeRecord, quoted_beginning

RUN = ("fhir-r4", "fhir-r5", "dmn", "dak")
"""The formats that systems run. The others are for people, or to be read back."""
_MOST = 5  # trees that a sentence names
DRAFTS = "--drafts takes drafts too, and marks all of them DRAFT"


def cleared(records: Sequence[TreeRecord], format: str, drafts: bool = False) -> list[TreeRecord]:
    """The records as they may go out in a format.

    Args:
        drafts: takes those that nobody approved and those with open items, too; all are then marked as drafts.

    Raises:
        GatewiseError: a tree may not go out; names the passages, and the open items.
    """
    if format not in RUN or drafts:
        return [replace(record, draft=format in RUN) for record in records]
    if unapproved := [record for record in records if not _may_run(record)]:
        are, them = ("are not approved as they are", "them") if len(unapproved) > 1 else ("is not approved as it is", "it")
        is_early = any(one.is_approved and not one.more.get("changed") for one in unapproved)
        first = " (first take back an approval of an early version, which does not say what it is of)" if is_early else ""
        raise GatewiseError(
            f"{format} takes approved trees alone, and {_named(unapproved)} {are}: approve {them} in gatewise mdt review{first};"
            f" {DRAFTS}"
        )
    if held := [(record, items) for record in records if (items := open_items(record))]:
        said = "; ".join(f"{_named([record])}: {items_in_words(items)}" for record, items in held[:_MOST])
        more = f"; and {len(held) - _MOST} more" if len(held) > _MOST else ""
        raise GatewiseError(
            f"{format} takes no tree with open items, and there are some in {said}{more}: {how_to_tick(held[0][1])}; {DRAFTS}"
        )
    return [replace(record, draft=False) for record in records]


def approved_alone(records: Sequence[TreeRecord], format: str, drafts: bool = False) -> tuple[list[TreeRecord], str]:
    """Of the trees of a file those that a format takes, and a sentence on those that are left out; all, if none is approved, so
    that :func:`cleared` says so."""
    left = [] if format not in RUN or drafts else [record for record in records if not _may_run(record)]
    if not left or len(left) == len(records):
        return list(records), ""
    return [record for record in records if _may_run(record)], f"left out, as not approved: {_named(left)}; {DRAFTS}"


def check_documents(file: Path, records: Sequence[TreeRecord]) -> None:
    """Refuses approvals of what a document was before it changed, as far as it is at hand: where a record names it, or in the
    folder of their file.

    Raises:
        GatewiseError: a document is not the one that the records were last saved for.
    """
    for source, sha256 in {
        (str(record.more.get("source")), record.sha256) for record in records if record.sha256 and record.is_approved
    }:
        beside, named = file.parent / Path(source).name, Path(source)
        places = [path for path in (beside, named) if os.path.isfile(path)]
        if not named.is_absolute():  # from another folder the name may be that of another document
            places = places[:1]
        if found := next((path for path in places if hashlib.sha256(content_of(path)).hexdigest() != sha256), None):
            out = "" if file.name == f"{found.name}.review.jsonl" or file.suffix != ".jsonl" else f" --out {file}"
            raise GatewiseError(
                f"{found} has changed since its review was saved, so an approval may be of another text: open it again with"
                f" gatewise mdt review {found}{out}, look at what changed, and save; {DRAFTS}"
            )


def _may_run(record: TreeRecord) -> bool:
    """Whether an approval says that it is of this text and tree, and nobody has changed the tree in a review since, see
    :attr:`gatewise_mdt.review.passage.Passage.kept`."""
    return record.is_approved and (record.reviewed or {}).get("of") is not None and not record.more.get("changed")


def _named(records: Sequence[TreeRecord]) -> str:
    return some((f"passage {record.number} ({quoted_beginning(record.text)})" for record in records), _MOST)
