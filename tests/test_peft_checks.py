"""What PEFT checks of every method of its own, for routed LoRA, selective prompts and LoRA whose ranks have moved.

Each check works, or is refused in a sentence. Decoders with linear layers and with GPT-2's Conv1D and an encoder; for ranks that
have moved also a decoder that flattens batch and tokens (OPT) and an encoder-decoder.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny_models import tiny_base
from transformers import OPTConfig, OPTForCausalLM

from gatewise import RoutedLoraConfig, SelectivePromptConfig
from gatewise.allocation import slots
from gatewise.errors import GatewiseError

FAMILIES = ["llama", "gpt2", "opt", "bert", "t5"]
METHODS = ["routed", "prompts"]
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
BUILT_FOR = ["llama", "gpt2", "bert"]
PAIRS = [
    *(pytest.param("ranks", family) for family in FAMILIES),
    *(pytest.param(method, family) for method in METHODS for family in BUILT_FOR),
]
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0], [3, 4, 5, 6, 0]])
THERE = IDS != 0


def base(family: str) -> Any:
    """The same random model every time."""
    torch.manual_seed(0)
    if family != "opt":
        return tiny_base(family).eval()
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**sizes, pad_token_id=0, ffn_dim=24, max_position_embeddings=64, word_embed_proj_dim=16)).eval()


def config(method: str, family: str, **more: Any) -> Any:
    task = TASKS.get(family, "CAUSAL_LM")
    if method == "ranks":
        return LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type=task, **more)
    if method == "routed":
        return RoutedLoraConfig(r=3, lora_alpha=6, task_type=task, **more)
    return SelectivePromptConfig(prompt_layers=[1], task_type=task, **more)


def scatter(model: Any, seed: int) -> None:
    """Random values in everything that belongs to adapters."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "prompt_router", "spt_", "modules_to_save")):
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape))  # the same numbers in every precision


def adapted(method: str, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    """A random adapter. With method "ranks" some have moved: one module has more, one fewer, and one has gone."""
    model = get_peft_model(base(family).to(dtype), config(method, family, **more))
    scatter(model, 1)
    if method == "ranks":
        slots.widen(model, 6)
        few, many, none = list(slots.lora_layers(model).values())[:3]
        slots.prune(few, "default", [0, 1])
        slots.grow(many, "default", 2, torch.Generator().manual_seed(1))
        slots.prune(none, "default", [0, 1, 2])
        slots.compact(model)
    return model.eval()


def inputs(family: str) -> dict[str, torch.Tensor]:
    texts = {"input_ids": IDS, "attention_mask": THERE.long()}
    return texts | ({"decoder_input_ids": IDS} if family == "t5" else {})


def logits(model: Any, family: str, **more: Any) -> torch.Tensor:
    """Those of every token that is no padding, or of every row."""
    with torch.no_grad():
        found: torch.Tensor = model(**inputs(family), **more).logits
    return found[THERE] if found.ndim == 3 else found


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def refused(error: type[Exception], match: str) -> AbstractContextManager[Any]:
    return pytest.raises(error, match=match)


@pytest.mark.parametrize("method", METHODS)
def test_encoder_decoders_are_refused_at_once(method: str) -> None:
    with refused(GatewiseError, "T5ForConditionalGeneration has an encoder and a decoder|not built for t5"):
        adapted(method, "t5")


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_saved_and_loaded(method: str, family: str, tmp_path: Path) -> None:
    """By PEFT in either way, as another adapter, and by its state dict, with a module that is trained whole."""
    whole = {"bert": "classifier", "t5": "lm_head", "gpt2": "ln_f", "opt": "final_layer_norm"}.get(family, "norm")
    model = adapted(method, family, modules_to_save=[whole])
    expected = logits(model, family)
    model.save_pretrained(tmp_path)
    own, read = model.peft_config["default"].to_dict(), PeftConfig.from_pretrained(str(tmp_path)).to_dict()
    assert {key for key in own if own[key] != read[key]} <= {"inference_mode", "base_model_name_or_path"}
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(base(family), tmp_path, low_cpu_mem_usage=low_memory).eval()
        same(logits(loaded, family), expected)
        loaded.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=low_memory)
        loaded.set_adapter("other")
        same(logits(loaded, family), expected)
    other = get_peft_model(base(family), copy.deepcopy(model.peft_config["default"])).eval()
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    same(logits(other, family), expected)
    with model.disable_adapter():
        same(logits(model, family), logits(base(family), family))


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_several_adapters(method: str, family: str) -> None:
    """Added, switched to, switched off, deleted, unloaded."""
    model, plain = adapted(method, family), logits(base(family), family)
    expected = logits(model, family)
    assert not torch.allclose(expected, plain, atol=1e-4)
    with model.disable_adapter():
        same(logits(model, family), plain)
    model.add_adapter("two", config(method, family))
    model.set_adapter("two")
    assert not torch.allclose(logits(model, family), expected, atol=1e-4)
    model.set_adapter("default")
    same(logits(model, family), expected)
    model.delete_adapter("two")
    same(logits(model, family), expected)
    if family != "bert":  # where PEFT leaves the trained head behind
        same(logits(model.unload(), family), plain)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_copied(method: str, family: str) -> None:
    model = adapted(method, family)
    expected, twin = logits(model, family), copy.deepcopy(model)
    scatter(model, 5)
    same(logits(twin, family), expected)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_half_precision(method: str, family: str) -> None:
    whole = logits(adapted(method, family), family)
    half = logits(adapted(method, family, torch.bfloat16), family).float()
    assert (half - whole).abs().max() < 0.1 * whole.abs().max()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_gradient_checkpointing(method: str, family: str, reentrant: bool) -> None:
    """The gradients are those without. The balance loss of routers has none under the re-entrant kind, and is refused."""
    model = adapted(method, family, **({"balance_weight": 0.0} if method == "routed" and reentrant else {}))
    data = inputs(family) | {"labels": torch.tensor([0, 1, 2]) if family == "bert" else torch.where(torch.arange(5) < 2, -100, IDS)}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("lora_A", "lora_B", "prompt_router", "spt_")))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**data).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), expected, rtol=1e-3, atol=1e-6)


# OPT flattens batch and tokens, which PEFT's own batches of several adapters cannot tell apart.
@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair.values != ("ranks", "opt")])
def test_a_batch_of_several_adapters(method: str, family: str) -> None:
    model = adapted(method, family)
    expected, plain = (one(**inputs(family)).logits.detach() for one in (model, base(family)))
    model.add_adapter("two", config(method, family))
    one_for_all = method == "prompts" or (method, family) == ("routed", "bert")
    refusal = refused(GatewiseError, r"serve the whole batch: run the rows of each adapter by themselves")
    with refusal if one_for_all else nullcontext(), torch.no_grad():
        mixed = model(**inputs(family), adapter_names=["default", "__base__", "two"]).logits
        for row, alone in enumerate((expected, plain)):
            there = THERE[row] if mixed.ndim == 3 else ...
            same(mixed[row][there], alone[row][there])


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_merged_and_added_up(method: str, family: str) -> None:
    """Two adapters side by side, of which the other does nothing. PEFT refuses it where both have a head of their own (BERT)."""
    model = adapted(method, family)
    expected = logits(model, family)
    if family != "bert" and method != "prompts":
        model.add_adapter("two", config(method, family))
        with nullcontext() if method == "ranks" else refused(GatewiseError, "cannot be added up, because each"):
            model.add_weighted_adapter(["default", "two"], [1.0, 0.5], "sum", combination_type="cat")
            model.set_adapter("sum")
        same(logits(model, family), expected)
    refusal = refused(GatewiseError, "cannot be merged, because (every prompt chooses|they are tokens generated)")
    with nullcontext() if method == "ranks" else refusal:
        same(logits(model.merge_and_unload(), family), expected)
