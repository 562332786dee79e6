"""``gatewise mdt review``: a page on this machine to read trees against their text and correct them."""

import re
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gatewise.errors import GatewiseError
from gatewise.flags import OUT, BaseOption, DeviceOption
from gatewise_mdt.commands.model import TokensOption, VerbatimOption
from gatewise_mdt.commands.trees import RepairOption, count_of, say
from gatewise_mdt.relations import Language

if TYPE_CHECKING:
    from gatewise_mdt.extraction.extractor import Extracts
    from gatewise_mdt.review.users import UserFile

NO_ADAPTER = "no model was given: start the review with --adapter DIR to extract trees"
OPEN = (
    "note: other machines reach this review, and tokens and texts go to them unencrypted: outside a network that you trust, put a"
    " proxy with TLS in front of it (mdt/docs/review.md)"
)

NAMELESS = "note: it answers only at 127.0.0.1 and localhost: give the name or address that browsers use with --allow-host"


def review(
    file: Annotated[
        str | None,
        typer.Argument(help="A text (.txt, .md, .html, .pdf, .docx), a file of trees, or sample:guidelines.", show_default=False),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Extract with this adapter; without one, trees are only corrected.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(*OUT, help="The .jsonl file of corrections. [default: FILE.review.jsonl]"),
    ] = None,
    base: BaseOption = None,
    language: Annotated[Language | None, typer.Option(help="The texts' language. [default: found out]")] = None,
    population: Annotated[str | None, typer.Option(help="Whom all passages are about, if headings do not say.")] = None,
    verbatim: VerbatimOption = False,
    max_new_tokens: TokensOption = 512,
    device: DeviceOption = "auto",
    port: Annotated[
        int, typer.Option(help="Port on this machine. [default: a free one]", min=0, max=65535, show_default=False)
    ] = 0,
    host: Annotated[
        str, typer.Option(help="Address of this machine to serve at: 0.0.0.0 for all, which needs --users.")
    ] = "127.0.0.1",
    users: Annotated[
        Path | None, typer.Option(help="The file of the reviewers, a token each; without one there is one reviewer.")
    ] = None,
    add_user: Annotated[
        str | None, typer.Option(metavar="NAME", help="Add a reviewer to the file of --users, print their token, and end.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name by which browsers reach the review, such as that of a proxy; repeatable."),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page, or only print its address.")] = True,
    repair: RepairOption = False,
    reviewer: Annotated[
        str | None, typer.Option(help="Who reviews: the name that the history has beside each change. [default: the login name]")
    ] = None,
) -> None:
    """Review trees in the browser: read, correct, approve, save.

    The page is served on this machine only, unless --host says otherwise; with --users several people review at once. What is
    corrected or approved goes into a JSONL file in the published format, which is training data; every change, of unfinished trees
    too, is kept in a history beside it as soon as it is made, with the reviewer's name and the time. Ctrl-C ends.

    \b
    Examples:
      gatewise mdt review guideline.pdf --adapter runs/mdt-pointing/adapter
      gatewise mdt review trees.json
      gatewise mdt review --users users.json --add-user Ada
      gatewise mdt review trees.json --users users.json --port 8000 --allow-host review.clinic.example
    """
    from gatewise_mdt.review import Extracting, Review, Session
    from gatewise_mdt.review.server import ReviewServer
    from gatewise_mdt.review.users import UserFile

    for name in allow_host or ():
        if not re.fullmatch(r"[^\s/]+", name):
            raise GatewiseError(f"--allow-host {name} is no name of a machine: give one such as review.clinic.example")
    people = None if users is None else UserFile(users)
    if add_user is not None:
        _add(people, add_user, allow_host)
        return
    if people is not None and not people.read():
        raise GatewiseError(f"{users} has no reviewer yet: --add-user NAME adds one")
    session = Session.open(file, out, population=population, repair=repair, reviewer=reviewer)
    extracting: Extracting | None = None
    try:
        for note in session.notes:
            say(f"note: {note}", err=True)
        if adapter is not None:
            extractor = _loaded(adapter, base, device, max_new_tokens=max_new_tokens, verbatim=verbatim)
            extracting = Extracting(session, lambda text, its: extractor([text], language=its)[0], language=language)
        page = Review(session, extracting, "" if adapter else NO_ADAPTER)
        with ReviewServer(page, people, host=host, port=port, allowed=allow_host or ()) as server:
            say(f"review: {server.url}")
            by = session.reviewer if people is None else f"whoever has a token of {users}"
            say(f"corrections go to {session.files.out}, by {by}; end with Ctrl-C", err=True)
            if not server.is_local:
                say(OPEN, err=True)
                if not allow_host and server.url.startswith("http://127.0.0.1:"):
                    say(NAMELESS, err=True)
            if browser and people is None:  # nobody's token is known here
                webbrowser.open(server.url)
            _serve(server)
    finally:
        if extracting is not None:
            extracting.end()
        session.close()
    if unsaved := session.unsaved:
        say(
            f"changes of {count_of(unsaved, 'passage')} are not saved in {session.files.out}; the next review goes on with them",
            err=True,
        )


def _serve(server: Any) -> None:
    """Serves until Ctrl-C, which is how a review ends and no interruption of it."""
    try:
        server.run()
    except KeyboardInterrupt:
        say("review ended", err=True)


def _add(people: "UserFile | None", name: str, names: list[str] | None) -> None:
    """Adds a reviewer; what to put behind the address of the review goes to stdout, once."""
    if people is None:
        raise GatewiseError("--add-user needs --users FILE, the file to add the reviewer to")
    token = people.add(name)
    say(f"{f'https://{names[0]}' if names else ''}/#token={token}")
    what = "this address" if names else "the address of the review with this behind it"
    say(f"send {what} to {name.strip()} and nobody else: it is not shown again; {people.path} keeps only its SHA-256", err=True)


def _loaded(adapter: Path, base: str | None, device: str, **settings: Any) -> "Extracts":
    from rich.console import Console

    from gatewise.progress import ConsoleProgress, quiet
    from gatewise_mdt.pointing.extractor import load_extractor

    with quiet(bars=True):
        say = ConsoleProgress(Console(stderr=True)).say
        return load_extractor(adapter, base=base, device=device, say=say, batch_size=1, **settings)
