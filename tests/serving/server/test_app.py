"""Real clients. Every answer is what ``generate`` writes with that adapter alone."""

import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.console import Console
from served_models import POSITIONS, TEMPLATE, ask_quickstart, base_folder, client, model_of, serving, text_of, words, writes
from tiny_models import word_tokenizer

import gatewise
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train
from gatewise.serving.server.bodies import Chat, Completion, RefusedError, Tokenize, read
from gatewise.serving.server.running import AdapterServer

NAMES = ["tiny", "plain", "stable", "routed", "other", "dora", "prompts"]
Folders = dict[str | None, Path]


@pytest.fixture
def alone(folders: Folders) -> Callable[..., str]:
    """alone(name, prompt, tokens) -> the text that the adapter writes alone, as it goes on from the prompt."""

    def text(name: str, prompt: list[int], tokens: int) -> str:
        written = writes(folders[None], None if name == "tiny" else folders[name], prompt, tokens)
        return text_of(written)

    return text


def prompt_of(seed: int, most: int = 12) -> list[int]:
    chance = random.Random(seed)
    return [chance.randint(2, 59) for _ in range(chance.randint(1, most))]


def test_models(server: AdapterServer) -> None:
    asked = client(server)
    listed = {one.id: one for one in asked.models.list()}
    assert next(iter(listed)) == "tiny"
    assert sorted(listed) == sorted(NAMES)
    assert listed["plain"].model_dump()["parent"] == "tiny"
    assert asked.models.retrieve("routed").id == "routed"
    with pytest.raises(openai.NotFoundError):
        asked.models.retrieve("none")


def test_many_clients_at_once(server: AdapterServer, alone: Callable[..., str]) -> None:
    """Mixed adapters, lengths, prompts as text and as ids, whole and as streams: 42 answers over 14 clients."""
    asked = client(server)
    jobs = [(name, prompt_of(number), 3 + number % 17) for number in range(6) for name in NAMES]
    random.Random(0).shuffle(jobs)

    def run(number: int) -> tuple[str, int]:
        name, prompt, tokens = jobs[number]
        given: Any = prompt if number % 2 else words(prompt)
        settings: dict[str, Any] = {"model": name, "prompt": given, "max_tokens": tokens, "temperature": 0}
        if number % 3:
            answer = asked.completions.create(**settings)
            return answer.choices[0].text, answer.usage.completion_tokens
        events = list(asked.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
        return "".join(one.choices[0].text for one in events[:-1]), events[-1].usage.completion_tokens

    with ThreadPoolExecutor(14) as threads:
        found = list(threads.map(run, range(len(jobs))))
    for (name, prompt, tokens), (text, count) in zip(jobs, found, strict=True):
        assert text == alone(name, prompt, tokens), (name, prompt)
        assert count <= tokens
    assert len({text for text, _ in found}) > 25


@pytest.mark.parametrize("name", ["tiny", "plain", "routed"])
def test_chat(server: AdapterServer, alone: Callable[..., str], name: str) -> None:
    messages: Any = [{"role": "w5", "content": "w9 w3"}, {"role": "w6", "content": [{"type": "text", "text": "w7"}]}]
    prompt = [one + 2 for one in (5, 9, 3, 6, 7, 1)]
    assert word_tokenizer().apply_chat_template(messages[:1], chat_template=TEMPLATE, tokenize=False) == "w5 w9 w3 w1"
    asked = client(server).chat.completions
    settings: dict[str, Any] = {"model": name, "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = asked.create(**settings)
    assert whole.choices[0].message.content == alone(name, prompt, 8)
    events = list(asked.create(**settings, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in events) == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stop_text_is_not_the_blank_that_a_chat_leaves_out(folders: Folders, alone: Callable[..., str], tmp_path: Path) -> None:
    folder, prompt = shutil.copytree(folders["plain"], tmp_path / "x"), prompt_of(61)
    (folder / "gatewise.json").write_text('{"template": "{text}"}')
    text = alone("plain", prompt, 12)
    with serving(folders[None], folder) as server:
        settings: dict[str, Any] = {"model": "x", "max_tokens": 12, "temperature": 0}
        chat: Any = [{"role": "user", "content": words(prompt)}]
        for stop, found in ((None, text[1:]), ([" "], text.split()[0])):
            made = client(server).chat.completions.create(messages=chat, stop=stop, **settings)
            assert made.choices[0].message.content == found
            events = client(server).chat.completions.create(messages=chat, stop=stop, stream=True, **settings)
            assert "".join(one.choices[0].delta.content or "" for one in events) == found
        assert client(server).completions.create(prompt=prompt, stop=[" "], **settings).choices[0].text == ""


def test_the_quickstart_answers_as_the_docs_say(tmp_path: Path) -> None:
    """Its recipe on a tiny model and five rows, which it learns by heart. With the real ones: test_with_vllm.py."""
    rows = {
        "Where is my parcel?": "delivery",
        "My card was charged twice.": "billing",
        "I cannot log in.": "account",
        "It stopped working.": "technical",
        "The shoes are too small.": "returns",
    }
    base, data = base_folder(tmp_path / "base", hidden_size=32, intermediate_size=64), tmp_path / "rows.jsonl"
    word_tokenizer("Message: Department: " + " ".join(f"{text} {label}" for text, label in rows.items())).save_pretrained(base)
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows.items()) * 8)
    changes = [f"model={base}", f"data={{train: {data}, dev: {data}, limit_dev: 5, held_out: 5}}", "training.learning_rate=0.01"]
    recipe = load_recipe(Path(__file__).parents[3] / "recipes" / "quickstart.yaml", changes)
    train(recipe, tmp_path / "runs" / "quickstart", console=Console(quiet=True))
    said: list[str] = []
    (tmp_path / "adapters").mkdir()
    with serving(base, tmp_path / "runs" / "*" / "adapter", tmp_path / "adapters", say=said.append) as server:
        ask_quickstart(server.url)
    assert f"note: no adapter at {tmp_path / 'adapters'} yet" in said
    assert r"quickstart: prompts look like 'Message: {text}\nDepartment:'" in said


def test_several_prompts_and_answers(server: AdapterServer, alone: Callable[..., str]) -> None:
    prompts = [prompt_of(seed) for seed in (50, 51, 52)]
    answer = client(server).completions.create(model="routed", prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [one.index for one in answer.choices] == list(range(6))
    assert [one.text for one in answer.choices] == [alone("routed", one, 6) for one in prompts for _ in range(2)]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_stop_strings_end_an_answer(server: AdapterServer, alone: Callable[..., str]) -> None:
    prompt = prompt_of(61)
    text = alone("plain", prompt, 12)
    word = text.split()[3]
    for stream in (False, True):
        made = client(server).completions.create(
            model="plain", prompt=prompt, max_tokens=12, temperature=0, stop=["nowhere", word], stream=stream
        )
        found = "".join(one.choices[0].text for one in made) if stream else made.choices[0].text
        assert found == text[: text.index(word)]
    assert made.response.status_code == 200


def test_sampling(server: AdapterServer, folders: Folders) -> None:
    """A seed gives the same answer again, and many answers are as frequent as the model has them probable."""
    import torch

    prompt = prompt_of(62)
    asked = client(server).completions
    first, again, other = (
        asked.create(model="plain", prompt=prompt, max_tokens=9, seed=seed).choices[0].text for seed in (7, 7, 8)
    )
    assert first == again != other
    small = {"max_tokens": 9, "temperature": 1, "top_p": 1e-50}  # of which no token would be, but the first
    greedy = asked.create(model="plain", prompt=prompt, max_tokens=9, temperature=0).choices[0].text
    assert asked.create(model="plain", prompt=prompt, **small).choices[0].text == greedy
    drawn = asked.create(model="plain", prompt=[prompt] * 8, n=25, max_tokens=1, temperature=1.5, top_p=0.3, seed=1).choices
    with torch.no_grad():
        logits = model_of(folders[None], folders["plain"])(input_ids=torch.tensor([prompt])).logits[0, -1]
    probabilities, places = (logits / 1.5).softmax(-1).sort(descending=True)
    likely = places[probabilities.cumsum(-1) - probabilities < 0.3].tolist()
    assert {int(one.text[2:]) + 2 for one in drawn if one.text} <= set(likely)
    share = sum(one.text == f" w{likely[0] - 2}" for one in drawn) / len(drawn)
    assert abs(share - float(probabilities[0] / probabilities[: len(likely)].sum())) < 0.15


# ---- what is refused ----

GOOD = {"model": "plain", "prompt": "w1", "max_tokens": 2}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "none"}, 404, "model", "does not exist"),
        ({"model": "../adapters/plain"}, 404, "model", "does not exist"),
        ({"model": 3}, 400, "model", "valid string"),
        ({"prompt": ""}, 400, "prompt", "no token"),
        ({"prompt": []}, 400, "prompt", "expected a text"),
        ({"prompt": [[1], []]}, 400, "prompt", "expected a text"),
        ({"prompt": [True]}, 400, "prompt", "expected a text"),
        ({"prompt": [60]}, 400, "prompt", "vocabulary of 60"),
        ({"prompt": [-1]}, 400, "prompt", "vocabulary of 60"),
        ({"prompt": "\ud800"}, 400, None, "Invalid JSON"),
        ({"prompt": [5] * POSITIONS}, 400, "prompt", f"{POSITIONS} tokens"),
        ({"max_tokens": POSITIONS}, 400, "max_tokens", f"{POSITIONS} tokens"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 10**400}, 400, "max_tokens", "Input should be"),
        ({"temperature": -1}, 400, "temperature", "temperature: Input should be greater than or equal to 0"),
        ({"temperature": float("nan")}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": 10**400}, 400, "temperature", "Input should be"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 129}, 400, "n", "less than or equal to 128"),
        ({"n": 100, "prompt": ["w1"] * 100}, 400, "n", "10000 answers"),
        ({"seed": 0.5}, 400, "seed", "valid integer"),
        ({"stop": [""]}, 400, "stop", "empty text"),
        ({"logprobs": 1}, 400, "logprobs", "not served here"),
        ({"echo": True}, 400, "echo", "not served here"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not served here"),
        ({"truncate_prompt_tokens": 3}, 400, "truncate_prompt_tokens", "not served here"),
        ({"add_special_tokens": False}, 400, "add_special_tokens", "not served here"),
        ({"max_completion_tokens": 5}, 400, "max_completion_tokens", "not served here"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "not served here"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options", "usage is not served here"),
        ({"temprature": 0.5}, 400, "temprature", "temprature is not served here"),
        ({"temprature": [], "x" * 9999: 1}, 400, "temprature", "leave it out"),
        ({"prompt": "w1 " * 200}, 400, "prompt", "the prompt has 600 characters, more than 480: shorten it"),
    ],
)
def test_what_makes_no_sense_is_told(server: AdapterServer, change: Any, status: int, param: str, said: str) -> None:
    answer, body = post(server, json.dumps({**GOOD, **change}).encode())
    assert answer == status, body
    error = json.loads(body)["error"]
    assert error["code"] == status
    assert error["param"] == param
    assert said in error["message"]
    assert str(Path.cwd()) not in error["message"]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("guided_json", {"type": "object"}, None),
        ("skip_special_tokens", False, True),
        ("logits_processors", ["one"], []),
    ],
)
def test_what_would_change_an_answer_is_refused(name: str, value: Any, neutral: Any, is_chat: bool) -> None:
    kind = Chat if is_chat else Completion
    body = {"model": "plain", **({"messages": [{"role": "user", "content": "w1"}]} if is_chat else {"prompt": "w1"})}
    with pytest.raises(RefusedError, match=f"{name} is not served here, or not with this value: leave it out"):
        read(kind, json.dumps({**body, name: value}).encode())
    read(kind, json.dumps({**body, name: neutral}).encode())


def test_too_much_is_refused_before_anything_is_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, change, said in (
        (Completion, {"prompt": ["a"] * 20000, "n": 8}, "160000 answers were asked for at once: expected at most 256"),
        (Completion, {"prompt": [[]] * 300}, "300 answers"),
        (Chat, {"messages": [{}] * 9000}, "there are 9000 messages, more than the 8192 tokens"),
        (Chat, {"messages": [], **{f"field{number}": None for number in range(9)}, "other": 1}, "other is not served here"),
    ):
        content = json.dumps({"model": "plain", **change}).encode()
        with monkeypatch.context() as patch:
            patch.setattr(kind, "model_validate", None)
            with pytest.raises(RefusedError, match=said):
                read(kind, content, 256, 8192)
    with pytest.raises(RefusedError, match=r"messages\.0\.role"):  # and of many faults one is told
        read(Chat, json.dumps({"model": "plain", "messages": [{}] * 8000}).encode())
    for kind in (Chat, Tokenize):
        told = [{"role": "user", "content": "a", "refusal": None, "tool_calls": [], "name": "she", "image": "b"}]
        with pytest.raises(RefusedError, match="messages: image is not served here"):
            read(kind, json.dumps({"model": "plain", "messages": told}).encode())


def test_what_clients_send_of_themselves_is_passed_over(server: AdapterServer) -> None:
    more: dict[str, Any] = {
        "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s", "tool_choice": "none",
        "prompt_cache_key": "k", "parallel_tool_calls": False, "logprobs": False, "presence_penalty": 0, "stream": False,
    }  # fmt: skip
    messages: Any = [{"role": "w5", "content": "w9", "name": None}]
    assert client(server).chat.completions.create(model="plain", messages=messages, max_tokens=2, **more).choices
    body = {**GOOD, "stream": True, "stream_options": {"include_usage": None}}
    assert post(server, json.dumps(body).encode())[0] == 200


def test_a_body_that_comes_after_the_last_seconds_is_told_so(server: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "is_over", True)
    assert post(server, json.dumps({**GOOD, "stream": True}).encode())[0] == 503


def test_a_client_that_is_gone_before_its_turn_costs_nothing(server: AdapterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And bodies that are short do not wait for those that are long."""
    seen, may_go = list[int](), threading.Event()

    def slowly(kind: Any, content: bytes, *given: Any) -> Any:
        seen.append(len(content))
        if len(content) > 2**16:
            may_go.wait(20)
        return read(kind, content, *given)

    monkeypatch.setattr("gatewise.serving.server.app.read", slowly)
    long = [json.dumps({**GOOD, "prompt": "w" * (2**17 + number)}).encode() for number in range(3)]
    with ThreadPoolExecutor(2) as threads:
        first = [threads.submit(post, server, one) for one in long[:2]]
        while len(seen) < 2:
            time.sleep(0.01)
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", long[2], JSON), timeout=0.1)
        assert post(server, json.dumps(GOOD).encode())[0] == 200
        may_go.set()
        assert {one.result()[0] for one in first} == {400}
    assert post(server, long[0])[0] == 400
    assert sorted(seen)[1:] == sorted(map(len, (*long[:2], long[0])))


def test_tokens_and_texts(server: AdapterServer) -> None:
    for change, ids in (
        ({"prompt": "w5 w9"}, [7, 11]),
        ({"model": "routed", "prompt": "w5 w9", "add_special_tokens": False}, [7, 11]),
        ({"messages": [{"role": "w5", "content": "w9"}], "return_token_strs": True}, [7, 11, 3]),
    ):
        status, answer = fetch(server, "/tokenize", json.dumps(change).encode(), **JSON)
        assert status == 200, answer
        found = json.loads(answer)
        strings = ["w5", "w9", "w1"] if "messages" in change else None
        assert found == {"count": len(ids), "max_model_len": POSITIONS, "tokens": ids, "token_strs": strings}
    assert json.loads(fetch(server, "/detokenize", b'{"tokens": [7, 11]}', **JSON)[1]) == {"prompt": "w5 w9"}
    assert json.loads(fetch(server, "/version")[1]) == {"version": gatewise.__version__}
    for path, body, status in (
        ("/tokenize", b'{"prompt": "w1", "messages": []}', 200),
        ("/tokenize", b'{"model": "plain"}', 400),
        ("/tokenize", b'{"messages": [{"role": "w5", "content": "w9"}], "add_special_tokens": true}', 400),
        ("/tokenize", b'{"model": "none", "prompt": "w1"}', 404),
        ("/tokenize", b'{"prompt": "%s"}' % (b"w" * 500), 400),
        ("/detokenize", b'{"tokens": [60]}', 400),
        ("/detokenize", b'{"tokens": ["7"]}', 400),
        ("/detokenize", b'{"tokens": [%s]}' % b",".join([b"7"] * (POSITIONS + 1)), 400),
    ):
        assert fetch(server, path, body, **JSON)[0] == status


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b"[" * 200_000, 400), (b"\xff\xfe", 400), (b'{"model": "plain"}', 400), (b"", 400)],
)
def test_broken_bodies(server: AdapterServer, body: bytes, status: int) -> None:
    found, answer = post(server, body)
    assert found == status
    assert json.loads(answer)["error"]["type"] == "BadRequestError"


def test_bodies_of_another_type_or_size(server: AdapterServer) -> None:
    assert post(server, json.dumps(GOOD).encode(), "text/plain")[0] == 415
    assert post(server, b'{"prompt": "' + b"w" * (9 * 2**20))[0] == 413
    assert fetch(server, "/v1/nothing")[0] == 404
    assert fetch(server, "/health", Host="evil.example")[0] == 403
    assert fetch(server, "/health")[0] == 200


def test_cancelled_answers_free_their_place(server: AdapterServer) -> None:
    def cancelled() -> list[bytes]:
        return [line for line in fetch(server, "/metrics")[1].splitlines() if b'how="cancelled"' in line]

    before = cancelled()
    settings: dict[str, Any] = {"prompt": "w1", "max_tokens": POSITIONS - 1, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for name in ("plain", "routed", "prompts"):
        stream = client(server).completions.create(model=name, **settings, stream=True)
        next(iter(stream))
        stream.close()
        with suppress(openai.APITimeoutError):
            client(server).with_options(timeout=0.05).completions.create(model=name, **settings)
    limit = time.monotonic() + 20
    while b"gatewise_running{" in fetch(server, "/metrics")[1]:
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert cancelled() != before
    assert b'gatewise_first_token_seconds_count{model="plain"}' in fetch(server, "/metrics")[1]


def post(server: AdapterServer, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    return fetch(server, "/v1/completions", body, **{"Content-Type": kind})


def fetch(server: AdapterServer, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and content of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, body, headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
