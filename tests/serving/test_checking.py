"""``gatewise serving-check`` beside a stand-in for vLLM (fake_vllm.py); test_vllm_routed.py has the real one."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import ask_all
from peft import get_peft_model
from refusals import assert_refused
from routed_models import trained_routers
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter
from tiny_run import write_adapter, write_base, write_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gatewise import RoutedLoraConfig
from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import read_lora
from gatewise.cli.main import app
from gatewise.models import loading
from gatewise.routed.router import Router
from gatewise.serving import checking
from gatewise.serving.engines import serving_settings, settings_together

Check = Callable[..., Any]
STEEP = 300.0  # the standard deviation of a router's weights


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
    monkeypatch.setattr(checking, "_ask_all", ask_all)
    given = ["--data", str(saved / "rows.jsonl"), "--prompts", "3", "--tokens", "4"]
    return lambda *words: CliRunner().invoke(app, ["serving-check", *given, *map(str, words)])


def test_right_settings_give_the_same(check: Check, saved: Path) -> None:
    result = check(saved / "one", "--json")
    assert result.exit_code == 0, result.output
    [found] = json.loads(result.stdout)
    assert found["unmerged"]["holds"]
    assert found["unmerged"]["same"] == found["unmerged"]["compared"] == 12
    assert found["unmerged"]["difference"] < 1e-4
    assert not found["without"]["holds"]  # it does something
    assert found["without"]["difference"] > 1e-2


def test_more_tokens_than_a_text_may_have(check: Check, saved: Path) -> None:
    assert_refused(check(saved / "one", "--tokens", 600), "600 tokens are to be written, but text and answer have 96 in all")


def test_several_adapters_share_an_engine(check: Check, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = RoutedLoraConfig(r=3, lora_alpha=6, top_k=2, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "llama"), config)
    trained_routers(random_adapter(model)).save_pretrained(str(tmp_path / "routed"), save_embedding_layers=False)
    result = check(saved / "one", saved / "two", tmp_path / "routed")
    assert result.exit_code == 0, result.output
    names = [f"{saved.name}/one", f"{saved.name}/two", f"{tmp_path.name}/routed"]
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == names
    assert all("12 of 12 tokens" in line for line in result.stdout.splitlines())
    told = serving_settings(read_lora(tmp_path / "routed"), "llama")
    for settings in (told, settings_together([told, serving_settings(read_lora(saved / "one"), "llama")])):
        assert settings["vllm"]["arguments"][3:5] == ["--no-enable-chunked-prefill", "--enforce-eager"]


def test_a_module_that_vllm_has_by_another_name_is_found_out(check: Check, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_ask_all", partial(ask_all, left_out="layers.1.mlp"))
    result = check(saved / "one")
    assert result.exit_code == 1
    assert "DIFFERS: vLLM calls some modules by other names" in result.stdout


def test_a_steep_router_has_the_room_that_rounding_needs(
    check: Check, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers hardly tell prompts apart, and what they have in common is taken off: what rounding makes of it is left."""
    torch.manual_seed(4)
    config = RoutedLoraConfig(r=3, lora_alpha=6, top_k=2, task_type="CAUSAL_LM")
    model = trained_routers(
        random_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(saved / "llama"), config), 1.0), STEEP
    )
    folder = tmp_path / "steep"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    [prompt] = checking._prompts(folder, str(saved / "llama"), 96, str(saved / "rows.jsonl"), DataOptions(limit=1), 4)

    def centred(router: Any, given: Any) -> None:
        router.center.copy_(router._pooled(*given[:2])[0])
        router.spread.copy_(2e-6 * router.center.square().mean())  # not less, or it is taken for rounding
        router.numerator.data[0] = 0.5 / STEEP  # of the gates in the middle, so that none is as large as another

    hooks = [one.register_forward_pre_hook(centred) for one in model.modules() if isinstance(one, Router)]
    with torch.no_grad(), model.eval().prompt_positions(torch.ones(1, len(prompt), dtype=torch.bool)):
        model(input_ids=torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    monkeypatch.setattr(checking, "_ask_all", partial(ask_all, dtype=torch.float64))
    [found] = json.loads(check(folder, "--prompts", "1", "--json").stdout)
    assert found["unmerged"]["difference"] > checking.TOLERANCE
    assert found["holds"]
    monkeypatch.setattr(checking, "_ask_all", partial(ask_all, left_out="layers.0"))
    assert "DIFFERS" in check(folder, "--prompts", "1").stdout


def test_an_adapter_that_does_nothing_proves_nothing(check: Check, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "one", tmp_path / "idle")
    weights = load_file(tmp_path / "idle" / "adapter_model.safetensors")
    save_file(
        {name: w * 0 if "lora_B" in name else w for name, w in weights.items()}, tmp_path / "idle" / "adapter_model.safetensors"
    )
    result = check(tmp_path / "idle")
    assert result.exit_code == 1
    assert "CANNOT TELL" in result.stdout


def test_a_number_that_is_none_is_no_match(check: Check, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        version, answers, bare = ask_all(*given)
        answers[0][1]["token_logprobs"][2] = float("nan")
        return version, answers, bare

    monkeypatch.setattr(checking, "_ask_all", broken)
    result = check(saved / "one", "--json")
    assert result.exit_code == 1
    [found] = json.loads(result.stdout)
    assert found["unmerged"] == {"same": 12, "compared": 12, "difference": None, "tolerance": 1e-3, "holds": False}


def test_two_names_of_one_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter has the embedded model's, the other the hub's, which is out of reach."""
    names = {"one": "minilm-l6", "two": "sentence-transformers/all-MiniLM-L6-v2"}
    for folder, base in names.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    monkeypatch.setattr(loading, "fetch", lambda name, **_: tmp_path / name)
    monkeypatch.setattr(loading, "_is_on_hub", lambda _: False)
    assert checking._common_base([tmp_path / folder for folder in names], None) == "minilm-l6"


def test_what_is_wrong_is_one_sentence(saved: Path, tmp_path: Path, check: Check) -> None:
    def fails(*words: Any, status: int = 2) -> str:
        result = check(*words)
        assert result.exit_code == status, result.output
        return str(result.stderr.strip().splitlines()[-1])

    shutil.copytree(saved / "one", tmp_path / "odd")
    config = json.loads((saved / "one" / "adapter_config.json").read_text())
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}), encoding="utf-8")
    assert "which vLLM does not serve" in fails(tmp_path / "odd")
    write_base(tmp_path / "other")
    write_adapter(tmp_path / "far", tmp_path / "other")
    assert "give adapters of one base" in fails(saved / "one", tmp_path / "far")
    write_base(tmp_path / "bert", "bert")
    write_adapter(tmp_path / "class", tmp_path / "bert")
    (tmp_path / "class" / "gatewise.json").write_text('{"task": "classification"}', encoding="utf-8")
    assert "for adapters that write text" in fails(tmp_path / "class")
