"""The page of a review in a real browser: load, extract, correct, save, reload.

It needs a Chromium that is installed on this machine (or named in GATEWISE_CHROMIUM) and Playwright to drive it; no browser is
downloaded. GATEWISE_SCREENSHOTS names a folder for pictures of the page, of which `docs/` has five.
"""

import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from gatewise_mdt import DecisionTree, TreeRecord, agree, read_trees, sample
from gatewise_mdt.review import Extracting, Session
from gatewise_mdt.review import Review as Reviewed
from gatewise_mdt.review import session as session_module
from gatewise_mdt.review.adjudication import prepare
from gatewise_mdt.review.passage import Version
from gatewise_mdt.review.server import ReviewServer
from gatewise_mdt.review.session import By
from gatewise_mdt.review.users import UserFile
from mdt_trees import TEXT, gout, node, triple
from PIL import Image
from reading_corpus import Heading, Prose, Table
from reading_pdf import pdf_of
from review_serving import tick_all

from gatewise.errors import GatewiseError

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'gatewise-mdt[dev]'")
pytestmark = pytest.mark.browser

OFTEN = "const later = setTimeout; window.setTimeout = (done, after) => later(done, after === 3000 ? 200 : after)"
HOSTILE = "women@For <script>document.title='broken'</script> & <b>pain</b>, give \"ibuprofen\"."
ASTHMA = next(record for record in sample() if record.population == "Adults asthma" or "asthma" in record.population)


def tree_of(text: str) -> Any:
    """What the model of these tests writes: the right tree of a sample with one wrong phrase, or an empty one."""
    record = next((record for record in sample() if record.text == text), None)
    if record is None:
        return SimpleNamespace(
            tree=DecisionTree.from_preorder([{"role": "D", "triples": [], "logical_rel": "null"}]),
            warnings=(),
            made_with=None,
            confidence=None,
        )
    nodes = record.tree.to_preorder()
    nodes[1]["triples"][0][2] = "paracetamol"
    return SimpleNamespace(
        tree=DecisionTree.from_preorder(nodes),
        warnings=("the output was brought to a close before its end",),
        made_with=None,
        confidence=None,
    )


class Review:
    """A running review and a page that shows it. A page that logs an error fails the test."""

    def __init__(self, session: Session, chromium: Any, slow: float = 0, users: UserFile | None = None) -> None:
        self.session = session
        self.slow = slow
        self.users = users
        self.extracting = Extracting(session, self.extract)
        self.server = ReviewServer(Reviewed(session, self.extracting), users)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        self.contexts: list[Any] = []
        self.chromium = chromium
        sync_api.expect.set_options(timeout=20_000)  # on a busy machine a reload can take more than the 5 s it has otherwise
        self.errors: list[str] = []
        self.asked: list[str] = []
        if users is None:
            self.page = self.stranger(self.server.url)

    def stranger(self, url: str) -> Any:
        """The page in a browser that knows nothing of any other."""
        size = {"width": 1280, "height": 800}
        self.context = self.chromium.new_context(viewport=size, accept_downloads=True, reduced_motion="reduce", timezone_id="UTC")
        self.context.set_default_timeout(20_000)
        if self.users:  # each looks often at what the others do
            self.context.add_init_script(OFTEN)
        self.contexts.append(self.context)
        return self.opened(url)

    def opened(self, url: str) -> Any:
        page = self.context.new_page()
        page.on("console", self.logged)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(url)
        return page

    def logged(self, message: Any) -> None:
        # The browser logs every answer that refuses something.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def extract(self, text: str, language: Any) -> Any:
        time.sleep(60 * self.slow)
        if "unreadable" in text:
            raise GatewiseError("the passage takes 9,000 tokens of the 2,048 that the model can read")
        return tree_of(text)

    def end(self) -> None:
        for context in self.contexts:
            context.close()
        self.server.end()
        self.thread.join()
        self.extracting.end()
        self.session.close()

    def shot(self, name: str) -> None:
        if folder := os.environ.get("GATEWISE_SCREENSHOTS"):
            picture = Image.open(io.BytesIO(self.page.screenshot()))
            picture.quantize(128, dither=Image.Dither.NONE).save(Path(folder) / f"{name}.png", optimize=True)

    # ---- what is on the page ----

    def node(self, number: int) -> Any:
        return self.page.locator(f"#tree .node[data-node='{number - 1}']")

    def state(self) -> str:
        return str(self.page.inner_text("#state"))

    def wait_state(self, word: str) -> None:
        sync_api.expect(self.page.locator("#state")).to_have_text(word)

    def validity(self, text: str) -> None:
        sync_api.expect(self.page.locator("#validity")).to_contain_text(text)


@pytest.fixture
def review(tmp_path: Path, chromium: Any) -> Iterator[Callable[..., Review]]:
    """review(file, slow, users) -> a running review of a file, which goes to out.jsonl, with its page open, without users."""
    running: list[Review] = []

    def start(file: Any = None, slow: float = 0, users: UserFile | None = None) -> Review:
        session = Session.open(None if file is None else str(file), tmp_path / "out.jsonl", reviewer="Cora Weiss")
        running.append(Review(session, chromium, slow, users))
        return running[-1]

    yield start
    for one in running:
        if one.thread.is_alive():
            one.end()
        assert one.errors == []
        # Nothing comes from anywhere else, and the token is in no address.
        assert all(url.startswith((f"http://127.0.0.1:{one.server.port}/", "blob:", "data:")) for url in one.asked)
        assert not any("token=" in url.partition("#")[0] for url in one.asked)


def add(review: Review, text: str) -> None:
    review.page.click("#add")
    review.page.fill("#add-text", text)
    review.page.click("#add-go")
    review.page.wait_for_selector("#add-dialog", state="hidden")


def select_in_text(page: Any, words: str) -> None:
    """Selects words of the passage as a mouse would."""
    page.evaluate(
        """words => {
          const walk = document.createTreeWalker(document.getElementById("passage"), NodeFilter.SHOW_TEXT);
          const nodes = []; let text = "";
          while (walk.nextNode()) { nodes.push([walk.currentNode, text.length]); text += walk.currentNode.data; }
          const place = at => { const [node, start] = nodes.filter(([, begin]) => begin <= at).at(-1); return [node, at - start]; };
          const from = text.indexOf(words), range = document.createRange();
          range.setStart(...place(from)); range.setEnd(...place(from + words.length));
          getSelection().removeAllRanges(); getSelection().addRange(range);
        }""",
        words,
    )


def test_load_extract_correct_save_reload(review: Callable[..., Review], tmp_path: Path) -> None:
    first = sample()[0]
    here = review(slow=0.02)
    page = here.page
    assert page.is_visible("text=Nothing to review yet")
    assert page.is_visible("text=Needs review by a clinician")
    assert "token" not in page.url
    add(here, first.text)
    page.click("#extract")
    page.wait_for_selector("#progress:not([hidden])")
    here.wait_state("to review")
    assert page.locator("#tree .node").count() == len(first.tree.nodes)
    assert page.is_visible("text=the output was brought to a close before its end")
    here.validity("some phrases are not in the text")
    # The wrong phrase, set by selecting the right one in the text.
    page.click("#validity button")
    assert page.input_value("#object-0") == "paracetamol"
    assert page.is_visible("#editor >> text=not in the text")
    right = first.tree.nodes[1].triples[0].object
    select_in_text(page, right)
    page.click("#take-object-0")
    here.validity("every phrase is in the text")
    assert page.input_value("#object-0") == right
    here.wait_state("corrected")
    assert page.inner_text("#save") == "Save (1)"
    page.click("#approve")
    here.wait_state("approved")
    page.click("#save")
    sync_api.expect(page.locator("#save")).to_have_text("Save")
    (record,) = read_trees(tmp_path / "out.jsonl").records
    assert (record.text, record.tree, record.more["review"]) == (first.text, first.tree, "approved")

    # The page is loaded again, then the whole review is started again.
    page.reload()
    here.wait_state("approved")
    assert page.locator("#tree .node").count() == len(first.tree.nodes)
    here.end()
    again = review()
    again.wait_state("approved")
    assert again.page.inner_text("#save") == "Save"
    assert again.page.is_disabled("#redo")


def test_every_step_on_the_tree(review: Callable[..., Review]) -> None:
    here = review()
    page = here.page
    add(here, "men with fever@If the fever lasts for three days, give paracetamol. Otherwise rest.")
    page.click("#begin")
    here.validity("A valid tree")
    page.click("#kind-C")
    here.validity("Not a valid tree yet: node 1: a condition (role C) without triples")
    assert page.is_disabled("#approve")
    assert here.state() == "unfinished"
    select_in_text(page, "the fever lasts for three days")
    page.click("#phrase-add")
    sync_api.expect(page.locator("#object-0")).to_be_focused()
    here.validity("A valid tree, but look below")
    assert page.input_value("#subject-0") == "men with fever"

    # With the keys: to the yes leaf, a triple, its fields one after another.
    here.node(1).focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(here.node(2)).to_be_focused()
    page.click("#add-triple")
    sync_api.expect(page.locator("#object-0")).to_be_focused()
    page.keyboard.type("paracetamol")
    page.keyboard.press("Shift+Tab")  # leaving a field keeps what is in it
    here.validity("A valid tree, but look below")
    page.select_option("#relation-0", "drug therapy")
    sync_api.expect(here.node(2)).to_contain_text("drug therapy")
    page.click("#add-triple")
    page.fill("#object-1", "rest")
    page.keyboard.press("Enter")
    page.check("#join-or")
    sync_api.expect(here.node(2)).to_contain_text("Then any of these")
    page.click("#remove-1")
    sync_api.expect(here.node(2)).not_to_contain_text("rest")

    here.node(1).click()
    page.click("#swap")
    sync_api.expect(here.node(3)).to_contain_text("paracetamol")
    here.node(1).focus()
    page.keyboard.press("Control+z")
    sync_api.expect(here.node(2)).to_contain_text("paracetamol")
    here.node(3).click()
    page.click("#above-yes")
    sync_api.expect(page.locator("#tree .node")).to_have_count(5)
    page.click("#keep-yes")
    sync_api.expect(page.locator("#tree .node")).to_have_count(3)
    here.node(1).click()
    page.click("#delete")
    sync_api.expect(page.locator("#tree .node")).to_have_count(1)
    for _ in range(200):
        if page.locator("#begin").count():
            break
        page.evaluate("document.getElementById('undo').click()")
        page.wait_for_timeout(20)
    sync_api.expect(page.locator("#begin")).to_be_visible()


def test_what_a_tree_leaves_out_is_listed_in_place_of_the_green_line(review: Callable[..., Review], tmp_path: Path) -> None:
    here = review()
    page = here.page
    add(here, "adults@ 😀 Give colchicine 0.5 mg twice daily. If the eGFR is below 30, avoid colchicine.")
    page.click("#begin")
    here.validity("look below at what it may have left out")
    items = page.locator("#items-list li")
    sync_api.expect(items.first).to_contain_text("empty tree: The tree recommends nothing, and the text does. node 1")
    dose = items.filter(has_text='No triple has "0.5 mg"')
    dose.locator("button").click()
    assert page.evaluate("getSelection().toString()") == "0.5 mg"
    page.click("#phrase-add")  # what is selected can be added to the tree at once
    page.select_option("#relation-0", "dosage and administration")
    sync_api.expect(items.filter(has_text="empty tree")).to_have_count(0)
    sync_api.expect(dose).to_have_count(0)
    # With the keys: a word why for each, and then the tree can be approved.
    left = items.count()
    sync_api.expect(page.locator("#approve")).to_be_disabled()
    items.first.locator("input[type=text]").focus()
    page.keyboard.press("Enter")  # without a word nothing is ticked
    for done in range(left):
        sync_api.expect(page.locator("#items-list .ticked")).to_have_count(done)
        page.keyboard.type(("said in other words", "stands elsewhere in the tree")[done % 2])
        page.keyboard.press("Enter")
    sync_api.expect(page.locator("#approve")).to_be_focused()
    here.validity("every item is ticked")
    sync_api.expect(items.nth(left - 1)).to_contain_text("” Cora Weiss, 20")
    items.first.locator("input[type=checkbox]").uncheck()
    sync_api.expect(page.locator("#approve")).to_be_disabled()
    page.click("#undo")
    page.click("#approve")
    here.wait_state("approved")
    page.select_option("#language", "zh")
    sync_api.expect(page.locator("#items-list")).to_contain_text("禁忌缺失: “avoid colchicine”")


def test_texts_stay_texts_and_passages_are_told_apart(review: Callable[..., Review]) -> None:
    here = review()
    page = here.page
    add(here, f"{HOSTILE}\n\n高血压患者@若血压仍高，加用氨氯地平。\n\nmen@This is unreadable.")
    sync_api.expect(page.locator("#passages li")).to_have_count(3)
    page.click("#extract-all")
    page.wait_for_selector("#passages .chip.failed")
    sync_api.expect(page.locator("#passages .chip.drafted")).to_have_count(2)
    page.click("#open-1")
    assert page.inner_text("#passage") == HOSTILE.partition("@")[2]
    assert page.locator("#passage script, #passage b").count() == 0
    page.click("#add-triple")
    page.fill("#object-0", "<script>document.title='broken'</script>")
    page.keyboard.press("Enter")
    here.validity("A valid tree, but look below")
    assert page.title() == "Review of decision trees"
    page.click("#open-2")
    sync_api.expect(page.locator("#population")).to_have_text("高血压患者")
    page.click("#add-triple")
    page.select_option("#relation-0", "治疗药物")
    sync_api.expect(here.node(1)).to_contain_text("治疗药物")  # what comes later would take the selection away
    select_in_text(page, "氨氯地平")
    page.click("#take-object-0")
    here.validity("A valid tree, but look below")
    sync_api.expect(here.node(1)).to_contain_text("则")
    page.click("#next")
    sync_api.expect(page.locator("#tree")).to_contain_text("9,000 tokens")


def test_files_come_in_and_exports_go_out(review: Callable[..., Review], tmp_path: Path) -> None:
    here = review()
    page = here.page
    (tmp_path / "guide.md").write_text("# Adults with gout\n\nGive colchicine for a flare.\n")
    (tmp_path / "trees.json").write_text(json.dumps([sample()[1].to_json()]))
    for name in ("guide.md", "trees.json"):
        page.click("#add")
        page.set_input_files("#add-file", tmp_path / name)
        page.click("#add-go")
        page.wait_for_selector("#add-dialog", state="hidden")
    page.click("#add")
    page.click("#add-go")  # with nothing in it
    sync_api.expect(page.locator("#add-error")).to_contain_text("is empty")
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 2")
    page.click("#export")
    page.select_option("#export-format", "html")
    with page.expect_download() as download:
        page.click("#export-go")
    content = Path(download.value.path()).read_text(encoding="utf-8")
    assert download.value.suggested_filename == "out-2.html"
    assert sample()[1].population in content
    page.click("#export")
    page.select_option("#export-which", "approved")
    page.click("#export-go")
    sync_api.expect(page.locator("#export-error")).to_contain_text("no valid tree to export")


def test_a_long_extraction_can_be_watched_and_cancelled(review: Callable[..., Review]) -> None:
    here = review(slow=0.03)
    page = here.page
    add(here, "\n\n".join(record.text for record in sample()[:4]))
    page.click("#extract-all")
    sync_api.expect(page.locator("#passages .chip.drafted")).to_have_count(1)
    sync_api.expect(page.locator("#progress-text")).to_contain_text("Extracting the tree of passage")
    page.click("#open-1")  # what is done can be looked at meanwhile
    here.wait_state("to review")
    tick_all(here.session, 1)
    page.click("#approve")
    here.wait_state("approved")
    page.click("#cancel")
    sync_api.expect(page.locator("#progress")).to_be_hidden()
    assert page.locator("#passages .chip.empty").count() >= 1


def test_a_change_that_comes_too_late_stands_above_the_present_tree(review: Callable[..., Review]) -> None:
    """Nothing is made on a tree that was not seen: the present one is shown, with the words that were typed until they are read."""
    here = review("sample:guidelines")
    page, said = here.page, here.page.locator("#conflict")
    here.node(2).click()
    here.session.edit(1, 0, "swap", {"node": 0}, By("Bea", "another window"))
    page.fill("#comment", "see page 3")
    page.fill("#object-0", "words of mine")
    page.keyboard.press("Enter")
    sync_api.expect(said).to_contain_text("Passage 1 was changed while you were at work on it: Bea changed the tree")
    sync_api.expect(said).to_contain_text("Not made: “words of mine”.")
    here.wait_state("corrected")
    assert page.input_value("#object-0") != "words of mine"
    assert page.input_value("#comment") == "see page 3"  # for the next change
    assert here.session.passage(1).version == 1
    # A second one, of another passage, takes nothing away from the first.
    page.click("#open-3")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 3")
    here.session.edit(3, 0, "swap", {"node": 0}, By("Bea", "another window"))
    page.click("#approve")
    sync_api.expect(said).to_contain_text("Not made: the approval.")
    sync_api.expect(said).to_contain_text("“words of mine”")
    page.click("#conflict-drop")
    sync_api.expect(said).to_be_hidden()
    page.click("#swap")  # of the tree that is shown now
    sync_api.expect(page.locator("#history-list")).to_contain_text("Cora Weiss changed the tree")
    assert page.is_hidden("#conflict")


def test_an_address_without_the_token_shows_nothing(review: Callable[..., Review]) -> None:
    here = review("sample:guidelines")
    stranger = here.context.new_page()
    stranger.goto(here.server.url.partition("#")[0])
    sync_api.expect(stranger.locator("#trouble")).to_contain_text("open the address that the terminal shows")
    assert stranger.locator("#passages li").count() == 0


def test_what_is_asked_for_before_a_branch_has_moved_is_made_nowhere_else(review: Callable[..., Review]) -> None:
    here = review("sample:guidelines")
    page = here.page
    page.wait_for_selector("#tree svg")
    held: list[Any] = []
    page.route("**/api/edit", lambda route: held.append(route))  # an own attribute is set on it
    with page.expect_request("**/api/edit"):
        page.click("#swap")
    here.node(2).click()
    page.fill("#object-0", "words of mine")  # which belong to a triple of the other branch by then
    page.keyboard.press("Enter")
    held[0].continue_()
    page.unroute("**/api/edit")
    sync_api.expect(page.locator("#conflict")).to_contain_text("Not made: “words of mine”.")
    assert here.session.passage(1).version == 1
    here.wait_state("corrected")


def test_an_extraction_does_not_land_on_what_is_being_written(review: Callable[..., Review]) -> None:
    """All of a field is selected and about to be written over when the model's tree comes: field and tree stay."""
    here = review("sample:guidelines")
    page = here.page
    here.wait_state("to review")
    here.node(2).click()
    old = page.input_value("#object-0")
    page.focus("#object-0")
    page.keyboard.press("Control+a")
    page.evaluate("document.getElementById('extract').click()")  # asked for from here, with the field in use
    sync_api.expect(page.locator("#news")).to_contain_text("had it extracted")
    assert page.input_value("#object-0") == old
    page.keyboard.type("words of mine")
    assert page.input_value("#object-0") == "words of mine"
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#conflict")).to_contain_text("Not made: “words of mine”.")
    sync_api.expect(page.locator("#tree")).to_contain_text("paracetamol")  # what the model wrote
    assert (here.session.passage(1).now.nodes or [])[1]["triples"][0][2] == "paracetamol"


def test_what_the_history_cannot_take_is_said_and_not_done(review: Callable[..., Review], tmp_path: Path) -> None:
    here = review("sample:guidelines")
    page = here.page
    page.wait_for_selector("#tree svg")
    (tmp_path / "out.history.jsonl").mkdir()
    page.click("#swap")
    sync_api.expect(page.locator("#said")).to_contain_text("out.history.jsonl")
    here.wait_state("to review")  # what cannot be written is not done
    page.route("**/api/**", lambda route: route.abort())  # as after its end
    page.click("#approve")
    sync_api.expect(page.locator("#said")).to_contain_text("Start it again; everything is kept.")


def test_two_reviewers_at_one_server(review: Callable[..., Review], tmp_path: Path) -> None:
    """Each in a browser of their own: what one does the other is told, and by whom, and no word of either is lost."""
    users = UserFile(tmp_path / "users.json")
    tokens = [users.add(name) for name in ("Ada", "Bea <b>")]
    here = review("sample:guidelines", users=users)
    ada, bea = (here.stranger(f"{here.server.url}#token={token}") for token in tokens)
    for page, name in ((ada, "Ada"), (bea, "Bea <b>")):
        sync_api.expect(page.locator("#you")).to_have_text(f"Reviewer: {name}")
        page.locator("#tree .node[data-node='1']").click()
    # Ada is typing when Bea changes the same passage: the tree before her stays, and she is told.
    ada.fill("#object-0", "words of Ada")
    bea.fill("#object-0", "words of Bea")
    bea.keyboard.press("Enter")
    sync_api.expect(bea.locator("#reviewed")).to_contain_text("corrected by Bea <b>, 20")
    sync_api.expect(ada.locator("#news")).to_contain_text("Bea <b> changed the tree")
    assert "words of Bea" not in ada.inner_text("#tree")
    ada.press("#object-0", "Enter")
    sync_api.expect(ada.locator("#conflict")).to_contain_text("“words of Ada”")
    sync_api.expect(ada.locator("#tree")).to_contain_text("words of Bea")
    assert ada.is_hidden("#news")
    # A comment alone changes nothing; Bea's page goes on with the version that it has.
    said = "who says so?\n<script>document.title='broken'</script>"
    ada.fill("#comment", said)
    ada.click("#comment-go")
    sync_api.expect(ada.locator("#history-list")).to_contain_text("Ada commented")
    bea.fill("#comment", "dose checked")
    tick_all(here.session, 1)
    bea.click("#approve")
    sync_api.expect(bea.locator("#state")).to_have_text("approved")
    sync_api.expect(bea.locator("#history-list q").filter(has_text="<script>")).to_have_text(said.replace("\n", " "))
    # The tree is the same, so Ada's page follows by itself.
    for place in ("#state", "#open-1 .chip"):
        sync_api.expect(ada.locator(place)).to_have_text("approved")
    sync_api.expect(ada.locator("#reviewed")).to_have_text(
        re.compile(r"approved by Bea <b>, 20\d\d-\d\d-\d\d \d\d:\d\d: “dose checked”")
    )
    asked: list[str] = []
    ada.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    ada.click("#approve")  # meant to approve it, too, or to take Bea's word back: it is asked which
    assert asked == ["Take the approval of Bea <b> back?"]
    sync_api.expect(ada.locator("#state")).to_have_text("approved")
    assert ada.title() == "Review of decision trees"
    assert ada.locator("#history-list script, #reviewed b, #passages .by b").count() == 0
    done = [(entry.reviewer, entry.action, entry.comment) for entry in here.session.history(here.session.passage(1))]
    done = [one for one in done[1:] if one[1] != "tick"]
    assert done == [("Bea <b>", "edit", ""), ("Ada", "comment", said), ("Bea <b>", "approve", "dose checked")]


def test_a_comment_waits_at_its_passage_and_comes_back_when_it_is_refused(review: Callable[..., Review]) -> None:
    here = review("sample:guidelines")
    page = here.page
    assert page.is_disabled("#comment-go")
    page.fill("#comment", "of the first")
    page.click("#open-3")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 3")
    assert page.input_value("#comment") == ""
    page.click("#approve")
    here.wait_state("approved")
    page.click("#open-1")
    sync_api.expect(page.locator("#comment")).to_have_value("of the first")
    page.locator("#comment").evaluate("one => { one.value = 'half a pair \\ud800'; one.dispatchEvent(new Event('input')) }")
    page.click("#swap")
    sync_api.expect(page.locator("#said")).to_contain_text("the comment ")
    assert page.evaluate("document.getElementById('comment').value.slice(0, 11)") == "half a pair"
    page.fill("#comment", "the branches were exchanged")
    page.click("#swap")
    here.wait_state("corrected")
    assert page.input_value("#comment") == ""
    sync_api.expect(page.locator("#reviewed")).to_contain_text("“the branches were exchanged”")
    assert [entry.comment for entry in here.session.history(here.session.passage(3))][-1] == ""


def test_a_page_of_an_earlier_run_says_so_and_keeps_what_was_typed(review: Callable[..., Review]) -> None:
    """Another review at the same address: its passages have other numbers, though its reviewers' tokens are the same."""
    here = review("sample:guidelines")
    page = here.page
    page.wait_for_selector("#tree svg")
    here.server.review.run = "later"
    page.fill("#comment", "the dose is right")
    page.click("#approve")
    sync_api.expect(page.locator("#said")).to_contain_text("the review was started again since this page was loaded")
    sync_api.expect(page.locator("#trouble")).to_contain_text("load the page again")
    assert page.input_value("#comment") == "the dose is right"
    assert here.session.passage(1).version == 0
    page.once("dialog", lambda dialog: dialog.accept())  # that something is typed
    page.reload()
    page.click("#approve")
    here.wait_state("approved")


def test_what_is_typed_fast_is_all_kept(review: Callable[..., Review]) -> None:
    """The second field is left before the answer to the first one has come."""
    here = review()
    page = here.page
    add(here, "men with fever@Give paracetamol, rest and water.")
    page.click("#begin")
    page.click("#add-triple")
    sync_api.expect(page.locator("#object-0")).to_be_focused()
    page.route("**/api/edit", lambda route: (time.sleep(0.4), route.continue_()))
    page.fill("#subject-0", "boys")
    page.keyboard.press("Tab")
    page.fill("#object-0", "water")
    page.keyboard.press("Tab")
    page.click("#add-triple")
    sync_api.expect(page.locator("#object-1")).to_be_visible()
    for _ in range(200):  # what was typed may still be on its way
        triples = here.session.passage(1).now.nodes[0]["triples"]
        if len(triples) > 1:
            break
        page.wait_for_timeout(50)
    assert [triples[0][0], triples[0][2], len(triples)] == ["boys", "water", 2]
    assert page.is_hidden("#conflict")


@pytest.fixture
def reviewed(review: Callable[..., Review], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Review:
    """A review on which two people have been at work, at times that are always the same, as one of them sees it."""
    monkeypatch.setattr(session_module, "_now", lambda: "2026-03-02T09:10:00.000+00:00")
    users = UserFile(tmp_path / "users.json")
    token = users.add("Ada Lind")
    here = review("sample:guidelines", users=users)
    hours = (f"2026-03-02T09:{minute}:00.000+00:00" for minute in count(20))
    monkeypatch.setattr(session_module, "_now", lambda: next(hours))
    ada, ben = By("Ada Lind"), By("Ben Oro")
    parts = [None, None, "blood pressure stays high"]
    ben_says = ben._replace(comment="shorter, as in the other trees")
    here.session.edit(1, 0, "set_triple", {"node": 0, "triple": 0, "parts": parts}, ben_says)
    here.session.comment(1, ada._replace(comment="These are not the words of the text. How high, and for how long?"))
    here.session.approve(4, 0, by=ada._replace(comment="doses checked"))
    here.session.approve(3, 0, by=ben)
    here.page = here.stranger(f"{here.server.url}#token={token}")
    here.page.wait_for_selector("#tree svg")
    return here


def test_who_did_what_and_when_is_on_the_page(reviewed: Review) -> None:
    page = reviewed.page
    assert page.inner_text("#you") == "Reviewer: Ada Lind"
    assert page.locator("#passages .by").all_inner_texts() == ["Ben Oro", "Ben Oro", "Ada Lind"]
    assert page.inner_text("#reviewed") == "corrected by Ben Oro, 2026-03-02 09:20: “shorter, as in the other trees”"
    assert page.locator("#history-list time").all_inner_texts() == ["2026-03-02 09:21", "2026-03-02 09:20", "2026-03-02 09:10"]
    reviewed.node(1).click()
    assert page.is_visible("#history-list q >> nth=0")
    reviewed.shot("review")
    page.click("#open-4")
    sync_api.expect(page.locator("#reviewed")).to_have_text("approved by Ada Lind, 2026-03-02 09:22: “doses checked”")
    page.click("#approve")
    reviewed.wait_state("to review")  # as nobody stands for it any more
    assert page.inner_text("#reviewed") == ""


def test_on_a_small_screen(reviewed: Review) -> None:
    page = reviewed.page
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_selector("#tree svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    reviewed.node(2).click()
    page.locator("#object-0").scroll_into_view_if_needed()
    assert page.is_visible("#object-0")


def test_what_was_carried_over_from_an_older_version(review: Callable[..., Review], tmp_path: Path) -> None:
    old = sample()[:2]
    record = [replace(one, more={"review": "approved", "place": "page 3"}) for one in old]
    file = tmp_path / "new.txt"
    file.write_text(f"{old[0].text.replace('140/90 mmHg', '130/80 mmHg')}\n\n{old[1].text}\n")
    here = review(file)
    page = here.page
    here.session.carry(record, "old.review.jsonl")
    page.reload()
    here.wait_state("to review")
    sync_api.expect(page.locator("#carried-head")).to_have_text(
        "Carried over from old.review.jsonl, page 3; the text has changed since"
    )
    assert page.inner_text("#carried-difference del") == "at or above 140/90 mmHg"
    assert page.inner_text("#carried-difference ins") == "at or above 130/80 mmHg"
    assert page.evaluate("document.getElementById('carried').open")
    page.click("#open-2")
    here.wait_state("approved")
    sync_api.expect(page.locator("#carried-head")).to_have_text("Carried over from old.review.jsonl, page 3; the text is the same")
    assert not page.evaluate("document.getElementById('carried').open")


def test_what_two_reviewers_say_differently_stands_by_danger(review: Callable[..., Review], tmp_path: Path) -> None:
    other = gout()
    other[1]["triples"][1][2] = "5 mg twice daily"
    other[1]["triples"][2][1] = "prohibited drugs"
    ada, ben = (TreeRecord(TEXT, DecisionTree.from_preorder(tree), 1) for tree in (gout(), other))
    prepare(agree([ada], [ben], names=("Ada", "Ben")), tmp_path / "out.jsonl")
    here = review()
    listed = here.page.locator("#beside-tree .differences li")
    sync_api.expect(listed.first).to_be_visible()
    assert [one.split("\n") for one in listed.all_inner_texts()] == [
        [
            "contrary orders (given / not given)",
            "here: adults with gout | drug therapy | naproxen",
            "Ben: adults with gout | prohibited drugs | naproxen",
        ],
        [
            "other dose (number)",
            "here: colchicine | dosage and administration | 0.5 mg twice daily",
            "Ben: colchicine | dosage and administration | 5 mg twice daily",
        ],
    ]
    here.page.click("#beside-leave")
    sync_api.expect(listed).to_have_count(0)


def test_the_document_stands_beside_the_passage(
    review: Callable[..., Review], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a PDF with the passage marked, a table that was read without certainty as a picture, and blocks of others."""
    about = "Adults with heart failure"
    given = [("ramipril", "2.5 mg twice daily"), ("bisoprolol", "1.25 mg once daily"), ("losartan", "25 mg once daily")]
    targets = ("5 mg twice daily", "10 mg once daily", "150 mg once daily")
    parts = [
        Heading("Adults with gout"),
        Prose(("For an acute flare, give colchicine 0.5 mg twice daily. Do not give colchicine if the eGFR is below 10.",)),
        Heading(about),
        Prose(
            ("If the ejection fraction is 40% or less, give ramipril and bisoprolol. If ramipril causes a cough, give losartan.",)
        ),
        Table(("Drug", "Start", "Target"), tuple((*one, target) for one, target in zip(given, targets, strict=True))),
    ]
    monkeypatch.chdir(tmp_path)
    Path("heart failure.pdf").write_bytes(pdf_of(parts, Random(1), "none", "one column"))
    here = review("heart failure.pdf")
    page = here.page
    gout = [node("D", triple("colchicine", "drug therapy", "Adults with gout"))]
    drugs = [triple(drug, "drug therapy", about) for drug, _ in given[:2]]
    doses = [triple(start, "dosage and administration", drug) for drug, start in given[:2]]
    condition = node("C", triple("ejection fraction is 40% or less", subject=about))
    trees = [gout, [condition, node("D", *drugs, *doses, joined="and"), node("D")]]
    for number, nodes in enumerate(trees, start=1):
        here.session.put(number, Version(nodes, "drafted"), of=0)
    page.reload()
    drawn = page.locator("#source svg.page")
    sync_api.expect(drawn).to_have_attribute("aria-label", "heart failure.pdf, Page 1 of 1, the passage is marked")
    assert page.locator("#source .own").count() == 1
    assert page.locator("#doubted svg").count() == 0
    page.keyboard.press("n")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 2")
    sync_api.expect(page.locator("#doubted figure")).to_contain_text("Read without certainty; as it is printed on page 1:")
    box = page.locator("#doubted svg").get_attribute("viewBox").split()
    assert float(box[3]) < 200  # the table alone
    widths = {name: page.locator(name).bounding_box()["width"] for name in ("nav", "#left", "#right")}
    assert max(widths, key=lambda name: widths[name]) == "#left"
    page.set_viewport_size({"width": 1440, "height": 1000})
    here.shot("review_source")
    wide = drawn.bounding_box()["width"]
    page.click("#larger")
    assert drawn.bounding_box()["width"] > 1.5 * wide

    # What is not of the document itself is not there: no scripts, no pictures from elsewhere, and signs that turn text round.
    hostile = tmp_path / "steps.html"
    hostile.write_text(
        "<h1>Adults with asthma</h1><script>document.title='broken'</script><img src='http://evil.example/x.png'>"
        "<p>Give budesonide.</p><ul><li>In pregnancy:<ul><li>stop &lt;b&gt;theophylline&lt;/b&gt;\u202e</ul></ul>"
        "<table><tr><th>Drug<th>Dose<tr><td>budesonide<td>200 micrograms</table>"
    )
    page.click("#add")
    page.set_input_files("#add-file", hostile)
    page.click("#add-go")
    sync_api.expect(page.locator("#source [role=listitem]").nth(1)).to_have_text("stop <b>theophylline</b>\\u202e")
    assert page.locator("#source [role=listitem]").nth(1).get_attribute("aria-level") == "2"
    assert page.locator("#source th").all_inner_texts() == ["Drug", "Dose"]
    assert page.locator("#source script, #source img, #source p b:not(.own)").count() == 0
    assert page.title() == "Review of decision trees"


def test_a_passage_is_found_among_many(review: Callable[..., Review]) -> None:
    here = review("sample:guidelines")
    page, listed = here.page, here.page.locator("#passages li")
    page.wait_for_selector("#tree svg")
    sync_api.expect(page.locator("#source")).to_have_text("The document of this passage is not here: only its text is shown.")
    for number in (1, 2, 4):
        here.session.approve(number, tick_all(here.session, number))
    page.reload()
    page.wait_for_selector("#tree svg")
    page.keyboard.press("n")  # past what is approved
    sync_api.expect(page.locator("#title")).to_have_text("Passage 3")
    page.keyboard.press("n")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 5")
    page.fill("#search", "asthma beta")
    sync_api.expect(listed).not_to_have_count(len(sample()))
    found = {one.number for one in here.session.passages if "asthma" in one.text.lower() and "beta" in one.text.lower()} | {5}
    sync_api.expect(listed).to_have_count(len(found))
    page.press("#search", "End")
    page.keyboard.press("n")  # is a letter here
    assert page.input_value("#search") == "asthma betan"
    sync_api.expect(page.locator("#none-found")).to_be_visible()
    page.fill("#search", "")
    page.select_option("#filter", "open")
    sync_api.expect(listed).to_have_count(len(sample()) - 3)
    sync_api.expect(page.locator("#open-4")).to_have_count(0)
    sync_api.expect(page.locator("#counts")).to_contain_text(f"{len(sample()) - 3} listed")  # hides nothing without a word
    page.select_option("#filter", "look")
    sync_api.expect(listed).not_to_have_count(len(sample()) - 3)


def test_controls_have_names(review: Callable[..., Review]) -> None:
    """What a screen reader would say of every control."""
    here = review("sample:guidelines")
    here.page.wait_for_selector("#tree svg")
    nameless = here.page.evaluate(
        """() => [...document.querySelectorAll("button,input,select,textarea,[role=button],dialog,section,nav")].filter(one =>
          !(one.getAttribute("aria-label") || one.getAttribute("aria-labelledby") || one.textContent.trim()
            || (one.labels && [...one.labels].some(label => label.textContent.trim())))).map(one => one.outerHTML)"""
    )
    assert nameless == []


def test_the_least_sure_come_first_and_a_changed_node_is_nobodys_guess(review: Callable[..., Review], tmp_path: Path) -> None:
    file = tmp_path / "trees.json"
    sure = [[0.9, 0.8, 0.7], [0.95, 0.41, 0.3], None, [0.6, 0.9, 0.499]]
    nodes = [
        node("C", triple("acute flare")),
        node("D", triple("rest", "therapeutic schedule")),
        node("D", triple("ibuprofen", "drug therapy")),
    ]
    rows = [{"text": f"{TEXT} {i}", "tree": nodes} | ({"confidence": one} if one else {}) for i, one in enumerate(sure, start=1)]
    file.write_text(json.dumps(rows))
    here = review(file)
    page = here.page

    def listed() -> list[str]:
        return [text.split("\n")[0] for text in page.locator("#passages button .number").all_inner_texts()]

    page.wait_for_selector("#tree svg")
    assert listed() == ["1", "2", "3", "4"]
    assert page.locator("#passages .sure").all_inner_texts() == [
        "least sure node: 70%", "least sure node: 30%, doubtful", "least sure node: 49%, doubtful"
    ]  # fmt: skip
    sync_api.expect(page.locator("#sure")).to_have_text("Least sure of the nodes: node 3 (70%)")
    # By keyboard: the list of orders is a control like any other.
    page.focus("#order")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#order") == "sure"
    assert listed() == ["2", "4", "1", "3"]
    page.click("#open-2")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 2")
    assert page.is_disabled("#previous")
    sync_api.expect(page.locator("#sure")).to_have_text("Doubtful, more likely wrong than right: node 3 (30%), node 2 (41%)")
    assert (here.node(2).get_attribute("aria-label") or "").endswith(". confidence 41%, doubtful")
    page.click("#sure button >> nth=1")
    sync_api.expect(page.locator("#node-sure")).to_contain_text("Confidence 41%: doubtful, more likely wrong than right")
    assert page.evaluate("document.querySelector('#node-sure meter').value") == 41
    page.fill("#object-0", "colchicine")
    page.keyboard.press("Enter")
    here.wait_state("corrected")
    assert page.locator("#node-sure").count() == 0
    assert "confidence" not in (here.node(2).get_attribute("aria-label") or "")
    sync_api.expect(page.locator("#sure")).to_have_text("Doubtful, more likely wrong than right: node 3 (30%)")
    page.click("#sure button")
    page.click("#delete")
    sync_api.expect(page.locator("#sure")).to_have_text("Least sure of the nodes: node 1 (95%)")
    assert listed() == ["2", "4", "1", "3"]  # nothing moves under who is at work
    tick_all(here.session, 2)
    page.click("#approve")
    here.wait_state("approved")
    assert page.is_hidden("#sure")
    assert page.locator("#open-2 .sure").count() == 0
    page.click("#next")
    sync_api.expect(page.locator("#title")).to_have_text("Passage 4")
    page.reload()
    sync_api.expect(page.locator("#title")).to_have_text("Passage 4")
    assert (page.input_value("#order"), listed()) == ("sure", ["4", "1", "2", "3"])
    page.select_option("#order", "place")
    assert listed() == ["1", "2", "3", "4"]
    page.select_option("#language", "zh")
    sync_api.expect(page.locator("#sure")).to_have_text("存疑，更可能是错的：节点 3 (49%)")
    assert page.locator("#order option").all_inner_texts() == ["按原文顺序", "置信度最低者优先"]
