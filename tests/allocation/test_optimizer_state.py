"""What an optimiser keeps of a rank: grown ranks take steps as large as a new adapter's, and pruned ones stay dead."""

import bitsandbytes as bnb
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from tiny_models import EXPERTS
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, NAdam, RMSprop
from transformers.optimization import Adafactor

from gatewise.allocation import slots

PATH = "model.layers.0.mlp.up_proj"
RATE = 1e-3
ADAFACTOR = {"relative_step": False, "scale_parameter": False}


def gradients(step, layer):
    """Of A and B, noisy around a mean, of very different size from row to row. Dead slots have none."""
    generator = torch.Generator().manual_seed(step)
    live = slots.live_mask(layer, "default")
    for parameter, mask in zip(slots.factors(layer, "default"), (live[:, None], live[None]), strict=True):
        noise = torch.randn(parameter.shape, generator=generator) + 0.3
        along = torch.logspace(-1, 1, parameter.shape[1]) * mask
        yield 1e-3 * noise * along


def step(optimizer, parameters, grads, rate=RATE):
    """One step of an optimiser, at a learning rate, on gradients given."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()


def moves(parameters, before, slot):
    """How far a slot's row of A and column of B moved, in learning rates."""
    (a, b), (old_a, old_b) = parameters, before
    return torch.cat([(a - old_a).detach()[slot].flatten(), (b - old_b).detach()[:, slot].flatten()]) / RATE


@pytest.fixture
def trained(adapted):
    """trained(class, options, steps) -> a LoRA layer of five slots, 1 and 4 dead, and its optimiser, after so many steps."""

    def make(kind, options, steps=300, targets=("up_proj",)):
        model = adapted(target_modules=list(targets))
        slots.widen(model, 5)
        layer = next(iter(slots.lora_layers(model).values()))
        optimizer = kind(slots.factors(layer, "default"), lr=RATE, **options)
        for number in range(steps):
            step(optimizer, slots.factors(layer, "default"), gradients(number, layer))
            if number == steps // 2:
                slots.prune(layer, "default", [1, 4], optimizer)
        return layer, optimizer

    return make


@pytest.fixture
def grown_and_fresh(trained):
    """grown_and_fresh(class, options) -> moves of a rank in its first hundred steps: grown after 300 steps, and in a new adapter.

    The new adapter has the same weights and sees the same gradients; its optimiser is new. The learning rate falls.
    """

    def make(kind, options, **of):
        layer, optimizer = trained(kind, options, **of)
        assert slots.grow(layer, "default", 1, torch.Generator().manual_seed(0), optimizer) == [1]
        parameters = slots.factors(layer, "default")
        copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        fresh = kind(copies, lr=RATE, **options)
        found = []
        for number in range(300, 400):
            grads, rate = list(gradients(number, layer)), RATE * (1 - (number - 300) / 200)
            before, before_copies = ([one.detach().clone() for one in both] for both in (parameters, copies))
            step(optimizer, parameters, grads, rate)
            step(fresh, copies, grads, rate)
            found.append((moves(parameters, before, 1), moves(copies, before_copies, 1)))
        return (torch.stack(one) for one in zip(*found, strict=True))

    return make


def test_lora_fa_which_keeps_b_by_name_forgets_a_pruned_rank_and_starts_a_grown_one_as_the_others(adapted):
    model = adapted(target_modules=["0.mlp.up_proj"])
    slots.widen(model, 5)
    layer = next(iter(slots.lora_layers(model).values()))
    optimizer = create_lorafa_optimizer(model, r=5, lora_alpha=10, lr=RATE)
    for number in range(10):
        step(optimizer, slots.factors(layer, "default"), gradients(number, layer))
    (state,) = optimizer.state.values()
    assert (state["exp_avg_B"][:, 1] != 0).any()
    slots.prune(layer, "default", [1], optimizer)
    assert not any(state[name][:, 1].any() for name in ("exp_avg_B", "exp_avg_sq_B"))
    mean = state["exp_avg_sq_B"][:, [0, 2]].mean(dim=1)
    assert slots.grow(layer, "default", 1, torch.Generator().manual_seed(0), optimizer) == [1]
    assert torch.equal(state["exp_avg_sq_B"][:, 1], mean)


@pytest.mark.parametrize(
    ("kind", "options"), [(SGD, {"momentum": 0.9}), (RMSprop, {"momentum": 0.9, "centered": True}), (Adagrad, {}), (Adadelta, {})]
)
def test_an_optimiser_that_counts_no_steps_gives_a_grown_rank_those_of_a_new_adapter(grown_and_fresh, kind, options):
    grown, fresh = grown_and_fresh(kind, options)
    assert fresh.abs().amax(1).min() > 0
    torch.testing.assert_close(grown, fresh, rtol=1e-4, atol=3e-4 * float(fresh.abs().max()))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {"weight_decay": 0.1}),
        (AdamW, {"fused": True}),
        (Adam, {"amsgrad": True}),
        (NAdam, {}),
        (Adafactor, ADAFACTOR),
        (Adafactor, {**ADAFACTOR, "beta1": 0.9}),
        ("torch's Adafactor", {}),
    ],
)
@pytest.mark.parametrize("targets", [("up_proj",), ("embed_tokens",)])
def test_one_that_counts_steps_starts_a_grown_rank_no_faster_than_a_new_adapter(grown_and_fresh, kind, options, targets):
    """With a state of zeros Adam would take steps of up to five learning rates."""
    if isinstance(kind, str):
        kind = pytest.importorskip("torch.optim._adafactor").Adafactor
    grown, fresh = grown_and_fresh(kind, options, targets=targets)
    assert grown.abs().mean(1).max() < 1.2 * fresh.abs().mean(1).max()
    assert grown.abs().mean() > 0.4 * fresh.abs().mean()


def test_a_module_without_a_live_rank_starts_anew(trained):
    """There is no live rank to take a mean of. NAdam would take steps of nine learning rates."""
    layer, optimizer = trained(NAdam, {})
    slots.prune(layer, "default", [0, 2], optimizer)
    slots.grow(layer, "default", 1, torch.Generator().manual_seed(0), optimizer)
    parameters = slots.factors(layer, "default")
    before = [one.detach().clone() for one in parameters]
    step(optimizer, parameters, gradients(300, layer))
    assert moves(parameters, before, 0).abs().max() < 1.1


def test_an_expert_without_a_live_rank_starts_at_the_mean_of_its_fellows(adapted):
    """Its rows are some of a parameter's: what the optimiser keeps of the others must not be lost with them."""
    model = adapted("mixtral", **EXPERTS)
    layers = slots.lora_layers(model)
    first, second, third = (layers[f"model.layers.0.mlp.experts.down_proj[{number}]"] for number in range(3))
    parameters = slots.factors(first, "default")
    optimizer = NAdam(parameters, lr=RATE)
    step(optimizer, parameters, [torch.randn_like(parameter) for parameter in parameters])
    slots.prune(first, "default", [0, 1, 2], optimizer)
    kept = [{key: optimizer.state[one][key].clone() for key in ("exp_avg", "exp_avg_sq")} for one in parameters]
    slots.grow(first, "default", 1, torch.Generator().manual_seed(0), optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        now = [optimizer.state[one][key] for one in parameters]
        was = [one[key] for one in kept]
        for expert in (second, third):
            for new, old in zip(slots.by_slot(expert, "default", *now), slots.by_slot(expert, "default", *was), strict=True):
                assert torch.equal(new, old)
        fellows = [torch.cat(both) for both in zip(*(slots.by_slot(one, "default", *was) for one in (second, third)), strict=True)]
        for new, others in zip(slots.by_slot(first, "default", *now), fellows, strict=True):
            expected = others.mean(dim=0) if key == "exp_avg_sq" else torch.zeros_like(others[0])
            torch.testing.assert_close(new[0], expected)
            assert (new[1:] == 0).all()


def test_a_grown_rank_has_nothing_of_a_state_of_two_averages(trained):
    layer, optimizer = trained(bnb.optim.AdEMAMix, {}, steps=4)
    slots.prune(layer, "default", [0], optimizer)
    (slot,) = slots.grow(layer, "default", 1, torch.Generator().manual_seed(0), optimizer)
    for of_b, factor in enumerate(slots.factors(layer, "default")):
        state = optimizer.state.get(factor, {}).get("state1", torch.zeros(2, *factor.shape))
        assert not state.select(2 if of_b else 1, slot).any()
