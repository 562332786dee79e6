"""benchmarks/data.py: the parts of a task share no question."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def data() -> Any:
    path = Path(__file__).parents[1] / "benchmarks" / "data.py"
    spec = importlib.util.spec_from_file_location("benchmark_rows", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def items(count: int) -> list[dict[str, Any]]:
    """Each question comes twice."""
    return [{"question": f"{i // 2} legs", "answer": str(i // 2), "metadata": {}} for i in range(count)]


def test_parts_have_the_rows_asked_for_and_no_question_in_common(data: Any) -> None:
    made = data.Made("legs", {}, lambda item: item["question"])
    parts = data.rows_of(made, items(40), (5, 3, 2))
    assert [len(part) for part in parts] == [5, 3, 2]
    assert parts[1][0] == {"question": "5 legs", "answer": "5"}
    assert len({row["question"] for part in parts for row in part}) == 10
    with pytest.raises(SystemExit, match="there are 4 different questions"):
        data.rows_of(made, items(8), (3, 1, 1))
