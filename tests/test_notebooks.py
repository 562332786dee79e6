"""The notebooks, read and not run: what they show exists, and nothing in them is of one machine. `make notebooks` runs them."""

import ast
import inspect
import io
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_readme import ROOT, command_of

from gatewise.progress import ConsoleProgress

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 60_000  # characters of a picture
SCREEN = 75  # lines of an output
MACHINE = re.compile(r"/(home|root|tmp|var|usr|opt|work|private|Users)/|[A-Z]:\\")
OURS = ("gatewise", "gatewise_mdt")

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a kind, with their source as one text."""
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["nbformat"] == 4
    return [cell | {"source": "".join(cell["source"])} for cell in read["cells"] if cell["cell_type"] == kind]


def python_of(source: str) -> str:
    """A code cell without what is for IPython: commands, and cells that are written into a file."""
    return "" if source.startswith("%%") else re.sub(r"^!.*$", "", source, flags=re.MULTILINE)


def commands_in(source: str) -> list[str]:
    """The command lines of gatewise, without what they are piped into."""
    return [re.split(" > | \\| ", line)[0] for line in re.findall(r"^!(gatewise .*)$", source, re.MULTILINE)]


def names_of(tree: ast.AST) -> dict[str, Any]:
    """What a cell imports of gatewise, by the names that it has there."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.asname or one.name: import_module(one.name) for one in node.names if one.name in OURS}
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
            module = import_module(str(node.module))
            for one in node.names:
                assert not one.name.startswith("_")
                has = hasattr(module, one.name)
                found[one.asname or one.name] = getattr(module, one.name) if has else import_module(f"{node.module}.{one.name}")
    return found


def of_ours(node: ast.AST, names: dict[str, Any]) -> Any:
    """What an expression of dotted names is, if it begins with one of gatewise's; else None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (whole := of_ours(node.value, names)) is not None:
        return getattr(whole, node.attr)
    return None


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare", "guideline", "own-data", "somebodys-adapter"]


@by_notebook
def test_each_cell_ran_from_the_top_and_shows_a_screen_at_most(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for output in (one for cell in code for one in cell["outputs"]):
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert len("".join(output.get("text", "")).splitlines()) <= SCREEN
        assert all(len("".join(shown)) <= MOST for shown in output.get("data", {}).values())
    assert sum(bool(cell["outputs"]) for cell in code) > len(code) / 2


@by_notebook
def test_nothing_in_it_is_of_a_machine(path: Path) -> None:
    texts = [cell["source"] for kind in ("code", "markdown") for cell in cells(path, kind)]
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    texts += ["".join(one.get("text", "")) for one in outputs]
    texts += ["".join(one.get("data", {}).get("text/plain", "")) for one in outputs]
    assert [text for text in texts if MACHINE.search(text)] == []


@by_notebook
def test_code_is_python_whose_names_and_arguments_exist(path: Path) -> None:
    names: dict[str, Any] = {}
    for cell in cells(path, "code"):
        tree = ast.parse(python_of(cell["source"]))
        names |= names_of(tree)
        for node in ast.walk(tree):
            found = of_ours(node, names)  # an attribute that is not there raises
            if isinstance(node, ast.Call) and callable(called := of_ours(node.func, names)):
                inspect.signature(called).bind(*node.args, **{one.arg: None for one in node.keywords if one.arg})
            assert found is None or not str(getattr(node, "attr", "")).startswith("_")
    assert names


@by_notebook
def test_command_lines_parse(path: Path) -> None:
    lines = [line for cell in cells(path, "code") for line in commands_in(cell["source"])]
    assert lines
    variables = {"OPTIONS": "--base smollm2-135m-instruct --data sample:support-dev --template-prompt '{text}'"}
    for line in lines:
        command, words = command_of(shlex.split(re.sub(r"\$(\w+)", lambda one: variables[one[1]], line))[1:])
        command.make_context(line, list(words))  # parses and does not run it


@by_notebook
def test_links_lead_somewhere(path: Path) -> None:
    linked = re.findall(r"\]\(([^)\s#]+)\)", "\n".join(cell["source"] for cell in cells(path, "markdown")))
    assert len(linked) >= 2
    assert [one for one in linked if not (path.parent / one).is_file()] == []


def test_a_command_in_a_notebook_shows_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        with ConsoleProgress(console).counting("measuring") as count:
            count(1, 2)
        return console.file.getvalue()  # type: ignore[attr-defined]

    monkeypatch.delenv("JPY_PARENT_PID", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "measuring" in shown()
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # Jupyter sets it for its kernels
    assert "measuring" not in shown()
