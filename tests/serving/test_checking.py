"""``gatewise serving-check`` beside a stand-in for vLLM (fake_vllm.py); test_vllm.py has the real one."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import fake_vllm
from safetensors.torch import load_file, save_file
from tiny_run import write_adapter, write_base, write_rows
from typer.testing import CliRunner

from gatewise.adapters.files import read_lora
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.serving import checking
from gatewise.serving.checking import check_in_vllm, run_vllm
from gatewise.serving.engines import serving_settings
from gatewise.serving.vllm_process import NO_VLLM

Check = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters for it, and rows."""
    folder = tmp_path_factory.mktemp("saved")
    write_base(folder / "llama")
    write_rows(folder / "rows.jsonl", 10)
    write_adapter(folder / "one", folder / "llama")
    write_adapter(folder / "two", folder / "llama", r=2, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture
def check(saved: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """check(adapters, ...) -> the result of ``gatewise serving-check`` on them, in the stand-in."""
    monkeypatch.setattr(checking, "run_vllm", fake_vllm)
    given = ["--data", str(saved / "rows.jsonl"), "--prompts", "3", "--tokens", "4"]
    return lambda *words: CliRunner().invoke(app, ["serving-check", *given, *map(str, words)])


def test_right_settings_give_the_same(check: Check, saved: Path) -> None:
    result = check(saved / "one", "--json")
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)
    for side in ("unmerged", "merged", "base"):
        assert found[side]["holds"]
        assert found[side]["same"] == found[side]["compared"] == 12
        assert found[side]["difference"] < 1e-4
    assert not found["without"]["holds"]  # it does something
    assert found["without"]["difference"] > 1e-2


def test_several_adapters_share_an_engine(check: Check, saved: Path) -> None:
    result = check(saved / "one", saved / "two")
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["one", "two"]
    assert all("12 of 12 tokens" in line for line in result.stdout.splitlines())


def test_a_module_that_is_not_named_is_found_out(check: Check, saved: Path, tmp_path: Path) -> None:
    told = serving_settings(read_lora(saved / "one"), "llama")
    names = told["vllm"]["arguments"]
    told["vllm"]["arguments"] = [name for name in names if "layers.1.mlp" not in name]
    settings = tmp_path / "serving.json"
    settings.write_text(json.dumps(told), encoding="utf-8")
    result = check(saved / "one", "--settings", settings)
    assert result.exit_code == 1
    assert "DIFFERS: vLLM calls some modules by other names" in result.stdout
    # Beside the adapter that is what counts, without being asked for.
    shutil.copytree(saved / "one", tmp_path / "one")
    shutil.copyfile(settings, tmp_path / "one" / "serving.json")
    assert check(tmp_path / "one").exit_code == 1


def test_an_adapter_that_does_nothing_proves_nothing(check: Check, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "one", tmp_path / "idle")
    weights = load_file(tmp_path / "idle" / "adapter_model.safetensors")
    save_file(
        {name: w * 0 if "lora_B" in name else w for name, w in weights.items()}, tmp_path / "idle" / "adapter_model.safetensors"
    )
    result = check(tmp_path / "idle")
    assert result.exit_code == 1
    assert "CANNOT TELL" in result.stdout


def test_what_is_wrong_is_one_sentence(saved: Path, tmp_path: Path, check: Check) -> None:
    def fails(*words: Any, status: int = 2) -> str:
        result = check(*words)
        assert result.exit_code == status, result.output
        return str(result.stderr.strip().splitlines()[-1])

    assert "dtype 'float64' is not known" in fails(saved / "one", "--dtype", "float64")
    told = serving_settings(read_lora(saved / "one"), "llama")
    (tmp_path / "told.json").write_text(json.dumps({**told, "vllm": None}), encoding="utf-8")
    assert "vLLM does not serve this" in fails(saved / "one", "--settings", tmp_path / "told.json")
    (tmp_path / "told.json").write_text("[]", encoding="utf-8")
    assert "is not what compress writes" in fails(saved / "one", "--settings", tmp_path / "told.json")
    write_base(tmp_path / "other")
    write_adapter(tmp_path / "far", tmp_path / "other")
    assert "give adapters of one base" in fails(saved / "one", tmp_path / "far")
    write_base(tmp_path / "bert", "bert")
    write_adapter(tmp_path / "class", tmp_path / "bert")
    (tmp_path / "class" / "gatewise.json").write_text('{"task": "classification"}', encoding="utf-8")
    assert "for adapters that write text" in fails(tmp_path / "class")


@pytest.mark.parametrize(
    ("lines", "code", "sentence"),
    [
        (
            ["INFO", "(EngineCore pid=3) ERROR 11-27 [core.py:1] ValueError: too deep", "RuntimeError: it is gone"],
            1,
            "ValueError: too deep$",
        ),
        (["Killed"], 137, "Killed$"),
        ([], 1, "it said nothing$"),
        ([], NO_VLLM, "has no vLLM: give the Python"),
    ],
)
def test_the_engines_own_error_is_told(tmp_path: Path, lines: list[str], code: int, sentence: str) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {code}\n", encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(GatewiseError, match=sentence):
        run_vllm(python, {})
    with pytest.raises(GatewiseError, match="could not be run"):
        run_vllm(tmp_path / "none", {})


def test_layers_that_cannot_be_merged_are_compared_unmerged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(checking, "run_vllm", fake_vllm)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_adapter", refuse)
    [found] = check_in_vllm([saved / "one"], str(saved / "rows.jsonl"), prompts=2, tokens=3)
    assert found.merged is None
    assert found.holds
