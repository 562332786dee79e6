"""The HTML page: whole, accessible, without the network, and safe with whatever names it is given."""

import math
import re
from pathlib import Path

from maps import Page, budget_stack, importance, importance_stack, module

from gatewise import inspection
from gatewise.inspection import BudgetMap, ModuleBudget, ModuleImportance, plot, plot_importance


def test_page_is_whole_accessible_and_alone(tmp_path: Path) -> None:
    budget = budget_stack(4)
    text = plot(budget, tmp_path / "map.html", "norm").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text.split("</style>")[0])
    assert not [value for name, value in page.attributes if name in ("src", "href") and value != "data:,"]
    assert "default-src 'none'" in text
    assert len(page.cells) == 4 * 7
    last = budget.modules[-1]
    assert page.cells[-1]["data-tip"].splitlines() == [
        last.path,
        f"rank {last.rank} of 16",
        f"{last.parameters:,} of 1,600 parameters",
        f"norm {last.norm:.3g}, scaling 2",
    ]
    assert ("data-value", "norm") in page.attributes
    assert [value for name, value in page.attributes if (name, value) == ("type", "radio")] == ["radio"] * 3
    assert {"caption", "thead", "tbody", "tfoot", "fieldset", "legend", "details"} <= set(page.tags)
    assert page.attributes.count(("scope", "row")) == 4 + 1 + 28  # layers, the totals, the list of modules
    assert "prefers-color-scheme:dark" in text
    heat = [float(n) for n in re.findall(r"--(?:rank|norm|parameters):([\d.]+)", " ".join(c["style"] for c in page.cells))]
    assert len(heat) == 3 * 28
    assert (min(heat), max(heat)) == (0.0, 1.0)


def test_a_budgets_page_escapes_whatever_it_is_given(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    module = ModuleBudget(f'layers.0.{evil}"', 0, evil, 1, 1, 1, 1, 1.0, 1.0)
    entry = inspection.RoundSummary(0, None, 1, 1, 0, 0, None, None)
    budget = BudgetMap((module,), base_model=evil, adapter_type=evil, score=evil, rounds=(entry,))
    page = Page(plot(budget, tmp_path / "map.html", title=evil).read_text())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.cells[0]["data-tip"].startswith(module.path)


def test_the_page_shows_scores_ranks_and_what_is_suggested(tmp_path: Path) -> None:
    found = importance_stack(4)
    ranks = {m.path: index for index, m in enumerate(found.modules)}
    text = plot_importance(found, tmp_path / "map.html", ranks).read_text(encoding="utf-8")
    page = Page(text)
    assert page.values == ["score", "rank", "suggested"]
    assert len(page.cells) == 28
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text.split("</style>")[0])
    first = page.cells[0]
    assert first["data-tip"].splitlines() == [found.modules[0].path, "score -0.005 nats", "rank 2", "suggested 0"]
    assert first["style"] == f"--score:{5 / 11:.3f};--rank:1.000;--suggested:0.000"
    below = [cell["class"] == "cell minus-score" for cell in page.cells]
    assert below == [m.total < 0 for m in found.modules]
    assert "[data-value=score] .minus-score{--hot:var(--minus)" in text
    assert "[data-value=suggested] :is(span.score,span.rank){display:none}" in text
    assert Page(plot_importance(found, tmp_path / "map.html").read_text()).values == ["score", "rank"]


def test_the_page_of_importance_escapes_whatever_it_is_given(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    bad = ModuleImportance(f'layers.0.{evil}"', 0, evil, (-1.0,), 1.0, 4, 8)
    found = importance(bad, base_model=evil, data=evil, score=evil, unscored=(evil,))
    page = Page(plot_importance(found, tmp_path / "map.html", {bad.path: 1}, title=evil).read_text())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.cells[0]["data-tip"].startswith(bad.path)


def test_a_module_without_ranks_is_shown_as_such(tmp_path: Path) -> None:
    found = importance(module("layers.0.q_proj"), module("layers.0.v_proj", 1.0))
    assert "nan" not in plot_importance(found, tmp_path / "map.html").read_text()
    assert math.isclose(found.score_grid().cells[0][0], 0.0)  # type: ignore[arg-type]
