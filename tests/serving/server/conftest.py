"""A tiny base model with adapters of every kind, served by this process for all tests of a module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_models import adapter_folder, base_folder, serving

from gatewise.serving.server.running import AdapterServer

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stable": {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "routed": {"kind": "routed"},
    "other": {"kind": "routed", "top_k": 1},
    "dora": {"kind": "dora"},
    "prompts": {"kind": "prompts"},
}


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
