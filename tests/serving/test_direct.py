"""Ways past modules: open only while told, for modules that nobody watches, and the parent notices nothing else."""

from typing import Any

import pytest
import torch
from mixed_models import BASE, mixed_model, prompts
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import LogitsProcessor

from gatewise import fast_lora
from gatewise.serving.direct import Detours, direct, is_watched, places

NAMES = ["all", "some", BASE, "other", "some"]


class Parent(nn.Module):
    """Calls its child, and asks it for something."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.listed = nn.ModuleList([nn.Linear(2, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        return self.listed[0](self.child(x)), self.child.weight.shape


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_a_parent_goes_another_way_while_it_is_open() -> None:
    parent, x = Parent(), torch.randn(3, 2)
    found = places(parent, is_linear)
    assert set(found) == {parent.child, parent.listed[0]}
    way = Detours(found, {parent.child: lambda x: x * 0})
    before = parent(x)[0]
    names = [name for name, _ in parent.named_modules()]
    way.open()
    got, shape = parent(x)
    assert torch.equal(got, parent.listed[0](torch.zeros(3, 2)))
    assert shape == (2, 2)
    assert [name for name, _ in parent.named_modules()] == names
    assert parent.state_dict().keys() == Parent().state_dict().keys()
    way.close()
    way.close()
    assert torch.equal(parent(x)[0], before)
    assert "child" not in parent.__dict__


@pytest.mark.parametrize("how", ["pre-hook", "hook", "backward hook", "global hook", "forward"])
def test_watched_modules_have_no_other_way(how: str) -> None:
    parent = Parent()
    child = parent.child
    handle = None
    if how == "pre-hook":
        handle = child.register_forward_pre_hook(lambda *_: None)
    elif how == "hook":
        handle = child.register_forward_hook(lambda *_: None)
    elif how == "backward hook":
        handle = child.register_full_backward_hook(lambda *_: None)
    elif how == "global hook":
        handle = register_module_forward_hook(lambda *_: None)
    else:
        child.__dict__["forward"] = nn.Linear.forward.__get__(child)
    try:
        assert is_watched(child) is (how != "forward")
        assert child not in Detours(places(parent, is_linear), {child: lambda x: x})
        if how != "forward":
            assert direct(child) is child
    finally:
        if handle is not None:
            handle.remove()
    if how != "forward":
        assert direct(child) == child.forward
        assert child in Detours(places(parent, is_linear), {child: lambda x: x})


def test_modules_in_two_places_are_left_out() -> None:
    parent = Parent()
    parent.other = parent.child
    assert set(places(parent, is_linear)) == {parent.listed[0]}


class Fails(LogitsProcessor):
    """Stops a generation in its second step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return scores


def left_over(model: nn.Module) -> list[Any]:
    """Attributes that stand before a child of the same name."""
    return [name for parent in model.modules() for name in parent._modules if name in parent.__dict__]


def test_nothing_is_left_after_a_call_or_an_interruption() -> None:
    model = mixed_model()
    fixed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "adapter_names": NAMES}
    with fast_lora(model):
        model.generate(**prompts(5), **fixed)
        assert not left_over(model)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**prompts(5), **fixed, logits_processor=[Fails()])
        assert not left_over(model)
