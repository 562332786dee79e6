"""``gatewise mdt extract``: documents to trees, with a trained adapter."""

import os
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gatewise.errors import GatewiseError
from gatewise.flags import BaseOption, DeviceOption
from gatewise_mdt.commands.model import (
    NameOption,
    ServerOption,
    TokensOption,
    VerbatimOption,
    connected,
    loaded,
)
from gatewise_mdt.commands.passages import CharactersOption, PopulationOption
from gatewise_mdt.commands.trees import Format, OutOption, check_format, check_place, check_target, give, say

if TYPE_CHECKING:
    from gatewise_mdt.records import TreeRecord


class LanguageName(StrEnum):
    """The languages that are known."""

    en = "en"
    zh = "zh"


def extract(
    files: Annotated[
        list[str],
        typer.Argument(help="Texts: .txt, .md, .pdf or .docx files, or folders with such; - is stdin.", show_default=False),
    ],
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder.", show_default=False)] = None,
    server: ServerOption = None,
    adapter_name: NameOption = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to make of the trees.")] = Format.text,
    out: OutOption = None,
    base: BaseOption = None,
    language: Annotated[LanguageName | None, typer.Option(help="The texts' language. [default: found out]")] = None,
    population: PopulationOption = None,
    passage_characters: CharactersOption = None,
    verbatim: VerbatimOption = False,
    max_new_tokens: TokensOption = 512,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Passages at a time. [default: 8 in one forward pass, 16 under way at a server]", min=1),
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Extract decision trees from text with a trained adapter. Every tree needs review by a clinician.

    Long documents are cut into passages under their headings, which say whom they are about: `gatewise mdt passages` shows them.
    What cannot be read or gives no tree does not stop the rest; what failed is said at the end, and the exit code is then 2. Ctrl-C
    gives what was found by then. With --out, each passage is on disk as soon as it is done, in OUT.work.jsonl: the same command
    goes on after any interruption.

    With --server and --adapter-name, the adapter is one that a server has (`gatewise serve`; its key is in GATEWISE_API_KEY).
    Each passage is on disk as soon as it is done there.

    \b
    Examples:
      gatewise mdt extract guideline.pdf --adapter runs/mdt-pi-lora/adapter --format html --out trees.html
      gatewise mdt extract guidelines/ --server http://127.0.0.1:8000 --adapter-name mdt-pi-lora --format json --out trees.json
      echo "adults with gout@For a flare, give colchicine." | gatewise mdt extract - --adapter runs/mdt-pi-lora/adapter
    """
    from gatewise.files import is_special
    from gatewise_mdt.documents.reading import documents_in
    from gatewise_mdt.extraction.batch import Batch, Journal, extract_pieces, read_pieces
    from gatewise_mdt.formats.views import ONE_TREE

    _check_model(adapter, server, adapter_name, base)
    check_format(format, out)
    work = None if out is None or is_special(out) else out.with_name(f"{out.name}.work.jsonl")
    given = files
    files = [str(one) for one in documents_in(given)]
    if out is not None and work is not None and os.path.isfile(work):  # in a folder that is read may lie what an interrupt gave
        files = [one for one in files if one in given or not _is_same(one, out)]
    check_target(out, files)
    batch = Batch()
    named: Any = language.value if language else None
    cut: dict[str, Any] = {"population": population, "most_characters": passage_characters}
    pieces = read_pieces(files, batch, language=named, **cut)
    several = len(pieces) > 1
    stopped: BaseException | None = None
    journal: Journal | None = None
    if pieces:
        check_place(format, out, several)
        settings: dict[str, Any] = {"verbatim": verbatim, "max_new_tokens": max_new_tokens}
        if work is not None:
            model = {"server": server, "adapter_name": adapter_name} if adapter is None else {"adapter": _fingerprint(adapter)}
            journal = Journal(work, {**model, "base": base, **settings})
        try:
            with (
                connected(server, adapter_name, batch_size=batch_size or 16, **settings)
                if server is not None and adapter_name is not None
                else loaded(cast(Path, adapter), base, device, batch_size=batch_size or 8, **settings)
            ) as (extractor, count):
                extract_pieces(pieces, extractor, batch, count, journal)
        except (KeyboardInterrupt, GatewiseError) as error:
            stopped = error
            if batch.read:
                say(f"stopped after {batch.read} of {len(pieces)} passages", err=True)
                if journal:
                    say(f"the same command goes on from there; {journal.path} has what was found", err=True)
    faults = list(batch.faults)
    written = None
    try:
        if not (stopped and journal and several and format in ONE_TREE):  # a folder that is there would be in the way then
            written = _give_found(batch.records, format, out, several)
        if journal and not stopped:
            journal.remove()
    except GatewiseError as error:
        stopped = stopped or error
    for note in batch.notes:
        say(f"note: {note}", err=True)
    if written:
        say(f"written: {written}")
    for sentence in faults:
        say(f"failed: {sentence}", err=True)
    if stopped:
        raise stopped
    if batch.failed:
        which = "the text" if len(files) == 1 else f"{len(batch.failed)} of the {len(files)} texts"
        raise GatewiseError(f"{which} gave no tree: {', '.join(batch.failed)}")
    if faults:
        raise GatewiseError(f"{len(faults)} {'passage' if len(faults) == 1 else 'passages'} failed, named above")


def _is_same(file: str, out: Path) -> bool:
    return os.path.exists(out) and os.path.exists(file) and os.path.samefile(file, out)


def _check_model(adapter: Path | None, server: str | None, name: str | None, base: str | None) -> None:
    if (adapter is None) == (server is None):
        raise GatewiseError("give either --adapter, a folder, or --server and --adapter-name, an adapter that a server has")
    if (server is None) != (name is None):
        missing, given = ("--server", "--adapter-name") if server is None else ("--adapter-name", "--server")
        raise GatewiseError(f"{given} was given without {missing}: give both, or --adapter")
    if server is not None and base is not None:
        raise GatewiseError("--base was given with --server, which has its base model already: leave one of the two out")


def _fingerprint(adapter: Path) -> str | None:
    """Of an adapter; None where there is none, which is told when it is loaded."""
    from gatewise.adapters import fingerprint

    with suppress(GatewiseError):
        return fingerprint(adapter)
    return None


def _give_found(records: "Sequence[TreeRecord]", format: Format, out: Path | None, several: bool) -> Path | None:
    """Gives what an extraction found; what cannot be given so is printed, so that the work is not lost."""
    from gatewise_mdt.formats.views import render

    try:
        return give(records, format, out, several) if records else None
    except GatewiseError as error:
        say(render(records, "json"), nl=False)
        raise GatewiseError(f"{error} (the trees are on stdout, as JSON)") from None
