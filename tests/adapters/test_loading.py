"""Saved adapters come back on their base model as they were, and what does not fit is refused."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import IDS, adapter_of, bert_config, llama_config, saved, tiny_tokenizer
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.loading import load_adapter
from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.routed import RoutedLoraConfig


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(llama_config()), tmp_path / "llama")


def test_trainable_frees_the_adapter_alone(llama: Path, tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter")
    model, _, base = load_adapter(tmp_path / "adapter", trainable=True, dtype=torch.bfloat16)
    assert base == str(llama)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(free) == 2 * 7 * 2  # A and B of the seven linears of two layers
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    assert not model.training


def test_soft_prompts_load_and_are_frozen_too(llama: Path, tmp_path: Path) -> None:
    prompted = get_peft_model(load_model(llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    prompted.save_pretrained(tmp_path / "prompted")
    model, _, _ = load_adapter(tmp_path / "prompted")
    assert torch.equal(model(IDS).logits, prompted(IDS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_adapters_own_tokenizer_wins(llama: Path, tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter")
    tiny_tokenizer(pad=True).save_pretrained(tmp_path / "adapter")
    assert load_adapter(tmp_path / "adapter")[1].pad_token == "<pad>"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_classification_adapters_bring_their_classifier(kind: str, llama: Path, tmp_path: Path) -> None:
    base = llama if kind == "llama" else saved(BertModel(bert_config()), tmp_path / "bert")
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["query", "value"]
    logits = adapter_of(base, tmp_path / "adapter", task_type="SEQ_CLS", num_labels=3, target_modules=targets)
    model, _, _ = load_adapter(tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, logits)
    assert logits.shape == (1, 3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model, _, _ = load_adapter(tmp_path / "adapter", trainable=True)
    heads = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name}
    assert heads
    assert all("modules_to_save" in name for name in heads)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 32}, r"layers\.0\S+: copying a param with shape torch\.Size\(\[3, 16\]\).*\[3, 32\]"),
        ({"num_hidden_layers": 3}, r"the adapter has no weights for .*layers\.2"),
        ({"num_hidden_layers": 1}, r"the base has no module for the adapter's .*layers\.1"),
        (None, "q_proj"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(changes: dict[str, int] | None, why: str, llama: Path, tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    gpt2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    saved(GPT2LMHeadModel(gpt2) if changes is None else LlamaForCausalLM(llama_config(**changes)), tmp_path / "other")
    with pytest.raises(GatewiseError, match=rf"adapter .*adapter does not fit the base model '.*other': .*{why}"):
        load_adapter(tmp_path / "adapter", base=tmp_path / "other")


def edit(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_that_says_too_little_of_its_base_or_task_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter_of(llama, adapter)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(GatewiseError, match=r"adapter_config\.json does not name the base model.*--base"):
        load_adapter(adapter)
    assert load_adapter(adapter, base=llama)[2] == str(llama)
    for changes, why in (
        ({"base_model_name_or_path": "/gone/base"}, "'/gone/base'"),
        ({"base_model_name_or_path": str(llama), "task_type": "SEQ_CLS"}, "has no classifier"),
        ({"task_type": "TOKEN_CLS"}, "only CAUSAL_LM and SEQ_CLS"),
        ({"peft_type": "NO_SUCH"}, r"adapter_config\.json is not a configuration that PEFT can read"),
    ):
        edit(adapter, **changes)
        with pytest.raises(GatewiseError, match=why):
            load_adapter(adapter)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("routed", [False, True])
def test_numbers_that_are_not_finite_are_refused(routed: bool, bad: float, llama: Path, tmp_path: Path) -> None:
    config = (RoutedLoraConfig if routed else LoraConfig)(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    get_peft_model(load_model(llama), config).save_pretrained(str(tmp_path / "whole"), save_embedding_layers=False)
    damaged = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
    path = damaged / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if ("lora_router" if routed else "lora_B") in key and key.endswith("weight"))
    tensors[key][-1, -1] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    said = rf"adapter_model\.safetensors is damaged: {re.escape(key)} has numbers that are not finite"
    with pytest.raises(GatewiseError, match=said):
        load_adapter(damaged)


def test_an_option_that_is_an_empty_text_is_refused():
    """As an unset variable of a shell script gives it: the run's own prompt would be taken without a word."""
    with pytest.raises(GatewiseError, match="prompt is an empty text"):
        DataOptions(prompt="")
