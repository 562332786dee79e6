"""Adapters that come and go under requests, room that runs out, and keys."""

import errno
import itertools
import json
import math
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from served_models import adapter_folder, base_folder, client, serving, text_of, writes
from tiny_models import word_tokenizer

from gatewise.errors import GatewiseError
from gatewise.serving.server.catalogue import Version
from gatewise.serving.server.engine import Engine
from gatewise.serving.server.lanes import Lane
from gatewise.serving.server.running import AdapterServer

PROMPT = [7, 19, 23]
POSITIONS = 1024
LONG = POSITIONS - len(PROMPT)  # tokens. Half a minute of slow steps: what a test does meanwhile may take its time


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, and adapters of which any may take the place of any other."""
    root = tmp_path_factory.mktemp("made")
    folders = {"base": base_folder(root / "base", max_position_embeddings=POSITIONS)}
    for number, name in enumerate(("a", "b", "c", "routed")):
        folders[name] = adapter_folder(folders["base"], root / name, "routed" if name == "routed" else "plain", seed=number)
    folders["misfit"] = shutil.copytree(folders["a"], root / "misfit")
    weights = load_file(folders["misfit"] / "adapter_model.safetensors")
    last = max(name for name in weights if "up_proj.lora_A" in name)
    save_file({**weights, last: torch.ones(3, 5)}, folders["misfit"] / "adapter_model.safetensors")
    folders["damaged"] = shutil.copytree(folders["a"], root / "damaged")  # which is not seen before it is loaded
    save_file({name: value * math.nan for name, value in weights.items()}, folders["damaged"] / "adapter_model.safetensors")
    return folders


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Steps that take long, until the test calls this: it has seen what it wanted to see meanwhile."""
    step, done = Lane.step, threading.Event()

    def slowly(self: Lane, tokens: Any) -> torch.Tensor:
        done.wait(0.03)
        return step(self, tokens)

    monkeypatch.setattr(Lane, "step", slowly)
    return done.set


def ask(server: AdapterServer, name: str, tokens: int = 8, **more: Any) -> Any:
    settings: dict[str, Any] = {"model": name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, **more}
    return client(server).completions.create(**settings)


def text(made: dict[str, Path], name: str, tokens: int = 8, ends: bool = True) -> str:
    return text_of(writes(made["base"], made[name], PROMPT, tokens, ends))


def soon(found: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not found():
        assert time.monotonic() < limit
        time.sleep(0.02)


def gauge(server: AdapterServer, name: str) -> float:
    lines = server.metrics.text().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def listed(server: AdapterServer) -> list[str]:
    return [one.id for one in client(server).models.list()]


def put(source: Path, place: Path) -> None:
    """Takes the place of a folder at once, as ``gatewise`` writes folders."""
    new = shutil.copytree(source, place.parent / f".new-{place.name}")
    if place.exists():
        place.rename(place.parent / ".old")
    new.rename(place)
    shutil.rmtree(place.parent / ".old", ignore_errors=True)


def test_adapters_come_are_replaced_and_go(made: dict[str, Path], tmp_path: Path) -> None:
    with serving(made["base"], tmp_path, every=0.05) as server:
        with pytest.raises(openai.NotFoundError):
            ask(server, "x")
        put(made["a"], tmp_path / "x")
        soon(lambda: "x" in listed(server))
        assert ask(server, "x").choices[0].text == text(made, "a")
        for name in ("b", "routed", "c"):
            put(made[name], tmp_path / "x")
            soon(lambda name=name: ask(server, "x").choices[0].text == text(made, name))
            soon(lambda: gauge(server, "gatewise_adapters_loaded") == 1)  # the one before has left the model
        shutil.rmtree(tmp_path / "x")
        soon(lambda: "x" not in listed(server))
        with pytest.raises(openai.NotFoundError):
            ask(server, "x")
        soon(lambda: gauge(server, "gatewise_adapters_loaded") == 0)
        assert text_of(writes(made["base"], None, PROMPT, 8)) == ask(server, "tiny").choices[0].text


@pytest.mark.parametrize("name", ["a", "routed"])
def test_a_running_answer_ends_with_the_adapter_that_it_began_with(
    made: dict[str, Path], tmp_path: Path, slow: Callable[[], None], name: str
) -> None:
    put(made[name], tmp_path / "x")
    with serving(made["base"], tmp_path, every=0.05) as server:
        stream = iter(ask(server, "x", 400, stream=True, extra_body={"ignore_eos": True}))
        begun = [next(stream).choices[0].text for _ in range(3)]
        put(made["b"], tmp_path / "x")
        soon(lambda: ask(server, "x").choices[0].text == text(made, "b"))  # both versions at once, in one batch if they can
        assert gauge(server, "gatewise_adapters_loaded") == 2
        slow()
        found = "".join(begun) + "".join(one.choices[0].text for one in stream)
        assert found == text(made, name, 400, ends=False)
        soon(lambda: gauge(server, "gatewise_adapters_loaded") == 1)


def test_the_least_used_adapter_makes_room(made: dict[str, Path]) -> None:
    """More adapters than room, asked for by many at once; each time its own answer."""
    names = ["a", "b", "c", "routed"]
    before = set(threading.enumerate())
    with serving(made["base"], *(made[name] for name in names), most_loaded=2) as server:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda number: ask(server, names[number % 4]).choices[0].text, range(12)))
        assert found == [text(made, names[number % 4]) for number in range(12)]
        assert gauge(server, "gatewise_adapters_loaded") <= 2
        assert gauge(server, "gatewise_adapter_loads_total") > 4
    soon(lambda: set(threading.enumerate()) <= before)


def test_an_adapter_that_does_not_fit_harms_no_other(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match="does not fit the base model"), serving(made["base"], made["misfit"]):
        pass
    shutil.copytree(made["a"], tmp_path / "a")
    shutil.copytree(made["misfit"], tmp_path / "misfit")
    shutil.copytree(made["damaged"], tmp_path / "damaged")
    said: list[str] = []
    with serving(made["base"], tmp_path, say=said.append) as server:
        assert [one.id for one in client(server).models.list()] == ["tiny", "a", "damaged"]
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="'damaged' cannot be loaded: see the server's log") as told:
                ask(server, "damaged")
            assert str(tmp_path) not in str(told.value)
            assert ask(server, "a").choices[0].text == text(made, "a")
            assert ask(server, "tiny").choices[0].text == text_of(writes(made["base"], None, PROMPT, 8))
    for line in (
        f"the adapter {tmp_path / 'misfit'} does not fit",
        f"{tmp_path / 'damaged' / 'adapter_model.safetensors'} is damaged",
    ):
        assert "".join(said).count(line) == 1


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_what_a_broken_adapter_took_the_place_of_cannot_be_loaded(
    made: dict[str, Path], tmp_path: Path, has_tokenizer: bool
) -> None:
    """And its clients are not told to ask again for ever; no other adapter makes room for it."""
    said: list[str] = []
    for name in ("a", "x"):
        put(made[name.replace("x", "b")], tmp_path / name)
    if has_tokenizer:
        word_tokenizer().save_pretrained(tmp_path / "x")
    with serving(made["base"], tmp_path, every=0.05, most_loaded=1, say=said.append) as server:
        assert ask(server, "a").choices
        put(made["misfit"], tmp_path / "x")
        soon(lambda: "does not fit" in said[-1])
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="'x' cannot be loaded: see the server's log") as told:
                ask(server, "x")
            assert told.value.status_code == 500
        assert ask(server, "a").choices
        assert gauge(server, "gatewise_adapter_loads_total") == 1
        put(made["c"], tmp_path / "x")
        soon(lambda: answer(server, "x") == text(made, "c"))
    assert "".join(said).count("does not fit") == 1


def answer(server: AdapterServer, name: str) -> str | None:
    with suppress(openai.InternalServerError):  # until its new state has settled
        return str(ask(server, name).choices[0].text)
    return None


@pytest.mark.parametrize("place", ["copyfile", "load_adapter"])
def test_what_could_not_be_loaded_is_loaded_later(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A disk or a memory that is full: said once, and the client is told nothing of folders."""

    def fails(*_: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.copytree(made["a"], tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made["base"] / name, tmp_path / "a")
    said: list[str] = []
    monkeypatch.setattr("gatewise.serving.server.catalogue.RETRY", 0.0)
    with serving(made["base"], tmp_path, say=said.append) as server:
        with monkeypatch.context() as patch:
            patch.setattr(shutil if place == "copyfile" else PeftModel, place, fails)
            for _ in range(3):
                with pytest.raises(openai.InternalServerError, match="'a' cannot be loaded: see the server's log"):
                    ask(server, "a")
        assert len([one for one in said if str(tmp_path / "a") in one and "No space left" in one]) == 1
        monkeypatch.setattr("gatewise.serving.server.catalogue.RETRY", 60.0)
        assert ask(server, "tiny").choices
        monkeypatch.setattr("gatewise.serving.server.catalogue.RETRY", 0.0)
        assert ask(server, "a").choices[0].text == text(made, "a")


def test_no_more_wait_than_may(made: dict[str, Path], slow: Callable[[], None]) -> None:
    with serving(made["base"], made["a"], most_running=1, most_waiting=1) as server, ThreadPoolExecutor(2) as threads:
        long = threads.submit(ask, server, "a", 400, extra_body={"ignore_eos": True})
        soon(lambda: gauge(server, "gatewise_running") == 1)
        waiting = threads.submit(ask, server, "tiny", 1)
        soon(lambda: gauge(server, "gatewise_waiting") == 1)
        with pytest.raises(openai.InternalServerError) as told:
            ask(server, "a")
        assert told.value.status_code == 503
        assert told.value.response.headers["Retry-After"]
        assert told.value.body["type"] == "ServiceUnavailableError"
        assert 'gatewise_requests_total{model="a",how="refused"} 1\n' in server.metrics.text()  # which an alert goes by
        slow()
        assert waiting.result().choices[0].finish_reason in ("length", "stop")
        assert long.result().usage.completion_tokens == 400


@pytest.mark.usefixtures("slow")
def test_the_base_model_does_not_wait_for_an_adapter_that_has_no_room(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b", "damaged"):
        shutil.copytree(made[name], tmp_path / name)
    with serving(made["base"], tmp_path, most_loaded=1) as server, ThreadPoolExecutor(9) as threads:
        long = ask(server, "a", LONG, stream=True, extra_body={"ignore_eos": True})
        next(iter(long))
        others = []
        for name in ("b", "damaged", "a"):  # one after the other: an "a" that comes first need not wait
            others.append(threads.submit(ask, server, name))
            soon(lambda: gauge(server, "gatewise_waiting") == len(others))
        assert ask(server, "tiny", 2).choices
        assert gauge(server, "gatewise_waiting") == 3  # also the last, or the others would wait for ever
        long.close()
        assert [others[number].result().choices[0].text for number in (0, 2)] == [text(made, "b"), text(made, "a")]
        with pytest.raises(openai.InternalServerError, match="cannot be loaded"):
            others[1].result()


def test_one_adapter_is_loaded_between_two_steps(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that base requests wait for one attempt at most, however many adapters are asked for that cannot be loaded."""
    order: list[str] = []
    load, read = Lane.load, Lane.read

    def slowly(self: Lane, folder: Path, name: str, base_name: str) -> None:
        order.append("load")
        time.sleep(0.15)
        load(self, folder, name, base_name)

    def noted(self: Lane, ids: Any, name: str) -> Any:
        order.append("read")
        return read(self, ids, name)

    monkeypatch.setattr(Lane, "load", slowly)
    monkeypatch.setattr(Lane, "read", noted)
    for number in range(6):
        shutil.copytree(made["damaged"], tmp_path / f"damaged{number}")
    with serving(made["base"], tmp_path) as server, ThreadPoolExecutor(6) as threads:
        broken = [threads.submit(ask, server, f"damaged{number}") for number in range(6)]
        soon(lambda: gauge(server, "gatewise_waiting") >= 4)
        assert ask(server, "tiny", 1).choices
        assert order.index("read") < 6  # it did not wait for all of them
        assert {type(one.exception()) for one in broken} == {openai.InternalServerError}


@pytest.mark.usefixtures("slow")
def test_a_long_answer_keeps_nobody_waiting(made: dict[str, Path]) -> None:
    with serving(made["base"], made["a"], made["routed"]) as server:
        stream = ask(server, "a", LONG, stream=True, extra_body={"ignore_eos": True})
        next(stream)
        for name in ("a", "routed", "tiny"):
            ask(server, name, 3)
        assert len(list(itertools.islice(stream, 11))) == 11  # it was not done
        stream.close()


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory, say"), torch.AcceleratorError("CUDA error: out of memory")], ids=type
)
def test_a_fault_ends_its_answers_alone(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    step = Lane.step

    def fails(self: Lane, tokens: Any) -> torch.Tensor:
        if self.kind == "routed":
            raise error
        return step(self, tokens)

    with serving(made["base"], made["a"], made["routed"]) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Lane, "step", fails)
            with pytest.raises(openai.InternalServerError, match=type(error).__name__):
                ask(server, "routed")
            events = ask(server, "routed", stream=True)
            with pytest.raises(openai.APIError, match=type(error).__name__):
                list(events)
            assert ask(server, "a").choices[0].text == text(made, "a")
        assert ask(server, "routed").choices[0].text == text(made, "routed")
    assert "out of memory" in capsys.readouterr().err


def test_what_the_server_cannot_have_is_told(made: dict[str, Path]) -> None:
    with serving(made["base"]) as server:
        with (
            pytest.raises(GatewiseError, match=f"port {server.port} of --host 127.0.0.1 cannot be had"),
            serving(made["base"], port=server.port),
        ):
            pass
        with pytest.raises(GatewiseError, match=f"has {POSITIONS} positions"), serving(made["base"], most_tokens=POSITIONS + 1):
            pass


def test_a_fault_in_one_answer_ends_no_other(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("gatewise.serving.server.engine._draw", fails)
    with serving(made["base"]) as server, ThreadPoolExecutor(4) as threads:
        others = [threads.submit(ask, server, "tiny") for _ in range(3)]
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="RuntimeError"):
                ask(server, "tiny", temperature=1)
        for one in others:
            assert one.result(30).choices[0].text == text_of(writes(made["base"], None, PROMPT, 8))
    assert "out of memory, say" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_with_nothing_that_may_come_is_alone_in_its_fault(
    made: dict[str, Path], tmp_path: Path, temperature: int
) -> None:
    limits = {"nothing": SimpleNamespace(limit=lambda *_: lambda written, scores: torch.full_like(scores, -torch.inf))}
    with serving(made["base"], tmp_path, constraints=limits) as server:
        with pytest.raises(openai.InternalServerError, match="wrote what is no number"):
            ask(server, "tiny", temperature=temperature, extra_body={"vllm_xargs": {"nothing": "1"}})
        assert ask(server, "tiny").choices[0].text == text_of(writes(made["base"], None, PROMPT, 8))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("place", ["lanes.Lane.read", "lanes.Lane.step", "lanes.Lane.load", "engine.Engine._admit"])
def test_a_dead_device_or_a_fault_of_ours_ends_the_server(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """With an error, so that whatever started it starts it again; and everybody who waits is told."""

    def fails(*_: Any, **more: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    shutil.copytree(made["b"], tmp_path / "later")
    given: dict[str, Any] = {"name": "tiny", "port": 0, "device": "cpu", "say": lambda text: None, "settled": 0.1}
    places = [str(made["routed"]), str(tmp_path)]
    with AdapterServer(str(made["base"]), places, **given) as server, ThreadPoolExecutor(4) as threads:
        run = threads.submit(server.run)
        stream = iter(ask(server, "routed", LONG, stream=True, extra_body={"ignore_eos": True}))
        next(stream)
        monkeypatch.setattr(f"gatewise.serving.server.{place}", fails)
        told = r"the engine has ended|RuntimeError|cannot be loaded|Connection"  # who comes later finds no server
        for one in [threads.submit(ask, server, "later") for _ in range(3)]:
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError), match=told):
                one.result(30)
        with pytest.raises(openai.APIError, match=told):
            list(stream)
        with pytest.raises(GatewiseError, match="the engine has ended by a fault"):
            run.result(30)
    assert "illegal memory access" in capsys.readouterr().err


def test_an_answer_ends_with_the_token_that_its_adapter_was_trained_to_end_with(made: dict[str, Path], tmp_path: Path) -> None:
    """An adapter may bring a tokenizer with another end than the base model's, which its template writes behind each answer."""
    written = writes(made["base"], made["a"], PROMPT, 8)
    place = next(place for place, token in enumerate(written) if place and token not in written[:place])
    own = shutil.copytree(made["a"], tmp_path / "own")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(written[place])
    tokenizer.save_pretrained(own)
    with serving(made["base"], made["a"], own) as server:
        assert ask(server, "a").choices[0].text == text(made, "a")
        (choice,) = ask(server, "own").choices
        assert (choice.text, choice.finish_reason) == (text_of(written[:place]), "stop")


def test_a_fault_in_an_answer_whose_client_leaves_meanwhile_ends_nobody_else(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def leaves(written: Any, scores: torch.Tensor) -> torch.Tensor:
        (one,) = [one for rows in server.engine._running.values() for one in rows]
        one.cancelled = True
        raise RuntimeError("a form that cannot be")

    limits: Any = {"odd": SimpleNamespace(limit=lambda *_: leaves)}
    with serving(made["base"], constraints=limits) as server, ThreadPoolExecutor(1) as threads:
        threads.submit(ask, server, "tiny", timeout=3, extra_body={"vllm_xargs": {"odd": "1"}})
        soon(lambda: 'gatewise_requests_total{model="tiny",how="cancelled"} 1' in server.metrics.text())
        assert ask(server, "tiny").choices[0].text == text_of(writes(made["base"], None, PROMPT, 8))
    assert "a form that cannot be" in capsys.readouterr().err


def test_an_adapter_that_is_replaced_while_the_server_starts_does_not_stop_it(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, place = Engine.load, tmp_path / "x"
    put(made["a"], place)

    def late(self: Engine, version: Any) -> None:
        if not (tmp_path / "replaced").exists():
            put(made["b"], place)
            (tmp_path / "replaced").touch()
        load(self, version)

    monkeypatch.setattr(Engine, "load", late)
    with serving(made["base"], place, every=0.05) as server:

        def answers() -> bool:
            with suppress(openai.InternalServerError):  # until the new state has settled
                return bool(ask(server, "x").choices[0].text == text(made, "b"))
            return False

        soon(answers)


def test_a_tokenizer_that_cannot_be_read_is_not_read_at_each_request(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(made["a"], tmp_path / "broken")
    word_tokenizer().save_pretrained(broken)
    (broken / "tokenizer.json").write_text("{}")
    copies, copy = [], Version.copy
    monkeypatch.setattr(Version, "copy", lambda self: copies.append(self) or copy(self))
    with serving(made["base"], broken) as server:
        copies.clear()
        for _ in range(3):
            with pytest.raises(openai.InternalServerError, match="the tokenizer of 'broken' cannot be loaded"):
                ask(server, "broken")
        assert len(copies) == 1


def test_an_adapter_that_cannot_be_loaded_has_the_bases_tokenizer_all_the_same(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with serving(made["base"], tmp_path, every=0.05) as server:
        monkeypatch.setattr(Lane, "load", fails)
        put(made["a"], tmp_path / "x")
        soon(lambda: "x" in server.catalogue.versions)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the adapter 'x' cannot be loaded"):
                ask(server, "x")
        body = json.dumps({"model": "x", "prompt": "w1"}).encode()
        asked = urllib.request.Request(f"{server.url}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answer:
            assert json.load(answer)["count"] == 1


def test_the_log_says_who_was_refused(made: dict[str, Path]) -> None:
    """And not that the client went away."""
    lines: list[str] = []
    with serving(made["base"], most_waiting=1, log_requests=True, say=lines.append) as server:
        server.engine._is_ending = True
        with pytest.raises(openai.InternalServerError) as told:
            ask(server, "tiny")
        assert told.value.status_code == 503
    (line,) = [one for one in lines if "/v1/completions" in one]
    assert "503" in line
    assert "cancelled" not in line
