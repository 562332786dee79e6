"""How many tensor operations a step takes: bounded, the same for any number of adapters, and none where no row has an adapter."""

from collections import Counter
from typing import Any

import pytest
import torch
from counted import Operations
from mixed_models import BASE, prompts
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import random_adapter, tiny_base

from gatewise import fast_lora

LAYERS = 2


def adapters(number: int, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Adapters "0", "1", ... on all seven linear modules of the layers."""
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(tiny_base("llama").to(dtype), LoraConfig(**settings), adapter_name="0")
    for name in range(1, number):
        model.add_adapter(str(name), LoraConfig(**settings))
    return random_adapter(model).eval()


def of_a_step(model: PeftModel, names: list[str] | None, rows: int = 4) -> Counter[str]:
    """What one more step of a generation takes beyond the base model alone: longer minus shorter, ours minus the base's."""

    def generation(steps: int, base: bool) -> Counter[str]:
        more = {} if names is None else {"adapter_names": names}
        fixed = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        with Operations() as operations:
            if base:
                with model.disable_adapter():
                    model.generate(**prompts(rows), **fixed)
            else:
                model.generate(**prompts(rows), **fixed, **more)
        return operations.counts

    def step(base: bool) -> Counter[str]:
        longer, shorter = generation(5, base), generation(4, base)
        longer.subtract(shorter)
        return longer

    ours, bare = step(base=False), step(base=True)
    ours.subtract(bare)
    return +ours


def test_one_adapter_takes_two_products_a_module() -> None:
    model = adapters(1)
    with fast_lora(model):
        for names in (None, ["0"] * 4):
            assert of_a_step(model, names) == {"mm": 7 * LAYERS, "addmm_": 7 * LAYERS}


@pytest.mark.parametrize("number", [2, 3, 4])
def test_several_adapters_take_as_many_however_many_they_are(number: int) -> None:
    model = adapters(number)
    names = [str(row % number) for row in range(4)]
    with fast_lora(model):
        assert of_a_step(model, names) == {"mm": 7 * LAYERS, "mul_": 7 * LAYERS, "addmm_": 7 * LAYERS}


def test_very_many_adapters_take_two_batched_products() -> None:
    model = adapters(20, target_modules=["q_proj", "down_proj"])
    with fast_lora(model):
        counts = of_a_step(model, [str(row) for row in range(20)], rows=20)
    assert set(counts) == {"bmm", "baddbmm_"}
    assert set(counts.values()) == {2 * LAYERS}


def test_modules_without_an_adapter_take_nothing() -> None:
    model = adapters(2, target_modules=["q_proj"])
    model.add_adapter("far", LoraConfig(r=2, target_modules=["down_proj"]))
    random_adapter(model).eval()
    with fast_lora(model):
        assert of_a_step(model, [BASE] * 4) == {}
        assert of_a_step(model, ["0", BASE, "1", "0"]) == {"mm": LAYERS, "mul_": LAYERS, "addmm_": LAYERS}
        assert of_a_step(model, [BASE, "far", "far", BASE]) == {"mm": LAYERS, "mul_": LAYERS, "addmm_": LAYERS}
