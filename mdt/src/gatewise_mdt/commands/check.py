"""``gatewise mdt check``: what of its text a tree has lost or turned round."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.checks import writable
from gatewise.files import finite
from gatewise.flags import JsonOption
from gatewise_mdt.commands.trees import RepairOption, check_whole, read_file, say

if TYPE_CHECKING:
    from gatewise_mdt.checking.items import Item
    from gatewise_mdt.records import TreeRecord

NOTICE = "Needs review by a clinician. Rules of thumb: what they do not list can be wrong too."


def check(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    hints: Annotated[bool, typer.Option("--hints", help="List the hints, too, which err more often.")] = False,
    as_json: JsonOption = False,
    repair: RepairOption = False,
) -> None:
    """List what of its text each tree has lost or turned round: doses, limits, prohibitions, conditions, recommendations.

    The rules read from the text to the tree, in English and Chinese, and need no model. Each item names its kind, the words of the
    text, the node where there is one, and how sure the rule is. With --json stand the places of the words in the passage, nodes are
    counted from 0, and hints are among the items. Items do not change the exit code.

    \b
    Examples:
      gatewise mdt check sample:guidelines
      gatewise mdt check guideline.pdf.review.jsonl --json > items.json
    """
    from gatewise_mdt.checking.items import items

    read = read_file(file, repair)
    found = [(record, items(record)) for record in read.records]
    if as_json:
        typer.echo(json.dumps(finite(writable({"records": [_as_json(*one) for one in found]})), ensure_ascii=False))
    else:
        _show(found, hints)
    check_whole(read, read.faults)


def _as_json(record: "TreeRecord", items: "list[Item]") -> dict[str, Any]:
    known = {"passage_id": record.more["passage_id"]} if isinstance(record.more.get("passage_id"), str) else {}
    return {"number": record.number, **known, "passage": record.passage, "items": [item.to_json() for item in items]}


def _show(found: "list[tuple[TreeRecord, list[Item]]]", hints: bool) -> None:
    for record, items in found:
        listed = [item for item in items if hints or not item.hint]
        if listed:
            begins = " ".join(record.text.split())
            say(f"{record.number}. {begins if len(begins) <= 100 else f'{begins[:99]}…'}")
        for item in listed:
            where = "" if item.node is None else f", node {item.node + 1}"
            say(f"  {'hint' if item.hint else item.kind}{where}: {item.sentence} (sure {item.sure:.2f})")
    counts = [sum(not item.hint for item in items) for _, items in found]
    left = sum(item.hint for _, items in found for item in items)
    say(f"{_items(sum(counts))} in {sum(map(bool, counts))} of {len(found)} records{_hints(left, hints)}. {NOTICE}")


def _items(count: int) -> str:
    return "1 item" if count == 1 else f"{count} items"


def _hints(count: int, shown: bool) -> str:
    said = "1 hint" if count == 1 else f"{count} hints"
    return f", {said}" if shown or not count else f", {said} (--hints lists them)"
