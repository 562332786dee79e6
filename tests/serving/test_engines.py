"""What vLLM is told of an adapter, against the names that its models have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import EXPERTS, random_adapter, tiny_base

from gatewise.adapters.files import LoraAdapter, LoraModule, read_lora
from gatewise.serving.engines import keeps_lora, serving_settings, settings_together


def adapter(*paths: str, rank: int = 3, **others: Any) -> LoraAdapter:
    modules = [LoraModule(path, torch.ones(rank, 4), torch.ones(4, rank), ("a", "b"), 1.0, None, None, others) for path in paths]
    return LoraAdapter({"base_model_name_or_path": "base"}, modules, {}, {})


def named(model_type: str | None, *paths: str) -> set[str]:
    told = serving_settings(adapter(*paths), model_type)
    arguments = told["vllm"]["arguments"]
    assert arguments[:3] == ["--enable-lora", "--max-lora-rank", "8"]
    assert arguments[3] == "--lora-target-modules"
    return set(arguments[4:])


QUERY, DOWN = "layers.3.self_attn.q_proj", "layers.0.mlp.down_proj"
PACKED = "layers.3.self_attn.qkv_proj"


def test_a_packed_module_is_named_beside_its_part() -> None:
    assert named("llama", f"model.{QUERY}", f"model.{DOWN}") == {f"model.{QUERY}", f"model.{PACKED}", f"model.{DOWN}"}


@pytest.mark.parametrize("told", [["q_proj", "down_proj"], ["qkv_proj", "down_proj"], None])
def test_what_vllm_keeps_of_what_it_keeps_lora(told: list[str] | None) -> None:
    """As vLLM's is_in_target_modules has it, of the layer and of the adapter's tensors: told None is what it is told of these."""
    names = named("llama", f"model.{QUERY}", f"model.{DOWN}") if told is None else told
    for path, is_kept in (
        (QUERY, True),
        (DOWN, True),
        ("layers.3.self_attn.k_proj", told is not None and "qkv_proj" in told),
        ("layers.2.self_attn.q_proj", told is not None),
        ("layers.3.self_attn.o_proj", False),
    ):
        assert keeps_lora(f"model.{path}", names) == is_kept, path
    assert not keeps_lora(f"model.{QUERY}", {f"model.{QUERY}"})  # vLLM has no layer of this name
    assert keeps_lora("transformer.h.0.attn.c_attn", {"transformer.h.0.attn.c_attn"})
    assert keeps_lora("model.layers.0.mlp.experts.gate_up_proj", {"experts"})


@pytest.mark.parametrize("path", ["experts.7.gate_proj", "experts.gate_up_proj", "experts"])
def test_experts_are_told_of_as_one(path: str) -> None:
    """Those that vLLM is not told of lose their LoRA, whatever else is called as a part of theirs."""
    path = f"model.layers.1.mlp.{path}"
    assert not keeps_lora(path, {"gate_proj", "gate_up_proj", "up_proj"})
    assert keeps_lora(path, {"gate_proj", "experts"})
    assert keeps_lora("model.layers.1.mlp.shared_expert.gate_proj", {"gate_proj"})
    assert not keeps_lora("model.layers.1.mlp.shared_expert.gate_proj", {"experts"})
    assert keeps_lora(path, {path}) or path.endswith("gate_proj")


@pytest.mark.parametrize(
    ("model_type", "path", "kind"),
    [
        ("gpt_oss", f"model.{QUERY}", "q_proj"),  # self_attn is attn in vLLM
        (None, f"model.{DOWN}", "down_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn", "c_attn"),
        ("llama", "lm_head", "lm_head"),
        ("llava", "model.multi_modal_projector.linear_1", "linear_1"),
        ("qwen3_moe", "model.layers.0.mlp.experts.7.up_proj", "experts"),
    ],
)
def test_where_the_names_are_not_known_kinds_are_given(model_type: str | None, path: str, kind: str) -> None:
    assert named(model_type, path) == {kind}


def test_stacked_experts_are_one_module(tmp_path: Path) -> None:
    config: Any = LoraConfig(r=3, **EXPERTS)
    random_adapter(get_peft_model(tiny_base("qwen3_moe"), config)).save_pretrained(str(tmp_path))
    told = serving_settings(read_lora(tmp_path), "qwen3_moe")
    assert told["largest_rank"] == 3
    assert set(told["vllm"]["arguments"][4:]) == {"experts", "q_proj", "v_proj"}


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512), (513, None)])
def test_the_smallest_rank_that_vllm_allows(rank: int, allowed: int | None) -> None:
    told = serving_settings(adapter(f"model.{DOWN}", rank=rank), "llama")
    assert (told["vllm"] and told["vllm"]["max_lora_rank"]) == allowed


def test_what_needs_more_than_weights_is_not_for_vllm() -> None:
    """It would adapt all of the text with an adapter that begins in the midst of it."""
    told = adapter(f"model.{DOWN}")
    told.config.update(alora_invocation_tokens=[5, 6])
    assert serving_settings(told, "llama")["vllm"] is None
    told.config.update(alora_invocation_tokens=None, ensure_weight_tying=True)  # of which the weights say what there is
    assert serving_settings(told, "llama")["vllm"] is not None


def test_vllm_takes_the_configuration_at_its_word() -> None:
    """It refuses an adapter whose configuration speaks of a larger rank than any module has."""
    told = adapter(f"model.{DOWN}", rank=3)
    told.config.update(r=4, rank_pattern={"gone": 9}, alpha_pattern={})
    assert serving_settings(told, "llama")["vllm"]["max_lora_rank"] == 16


def test_several_adapters_need_the_union_and_the_largest_rank() -> None:
    one, two = (serving_settings(adapter(f"model.{path}", rank=rank), "llama") for path, rank in ((QUERY, 3), (DOWN, 12)))
    both = settings_together([one, two])
    assert both["modules"] == sorted([f"model.{QUERY}", f"model.{DOWN}"])
    assert both["vllm"]["max_lora_rank"] == 16
    assert set(both["vllm"]["arguments"][4:]) == {f"model.{QUERY}", f"model.{PACKED}", f"model.{DOWN}"}
    bad = serving_settings(adapter(f"model.{DOWN}", magnitude=torch.ones(4)), "llama")
    assert bad["vllm"] is None
    assert settings_together([one, bad])["vllm"] is None
