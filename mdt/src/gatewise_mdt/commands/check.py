"""``gatewise mdt check``: what of its text a tree has lost or turned round."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.checks import writable
from gatewise.files import finite
from gatewise.flags import JsonOption
from gatewise_mdt.commands.trees import RepairOption, check_whole, count_of, read_file, say

if TYPE_CHECKING:
    from gatewise_mdt.checking.items import Item
    from gatewise_mdt.checking.ticks import Tick
    from gatewise_mdt.records import TreeRecord

    Found = list[tuple[Item, Tick | None]]

_OF_A_TICK = ("by", "at", "why")
NOTICE = "Needs review by a clinician. Rules of thumb: what they do not list can be wrong too."


def check(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    hints: Annotated[bool, typer.Option("--hints", help="Also list hints, which are wrong more often.")] = False,
    as_json: JsonOption = False,
    repair: RepairOption = False,
) -> None:
    """List what of its text each tree has lost or turned round.

    That is doses, limits, prohibitions, conditions, recommendations. The rules read from the text to the tree, in English and
    Chinese, and need no model. Each item names its kind, the words of the text, the node where there is one, and how sure the rule
    is. Those that a person ticked in `gatewise mdt review` say so, by whom and why; the others are open, and keep the tree from
    being approved. What changed in the text since the tree was made is one, too. With --json stand the places of the words in the
    passage, nodes are counted from 0, and hints are among the items. Items do not change the exit code.

    \b
    Examples:
      gatewise mdt check sample:guidelines
      gatewise mdt check guideline.pdf.review.jsonl --json > items.json
    """
    from gatewise_mdt.checking.ticks import looked_at

    read = read_file(file, repair)
    found = [(record, looked_at(record)) for record in read.records]
    if as_json:
        typer.echo(json.dumps(finite(writable({"records": [_as_json(*one) for one in found]})), ensure_ascii=False))
    else:
        _show(found, hints)
    check_whole(read, read.faults)


def _as_json(record: "TreeRecord", found: "Found") -> dict[str, Any]:
    known = {"passage_id": record.more["passage_id"]} if isinstance(record.more.get("passage_id"), str) else {}
    items = [{**item.to_json(), "tick": tick and {name: tick.get(name) for name in _OF_A_TICK}} for item, tick in found]
    return {"number": record.number, **known, "passage": record.passage, "items": items}


def _show(records: "list[tuple[TreeRecord, Found]]", hints: bool) -> None:
    from gatewise_mdt.checking.ticks import open_of
    from gatewise_mdt.records import clipped

    for record, found in records:
        listed = [(item, tick) for item, tick in found if hints or not item.hint]
        if listed:
            say(f"{record.number}. {clipped(record.text, 100)}")
        for item, tick in listed:
            where = "" if item.node is None else f", node {item.node + 1}"
            said = "" if tick is None else f"; ticked: {', '.join(str(tick[name]) for name in _OF_A_TICK if tick.get(name))}"
            say(f"  {'hint' if item.hint else item.kind}{where}: {item.sentence} (sure {item.sure:.2f}){said}")
    counts = [len(open_of(found)) for _, found in records]
    ticked = sum(tick is not None for _, found in records for _, tick in found)
    left = sum(item.hint for _, found in records for item, _ in found)
    more = f"{f', {ticked} ticked' if ticked else ''}{_hints(left, hints)}"
    say(f"{count_of(sum(counts), 'item')} open in {sum(map(bool, counts))} of {len(records)} records{more}. {NOTICE}")


def _hints(count: int, shown: bool) -> str:
    said = count_of(count, "hint")
    return f", {said}" if shown or not count else f", {said} (--hints lists them)"
