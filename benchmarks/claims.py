"""Prints the tables of docs/reports/ from the comparisons in results/compare/.

    python benchmarks/claims.py                # all
    python benchmarks/claims.py trec-r1        # one

A row is an arm of `gatewise compare` at its own best learning rate, measured with seeds that tuned nothing. The last two columns
are of the rows that the rates were chosen on: the arm at the first arm's rate, and at its own, with the number of runs.
A comparison at one rate sees the first of the two.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compare"


def table(content: dict[str, Any]) -> list[str]:
    """The lines of a Markdown table; shares are in percent points."""
    digits = 1 if content["unit"] == "points" else 3
    first, part = content["arms"][0], content["part"]
    found = {one["arm"]: one for one in content["differences"]}

    def number(value: float, signed: bool = False) -> str:
        return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")

    def at(arm: dict[str, Any], rate: float | None) -> str:
        """The mean of the tuning runs at a rate."""
        values = [one["tuning"] for one in arm["rates"] if rate and math.isclose(one["learning_rate"], rate, rel_tol=1e-3)]
        finite = [value for value in (values[0] if values else ()) if value is not None]
        return f"{number(fmean(finite))}, {len(finite)}" if finite else ""

    head = [
        "",
        "rate",
        f"{part} (sd)",
        f"minus {first['name']} (95%)",
        "p (Holm)",
        "parameters",
        f"tuning at {first['name']}'s rate, runs",
        "at its own",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in content["arms"]:
        one, quality = found.get(arm["name"]), arm["mean"].get(part)
        spread = f" ({number(arm['sd'][part])})" if part in arm["sd"] else ""
        cells = [
            arm["name"],
            f"{arm['learning_rate']:.2g}" if arm["learning_rate"] else "",
            "" if quality is None else number(quality) + spread,
            ""
            if one is None
            else number(one["mean"], signed=True)
            + ("" if one["low"] is None else f" ({number(one['low'])} to {number(one['high'])})"),
            "" if one is None or one.get("p_holm") is None else f"{one['p_holm']:.2g}",
            f"{arm['parameters']:,}",
            at(arm, first["learning_rate"]),
            at(arm, arm["learning_rate"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of results/compare/, without .json")
    names = parser.parse_args().names or sorted(path.stem for path in RESULTS.glob("*.json"))
    for name in names:
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        print(f"{name}: {content['metric']}, {content['sentence']}\n", *table(content), "", sep="\n")


if __name__ == "__main__":
    main()
