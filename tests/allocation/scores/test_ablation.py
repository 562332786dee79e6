"""AB-LoRA scores against a brute-force loop written from the paper's formula, without any of the library's machinery."""

import pytest
import torch
from peft import LoraConfig
from tiny_models import EXPERTS, OTHER_LAYERS

from gatewise.allocation.slots import by_slot, factors, live_slots, lora_layers, prune, widen
from gatewise.errors import GatewiseError
from gatewise.scores import ablation, taylor


def brute_force(model, batch):
    """CE(M without r) - CE(only r), by zeroing columns of B on the real weights and asking the model for its own loss."""
    model.eval()
    layers = lora_layers(model, "default")
    columns = {path: by_slot(layer, "default", *(f.data for f in factors(layer, "default")))[1] for path, layer in layers.items()}
    saved = {path: own.clone() for path, own in columns.items()}

    def loss(kept):
        with torch.no_grad():
            for own in columns.values():
                own.zero_()
            for path, slot in kept:
                columns[path][slot] = saved[path][slot]
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


def assert_agrees_with_brute_force(model, data):
    expected, got = brute_force(model, data), ablation(model, data, adapter="default")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * spread(expected))
    return got


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("bert", {}),
        ("t5", {"target_modules": ["q", "wo"]}),
        *((family, {"target_modules": targets}) for family, targets in OTHER_LAYERS.items()),
        ("mixtral", EXPERTS),
        ("llama", {"use_dora": True}),
        ("llama", {"lora_dropout": 0.5}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": OTHER_LAYERS["llama"], "use_dora": True}),
    ],
)
def test_agrees_with_brute_force(adapted, batch, family, settings):
    assert_agrees_with_brute_force(adapted(family, **settings), batch(family))


def test_a_second_active_adapter_stays_on(adapted, batch):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_agrees_with_brute_force(model, batch())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_and_dead_slots(adapted, batch, side):
    model = adapted()
    widen(model, 6)
    layers = lora_layers(model)
    prune(layers["model.layers.0.self_attn.q_proj"], "default", [1])
    prune(layers["model.layers.1.mlp.up_proj"], "default", [0, 1, 2])
    got = assert_agrees_with_brute_force(model, batch(side=side))
    assert len(got["model.layers.0.self_attn.q_proj"]) == 2
    assert len(got["model.layers.1.mlp.up_proj"]) == 0


def test_first_order_is_the_limit_of_small_adapters(adapted, batch):
    model, data = adapted(trained=False), batch()
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-2)
    model.double()
    exact, first = ablation(model, data), taylor(model, data)
    torch.testing.assert_close(first, exact, rtol=0, atol=1e-2 * spread(exact))


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


def test_progress_and_bad_input(adapted, batch):
    model, seen = adapted(), []
    ablation(model, batch(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * 7 * 3
    assert seen == sorted(seen)
    with pytest.raises(GatewiseError, match="'quick' is not known"):
        ablation(model, batch(), mode="quick")
    with pytest.raises(GatewiseError, match="no 'labels'"):
        ablation(model, {k: v for k, v in batch().items() if k != "labels"})
