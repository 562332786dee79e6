"""Reports: one form, commands that can be run from a clone, and the tables that benchmarks/claims.py prints of the results."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, script

REPORTS = sorted(
    {*(ROOT / "docs/reports").glob("*.md"), *(ROOT / "mdt/docs/reports").glob("*.md")} - {ROOT / "docs/reports/index.md"}
)
HEADINGS = ["Question", "Set-up", "Data", "Command", "Machine", "Result", "What it does not show"]
FILE = re.compile(r"[\w./-]+\.(py|yaml|toml|sh)")

by_report = pytest.mark.parametrize("page", REPORTS, ids=lambda page: f"{page.parents[2].name}-{page.stem}")


def section(page: Path, heading: str) -> str:
    """What stands under a heading."""
    return page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


@by_report
def test_a_report_has_the_form_of_all_reports_and_a_date(page: Path) -> None:
    title, date, *_ = page.read_text(encoding="utf-8").split("\n\n")
    assert re.fullmatch(r"# .+", title)
    assert re.fullmatch(
        r"Measured: (\d{4}-\d\d-\d\d at [0-9a-f]{8}( \([\w ]+\))?(, )?)+\. Frozen\.|\d{1,2} [A-Z][a-z]+ \d{4}\..*", date, re.DOTALL
    )
    assert re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE) == HEADINGS
    assert all(section(page, heading).strip() for heading in HEADINGS)


@by_report
def test_the_commands_of_a_report_name_files_that_a_clone_has(page: Path) -> None:
    lines = re.findall(r"^    (\S.*)$", section(page, "Data") + section(page, "Command"), re.MULTILINE)
    assert lines
    folder = ROOT
    for line in lines:
        words = shlex.split(line)
        if words[0] == "cd":
            folder = ROOT / words[1]
            assert folder.is_dir()
        for word in words:
            if FILE.fullmatch(word):
                assert (folder / word).is_file(), f"{word} in: {line}"


@by_report
def test_the_results_that_a_report_names_are_there(page: Path) -> None:
    named = re.findall(r"`((?:mdt/)?benchmarks/results/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_index_has_every_report() -> None:
    linked = re.findall(
        r"^\| \[[^]]+\]\((\w[\w-]*\.md)\)", (ROOT / "docs/reports/index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(linked) == sorted(page.name for page in REPORTS if page.parent == ROOT / "docs/reports")


def test_every_file_of_results_is_named_in_a_report() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in REPORTS)
    assert [file.name for file in sorted((ROOT / "benchmarks/results").glob("*.json*")) if file.name not in text] == []


@pytest.fixture(scope="module")
def claims() -> Any:
    return script("benchmarks/claims.py")


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
    pages = "".join(page.read_text(encoding="utf-8") for page in REPORTS)
    lines = claims.table(content)
    if len(content["arms"]) == 1:  # a search for a rate: what came out stands in a table of several
        _, rate, quality, *_ = lines[-1].removeprefix("| ").split(" | ")
        lines = [f"| {rate} | {quality} |"]
    assert "\n".join(lines) in pages
