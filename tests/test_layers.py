"""Imports run one way: no room of gatewise knows one above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gatewise

SOURCE = Path(gatewise.__file__).parent
ROOMS = (
    {"internals"},
    {"adapters", "bilevel", "models", "tasks"},
    {"allocation", "prompts", "routed", "serving"},
    {"compress", "inspection"},
    {"runs"},
    {"comparing"},
    {"cli"},
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports(file: Path) -> Iterator[str]:
    """Modules of gatewise that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "gatewise")


def test_no_room_imports_one_above_it() -> None:
    folders = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert folders <= LEVELS.keys()
    upwards = [
        f"{file.relative_to(SOURCE)} imports {module}"
        for room in folders
        for file in (SOURCE / room).rglob("*.py")
        for module in imports(file)
        if module.startswith("gatewise.") and LEVELS.get(module.split(".")[1], 0) > LEVELS[room]
    ]
    assert upwards == []
