"""tools/walks.py counts what its docstring says, on a small package written for the purpose; and it still finds its way in."""

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

WALKS = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "walks.py"))

FILES = {
    "__init__.py": "",
    "counter.py": """
from dataclasses import dataclass

from shop.shelf import Shelf, numbers, total

def called_in_import():
    return [total([1]) for _ in range(2)]

class Receipt:
    lines = called_in_import()

@dataclass
class Price:
    value: int
    def doubled(self):
        return self.value * 2

def sell():
    shelf = Shelf()
    total(number for number in range(3))
    return shelf.size

def lend():
    class Slip:
        pass
    return [Price(number).doubled() for number in numbers()]
""",
    "shelf.py": """
class Shelf:
    def __init__(self):
        self.goods = {}
    @property
    def size(self):
        return len(self.goods)

def total(values):
    return sum(values)

def numbers():
    yield 1
    yield 2
""",
}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package of two files."""
    folder = tmp_path / "shop"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


def traced(folder, walk):
    with WALKS["Trace"](folder) as trace:
        walk()
    return trace


def names(trace):
    return {file: list(functions) for file, functions in trace.functions.items()}


def test_functions_files_and_changes(shop):
    trace = traced(shop, import_module("shop.counter").sell)
    # The generator expression belongs to sell: that sum asks it for values from within shelf.py is no way back.
    assert names(trace) == {"counter.py": ["sell"], "shelf.py": ["Shelf.__init__", "total", "Shelf.size"]}
    assert trace.comprehensions == {("counter.py", "sell.<locals>.<genexpr>")}
    assert trace.changes == 1
    assert trace.counts() == {
        "functions": 4,
        "comprehensions": 1,
        "files": 2,
        "changes": 1,
        "functions_by_file": {"counter.py": 1, "shelf.py": 3},
    }
    assert WALKS["listing"](trace).splitlines()[:3] == ["counter.py  (1)", "    18  sell", "shelf.py  (3)"]


def test_a_generator_that_goes_on_is_not_called_again(shop):
    trace = traced(shop, import_module("shop.counter").lend)
    # lend, numbers, doubled, (numbers goes on), doubled; neither the class Slip nor the dataclass's __init__.
    assert names(trace) == {"counter.py": ["lend", "Price.doubled"], "shelf.py": ["numbers"]}
    assert trace.changes == 2


def test_the_walks_find_their_way_into_this_checkout():
    for places in (WALKS["RECIPE_READER"], WALKS["RECIPE_RUNNER"]):
        assert WALKS["first_home"](places).__module__ == places[0][0]
    with pytest.raises(LookupError, match=r"nowhere\.at\.all.*add where train lies now"):
        WALKS["first_home"]((("gatewise.nowhere.at.all", "train"),))
