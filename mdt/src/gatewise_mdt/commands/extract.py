"""``gatewise mdt extract``: documents to trees, with a trained adapter."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from gatewise.errors import GatewiseError
from gatewise_mdt.commands.model import (
    NameOption,
    ServerOption,
    VerbatimOption,
    connected,
    loaded,
)
from gatewise_mdt.commands.passages import PopulationOption
from gatewise_mdt.commands.trees import Format, OutOption, check_target, give, say
from gatewise_mdt.relations import Language


def extract(
    files: Annotated[
        list[str],
        typer.Argument(help="Texts: .txt, .md, .html, .pdf or .docx files, or folders with such; - is stdin.", show_default=False),
    ],
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder.", show_default=False)] = None,
    server: ServerOption = None,
    adapter_name: NameOption = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="The form to write the trees in.")] = "text",
    out: OutOption = None,
    drafts: Annotated[bool, typer.Option("--drafts", hidden=True)] = False,
    language: Annotated[Language | None, typer.Option(help="The texts' language. [default: found out]")] = None,
    population: PopulationOption = None,
    verbatim: VerbatimOption = False,
    base: Annotated[str | None, typer.Option(hidden=True)] = None,
    device: Annotated[str, typer.Option(hidden=True)] = "auto",
    passage_characters: Annotated[int | None, typer.Option(hidden=True, min=50)] = None,
    max_new_tokens: Annotated[int, typer.Option(hidden=True, min=1)] = 512,
    batch_size: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
) -> None:
    """Extract decision trees from text with a trained adapter. Every tree needs review by a clinician.

    Long documents are cut into passages under their headings, which say whom they are about: `gatewise mdt passages` shows them.
    What cannot be read or gives no tree does not stop the rest; what failed is said at the end, and the exit code is then 2. Ctrl-C
    prints what was found by then; with --out, each passage is on disk as soon as it is done, in OUT.work.jsonl, and the same
    command goes on after any interruption.

    With --server and --adapter-name, the adapter is one that a server has (`gatewise serve`; its key is in GATEWISE_API_KEY).

    For special cases: --base (the base model, if not the one the adapter names), --device, --passage-characters (most of a
    passage; 800 in English, 300 in Chinese), --max-new-tokens (512 for a passage), --batch-size (passages at a time) and --drafts,
    without which formats that systems run are refused: nobody has approved these trees yet.

    \b
    Examples:
      gatewise mdt extract guideline.pdf --adapter runs/mdt-pointing/adapter --format html --out trees.html
      gatewise mdt extract guidelines/ --server http://127.0.0.1:8000 --adapter-name mdt-pi-lora --format json --out trees.json
      echo "adults with gout@For a flare, give colchicine." | gatewise mdt extract - --adapter runs/mdt-pointing/adapter
    """
    from gatewise.adapters import fingerprint
    from gatewise.files import is_special
    from gatewise_mdt.documents.reading import documents_in
    from gatewise_mdt.extraction.batch import Batch, Journal, extract_pieces, read_pieces

    if (adapter is None) == (server is None) or (server is None) != (adapter_name is None):
        raise GatewiseError("expected --adapter DIR, or --server URL with --adapter-name NAME: give one of the two")
    files = [str(one) for one in documents_in(files)]
    check_target(out, files)
    batch = Batch()
    pieces = read_pieces(files, batch, language=language, population=population, most_characters=passage_characters)
    several = len(pieces) > 1
    stopped: BaseException | None = None
    journal: Journal | None = None
    if pieces:
        _check_place(format, out, several, drafts)
        settings: dict[str, Any] = {"verbatim": verbatim, "max_new_tokens": max_new_tokens}
        if out is not None and not is_special(out):
            model = {"server": server, "adapter_name": adapter_name} if adapter is None else {"adapter": fingerprint(adapter)}
            journal = Journal(out.with_name(f"{out.name}.work.jsonl"), {**model, "base": base, **settings})
        try:
            with (
                connected(server, adapter_name, batch_size=batch_size or 16, **settings)
                if server is not None and adapter_name is not None
                else loaded(cast(Path, adapter), base, device, batch_size=batch_size or 8, **settings)
            ) as (extractor, count):
                extract_pieces(pieces, extractor, batch, count, journal)
        except (KeyboardInterrupt, GatewiseError) as error:
            stopped = error
            further = f"; the same command goes on from there, {journal.path} has what was found" if journal else ""
            if batch.read:
                say(f"stopped after {batch.read} of {len(pieces)} passages{further}", err=True)
    for note in batch.notes:
        say(f"note: {note}", err=True)
    for sentence in batch.faults:
        say(f"failed: {sentence}", err=True)
    if batch.records and not (stopped and journal) and (written := give(batch.records, format, out, several, drafts)):
        say(f"written: {written}")
    if stopped:
        raise stopped
    if journal:
        journal.remove()
    if batch.failed:
        which = "the text" if len(files) == 1 else f"{len(batch.failed)} of the {len(files)} texts"
        raise GatewiseError(f"{which} gave no tree: {', '.join(batch.failed)}")
    if batch.faults:
        raise GatewiseError(f"{len(batch.faults)} {'passage' if len(batch.faults) == 1 else 'passages'} failed, named above")


def _check_place(format: Format, out: Path | None, several: bool, drafts: bool) -> None:
    """Refuses before long work what could not be printed or written after it.

    Args:
        several: whether there may be more than one tree.
        drafts: systems may be given what nobody approved.

    Raises:
        GatewiseError: the place cannot be written, or the format needs one, or takes approved trees alone.
    """
    from gatewise.files import check_new_file, check_new_folder
    from gatewise_mdt.formats.gate import RUN
    from gatewise_mdt.formats.views import ONE_TREE, WORKBOOKS

    if format in RUN and not drafts:
        raise GatewiseError(
            f"{format} takes approved trees alone, and nobody has approved what is extracted now: give --drafts, which marks all as"
            " DRAFT, or take --format json and approve the trees in gatewise mdt review"
        )
    folder = several and format in ONE_TREE
    if out is None:
        if folder or format in WORKBOOKS:
            raise GatewiseError(
                f"{format} of several trees cannot be printed: name a new folder with --out"
                if folder
                else f"{format} cannot be printed: name a file with --out"
            )
    elif folder:
        check_new_folder(out)
    else:
        check_new_file(out)
