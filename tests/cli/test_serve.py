"""What ``gatewise serve`` refuses before anything is loaded; what it serves is tested in ``serving/server``."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.serving import constraints


def serve(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", "none", "--port", "0", *words])


def test_an_engine_that_would_ignore_an_option_refuses_it() -> None:
    for words, said in (
        (("--engine", "vllm", "--max-waiting", "256"), "--max-waiting does not go with --engine vllm"),
        (("--engine", "vllm", "--device", "cpu"), "--device does not go with --engine vllm"),
        (("--engine", "transformers", "--python", "python"), "--python does not go with --engine transformers"),
    ):
        result = serve(*words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_a_constraint_is_found_among_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Form:
        logits_processor = "a:B"

    points = [
        EntryPoint("form", "forms:FORM", "gatewise.constraints"),
        EntryPoint("broken", "nowhere:FORM", "gatewise.constraints"),
    ]
    monkeypatch.setitem(sys.modules, "forms", SimpleNamespace(FORM=Form()))
    monkeypatch.setattr(constraints, "entry_points", lambda group: [one for one in points if one.group == group])
    assert list(constraints.find_constraints()) == ["form"]  # where nobody asks for it, one that is broken is passed over
    assert constraints.logits_processors(constraints.find_constraints(["form"])) == ["--logits-processors", "a:B"]
    for engine in ("transformers", "vllm"):
        for name, said in (
            ("poem", "has a constraint 'poem'; those that are there: broken, form"),
            ("broken", "No module named 'nowhere'"),
        ):
            result = serve("--engine", engine, "--constraint", name)
            assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output


def test_a_named_folder_that_is_no_adapter_is_told(tmp_path: Path) -> None:
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    (tmp_path / "x" / "adapter" / "adapter_config.json").touch()
    result = serve("--engine", "transformers", "--adapters", f"support={tmp_path / 'x'}")
    assert result.exit_code == 2, result.output
    assert "is not an adapter, it has no adapter_config.json: give one of its sub-folders adapter" in " ".join(
        result.stderr.split()
    )
