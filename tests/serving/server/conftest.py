"""A tiny base model with adapters of every kind, served by this process for all tests of a module."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served_models import adapter_folder, base_folder

from gatewise.serving.server.running import AdapterServer

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stable": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "routed": {"kind": "routed"},
    "other": {"kind": "routed", "top_k": 1},
    "dora": {"kind": "dora"},
    "prompts": {"kind": "prompts"},
}
BASE_NAME = "tiny"


@contextmanager
def serving(base: Path, *adapters: Path | str, **settings: Any) -> Iterator[AdapterServer]:
    """A server that runs in a thread until the block ends."""
    given = {
        "name": BASE_NAME,
        "port": 0,
        "device": "cpu",
        "dtype": "float32",
        "say": lambda text: None,
        "settled": 0.1,
        **settings,
    }
    with AdapterServer(str(base), [str(one) for one in adapters], **given) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """By name, the base model's under None."""
    root = tmp_path_factory.mktemp("served")
    base = base_folder(root / "base")
    made: dict[str | None, Path] = {None: base}
    for number, (name, settings) in enumerate(KINDS.items()):
        made[name] = adapter_folder(base, root / "adapters" / name, seed=number, **settings)
    return made


@pytest.fixture(scope="module")
def server(folders: dict[str | None, Path]) -> Iterator[AdapterServer]:
    base = folders[None]
    with serving(base, base.parent / "adapters", every=0.2) as made:
        yield made
