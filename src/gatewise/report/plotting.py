"""A map drawn into a file, an image or a page by the file's name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from gatewise.errors import GatewiseError
from gatewise.files import whole_file
from gatewise.report.budget_map import BudgetMap, Value
from gatewise.report.budget_page import page_of
from gatewise.report.image import image_of
from gatewise.report.importance_map import Importance
from gatewise.report.importance_page import importance_page
from gatewise.report.routing_map import RoutingMap


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
    grid = budget.grid(value)  # refuses an unknown value before anything is drawn
    title = title or "Where the budget went"
    notes = (
        f"{grid.title} by layer and kind · {budget.base_model or budget.adapter_type}",
        f"total rank {budget.rank:,} · {budget.parameters:,} parameters",
    )
    return _write(out, lambda: page_of(budget, value, title), lambda suffix: image_of(grid, title, notes, suffix))


def plot_importance(
    importance: Importance, out: str | Path, suggested: Mapping[str, int] | None = None, title: str | None = None
) -> Path:
    """Draws what every layer and module is worth into a file, whole or not at all.

    Scores below zero are orange and the others blue.

    Args:
        out: as for ``plot``; the page also shows the ranks.
        suggested: path -> rank of every module, which the page shows too.
        title: the heading; by default says what is shown.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
    """
    grid = importance.score_grid()
    title = title or "What each module is worth"
    notes = (
        f"{grid.title} by layer and kind · {importance.base_model or 'base model not named'}",
        f"{importance.rows:,} rows{f' of {importance.data}' if importance.data else ''} · total rank {importance.rank:,}",
    )
    return _write(out, lambda: importance_page(importance, title, suggested), lambda suffix: image_of(grid, title, notes, suffix))


def plot_routing(routing: RoutingMap, out: str | Path, title: str | None = None) -> Path:
    """Draws which modules the prompts chose into a file, whole or not at all.

    Args:
        out: a name that ends in ``.png`` or ``.svg``. Missing folders are made.

    Returns:
        The path written.

    Raises:
        GatewiseError: another suffix, or a path that cannot be written.
    """
    suffix, grid = check_image_suffix(out, "routing is"), routing.grid()
    notes = (
        f"{grid.title}, by layer and kind · {routing.base_model or 'base model not named'}",
        f"{routing.prompts:,} prompts{f' of {routing.data}' if routing.data else ''} · {routing.top_k} modules a layer",
    )
    return write_bytes(out, image_of(grid, title or "Which modules the prompts chose", notes, suffix))


def check_suffix(out: str | Path) -> str:
    """The suffix of a plot's file in lower case, without the dot.

    Raises:
        GatewiseError: nothing can be drawn into a file of that name.
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg", ".html"):
        raise GatewiseError(f"cannot plot to {out}: expected a name that ends in .png, .svg or .html")
    return suffix[1:]


def check_image_suffix(out: str | Path, what: str) -> str:
    """The same for what is drawn as an image and not as a page.

    Args:
        what: begins the sentence, such as "routing is".
    """
    suffix = Path(out).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise GatewiseError(f"cannot plot to {out}: {what} drawn into a name that ends in .png or .svg")
    return suffix[1:]


def write_bytes(out: str | Path, content: bytes) -> Path:
    """Writes a plot's file, whole or not at all."""
    with whole_file(out) as part:
        part.write_bytes(content)
    return Path(out)


def _write(out: str | Path, page: Callable[[], str], image: Callable[[str], bytes]) -> Path:
    suffix = check_suffix(out)
    return write_bytes(out, page().encode() if suffix == "html" else image(suffix))
