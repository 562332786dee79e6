"""``gatewise mdt review`` as a command: one sentence for what a user can put right, and a clean end with Ctrl-C."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from gatewise_mdt.review.users import UserFile
from mdt_trees import TEXT, gout
from refusals import assert_refused
from typer.testing import CliRunner

from gatewise.cli.main import app

Gatewise = Callable[..., Any]


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gatewise:
    """gatewise(...) -> the result of `gatewise mdt review ...`, which serves nothing and opens no browser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("gatewise_mdt.commands.review._serve", lambda server: None)
    monkeypatch.setattr("gatewise_mdt.commands.review.webbrowser.open", lambda url: opened.append(url))
    opened: list[str] = []
    Path("trees.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}, {"text": TEXT, "tree": gout()[:3]}]))
    return lambda *words: CliRunner().invoke(app, ["mdt", "review", *map(str, words)])


def test_it_says_where_the_page_is_and_where_corrections_go(gatewise: Gatewise) -> None:
    result = gatewise("trees.json")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"review: http://127\.0\.0\.1:\d+/#token=\S{32}\n", result.stdout)
    assert "corrections go to trees.json.review.jsonl, by " in result.stderr
    assert "note: trees.json, record 2, node 3: the tree ends after 3 nodes" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.json"], "none.json: there is no such file"),
        (["trees.json", "--adapter", "nowhere"], "nowhere is not an adapter"),
        (["trees.json", "--adapter", "."], "is not an adapter"),
        (["trees.json", "--out", "x.json"], "expected .jsonl"),
        (["trees.json", "--out", "trees.json/x.jsonl"], "cannot write"),
        (["sample:none"], "there is no sample"),
        (["."], "cannot be read: Is a directory"),
        (["trees.json", "--reviewer", " "], "the reviewer is ' ', expected a name"),
        (["trees.json", "--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give --users FILE"),
        (["trees.json", "--host", "nowhere.invalid"], "of 'nowhere.invalid' cannot be had"),
        (["trees.json", "--users", "none.json"], "none.json: there is no such file"),
        (["trees.json", "--users", "trees.json"], "trees.json is no list of reviewers"),
        (["--add-user", "Ada"], "--add-user needs --users FILE"),
        (["--add-user", " ", "--users", "new.json"], "expected a name"),
        (["trees.json", "--population", "children"], "a population was given, but trees.json is a file of trees"),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(gatewise: Gatewise, words: list[str], said: str) -> None:
    if "--adapter" in words:
        pytest.importorskip("llguidance")
    assert_refused(gatewise(*words), said)
    assert_refused(gatewise(*words), said)  # nothing stays locked


def test_reviewers_are_added_and_come_in_with_their_tokens(gatewise: Gatewise) -> None:
    tokens = []
    for name, words in (("Ada", ()), ("Bea", ("--allow-host", "review.clinic.example"))):
        result = gatewise("--users", "users.json", "--add-user", name, *words)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("https://review.clinic.example/#token=" if words else "/#token=")
        assert f"to {name} and nobody else: it is not shown again" in result.stderr
        tokens.append(result.stdout.strip().partition("#token=")[2])
    assert_refused(
        gatewise("--users", "users.json", "--add-user", "ADA"), "users.json has a reviewer named 'ADA', or nearly so, already"
    )
    users = UserFile(Path("users.json"))
    assert [users.who(token) for token in tokens] == ["Ada", "Bea"]
    before = Path("users.json").read_bytes()
    for no_name in ("https://review.clinic.example", "review.clinic.example/x", "a b"):
        result = gatewise("--users", "users.json", "--add-user", "Cem", "--allow-host", no_name)
        assert (result.exit_code, f"--allow-host {no_name} is no name of a machine" in result.stderr) == (2, True)
    assert Path("users.json").read_bytes() == before
    result = gatewise("trees.json", "--users", "users.json", "--host", "0.0.0.0", "--allow-host", "review.clinic.example")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"review: http://127\.0\.0\.1:\d+/\n", result.stdout)
    assert "by whoever has a token of users.json; end with Ctrl-C" in result.stderr
    assert "tokens and texts go to them unencrypted" in result.stderr
    assert "give the name or address that browsers use with --allow-host" not in result.stderr
    result = gatewise("trees.json", "--users", "users.json", "--host", "0.0.0.0")
    assert "give the name or address that browsers use with --allow-host" in result.stderr
    assert "unencrypted" not in gatewise("trees.json", "--users", "users.json").stderr
    Path("users.json").write_text("{}")
    assert_refused(gatewise("trees.json", "--users", "users.json"), "users.json has no reviewer yet")


def test_a_busy_port_is_refused(gatewise: Gatewise) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert_refused(gatewise("trees.json", "--port", port), f"port {port} of '127.0.0.1' cannot be had")
    assert gatewise("trees.json", "--port", port).exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are sent in another way there")
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    (tmp_path / "trees.json").write_text(json.dumps([{"text": TEXT, "tree": gout()}]))
    # Tests that run in the background inherit that interrupts are ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from gatewise.cli.main import main; main()"
    command = [sys.executable, "-c", heard, "mdt", "review", "trees.json", "--no-browser", "--reviewer", "Ada"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline()
            found = re.fullmatch(r"review: http://(\S+)/#token=(\S+)\n", address)
            assert found, address
            connection = HTTPConnection(found[1], timeout=60)
            approve = json.dumps({"number": 1, "version": 0, "approved": True})
            headers = {"X-Gatewise-Token": found[2], "Content-Type": "application/json"}
            connection.request("POST", "/api/approve", approve, headers)
            assert connection.getresponse().read()  # and the connection stays open
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=120)
            connection.close()
        finally:
            process.kill()  # whatever went wrong, nothing waits for it for ever
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "changes of 1 passage are not saved in trees.json.review.jsonl; the next review goes on with them" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trees.json", "trees.json.review.history.jsonl"]
    last = json.loads((tmp_path / "trees.json.review.history.jsonl").read_text().splitlines()[-1])
    assert (last["reviewer"], last["action"], last["now"]["state"]) == ("Ada", "approve", "approved")
