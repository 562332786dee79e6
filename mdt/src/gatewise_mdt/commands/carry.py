"""``gatewise mdt carry``: what a review of an older version of a guideline decided, carried over to the newer one."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.checks import writable
from gatewise.errors import GatewiseError
from gatewise.flags import JsonOption
from gatewise_mdt.commands.trees import say

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeRecord
    from gatewise_mdt.review.carrying import Carried
    from gatewise_mdt.review.passage import Passage


def carry(
    old: Annotated[str, typer.Argument(help="The older guideline, or the file of corrections of its review.", show_default=False)],
    new: Annotated[str, typer.Argument(help="The newer guideline: .txt, .md, .pdf or .docx.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output", "-o", help="The newer review's file of corrections. [default: NEW.review.jsonl]"),
    ] = None,
    population: Annotated[str | None, typer.Option(help="Whom all passages are about, if headings do not say.")] = None,
    reviewer: Annotated[str | None, typer.Option(help="Who carries over, for the history. [default: the login name]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Carry a review over to a new version of its guideline, and show what changed.

    Passages with the same text keep their tree, and who approved it and when. Where the text changed, the old tree becomes a
    draft, to be read against the change, which is shown here ([-gone-] {+new+}) and on the page of `gatewise mdt review NEW`. What
    a person did in the newer review stays as it is. The command may be given again.

    \b
    Examples:
      gatewise mdt carry guideline-2024.pdf guideline-2027.pdf
      gatewise mdt carry guideline-2024.pdf.review.jsonl guideline-2027.pdf --dry-run
    """
    from gatewise_mdt.review.carrying import carry as carried
    from gatewise_mdt.review.files import ReviewFiles
    from gatewise_mdt.review.session import Session
    from gatewise_mdt.review.sources import path_of

    corrections = _corrections(old)
    if os.path.exists(new) and path_of(new).samefile(corrections):
        raise GatewiseError(f"{new} is what is carried over: name the newer guideline after it")
    if (target := out or ReviewFiles.default_out(Path(new))).exists() and target.samefile(corrections):
        raise GatewiseError(f"{target} is the older review, and would be changed: name another file with --out")
    name = writable(corrections.name)
    records, unsaved, drafts = _records(corrections)
    if unsaved:
        say(f"note: {name} lacks {unsaved} of the changes of its review: save there first to carry them over, too", err=True)
    if drafts:
        what = "1 draft of its review that nobody" if drafts == 1 else f"{drafts} drafts of its review that nobody"
        say(f"note: {name} lacks {what} approved or corrected: do so there and save to carry them over, too", err=True)
    if dry_run:
        passages, notes = Session.look(new, out, population=population)
        for note in notes:
            say(f"note: {note}", err=True)
        _tell(*carried(passages, records, name), records, as_json)
        return
    session = Session.open(new, out, population=population, reviewer=reviewer)
    try:
        for note in session.notes:
            say(f"note: {note}", err=True)
        done = session.carry(records, name)
        if session.trouble:
            raise GatewiseError(f"what was carried over could not be kept: {session.trouble}")
        saved = session.save()
        _tell(session.passages, done, records, as_json)
        if not as_json:
            say(f"written: {saved.path} ({saved.records} {'tree' if saved.records == 1 else 'trees'})")
    finally:
        session.close()


def _corrections(old: str) -> Path:
    """The file of corrections of a review, named by itself or by its guideline."""
    from gatewise_mdt.records import SUFFIXES
    from gatewise_mdt.review.files import ReviewFiles

    beside = ReviewFiles.default_out(Path(old))
    if beside.is_file():
        return beside
    if Path(old).suffix.lower() not in (".json", ".jsonl"):
        raise GatewiseError(f"{beside}: there is no such file, expected the corrections of the review of {old}")
    if not os.path.isfile(old):
        raise GatewiseError(f"{old}: there is no such file, expected trees ({', '.join(SUFFIXES)})")
    return Path(old)


def _records(corrections: Path) -> "tuple[list[TreeRecord], int, int]":
    """The older records; how many passages of their review stand otherwise in its history, and how many are drafts only there."""
    from gatewise_mdt.records import read_trees
    from gatewise_mdt.review.files import ReviewFiles

    read = read_trees(corrections)
    if read.faults:
        raise GatewiseError(f"{next(iter(read.faults.values()))}; mend the record first, so that nothing of the review is lost")
    if corrections.suffix.lower() != ".jsonl":
        return list(read.records), 0, 0
    try:
        passages = ReviewFiles(corrections).read_draft().passages
    except GatewiseError:  # the corrections are what counts, and they are whole
        passages = []
    drafts = [passage for passage in passages if passage.now.state == "drafted" and passage.saved is None]
    return list(read.records), sum(passage.is_unsaved for passage in passages), len(drafts)


def _tell(passages: "list[Passage]", done: "Carried", records: "list[TreeRecord]", as_json: bool) -> None:
    from gatewise_mdt.review.carrying import LISTS, difference, is_of_two
    from gatewise_mdt.review.passage import CARRIED_KEY

    by_number = {passage.number: passage for passage in passages}
    changed = sorted([*done.changed, *done.beside])
    differences = {
        number: difference(str(by_number[number].more[CARRIED_KEY].get("text", by_number[number].text)), by_number[number].text)
        for number in changed
    }
    if as_json:
        told: dict[str, Any] = {
            **{name: getattr(done, name) for name in LISTS},
            "differences": {str(number): [list(one) for one in parts] for number, parts in differences.items()},
            "unlike": [{"passage": number, "record": record.number} for number, record in done.unlike],
            "gone": [{"number": record.number, "text": record.text} for record in done.gone],
        }
        typer.echo(json.dumps(writable(told), ensure_ascii=False, indent=2))
        return
    same = len(done.approved) + len(done.corrected) + len(done.drafted)
    say(f"{len(passages)} passages, {len(records)} trees of the older review:")
    states = f"{len(done.approved)} approved, {len(done.corrected)} corrected, {len(done.drafted)} to review"
    say(f"  {same} with the same text: {states}")
    say(f"  {len(changed)} changed, {len(done.new)} new, {len(done.gone)} gone")
    two = sum(is_of_two(by_number[number]) for number in done.kept)
    if reviewed := len(done.kept) - two:
        say(f"  {reviewed} that {'was' if reviewed == 1 else 'were'} reviewed here already, and {_stay(reviewed)}")
    if two:
        say(f"  {two} that {'has' if two == 1 else 'have'} the trees of two reviewers to choose from, and {_stay(two)}")
    for number, parts in differences.items():
        where = "the old tree lies beside the newer draft" if number in done.beside else "the old tree is a draft to review"
        is_same = all(kind == "same" for kind, _ in parts)
        what = "same text as before, with several trees, of which nothing says which is of" if is_same else "changed:"
        say(f"\n{what} passage {number}; {where}")
        say("   " + "".join(_MARKS[kind].format(text) for kind, text in parts))
    for number, record in done.unlike:
        say(f"\nkept: passage {number}; the older review has another tree for it\n   record {record.number}: {record.text}")
    for number in done.new:
        say(f"\nnew: passage {number}\n   {by_number[number].text}")
    for record in done.gone:
        say(f"\ngone: record {record.number} of the older review\n   {record.text}")


def _stay(count: int) -> str:
    return "stays" if count == 1 else "stay"


_MARKS = {"same": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
