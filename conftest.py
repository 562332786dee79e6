"""What the tests of both distributions share.

pytest's own process, which gives the tests out to others, reads this too: it needs no PyTorch for that.
"""

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

_frozen = SimpleNamespace(file=None, modules=0)
"""In which file's tests, and with how many modules, what was there was taken from the garbage collector's sight."""

gc.disable()  # imports leave next to no garbage, and to look for it took a fifth of their time


def pytest_configure(config: pytest.Config) -> None:
    """pytest-randomly chooses the order, and leaves the seed of each test to ``_one_seed``: it would set its own one after it."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every training run collects garbage, which would take most of its time: looking through all that was ever imported."""
    if item.path != _frozen.file or len(sys.modules) > _frozen.modules + 40:
        gc.collect()
        gc.freeze()
        _frozen.file, _frozen.modules = item.path, len(sys.modules)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    if "torch" in sys.modules:  # which tests of documents do without
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _float32() -> Iterator[None]:
    """dtype "auto" is float32 on the CPU, whatever this one can do: the same numbers on every machine, and none needs bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits() -> Iterator[None]:
    """Neither for the disk, nor for the template of a model card, which PEFT compiles anew whenever it saves an adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        from jinja2 import Environment

        patch.setattr(Environment, "compile", functools.cache(Environment.compile))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interrupts() -> None:
    """They reach what tests start. A shell's background process ignores them, and so would all of its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def adapted() -> Callable[..., Any]:
    from tiny_models import adapted

    return adapted


@pytest.fixture
def batch() -> Callable[..., dict[str, Any]]:
    from tiny_models import batch

    return batch
