"""Ways past what a module's call goes through for nothing, which costs microseconds a module, and there are 210 of them a token.

An adapter's layer stands around its base module, so that every call is two modules' calls. While a prompt is being answered, the
attribute of the parent that leads to such a layer (``attention.q_proj``) may lead to what the layer would run instead.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registry

Run = Callable[..., Tensor]
Places = dict[nn.Module, tuple[dict[str, Any], str]]
"""Where modules are: the attributes of the parent, and the name among them."""


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees or changes what the module is given or makes: hooks, of its own or of all modules."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or registry._global_forward_pre_hooks
        or registry._global_forward_hooks
    )


def direct(module: nn.Module) -> Run:
    """What a module's ``__call__`` comes to now: its ``forward``, unless it is watched."""
    return module if is_watched(module) or module._compiled_call_impl is not None else module.forward


def places(root: nn.Module, wanted: Callable[[nn.Module], bool]) -> Places:
    """Where the wanted modules inside of ``root`` are, without those that are in two places."""
    found: Places = {}
    twice = set()
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None and wanted(child):
                if child in found:
                    twice.add(child)
                found[child] = (parent.__dict__, name)
    return {module: place for module, place in found.items() if module not in twice}


class Detours:
    """Ways past modules, open between ``open`` and ``close``. Modules that are watched have none.

    An attribute of an object's own goes before a child of a ``nn.Module``, so that the tree of modules stays as it is.
    """

    def __init__(self, places: Places, runs: Mapping[nn.Module, Run]) -> None:
        self._ways = list(_ways(places, runs))

    def open(self) -> None:
        """Parents find what runs instead."""
        for attributes, name, way in self._ways:
            attributes[name] = way

    def close(self) -> None:
        """Parents find their modules again."""
        for attributes, name, _ in self._ways:
            attributes.pop(name, None)

    def __contains__(self, module: nn.Module) -> bool:
        return any(way.module is module for _, _, way in self._ways)


class _Way(partial[Tensor]):
    """What runs; all else that a parent asks of it (its weight, its type) is the module's."""

    module: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def _ways(places: Places, runs: Mapping[nn.Module, Run]) -> Iterator[tuple[dict[str, Any], str, _Way]]:
    for module, run in runs.items():
        if module in places and "forward" not in module.__dict__ and not is_watched(module):
            way = _Way(run)
            way.module = module
            yield *places[module], way
