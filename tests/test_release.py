"""What a release is made with: metadata of both distributions, and the files by which a change is checked."""

import re
import tomllib
from pathlib import Path
from typing import Any

import gatewise_mdt
import pytest
from ruamel.yaml import YAML

import gatewise

ROOT = Path(__file__).parents[1]


def project(folder: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))


def read(path: str) -> Any:
    return YAML(typ="safe").load(ROOT / path)


@pytest.mark.parametrize(("folder", "package"), [(".", gatewise), ("mdt", gatewise_mdt)])
def test_a_distribution_has_its_version_types_and_licence(folder: str, package: Any) -> None:
    made = project(folder)
    assert made["tool"]["setuptools"]["dynamic"]["version"] == {"attr": f"{package.__name__}.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", package.__version__)
    assert (Path(package.__file__).parent / "py.typed").is_file()
    assert "py.typed" in made["tool"]["setuptools"]["package-data"][package.__name__]
    assert (ROOT / folder / made["project"]["license-files"][0]).read_text(encoding="utf-8") == (ROOT / "LICENSE").read_text(
        encoding="utf-8"
    )


def test_gatewise_mdt_asks_for_the_gatewise_that_is_released_with_it() -> None:
    [needed] = [one for one in project("mdt")["project"]["dependencies"] if one.startswith("gatewise[")]
    major, minor, _ = gatewise.__version__.split(".")
    assert needed.endswith(f">={major}.{minor},<{major}.{int(minor) + 1}")
    assert gatewise_mdt.__version__ == gatewise.__version__


def test_the_workflow_runs_targets_that_exist_on_every_python_that_is_named() -> None:
    jobs = read(".github/workflows/ci.yml")["jobs"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    run = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make ")}
    assert {"lint", "test", "docs", "notebooks", "dist"} == run <= targets
    for folder in (".", "mdt"):
        named = [one for one in project(folder)["project"]["classifiers"] if re.search(r":: 3\.\d", one)]
        assert [one.rpartition(" ")[2] for one in named] == jobs["tests"]["strategy"]["matrix"]["python"]


def test_pre_commit_has_the_ruff_of_make_lint_and_issue_forms_ask_for_something() -> None:
    [ruff] = [one for one in project(".")["project"]["optional-dependencies"]["dev"] if one.startswith("ruff")]
    [own] = read(".pre-commit-config.yaml")["repos"]
    assert [hook["additional_dependencies"] for hook in own["hooks"]] == [[ruff], [ruff]]
    for form in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")):
        read_form = read(str(form.relative_to(ROOT)))
        assert {"name", "description", "body"} <= read_form.keys()
        assert any(part.get("validations", {}).get("required") for part in read_form["body"])
