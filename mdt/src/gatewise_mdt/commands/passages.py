"""``gatewise mdt passages``: what a model will read of a document, before any model is loaded."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.checks import writable
from gatewise.flags import JsonOption
from gatewise_mdt.commands.trees import count_of, say

if TYPE_CHECKING:
    from gatewise_mdt.documents.passages import Passage

PopulationOption = Annotated[str | None, typer.Option(help="Whom all passages are about, in place of what headings say.")]
CharactersOption = Annotated[
    int | None, typer.Option(help="Most characters of a passage. [default: 800 in English, 300 in Chinese]", min=50)
]


def passages(
    file: Annotated[str, typer.Argument(help="A text: .txt, .md, .html, .pdf or .docx; - is stdin.", show_default=False)],
    population: PopulationOption = None,
    passage_characters: CharactersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the passages of a document as a model reads them.

    A passage is "population@text". The text begins with the headings that name no people, and each row of a table says
    "header: cell". Offsets count characters of the document's text as it was read: a line for each heading, paragraph, item
    and row. With --json stands the SHA-256 of the document, which trees that are extracted from it carry too.

    \b
    Examples:
      gatewise mdt passages guideline.pdf
      gatewise mdt passages guideline.docx --json > passages.json
    """
    from gatewise_mdt.documents.passages import split_passages
    from gatewise_mdt.documents.reading import read_document

    document = read_document(file)
    found = split_passages(document, population=population, most=passage_characters)
    name = writable(document.name)
    if as_json:
        made = {
            "document": name,
            "sha256": document.sha256,
            "characters": len(document.text),
            "notes": [writable(note) for note in document.notes],
            "passages": [_as_json(number, passage) for number, passage in enumerate(found, start=1)],
        }
        typer.echo(json.dumps(made, ensure_ascii=False, indent=2))
        return
    for note in document.notes:
        say(f"note: {writable(note)}", err=True)
    say(f"{writable(name)}: {count_of(len(found), 'passage')}")
    told: dict[str, int] = {}
    for number, passage in enumerate(found, start=1):
        say(f"\n{number}. {writable(passage.where)}, characters {passage.start} to {passage.end}")
        if passage.headings:
            say(f"   headings: {writable(' › '.join(passage.headings))}")
        say(f"   population: {writable(passage.population) or 'none'}")
        say(f"   {writable(passage.passage)}")
        for note in passage.notes:
            say(f"   note: {f'as under {told[note]}' if note in told else writable(note)}")
            told.setdefault(note, number)


def _as_json(number: int, passage: "Passage") -> dict[str, Any]:
    said: dict[str, Any] = {
        "number": number,
        "passage_id": passage.id,
        "text": passage.text,
        "population": passage.population,
        "passage": passage.passage,
        "headings": list(passage.headings),
        "place": passage.where,
        "offsets": [passage.start, passage.end],
        "notes": list(passage.notes),
    }
    return {key: writable(value) for key, value in said.items()}
