"""Puts a class in front of an object's own, and takes it off again: the object's class is exchanged, as PyTorch's FSDP2 does.

A module so changed keeps its place, name, parameters and hooks; only the methods that the class in front has begin there.
"""

from collections.abc import Hashable
from functools import cache
from types import MethodType
from typing import Any, cast

import torch


class Front:
    """Base of what is put in front of a class; ``super()`` in it is then the object's own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self)
        if not _is_fronted(kind):  # exchanged once more by somebody else
            return super().__reduce_ex__(protocol)
        return _new, kind.__bases__, self.__dict__  # pickle finds classes by name, and would find the object's own


@torch.compiler.disable  # it would trace past the cache that makes a class once only
def put_front(owner: object, front: type[Front]) -> None:
    """Exchanges the class of an object for one that has ``front`` before the object's own."""
    _set_class(owner, _fronted(cast(Hashable, front), cast(Hashable, type(owner))))


@torch.compiler.disable
def take_front(owner: object) -> None:
    """Undoes ``put_front``."""
    _set_class(owner, type(owner).__bases__[1])


@cache
def _fronted(front: Hashable, own: Hashable) -> type:
    assert isinstance(front, type)
    assert isinstance(own, type)
    # Under the same name: wrapping policies and device maps know layers by the name of their class.
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (front, own), names)


def _is_fronted(kind: type) -> bool:
    bases = kind.__bases__
    return len(bases) == 2 and issubclass(bases[0], Front) and kind is _fronted(cast(Hashable, bases[0]), cast(Hashable, bases[1]))


def _new(front: type[Front], own: type) -> object:
    kind: Any = _fronted(cast(Hashable, front), cast(Hashable, own))
    return kind.__new__(kind)


def _set_class(owner: Any, kind: type) -> None:
    before = getattr(type(owner), "forward", None)
    owner.__class__ = kind
    # Accelerate's device hooks keep a module's forward as it was when they were put on, and leave it in its place when taken off.
    for name in ("_old_forward", "forward"):
        kept = owner.__dict__.get(name)
        if isinstance(kept, MethodType) and kept.__func__ is before:
            setattr(owner, name, MethodType(cast(Any, kind).forward, owner))
