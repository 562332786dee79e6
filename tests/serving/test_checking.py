"""``gatewise serving-check`` beside a stand-in for vLLM (fake_vllm.py); test_vllm.py has the real one."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fake_vllm import fake_vllm
from peft import get_peft_model
from refusals import assert_refused
from routed_models import trained_routers
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter
from tiny_run import write_adapter, write_base, write_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gatewise import RoutedLoraConfig
from gatewise.adapters.files import read_lora
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.serving import checking, vllm_process
from gatewise.serving.checking import check_in_vllm, run_vllm
from gatewise.serving.engines import serving_settings, settings_together
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


def test_more_tokens_than_a_text_may_have(check: Check, saved: Path) -> None:
    assert_refused(check(saved / "one", "--tokens", 600), "600 tokens are to be written, but text and answer have 96 in all")


def test_several_adapters_share_an_engine(check: Check, saved: Path) -> None:
    result = check(saved / "one", saved / "two")
    assert result.exit_code == 0, result.output
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [f"{saved.name}/one", f"{saved.name}/two"]
    assert all("12 of 12 tokens" in line for line in result.stdout.splitlines())


def test_routed_adapters_are_checked_too(check: Check, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    config = RoutedLoraConfig(r=3, lora_alpha=6, top_k=2, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "llama"), config)
    trained_routers(random_adapter(model)).save_pretrained(str(tmp_path / "routed"), save_embedding_layers=False)
    result = check(tmp_path / "routed", saved / "one")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert "12 of 12 tokens" in first
    assert "not merged" in first
    assert "12 of 12 tokens (log-probabilities" in second.partition("as in PEFT")[2]
    told = serving_settings(read_lora(tmp_path / "routed"), "llama")
    assert told["vllm"]["arguments"][3:5] == ["--no-enable-chunked-prefill", "--enforce-eager"]
    assert settings_together([told, serving_settings(read_lora(saved / "one"), "llama")])["vllm"]["arguments"][3:5] == [
        "--no-enable-chunked-prefill",
        "--enforce-eager",
    ]

    def run(python: str | Path, request: Any) -> dict[str, Any]:
        raise GatewiseError("vLLM ended with an error: ValueError: base_model.model.lora_router.weight is unsupported LoRA weight")

    monkeypatch.setattr(checking, "run_vllm", run)
    result = check(tmp_path / "routed")
    assert result.exit_code == 2
    assert "install gatewise beside vLLM" in " ".join(result.stderr.split())


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


def answered_otherwise(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]) -> None:
    """Makes the stand-in give an answer that ``change`` has changed."""

    def run(python: str | Path, request: Any) -> dict[str, Any]:
        found = fake_vllm(python, request)
        change(found)
        return found

    monkeypatch.setattr(checking, "run_vllm", run)


def test_a_number_that_is_none_is_no_match(check: Check, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered_otherwise(monkeypatch, lambda found: found["batches"][0]["rows"][1]["logprobs"].__setitem__(2, float("nan")))
    result = check(saved / "one", "--json")
    assert result.exit_code == 1
    [found] = json.loads(result.stdout)
    assert found["unmerged"] == {"same": 12, "compared": 12, "difference": None, "holds": False}


def test_an_adapter_that_does_little_beside_the_tolerance_proves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM leaves half of it out here, which is less than the tolerance that rounding needs."""

    def half_as_large(folder: Path) -> Path:
        tensors = load_file(folder / "adapter_model.safetensors")
        half = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
        save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    little = Path(shutil.copytree(saved / "one", tmp_path / "little"))
    for _ in range(5):
        half_as_large(little)
    rows = str(saved / "rows.jsonl")
    monkeypatch.setattr(checking, "run_vllm", fake_vllm)
    [right] = check_in_vllm([little], rows, prompts=2, tokens=3, tolerance=2e-4)
    assert right.holds
    half = half_as_large(Path(shutil.copytree(little, tmp_path / "half")))

    def leaves_out(python: str | Path, request: Any) -> dict[str, Any]:
        return fake_vllm(python, json.loads(json.dumps(request).replace(str(little), str(half))))

    monkeypatch.setattr(checking, "run_vllm", leaves_out)
    [found] = check_in_vllm([little], rows, prompts=2, tokens=3, tolerance=0.8 * right.without.difference)
    assert found.unmerged.holds
    assert found.without.difference > 0.8 * right.without.difference
    assert not found.holds


def test_prompts_are_cut_to_the_positions_of_the_base(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(python: str | Path, request: Any) -> dict[str, Any]:
        asked.append(request)
        return fake_vllm(python, request)

    monkeypatch.setattr(checking, "run_vllm", run)
    rows = tmp_path / "long rows.jsonl"
    rows.write_text(json.dumps({"source": "nice " * 40, "target": "yes"}) + "\n", encoding="utf-8")
    said: list[str] = []
    [found] = check_in_vllm([saved / "one"], str(rows), tokens=4, say=said.append)
    assert found.holds
    assert len(asked[0]["batches"][0][0]["prompt"]) == 92
    assert asked[0]["arguments"][asked[0]["arguments"].index("--max-model-len") + 1] == "96"
    assert said[0] == "answering 1 prompts in vLLM"


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


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(
    ("lines", "code", "sentence"),
    [
        (
            ["INFO", "(EngineCore pid=3) ERROR 11-27 [core.py:1] ValueError: too deep", "RuntimeError: it is gone"],
            1,
            "ValueError: too deep$",
        ),
        (
            ["(EngineCore pid=3) WARNING 11-27 [x.py:1] ImportError: no flash attention", "ValueError: too deep"],
            1,
            "error: ValueError: too deep$",
        ),
        (["Killed"], 137, "Killed$"),
        (["INFO loading weights"], "KILL", "vLLM was killed by signal 9, .*: INFO loading weights$"),
        (["hello"], 0, "python gave no answer of vLLM: hello$"),
        ([], 1, "it said nothing$"),
        ([], NO_VLLM, "has no vLLM: give the Python"),
    ],
)
def test_the_engines_own_error_is_told(tmp_path: Path, lines: list[str], code: int | str, sentence: str) -> None:
    ends = f"kill -{code} $$" if isinstance(code, str) else f"exit {code}"
    python = script(tmp_path / "python", *(f"echo '{line}'" for line in lines), ends)
    with pytest.raises(GatewiseError, match=sentence):
        run_vllm(python, {})
    with pytest.raises(GatewiseError, match="could not be run"):
        run_vllm(tmp_path / "none", {})


def gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_nothing_that_vllm_started_is_left(tmp_path: Path) -> None:
    python = script(tmp_path / "python", f"sleep 60 & echo $! > '{tmp_path}/pid'", "exit 1")
    with pytest.raises(GatewiseError, match="it said nothing"):
        run_vllm(python, {})
    assert gone(int((tmp_path / "pid").read_text()))


def test_vllm_goes_with_who_started_it(tmp_path: Path) -> None:
    """However that ends: nothing but the pipe to vllm_process.py tells it."""
    package = tmp_path / "path" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pids')!r})\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "request.json").write_text("{}")
    place = os.pathsep.join([str(tmp_path / "path"), *sys.path])
    process = subprocess.Popen(
        [sys.executable, vllm_process.__file__, str(tmp_path / "request.json"), str(tmp_path / "answer.json")],
        stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, "PYTHONPATH": place},
    )  # fmt: skip
    with process:
        while not (tmp_path / "pids").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert process.stdin is not None
        process.stdin.close()  # as the system does for one that was killed
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_layers_that_cannot_be_merged_are_compared_unmerged(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(checking, "run_vllm", fake_vllm)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_adapter", refuse)
    [found] = check_in_vllm([saved / "one"], str(saved / "rows.jsonl"), prompts=2, tokens=3)
    assert found.merged is None
    assert found.holds
