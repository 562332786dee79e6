"""The singular basis: the same function, ranks that are singular directions, for every kind of LoRA layer."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model
from tiny_models import ALL_KINDS, random_adapter, tiny_base

from gatewise.allocation.slots import by_slot, factors, live_slots, lora_layers
from gatewise.compress.basis import to_singular_basis


def updates(model: Any) -> dict[str, torch.Tensor]:
    """Path -> scaling * (B A)^T, flattened over kernels, in float64."""
    found = {}
    for path, layer in lora_layers(model, "default").items():
        rows, columns = by_slot(layer, "default", *(factor.detach().double() for factor in factors(layer, "default")))
        found[path] = layer.scaling["default"] * rows.T @ columns
    return found


@pytest.mark.parametrize(("family", "settings"), ALL_KINDS, ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_the_function_stays_and_ranks_are_singular_directions(family: str, settings: dict[str, Any], dora: bool) -> None:
    if dora and "target_parameters" in settings:
        pytest.skip("PEFT has no DoRA on parameters")
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, use_dora=dora, **{"target_modules": "all-linear", **settings})
    model = random_adapter(get_peft_model(tiny_base(family), config)).eval()
    before = updates(model)
    to_singular_basis(model)
    after = updates(model)
    for path, update in before.items():
        torch.testing.assert_close(after[path], update, atol=1e-6, rtol=1e-5)
        layer = lora_layers(model, "default")[path]
        rows, columns = by_slot(layer, "default", *(factor.detach().double() for factor in factors(layer, "default")))
        sizes = torch.linalg.svdvals(update)[:3] / layer.scaling["default"]
        wanted = torch.diag(torch.cat([sizes, sizes.new_zeros(3 - len(sizes))]))
        for factor in (rows, columns):  # orthogonal, and half of each direction's size
            torch.testing.assert_close(factor @ factor.T, wanted, atol=1e-5, rtol=1e-4)


def test_ranks_that_add_nothing_become_dead_slots_behind_the_others() -> None:
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(tiny_base("llama"), LoraConfig(r=20, target_modules=["q_proj", "down_proj"])))
    layers = lora_layers(model, "default")
    path = "model.layers.0.self_attn.q_proj"
    a, b = factors(layers[path], "default")
    with torch.no_grad():
        a[1] = a[0]  # ranks 0 and 1 are one
        a[5:], b[:, 5:] = 0, 0
    to_singular_basis(model)
    assert live_slots(layers[path], "default") == [0, 1, 2, 3]
    # The module has 16 outputs: of 20 ranks no more than that are its own.
    assert live_slots(layers["model.layers.1.self_attn.q_proj"], "default") == list(range(16))


def test_what_peft_converts_to_is_a_part_of_the_singular_basis() -> None:
    """So the order "even" of benchmarks/compress.py is PEFT's ``convert_to_lora``."""
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(tiny_base("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])))
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        _, state = convert_to_lora(model, 2)
    to_singular_basis(model)
    for path, layer in lora_layers(model, "default").items():
        rows, columns = by_slot(layer, "default", *(factor.detach() for factor in factors(layer, "default")))
        wanted = layer.scaling["default"] * rows[:2].T @ columns[:2]
        a, b = (state[f"base_model.model.{path}.lora_{name}.weight"] for name in "AB")
        assert len(a) == 2
        torch.testing.assert_close(a.T @ b.T, wanted, atol=1e-5, rtol=1e-4)
