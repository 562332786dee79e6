"""Starts of LoRA that take a part of the base weights, or read training rows: what is saved stands on the base model as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tiny_run import assert_same_adapter, stop_at, weights, write_base, write_recipe, write_rows
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gatewise.adapters import export
from gatewise.adapters.method import Lora
from gatewise.adapters.starts import CHANGE_BASE
from gatewise.errors import GatewiseError
from gatewise.parts import Run
from gatewise.runs.measure import measure_adapter
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import RunResult, train

IDS = torch.arange(3, 60).view(3, 19)


def run(recipe: Path, output: Path, *overrides: str, **options: Any) -> RunResult:
    return train(load_recipe(recipe, overrides), output, console=Console(quiet=True), **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("method", "start"), [*(("lora", one) for one in (*CHANGE_BASE, "eva")), ("dora", "olora")])
def test_the_saved_adapter_computes_on_the_plain_base_what_was_trained(
    method: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if start == "corda":
        pytest.importorskip("attr")
    seen: dict[str, torch.Tensor] = {}
    adapt, finish = Lora.adapt, Lora.finish

    def adapted(self: Lora, run: Run, base: Any) -> PeftModel:
        seen["base"] = logits(base)
        model = adapt(self, run, base)
        seen["start"] = logits(model)
        return model

    def finished(self: Lora, run: Run, model: PeftModel) -> PeftModel:
        seen["trained"] = logits(model)
        return finish(self, run, model)

    monkeypatch.setattr(Lora, "adapt", adapted)
    monkeypatch.setattr(Lora, "finish", finished)
    recipe = write_recipe(tmp_path, method)
    peft = ("dtype=float32", f"peft.init_lora_weights={start}", "peft.use_rslora=true")
    result = run(recipe, tmp_path / "out", *peft, "training.eval_every=2", "training.load_best=true")
    torch.testing.assert_close(seen["start"], seen["base"], rtol=0, atol=1e-5)
    assert not torch.allclose(seen["trained"], seen["base"], atol=1e-3)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), str(result.adapter))
    torch.testing.assert_close(logits(model), seen["trained"], rtol=0, atol=1e-5)
    assert (
        measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), console=Console(quiet=True)) == result.metrics["dev"]["after"]
    )


def test_a_run_goes_on_where_its_checkpoints_stand_on_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, setting = write_recipe(tmp_path), "peft.init_lora_weights=lora_ga"
    whole = run(recipe, tmp_path / "whole", setting)
    with monkeypatch.context() as patch:
        stop_at(patch, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "stopped", setting)
    checkpoint = tmp_path / "stopped" / "checkpoints" / "checkpoint-6"
    for use in (
        lambda: measure_adapter(checkpoint, str(tmp_path / "dev.jsonl")),
        lambda: export.to_lora(checkpoint, tmp_path / "x"),
    ):
        with pytest.raises(GatewiseError, match="is a checkpoint of a run with init_lora_weights lora_ga, which trains on base"):
            use()
    resumed = run(recipe, tmp_path / "stopped", setting, resume=True)
    assert resumed.resumed_from == 6
    assert_same_adapter(whole.adapter, resumed.adapter)
    assert "unfinished_start" not in json.loads((resumed.adapter / "gatewise.json").read_text())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["peft.init_lora_weights=eva", "peft.r=200"], r"no batch of data\.train has peft\.r \(200\) tokens"),
        (["peft.init_lora_weights=eva", "peft.r=17"], r"starts with 17 ranks a module, but eva finds at most 16 in model\."),
        (
            ["peft.init_lora_weights=lora_ga", "peft.r=9"],
            r"peft\.r is 9, but lora_ga finds at most 8 ranks to begin with in model\.",
        ),
    ],
)
def test_ranks_that_a_start_cannot_fill_are_refused(settings: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=said):
        run(write_recipe(tmp_path), tmp_path / "out", *settings)
    assert not (tmp_path / "out").exists()


def test_modules_that_see_one_vector_a_row_have_eva_and_no_corda(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, family="bert")
    pytest.importorskip("attr")
    with pytest.raises(GatewiseError, match=r"corda cannot start this adapter .* pooler, out with peft\.exclude_modules"):
        run(recipe, tmp_path / "out", "peft.init_lora_weights=corda")
    found = run(recipe, tmp_path / "out", "peft.init_lora_weights=eva", "training.learning_rate=1e-9")
    a = next(value for name, value in weights(found.adapter).items() if "pooler.dense.lora_A" in name)
    torch.testing.assert_close(a @ a.T, torch.eye(2), rtol=0, atol=1e-4)  # directions, at right angles


def test_weights_that_a_start_must_not_change_are_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "llama", tie_word_embeddings=True)
    for name in ("train", "dev"):
        write_rows(tmp_path / f"{name}.jsonl", 12)
    recipe = write_recipe(tmp_path)
    with pytest.raises(GatewiseError, match=r"pissa takes a part of the weight of lm_head, which other modules .* share"):
        run(recipe, tmp_path / "out", "peft.init_lora_weights=pissa", "peft.target_modules=[q_proj, lm_head]")
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 259}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "llama")
    with pytest.raises(GatewiseError, match=r"olora does not know Conv1D modules, such as transformer\.h\.0\.attn\.c_proj"):
        run(recipe, tmp_path / "out", "peft.init_lora_weights=olora", "peft.target_modules=[attn.c_proj]")
