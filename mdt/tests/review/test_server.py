"""The server of a review over real HTTP: whom it answers, what it refuses, and that nothing ends it."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gatewise_mdt import DecisionTree
from gatewise_mdt.evaluation.differences import KINDS, WHAT
from gatewise_mdt.review import Extracting, Review, Session
from gatewise_mdt.review import server as server_module
from gatewise_mdt.review.server import ReviewServer
from mdt_trees import TEXT, gout
from review_serving import serving

HOSTILE = "<script>alert(1)</script>\"'&\u2028 \U0001f600"


class Caller:
    """Asks a server as its page does, unless told otherwise."""

    def __init__(self, server: ReviewServer) -> None:
        self.server, self.token = server, server.url.partition("#token=")[2]

    def __call__(self, path: str, body: Any = None, *, method: str = "", raw: bytes | None = None, **headers: str | None) -> Any:
        """(status, parsed answer); a header of None is left out, underscores in names are hyphens."""
        status, content, _ = self.whole(path, body, method=method, raw=raw, **headers)
        return status, json.loads(content)

    def whole(self, path: str, body: Any = None, *, method: str = "", raw: bytes | None = None, **headers: str | None) -> Any:
        sent: dict[str, str | None] = {"X-Gatewise-Token": self.token, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            connection.putrequest(
                method or ("GET" if content is None else "POST"), path, skip_host="Host" in sent, skip_accept_encoding=True
            )
            if content is not None and "Content-Length" not in sent:
                sent["Content-Length"] = str(len(content))
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(content)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()


@contextmanager
def calling(folder: Path) -> Iterator[Caller]:
    """A running review of one tree and of a passage without one, with a model that always writes the same tree."""
    (folder / "trees.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}]))
    session = Session.open(str(folder / "trees.json"))
    session.paste("men@Give colchicine to them.")
    found = SimpleNamespace(tree=DecisionTree.from_preorder(gout()), warnings=("hurried",), made_with=None, confidence=None)
    extracting = Extracting(session, lambda text, language: found)
    with serving(Review(session, extracting)) as server:
        yield Caller(server)
    extracting.end()
    session.close()


@pytest.fixture
def call(tmp_path: Path) -> Iterator[Caller]:
    with calling(tmp_path) as caller:
        yield caller


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """The same, for all that changes nothing."""
    with calling(tmp_path_factory.mktemp("asked")) as caller:
        yield caller


# Whom it answers ------------------------------------------------------------------------------------------------------


def test_it_listens_on_this_machine_only(ask: Caller) -> None:
    assert ask.server.socket.getsockname()[0] == "127.0.0.1"
    assert ask.server.is_local
    assert ask.server.url == f"http://127.0.0.1:{ask.server.port}/#token={ask.token}"
    assert len(ask.token) >= 32


@pytest.mark.parametrize("path", ["/api/session", "/api/passage?number=1", "/api/source?number=1", "/api/search?words=gout"])
def test_nothing_is_told_without_the_token(ask: Caller, path: str) -> None:
    assert ask(path)[0] == 200
    for token in (None, "", "x", ask.token[:-1], "Ünïcode"):
        status, answer = ask(path, X_Gatewise_Token=None if token is None else token.encode("utf-8").decode("latin-1"))
        assert (status, "no token" in answer["error"]) == (401, True)
    assert ask(f"{path}{'&' if '?' in path else '?'}token={ask.token}", X_Gatewise_Token=None)[0] == 401


@pytest.mark.parametrize("path", ["edit", "save", "none"])
def test_nothing_is_changed_without_the_token(ask: Caller, path: str) -> None:
    before = ask("/api/session")[1]
    assert ask(f"/api/{path}", {"number": 1, "version": 0}, X_Gatewise_Token="wrong")[0] == 401
    assert ask("/api/session")[1] == before


def test_other_names_and_other_sites_are_refused(call: Caller) -> None:
    port = call.server.port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        "",
    ):
        for path in ("/", "/api/session"):
            assert call(path, Host=host)[0] == 403
        assert call("/api/save", {}, Host=host)[0] == 403
    assert call("/api/session", Host=f"localhost:{port}")[0] == 200
    for origin in ("http://evil.example", "null"):
        assert call("/api/save", {}, Origin=origin)[0] == 403
    assert call("/api/save", {}, Origin=f"http://127.0.0.1:{port}")[0] == 200
    # No answer of it may be read by other sites.
    status, _, headers = call.whole("/api/session", method="OPTIONS", Origin="http://evil.example")
    assert status >= 400
    assert "Access-Control-Allow-Origin" not in headers


def test_what_a_form_of_another_page_could_send_is_refused(call: Caller) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None, "application/jsonx"):
        assert call("/api/save", {}, Content_Type=kind)[0] == 415
    assert call("/api/save", {}, Content_Type="application/json; charset=utf-8")[0] == 200
    assert call("/api/save")[0] == 404  # not by GET


SCRIPTS = ("page.js", "editor.js", "calls.js", "history.js", "items.js", "list.js", "source.js")


def test_all_words_of_the_page_are_there_in_chinese() -> None:
    folder = resources.files("gatewise_mdt.review")
    scripts = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    known = set(re.findall(r'^  "(.+?)":', (folder / "words.js").read_text(encoding="utf-8"), re.MULTILINE))
    asked = set(re.findall(r'\btr\("([^"]+)"', scripts)) | {*KINDS, *WHAT}
    page = re.sub(r"<(script|style).*?</\1>", "", (folder / "page.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    texts = {text.strip() for text in re.findall(r">([^<>]+)<", page)} | set(re.findall(r'(?:aria-label|title)="([^"]+)"', page))
    standing = {text for text in texts if re.search(r"[A-Za-z]{3}", text) and not text.startswith("Ctrl+")} - {"English"}
    assert asked - known == set()
    assert standing - known == set()
    assert known - asked - standing == set()  # and none is left over


def test_every_answer_is_locked_up(ask: Caller) -> None:
    for path in (
        "/",
        "/page.js",
        "/editor.js",
        "/calls.js",
        "/history.js",
        "/items.js",
        "/list.js",
        "/source.js",
        "/words.js",
        "/page.css",
        "/views.css",
        "/marking.js",
        "/api/session",
        "/none",
    ):
        _, content, headers = ask.whole(path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert headers["Cache-Control"] == "no-store"
        assert ask.token not in content.decode()
        assert b"http://" not in content.replace(b"http://www.w3.org/", b"")
        assert b"https://" not in content
        assert not re.search(rb'(href|src)="/|["`]/api/', content)  # a proxy may serve it below a path


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/none",
        "/../pyproject.toml",
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2fsession.py",
        "/session.py",
        "/page.html",
        "//etc/passwd",
        "/page.js/../session.py",
        "/api/../session.py",
        "/api/none",
        "/\\..\\session.py",
        "/%00",
    ],
)
def test_only_its_own_pages_are_served(ask: Caller, path: str) -> None:
    assert ask(path)[0] == 404
    assert ask(path, {})[0] == 404


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"number": NaN'])
def test_bodies_that_are_no_json_object_are_refused(ask: Caller, raw: bytes) -> None:
    assert ask("/api/undo", raw=raw)[0] == 400
    assert ask("/api/session")[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("edit", {"edit": "swap"}, "arguments"),
        ("edit", {"number": "x", "version": 0, "edit": "swap", "arguments": {}}, "number is 'x'"),
        ("edit", {"number": True, "version": 0, "edit": "swap", "arguments": {}}, "expected a number"),
        ("edit", {"number": 1e400, "version": 0, "edit": "swap", "arguments": {}}, "expected a number"),
        ("edit", {"number": 1, "version": 0, "edit": ["swap"], "arguments": {}}, "expected str"),
        ("edit", {"number": 1, "version": 0, "edit": "swap", "arguments": {"node": -1}}, "no node -1"),
        ("edit", {"number": 2, "version": 0, "edit": "swap", "arguments": {"node": 0}}, "no tree yet"),
        ("undo", {"number": 99, "version": 0}, "no passage 99"),
        ("undo", {"number": 1, "version": 0}, "nothing to undo"),
        ("approve", {"number": 2, "version": 0, "approved": True}, "no tree yet"),
        ("begin", {"number": 1, "version": 0}, "a tree already"),
        ("paste", {"text": ""}, "is empty"),
        ("paste", {"text": ["x"]}, "expected text"),
        ("paste", {"text": "\ud800 and some words"}, "surrogate"),
        ("paste", {"text": "some words", "population": "\ud800"}, "the population has half of a surrogate pair"),
        ("load", {"name": "a.pdf", "content": "###"}, "did not arrive whole"),
        ("load", {"name": "a.pdf", "content": base64.b64encode(b"no pdf").decode()}, "a.pdf cannot be read as PDF"),
        ("load", {"name": "../../etc/passwd", "content": "eA=="}, "expected a text"),
        ("load", {"name": "", "content": "eA=="}, "expected a text"),
        ("extract", {"passages": [[1, 0], ["x", 0]]}, "no passage 'x'"),
        ("extract", {"passages": [[[1], 0]]}, "no passage"),
        ("extract", {"passages": [[1]]}, "missing"),
        ("extract", {"passages": [[1, "0"]]}, "missing"),
        ("take", {"number": 1, "version": 0, "extraction": 1}, "that extraction is not here any more"),
        ("leave", {"number": 1, "version": 0, "extraction": 0}, "that extraction is not here any more"),
        ("undo", {"number": 1, "version": 0, "window": 1}, "window is '1', expected text"),
        ("approve", {"number": 1, "version": 0, "approved": True, "comment": "\ud800"}, "surrogate"),
        ("extract", {}, "missing"),
        ("export", {"format": "exe", "which": "all"}, "'exe': expected one of text"),
        ("export", {"format": "json", "which": {"a": 1}}, 'expected the number of a passage, "all"'),
        ("export", {"format": "json", "which": 2}, "no valid tree to export"),
    ],
)
def test_bad_requests_get_one_sentence(ask: Caller, path: str, body: dict[str, Any], said: str) -> None:
    before = ask("/api/session")[1]
    status, answer = ask(f"/api/{path}", body)
    assert status == 400
    assert said in answer["error"]
    assert ask("/api/session")[1] == before


def test_a_body_that_is_too_large_is_refused(ask: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MOST_BYTES", 1000)
    assert ask("/api/paste", raw=b" " * 1001)[0] == 413


def test_a_fault_of_ours_is_told_and_does_not_end_it(call: Caller, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(self: Session) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(Session, "save", fail)
    status, answer = call("/api/save", {})
    assert (status, "a fault in gatewise (RuntimeError)" in answer["error"]) == (500, True)
    assert "RuntimeError: oh" in capsys.readouterr().err
    assert call("/api/session")[0] == 200


# What it does ---------------------------------------------------------------------------------------------------------


def test_a_whole_review(call: Caller) -> None:
    seen = call("/api/passage?number=1")[1]
    assert [piece for piece, _ in seen["population"]] == ["adults with gout"]
    assert "".join(piece for piece, _ in seen["passage"]) == TEXT.partition("@")[2]
    assert seen["nodes"][0]["children"] == [1, 2]
    assert (seen["fault"], seen["warnings"], seen["undo"]) == (None, [], 0)
    edit = {"number": 1, "version": 0, "edit": "set_triple"}
    arguments = {"node": 3, "triple": 0, "parts": ["adults with gout", "therapeutic schedule", HOSTILE]}
    status, answer = call("/api/edit", {**edit, "arguments": arguments})
    assert status == 200
    assert answer["passage"]["nodes"][3]["triples"][0]["absent"] == [False, True]
    assert "<script" not in answer["passage"]["drawing"]
    assert answer["session"]["unsaved"] == 1
    assert call("/api/edit", {**edit, "arguments": arguments})[0] == 409  # a page that shows the older tree
    answer = call("/api/edit", {"number": 1, "version": 1, "edit": "to_condition", "arguments": {"node": 4}})[1]
    assert answer["passage"]["fault"]["node"] == 4
    assert "without triples" in answer["passage"]["fault"]["message"]
    answer = call("/api/undo", {"number": 1, "version": 2})[1]
    assert (answer["passage"]["fault"], answer["passage"]["redo"]) == (None, 1)
    status, refused = call("/api/approve", {"number": 1, "version": 3, "approved": True})
    assert (status, "the tree cannot be approved yet, it has open items: " in refused["error"]) == (400, True)
    for place, item in enumerate(answer["passage"]["items"]):
        if not item["hint"]:
            tick = {"number": 1, "version": answer["passage"]["version"], "item": place, "ticked": True, "why": HOSTILE}
            answer = call("/api/tick", tick)[1]
    approve = {"number": 1, "version": answer["passage"]["version"], "approved": True}
    assert call("/api/approve", approve)[1]["passage"]["state"] == "approved"
    saved = call("/api/save", {})[1]
    assert saved["saved"]["records"] == 1
    (record,) = (json.loads(line) for line in Path(saved["saved"]["path"]).read_text(encoding="utf-8").split("\n") if line)
    assert (record["review"], record["tree"][3]["triples"][0][2]) == ("approved", HOSTILE)
    file = call("/api/export", {"format": "html", "which": 1})[1]["file"]
    assert file["name"].endswith(".html")
    assert "<script>alert" not in file["content"]


def test_without_a_model_the_reason_is_given(tmp_path: Path) -> None:
    session = Session.open(None, tmp_path / "x.jsonl")
    with serving(Review(session, reason="no model was given")) as server:
        call = Caller(server)
        assert (call("/api/session")[1]["extracts"], call("/api/session")[1]["reason"]) == (False, "no model was given")
        assert call("/api/extract", {"passages": []}) == (400, {"error": "no model was given"})
    session.close()


def test_files_come_in_by_their_content_alone(call: Caller, tmp_path: Path) -> None:
    trees = json.dumps([{"text": "boys@Rest.", "tree": gout()}, {"text": "x"}]).encode()
    answer = call("/api/load", {"name": "../more.json", "content": base64.b64encode(trees).decode()})[1]
    assert (answer["added"], "record 2" in answer["faults"][0]) == ([3], True)
    text = base64.b64encode("# 成人\n\n若血压高，用氨氯地平。".encode()).decode()
    answer = call("/api/load", {"name": "文.md", "content": text, "population": "老年人"})[1]
    seen = call(f"/api/passage?number={answer['added'][0]}")[1]
    assert (seen["language"], seen["population"][0][0], seen["relations"][1]) == ("zh", "老年人", "治疗药物")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [
        "trees.json",
        "trees.json.review.history.jsonl",
    ]
