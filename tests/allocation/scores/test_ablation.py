"""AB-LoRA scores against a brute-force loop written from the paper's formula, without any of the library's machinery."""

import pytest
import torch
from peft import LoraConfig
from tiny_models import ALL_KINDS, OTHER_LAYERS

from gatewise.allocation.slots import factors, live_slots, lora_layers, places, prune, widen
from gatewise.errors import GatewiseError
from gatewise.scores import ablation, taylor


def brute_force(model, batch):
    """CE(M without r) - CE(only r), by zeroing columns of B on the real weights and asking the model for its own loss."""
    model.eval()
    layers = lora_layers(model, "default")
    saved = {b: b.detach().clone() for b in (factors(layer, "default")[1] for layer in layers.values())}

    def loss(kept):
        with torch.no_grad():
            for b in saved:
                b.zero_()
            for path, slot in kept:
                _, (b, dim, column) = places(layers[path], "default", [slot])
                b.index_copy_(dim, column, saved[b].index_select(dim, column))
            return model(**batch).loss.double().item()

    everything = {(path, slot) for path, layer in layers.items() for slot in live_slots(layer, "default")}
    scores = {
        path: torch.tensor([loss(everything - {(path, s)}) - loss({(path, s)}) for s in live_slots(layer, "default")])
        for path, layer in layers.items()
    }
    loss(everything)
    return scores


def spread(scores):
    values = torch.cat(list(scores.values()))
    return (values.max() - values.min()).item()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *ALL_KINDS,
        ("llama", {"use_dora": True}),
        ("llama", {"lora_dropout": 0.5}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": OTHER_LAYERS["llama"], "use_dora": True}),
    ],
)
def test_agrees_with_brute_force(adapted, batch, family, settings):
    model, data = adapted(family, **settings), batch(family)
    expected = brute_force(model, data)
    got = ablation(model, data)
    assert got.keys() == expected.keys()
    for path in expected:
        torch.testing.assert_close(got[path].double(), expected[path].double(), rtol=0, atol=1e-4 * spread(expected))


def test_a_second_active_adapter_stays_on(adapted, batch):
    model, data = adapted(), batch()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    expected, got = brute_force(model, data), ablation(model, data, adapter="default")
    for path in expected:
        torch.testing.assert_close(got[path].double(), expected[path].double(), rtol=0, atol=1e-4 * spread(expected))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_dead_slots(adapted, batch, side):
    model, data = adapted(), batch(side=side)
    widen(model, 6)
    layers = lora_layers(model)
    prune(layers["model.layers.0.self_attn.q_proj"], "default", [1])
    prune(layers["model.layers.1.mlp.up_proj"], "default", [0, 1, 2])
    expected = brute_force(model, data)
    got = ablation(model, data)
    assert len(got["model.layers.0.self_attn.q_proj"]) == 2
    assert len(got["model.layers.1.mlp.up_proj"]) == 0
    for path in expected:
        torch.testing.assert_close(got[path].double(), expected[path].double(), rtol=0, atol=1e-4 * spread(expected))


def test_several_batches_weigh_by_label(adapted, batch):
    model, data = adapted(), batch(rows=6)
    parts = [{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}]
    whole, split = ablation(model, data), ablation(model, parts)
    for path in whole:
        torch.testing.assert_close(split[path], whole[path], rtol=0, atol=1e-4 * spread(whole))


def test_first_order_is_the_limit_of_small_adapters(adapted, batch):
    model, data = adapted(trained=False), batch()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-2)
    model.double()
    exact, first = ablation(model, data), taylor(model, data)
    for path in exact:
        torch.testing.assert_close(first[path], exact[path], rtol=0, atol=1e-2 * spread(exact))


def test_screened_prunes_what_exact_prunes_near_the_cut(adapted, batch):
    model, data = adapted(), batch()
    exact = torch.cat(list(ablation(model, data).values()))
    count = len(exact) // 4
    screened = torch.cat(list(ablation(model, data, mode="screened", prune=count, max_exact=len(exact)).values()))
    torch.testing.assert_close(screened, exact)
    nearest = torch.cat(list(ablation(model, data, mode="screened", prune=count, max_exact=4).values()))
    assert (torch.isclose(nearest, exact, rtol=0, atol=1e-6)).sum() >= 4


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_with_costs_screened_ablates_near_the_cut_by_score_per_cost(adapted, batch, share):
    """Scores counted from a rank that does nothing, by cost: the reference looks for the cut one rank at a time."""
    model, data = adapted(), batch()
    layers = lora_layers(model)
    ranks = [(path, slot) for path, layer in layers.items() for slot in live_slots(layer, "default")]
    costs = {path: 1 + 7 * index % 5 for index, path in enumerate(layers)}
    exact, first = (torch.cat(list(scores.values())).double() for scores in (ablation(model, data), taylor(model, data)))
    with torch.no_grad():
        model.eval()
        on = model(**data).loss.item()
        with model.disable_adapter():
            off = model(**data).loss.item()
    worth = [(float(first[i]) - (on - off)) / costs[path] for i, (path, _) in enumerate(ranks)]
    wanted, order = int(share * sum(costs[path] for path, _ in ranks)), sorted(range(len(ranks)), key=worth.__getitem__)
    number = 0
    while sum(costs[ranks[i][0]] for i in order[:number]) < wanted:
        number += 1
    middle = (worth[order[number - 1]] + worth[order[number]]) / 2
    near = sorted(range(len(ranks)), key=lambda i: abs(worth[i] - middle) * costs[ranks[i][0]])[:6]
    got = torch.cat(list(ablation(model, data, mode="screened", prune=wanted, max_exact=6, costs=costs).values())).double()
    expected = first + (exact[near] - first[near]).median()
    expected[near] = exact[near]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_model_is_as_it_was(adapted, batch):
    model = adapted(lora_dropout=0.3)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    for mode in ("exact", "screened"):
        ablation(model, batch(), mode=mode)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_half_precision_weights_are_scored_in_float32_and_come_back(adapted, batch):
    model = adapted().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    got = ablation(model, batch())
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = ablation(model.float(), batch())
    for path in expected:
        torch.testing.assert_close(got[path], expected[path])


def test_progress_and_bad_input(adapted, batch):
    model, seen = adapted(), []
    ablation(model, batch(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * 7 * 3
    assert seen == sorted(seen)
    with pytest.raises(GatewiseError, match="'quick' is not known"):
        ablation(model, batch(), mode="quick")
    with pytest.raises(GatewiseError, match="no 'labels'"):
        ablation(model, {k: v for k, v in batch().items() if k != "labels"})
