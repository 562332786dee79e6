"""The model that a command extracts with: its options, and loading it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from gatewise_mdt.extraction.extractor import Extracts

TokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens to write for a passage.", min=1)]
VerbatimOption = Annotated[bool, typer.Option("--verbatim", help="Allow only subjects and objects that stand in the text.")]
ServerOption = Annotated[
    str | None, typer.Option(help="Ask a running server, such as http://127.0.0.1:8000, in place of loading --adapter.")
]
NameOption = Annotated[str | None, typer.Option("--adapter-name", help="The adapter's name on the server.")]
BatchOption = Annotated[int, typer.Option(help="Passages in one forward pass.", min=1)]


@contextmanager
def loaded(
    adapter: Path, base: str | None, device: str, **settings: Any
) -> "Iterator[tuple[Extracts, Callable[[int, int], None]]]":
    """The extractor of an adapter, and what shows its progress on stderr."""
    from gatewise_mdt.pointing.extractor import load_extractor

    with _shown(lambda say: load_extractor(adapter, base=base, device=device, say=say, **settings)) as both:
        yield both


@contextmanager
def connected(server: str, name: str, **settings: Any) -> "Iterator[tuple[Extracts, Callable[[int, int], None]]]":
    """The extractor of an adapter on a server, whose key is in GATEWISE_API_KEY, and what shows its progress on stderr."""
    from gatewise_mdt.extraction.served import ServedExtractor

    key = os.environ.get("GATEWISE_API_KEY") or None
    with _shown(lambda _: ServedExtractor.connect(server, name, api_key=key, **settings)) as both:
        yield both


@contextmanager
def _shown(load: "Callable[[Callable[[str], None]], Extracts]") -> "Iterator[tuple[Extracts, Callable[[int, int], None]]]":
    from gatewise.progress import ConsoleProgress, quiet

    progress = ConsoleProgress(Console(stderr=True))
    with quiet(bars=True):
        extractor = load(progress.say)
        with progress.counting("extracting trees") as count:
            yield extractor, count
