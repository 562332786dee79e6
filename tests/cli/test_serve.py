"""What ``gatewise serve`` refuses before anything is loaded; and how it ends; what it serves is tested in ``serving/server``."""

import gc
import json
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from served_models import base_folder
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.serving import constraints
from gatewise.serving.server import running
from gatewise.serving.server.lanes import Lane
from gatewise.serving.server.reach import listen


def serve(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", "none", "--port", "0", *words])


def test_an_engine_that_would_ignore_an_option_refuses_it() -> None:
    for words, said in (
        (("--engine", "vllm", "--max-waiting", "256"), "--max-waiting does not go with --engine vllm"),
        (("--engine", "vllm", "--device", "cpu"), "--device does not go with --engine vllm"),
        (("--engine", "transformers", "--python", "python"), "--python does not go with --engine transformers"),
        (("--adapters", "runs/a/adapter", "runs/b/adapter"), "runs/b/adapter belongs to no option: quote a pattern"),
    ):
        result = serve(*words)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_a_key_that_was_left_empty_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", " "):
        monkeypatch.setenv("GATEWISE_API_KEY", given)
        result = serve("--engine", "transformers")
        assert (result.exit_code, "GATEWISE_API_KEY is there, but empty" in result.stderr) == (2, True), result.output


def test_a_constraint_is_found_among_the_installed_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Form:
        logits_processor = "a:B"

    points = [
        EntryPoint("form", "forms:FORM", "gatewise.constraints"),
        EntryPoint("broken", "nowhere:FORM", "gatewise.constraints"),
        EntryPoint("renamed", "forms:OTHER", "gatewise.constraints"),
    ]
    monkeypatch.setitem(sys.modules, "forms", SimpleNamespace(FORM=Form()))
    monkeypatch.setattr(constraints, "entry_points", lambda group: [one for one in points if one.group == group])
    assert list(constraints.find_constraints()) == ["form"]  # where nobody asks for it, one that is broken is passed over
    said = capsys.readouterr().err.splitlines()  # with a line, but for what is not installed
    assert [line.split(",")[0] for line in said] == ["the constraint 'renamed' is left out"]
    assert constraints.find_constraints(["form"])["form"].logits_processor == "a:B"
    for engine in ("transformers", "vllm"):
        for name, said in (
            ("poem", "has a constraint 'poem'; those that are there: broken, form, renamed"),
            ("broken", "No module named 'nowhere'"),
            ("renamed", "no attribute 'OTHER'"),
        ):
            result = serve("--engine", engine, "--constraint", name)
            assert (result.exit_code, said in " ".join(result.stderr.split())) == (2, True), result.output


def test_a_named_folder_that_is_no_adapter_is_told(tmp_path: Path) -> None:
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    (tmp_path / "x" / "adapter" / "adapter_config.json").touch()
    result = serve("--engine", "transformers", "--adapters", f"support={tmp_path / 'x'}")
    assert result.exit_code == 2, result.output
    assert "is not an adapter, it has no adapter_config.json: give one of its sub-folders adapter" in " ".join(
        result.stderr.split()
    )


def test_a_server_logs_its_requests_and_ends_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM: an answer that takes too long ends with an error and [DONE], and the command with 0, as systemd takes for well."""
    base, step = base_folder(tmp_path / "base"), Lane.step
    monkeypatch.setattr(running, "_GRACE", 0.3)
    monkeypatch.setattr(Lane, "step", lambda self, tokens: time.sleep(0.05) or step(self, tokens))
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def ask(key: str, **change: Any) -> Any:
        body = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 2, "ignore_eos": True, **change}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "X-Request-Id": f"mine-{key}"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions?secret", body, headers)
        return urllib.request.urlopen(asked, timeout=20)

    def clients() -> tuple[Any, list[bytes]]:
        for _ in range(400):
            with suppress(urllib.error.URLError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.05)
        for key, change in (("three", {}), ("one", {"model": "no\ne\x1b[2J"})):
            with pytest.raises(urllib.error.HTTPError):
                ask(key, **change)
        with ask("two") as answer:
            whole = (answer.headers["X-Request-Id"], json.load(answer)["id"])
        with ask("one", max_tokens=90, stream=True) as stream:
            lines = [stream.readline()]
            end()
            lines += stream.readlines()
        return whole, lines

    def end() -> None:
        if not ended:
            ended.append(os.kill(os.getpid(), signal.SIGTERM))

    def clients_to_the_end() -> tuple[Any, list[bytes]]:
        try:
            return clients()
        finally:
            end()

    before, ended = signal.getsignal(signal.SIGTERM), list[None]()
    try:
        with ThreadPoolExecutor(1) as thread, monkeypatch.context() as patch:
            patch.setattr(gc, "freeze", lambda: None)  # which is for a process of its own
            told = thread.submit(clients_to_the_end)
            result = CliRunner().invoke(
                app,
                f"serve {base} --engine transformers --port {port} --served-model-name tiny --device cpu "
                "--api-key one --api-key two --log-requests",
            )
            whole, lines = told.result(60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 0, result.output
    assert whole == ("mine-two", "cmpl-mine-two")
    error = json.loads(lines[-4].removeprefix(b"data: "))["error"]
    assert (error["message"], error["code"], lines[-2]) == ("the server is ending", 503, b"data: [DONE]\n")
    said = result.stderr.splitlines()
    assert said[-1] == "serving ended"
    logged = [re.sub(r"seconds=\d+\.\d+", "seconds=S", line) for line in said if line.startswith("request ")]
    begins = "request POST /v1/completions id=mine"
    assert logged[:3] == [
        f"{begins}-three seconds=S status=401",
        f'{begins}-one model="no\\ne\\u001b[2J" seconds=S status=404',
        f"{begins}-two model=tiny prompt_tokens=1 generated_tokens=2 finish=length seconds=S status=200",
    ]
    assert re.fullmatch(
        f"{begins}-one model=tiny prompt_tokens=1 generated_tokens=\\d+ finish=failed seconds=S status=200", logged[3]
    )


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = running._Listener(lambda: None, uvicorn.Config(lambda *_: None))
    raised: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda *given: raised.append(given))
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    listener.handle_exit(signal.SIGTERM, None)
    assert (listener.should_exit, raised) == (True, [])
    listener.handle_exit(signal.SIGTERM, None)
    assert raised == [(signal.SIGTERM, signal.SIG_DFL), signal.SIGTERM]
