"""Prints `name==version` with the lowest version of each dependency that pyproject.toml allows, its extras' included.

`make test-lowest` gives them to pip as constraints. If two lower bounds cannot be installed together, pip fails and names them.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: str) -> str | None:
    """`name==version` of a requirement `name[extras]>=version,<other`; None for the project's own extras."""
    found = re.fullmatch(r"([\w.-]+)(\[[\w,-]+\])?>=([\w.]+),<[\w.]+( ?;.*)?", requirement)
    if found:
        return f"{found[1]}=={found[3]}"
    if requirement.startswith("gatewise["):
        return None
    raise SystemExit(f"{PROJECT.name}: {requirement!r} is not of the form name>=lowest,<bound")


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    print(*sorted(filter(None, map(lowest, requirements)), key=str.lower), sep="\n")


if __name__ == "__main__":
    main()
