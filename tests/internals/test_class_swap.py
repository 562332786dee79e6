"""Objects that are given a mixin: what of them changes, what stays, and how it is undone."""

import copy

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from gatewise.internals.class_swap import ObjectMixin, add_mixin, remove_mixin


class Doubled(ObjectMixin, nn.Module):
    """Doubles what a module makes."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)  # type: ignore[misc]
        return 2 * made


def test_one_object_is_changed_and_changed_back() -> None:
    module, other, x = nn.Linear(2, 3), nn.Linear(2, 3), torch.randn(4, 2)
    before, other_before, names = module(x), other(x), list(module.state_dict())
    add_mixin(module, Doubled)
    assert torch.equal(module(x), 2 * before)
    assert torch.equal(other(x), other_before)
    assert isinstance(module, nn.Linear)
    assert (type(module).__name__, list(module.state_dict())) == ("Linear", names)
    remove_mixin(module)
    assert type(module) is nn.Linear
    assert torch.equal(module(x), before)


def test_a_copy_keeps_it() -> None:
    module, x = nn.Linear(2, 3), torch.randn(4, 2)
    add_mixin(module, Doubled)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    remove_mixin(twin)
    assert torch.equal(2 * twin(x), module(x))


def test_hooks_of_accelerate_from_before_run_the_mixin() -> None:
    """They keep the forward that the module had when they came, and put it back when they go."""
    module, x = nn.Linear(2, 3), torch.randn(4, 2)
    before = module(x)
    add_hook_to_module(module, ModelHook())
    add_mixin(module, Doubled)
    assert torch.equal(module(x), 2 * before)
    remove_hook_from_module(module)
    assert torch.equal(module(x), 2 * before)
    remove_mixin(module)
    assert torch.equal(module(x), before)
