"""What is found out about modules: whether they are plain matrices, and who watches them."""

import pytest
import torch
from torch import nn

from gatewise.internals.torch_modules import called_directly, has_forward_hooks, is_plain, replaced_while_running


def three() -> tuple[nn.Module, nn.Linear, nn.Linear]:
    return nn.Identity(), nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)


def test_three_plain_modules() -> None:
    dropout, first, second = three()
    x = torch.randn(2, 4)
    assert is_plain(dropout, first, second, x)
    assert is_plain(nn.Dropout(0.5).eval(), first, second, x)
    assert not is_plain(nn.Dropout(0.5), first, second, x)
    assert not is_plain(dropout, nn.Linear(4, 2), second, x)
    assert not is_plain(dropout, first, second.to("meta"), x)
    assert not is_plain(dropout, first, three()[2], nn.Parameter(x))


@pytest.mark.parametrize("how", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_seen(how: str) -> None:
    dropout, first, second = three()
    x = torch.randn(2, 4)
    handle = getattr(first, how)(lambda *_: None)
    assert not is_plain(dropout, first, second, x)
    assert has_forward_hooks(first) is (how == "register_forward_hook")
    handle.remove()
    assert is_plain(dropout, first, second, x)
    assert not has_forward_hooks(first)
    first.__dict__["forward"] = nn.Linear.forward.__get__(first)
    assert not is_plain(dropout, first, second, x)


def test_a_linear_called_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.Linear(4, 2), torch.randn(3, 4)
    run, seen = called_directly(module), []

    def see(*args: object) -> None:
        seen.append(args)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "__call__", None)
        assert torch.equal(run(x), nn.functional.linear(x, module.weight, module.bias))
    # Hooks that come later are seen, and those that are gone cost nothing.
    everywhere = (nn.modules.module.register_module_forward_pre_hook, nn.modules.module.register_module_forward_hook)
    for register in (module.register_forward_pre_hook, module.register_forward_hook, *everywhere):
        handle = register(see)
        run(x)
        handle.remove()
        run(x)
        assert len(seen) == 1, register
        seen.clear()
    # So is another weight, one that is no parameter for a while, as FSDP has it, and another forward.
    module.weight = nn.Parameter(torch.zeros(2, 4))
    assert torch.equal(run(x), module.bias.expand(3, 2))
    weight = module.weight.data + 1
    del module.weight
    module.weight = weight
    torch.testing.assert_close(run(x), nn.functional.linear(x, weight, module.bias))
    module.forward = see
    run(x)
    assert len(seen) == 1


def test_other_modules_are_called_as_they_are() -> None:
    class Own(nn.Linear):
        pass

    changed = nn.Linear(4, 2)
    changed.forward = lambda x: x
    for module in (Own(4, 2), nn.Identity(), changed):
        assert called_directly(module) is module


def test_a_weight_is_replaced_while_a_module_runs() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3, bias=False)

        def forward(self, x: torch.Tensor, breaks: bool = False) -> torch.Tensor:
            if breaks:
                raise KeyError("broken off")
            return self.inner(x)

    outer, x = Outer(), torch.randn(4, 2)
    weight, expected = outer.inner.weight, 2 * outer(x)
    scale = torch.tensor(2.0, requires_grad=True)
    undo = replaced_while_running(outer, outer.inner, "weight", lambda parameter: parameter * scale)
    for _ in range(2):
        found = outer(x)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad(found.sum(), scale)
        torch.testing.assert_close(gradient, expected.sum() / 2)
        assert outer.inner.weight is weight
    with pytest.raises(KeyError):
        outer(x, breaks=True)
    assert outer.inner.weight is weight
    undo()
    torch.testing.assert_close(outer(x), expected / 2)
