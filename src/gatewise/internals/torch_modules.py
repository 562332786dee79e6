"""What PyTorch's modules know of themselves under private names: their hooks and parameters.

The names are listed in private_names.py.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules import module as _modules


def has_forward_hooks(module: nn.Module) -> bool:
    """True if the module has a hook that sees, and may keep, the output of its ``forward``."""
    return bool(module._forward_hooks)


def called_directly(module: nn.Module) -> Callable[..., Tensor]:
    """What gives the module's output of x, without PyTorch's way through ``__call__`` and ``forward`` where it is an ``nn.Linear``.

    That way takes as long as a small operation, and a decoding step has hundreds. A module goes its own way while anything could
    see it: with hooks, its own or all modules', and where its weight is no parameter, as in FSDP. So does any other module.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return module
    parameters, before, after = module._parameters, module._forward_pre_hooks, module._forward_hooks
    before_all, after_all = _modules._global_forward_pre_hooks, _modules._global_forward_hooks

    def run(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        weight = parameters.get("weight")
        if weight is None or before or after or before_all or after_all or args or kwargs or "forward" in module.__dict__:
            result: Tensor = module(x, *args, **kwargs)
            return result
        return linear(x, weight, parameters["bias"])

    return run


def is_plain(dropout: nn.Module, first: nn.Module, second: nn.Module, x: Tensor) -> bool:
    """True if an adapter's three modules do nothing to x but multiply by two matrices, without hooks that see it."""
    if any(one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ for one in (dropout, first, second)):
        return False
    if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)):
        return False
    if type(x) is not Tensor:
        return False
    return all(
        type(one) is nn.Linear
        and one.bias is None
        and type(one.weight) is nn.Parameter
        and one.weight.is_floating_point()
        and one.weight.device == x.device
        for one in (first, second)
    )


def replaced_while_running(
    module: nn.Module, held_by: nn.Module, name: str, made: Callable[[Tensor], Tensor]
) -> Callable[[], None]:
    """While ``module`` runs, it finds ``made(parameter)`` where ``held_by`` has a parameter of this name.

    Returns:
        What undoes it.
    """
    parameter = held_by._parameters[name]
    assert parameter is not None

    def before(*_: object) -> None:
        held_by._parameters[name] = made(parameter)  # type: ignore[assignment]

    def after(*_: object) -> None:
        held_by._parameters[name] = parameter

    # Also where the pass is broken off, as gradient checkpointing does once it has what it recomputes.
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
