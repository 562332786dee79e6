"""What ``gatewise serve`` refuses before anything is loaded; what it serves is tested in ``serving/server``."""

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gatewise.cli.main import app


def serve(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", "none", "--port", "0", *words])


def test_an_engine_that_would_ignore_an_option_refuses_it() -> None:
    for words, said in (
        (("--engine", "vllm", "--max-waiting", "256"), "--max-waiting is 256, but vLLM lets any number wait"),
        (("--engine", "vllm", "--device", "cpu"), "--device is 'cpu', but vLLM chooses its own"),
        (("--engine", "transformers", "--python", "python"), "--python goes with --engine vllm"),
    ):
        result = serve(*words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


@pytest.mark.parametrize("missing", ["llguidance", "gatewise_mdt.extraction.constraint"])
def test_trees_need_what_constrains_them(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    given = ("--engine", "transformers", "--adapters", "nothing")
    result = serve(*given, "--trees")
    assert result.exit_code == 2, result.output
    assert f"--trees needs {missing}, which is not installed: pip install" in result.stderr
    assert "--trees" not in serve(*given).stderr  # where nobody asks, it serves without


def test_a_named_folder_that_is_no_adapter_is_told(tmp_path: Path) -> None:
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    (tmp_path / "x" / "adapter" / "adapter_config.json").touch()
    result = serve("--engine", "transformers", "--adapters", f"support={tmp_path / 'x'}")
    assert result.exit_code == 2, result.output
    assert "is not an adapter, it has no adapter_config.json: give one of its sub-folders adapter" in " ".join(
        result.stderr.split()
    )
