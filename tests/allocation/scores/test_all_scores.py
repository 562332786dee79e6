"""What every score must keep, whatever it measures."""

import pytest
import torch
from tiny_models import ALL_KINDS, EXPERTS, OTHER_LAYERS

from gatewise.allocation import slots
from gatewise.allocation.scores import NAMES, as_score
from gatewise.scores import ablation, path_integral, random, sensitivity

FEW = ["q_proj", "down_proj"]
"""Of the exact ablation each rank takes two forward passes."""
LOOKING = [name for name in NAMES if name != "random"]
"""The scores that look at the model."""


@pytest.fixture(params=LOOKING)
def score(request):
    return as_score(request.param)


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {}),
        ("llama", {"target_modules": OTHER_LAYERS["llama"], "use_dora": True}),
        ("gpt2", {"target_modules": OTHER_LAYERS["gpt2"], "use_dora": True}),
        ("bert", {"use_dora": True}),
        ("t5", {"target_modules": ["q", "wo"], "use_dora": True}),
        ("mixtral", EXPERTS),
    ],
)
def test_one_finite_number_for_each_live_rank(score, adapted, batch, family, lora):
    model = adapted(family, **lora)
    slots.widen(model, 5)
    layers = slots.lora_layers(model)
    first, second = list(layers)[:2]
    slots.prune(layers[first], "default", [1])
    slots.prune(layers[second], "default", [0, 1, 2])
    got = score(model, batch(family))
    assert list(got) == list(layers)
    assert {path: len(value) for path, value in got.items()} == slots.ranks(model)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("of_batch", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
def test_sounds_are_read_in_the_precision_that_is_scored_in(score, adapted, batch, monkeypatch, kept, of_batch):
    """In training autocast takes float32 sounds, or they are in half precision as the model is; a round has its own precision."""
    monkeypatch.setattr("gatewise.allocation.scoring.has_bfloat16", lambda device: kept)
    data = batch("wav2vec2")
    model = adapted("wav2vec2", target_modules=["q_proj", "out_proj"]).to(torch.bfloat16)
    got = score(model, data | {"input_values": data["input_values"].to(of_batch)})
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(score, adapted, batch, side):
    model, data = adapted(target_modules=FEW), batch(side=side)
    columns = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {}
    for key, value in data.items():
        more = torch.full((len(value), 6), columns[key])
        wider[key] = torch.cat([value, more] if side == "right" else [more, value], dim=1)
    expected, got = score(model, data), score(model, wider)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_order_of_rows_and_of_ranks_changes_nothing(score, adapted, batch):
    model, data = adapted(target_modules=FEW), batch()
    expected = score(model, data)
    got = score(model, {key: value.flip(0) for key, value in data.items()})
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in slots.lora_layers(model).values():
            layer.lora_A["default"].weight.copy_(layer.lora_A["default"].weight.flip(0))
            layer.lora_B["default"].weight.copy_(layer.lora_B["default"].weight.flip(1))
    got = {path: value.flip(0) for path, value in score(model, data).items()}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_a_row_without_labels_counts_for_nothing(score, adapted, batch, settings, monkeypatch):
    """As a text that is cut too short, also where it would be scored alone."""
    monkeypatch.setattr("gatewise.allocation.scoring.step_tokens", lambda *_: 9)
    model, labelled = adapted("llama", target_modules=FEW, **settings), batch()
    rows = {key: torch.cat([value, value[:1]]) for key, value in labelled.items()}
    rows["labels"][-1] = -100
    expected, got = score(model, labelled), score(model, rows)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_model_and_random_state_are_as_they_were(score, adapted, batch):
    model = adapted(target_modules=FEW, lora_dropout=0.3)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    first = score(model, batch())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert wanted == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    second = score(model, batch())  # with dropout on, the two would differ
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_scores_of_a_frozen_adapter_where_the_caller_takes_no_gradients(score, adapted, batch):
    model = adapted(target_modules=FEW)
    expected = score(model, batch())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        got = score(model, batch())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("score", [ablation, path_integral])
def test_several_batches_weigh_by_label(adapted, batch, score):
    model, data = adapted(target_modules=FEW), batch(rows=6)
    parts = [{key: value[rows] for key, value in data.items()} for rows in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(score(model, parts), score(model, data), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", [one for one in map(as_score, LOOKING) if one.idle_is_zero])
def test_a_newborn_rank_scores_zero(adapted, batch, score):
    model, path = adapted(target_modules=FEW), "model.layers.0.mlp.down_proj"
    with torch.no_grad():
        slots.lora_layers(model)[path].lora_B["default"].weight[:, 1] = 0
    scores = score(model, batch())[path]
    assert scores[1] == 0
    assert (scores[[0, 2]] != 0).all()


def reference_sensitivity(model, data):
    """AdaLoRA's eq. 8 with the gate in the place of the singular value, parameter by parameter, from plain autograd."""
    model.eval()
    model.zero_grad()
    model(**data).loss.backward()
    scores = {}
    for path, layer in slots.lora_layers(model).items():
        a, b = slots.factors(layer, "default")
        # B's gradient summed with B is the gradient of a gate on each rank.
        by_a, by_b = slots.by_slot(layer, "default", a * a.grad, b * b.grad)
        scores[path] = by_b.sum(dim=1).abs() + by_a.abs().mean(dim=1) + by_b.abs().mean(dim=1)
    return scores


@pytest.mark.parametrize(("family", "lora"), ALL_KINDS)
def test_sensitivity_is_adaloras(adapted, batch, family, lora):
    model, data = adapted(family, **lora), batch(family)
    torch.testing.assert_close(sensitivity(model, data), reference_sensitivity(model, data), rtol=1e-4, atol=1e-9)


def test_random_gives_every_rank_the_same_chance_whatever_its_module_costs(adapted):
    model = adapted(target_modules=FEW)
    slots.prune(next(iter(slots.lora_layers(model).values())), "default", [1])
    costs = {path: 1 if "q_proj" in path else 50 for path in slots.lora_layers(model)}
    last = [0] * 11
    for seed in range(1100):
        scores = random(model, {}, costs=costs, seed=seed)
        per_cost = torch.cat([values / costs[path] for path, values in scores.items()])
        last[int(per_cost.argmin())] += 1
    assert {path: len(values) for path, values in scores.items()} == slots.ranks(model)
    assert all(abs(count - 100) < 40 for count in last)  # four standard deviations
    again = random(model, {}, costs=costs, seed=1099)
    assert all(torch.equal(values, again[path]) for path, values in scores.items())
