"""Options that several commands have, with one meaning."""

from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
BaseOption = Annotated[str | None, typer.Option(help="The base model, if not the one the adapter names.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a Hugging Face data set.")]
TemplateOption = Annotated[str | None, typer.Option(help="Prompt with the row's fields in braces, if not the run's.")]
LabelsOption = Annotated[str | None, typer.Option(help="Labels in order, 'no,yes', or with their words, 'no=bad,yes=good'.")]
CandidatesOption = Annotated[int, typer.Option(help="Write so many trees, and keep the one most like the others.", min=1)]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="The most that is written in one output.", min=1)]
PipelineOption = Annotated[bool, typer.Option("--pipeline", help="Ask for triples, nodes and tree in turn.")]
VerbatimOption = Annotated[bool, typer.Option("--verbatim", help="Allow only subjects and objects that stand in the text.")]

RepairOption = Annotated[
    bool,
    typer.Option("--repair", help="Put right what has one plain meaning, such as 'and' over a single triple."),
]
