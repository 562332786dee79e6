"""Trees from an adapter behind a server: the same as in one process, and every fault of a server in a sentence."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from gatewise_mdt import Extraction, Extractor, read_trees, sample
from gatewise_mdt.documents.reading import documents_in
from gatewise_mdt.extraction.course import Course
from gatewise_mdt.extraction.prompts import prompt
from gatewise_mdt.extraction.served import ServedExtractor
from mdt_models import random_model
from mdt_trees import TEXT
from refusals import assert_refused
from transformers import GenerationConfig, LogitsProcessorList
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError

pytest.importorskip("llguidance")
from gatewise_mdt.extraction.constraint import TreeConstraint

TEXTS = [record.text for record in sample()[:3]] + ["成人患者@轻度脱水可以口服生理盐水；否则静脉注射。"]
MOST = 150
BROKEN = b"an answer that breaks off"


class Engine:
    """A server of the completions API, as little as there is of it, on a model in this process.

    Attributes:
        obeys: it keeps to the course of a request.
        answers: (status, body) that come before any right one.
        asked: what was asked, in order.
        together: of the requests, the most that were under way at a time.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.obeys, self.key = True, ""
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.together = self.now = 0
        self.lock = threading.Lock()
        self.held = threading.Barrier(1)

    def answer(self, path: str, key: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if self.key and key != f"Bearer {self.key}":
            return 401, {"error": {"message": "no such key"}}
        if path == "/v1/models":
            return 200, {"data": [{"id": "base"}, {"id": "trees", "parent": "maker/base-1b"}]}
        assert body is not None
        with self.lock:
            self.asked.append(body)
            if self.answers:
                return self.answers.pop(0)
            self.now += 1
            self.together = max(self.together, self.now)
        self.held.wait(timeout=20)
        with self.lock:
            self.now -= 1
            return 200, self.completion(body)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(body["prompt"], return_tensors="pt")["input_ids"]
        end, rules = int(self.tokenizer.eos_token_id), LogitsProcessorList()
        if self.obeys and (course := body.get("vllm_xargs", {}).get("gatewise_tree")):
            limits = {"ends": [end], "prompt_tokens": ids.shape[1], "max_new_tokens": body["max_tokens"]}
            rules.append(TreeConstraint(self.tokenizer, [Course.from_json(course)], **limits))
        config = GenerationConfig(max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=end, pad_token_id=0)
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=rules)
        new = made[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode([one for one in new if one != end])
        choice = {"text": text, "finish_reason": "stop" if new[-1] == end else "length"}
        return {"choices": [choice], "usage": {"completion_tokens": len(new)}}


@pytest.fixture
def engine() -> Iterator[tuple[Engine, str]]:
    """An engine, and its address."""
    made = Engine(*random_model(3))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.give(*made.answer(self.path, self.headers.get("Authorization", ""), None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.give(*made.answer(self.path, self.headers.get("Authorization", ""), body))

        def give(self, status: int, body: Any) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + (body == BROKEN)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield made, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def plain(found: Any) -> Any:
    """An extraction without its date, and what only one side knows."""
    return (found.tree, found.absent, found.written, found.language) if isinstance(found, Extraction) else str(found)


@pytest.mark.parametrize(
    "settings",
    [{}, {"verbatim": True}],
    ids=lambda settings: "-".join(settings) or "constrained",
)
def test_the_same_trees_as_in_one_process(engine: tuple[Engine, str], settings: dict[str, Any]) -> None:
    made, url = engine
    alone = Extractor(made.model, made.tokenizer, max_new_tokens=MOST, **settings)(TEXTS)
    through = ServedExtractor.connect(url, "trees", max_new_tokens=MOST, **settings)(TEXTS)
    assert [plain(one) for one in through] == [plain(one) for one in alone]
    if settings == {"verbatim": True}:
        assert any(isinstance(one, Extraction) and not one.is_empty for one in through)


def test_what_tokens_cut_off_is_left_out(engine: tuple[Engine, str]) -> None:
    made, url = engine
    made.answers = [
        (200, {"choices": [{"text": " D: a | drug | b; ~ | drug | c and m", "finish_reason": "length"}]}),
        (200, {"choices": [{"text": " D: a | drug | b", "finish_reason": "stop"}], "usage": {"completion_tokens": 55}}),
    ]
    cut, short = ServedExtractor.connect(url, "trees", max_new_tokens=60, batch_size=1)(TEXTS[:2], language="en")
    assert [triple.object for triple in cut.tree.triples] == ["b"]  # type: ignore[union-attr]
    assert "the output ended before it was whole" in cut.warnings[0]  # type: ignore[union-attr]
    assert "may have been brought to a close" in short.warnings[0]  # type: ignore[union-attr]


def test_many_at_a_time_and_each_as_it_comes(engine: tuple[Engine, str]) -> None:
    made, url = engine
    made.held = threading.Barrier(3)
    extractor = ServedExtractor.connect(url, "trees", max_new_tokens=60, batch_size=3)
    found = dict(extractor.as_they_come([*TEXTS[:3], "", *TEXTS[:3]]))
    assert sorted(found) == list(range(7))
    assert made.together == 3
    assert isinstance(found[3], GatewiseError)
    told = found[0].made_with  # type: ignore[union-attr]
    assert (told["base"], told["adapter"], told["settings"]["served"]) == ("maker/base-1b", {"name": "trees"}, True)


def test_a_passage_that_is_refused_does_not_stop_the_others(engine: tuple[Engine, str]) -> None:
    made, url = engine
    made.answers = [(400, {"error": {"message": "the prompt has 9000 tokens,\nof 2048"}})]
    extractor = ServedExtractor.connect(url, "trees", max_new_tokens=60, batch_size=1)
    first, second = extractor(TEXTS[:2])
    assert str(first) == 'the server refused the passage (400: {"error": {"message": "the prompt has 9000 tokens,\\nof 2048"}})'
    assert isinstance(second, Extraction)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([(503, {"error": {"message": "over\nloaded"}})], r"refused \(503: .*over.*loaded"),
        ([(503, BROKEN)], r"refused \(503\)"),
        ([(404, {"error": {"message": "gone"}})], r"refused \(404: .*gone"),
        ([(200, b"<html>")], "no JSON object"),
        ([(200, [1])], "no JSON object"),
        ([(200, {"choices": []})], "no completion"),
    ],
)
def test_what_is_wrong_with_a_server_is_said_once(engine: tuple[Engine, str], answer: list[Any], expected: str) -> None:
    made, url = engine
    made.answers = answer
    with pytest.raises(GatewiseError, match=expected):
        ServedExtractor.connect(url, "trees", max_new_tokens=60)(TEXTS[:1])


def test_a_server_that_writes_freely_is_named(engine: tuple[Engine, str]) -> None:
    made, url = engine
    made.answers = [
        (200, {"choices": [{"text": text, "finish_reason": "stop"}]})
        for text in (" Here is a tree:", " C: a | sig", " D: Patients | drug | a drug that the text does not have")
    ]
    for found in ServedExtractor.connect(url, "trees", verbatim=True, batch_size=1)(TEXTS[:3]):
        assert "start it with `gatewise serve --constraint gatewise_tree`" in str(found)


def test_the_key_and_the_name(engine: tuple[Engine, str]) -> None:
    made, url = engine
    made.key = "secret"
    with pytest.raises(GatewiseError, match=r"401: .*no such key.*\): give the right key in GATEWISE_API_KEY"):
        ServedExtractor.connect(url, "trees")
    with pytest.raises(GatewiseError, match="no model 'tree': expected one of base, trees"):
        ServedExtractor.connect(f"{url}/v1", "tree", api_key="secret")
    assert ServedExtractor.connect(f"{url}/v1/", "trees", api_key="secret").base == "maker/base-1b"
    with pytest.raises(GatewiseError, match="expected an address"):
        ServedExtractor.connect("127.0.0.1:8000", "trees")


def test_nobody_answers() -> None:
    with pytest.raises(GatewiseError, match="gave no answer"):
        ServedExtractor.connect("http://127.0.0.1:9", "trees")


@pytest.mark.parametrize(
    "told",
    [
        "[]", "no", "{}", '{"language": "fr"}', '{"language": "en", "level": 0}', '{"language": ["en"]}', "[" * 100_000,
        '{"language": "en", "within": ""}', '{"language": "en", "within": "@"}', '{"language": "en", "within": 3}',
        ],
)  # fmt: skip
def test_a_course_that_nobody_would_ask_for(told: str) -> None:
    with pytest.raises(GatewiseError, match="the constraint of the request is none of gatewise's"):
        Course.from_json(told)


def test_the_command_goes_on_after_the_server_was_gone(
    engine: tuple[Engine, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, url = engine
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "guides" / "inner"
    folder.mkdir(parents=True)
    (folder / ".hidden.txt").write_text(TEXT)
    (folder / "picture.png").write_bytes(b"x")
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXT.replace("0.5", f"{number}"))
    command = ["mdt", "extract", "guides", "--server", url, "--adapter-name", "trees", "-f", "json", "-o", "trees.json"]
    command += ["--max-new-tokens", "150", "--verbatim", "--batch-size", "1"]
    made.answers = [(200, made.completion(body_of(0))), (404, {"error": {"message": "gone"}})]
    result = CliRunner().invoke(app, command)
    assert_refused(result, "gone")
    assert "the same command goes on from there" in result.stderr
    assert len((tmp_path / "trees.json.work.jsonl").read_text().splitlines()) == 2
    before = len(made.asked)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert len(made.asked) == before + 3
    assert len(read_trees("trees.json").records) == 4
    assert not (tmp_path / "trees.json.work.jsonl").exists()


def test_what_is_written_into_the_folder_that_is_read_is_never_read_over(
    engine: tuple[Engine, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, url = engine
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "guides"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(TEXT.replace("0.5", f"{number}"))
    command = ["mdt", "extract", "guides", "--server", url, "--adapter-name", "trees", "-o", "guides/trees.txt"]
    command += ["--max-new-tokens", "150", "--verbatim", "--batch-size", "1"]
    made.answers = [(200, made.completion(body_of(0))), (404, {"error": {"message": "gone"}})]
    assert_refused(CliRunner().invoke(app, command), "gone")
    assert not (folder / "trees.txt").exists()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "written: guides/trees.txt" in result.stdout
    asked = len(made.asked)
    assert_refused(CliRunner().invoke(app, command), "would be lost")  # whose it is, nothing tells any more
    assert len(made.asked) == asked


def body_of(number: int) -> dict[str, Any]:
    """What is asked for a document of the tests above."""
    text = TEXT.replace("0.5", f"{number}")
    course = json.dumps({"language": "en", "within": text})
    return {"prompt": prompt(text, "en"), "max_tokens": 150, "vllm_xargs": {"gatewise_tree": course}}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--adapter", "a", "--server", "http://x", "--adapter-name", "b"],
        ["--server", "http://127.0.0.1:9"],
        ["--adapter", "a", "--adapter-name", "b"],
    ],
)
def test_half_of_what_is_needed(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    result = CliRunner().invoke(app, ["mdt", "extract", str(tmp_path / "a.txt"), *words])
    assert_refused(result, "expected --adapter DIR, or --server URL with --adapter-name NAME")


def test_links_to_folders_are_passed_over(tmp_path: Path) -> None:
    inner, outside = tmp_path / "guides" / "inner", tmp_path / "outside"
    for folder in (inner, outside):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(TEXT)
    (inner / "round").symlink_to(tmp_path / "guides")
    (tmp_path / "guides" / "one").symlink_to(outside)
    assert documents_in([tmp_path / "guides"]) == [inner / "a.txt"]
