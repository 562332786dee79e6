"""Files of plots: what the name says, the same bytes for the same map, whole or not at all."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from maps import budget_stack, importance_stack

from gatewise.errors import GatewiseError
from gatewise.inspection import plot, plot_importance


@pytest.mark.parametrize("value", ["rank", "norm", "parameters"])
def test_a_budget_as_png_and_svg(value: Any, tmp_path: Path) -> None:
    budget = budget_stack(6)
    png = plot(budget, tmp_path / "new" / "map.png", value, title="ranks of $x_{ & <b>").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    svg = plot(budget, tmp_path / "map.svg", value)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    first = svg.read_bytes()
    assert plot(budget, svg, value).read_bytes() == first  # the same map gives the same bytes
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["map.png", "map.svg"]


def test_importance_as_png_and_svg(tmp_path: Path) -> None:
    found = importance_stack(6)
    assert plot_importance(found, tmp_path / "new" / "map.png", title="worth of $x_{ & <b>").read_bytes().startswith(b"\x89PNG\r\n")
    svg = plot_importance(found, tmp_path / "map.svg")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    first = svg.read_bytes()
    assert plot_importance(found, svg).read_bytes() == first


def test_unknown_suffix_and_value(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"map\.pdf.*\.png, \.svg or \.html"):
        plot(budget_stack(1), tmp_path / "map.pdf")
    with pytest.raises(ValueError, match="expected one of"):
        plot(budget_stack(1), tmp_path / "map.png", "size")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_for_importance(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"map\.pdf.*\.png, \.svg or \.html"):
        plot_importance(importance_stack(1), tmp_path / "map.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "map.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GatewiseError, match=r"cannot write .*map\.html: No space left on device"):
        plot(budget_stack(1), out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(GatewiseError, match=r"cannot write .*map\.png"):
        plot(budget_stack(1), tmp_path / "file" / "map.png")
    assert (tmp_path / "file").read_text() == "here"
