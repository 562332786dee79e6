"""docs/reference is what the code says, and says something of every key and option."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "reference.py"
spec = spec_from_file_location("reference", TOOL)
assert spec is not None
assert spec.loader is not None
reference = module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    committed = (reference.FOLDER / name).read_text(encoding="utf-8")
    assert reference.PAGES[name]() == committed, f"docs/reference/{name} is of earlier code: python tools/reference.py"


@pytest.mark.parametrize(("name", "column"), [("recipes.md", 3), ("commands.md", 1)])
def test_every_key_and_option_has_a_meaning(name: str, column: int) -> None:
    rows = re.findall(r"^\| (`.*) \|$", (reference.FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 80
    assert [row for row in rows if not re.sub(r"^\*.*?:\*", "", re.split(r"(?<!\\)\|", row)[column]).strip()] == []
