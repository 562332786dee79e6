"""A soak of `gatewise serve`: many clients over more adapters than are loaded at a time, whose files change meanwhile.

Adapters with random weights (plain LoRA of several ranks, rank-stabilised, routed) are written to a temporary folder, and what each
writes alone, greedily, is noted before the server starts. Then clients send random work: completions and chats, streamed and whole,
some given up in the middle, and what has to be refused. A fifth of the adapters change: folders swapped by renaming, files written
over in place, folders deleted that come back. After a third of the time the engine is killed, and the server started again.

Right is an answer of a known prompt if it is that of a version that the adapter had while it was asked; any other is counted as
wrong, and told. Tokens are compared up to the first one where the reference's two best are so close that rounding decides. Every
error has to have OpenAI's shape and the status that was due. At the end everything has to have been given back.

    python benchmarks/serving.py                                     # SmolLM2-135M, 64 clients, 100 adapters, 300 seconds
    python benchmarks/serving.py --engine vllm --python .venv-serve/bin/python
    python benchmarks/serving.py --tiny --seconds 60                 # a tiny random Llama

With vLLM on processors set VLLM_CPU_KVCACHE_SPACE (GiB) and OMP_NUM_THREADS.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from campaign import RESULTS, append, machine
from peft import LoraConfig, get_peft_model

from gatewise import RoutedLoraConfig
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import pick_device

BASE, KEY = "base", "soak-key"
MODEL = "smollm2-135m-instruct"
TOKENS = 16  # of a known answer, at most
CLOSE = {"float32": 0.02, "bfloat16": 0.5}  # logits that rounding may swap
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w1"
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"r": 4}),
    ("routed", {"r": 4}),
    ("plain", {"r": 8, "use_rslora": True}),
    ("plain", {"r": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("routed", {"r": 8, "top_k": 2}),
    ("plain", {"r": 2, "target_modules": ["o_proj", "up_proj"]}),
]

# ---- what is served, and what is right ----


@dataclass(frozen=True)
class Known:
    """A prompt: as text or token ids of a completion, or as messages of a chat."""

    ids: list[int]
    body: dict[str, Any]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


@dataclass
class Change:
    """From ``begin`` to ``end`` one content took the place of another; None is no folder."""

    begin: float
    end: float
    content: int | None
    is_loose: bool = False  # files stood half written for so long that they may have been taken for whole


@dataclass
class Adapter:
    name: str
    folder: Path
    changes: list[Change]

    def possible(self, asked: float, answered: float, grace: float) -> tuple[set[int | None], bool, bool]:
        """Contents that may have answered; whether the folder changed meanwhile, and whether anything may have come of it."""
        found: set[int | None] = set()
        changing = loose = False
        for change, then in zip(self.changes, [*self.changes[1:], None], strict=True):
            if change.begin <= answered and (then is None or then.end + grace >= asked):
                found.add(change.content)
            if change.begin <= answered and change.end + grace >= asked:
                changing, loose = True, loose or change.is_loose
        return found, changing, loose


@dataclass
class Material:
    """Adapters, and what each content writes after each prompt: answers[content][prompt][tokens - 1], base model under None."""

    base: str
    served: Path
    contents: list[Path]
    adapters: list[Adapter]
    prompts: list[Known]
    answers: dict[int | None, list[list[str]]]

    @property
    def distinct(self) -> float:
        """The share of pairs of contents whose longest common answers differ: what can be told apart."""
        told = [same for a in self.answers for b in self.answers if a != b for same in self._differ(a, b)]
        return sum(told) / max(1, len(told))

    def _differ(self, a: int | None, b: int | None) -> Iterator[bool]:
        for mine, theirs in zip(self.answers[a], self.answers[b], strict=True):
            both = min(len(mine), len(theirs))
            yield bool(both) and mine[both - 1] != theirs[both - 1]


def tiny_base(folder: Path) -> Path:
    """A random Llama with weights as large as trained ones, whose words are w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = ["<pad>", "<eos>", *(f"w{number}" for number in range(126))]
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), pad_token_id=0, eos_token_id=1, **sizes, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.25)
    model.save_pretrained(folder)
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make(root: Path, base: str, adapters: int, seed: int, device: str = "auto", dtype: str = "float32") -> Material:
    """Writes adapters, a fifth of which have a second content to change to, and notes what each content writes alone."""
    chance = random.Random(seed)
    changing = max(1, adapters // 5)
    place = pick_device(device)
    model: Any = load_model(base, dtype=getattr(torch, dtype), device=place)
    model.generation_config.eos_token_id = None  # requests go on after it, too
    tokenizer = load_tokenizer(base)
    prompts = [_prompt(tokenizer, chance, number) for number in range(6)]
    answers: dict[int | None, list[list[str]]] = {None: _answers(model, tokenizer, prompts, CLOSE[dtype])}
    contents = [root / "contents" / str(number) for number in range(adapters + changing)]
    for kind, (family, settings) in enumerate(KINDS):
        mine = [number for number in range(len(contents)) if number % len(KINDS) == kind]
        if not mine:
            continue
        config: Any = RoutedLoraConfig if family == "routed" else LoraConfig
        common = {"target_modules": "all-linear"} if family == "plain" else {}
        with_adapter = get_peft_model(model, config(task_type="CAUSAL_LM", lora_alpha=16, **(common | settings))).eval()
        for number in mine:
            torch.manual_seed(1000 * seed + number)
            _randomise(with_adapter)
            with_adapter.save_pretrained(contents[number], save_embedding_layers=False)
            answers[number] = _answers(with_adapter, tokenizer, prompts, CLOSE[dtype])
        model = with_adapter.unload()
    served = root / "served"
    rows = []
    for number in range(adapters):
        row = Adapter(f"adapter-{number}", served / f"adapter-{number}", [Change(-1e9, -1e9, number)])
        shutil.copytree(contents[number], row.folder)
        rows.append(row)
    return Material(base, served, contents, rows, prompts, answers)


def _prompt(tokenizer: Any, chance: random.Random, number: int) -> Known:
    """Two as text, two as token ids, two as chats."""
    common = ["river", "stone", "window", "green", "seven", "letter", "quiet", "machine", "garden", "under", "paper"]
    words = [f"w{one}" for one in range(2, 120)] if tokenizer.convert_tokens_to_ids("w5") == 7 else common
    text = " ".join(chance.choice(words) for _ in range(chance.randint(3, 24)))
    if number % 3 == 2:
        messages = [{"role": words[0] if words is not common else "user", "content": text}]
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Known(tokenizer(shown, add_special_tokens=False)["input_ids"], {"messages": messages})
    ids = tokenizer(text)["input_ids"]
    return Known(ids, {"prompt": ids if number % 3 else text})


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Updates as large as a good part of the weights, and routers that tell prompts apart."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_A" in name:
            value.normal_(std=value.shape[1] ** -0.5)
        elif "lora_B" in name:
            value.normal_(std=0.1)
        elif ".prompt_router." in name:
            if name.endswith("center"):
                value.copy_(0.3 * torch.randn_like(value))
            elif name.endswith(("spread", "observed")):
                value.fill_(0.8 if name.endswith("spread") else 70.0)
            elif name.endswith(("numerator", "denominator")):
                continue
            else:
                value.normal_(std=1.0 if value.ndim < 2 else 2 * value.shape[-1] ** -0.5)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: Sequence[Known], close: float) -> list[list[str]]:
    """After each prompt the text of one token, of two, and so on, as far as no rounding decides."""
    width = max(len(prompt.ids) for prompt in prompts)
    given = torch.tensor([[0] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts], device=model.device)
    written = model.generate(
        input_ids=given, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    best = torch.stack(written.logits, dim=1).float().topk(2).values
    is_close = (best[..., 0] - best[..., 1] < close).tolist()
    found = []
    for prompt, ids, doubts in zip(prompts, written.sequences[:, width:].tolist(), is_close, strict=True):
        sure = doubts.index(True) if True in doubts else len(ids)
        before = len(_decode(tokenizer, prompt.ids))
        found.append([_decode(tokenizer, prompt.ids + ids[: count + 1])[before:] for count in range(sure)])
    return found


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# ---- clients ----


class Soak:
    """Clients of a server, changes of its adapters, and what they found.

    Args:
        url: of the server.
        grace: seconds after a change in which the old content may still answer.
        vllm: whether errors are vLLM's own, which has other statuses for some of them.
        settled: seconds for which the server leaves files alone that change.
    """

    def __init__(
        self, url: str, material: Material, *, seed: int = 0, grace: float = 15.0, settled: float = 2.0, vllm: bool = False
    ) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self.host, self.port = address.hostname, address.port
        self.material, self.grace, self.settled, self.vllm, self.seed = material, grace, settled, vllm, seed
        self.done: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.first: list[float] = []  # seconds to the first token
        self.each: list[float] = []  # seconds per token after it
        self.tokens = 0
        self.down: list[list[float]] = []  # from when to when the server was away
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, clients: int, changes_every: float) -> None:
        jobs = [threading.Thread(target=self._client, args=(number,), daemon=True) for number in range(clients)]
        self._threads = [*jobs, threading.Thread(target=self._change, args=(changes_every,), daemon=True)]
        for thread in self._threads:
            thread.start()

    def end(self, patience: float = 150.0) -> None:
        """Each client ends what it asked."""
        self._stop.set()
        limit = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        if stuck := sum(thread.is_alive() for thread in self._threads):
            self._note("wrong", f"{stuck} clients wait for an answer that does not come")

    def _note(self, what: str, wrong: str = "") -> None:
        with self._lock:
            self.done[what] += 1
            if what == "wrong":
                self.wrong.append(wrong)

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        while not self._stop.is_set():
            asked = time.monotonic()
            work = chance.choices([self._known, self._given_up, self._sampled, self._refused], [60, 12, 8, 20])[0]
            try:
                work(chance)
            except (OSError, http.client.HTTPException) as error:
                if self._was_down(asked):
                    self._note("cut off by the kill")
                    time.sleep(1)
                else:
                    self._note("wrong", f"{work.__name__}: {type(error).__name__}: {error}")

    def _was_down(self, asked: float) -> bool:
        """Whether the server was away at any time since."""
        return any(begin <= time.monotonic() and asked <= end for begin, end in self.down)

    @contextmanager
    def _asked(
        self, path: str, body: Any, key: str = KEY, kind: str = "application/json"
    ) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPResponse]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=140)
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request("POST", path, sent, {"Content-Type": kind, "Authorization": f"Bearer {key}"})
            answer = connection.getresponse()
            with self._lock:
                self.statuses[answer.status] += 1
            yield connection, answer
        finally:
            connection.close()

    def _pick(self, chance: random.Random) -> tuple[Adapter | None, int, int, dict[str, Any]]:
        """A model (None: the base model), a known prompt, tokens of its answer, and the request."""
        row = None if chance.random() < 0.1 else chance.choice(self.material.adapters)
        number = chance.randrange(len(self.material.prompts))
        tokens = chance.randint(1, TOKENS)
        body = {"model": BASE if row is None else row.name, "max_tokens": tokens, **self.material.prompts[number].body}
        return row, number, tokens, body

    def _known(self, chance: random.Random) -> None:
        row, number, tokens, body = self._pick(chance)
        body |= {"temperature": 0, "ignore_eos": True, "stream": chance.random() < 0.5}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        asked = time.monotonic()
        with self._asked(self.material.prompts[number].path, body) as (_, answer):
            if answer.status != 200:
                self._error(answer, answer.read(), {404, 503}, row, asked)
                return
            if not body["stream"]:
                whole = json.loads(answer.read())
                (choice,) = whole["choices"]
                text = choice["message"]["content"] if "messages" in body else choice["text"]
                self._compare(row, number, tokens, text, asked)
                with self._lock:
                    self.tokens += whole["usage"]["completion_tokens"]
                return
            text, begun, used = "", 0.0, 0
            for event in _events(answer):
                if "error" in event:
                    raise http.client.HTTPException(f"{body['model']}: {event['error']}")
                begun = begun or time.monotonic()
                text += "".join(map(_text_of, event["choices"]))
                used = (event.get("usage") or {}).get("completion_tokens", used)
            took = time.monotonic() - begun
        self._compare(row, number, tokens, text, asked)
        with self._lock:
            self.tokens += used
            self.first.append(begun - asked)
            if used > 1:
                self.each.append(took / (used - 1))

    def _given_up(self, chance: random.Random) -> None:
        """Reads a few events and goes, or goes before the answer is there, or before the request is."""
        row, number, _, body = self._pick(chance)
        path = self.material.prompts[number].path
        body |= {"temperature": 0, "ignore_eos": True, "max_tokens": 100}
        asked, how = time.monotonic(), chance.randrange(3)
        if how == 0:
            with self._asked(path, {**body, "stream": True}) as (_, answer):
                if answer.status != 200:
                    self._error(answer, answer.read(), {404, 503}, row, asked)
                    return
                text = ""
                for count, event in enumerate(_events(answer)):
                    text += "".join(map(_text_of, event.get("choices", ())))
                    if count >= chance.randint(0, 8):
                        break
            self._compare(row, number, TOKENS, text, asked, is_begun=True)
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=140)
            sent = json.dumps({**body, "n": chance.randint(1, 3)}).encode()
            try:
                connection.putrequest("POST", path)
                for name, value in (("Content-Type", "application/json"), ("Authorization", f"Bearer {KEY}")):
                    connection.putheader(name, value)
                connection.putheader("Content-Length", str(len(sent)))
                connection.endheaders(sent if how == 1 else sent[: len(sent) // 2])
                time.sleep(chance.random() * 0.3)
            finally:
                connection.close()
        self._note("given up")

    def _sampled(self, chance: random.Random) -> None:
        row, number, tokens, body = self._pick(chance)
        count = chance.randint(1, 3)
        body |= {"temperature": 0.9, "top_p": 0.9, "seed": chance.randrange(1000), "n": count, "stop": ["w7", "green"]}
        asked = time.monotonic()
        with self._asked(self.material.prompts[number].path, body) as (_, answer):
            content = answer.read()
            if answer.status != 200:
                self._error(answer, content, {404, 503}, row, asked)
                return
        whole = json.loads(content)
        used = whole["usage"]["completion_tokens"]
        if sorted(one["index"] for one in whole["choices"]) != list(range(count)) or not count <= used <= count * tokens:
            self._note("wrong", f"{body}: {whole}")
        with self._lock:
            self.tokens += used
        self._note("sampled")

    def _refused(self, chance: random.Random) -> None:
        """What must not be answered."""
        _, number, _, body = self._pick(chance)
        path, key, kind = self.material.prompts[number].path, KEY, "application/json"
        at_once = {400, 404}  # an adapter that is away may be found out first
        sent: Any = body
        case = chance.choice(["json", "value", "huge", "unknown", "path", "key", "long", "type", "place", "field"])
        if case == "json":
            sent, due = json.dumps(body).encode()[: chance.randint(0, 20)], {400, 422}
        elif case == "value":
            sent, due = {**body, **chance.choice([{"max_tokens": -1}, {"temperature": "hot"}, {"n": 0}, {"top_p": 7}])}, at_once
        elif case == "huge":
            sent, due = json.dumps({**body, "user": "w" * (9 * 2**20)}).encode(), {413}
        elif case == "unknown":
            sent, due = {**body, "model": f"nobody-{chance.random()}"}, {404}
        elif case == "path":
            sent, due = {**body, "model": str(chance.choice(self.material.contents))}, {404}
        elif case == "key":
            key, due = "wrong", {401}
        elif case == "long":
            path, due = "/v1/completions", at_once
            sent = {"model": body["model"], "prompt": [5] * 100_000, "max_tokens": 5}
        elif case == "type":
            kind, due = "text/plain", {415}
        elif case == "place":
            path, due = "/v1/nothing", {404}
        else:
            sent, due = {**body, "messages": 3, "prompt": {"a": 1}}, at_once
        if self.vllm:
            due = due | {400, 404, 415, 422} | ({200} if case in ("huge", "value", "field", "type") else set())
        asked = time.monotonic()
        try:
            with self._asked(path, sent, key, kind) as (_, answer):
                self._error(answer, answer.read(), due, None, asked, f"{case}, {body['model']}")
        except (BrokenPipeError, ConnectionResetError):
            if case != "huge":
                raise
            self._note("refused before it was all sent")

    def _error(
        self, answer: Any, content: bytes, due: set[int], row: Adapter | None, asked: float, case: str = "a known prompt"
    ) -> None:
        """An answer that is none: OpenAI's shape, a status that was due, and of an adapter only while it changes."""
        text = content.decode(errors="replace")
        if self._was_down(asked):  # vLLM still tells of its engine's end, and answers before it has been told of adapters
            self._note("cut off by the kill")
            time.sleep(1)
            return
        if answer.status == 200 and 200 in due:
            self._note("answered by vLLM all the same")
            return
        problem = "" if answer.status in due else f"status {answer.status} was not due"
        try:
            error = json.loads(text)["error"]
            if not (isinstance(error["message"], str) and isinstance(error["type"], str) and {"param", "code"} <= error.keys()):
                problem = problem or "not OpenAI's shape"
            told = str(error["message"])
        except (ValueError, KeyError, TypeError):
            told = text
            if not (self.vllm and answer.status in (401, 404, 415)):  # these are Starlette's there
                problem = problem or "not OpenAI's shape"
        if str(self.material.served.parent) in told and case.partition(",")[0] != "path":
            problem = problem or "it tells a path"
        if answer.status == 503 and not answer.headers["Retry-After"]:
            problem = problem or "no Retry-After"
        if row is not None:
            possible, changing, loose = row.possible(asked, time.monotonic(), self.grace)
            is_away = answer.status == 404 and (None in possible or changing)
            is_changing = answer.status == 503 and "is being replaced" in told and changing
            is_full = answer.status == 503 and "is being replaced" not in told
            if loose or is_away or is_changing or is_full:
                problem = "" if loose or not problem.startswith("status") else problem
                self._note("refused: no room" if is_full else "refused: the adapter is away")
            else:
                problem = problem or f"{row.name} should have been there ({row.changes[-2:]})"
        else:
            self._note("refused as due")
        if problem:
            self._note("wrong", f"{case}: {problem}: {answer.status} {told[:300]}")

    def _compare(self, row: Adapter | None, number: int, tokens: int, text: str, asked: float, is_begun: bool = False) -> None:
        now = time.monotonic()
        possible, _, loose = ({None}, False, False) if row is None else row.possible(asked, now, self.grace)
        known = [self.material.answers[one][number] for one in possible if row is None or one is not None]
        if any(is_right(text, one, tokens, is_begun) for one in known):
            self._note("right, of an answer that was given up" if is_begun else "right")
        elif loose:
            self._note("of files that stood half written")
        else:
            whose = [one for one, answers in self.material.answers.items() if is_right(text, answers[number], tokens, is_begun)]
            before = set() if row is None else {one.content for one in row.changes}
            what = "an old version's" if before.intersection(whose) else "another adapter's" if whose else "nobody's"
            name = BASE if row is None else row.name
            expected = {
                str(one): self.material.answers[one][number][:tokens][-1:] for one in possible if row is None or one is not None
            }
            self._note(
                "wrong", f"{name}, prompt {number}, {tokens} tokens: {what} answer {text!r} ({whose[:5]}), expected {expected}"
            )

    # ---- changes ----

    def _change(self, every: float) -> None:
        chance = random.Random(f"{self.seed} changes")
        total = len(self.material.adapters)
        second = {number: total + number for number in range(len(self.material.contents) - total)}
        while not self._stop.wait(every):
            number = chance.choice(list(second))
            row = self.material.adapters[number]
            if row.changes[-1].end + 2 * self.settled > time.monotonic():
                continue
            before = row.changes[-1].content
            how = "come back" if before is None else chance.choice(["rename", "in place", "delete"])
            then = None if how == "delete" else chance.choice([number, second[number]]) if before is None else (
                second[number] if before == number else number
            )  # fmt: skip
            change = Change(time.monotonic(), float("inf"), then)
            row.changes.append(change)
            if then is None:
                shutil.rmtree(row.folder)
            elif how == "in place":
                change.is_loose = self._write_over(self.material.contents[then], row.folder)
            else:
                swap(self.material.contents[then], row.folder)
            change.end = time.monotonic()
            self._note(f"change: {how}")

    def _write_over(self, source: Path, folder: Path) -> bool:
        """Each file in two halves, the weights first. Whether it rested for so long that they may have been taken for whole."""
        last, longest = time.monotonic(), 0.0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            content = (source / name).read_bytes()
            with (folder / name).open("wb") as file:
                for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                    file.write(half)
                    file.flush()
                    now = time.monotonic()
                    last, longest = now, max(longest, now - last)
                    time.sleep(self.settled / 6)
        return max(longest, time.monotonic() - last) > 0.7 * self.settled


def swap(source: Path, place: Path) -> None:
    """A whole folder in the place of another, as gatewise writes folders."""
    new, old = place.parent / f".new-{place.name}", place.parent / f".old-{place.name}"
    shutil.copytree(source, new)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def is_right(text: str, answers: Sequence[str], tokens: int, is_begun: bool) -> bool:
    """Whether a text is the answer, as far as that is known; of one that was given up the beginning. Of bytes that are no whole
    character at its end, and of space around it, engines make different things."""
    mine, sure = text.strip(" \ufffd"), (answers[:tokens] or [""])[-1].strip(" \ufffd")
    if is_begun or tokens > len(answers):
        return mine.startswith(sure) or (is_begun and sure.startswith(mine))
    return mine == sure


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The objects of a stream.

    Raises:
        HTTPException: it ended without saying so.
    """
    for line in answer:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))
    raise http.client.HTTPException("the stream ended without [DONE]")


def _text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or choice.get("delta", {}).get("content") or "")


# ---- the server ----


class Server:
    """``gatewise serve`` in a process of its own, which can be killed and started again."""

    def __init__(self, options: argparse.Namespace, material: Material, root: Path) -> None:
        self._log = options.log or root / "log"
        self._temporary = root / "temporary"
        self._temporary.mkdir()
        self._is_vllm = options.engine == "vllm"
        self._command = [sys.executable, "-m", "gatewise", "serve", material.base, "--adapters", str(material.served)]
        self._command += ["--served-model-name", BASE, "--engine", options.engine, "--dtype", options.dtype]
        self._command += ["--max-loaded", str(options.max_loaded), "--max-running", str(options.max_running)]
        if self._is_vllm:
            self._command += ["--python", str(options.python)]
        else:
            self._command += ["--device", options.device, "--max-waiting", str(options.max_waiting)]
        self._rest = ["--", *options.vllm] if options.vllm else []
        self._port = 0
        self.url = ""
        self.start()

    def start(self) -> float:
        """Seconds until it serves."""
        began = time.monotonic()
        settings = {"GATEWISE_API_KEY": KEY, "TMPDIR": str(self._temporary)}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*self._command, "--port", str(self._port), *self._rest],
                env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("serving: "):
            raise SystemExit(f"the server did not start: {self.said(3000)}")
        self.url = line.split()[1].removesuffix("/v1")
        self._port = urlsplit(self.url).port or 0
        return time.monotonic() - began

    def said(self, most: int) -> str:
        return self._log.read_text(errors="replace")[-most:]

    def kill(self) -> list[str]:
        """Kills the engine by SIGKILL; what was not as it has to be then."""
        ours = _descendants(self.process.pid)
        if not self._is_vllm:
            self.process.kill()
            self.process.wait(60)
            return []
        engine = [one for one in ours if "EngineCore" in _name(one)]
        if not engine:
            return ["vLLM has no engine process"]
        os.kill(engine[0], signal.SIGKILL)
        wrong = []
        try:
            code = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            wrong.append("gatewise serve goes on without its engine")
        else:
            last = self.said(2000).strip().splitlines()[-1]
            print(f"  the engine was killed: exit code {code}; {last}", flush=True)
            if code == 0 or not last.startswith(("error: ", "Error: ")):
                wrong.append(f"after the engine's death: exit code {code}, {last!r}")
        return wrong + self._left(ours)

    def end(self) -> list[str]:
        """Ends it by an interrupt; what was not as it has to be then."""
        ours = _descendants(self.process.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return ["it does not end", *self._left(ours)]
        wrong = [] if code == 0 else [f"exit code {code} after an interrupt"]
        return wrong + self._left(ours)

    def _left(self, processes: Sequence[int]) -> list[str]:
        limit = time.monotonic() + 20
        while (left := [one for one in processes if _name(one)]) and time.monotonic() < limit:
            time.sleep(0.2)
        return [f"processes are left: {[_name(one) for one in left]}"] if left else []

    def files_left(self) -> list[str]:
        return [one.name for one in self._temporary.glob("gatewise-*")]

    def usage(self) -> dict[str, int] | None:
        """MiB, open files and threads of all its processes, where /proc tells them."""
        found = {"mib": 0, "files": 0, "threads": 0}
        if not Path("/proc/self/status").exists():
            return None
        for one in (self.process.pid, *_descendants(self.process.pid)):
            with suppress(OSError, ValueError):
                lines = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
                found["mib"] += int(lines.get("VmRSS", "0").split()[0]) // 1024
                found["threads"] += int(lines["Threads"])
                found["files"] += len(os.listdir(f"/proc/{one}/fd"))
        return found

    def gauges(self) -> dict[str, float]:
        """Sums over labels of what /metrics has; nothing while it does not answer."""
        found: Counter[str] = Counter()
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20)
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
            for line in connection.getresponse().read().decode().splitlines():
                if line and not line.startswith("#"):
                    with suppress(ValueError):
                        found[line.partition("{")[0].split()[0]] += float(line.rpartition(" ")[2])
            connection.close()
        return dict(found)


def _descendants(process: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for one in Path("/proc").glob("[0-9]*/stat") if Path("/proc").is_dir() else ():
        with suppress(OSError, ValueError, IndexError):
            parents.setdefault(int(one.read_text().rpartition(")")[2].split()[1]), []).append(int(one.parent.name))
    found = list(parents.get(process, ()))
    for one in found:
        found += parents.get(one, ())
    return found


def _name(process: int) -> str:
    """What a process calls itself; nothing of one that has ended."""
    with suppress(OSError):
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
    return ""


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """The 50th, 95th and 99th percentile, in seconds."""
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: round(cuts[place], 4) for name, place in (("p50", 49), ("p95", 94), ("p99", 98))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of an environment that has vLLM")
    parser.add_argument("--base", default=MODEL)
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama instead of --base")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--max-loaded", type=int, default=24)
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--max-waiting", type=int, default=48, help="of the engine transformers")
    parser.add_argument("--changes", type=float, default=2.0, help="seconds between two changes of adapters")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=tuple(CLOSE), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-kill", action="store_true", help="let the engine live")
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl")
    parser.add_argument("vllm", nargs="*", help="after --: more arguments for vLLM")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process, and its children, would ignore it
    with tempfile.TemporaryDirectory(prefix="gatewise-soak-") as place:
        run = soak(options, Path(place))
    append(run, options.results)
    print(json.dumps(run, indent=1))
    if run["wrong"] or run["problems"]:
        raise SystemExit("not all was right")


def soak(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One run."""
    began = time.monotonic()
    base = str(tiny_base(root / "base")) if options.tiny else options.base
    material = make(root, base, options.adapters, options.seed, options.device, options.dtype)
    print(f"{len(material.contents)} adapters made in {time.monotonic() - began:.0f} s; {material.distinct:.0%} of answers differ")
    server = Server(options, material, root)
    is_vllm = options.engine == "vllm"
    load = Soak(server.url, material, seed=options.seed, grace=20.0, vllm=is_vllm)
    problems: list[str] = []
    samples: list[tuple[float, dict[str, int]]] = []
    began, restart = time.monotonic(), None
    load.start(options.clients, options.changes)
    try:
        tick = 0
        while (now := time.monotonic() - began) < options.seconds:
            time.sleep(min(10.0, max(0.1, options.seconds - now)))
            tick += 1
            if not options.no_kill and restart is None and time.monotonic() - began > options.seconds / 3:
                load.down.append([time.monotonic(), float("inf")])
                problems += server.kill()
                restart = server.start()
                load.down[-1][1] = time.monotonic() + 1
                began += load.down[-1][1] - load.down[-1][0]  # nobody is served meanwhile
                print(f"  killed, and serving again after {restart:.1f} s", flush=True)
                samples.clear()
            if server.process.poll() is not None:
                problems.append(f"the server ended: {server.said(500)}")
                break
            usage, gauges = server.usage(), server.gauges()
            if usage is not None:
                samples.append((time.monotonic() - began, usage))
            loaded = gauges.get("gatewise_adapters_loaded", 0)
            if loaded > options.max_loaded:
                problems.append(f"{loaded} adapters are loaded")
            print(
                f"{time.monotonic() - began:5.0f} s  {load.tokens} tokens  {dict(load.done)}  {usage}  loaded {loaded:.0f}",
                flush=True,
            )
        seconds = time.monotonic() - began
    finally:
        load.end()
        idle = _idle(server, is_vllm)
        usage = server.usage()
        ended = server.end()
    problems += idle + ended
    files = server.files_left()
    if len(files) > int(not is_vllm and restart is not None):  # a killed process may leave a copy behind: there is one at a time
        problems.append(f"files are left: {files}")
    leaks = grown(samples, usage)
    problems += leaks or []
    return {
        "engine": options.engine, "base": "tiny" if options.tiny else options.base, "dtype": options.dtype, "seed": options.seed,
        "clients": options.clients, "adapters": options.adapters, "max_loaded": options.max_loaded, "seconds": round(seconds),
        "machine": {**machine(), **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})},
        "counts": dict(load.done), "statuses": {str(one): count for one, count in load.statuses.items()},
        "wrong": len(load.wrong), "wrong_answers": load.wrong[:20], "problems": problems, "growth_measured": leaks is not None,
        "answers_differ": round(material.distinct, 3), "restart_seconds": restart and round(restart, 1),
        "first_token": quantiles(load.first), "per_token": quantiles(load.each), 
        "tokens_per_second": round(load.tokens / seconds, 1),
        "usage": [{"second": round(second), **one} for second, one in samples], "usage_idle": usage,
    }  # fmt: skip


def _idle(server: Server, is_vllm: bool) -> list[str]:
    """What is not given back within half a minute after the last request."""
    names = ("gatewise_running", "gatewise_waiting") if not is_vllm else ("vllm:num_requests_running", "vllm:num_requests_waiting")
    limit = time.monotonic() + 30
    while (gauges := server.gauges()) and any(gauges.get(name, 0) for name in names) and time.monotonic() < limit:
        time.sleep(0.2)
    left = {name: gauges[name] for name in (*names, "vllm:kv_cache_usage_perc") if gauges.get(name)}
    wrong = [f"idle, but {left}"] if left else []
    return wrong if gauges else [*wrong, "/metrics does not answer at the end"]


def grown(samples: Sequence[tuple[float, dict[str, int]]], idle: dict[str, int] | None) -> list[str] | None:
    """What grew after a warm-up, the first half of the time since the last start, to the end; None where that is too short."""
    if len(samples) < 8 or idle is None:
        return None
    half = [one for _, one in samples[len(samples) // 2 :]]
    before, after = half[: len(half) // 2], half[len(half) // 2 :]
    first, last = (statistics.median(one["mib"] for one in rows) for rows in (before, after))
    wrong = [f"memory grew from {first:.0f} to {last:.0f} MiB"] if last > 1.1 * first + 32 else []
    for name in ("files", "threads"):
        most = max(one[name] for one in before)
        if idle[name] > most:
            wrong.append(f"{name} grew from {most} to {idle[name]}, with no client left")
    return wrong


if __name__ == "__main__":
    main()
