"""The soak of benchmarks/serving.py in short: clients, changes and evictions at once, and what is left when all is over."""

import gc
import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_models import base_folder, serving

from gatewise.serving.server.engine import Answer, Engine
from gatewise.serving.server.lanes import Lane

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
WIDE = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention needs heads of 32 numbers and more
PYTHON = os.environ.get("GATEWISE_VLLM_PYTHON")


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("gatewise_soak", BENCHMARKS / "serving.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "gatewise_soak", module)
        spec.loader.exec_module(module)
        yield module


def living(kind: type) -> int:
    gc.collect()
    return sum(isinstance(one, kind) for one in gc.get_objects())


def left(engine: Engine) -> dict[str, int]:
    """What an engine with nothing to do should not hold; of one that is at work, a moment of it."""
    lanes = list(engine._running)
    held = {
        "running": sum(map(len, list(engine._running.values()))),
        "waiting": len(engine._waiting),
        "rows": sum(len(lane.rows) for lane in lanes),
        "caches": sum(lane._cache is not None for lane in lanes),
        "forgotten lanes": living(Lane) - len(lanes),
        "answers": living(Answer),
    }
    return {what: count for what, count in held.items() if count}


def came_to_all(done: Counter[str]) -> bool:
    """Whether a soak had some of all that may happen in it."""
    changes = sum(count for what, count in list(done.items()) if what.startswith("change"))
    return {"given up", "refused as due"} <= done.keys() and done["right"] > 30 and changes > 3


def test_under_load_every_answer_is_right_and_nothing_is_left(soak: Any, tmp_path: Path) -> None:
    material = soak.make(tmp_path, str(base_folder(tmp_path / "base", max_position_embeddings=256, **WIDE)), 12, seed=1)
    assert material.distinct > 0.8  # or the comparison would tell nothing
    room = {"most_loaded": 4, "most_running": 6, "most_waiting": 12}
    before = threading.active_count()
    settings = {"name": soak.BASE, "keys": [soak.KEY], "every": 0.1, "settled": 0.3, **room}
    with serving(Path(material.base), material.served, **settings) as server:
        load = soak.Soak(server.url, material, seed=1, grace=8.0, settled=0.3)
        load.start(10, 0.2)
        limit = time.monotonic() + 30
        while not came_to_all(load.done) and time.monotonic() < limit:
            time.sleep(0.1)
        load.end(60)
        limit = time.monotonic() + 20
        while left(server.engine) and time.monotonic() < limit:  # its thread and who asked may be at the end of an answer
            time.sleep(0.1)
        assert left(server.engine) == {}
        assert len(server.engine._loaded) <= 4
    assert load.wrong == []
    assert came_to_all(load.done)
    limit = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < limit:
        time.sleep(0.05)
    assert threading.active_count() <= before + 1  # the encoder of prompts waits for the next


@pytest.mark.skipif(PYTHON is None, reason="GATEWISE_VLLM_PYTHON names no Python that has vLLM: run `make test-serve`")
def test_vllm_under_load(tmp_path: Path) -> None:
    """With the engine killed on the way."""
    base = base_folder(tmp_path / "base", max_position_embeddings=256, **WIDE)
    command = [sys.executable, str(BENCHMARKS / "serving.py"), "--engine", "vllm", "--python", str(PYTHON), "--base", str(base)]
    command += ["--seconds", "45", "--clients", "8", "--adapters", "12", "--results", str(tmp_path / "results.jsonl")]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stdout[-5000:] + made.stderr[-3000:]
