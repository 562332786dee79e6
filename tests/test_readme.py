"""README and docs against the code: every name, call, command, file and heading that they show exists. No model is loaded."""

import ast
import inspect
import json
import re
import shlex
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer.main
from scripts import ROOT, script

from gatewise.cli.main import app

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "mdt/README.md",
    *sorted((ROOT / "mdt/docs").rglob("*.md")),
]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")]
"""Pages that tell of what is gone too, or of scripts: their links alone are followed."""
PLACEHOLDERS = {
    "NAME",
    "json",
    "service",
    "commands",
    "samples",
    "methods",
    "constraints",
}  # gatewise.NAME, the files gatewise.json and gatewise.service, groups of entry points
COMMANDS = typer.main.get_command(app)


@pytest.fixture(scope="module")
def guides() -> Any:
    return script("tools/guides.py")


by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def resolve(path: str) -> Any:
    """What a dotted path names: attributes, and modules that are not imported yet."""
    found: Any = import_module("gatewise")
    reached = "gatewise"
    for name in path.split(".")[1:]:
        reached += f".{name}"
        try:
            found = getattr(found, name) if hasattr(found, name) else import_module(reached)
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            return None  # it is there, and is for an environment that has vLLM
    return found


def command_lines(page: Path) -> list[str]:
    """The lines of indented blocks that call gatewise, without comments, and without what is piped into or out of them."""
    lines = re.findall(r"^    (?:.*\| )?(gatewise .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.split(" > |  #", line)[0].strip() for line in lines]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the words after it."""
    command: Any = COMMANDS
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


@by_page
def test_names_exist(page: Path) -> None:
    for path in re.findall(r"(?<![\w/.-])gatewise(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")):
        if path.split(".")[-1] not in PLACEHOLDERS:
            resolve(path)


@by_page
def test_calls_in_python_blocks_have_arguments_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block.replace(" ...,", "").replace(", ...", ""))):
            if isinstance(node, ast.Call) and (path := ast.unparse(node.func)).startswith("gatewise."):
                arguments = {argument.arg: None for argument in node.keywords if argument.arg}
                inspect.signature(resolve(path)).bind(*node.args, **arguments)


@by_page
def test_command_lines_parse(page: Path) -> None:
    for line in command_lines(page):
        command, words = command_of(shlex.split(line)[1:])
        command.make_context(line, list(words))  # parses and does not run it
        for word in words:
            if "recipes/" in word:
                assert (ROOT / word).is_file(), f"{page.name} names {word}, which does not exist"


def test_what_is_there_to_operate_it_names_options_and_metrics_that_exist() -> None:
    unit, image, alerts = ((ROOT / "deploy" / name).read_text() for name in ("gatewise.service", "Dockerfile", "alerts.yml"))
    [in_unit] = re.findall(r"^ExecStart=\S*/gatewise (.*)$", unit, re.MULTILINE)
    [program, default] = re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", image, re.MULTILINE)
    for words in (in_unit.split(), [*json.loads(program), *json.loads(default)][1:]):
        command, rest = command_of(words)
        assert command.name == "serve"
        command.make_context("serve", list(rest))
    server = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src/gatewise/serving/server").glob("*.py"))
    counted = {name.removesuffix("_bucket") for name in re.findall(r"gatewise_\w+", alerts)}
    assert {name for name in counted if f'"{name}"' not in server} == set()


@by_page
def test_commands_inside_sentences_exist(page: Path) -> None:
    for line in re.findall(r"`gatewise ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
        command, names = command_of(line.split())
        assert command is not COMMANDS, f"{page.name}: there is no command `gatewise {line}`"
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name in names:
            assert not name.startswith("-") or name in options, f"{page.name}: `gatewise {line}` has no option {name}"


def test_the_site_has_every_page() -> None:
    named = re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(ROOT).as_posix() for page in (*PAGES, *OTHERS))


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to {file}, which does not exist"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert heading in slugs, f"{page.name} links to #{heading} of {linked.name}, which has {', '.join(slugs)}"


@by_page
def test_python_files_exist(page: Path) -> None:
    """Those that are named with their folder, from the repository or from src/gatewise."""
    for file in re.findall(r"`([\w.]+/[\w./]+\.py)", page.read_text(encoding="utf-8")):
        if "NAME" not in file:
            assert any((start / file).is_file() for start in (ROOT, ROOT / "src", ROOT / "src/gatewise")), (
                f"{page.name}: there is no {file}"
            )


def test_steps_of_a_guide_are_its_files_and_commands(guides: Any) -> None:
    page = """You have rows.

```yaml title="my.yaml"
method: lora
```

    gatewise train my.yaml --dry-run   # looks
    gatewise train my.yaml \\
      --overwrite

It prints

    accuracy  0.5  0.9

    make quickstart

<!-- not run: two GPUs -->

    gatewise train my.yaml --processes 2

Or as a service:

    sudo systemctl start gatewise

```bash
cat > more.txt <<'END'
two

words
END
```
"""
    assert [(step.name, step.text, step.why) for step in guides.steps(page)] == [
        ("my.yaml", "method: lora\n", None),
        (None, "gatewise train my.yaml --dry-run", None),
        (None, "gatewise train my.yaml \\\n  --overwrite", None),
        (None, "make quickstart", guides.SETS_UP),
        (None, "gatewise train my.yaml --processes 2", "two GPUs"),
        (None, "sudo systemctl start gatewise", "changes the machine"),
        (None, "cat > more.txt <<'END'\ntwo\n\nwords\nEND", None),
    ]


def test_a_quick_training_leaves_rounds_out_of_the_recipe(guides: Any) -> None:
    assert guides.quick("gatewise train recipes/quickstart.yaml --output runs/mine", ROOT) == (
        "gatewise train recipes/quickstart.yaml --set training.max_steps=3 --set allocation.first_round=null "
        "--set allocation.recover=null --output runs/mine"
    )
    assert guides.quick("gatewise train recipes/lora-support.yaml", ROOT).endswith(".yaml --set training.max_steps=3")
    assert guides.quick("gatewise inspect runs/mine/adapter", ROOT) == "gatewise inspect runs/mine/adapter"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_request_that_is_refused_has_not_run(guides: Any) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        command = f"curl http://127.0.0.1:{server.server_port}/v1/models"
        kinds = (["bash", "-c", command], guides.script(command, Path("/dev/null")))
        ended = [subprocess.run(one, capture_output=True, check=False) for one in kinds]
        server.shutdown()
    assert [one.returncode > 0 for one in ended] == [False, True]


def test_a_page_s_commands_share_what_it_exports(guides: Any, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.touch()
    page = ('export KEY="a b"', "OTHER=1; false", 'echo "$KEY$OTHER"')
    ended = [subprocess.run(guides.script(one, exported), capture_output=True, text=True, check=False) for one in page]
    assert [(one.returncode, one.stdout) for one in ended] == [(0, ""), (1, ""), (0, "a b\n")]


def test_guides_are_short_and_without_benchmarks(guides: Any) -> None:
    pages = [ROOT / page for page in guides.GUIDES.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))]
    words = {page.name: len(page.read_text(encoding="utf-8").split()) for page in pages}
    assert sum(words.values()) <= 12_000, words
    for page in pages:
        spreads = re.findall(r"^\|.*\d \(\d+\.\d\).*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert not spreads, f"{page.name} has a table of measurements, which belongs into a report: {spreads}"


def test_something_was_found() -> None:
    assert sum(len(command_lines(page)) for page in PAGES) > 20
    assert sum(len(blocks(page, "python")) for page in PAGES) > 10
