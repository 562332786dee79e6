"""The HTML view in a real browser, from a file, under the policy that it sets itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, sample, write_view
from mdt_trees import node, triple

pytestmark = pytest.mark.browser
HOSTILE = "</script></style><script>document.title='broken'</script><img src=x onerror=document.title='broken'>"


class Shown:
    """A page in a browser, and what the browser complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri())

    def style(self, selector: str, name: str) -> str:
        return str(self.page.eval_on_selector(selector, f"one => getComputedStyle(one).{name}"))


@pytest.fixture
def shown(chromium: Any) -> Iterator[Shown]:
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    yield Shown(context.new_page())
    context.close()


def test_text_and_tree_mark_each_other(shown: Shown, tmp_path: Path) -> None:
    record = sample()[2]
    shown.open(write_view([record, sample()[0]], "html", tmp_path / "trees.html"))
    assert shown.errors == []
    page = shown.page
    assert shown.style("mark", "cursor") == "pointer"
    first = record.tree.nodes[0].triples[0].object
    page.locator("#record-1 [data-triple='0.0']").hover()
    marked = "".join(page.locator("#record-1 mark.on").all_text_contents())
    assert first.lower() in marked.lower()
    assert page.locator("#record-2 .on").count() == 0
    page.mouse.move(0, 0)  # by itself it leaves the first record when the page has scrolled to the second, which may take a moment
    page.locator("#record-2 mark").first.focus()
    assert page.locator("#record-2 .node.on").count() >= 1
    assert page.locator("#record-1 mark.on").count() == 0
    assert shown.errors == []


def test_nothing_in_a_text_runs_or_changes_the_page(shown: Shown, tmp_path: Path) -> None:
    nodes = [node("C", triple(HOSTILE, subject=HOSTILE + "1")), node("D", triple(HOSTILE + "2", "drug therapy")), node("D")]
    record = TreeRecord(
        f"{HOSTILE}@{HOSTILE} and more", DecisionTree.from_preorder(nodes), 1, {"note": HOSTILE, "warnings": [HOSTILE]}
    )
    shown.open(write_view([record], "html", tmp_path / "tree.html"))
    assert shown.errors == []
    assert "Decision tree" in shown.page.title()
    assert shown.page.locator("img").count() == 0
    assert HOSTILE in shown.page.locator(".note").text_content()


def test_what_is_put_into_the_file_later_is_blocked(shown: Shown, tmp_path: Path) -> None:
    """The policy works: without it each of these would change the title, or the looks."""
    path = write_view([sample()[0]], "html", tmp_path / "tree.html")
    spoilt = (
        "<script>document.title='broken'</script><img src='data:,' onerror=\"document.title='broken'\">"
        "<style>h1{color:red!important}</style><p id=styled style='color:red'>x</p></body>"
    )
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", spoilt), encoding="utf-8")
    shown.open(path)
    shown.page.wait_for_timeout(200)
    assert "Decision tree" in shown.page.title()
    assert "rgb(255, 0, 0)" not in (shown.style("h1", "color"), shown.style("#styled", "color"))
    assert sum("Content Security Policy" in error for error in shown.errors) >= 4
