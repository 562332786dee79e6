"""benchmarks/claims.py: its tables, and that the pages have what it prints of the results."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def claims() -> Any:
    spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_has_each_arm_at_its_own_rate_and_at_the_first_ones(claims: Any) -> None:
    content = {
        "unit": "points",
        "part": "test",
        "arms": [
            {"name": "lora", "learning_rate": 0.003, "parameters": 1000, "mean": {"test": 88.0}, "sd": {"test": 1.0},
             "rates": [{"learning_rate": 0.003, "tuning": [80.0, 84.0]}]},
            {"name": "mine", "learning_rate": 0.0097, "parameters": 990, "mean": {"test": 86.5}, "sd": {},
             "rates": [{"learning_rate": 0.003, "tuning": [70.0]}, {"learning_rate": 0.0097, "tuning": [90.0, None]}]},
            {"name": "left", "learning_rate": None, "parameters": 1, "mean": {}, "sd": {}, "rates": []},
        ],
        "differences": [{"arm": "mine", "mean": -1.5, "low": -3.0, "high": 0.04, "p_holm": 0.061}],
    }  # fmt: skip
    assert claims.table(content)[2:] == [
        "| lora | 0.003 | 88.0 (1.0) |  |  | 1,000 | 82.0, 2 | 82.0, 2 |",
        "| mine | 0.0097 | 86.5 | −1.5 (−3.0 to 0.0) | 0.061 | 990 | 70.0, 1 | 90.0, 1 |",
        "| left |  |  |  |  | 1 |  |  |",
    ]


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results/compare").glob("*.json")), ids=lambda file: file.stem)
def test_pages_have_the_tables_that_are_printed(claims: Any, file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reports").glob("*.md"))
    pages += (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    lines = claims.table(content)
    if len(content["arms"]) == 1:  # a search for a rate: what came out stands in a table of several
        _, rate, quality, *_ = lines[-1].removeprefix("| ").split(" | ")
        lines = [f"| {rate} | {quality} |"]
    assert "\n".join(lines) in pages
