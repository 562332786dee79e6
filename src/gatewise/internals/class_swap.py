"""Gives one object methods of a mixin, and takes them off again.

The object's class is exchanged for a subclass of (mixin, own class), as PyTorch's FSDP2 does. A module so changed keeps its place,
name, parameters and hooks, and other objects of its class stay as they are. It can be copied, not pickled.
"""

from functools import cache
from types import MethodType
from typing import Any

import torch


class ObjectMixin:
    """Base of mixins for single objects; ``super()`` in one leads to the object's own class."""


@torch.compiler.disable  # it would trace past the cache that makes a class once only
def add_mixin(target: Any, mixin: Any) -> None:
    """Gives an object the methods of a mixin; they go before those of its own class."""
    own: Any = type(target)
    _set_class(target, _mixed(mixin, own))


@torch.compiler.disable
def remove_mixin(target: object) -> None:
    """Undoes ``add_mixin``."""
    _set_class(target, type(target).__bases__[1])


@cache
def _mixed(mixin: Any, own: Any) -> type:
    # Under the same name: wrapping policies and device maps know layers by the name of their class.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (mixin, own), names)


def _set_class(target: Any, kind: Any) -> None:
    before = getattr(type(target), "forward", None)
    target.__class__ = kind
    # Accelerate's device hooks keep a module's forward as it was when they were put on, and leave it in its place when taken off.
    for name in ("_old_forward", "forward"):
        kept = target.__dict__.get(name)
        if isinstance(kept, MethodType) and kept.__func__ is before:
            setattr(target, name, MethodType(kind.forward, target))
