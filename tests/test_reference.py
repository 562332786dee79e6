"""docs/reference is what the code says, and says something of every key and option."""

import json
import re
from pathlib import Path

import pytest
from scripts import script

from gatewise.serving.server import app, bodies, guard

reference = script("tools/reference.py")


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    committed = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert reference.PAGES[name]() == committed, f"docs/reference/{name} is of earlier code: python tools/reference.py"


@pytest.mark.parametrize(("name", "column"), [("recipes.md", 3), ("commands.md", 1)])
def test_every_key_and_option_has_a_meaning(name: str, column: int) -> None:
    rows = re.findall(r"^\| (`.*) \|$", (reference.FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 80
    assert [row for row in rows if not re.sub(r"^\*.*?:\*", "", re.split(r"(?<!\\)\|", row)[column]).strip()] == []


SERVER = (reference.FOLDER / "serving.md").read_text(encoding="utf-8")


def section(heading: str) -> dict[str, list[str]]:
    """The first table under a heading: each name in the first column -> the cells after it."""
    rows = re.findall(r"^\| (`.*) \|$", SERVER.split(f"\n## {heading}\n")[1].split("\n## ")[0], re.MULTILINE)
    return {name: row.split(" | ")[1:] for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def test_the_page_of_the_server_has_every_field_and_no_other() -> None:
    taken = {name for kind in (bodies.Chat, bodies.Completion, bodies.Tokenize, bodies.Detokenize) for name in kind.model_fields}
    refused = {name: values for kind in (bodies.Chat, bodies.Tokenize) for name, values in kind.only.items()}
    listed = section("Fields of a request")
    assert listed.keys() == (taken | refused.keys()) - {"max_completion_tokens"}
    for name in refused.keys() - taken:
        [cell] = listed[name]
        assert [json.loads(one.strip("`")) for one in cell.split(", ")] == list(refused[name]), name
    ignored = set(re.findall(r"`(\w+)`", SERVER.split("**Ignored**")[1].split("**Refused**")[0]))
    assert ignored == bodies._HARMLESS
    assert {*bodies.StreamOptions.model_fields, "max_completion_tokens"} <= set(re.findall(r"`(\w+)`", SERVER))
    assert f"1 to {bodies.MOST_COPIES} answers" in SERVER


def test_the_page_of_the_server_has_every_address_error_and_metric_and_no_other() -> None:
    code = {file.name: file.read_text(encoding="utf-8") for file in Path(app.__file__).parent.glob("*.py")}
    routes = {one.replace("{name:path}", "NAME") for one in re.findall(r'Route\("([^"]+)"', code["app.py"])}
    assert {one.split()[1] for one in section("Endpoints") if " /" in one} == routes
    kinds = {"BadRequestError", *re.findall(r'"(\w+Error)"', code["app.py"] + code["guard.py"])}
    assert set(re.findall(r"^\| \d{3} \| `(\w+)`", SERVER, re.MULTILINE)) == kinds
    assert {name for name in section("Metrics") if name.startswith("gatewise_")} == set(
        re.findall(r'"(gatewise_\w+)"', code["engine.py"])
    )
    assert f"{guard.MOST_BYTES // 2**20} MiB | 413" in SERVER
    assert f"{guard.MOST_HELD // 2**20} MiB | 503" in SERVER
