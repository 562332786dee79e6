"""The model that a command extracts with: its options, and loading it."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gatewise.errors import GatewiseError

if TYPE_CHECKING:
    from gatewise_mdt.extraction.extractor import Extracts

LevelOption = Annotated[
    int | None, typer.Option(help="Chain of thought: 0 tree, 1 triples first, 2 triples and nodes first.", min=0, max=2)
]
CandidatesOption = Annotated[int, typer.Option(help="Write so many trees, and keep the one most like the others.", min=1)]
OfTwoOption = Annotated[
    int | None,
    typer.Option(
        "--candidates",
        help="Write so many trees; kept is the one most like the others, or with --second the best. [default: 1, or 5]",
        min=1,
        show_default=False,
    ),
]
SecondOption = Annotated[
    Path | None,
    typer.Option(
        help="An adapter of the other kind, so that one points and one writes: both judge the trees of both.", show_default=False
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="The most that is written in one output.", min=1)]
PipelineOption = Annotated[bool, typer.Option("--pipeline", help="Ask for triples, nodes and tree in turn.")]
VerbatimOption = Annotated[bool, typer.Option("--verbatim", help="Allow only subjects and objects that stand in the text.")]
FreeOption = Annotated[bool, typer.Option("--free", help="Let the model write what it likes, and read it as well as it goes.")]
ServerOption = Annotated[
    str | None, typer.Option(help="Ask a running server, such as http://127.0.0.1:8000, in place of loading --adapter.")
]
NameOption = Annotated[str | None, typer.Option("--adapter-name", help="The adapter's name on the server.")]
BatchOption = Annotated[int, typer.Option(help="Passages in one forward pass.", min=1)]


def of_two(candidates: int | None, second: Path | None) -> int:
    """How many trees are written, by what ``--candidates`` says, if anything."""
    if candidates is not None or second is None:
        return candidates or 1
    from gatewise_mdt.pointing.together import CANDIDATES  # and all that pointing needs

    return CANDIDATES


def options_given(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of some options that stand on the command line, as "--name", with their default as well as with another value."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def check_ways(free: bool, verbatim: bool, level: Any, pipeline: bool) -> None:
    """Before a model is loaded for what the extractor refuses."""
    if free and verbatim:
        raise GatewiseError("--free and --verbatim exclude each other: verbatim phrases take constrained writing")
    if level is not None and pipeline:
        raise GatewiseError("--level and --pipeline exclude each other: the pipeline has no levels")


@contextmanager
def loaded(
    adapter: Path, base: str | None, device: str, second: Path | None = None, **settings: Any
) -> "Iterator[tuple[Extracts, Callable[[str, int, int], None]]]":
    """The extractor of an adapter, or of two, and what shows its progress on stderr."""
    from gatewise_mdt.pointing.loading import load_extractor

    with _shown(lambda say: load_extractor(adapter, second=second, base=base, device=device, say=say, **settings)) as both:
        yield both


@contextmanager
def connected(server: str, name: str, **settings: Any) -> "Iterator[tuple[Extracts, Callable[[str, int, int], None]]]":
    """The extractor of an adapter on a server, whose key is in GATEWISE_API_KEY, and what shows its progress on stderr."""
    from gatewise_mdt.extraction.served import ServedExtractor

    key = os.environ.get("GATEWISE_API_KEY") or None
    with _shown(lambda _: ServedExtractor.connect(server, name, api_key=key, **settings)) as both:
        yield both


@contextmanager
def _shown(
    load: "Callable[[Callable[[str], None]], Extracts]",
) -> "Iterator[tuple[Extracts, Callable[[str, int, int], None]]]":
    from gatewise.progress import ConsoleProgress, quiet

    progress = ConsoleProgress(Console(stderr=True))
    with quiet(bars=True):
        extractor = load(progress.say)
        said: set[str] = set()

        with progress.counting("writing") as count:

            def show(what: str, done: int, total: int) -> None:
                if what not in said and not progress.console.is_terminal:
                    progress.say(f"writing {what} for {total} {'passage' if total == 1 else 'passages'}")
                said.add(what)
                count(done, total)

            yield extractor, show
