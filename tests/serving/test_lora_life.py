"""What may happen to a fast model between and during calls: adapters come, change and go; and where PEFT's own path is taken."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from mixed_models import BASE, NAMES, both, generation, logits, mixed_model, prompts
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import random_adapter, tiny_base
from torch import Tensor, nn
from transformers import LogitsProcessor

import gatewise
from gatewise import GatewiseError, fast_lora
from gatewise.allocation.scoring import GateBank

MIXED = NAMES["mixed"]


def assert_same(model: PeftModel, names: list[str] | None = MIXED) -> None:
    """A fast model gives what its copy gives by PEFT's ways."""
    ours = logits(model, names, prompts(5))
    slow = copy.deepcopy(model)
    slow.base_model.__dict__.pop("_enable_peft_forward_hooks", None)
    torch.testing.assert_close(ours, logits(slow, names, prompts(5)), rtol=1e-5, atol=1e-5)


# ---- switching ----


def test_switch_and_undo() -> None:
    model = mixed_model()
    stock = dict(model.base_model.__dict__)
    handle = fast_lora(model)
    fast_lora(model)
    assert model.base_model.__dict__ != stock
    for _ in range(2):
        handle.remove()
        assert model.base_model.__dict__ == stock


@pytest.mark.parametrize("names", [None, MIXED], ids=["one adapter", "mixed"])
def test_between_calls_layers_are_peft_s(names: list[str] | None) -> None:
    """Also after a call that failed, from which PEFT itself leaves hooks behind."""
    model = mixed_model()
    fast_lora(model)

    def clean() -> bool:
        layers = [module for module in model.modules() if hasattr(module, "lora_A")]
        return not any("forward" in layer.__dict__ or layer._forward_pre_hooks for layer in layers)

    logits(model, names, prompts(5))
    assert clean()
    with pytest.raises(IndexError):
        logits(model, names, {"input_ids": torch.full((5, 3), 10_000)})
    assert clean()
    assert_same(model, names)


def test_refuses_what_is_not_lora() -> None:
    with pytest.raises(GatewiseError, match="expected a PeftModel"):
        fast_lora(tiny_base("llama"))
    prompted = get_peft_model(tiny_base("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(GatewiseError, match="PROMPT_TUNING"):
        fast_lora(prompted)
    routed = get_peft_model(tiny_base("llama"), gatewise.RoutedLoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(GatewiseError, match="ROUTED_LORA"):
        fast_lora(routed)


def test_copies_and_pickles() -> None:
    model = mixed_model()
    handle = fast_lora(model)
    expected = logits(model, MIXED, prompts(5))
    twin, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    nn.init.zeros_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["all"].weight)
    for one in (twin, restored):
        torch.testing.assert_close(logits(one, MIXED, prompts(5)), expected)
        fast_lora(one).remove()
        assert "_enable_peft_forward_hooks" not in one.base_model.__dict__


# ---- adapters come, change and go ----


def test_adapters_come_and_go(tmp_path: Path) -> None:
    model = mixed_model()
    fast_lora(model)
    for adapter in ("some", "other", "all"):
        model.set_adapter(adapter)
        assert_same(model, None)
    model.add_adapter("new", LoraConfig(r=7, target_modules=["k_proj", "gate_proj"]))
    random_adapter(model)
    model.eval()
    model.set_adapter("new")
    assert_same(model, None)
    assert_same(model, ["all", BASE, "new", "other", "new"])
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    model.delete_adapter("new")
    model.set_adapter("all")
    assert_same(model)
    model.load_adapter(tmp_path / "new", "loaded")
    assert_same(model, ["all", BASE, "loaded", "other", "loaded"])
    with pytest.raises(ValueError, match="non-existing"):
        logits(model, ["new"] * 5, prompts(5))


def test_weights_that_changed_are_read_anew() -> None:
    model = mixed_model()
    fast_lora(model)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.lora_B["some"].weight
    for change in (lambda: weight.data.mul_(3), lambda: setattr(weight, "data", torch.randn_like(weight))):
        before = logits(model, MIXED, prompts(5))
        change()
        assert not torch.equal(before, logits(model, MIXED, prompts(5)))
        assert_same(model)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("some", 0.5)
    assert_same(model)


def test_training_is_peft_s() -> None:
    """With its dropout, its gradients, and weights that a step has changed."""
    model = mixed_model()
    model.set_adapter("all")
    fast_lora(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1)

    def grads() -> list[Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(**prompts(5), labels=prompts(5)["input_ids"]).loss.backward()
        return [one.grad.clone() for one in model.parameters() if one.grad is not None]

    for mode in (True, False):
        model.train(mode)
        theirs, ours = both(model, grads)
        assert len(ours) == 28
        assert all(map(torch.equal, theirs, ours))
    optimizer.step()
    assert_same(model, None)


def test_disabled_and_merged_adapters() -> None:
    model = mixed_model()
    fast_lora(model)
    with model.disable_adapter():
        assert_same(model, None)
    model.disable_adapter_layers()
    for names in (None, MIXED):
        assert_same(model, names)
    model.enable_adapter_layers()
    assert_same(model, None)
    model.merge_adapter(["all"])
    assert_same(model, None)
    with pytest.raises(ValueError, match="merged"):
        logits(model, MIXED, prompts(5))
    model.unmerge_adapter()
    assert_same(model)


# ---- what is not plain LoRA ----

NOT_PLAIN: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "bias on B": {"lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved modules": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "stacked parameters": {"target_parameters": ["mlp.up_proj.weight"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("settings", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_lora_is_peft_s(settings: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(tiny_base("llama"), LoraConfig(**settings), adapter_name="odd")
    model = random_adapter(model).eval()
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name or name.endswith("lora_B.odd.bias") or "modules_to_save" in name or "magnitude" in name:
            nn.init.uniform_(parameter, 0.1, 0.4)
    fast_lora(model)
    assert_same(model, None)
    if "target_parameters" in settings:
        return
    model.add_adapter("plain", LoraConfig(target_modules=["q_proj", "v_proj"]))
    random_adapter(model).eval()
    names = ["odd", BASE if "modules_to_save" in settings else "plain", BASE, "odd", "odd"]
    if "use_dora" in settings:
        with pytest.raises(ValueError, match="DoRA"):
            logits(model, names, prompts(5))
    else:
        assert_same(model, names)
    if "modules_to_save" not in settings:  # PEFT has no saved module for the other adapter
        assert_same(model, ["plain", "plain", BASE, BASE, "plain"])


def test_gates_on_ranks_are_seen() -> None:
    """Scores put hooks on B."""
    model = mixed_model()
    model.set_adapter("all")
    fast_lora(model)
    plain = logits(model, None, prompts(5))
    with GateBank(model) as gates:
        gates.gates[next(iter(gates.layers))] = torch.tensor([0.0, 0.0, 0.0])
        assert not torch.equal(logits(model, None, prompts(5)), plain)


def test_hooks_on_layers_and_on_their_bases_are_called() -> None:
    model = mixed_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda *given: seen.append(given[2]))
    layer.base_layer.register_forward_hook(lambda *given: seen.append(given[2]))
    logits(model, MIXED, prompts(5, 1))
    whole = seen.pop()
    seen.clear()
    with fast_lora(model):
        logits(model, MIXED, prompts(5, 1))
    our_base, our_whole = seen
    torch.testing.assert_close(our_whole, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(our_base, our_whole)  # what the first hook has kept is not written into


def test_layers_with_hooks_of_accelerate() -> None:
    model = mixed_model()
    for layer in model.base_model.model.model.layers:
        add_hook_to_module(layer.mlp.up_proj, ModelHook())
        add_hook_to_module(layer.mlp.down_proj.base_layer, ModelHook())
    for names in (None, MIXED):
        theirs, ours = both(model, lambda names=names: logits(model, names, prompts(5)))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- calls inside of calls, and beside one another ----


class AsksAgain(LogitsProcessor):
    """Calls the model while it generates: bare, with another adapter, with other rows, and with gradients."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        with self.model.disable_adapter():
            scores = scores - 0.1 * self.model(input_ids).logits[:, -1]
        scores = scores - 0.1 * self.model(input_ids).logits[:, -1]
        scores[:2] = scores[:2] - 0.1 * self.model(input_ids[:2], adapter_names=["other", "some"]).logits[:, -1]
        with torch.enable_grad():
            return scores - 0.1 * self.model(input_ids).logits[:, -1].detach()


@pytest.mark.parametrize("names", [None, ["some"] * 5], ids=["active", "by name"])
def test_calls_inside_of_a_call(names: list[str] | None) -> None:
    """PEFT's hooks would give inner calls the outer one's names, so the reference has no names."""
    model = mixed_model()
    model.set_adapter("some")

    def generate(**more: Any) -> Tensor:
        asks = [AsksAgain(model)]
        return model.generate(**prompts(5), max_new_tokens=6, do_sample=False, logits_processor=asks, pad_token_id=0, **more)

    expected = generate()
    with fast_lora(model):
        assert torch.equal(generate(**({} if names is None else {"adapter_names": names})), expected)


def test_calls_beside_one_another() -> None:
    model = mixed_model()
    expected = {name: generation(model, [name] * 5, prompts(5)).sequences for name in ("all", "some", BASE)}
    fast_lora(model)
    wrong: list[str] = []

    def work(name: str) -> None:
        if not torch.equal(generation(model, [name] * 5, prompts(5)).sequences, expected[name]):
            wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
