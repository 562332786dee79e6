"""Importance shown: the table, the summary, images and the page, with numbers below zero in sight."""

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gatewise.errors import GatewiseError
from gatewise.inspection import (
    Importance,
    ModuleImportance,
    grid_table,
    importance_json,
    importance_lines,
    plot_importance,
    top_table,
)
from gatewise.inspection.image import image_of
from gatewise.sites import site

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def module(path: str, *scores: float) -> ModuleImportance:
    place = site(path)
    return ModuleImportance(path, place.layer, place.kind, scores, 2.0, 64)


def importance(*modules: ModuleImportance, **changes: Any) -> Importance:
    facts = {"score": "path_integral", "rows": 8, "loss_base": 2.0, "loss_adapted": 1.25, "base_model": "tiny", "data": "d.jsonl"}
    return Importance(modules, **facts | changes)


def stack(layers: int, size: float = 1e-3) -> Importance:
    """A Llama with scores from -5 to 11 times ``size``, two ranks a module."""
    found = []
    for layer in range(layers):
        for index, name in enumerate(KINDS):
            total = ((3 * layer + 5 * index) % 17 - 5) * size
            found.append(module(f"model.layers.{layer}.{name}", total * 2, -total))
    return importance(*found)


def rendered(shown: Any, width: int = 80, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---- numbers


@pytest.mark.parametrize(
    ("total", "unit", "text"),
    [
        (0.0312, "10⁻³ nats", "31.2"),
        (-0.0312, "10⁻³ nats", "-31.2"),
        (0.00123, "10⁻³ nats", "1.23"),
        (4.5e-7, "10⁻⁹ nats", "450.0"),
        (2.5, "nats", "2.50"),
        (1234.5, "10³ nats", "1.23"),
        (0.0, "nats", "0"),
    ],
)
def test_the_unit_suits_the_largest_cell(total: float, unit: str, text: str) -> None:
    grid = importance(module("layers.0.q_proj", total)).score_grid()
    assert grid.title == f"path_integral score in {unit}"
    assert (grid.write(grid.cells[0][0]), grid.write(None)) == (text, "·")
    assert importance(module("layers.0.q_proj", total), score="sensitivity").score_grid().title == (
        f"sensitivity score in {unit.removesuffix('nats').strip()}" if unit != "nats" else "sensitivity score"
    )


def test_cells_and_margins_are_sums_over_modules() -> None:
    grid = importance(
        module("layers.0.q_proj", 0.25, -1.0), module("layers.2.q_proj", 0.5), module("layers.2.experts.0.up_proj", 1.0),
        module("layers.2.experts.1.up_proj", 2.0), module("classifier.dense", -4.0),
    ).score_grid()  # fmt: skip
    assert (grid.layers, grid.kinds) == (["0", "1", "2", "other"], ["q", "up", "dense"])
    assert grid.cells == [[-0.75, None, None], [None] * 3, [0.5, 3.0, None], [None, None, -4.0]]
    assert (grid.rows, grid.columns, grid.total) == ([-0.75, None, 3.5, -4.0], [-0.25, 3.0, -4.0], -1.25)
    assert (grid.most, grid.signed) == (4.0, True)


# ---- text


def test_the_table_fits_eighty_columns_and_shows_signs_without_colour() -> None:
    found = stack(30)
    text = rendered(grid_table(found.score_grid()))
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.split()]
    assert rows[0] == ["layer", "q", "k", "v", "o", "gate", "up", "down", "total"]
    assert rows[2][:4] == ["0", "-5.0", "0", "5.0"]
    assert [row[0] for row in rows[2:-1]] == [str(layer) for layer in range(30)]
    assert rows[-1][-1] == f"{1e3 * found.total:.1f}"


def test_the_table_shades_either_side_of_zero_in_its_own_colour() -> None:
    def colours(*totals: float) -> set[str]:
        shown = grid_table(importance(*(module(f"layers.0.{i}", t) for i, t in enumerate(totals))).score_grid())
        return set(re.findall(r"48;2;(\d+;\d+;\d+)", rendered(shown, colour=True)))

    assert len(colours(1.0, 0.1)) == len(colours(-1.0, -0.1)) == 1
    assert colours(1.0) | colours(-1.0) == colours(1.0, -1.0)
    assert colours(1.0) != colours(-1.0)


def test_the_summary_names_what_could_go() -> None:
    found = importance(
        module("layers.0.q_proj", 0.5, 0.3), module("layers.0.v_proj", 0.1, -0.2), module("layers.1.q_proj"),
        unscored=("embed_tokens",),
    )  # fmt: skip
    assert importance_lines(found) == [
        "base model: tiny",
        "score: path_integral in nats; of each rank, its share of the loss that the adapter takes away",
        "rows: 8 of d.jsonl",
        "scored: 4 ranks in 3 modules",
        "loss: 2.0000 nats without these ranks, 1.2500 with them",
        "sum of scores: 0.7 nats; the ranks lower the loss by 0.75 nats",
        "could go: 2 modules whose scores add up to zero or less: layers.0.v_proj, layers.1.q_proj",
        "not scored: embed_tokens: not a linear layer",
    ]
    many = importance(*(module(f"layers.{i}.q_proj", -1.0) for i in range(7)), score="sensitivity")
    lines = importance_lines(many)
    assert "score: sensitivity, without a unit; of each rank, AdaLoRA's |weight x gradient|, never below zero" in lines
    assert "sum of scores: -7" in lines
    assert lines[-1].endswith("layers.3.q_proj, layers.4.q_proj and 2 more")
    assert importance_lines(importance(module("layers.0.q_proj", 1.0)))[-1] == "could go: no module"


def test_the_most_important_come_first() -> None:
    found = importance(
        module("layers.0.q_proj", 0.01), module("layers.0.v_proj", 0.02, 0.03), module("layers.1.q_proj", -0.09),
        module("layers.1.v_proj", 0.04),
    )  # fmt: skip
    rows = [line.split() for line in rendered(top_table(found, count=2)).splitlines() if line.split()]
    assert rows[0] == ["most", "important", "rank", "score"]
    assert rows[2:] == [["layers.0.v_proj", "2", "50.0"], ["layers.1.v_proj", "1", "40.0"]]


def test_json_is_plain_and_complete() -> None:
    found = stack(3)
    told = json.loads(json.dumps(importance_json(found), allow_nan=False))
    assert told["total"] == pytest.approx(sum(sum(m["scores"]) for m in told["modules"]))
    assert told["by_kind"]["q"] == pytest.approx(sum(m["total"] for m in told["modules"] if m["kind"] == "q"))
    assert sum(told["by_layer"].values()) == pytest.approx(told["total"])
    assert told["matrix"][0][0] == pytest.approx(-5e-3)
    assert told["could_go"] == [m["path"] for m in told["modules"] if m["total"] <= 0]
    assert (told["score"], told["unit"], told["rows"], told["rank"]) == ("path_integral", "nats", 8, 42)


# ---- plots


def test_png_and_svg(tmp_path: Path) -> None:
    found = stack(6)
    assert plot_importance(found, tmp_path / "new" / "map.png", title="worth of $x_{ & <b>").read_bytes().startswith(b"\x89PNG\r\n")
    svg = plot_importance(found, tmp_path / "map.svg")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    first = svg.read_bytes()
    assert plot_importance(found, svg).read_bytes() == first


def test_colours_part_at_zero() -> None:
    def faces(*totals: float) -> list[tuple[int, int, int]]:
        grid = importance(*(module(f"layers.0.kind{i}", t) for i, t in enumerate(totals))).score_grid()
        svg = image_of(grid, "title", ("a", "b"), "svg").decode()
        fills = re.findall(r'<g id="patch_\d+">\s*<path [^>]*?style="fill: #([0-9a-f]{6})"', svg)
        shown = fills[2 : 2 + len(totals)]  # after the figure and its first axes
        return [tuple(int(text[i : i + 2], 16) for i in (0, 2, 4)) for text in shown]  # type: ignore[misc]

    below, above, zero = faces(-1.0, 1.0, 0.0)
    assert below[0] > below[2] + 60  # orange
    assert above[2] > above[0] + 60  # blue
    assert max(zero) - min(zero) < 8  # neither
    assert min(zero) > 230
    # As far from zero, as strong, whichever side is longer.
    assert faces(-1.0, 4.0)[0] != below


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [(), (0.0,), (-1.0,), (-1.0, -2.0)])
def test_any_signs_are_drawn(scores: tuple[float, ...], tmp_path: Path) -> None:
    found = importance(*(module(f"layers.{i}.q_proj", score) for i, score in enumerate(scores)))
    for name in ("a.png", "a.svg", "a.html"):
        assert plot_importance(found, tmp_path / name).stat().st_size > 0
    assert rendered(grid_table(found.score_grid()))


class Page(HTMLParser):
    """Checks nesting and collects tags and cells."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.values: list[str] = []
        self.cells: list[dict[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = {name: value or "" for name, value in attrs}
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "input":
            self.values.append(found["value"])
        if found.get("class", "").startswith("cell"):
            self.cells.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_scores_ranks_and_what_is_suggested(tmp_path: Path) -> None:
    found = stack(4)
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


def test_the_page_escapes_whatever_it_is_given(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    bad = ModuleImportance(f'layers.0.{evil}"', 0, evil, (-1.0,), 1.0, 4)
    found = importance(bad, base_model=evil, data=evil, score=evil, unscored=(evil,))
    page = Page(plot_importance(found, tmp_path / "map.html", {bad.path: 1}, title=evil).read_text())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.cells[0]["data-tip"].startswith(bad.path)


def test_a_module_without_ranks_is_shown_as_such(tmp_path: Path) -> None:
    found = importance(module("layers.0.q_proj"), module("layers.0.v_proj", 1.0))
    assert "nan" not in plot_importance(found, tmp_path / "map.html").read_text()
    assert math.isclose(found.score_grid().cells[0][0], 0.0)  # type: ignore[arg-type]


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"map\.pdf.*\.png, \.svg or \.html"):
        plot_importance(stack(1), tmp_path / "map.pdf")
    assert list(tmp_path.iterdir()) == []
