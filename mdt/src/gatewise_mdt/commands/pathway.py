"""``gatewise mdt pathway``: which passages of a guideline lead on to which others."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gatewise.flags import OUT
from gatewise_mdt.commands.trees import RepairOption, check_target, check_whole, read_file, say


def pathway(
    file: Annotated[str, typer.Argument(help="A .json or .jsonl file of trees, or sample:guidelines.", show_default=False)],
    out: Annotated[Path | None, typer.Option(*OUT, help="The JSON file of links. What was decided in it is kept.")] = None,
    repair: RepairOption = False,
) -> None:
    """Propose how the trees of a guideline make one pathway.

    A link says which decision leads on to which other passage. Links are proposed by headings, populations, the drugs of a decision
    in the condition of another passage, and order. None is followed before a person sets its "state" in the file from "proposed" to
    "accepted"; "refused" ones are not proposed again. Links may be added. `gatewise mdt show FILE --pathway pathway.json` then
    makes one picture, FHIR plan or DMN of all.

    \b
    Examples:
      gatewise mdt pathway guideline.pdf.review.jsonl --out pathway.json
      gatewise mdt show guideline.pdf.review.jsonl --pathway pathway.json --format svg --out pathway.svg
    """
    from gatewise_mdt.pathway import propose_links, read_links, write_links

    check_target(out, [file])
    read = read_file(file, repair)
    outdated: list[dict[str, Any]] = []
    held = read_links(out, read.records, outdated=outdated) if out is not None and out.exists() else []
    known = {link[:3] for link in held}
    links = sorted([*held, *(link for link in propose_links(read.records) if link[:3] not in known)])
    for one in outdated:
        say(f"note: not a link any more, but kept: {one['outdated']}", err=True)
    for number, link in enumerate(links, start=1):
        way = f"passage {link.start}, node {link.node + 1}, to passage {link.end}"
        say(f"{number}. {way} ({link.state}){f': {link.reason}' if link.reason else ''}")
    count = sum(link.state == "proposed" for link in links)
    say(f"{len(links)} links, {count} of them to be accepted or refused. Needs review by a clinician.")
    check_whole(read, read.faults)  # before anything is written: links of a passage that cannot be read would be no links
    if out is not None:
        write_links(out, read.records, links, outdated)
        say(f"written: {out}")
