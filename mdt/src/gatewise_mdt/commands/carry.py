"""``gatewise mdt carry``: what a review of an older version of a guideline decided, carried over to the newer one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.files import is_one_file
from gatewise.flags import OUT, JsonOption
from gatewise_mdt.commands.trees import count_of, say

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeRecord
    from gatewise_mdt.review.carrying import Carried
    from gatewise_mdt.review.passage import Passage


def carry(
    old: Annotated[str, typer.Argument(help="The older guideline, or the file of corrections of its review.", show_default=False)],
    new: Annotated[str, typer.Argument(help="The newer guideline: .txt, .md, .html, .pdf or .docx.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(*OUT, help="The newer review's file of corrections. [default: NEW.review.jsonl]"),
    ] = None,
    population: Annotated[str | None, typer.Option(help="Whom all passages are about, if headings do not say.")] = None,
    reviewer: Annotated[str | None, typer.Option(help="Who carries over, for the history. [default: the login name]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Carry a review over to a new version of its guideline.

    It shows what changed. Passages with the same text keep their tree, and who approved it and when. Where the text changed, the
    old tree becomes a draft, to be read against the change, which is shown here ([-gone-] {+new+}) and on the page of `gatewise mdt
    review NEW`. What a person did in the newer review stays as it is. The command may be given again.

    \b
    Examples:
      gatewise mdt carry guideline-2024.pdf guideline-2027.pdf
      gatewise mdt carry guideline-2024.pdf.review.jsonl guideline-2027.pdf
    """
    from gatewise_mdt.review.files import ReviewFiles
    from gatewise_mdt.review.session import Session

    corrections = _corrections(old)
    if is_one_file(new, corrections):
        raise GatewiseError(f"{new} is the older review: name the newer guideline after the older one")
    if is_one_file(target := out or ReviewFiles.default_out(Path(new)), corrections):
        raise GatewiseError(f"{target} is the older review, and would be changed: name another file with --out")
    name = writable(corrections.name)
    records, lacking = _records(corrections)
    if lacking:
        say(
            f"note: the older review has trees for {lacking} passages that are not in {name} (not saved, or not reviewed) and are"
            " not carried over: save them there first",
            err=True,
        )
    session = Session.open(new, out, population=population, reviewer=reviewer)
    try:
        for note in session.notes:
            say(f"note: {note}", err=True)
        done = session.carry(records, name)
        saved = session.save()
        _tell(session.passages, done, records, as_json)
        if not as_json:
            say(f"written: {saved.path} ({count_of(saved.records, 'tree')})")
    finally:
        session.close()


def _corrections(old: str) -> Path:
    """The file of corrections of a review, named by itself or by its guideline."""
    from gatewise_mdt.records import SUFFIXES
    from gatewise_mdt.review.files import ReviewFiles

    beside = ReviewFiles.default_out(Path(old))
    return Path(old) if not beside.is_file() and Path(old).suffix.lower() in SUFFIXES else beside


def _records(corrections: Path) -> "tuple[list[TreeRecord], int]":
    """The older records, and for how many passages something else stands in the history of their review."""
    from gatewise_mdt.records import read_trees
    from gatewise_mdt.review.files import ReviewFiles
    from gatewise_mdt.review.merging import merge

    read = read_trees(corrections)
    if read.faults:
        raise GatewiseError(f"{next(iter(read.faults.values()))}; mend the record first, so that nothing of the review is lost")
    if corrections.suffix.lower() != ".jsonl":
        return list(read.records), 0
    try:
        passages, _ = merge([], read.records, ReviewFiles(corrections).read_draft())
    except GatewiseError:  # the corrections are what counts, and they are whole
        passages = []
    return list(read.records), sum(one.is_unsaved or (one.now.state == "drafted" and one.saved is None) for one in passages)


def _tell(passages: "list[Passage]", done: "Carried", records: "list[TreeRecord]", as_json: bool) -> None:
    from gatewise_mdt.checking.changes import difference
    from gatewise_mdt.records import CARRIED_KEY

    by_number = {passage.number: passage for passage in passages}
    differences = {
        number: difference(str(by_number[number].more[CARRIED_KEY].get("text", by_number[number].text)), by_number[number].text)
        for number in done.changed
    }
    if as_json:
        told: dict[str, Any] = {
            **{name: getattr(done, name) for name in ("same", "changed", "kept", "new")},
            "differences": {str(number): [list(one) for one in parts] for number, parts in differences.items()},
            "unlike": [{"passage": number, "record": record.number} for number, record in done.unlike],
            "gone": [{"number": record.number, "text": record.text} for record in done.gone],
        }
        typer.echo(json.dumps(writable(told), ensure_ascii=False, indent=2))
        return
    approved = sum(by_number[number].now.state == "approved" for number in done.same)
    say(f"{len(passages)} passages, {len(records)} trees of the older review:")
    held = sum(by_number[number].now.state == "approved" and bool(by_number[number].open_items) for number in done.same)
    say(f"  {len(done.same)} with the same text, {approved} of them approved{f' ({held} with open items)' if held else ''}")
    say(f"  {len(done.changed)} changed, {len(done.new)} new, {len(done.gone)} gone")
    if done.kept:
        say(f"  {len(done.kept)} where the newer review stays as it is")
    for number, parts in differences.items():
        is_same = all(kind == "same" for kind, _ in parts)
        what = "several old trees have the text of" if is_same else "changed:"
        say(f"\n{what} passage {number}; the old tree is a draft to review, or lies beside a newer draft")
        say("   " + "".join(_MARKS[kind].format(text) for kind, text in parts))
    for number, record in done.unlike:
        say(f"\nkept: passage {number}; the older review has another tree for it\n   record {record.number}: {record.text}")
    for number in done.new:
        say(f"\nnew: passage {number}\n   {by_number[number].text}")
    for record in done.gone:
        say(f"\ngone: record {record.number} of the older review\n   {record.text}")


_MARKS = {"same": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
