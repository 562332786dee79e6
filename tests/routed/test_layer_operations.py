"""How many tensor operations a step takes beyond the base model's: none for a module that no row keeps, at most six for others.

A product with A, one with the gates where rows differ in them, one with B, and the sum; in half precision on a CPU also a cast
before and one after them. However many adapters the batch has. In bfloat16 on a CPU Numba makes one call of them, which is none of
PyTorch's operations.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from counted import Operations
from peft import PeftModel, get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter

from gatewise.routed.layer import KeptModule
from gatewise.serving import products

LAYERS = 2


def adapters(number: int, k: int, **settings: Any) -> PeftModel:
    """Adapters "0", "1", ..., in bfloat16 with A and B in float32."""
    model = get_peft_model(routed_base("llama").to(torch.bfloat16), routed_config(top_k=k, **settings), adapter_name="0")
    for name in range(1, number):
        model.add_adapter(str(name), routed_config(top_k=k, **settings))
    return trained_routers(random_adapter(model)).eval()


def of_a_step(model: PeftModel, rows: int, names: list[str] | None = None) -> Counter[str]:
    """What one more step of a generation takes beyond the base model alone: longer minus shorter, ours minus the base's."""
    ids = torch.randint(1, 60, (rows, 8), generator=torch.Generator().manual_seed(3))

    def step(model: Any, more: dict[str, Any]) -> Counter[str]:
        counts = []
        for steps in (6, 5):
            fixed = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
            with Operations() as operations:
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **more)
            counts.append(operations.counts)
        counts[0].subtract(counts[1])
        return counts[0]

    ours = step(model, {} if names is None else {"adapter_names": names})
    ours.subtract(step(routed_base("llama").to(torch.bfloat16).eval(), {}))
    assert all(count >= 0 for count in ours.values())
    return +ours


def kept(model: PeftModel) -> int:
    """How many modules any row keeps."""
    return int((model.routing().gates > 0).any(dim=0).sum())


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "step_of", lambda *_: None)


@pytest.mark.usefixtures("no_numba")
@pytest.mark.parametrize("k", [1, 3, 7])
def test_one_row_takes_two_products_a_kept_module(k: int) -> None:
    model = adapters(1, k)
    counts = of_a_step(model, rows=1)
    each = kept(model)
    assert each == k * LAYERS
    assert counts == {"_to_copy": 2 * each, "mm": 2 * each, "add_": each}


@pytest.mark.parametrize("number", [1, 8])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_compiled_they_are_none(k: int, number: int) -> None:
    model = adapters(number, k)
    assert of_a_step(model, number, None if number == 1 else [str(row) for row in range(number)]) == {}
    assert kept(model)


@pytest.mark.usefixtures("no_numba")
@pytest.mark.parametrize("number", [1, 2, 8])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_many_rows_take_two_as_well_however_many_adapters_they_have(k: int, number: int) -> None:
    model = adapters(number, k)
    counts = of_a_step(model, 8, None if number == 1 else [str(row % number) for row in range(8)])
    each = kept(model)
    assert set(counts) <= {"_to_copy", "mm", "bmm", "mul_", "add_"}
    assert counts["_to_copy"] == counts["mm"] + counts["bmm"] == 2 * each
    assert counts["add_"] == each
    assert counts["mul_"] == counts["mm"] / 2  # gates are in the second factor where rows have copies of their own
    assert bool(counts["bmm"]) is (number == 8 and k > 1)


def test_a_batch_for_the_base_model_takes_nothing() -> None:
    model = adapters(2, 3)
    assert of_a_step(model, 4, ["__base__"] * 4) == {}
    with model.disable_adapter():
        assert of_a_step(model, 4) == {}


def test_a_module_that_no_row_keeps_runs_its_base_module_and_nothing_else() -> None:
    model = adapters(1, 1)
    of_a_step(model, rows=1)
    ids, ran = torch.ones(1, 3, dtype=torch.long), []
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        bare = [module for module, run in cache._gatewise_request.runs.items() if not isinstance(run, KeptModule)]
        assert len(bare) == 6 * LAYERS
        for module in bare:
            module.add_shares = lambda *_: ran.append(1)
            module.delta = lambda *_: ran.append(1)
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert not ran
