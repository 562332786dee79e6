"""Slots on real PEFT layers: widening, pruning and growing change nothing they should not, and compacting loads in stock PEFT."""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import EXPERTS, OTHER_LAYERS, load_in_peft, logits_of, tiny_base

from gatewise.adapters.export import to_lora
from gatewise.allocation import slots
from gatewise.errors import GatewiseError
from gatewise.inspection import read_budget


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 5, "query": 5}}])
def test_widening_changes_nothing(adapted, batch, family, settings):
    model, data = adapted(family, **settings), batch(family)
    before, scaling = logits_of(model, data), {p: layer.scaling["default"] for p, layer in slots.lora_layers(model).items()}
    ranks = slots.ranks(model)
    capacity = slots.widen(model)
    assert torch.equal(logits_of(model, data), before) or torch.allclose(logits_of(model, data), before, atol=1e-6)
    assert capacity == {path: 2 * r for path, r in ranks.items()}
    assert slots.ranks(model) == ranks
    assert {p: layer.scaling["default"] for p, layer in slots.lora_layers(model).items()} == scaling


def test_a_dead_slot_gets_no_gradient_and_stays_dead(adapted, batch):
    model = adapted()
    slots.widen(model, 5)
    layers = slots.lora_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    path = "model.layers.0.mlp.up_proj"
    for step in range(4):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        for layer in layers.values():
            dead = ~slots.live_mask(layer, "default")
            assert (layer.lora_A["default"].weight.grad[dead] == 0).all()
            assert (layer.lora_B["default"].weight.grad[:, dead] == 0).all()
        optimizer.step()
        if step == 1:
            slots.prune(layers[path], "default", [0, 2], optimizer)
        if step >= 1:
            assert slots.live_slots(layers[path], "default") == [1]
    assert slots.live_slots(layers["model.layers.1.mlp.up_proj"], "default") == [0, 1, 2]


def test_pruning_is_the_gate_at_zero(adapted, batch):
    model = adapted()
    layer = slots.lora_layers(model)["model.layers.0.self_attn.v_proj"]
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    x = torch.randn(4, a.shape[1])
    expected = layer.base_layer(x) + 2.0 * sum(torch.outer(x @ a[i], b[:, i]) for i in (0, 2))
    slots.prune(layer, "default", [1])
    torch.testing.assert_close(layer(x), expected)


def test_growing_keeps_the_function(adapted, batch):
    """What the optimiser keeps of the slots: test_optimizer_state.py."""
    model = adapted()
    slots.widen(model, 6)
    layer = slots.lora_layers(model)["model.layers.0.mlp.down_proj"]
    slots.prune(layer, "default", [1])
    before = logits_of(model, batch())
    new = slots.grow(layer, "default", 2, torch.Generator().manual_seed(5))
    assert new == [1, 3]
    assert torch.equal(logits_of(model, batch()), before)
    a, b = slots.factors(layer, "default")
    assert (b[:, new] == 0).all()
    assert (a[new] != 0).all()
    assert a[new].abs().max() <= 1 / math.sqrt(a.shape[1])
    again = slots.grow(layer, "default", 1, torch.Generator().manual_seed(5))
    assert torch.equal(a[again[0]], a[1])  # the same generator draws the same row
    with pytest.raises(ValueError, match="only 1 dead slots"):
        slots.grow(layer, "default", 2, torch.Generator())


COMPACTED = [
    *((family, {}) for family in ("llama", "gpt2", "bert", "t5", "bart")),
    ("t5", {"target_modules": ["shared", "q"]}),
    ("gpt2", {"target_modules": OTHER_LAYERS["gpt2"]}),
    ("bart", {"target_modules": ["embed_tokens", "q_proj"]}),
]


@pytest.mark.parametrize(("family", "targets"), COMPACTED)
@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}, {"lora_alpha": 5}])
def test_compacted_loads_in_stock_peft(adapted, batch, tmp_path, family, targets, settings):
    model, data = adapted(family, **targets, **settings), batch(family)
    slots.widen(model, 7)
    layers = slots.lora_layers(model)
    paths = list(layers)
    slots.prune(layers[paths[0]], "default", [0, 1, 2])  # all of it
    slots.prune(layers[paths[1]], "default", [1])
    slots.grow(layers[paths[2]], "default", 3, torch.Generator().manual_seed(1))
    for own in slots.by_slot(layers[paths[2]], "default", *(one.data for one in slots.factors(layers[paths[2]], "default"))):
        own[3:6] = torch.randn(3, own.shape[1])
    expected = logits_of(model, data)
    kept = slots.compact(model)
    dora = settings.get("use_dora", False)
    assert kept.get(paths[0]) == (1 if dora else None)
    assert [kept[path] for path in paths[1:]] == [2, 6, *[3] * (len(paths) - 3)]
    torch.testing.assert_close(logits_of(model, data), expected, rtol=1e-5, atol=3e-5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6
    scaling = settings.get("lora_alpha", 6) / (3**0.5 if settings.get("use_rslora") else 3)
    assert config["lora_alpha"] / config["r"] == pytest.approx(scaling)
    loaded = load_in_peft(family, tmp_path)
    assert set(slots.lora_layers(loaded)) == set(kept)
    torch.testing.assert_close(logits_of(loaded, data), expected, rtol=1e-5, atol=3e-5)
    if (family, targets) == ("bart", COMPACTED[-1][1]):
        return  # encoder, decoder and head share one table, which PEFT would merge into
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, data), expected, rtol=1e-4, atol=1e-4)


def test_pattern_keys_match_one_module_only(adapted, tmp_path):
    """Layer 1 must not catch layer 11, and the dot of a path is no wildcard."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_hidden_layers=12, **sizes))

    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"]))
    layers = slots.lora_layers(model)
    slots.prune(layers["model.layers.1.self_attn.q_proj"], "default", [0, 1])
    slots.prune(layers["model.layers.0.self_attn.q_proj"], "default", [0])
    expected = slots.compact(model)
    model.save_pretrained(tmp_path)
    assert slots.ranks(PeftModel.from_pretrained(base(), tmp_path)) == {p: r for p, r in expected.items() if p in expected}
    assert expected["model.layers.11.self_attn.q_proj"] == 4


def test_refusals(adapted):
    model = adapted()
    with pytest.raises(GatewiseError, match="no adapter named 'x'; it has 'default'"):
        slots.lora_layers(model, "x")
    with pytest.raises(GatewiseError, match="expected a PeftModel"):
        slots.ranks(torch.nn.Linear(2, 2))
    for layer in slots.lora_layers(model).values():
        slots.prune(layer, "default", [0, 1, 2])
    with pytest.raises(GatewiseError, match="no live rank left"):
        slots.compact(model)


def test_two_adapters_each_lose_a_module(adapted, batch, tmp_path):
    """Each ends with the modules that are its own, also when both lose the same one, and leaves the other alone."""
    model = adapted(target_modules=["q_proj", "down_proj"])
    model.add_adapter("mine", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lost = "model.layers.0.self_attn.q_proj"
    model.set_adapter("default")
    before = {"default": logits_of(model, batch())}
    model.set_adapter("mine")
    before["mine"] = logits_of(model, batch())
    for name, rest in (("mine", ("q_proj", "v_proj")), ("default", ("q_proj", "down_proj"))):
        model.set_adapter(name)
        torch.testing.assert_close(logits_of(model, batch()), before[name])
        layers = slots.lora_layers(model)
        slots.prune(layers[lost], name, range(len(slots.live_slots(layers[lost], name))))
        expected = logits_of(model, batch())
        slots.compact(model)
        torch.testing.assert_close(logits_of(model, batch()), expected)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        loaded = load_in_peft("llama", tmp_path / ("" if name == "default" else name))
        torch.testing.assert_close(logits_of(loaded, batch()), expected)
        assert {path.rsplit(".", 1)[1] for path in slots.ranks(loaded)} == set(rest)
        assert lost not in slots.ranks(loaded)


@pytest.mark.parametrize("family", OTHER_LAYERS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_ranks_of_embeddings(adapted, batch, family, settings):
    """Widened, pruned and grown: the function is what the weights by hand say."""
    model, data = adapted(family, target_modules=OTHER_LAYERS[family], **settings), batch(family)
    before = logits_of(model, data)
    assert set(slots.widen(model, 5).values()) == {5}
    torch.testing.assert_close(logits_of(model, data), before)
    layer = next(iter(slots.lora_layers(model).values()))
    slots.prune(layer, "default", [1])
    a, b = slots.factors(layer, "default")
    if not settings:
        assert slots.live_slots(layer, "default") == [0, 2]
        torch.testing.assert_close(b.detach() @ a.detach() * 2.0, layer.get_delta_weight("default").T)
    pruned = logits_of(model, data)
    assert not torch.allclose(pruned, before)
    assert slots.grow(layer, "default", 2, torch.Generator().manual_seed(5)) == [1, 3]
    torch.testing.assert_close(logits_of(model, data), pruned)
    assert (a[[1, 3]] == 0).all()
    assert (b[:, [1, 3]] != 0).all()
    assert (b[:, 4] == 0).all()


def test_layers_that_share_their_factors_are_refused():
    base = tiny_base("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM")
    with pytest.raises(GatewiseError, match="share their LoRA factors"):
        slots.check_movable(get_peft_model(base, config), "default")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_expert_has_ranks_of_its_own(adapted, batch, family):
    model, data = adapted(family, **EXPERTS), batch(family)
    before = logits_of(model, data)
    layers = slots.lora_layers(model)
    experts = 3 if family == "mixtral" else 4
    path = "model.layers.1.mlp.experts.down_proj"
    assert sum(one.startswith(path) for one in layers) == experts
    assert slots.widen(model, 5) == dict.fromkeys(layers, 5)
    torch.testing.assert_close(logits_of(model, data), before, rtol=1e-5, atol=1e-5)
    assert set(slots.ranks(model).values()) == {3}
    wrapper = layers[f"{path}[1]"].layer
    change = wrapper.get_delta_weight("default").detach()  # (experts, d_out, d_in)
    lost = layers[f"{path}[1]"]
    rows, columns = slots.by_slot(lost, "default", *(factor.detach() for factor in slots.factors(lost, "default")))
    torch.testing.assert_close(2.0 * columns.T @ rows, change[1])
    expected = change.clone()
    expected[1] -= 2.0 * torch.outer(columns[2], rows[2])
    slots.prune(lost, "default", [2])
    torch.testing.assert_close(wrapper.get_delta_weight("default").detach(), expected)
    assert {one: slots.live_slots(layer, "default") for one, layer in layers.items() if one.startswith(path)} == {
        f"{path}[{number}]": [0, 1] if number == 1 else [0, 1, 2] for number in range(experts)
    }
    assert slots.grow(layers[f"{path}[0]"], "default", 2, torch.Generator().manual_seed(5)) == [3, 4]
    torch.testing.assert_close(wrapper.get_delta_weight("default").detach(), expected)
    assert [slots.ranks(model)[f"{path}[{number}]"] for number in range(3)] == [5, 2, 3]
    grown, _ = slots.by_slot(layers[f"{path}[0]"], "default", *slots.factors(layers[f"{path}[0]"], "default"))
    assert (grown[3:] != 0).all()
    assert grown[3:].abs().max() <= grown.shape[1] ** -0.5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_compacted_experts_load_in_stock_peft(adapted, batch, tmp_path, family, settings):
    """At the rank of the expert that has most; a parameter without a rank keeps a zero one."""
    model, data = adapted(family, **EXPERTS, **settings), batch(family)
    slots.widen(model, 6)
    layers = slots.lora_layers(model)
    up, down, q = (
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.self_attn.q_proj",
    )
    slots.prune(layers[f"{up}[0]"], "default", [0])
    slots.prune(layers[f"{up}[2]"], "default", [0, 1, 2])
    slots.grow(layers[f"{up}[1]"], "default", 2, torch.Generator().manual_seed(1))
    for own in slots.by_slot(layers[f"{up}[1]"], "default", *(one.data for one in slots.factors(layers[f"{up}[1]"], "default"))):
        own[3:5] = torch.randn(2, own.shape[1])
    for one, layer in layers.items():
        if one.startswith(down):
            slots.prune(layer, "default", [0, 1, 2])
    slots.prune(layers[q], "default", [0, 1, 2])
    expected, live = logits_of(model, data), slots.ranks(model)
    model.save_pretrained(tmp_path / "checkpoint")
    kept = slots.compact(model)
    assert {kept[one] for one in kept if one.startswith(up)} == {5}
    assert {kept[one] for one in kept if one.startswith(down)} == {1}
    assert q not in kept
    assert slots.ranks(model) == {one: rank for one, rank in live.items() if one != q}
    torch.testing.assert_close(logits_of(model, data), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "compact")
    to_lora(tmp_path / "checkpoint", tmp_path / "exported")
    to_lora(tmp_path / "checkpoint", tmp_path / "padded", padded=True)
    to_lora(tmp_path / "checkpoint", tmp_path / "wide", padded=True, rank=8)
    for name in ("checkpoint", "compact", "exported", "padded", "wide"):
        loaded = load_in_peft(family, tmp_path / name)
        torch.testing.assert_close(logits_of(loaded, data), expected, rtol=1e-5, atol=1e-5)
        if name not in ("checkpoint", "wide"):  # which have the module that lost all its ranks, at zero
            assert slots.ranks(loaded) == slots.ranks(model)
        if name in ("compact", "exported"):
            capacity = {one: slots.capacity(layer, "default") for one, layer in slots.lora_layers(loaded).items()}
            assert capacity == kept
        found = read_budget(tmp_path / name)
        assert found.rank == sum(live.values())
        assert found.ranks[up] == sum(rank for one, rank in live.items() if one.startswith(up))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, data), expected, rtol=1e-4, atol=1e-4)


OF_PRODUCTS = ("svd", "cat", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@pytest.mark.parametrize(("padded", "kinds"), [(False, OF_PRODUCTS), (True, (*OF_PRODUCTS, *OF_FACTORS))])
def test_weighted_sums_of_allocated_adapters_load_again(adapted, batch, tmp_path, padded, kinds):
    """PEFT leaves the ranks of modules out of the config where it adds factors up: those adapters must be padded first."""
    for name in ("a", "b"):
        model = adapted(r=4)
        slots.prune(next(iter(slots.lora_layers(model).values())), "default", [0, 2])
        slots.compact(model)
        to_lora(model, tmp_path / name, padded=padded, rank=6 if padded else None)
    for kind in kinds:
        both = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "a", adapter_name="a")
        both.load_adapter(tmp_path / "b", "b")
        both.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type=kind, density=0.5)
        both.set_adapter("sum")
        expected = logits_of(both, batch())
        both.save_pretrained(tmp_path / kind, selected_adapters=["sum"])
        loaded = PeftModel.from_pretrained(both.unload(), tmp_path / kind / "sum")
        torch.testing.assert_close(logits_of(loaded, batch()), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_one_parameter_and_a_parameter_that_is_no_stack(adapted, batch, tmp_path):
    model, data = adapted("llama", target_modules=[], target_parameters=["q_proj.weight"]), batch()
    assert list(slots.lora_layers(model)) == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    slots.widen(model, 4)
    slots.prune(slots.lora_layers(model)["model.layers.0.self_attn.q_proj.weight"], "default", [1])
    expected = logits_of(model, data)
    assert slots.compact(model) == {f"model.layers.{layer}.self_attn.q_proj.weight": rank for layer, rank in ((0, 2), (1, 3))}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load_in_peft("llama", tmp_path), data), expected)
