"""The map drawn into a file, an image or a page by the file's name."""

from pathlib import Path

from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.report.budget_map import BudgetMap, Value
from gatewise.report.image import image_of
from gatewise.report.page import page_of


def plot(budget: BudgetMap, out: str | Path, value: Value = "rank", title: str | None = None) -> Path:
    """Draws the map into a file, whole or not at all.

    Args:
        out: ``.png`` and ``.svg`` give a heatmap with totals at its margins; ``.html`` one page that needs no network
            and shows rank, norm and parameters, and the rounds where they are known. Missing folders are made.
        value: what is drawn, or shown first.
        title: the heading; by default says what is shown.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
        ValueError: ``value`` is not one of "rank", "norm" and "parameters".
    """
    out = Path(out)
    suffix = out.suffix.lower()
    if suffix not in (".png", ".svg", ".html"):
        raise GatewiseError(f"cannot plot to {out}: expected a name that ends in .png, .svg or .html")
    budget.matrix(value)  # refuses an unknown value before anything is drawn
    title = title or "Where the budget went"
    content = page_of(budget, value, title).encode() if suffix == ".html" else image_of(budget, value, title, suffix[1:])
    with whole_file(out) as part:
        part.write_bytes(content)
    return out
