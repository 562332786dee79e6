"""What vLLM is told of adapters, and that nothing of it is left behind. With the real one: `make test-serve`."""

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_folders import write_folder
from rich.console import Console
from served_models import adapter_folder, ask_quickstart, base_folder, client, serving, text_of, writes
from vllm_models import PYTHON

from gatewise.errors import GatewiseError
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train
from gatewise.serving.server import guard, vllm_server
from gatewise.serving.server.catalogue import Catalogue
from gatewise.serving.server.with_vllm import Room, VllmServer, arguments_for, settings_of

WIDE = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention needs heads of 32 numbers and more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = base_folder(root / "base", **WIDE)
    adapter_folder(base, root / "adapters" / "one", seed=1)
    adapter_folder(base, root / "adapters" / "two", seed=2, r=12, target_modules=["q_proj", "down_proj"])
    adapter_folder(base, root / "adapters" / "routed", "routed", seed=3)
    adapter_folder(base, root / "dora", "dora", seed=4)
    return root


def versions(*places: Path) -> dict[str, Any]:
    return Catalogue([str(one) for one in places], settled=0.0).versions


def test_what_vllm_is_told(made: Path) -> None:
    found = {name: (one, settings_of(one, "llama")) for name, one in versions(made / "adapters").items()}
    arguments, room = arguments_for([found["one"]], 96, 32)
    assert arguments[:2] == ["--enable-lora", "--lora-target-modules"]
    assert "model.layers.1.self_attn.qkv_proj" in arguments
    assert arguments[-6:] == ["--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "32"]
    assert room.problem(*found["two"]) == "has rank 12, more than the 8 that this vLLM was started for"
    assert room.problem(*found["routed"]) == "is routed, which this vLLM was not started for"
    arguments, room = arguments_for([found["two"]], 96, 1)
    assert room.rank == 16
    assert arguments[-4:] == ["--max-loras", "2", "--max-cpu-loras", "2"]
    assert "modules that this vLLM was not started for" in str(room.problem(*found["one"]))
    arguments, room = arguments_for([found["one"], found["routed"]], 4096, 32)
    assert {"--no-enable-chunked-prefill", "--enforce-eager"} < set(arguments)
    assert arguments[arguments.index("--max-num-batched-tokens") + 1] == "4096"
    assert room.routed
    assert room.problem(*found["routed"]) is None
    # One slot more than adapters in a batch, with one fewer vLLM 0.32 gives rows without an adapter that of the last on a CPU.
    assert arguments_for([found["one"]] * 20, 96, 32)[0][-4:] == ["--max-loras", "9", "--max-cpu-loras", "32"]


def test_the_users_own_arguments_for_vllm_count(made: Path) -> None:
    """They come last; what they say is what later adapters have to fit into."""
    assert arguments_for([], 96, 32, ["--max_lora_rank=64", "--max-loras", "3"])[1] == Room(64, None, False)
    assert arguments_for([], 96, 32, ["--max-lora-rank", "8", "--max-lora-rank=32"])[1].rank == 32
    assert arguments_for([], 96, 32, ["--max_loras=8", "--max-loras", "40"])[0][-2:] == ["--max-cpu-loras", "40"]
    for wrong in (["--max-lora-rank"], ["--max-loras", "--seed"], ["--max-loras", "x"]):
        with pytest.raises(GatewiseError, match=r"^among vLLM's own arguments, argument --max-lora(s|-rank)/"):
            arguments_for([], 96, 32, wrong)
    with pytest.raises(GatewiseError, match=r"--api-key is among vLLM's own arguments, .* GATEWISE_API_KEY"):
        VllmServer(str(made / "base"), [], port=0, rest=["--api-key", "secret"])
    found = {name: (one, settings_of(one, "llama")) for name, one in versions(made / "adapters").items()}
    for given, others in (("q_proj down_proj", "one"), ("qkv_proj down_proj", "one"), ("q_proj", "two"), ("o_proj", "one")):
        for known in ([], [found["two"]]):
            rest = ["--seed", "3", "--lora-target-modules", *given.split(), "--max-lora-rank", "16"]
            _, room = arguments_for(known, 96, 32, rest)
            assert "has modules that this vLLM was not started for" in str(room.problem(*found[others]))
            assert (room.problem(*found["two"]) is None) == ("down_proj" in given)


def test_what_vllm_does_not_serve_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GatewiseError, match=r"the adapter .*dora has more than A and B .*, which vLLM does not serve: .* gatewise export"
    ):
        VllmServer(str(made / "base"), [str(made / "dora")], port=0)
    said: list[str] = []
    shutil.copytree(made / "dora", tmp_path / "dora")
    server = VllmServer(str(made / "base"), [str(tmp_path)], port=0, say=said.append, settled=0.0)
    assert len(said) == 1
    assert re.match(r"note: the adapter .*dora has more than A and B", said[0])
    assert server.names == []
    # vLLM serves LoRA on embeddings and on the head, where the other engine has no batch for it.
    tokens = {"embed_tokens.lora_embedding_A": torch.ones(2, 60), "embed_tokens.lora_embedding_B": torch.ones(64, 2)}
    names = {"base_model_name_or_path": str(made / "base"), "task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"]}
    write_folder(tmp_path / "tokens", {f"model.{name}": tensor for name, tensor in tokens.items()}, **names)
    server.catalogue.scan()
    assert list(server.catalogue.versions) == ["tokens"]


def test_vllm_is_told_of_what_goes_whatever_came_before(made: Path, tmp_path: Path) -> None:
    folder, copies = tmp_path / "x", tmp_path / "copies"
    copies.mkdir()
    shutil.copytree(made / "adapters" / "one", folder)
    server = VllmServer(str(made / "base"), [str(tmp_path)], port=0, say=lambda text: None, settled=0.0)

    def told() -> list[bool]:
        """Of each line to vLLM, whether it names files to be served; no other name is in it."""
        process: Any = SimpleNamespace(stdin=io.BytesIO())
        server._update_adapters(process, copies)
        lines = [json.loads(line) for line in process.stdin.getvalue().splitlines()]
        assert all(line["name"] == "x" and Path(line.get("path", copies)).is_dir() for line in lines)
        return ["path" in line for line in lines]

    def put(source: Path) -> None:
        shutil.rmtree(folder)
        shutil.copytree(source, folder)
        server.catalogue.scan()

    assert (told(), told()) == ([True], [])
    put(made / "dora")  # which vLLM does not serve: what was served before stays
    assert (told(), server.names) == ([], ["x"])
    put(made / "adapters" / "two")  # of a rank that this vLLM was not started for
    assert (told(), server.names, told()) == ([False], [], [])
    put(made / "adapters" / "one")
    assert (told(), server.names) == ([True], ["x"])
    put(made / "adapters" / "one")
    shutil.rmtree(folder)  # before it was copied
    assert (told(), server.names) == ([], ["x"])
    server.catalogue.scan()
    assert (told(), server.names) == ([False], [])


def test_a_chat_is_written_as_for_the_adapter_that_answers() -> None:
    """vLLM writes it first, and looks up the adapter then."""
    adapters, written = vllm_server.Adapters(), []
    models: Any = SimpleNamespace(lora_requests={"x": "old"}, model_name=None, show_available_models=None)

    async def write(request: Any, default_template: str = "of the base model") -> str:
        written.append(default_template)
        models.lora_requests["x"], adapters._chats["x"] = "new", {"text": "new", "special_tokens": False}  # meanwhile
        return default_template

    class Request(SimpleNamespace):
        model_fields = ("add_special_tokens",)

    async def ask() -> None:
        renderer: Any = SimpleNamespace(preprocess_chat=write)
        await adapters.begin(models, renderer)
        adapters._chats["x"] = {"text": "old", "special_tokens": True}
        request = Request(model="x", messages=[])
        assert await renderer.preprocess_chat(request) == "new"
        assert (written, request.add_special_tokens) == (["old", "new"], False)
        assert await renderer.preprocess_chat(SimpleNamespace()) == "of the base model"  # a request for decisions names no model

    asyncio.run(ask())


def test_vllm_forgets_what_was_replaced_once_nothing_is_written_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters, removed, writing = vllm_server.Adapters(), [], {}

    class Engine:
        output_processor = SimpleNamespace(request_states=writing)

        async def add_lora(self, made: Any) -> None:
            if made.lora_path == "broken":
                raise ValueError(made.lora_path)

        async def remove_lora(self, number: int) -> None:
            removed.append(number)
            if number == 2:
                raise ValueError(number)

    numbers = iter(range(1, 9))
    counter = SimpleNamespace(inc=lambda step: next(numbers))
    models: Any = SimpleNamespace(lora_requests={}, engine_client=Engine(), lora_id_counter=counter)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=SimpleNamespace))

    async def change() -> None:
        for name, path in (("x", "1"), ("y", "2"), ("z", "3"), ("x", "4"), ("y", "broken"), ("x", None)):
            await adapters._change(models, name, path, None)
        assert list(models.lora_requests) == ["z"]
        await adapters._let_go(models.engine_client)
        assert removed == []  # a request may be on its way
        monkeypatch.setattr(vllm_server, "UNUSED", 1e-9)
        writing["a"] = SimpleNamespace(lora_name=f"x{vllm_server.STATE}(4)")
        await adapters._let_go(models.engine_client)
        assert sorted(removed) == [1, 2, 5]  # one could not be removed, which the others do not mind
        assert "does not let go of an adapter: 2" in capsys.readouterr().err
        writing.clear()
        for _ in range(2):
            await adapters._let_go(models.engine_client)
        assert removed[3:] == [4]

    asyncio.run(change())


def test_an_answer_to_a_chat_begins_without_the_blank_of_training() -> None:
    adapters = vllm_server.Adapters()
    adapters._chats |= {"x": {"before_answer": " "}, "y": {"before_answer": ""}, "z": None}
    error, ended = SimpleNamespace(error="no"), []

    async def create(request: Any, texts: list[str | None]) -> Any:
        if request.stream:
            return events(texts)
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=one)) for one in texts]) if texts else error

    async def events(texts: list[str | None]) -> Any:
        try:
            for number, text in enumerate(texts):
                told = {"choices": [{"index": number % 2, "delta": {"content": text}}]}
                yield f"data: {json.dumps(told)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            ended.append(True)

    async def ask(name: str, *texts: str | None, stream: bool = False, most: int = 9) -> list[Any]:
        serving: Any = SimpleNamespace(create_chat_completion=create)
        adapters.answer(serving)
        made = await serving.create_chat_completion(SimpleNamespace(model=name, stream=stream, n=2), list(texts))
        if not stream:
            return [one.message.content for one in made.choices] if texts else [made]
        found = []
        async with aclosing(made):
            async for event in made:
                found.append(event)
                if len(found) == most:
                    break
        assert ended.pop()  # also where the client is gone
        return [json.loads(one[6:])["choices"][0]["delta"]["content"] for one in found if "[DONE]" not in one]

    assert asyncio.run(ask("x", " a b", None)) == ["a b", None]
    assert asyncio.run(ask("x", "  a", "b")) == [" a", "b"]
    assert [asyncio.run(ask(name, " a", "b")) for name in ("y", "z", "base")] == [[" a", "b"]] * 3
    assert asyncio.run(ask("x")) == [error]
    assert asyncio.run(ask("x", "", "", " ", " b", " a", " c", stream=True)) == ["", "", "", "b", " a", " c"]
    assert asyncio.run(ask("x", " a", " b", " c", stream=True, most=1)) == ["a"]
    assert asyncio.run(ask("y", " a", stream=True)) == [" a"]


def fake(tmp_path: Path, script: str, missing: str = "") -> Path:
    """Stands in for a Python that has vLLM; ``missing`` are packages that it does not have."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && {{ echo "{missing}"; exit; }}\n{script}\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("script", "said"), [("echo the end; exit 1", "vLLM ended with exit code 1"), ("kill -9 $$", "vLLM was killed by signal 9")]
)
def test_its_end_is_told_in_a_sentence(made: Path, tmp_path: Path, script: str, said: str) -> None:
    log: list[str] = []
    server = VllmServer(str(made / "base"), [], python=fake(tmp_path, script), port=0, say=log.append)
    with pytest.raises(GatewiseError, match=said):
        server.run()
    assert log == ["the end"] * ("echo" in script)


def test_a_python_without_what_is_needed_is_told(made: Path, tmp_path: Path) -> None:
    routed = [str(made / "adapters" / "routed")]
    for python, said in (
        (tmp_path / "none", "none could not be run"),
        (fake(tmp_path, "exit 1", "gatewise"), "python has no gatewise: give the Python of an environment that has vLLM"),
    ):
        with pytest.raises(GatewiseError, match=said):
            VllmServer(str(made / "base"), routed, python=python, port=0).run()
    log: list[str] = []
    with pytest.raises(GatewiseError, match="vLLM ended with exit code 1"):  # plain adapters can do without, on a GPU
        VllmServer(str(made / "base"), [], python=fake(tmp_path, "exit 1", "gatewise"), port=0, say=log.append).run()
    assert any("has no gatewise, without which" in line for line in log)
    lacks_vllm = Path(sys.executable)
    with pytest.raises(GatewiseError, match=r"python\S* has no vllm: "):
        VllmServer(str(made / "base"), routed, python=lacks_vllm, port=0).run()


def test_vllm_goes_with_who_started_it(tmp_path: Path) -> None:
    """However that ends: nothing but the pipe to vllm_server.py tells it."""
    package = tmp_path / "path" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pids')!r})\n"
        "time.sleep(60)\n"
    )
    place = os.pathsep.join([str(tmp_path / "path"), *sys.path])
    command = [sys.executable, vllm_server.__file__]
    environment = {**os.environ, "PYTHONPATH": place}
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment) as process:
        while not (tmp_path / "pids").exists():
            assert process.poll() is None
            time.sleep(0.1)
        assert process.stdin is not None
        process.stdin.close()  # as the system does for one that was killed
    limit = time.monotonic() + 10
    while any(is_there(int(pid)) for pid in (tmp_path / "pids").read_text().split()):
        assert time.monotonic() < limit
        time.sleep(0.05)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True
    except (ProcessLookupError, FileNotFoundError):  # it may go between the two
        return False


def test_nothing_is_left_behind(made: Path, tmp_path: Path) -> None:
    """vLLM's engine is a process of its own, which must go too; and the key is no argument, which others see."""
    script = f'echo "$GATEWISE_API_KEY $GATEWISE_CPU_LORA" > {tmp_path}/key; '
    script += f'echo "$@" > {tmp_path}/arguments; sleep 1; sleep 100 & echo $! > {tmp_path}/engine; wait'
    command = [sys.executable, "-m", "gatewise", "serve", str(made / "base"), "--engine", "vllm", "--port", "0"]
    command += ["--log-requests", "--python", str(fake(tmp_path, script)), "--", "--seed", "3"]
    process = subprocess.Popen(command, env={**os.environ, "GATEWISE_API_KEY": "secret other"}, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "engine").exists() or not (tmp_path / "engine").read_text().strip():
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.05)
    engine = int((tmp_path / "engine").read_text())
    assert is_there(engine)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "serving ended"
    limit = time.monotonic() + 10
    while is_there(engine):  # the system takes a moment to end what was killed
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert (tmp_path / "key").read_text() == "secret other 1\n"
    told = (tmp_path / "arguments").read_text()
    assert "secret" not in told
    logged = "--enable-log-requests --enable-request-id-headers --max-log-len 0"
    assert told.endswith(f" --middleware gatewise_guard.GuardByEnvironment {logged} --seed 3\n")


def test_constraints_are_classes_of_vllms(made: Path, tmp_path: Path) -> None:
    python = fake(tmp_path, f'echo "$VLLM_USE_V2_MODEL_RUNNER $GATEWISE_HOSTS $@" > {tmp_path}/arguments; exit 1')
    form: Any = SimpleNamespace(logits_processor="a.b:C")
    server = VllmServer(str(made / "base"), [], python=python, port=0, say=lambda _: None, constraints={"form": form})
    with pytest.raises(GatewiseError, match="exit code 1"):
        server.run()
    told = (tmp_path / "arguments").read_text()
    assert told.startswith("0 127.0.0.1,[::1],localhost ")
    assert told.endswith(" --logits-processors a.b:C\n")


# ---- the real vLLM ----

real = pytest.mark.skipif(PYTHON is None, reason="GATEWISE_VLLM_PYTHON names no Python that has vLLM: run `make test-serve`")


@contextmanager
def vllm_serving(base: Path | str, folder: Path, *rest: str) -> Iterator[SimpleNamespace]:
    command = [sys.executable, "-m", "gatewise", "serve", str(base), "--adapters", str(folder), "--python", str(PYTHON)]
    command += ["--port", "0", "--served-model-name", "tiny", "--dtype", "float32", "--poll", "0.3", *rest]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    place = next(one for one in folder.parents if one.is_dir())
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            said = (place / "log").read_text()
            assert line.startswith("serving: "), said[-3000:]
            yield SimpleNamespace(url=line.split()[1].removesuffix("/v1"), folder=folder)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def status(server: SimpleNamespace, more: bytes = b"", **headers: str) -> int:
    body = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 1}).encode() + more
    asked = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json", **headers})
    try:
        return int(urllib.request.urlopen(asked).status)
    except urllib.error.HTTPError as error:
        return error.code


@real
def test_two_states_of_an_adapter_write_in_one_batch(tmp_path: Path) -> None:
    """vLLM takes adapters of one name for one, and ended where it had to load the second state of a batch."""
    base = base_folder(tmp_path / "base", max_position_embeddings=32768, **WIDE)
    states = [adapter_folder(base, tmp_path / f"state{number}", seed=number) for number in range(2)]
    others = [adapter_folder(base, tmp_path / f"other{number}", seed=9) for number in range(4)]
    folder, prompt = tmp_path / "served", [7, 19, 23]
    shutil.copytree(states[0], folder / "one")
    shutil.copytree(states[1], folder / ".new")
    wanted = text_of(writes(base, states[1], prompt, 8, ends=False))
    more = {"prompt": prompt, "temperature": 0, "extra_body": {"ignore_eos": True}}
    rest = ["--", "--block-size", "32", "--max-loras", "2", "--max-cpu-loras", "2"]
    with vllm_serving(base, folder, *rest) as server, ThreadPoolExecutor(1) as thread:
        asked, enough = client(server), Event()

        def read() -> tuple[set[str], str]:
            models, texts = set(), []
            with asked.completions.create(model="one", max_tokens=30000, stream=True, **more) as stream:
                for piece in stream:
                    models.add(piece.model)
                    texts.append(piece.choices[0].text)
                    if enough.is_set():
                        return models, "".join(texts)
            raise AssertionError("it ended too early")

        held = thread.submit(read)
        limit = time.monotonic() + 40
        try:
            (folder / "one").rename(tmp_path / "gone")
            (folder / ".new").rename(folder / "one")
            while asked.completions.create(model="one", max_tokens=8, **more).choices[0].text != wanted:
                assert time.monotonic() < limit
                time.sleep(0.1)
            for place in others:  # whose loading takes the second state out of vLLM's slots
                place.rename(folder / place.name)
            while len(asked.models.list().data) < 6:
                assert time.monotonic() < limit
                time.sleep(0.1)
            answers = [asked.completions.create(model="one", max_tokens=8, **more) for _ in range(2)]
        finally:
            enough.set()
        assert [(one.model, one.choices[0].text) for one in answers] == [("one", wanted)] * 2
        models, text = held.result()
        assert status(server) == 200
        assert status(server, Host="evil.example") == status(server, Origin="http://evil.example") == 403
        assert status(server, b" " * guard.MOST_BYTES) == 413
        assert models == {"one"}
        assert text.startswith(text_of(writes(base, states[0], prompt, 40, ends=False)))
        assert {one.id for one in asked.models.list()} == {"tiny", "one", *(place.name for place in others)}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The quickstart's adapter on the real model, as a pattern."""
    runs = tmp_path_factory.mktemp("front_door") / "runs"
    train(load_recipe(Path(__file__).parents[3] / "recipes" / "quickstart.yaml"), runs / "quickstart", console=Console(quiet=True))
    return f"{runs}/*/adapter"


@real
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_quickstart_answers_as_the_docs_say(quickstart: str, engine: str) -> None:
    base = "smollm2-135m-instruct"
    with vllm_serving(base, Path(quickstart)) if engine == "vllm" else serving(base, quickstart, name=base) as server:
        ask_quickstart(server.url)
        if engine == "vllm":  # the ids of a chat are those of training, and the base model has a template of its own
            names = {"quickstart": "Message: Where?\nDepartment:", "tiny": None}
            for name, prompt in names.items():
                chat = {"model": name, "messages": [{"role": "user", "content": "Where?"}]}
                ids = tokens_of(server.url, chat)
                assert len(ids) > 20 if prompt is None else ids == tokens_of(server.url, {"model": name, "prompt": prompt})


def tokens_of(url: str, body: dict[str, Any]) -> list[int]:
    asked = urllib.request.Request(f"{url}/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        return list(json.load(answer)["tokens"])
