"""The rooms of ``gatewise_mdt``: imports between them run one way, and gatewise works without this package."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import gatewise_mdt as mdt
import pytest

import gatewise

PACKAGE = Path(str(mdt.__file__)).parent
# Each may import from those before it, and from the files at the top of mdt.
ROOMS = ("checking", "formats", "documents", "evaluation", "extraction", "training", "pointing", "review", "commands")


def imported(file: Path) -> list[str]:
    """The modules of mdt that a file imports, without "gatewise_mdt."."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gatewise_mdt"):
            below = node.module.removeprefix("gatewise_mdt").removeprefix(".")
            found += [below] if below else [alias.name for alias in node.names]
    return found


def test_rooms_import_from_those_before_them() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*ROOMS, "samples"}
    for place, room in enumerate(ROOMS):
        for file in (PACKAGE / room).glob("*.py"):
            for module in imported(file):
                assert module.partition(".")[0] not in ROOMS[place + 1 :], f"{room}/{file.name} imports {module}"


def test_the_top_imports_from_no_room() -> None:
    for file in PACKAGE.glob("*.py"):
        if file.name != "__init__.py":  # which names what is public, wherever it is
            assert not [module for module in imported(file) if module.partition(".")[0] in ROOMS], file.name


def test_of_gatewise_only_what_is_public_is_used() -> None:
    """That is: the classes and functions at its top, and what the table at the end of docs/reference/python.md names."""
    page = PACKAGE.parents[2] / "docs" / "reference" / "python.md"
    if not page.exists():
        pytest.skip("gatewise-mdt is installed without its sources")
    public: dict[str, set[str]] = {"gatewise": {*gatewise.__all__, "__version__"}}
    for module, name in re.findall(r"^\| `(gatewise\.[\w.]+)` \| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE):
        public.setdefault(module, set()).add(name)
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [one.name for one in node.names if one.name.partition(".")[0] == "gatewise"], file
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gatewise":
                missing = {one.name for one in node.names} - public.get(str(node.module), set())
                assert not missing, f"{file.relative_to(PACKAGE)} imports {missing} from {node.module}"
    for module, names in public.items():
        assert all(hasattr(import_module(module), name) for name in names), module


def test_public_names_are_where_they_are_said_to_be() -> None:
    for module, names in mdt._HOME.items():
        for name in names:
            assert getattr(mdt, name) is getattr(import_module(f"gatewise_mdt.{module}"), name)
    assert sorted(name for names in mdt._HOME.values() for name in names) == sorted(mdt.__all__)


def test_gatewise_works_without_this_package(tmp_path: Path) -> None:
    """None of its files names it. Copied to where its metadata, and so no entry point of another package, is not."""
    files = [*Path(gatewise.__file__).parent.rglob("*.py")]
    assert not [file for file in files if "gatewise_mdt" in file.read_text(encoding="utf-8")]
    shutil.copytree(Path(gatewise.__file__).parent, tmp_path / "gatewise", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys, importlib.metadata as metadata; sys.modules['gatewise_mdt'] = None; real = metadata.entry_points;"
        "metadata.entry_points = lambda **k: [] if str(k.get('group')).startswith('gatewise') else real(**k);"
        "from typer.testing import CliRunner; from gatewise.cli.main import app; import gatewise; print(gatewise.__file__);"
        "[print(CliRunner().invoke(app, words).exit_code) for words in (['--help'], ['train', '--help'], ['mdt'])];"
        "print('mdt' in CliRunner().invoke(app, ['--help']).stdout)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [str(tmp_path / "gatewise" / "__init__.py"), "0", "0", "2", "False"]


def test_what_is_no_code_goes_into_the_package() -> None:
    """Pages, style sheets, scripts and samples are named in pyproject.toml, without which an installed gatewise lacks them."""
    project = PACKAGE.parents[1] / "pyproject.toml"
    if not project.exists():
        pytest.skip("gatewise-mdt is installed without its sources")
    patterns = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["gatewise_mdt"]
    others = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert [path.as_posix() for path in others if not any(path.match(pattern) for pattern in patterns)] == []
