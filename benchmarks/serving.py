"""A soak of `gatewise serve`: many clients over more adapters than are loaded at a time, whose files change meanwhile.

Adapters with random weights (plain LoRA of several ranks, rank-stabilised, routed) are written to a temporary folder, and what each
writes alone, greedily, is noted before the server starts. Then clients send random work: completions and chats, streamed and whole,
some given up in the middle, and what has to be refused. A fifth of the adapters change: folders swapped by renaming, files written
over in place, folders deleted that come back. After a third of the time the engine is killed, and the server started again.

An answer of a known prompt is right if it is that of a version that the adapter had while it was asked; any other is counted as
wrong, and told. Tokens are compared up to the first one where the reference's two best are so close that rounding decides. Every
error has to have OpenAI's shape and the status that was due. At the end everything has to have been given back.

    python benchmarks/serving.py                                     # SmolLM2-135M, 64 clients, 100 adapters, 300 seconds
    python benchmarks/serving.py --engine vllm --python .venv-serve/bin/python
    python benchmarks/serving.py --tiny --seconds 60                 # a tiny random Llama

With vLLM on processors set VLLM_CPU_KVCACHE_SPACE (GiB) and OMP_NUM_THREADS.
"""

import argparse
import json
import math
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from campaign import RESULTS, append, machine
from peft import LoraConfig, get_peft_model

from gatewise import RoutedLoraConfig
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import pick_device

BASE, KEY = "base", "soak-key"
TOKENS = 16  # of a known answer, at most
CLOSE = {"float32": 0.02, "bfloat16": 0.5}  # logits that rounding may swap
WORDS = ["river", "stone", "window", "green", "seven", "letter", "quiet", "machine", "garden", "under", "paper"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}paper"
KINDS: list[Any] = [
    LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, r=4, target_modules="all-linear"),
    RoutedLoraConfig(task_type="CAUSAL_LM", lora_alpha=16, r=4),
    LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, r=8, target_modules="all-linear", use_rslora=True),
    LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, r=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    RoutedLoraConfig(task_type="CAUSAL_LM", lora_alpha=16, r=8, top_k=2),
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
    is_loose: bool = False  # the files of two contents lay together for so long that they may have been taken for one


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
        pairs = [
            pair
            for a in self.answers
            for b in self.answers
            if a != b
            for pair in zip(self.answers[a], self.answers[b], strict=True)
        ]
        return statistics.mean(bool(both := min(map(len, pair))) and pair[0][both - 1] != pair[1][both - 1] for pair in pairs)


def tiny_base(folder: Path) -> Path:
    """A random Llama with weights as large as trained ones, which knows few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = ["<pad>", "<eos>", "user", *WORDS, *(f"w{number}" for number in range(114))]
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
    model: Any = load_model(base, dtype=getattr(torch, dtype), device=pick_device(device))
    model.generation_config.eos_token_id = None  # requests go on after it, too
    tokenizer = load_tokenizer(base)
    chance = random.Random(seed)
    prompts = [_prompt(tokenizer, chance, number) for number in range(6)]
    answers: dict[int | None, list[list[str]]] = {None: _answers(model, tokenizer, prompts, CLOSE[dtype])}
    contents = [root / "contents" / str(number) for number in range(adapters + max(1, adapters // 5))]
    for kind, config in enumerate(KINDS):
        with_adapter = get_peft_model(model, config).eval()
        for number in range(kind, len(contents), len(KINDS)):
            torch.manual_seed(1000 * seed + number)
            _randomise(with_adapter)
            with_adapter.save_pretrained(contents[number], save_embedding_layers=False)
            answers[number] = _answers(with_adapter, tokenizer, prompts, CLOSE[dtype])
        model = with_adapter.unload()
    served = root / "served"
    rows = [Adapter(f"adapter-{number}", served / f"adapter-{number}", [Change(-1e9, -1e9, number)]) for number in range(adapters)]
    for row, content in zip(rows, contents, strict=False):
        shutil.copytree(content, row.folder)
    return Material(base, served, contents, rows, prompts, answers)


def _prompt(tokenizer: Any, chance: random.Random, number: int) -> Known:
    """Two as text, two as token ids, two as chats."""
    text = " ".join(chance.choices(WORDS, k=chance.randint(3, 24)))
    if number % 3 == 2:
        messages = [{"role": "user", "content": text}]
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
        elif ".prompt_router." in name and not name.endswith(("numerator", "denominator")):
            if name.endswith("center"):
                value.normal_(std=0.3)
            elif name.endswith(("spread", "observed")):
                value.fill_(0.8 if name.endswith("spread") else 70.0)
            else:
                value.normal_(std=1.0 if value.ndim < 2 else 2 * value.shape[-1] ** -0.5)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: Sequence[Known], close: float) -> list[list[str]]:
    """After each prompt the text of one token, of two, and so on, as far as no rounding decides."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    found = []
    for prompt in prompts:
        given = torch.tensor([prompt.ids], device=model.device)
        written = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        best = torch.cat(written.logits).float().topk(2).values
        sure = [*(best[:, 0] - best[:, 1] < close).tolist(), True].index(True)
        ids = written.sequences[0, len(prompt.ids) :].tolist()
        found.append([text(prompt.ids + ids[: count + 1])[len(text(prompt.ids)) :] for count in range(sure)])
    return found


def is_right(text: str, answers: Sequence[str], tokens: int, is_begun: bool) -> bool:
    """Whether a text is the answer, as far as that is known; of one that was given up the beginning. Of bytes that are no whole
    character at its end, and of space around it, engines make different things."""
    mine, sure = text.strip(" \ufffd"), (answers[:tokens] or [""])[-1].strip(" \ufffd")
    if is_begun or tokens > len(answers):
        return mine.startswith(sure) or (is_begun and sure.startswith(mine))
    return mine == sure


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
        self.material, self.grace, self.settled, self.vllm, self.seed = material, grace, settled, vllm, seed
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tokens = 0
        self.down = (math.inf, math.inf)  # from when to when the server was away
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=140, limits=limits)
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
        self._http.close()

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
            except httpx2.HTTPError as error:
                if not self._was_down(asked):
                    self._note("wrong", f"{work.__name__}: {type(error).__name__}: {error}")
            if self._was_down(asked):
                self._note("cut off by the kill")
                time.sleep(1)

    def _was_down(self, asked: float) -> bool:
        """Whether the server was away at any time since."""
        return self.down[0] <= time.monotonic() and asked <= self.down[1]

    def _pick(self, chance: random.Random) -> tuple[Adapter | None, int, int, dict[str, Any]]:
        """A model (None: the base model), a known prompt, tokens of its answer, and the request."""
        row = None if chance.random() < 0.1 else chance.choice(self.material.adapters)
        number = chance.randrange(len(self.material.prompts))
        tokens = chance.randint(1, TOKENS)
        body = {"model": BASE if row is None else row.name, "max_tokens": tokens, **self.material.prompts[number].body}
        return row, number, tokens, body

    def _whole(self, body: dict[str, Any], row: Adapter | None, number: int) -> dict[str, Any] | None:
        """An answer that is not streamed; None where it is an error."""
        asked = time.monotonic()
        answer = self._http.post(self.material.prompts[number].path, json=body)
        if answer.status_code != 200:
            self._error(answer, {404, 503}, row, asked)
            return None
        with self._lock:
            self.tokens += answer.json()["usage"]["completion_tokens"]
        return dict(answer.json())

    def _known(self, chance: random.Random) -> None:
        row, number, tokens, body = self._pick(chance)
        body |= {"temperature": 0, "ignore_eos": True}
        asked = time.monotonic()
        if chance.random() < 0.5:
            self._stream(body, row, number, tokens, most=None)
        elif whole := self._whole(body, row, number):
            self._compare(row, number, tokens, _text_of(whole["choices"][0]), asked)

    def _stream(self, body: dict[str, Any], row: Adapter | None, number: int, tokens: int, most: int | None) -> None:
        """Reads a stream to its end, or so many events of it, and compares what it read."""
        asked, used, text = time.monotonic(), 0, ""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._http.stream("POST", self.material.prompts[number].path, json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                self._error(answer, {404, 503}, row, asked)
                return
            for count, event in enumerate(_events(answer)):
                text += "".join(map(_text_of, event["choices"]))
                used = (event.get("usage") or {}).get("completion_tokens", used)
                if count == most:
                    break
        self._compare(row, number, tokens, text, asked, is_begun=most is not None)
        with self._lock:
            self.tokens += used

    def _given_up(self, chance: random.Random) -> None:
        """Reads a few events and goes, or goes before the answer is there."""
        row, number, _, body = self._pick(chance)
        body |= {"temperature": 0, "ignore_eos": True, "max_tokens": 100}
        if chance.random() < 0.5:
            self._stream(body, row, number, TOKENS, most=chance.randint(0, 8))
        else:
            with suppress(httpx2.TimeoutException):
                self._http.post(self.material.prompts[number].path, json={**body, "n": 2}, timeout=chance.uniform(0.01, 0.3))
        self._note("given up")

    def _sampled(self, chance: random.Random) -> None:
        row, number, tokens, body = self._pick(chance)
        count = chance.randint(1, 3)
        body |= {"temperature": 0.9, "top_p": 0.9, "seed": chance.randrange(1000), "n": count, "stop": ["w7", "green"]}
        if whole := self._whole(body, row, number):
            used = whole["usage"]["completion_tokens"]
            if sorted(one["index"] for one in whole["choices"]) != list(range(count)) or not count <= used <= count * tokens:
                self._note("wrong", f"{body}: {whole}")
            self._note("sampled")

    def _refused(self, chance: random.Random) -> None:
        """What must not be answered."""
        _, number, _, body = self._pick(chance)
        asked, path = time.monotonic(), self.material.prompts[number].path
        what, sent, due = chance.choice([
            ("json", json.dumps(body)[: chance.randint(0, 20)], {400, 422}),
            ("value", body | chance.choice([{"max_tokens": -1}, {"temperature": "hot"}, {"n": 0}]), {400, 404}),
            ("field", body | {"messages": 3, "prompt": {"a": 1}}, {400, 404}),  # an adapter that is away may be found out first
            ("long", body | {"messages" if "messages" in body else "prompt": body.get("messages", [5] * 100) * 1000}, {400, 404}),
            ("model", body | {"model": f"nobody-{chance.random()}"}, {404}),
            ("path", body | {"model": str(chance.choice(self.material.contents))}, {404}),
            ("key", body, {401}),
        ])  # fmt: skip
        if self.vllm:
            due |= {400, 404, 422} | ({200} if what in ("value", "field") else set())
        headers = {"Content-Type": "application/json"} | ({"Authorization": "Bearer wrong"} if what == "key" else {})
        answer = self._http.post(path, content=sent if isinstance(sent, str) else json.dumps(sent), headers=headers)
        self._error(answer, due, None, asked, f"{what}, {body['model']}")

    def _error(
        self, answer: httpx2.Response, due: set[int], row: Adapter | None, asked: float, case: str = "a known prompt"
    ) -> None:
        """An answer that is none: OpenAI's shape, a status that was due, and of an adapter only while it changes."""
        status, problems = answer.status_code, []
        if self._was_down(asked):  # vLLM still tells of its engine's end, and answers before it has been told of adapters
            return
        if status == 200 and 200 in due:
            self._note("answered by vLLM all the same")
            return
        try:
            told = str(answer.json()["error"]["message"])
            if not {"type", "param", "code"} <= answer.json()["error"].keys():
                problems.append("not OpenAI's shape")
        except (ValueError, KeyError, TypeError):
            told = answer.text
            if not (self.vllm and status in (401, 404)):  # these are Starlette's there
                problems.append("not OpenAI's shape")
        if str(self.material.served.parent) in told and not case.startswith("path"):
            problems.append("it tells a path")
        if status == 503 and "Retry-After" not in answer.headers:
            problems.append("no Retry-After")
        possible, changing, loose = row.possible(asked, time.monotonic(), self.grace) if row else (set(), False, False)
        if not loose and status not in due:
            problems.append("this status was not due")
        if row is None:
            self._note("refused as due")
        elif status == 503 and "is being replaced" not in told:
            self._note("refused: no room")
        elif changing or loose or (status == 404 and None in possible):
            self._note("refused: the adapter is away")
        else:
            problems.append(f"{row.name} should have been there ({row.changes[-2:]})")
        if problems:
            self._note("wrong", f"{case}: {', '.join(problems)}: {status} {told[:300]}")

    def _compare(self, row: Adapter | None, number: int, tokens: int, text: str, asked: float, is_begun: bool = False) -> None:
        """Counts an answer as right where it is that of a content that the adapter may have had."""
        possible, _, loose = row.possible(asked, time.monotonic(), self.grace) if row else ({None}, False, False)
        mine = [one for one in possible if row is None or one is not None]
        whose = [one for one, answers in self.material.answers.items() if is_right(text, answers[number], tokens, is_begun)]
        if set(mine) & set(whose):
            self._note("right, of an answer that was given up" if is_begun else "right")
        elif loose:
            self._note("of files of two contents")
        else:
            expected = {one: self.material.answers[one][number][:tokens][-1:] for one in mine}
            name = row.name if row else BASE
            self._note(
                "wrong", f"{name}, prompt {number}, {tokens} tokens: {text!r} (of contents {whose[:5]}), expected {expected}"
            )

    def _change(self, every: float) -> None:
        """Changes adapters, as long as clients ask."""
        chance = random.Random(f"{self.seed} changes")
        total = len(self.material.adapters)
        while not self._stop.wait(every):
            number = chance.randrange(len(self.material.contents) - total)
            row = self.material.adapters[number]
            if row.changes[-1].end + 2 * self.settled > time.monotonic():
                continue
            before = row.changes[-1].content
            how = "come back" if before is None else chance.choice(["rename", "in place", "delete"])
            then = None if how == "delete" else total + number if before == number else number
            change = Change(time.monotonic(), math.inf, then)
            row.changes.append(change)
            if then is None:
                shutil.rmtree(row.folder)
            elif how == "in place":
                for name in ("adapter_model.safetensors", "adapter_config.json"):
                    shutil.copyfile(self.material.contents[then] / name, row.folder / name)
                    time.sleep(self.settled / 6)
                change.is_loose = time.monotonic() - change.begin > 0.7 * self.settled
            else:
                swap(self.material.contents[then], row.folder)
            change.end = time.monotonic()
            self._note(f"change: {how}")


def swap(source: Path, place: Path) -> None:
    """A whole folder in the place of another, as gatewise writes folders."""
    new, old = place.parent / f".new-{place.name}", place.parent / f".old-{place.name}"
    shutil.copytree(source, new)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _events(answer: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The objects of a stream.

    Raises:
        RemoteProtocolError: it told of an error, or ended without saying so.
    """
    for line in answer.iter_lines():
        if line.startswith("data: [DONE]"):
            return
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise httpx2.RemoteProtocolError(str(event["error"]))
            yield event
    raise httpx2.RemoteProtocolError("the stream ended without [DONE]")


def _text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or "")


# ---- the server ----


class Server:
    """``gatewise serve`` in a process of its own, which can be killed and started again."""

    def __init__(self, options: argparse.Namespace, material: Material, root: Path) -> None:
        self._log = root / "log"
        self.temporary = root / "temporary"
        self.temporary.mkdir()
        self._is_vllm = options.engine == "vllm"
        self._command = [sys.executable, "-m", "gatewise", "serve", material.base, "--adapters", str(material.served)]
        self._command += ["--served-model-name", BASE, "--engine", options.engine, "--dtype", options.dtype]
        self._command += ["--max-loaded", str(options.max_loaded), "--max-running", "32"]
        if self._is_vllm:
            self._command += ["--python", str(options.python)]
        else:
            self._command += ["--device", options.device, "--max-waiting", "48"]
        self._rest = ["--", *options.vllm] if options.vllm else []
        self._port = "0"
        self.start()

    def start(self) -> float:
        """Seconds until it serves."""
        began = time.monotonic()
        settings = {"GATEWISE_API_KEY": KEY, "TMPDIR": str(self.temporary)}
        with self._log.open("a") as log:
            self.process = psutil.Popen(
                [*self._command, "--port", self._port, *self._rest],
                env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        line = self.process.stdout.readline()
        if not line.startswith("serving: "):
            raise SystemExit(f"the server did not start: {self.last_words(3000)}")
        self.url = line.split()[1].removesuffix("/v1")
        self._port = self.url.rpartition(":")[2]
        return time.monotonic() - began

    def last_words(self, most: int) -> str:
        return self._log.read_text(errors="replace")[-most:]

    def kill(self) -> list[str]:
        """Kills the engine by SIGKILL; what was not as it has to be then."""
        if not self._is_vllm:
            self.process.kill()
            self.process.wait(60)
            return []
        ours = self.process.children(recursive=True)
        next(one for one in ours if "EngineCore" in " ".join(one.cmdline())).kill()
        wrong = self._ended(ours, 120)
        last = self.last_words(2000).strip().splitlines()[-1]
        if self.process.returncode == 0 or not last.startswith(("error: ", "Error: ")):
            wrong.append(f"after the engine's death: exit code {self.process.returncode}, {last!r}")
        return wrong

    def end(self) -> list[str]:
        """Ends it by an interrupt; what was not as it has to be then."""
        if self.process.poll() is not None:
            return [f"the server ended: {self.last_words(500)}"]
        ours = self.process.children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        wrong = self._ended(ours, 60)
        return wrong if self.process.returncode == 0 else [*wrong, f"exit code {self.process.returncode} after an interrupt"]

    def _ended(self, children: list[psutil.Process], patience: float) -> list[str]:
        """Waits for the server and its children; what does not end."""
        try:
            self.process.wait(patience)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            self.process.kill()
            return ["it does not end"]
        left = psutil.wait_procs(children, timeout=20)[1]
        return [f"processes are left: {left}"] if left else []

    def usage(self) -> dict[str, int]:
        """MiB, open files and threads of all its processes."""
        found: Counter[str] = Counter(mib=0, files=0, threads=0)
        with suppress(psutil.Error):
            for one in (self.process, *self.process.children(recursive=True)):
                found.update(mib=one.memory_info().rss // 2**20, files=one.num_fds(), threads=one.num_threads())
        return dict(found)

    def gauges(self) -> dict[str, float]:
        """Sums over labels of what /metrics has; nothing while it does not answer."""
        found: Counter[str] = Counter()
        with suppress(httpx2.HTTPError):
            answer = httpx2.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, timeout=20)
            for line in answer.text.splitlines():
                if not line.startswith("#"):
                    found[line.partition("{")[0].split()[0]] += float(line.rpartition(" ")[2])
        return dict(found)


# ---- a run ----


def soak(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One run."""
    base = str(tiny_base(root / "base")) if options.tiny else options.base
    material = make(root, base, options.adapters, options.seed, options.device, options.dtype)
    print(f"{len(material.contents)} adapters made; {material.distinct:.0%} of answers differ")
    server = Server(options, material, root)
    is_vllm = options.engine == "vllm"
    load = Soak(server.url, material, seed=options.seed, grace=20.0, vllm=is_vllm)
    problems: list[str] = []
    samples: list[dict[str, int]] = []
    began, restart = time.monotonic(), None
    load.start(options.clients, options.changes)
    try:
        while (now := time.monotonic() - began) < options.seconds and server.process.poll() is None:
            time.sleep(min(10.0, max(0.1, options.seconds - now)))
            if restart is None and now > options.seconds / 3:
                load.down = (time.monotonic(), math.inf)
                problems += server.kill()
                restart = server.start()
                load.down = (load.down[0], time.monotonic() + 1)
                began += load.down[1] - load.down[0]  # nobody is served meanwhile
                samples.clear()
            samples.append({"second": round(time.monotonic() - began), **server.usage()})
            loaded = server.gauges().get("gatewise_adapters_loaded", 0)
            if loaded > options.max_loaded:
                problems.append(f"{loaded} adapters are loaded")
            print(f"{load.tokens} tokens  {dict(load.done)}  {samples[-1]}  loaded {loaded:.0f}", flush=True)
        seconds = time.monotonic() - began
    finally:
        load.end()
        problems += _not_idle(server, is_vllm)
        usage = server.usage()
        problems += server.end()
    files = [one.name for one in server.temporary.glob("gatewise-*")]
    if len(files) > int(not is_vllm and restart is not None):  # a killed process may leave a copy behind: there is one at a time
        problems.append(f"files are left: {files}")
    return {
        "engine": options.engine, "base": "tiny" if options.tiny else options.base, "dtype": options.dtype, "seed": options.seed,
        "clients": options.clients, "adapters": options.adapters, "max_loaded": options.max_loaded, "seconds": round(seconds),
        "machine": {**machine(), **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})},
        "counts": dict(load.done),
        "wrong": len(load.wrong), "wrong_answers": load.wrong[:20], "problems": problems + growth(samples, usage),
        "growth_measured": len(samples) >= 8, "answers_differ": round(material.distinct, 3),
        "restart_seconds": restart and round(restart, 1),
        "tokens_per_second": round(load.tokens / seconds, 1), "usage": samples, "usage_idle": usage,
    }  # fmt: skip


def _not_idle(server: Server, is_vllm: bool) -> list[str]:
    """What is not given back within half a minute after the last request."""
    names = ("gatewise_running", "gatewise_waiting")
    if is_vllm:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    limit = time.monotonic() + 30
    while (left := server.gauges()) and any(left.get(name) for name in names) and time.monotonic() < limit:
        time.sleep(0.2)
    busy = {name: left[name] for name in names if left.get(name)}
    return [f"idle, but {busy}"] if busy else [] if left else ["/metrics does not answer at the end"]


def growth(samples: Sequence[dict[str, int]], idle: dict[str, int]) -> list[str]:
    """What grew after a warm-up, the first half of the time since the last start, to the end; nothing where that is too short."""
    if len(samples) < 8:
        return []
    half = samples[len(samples) // 2 :]
    before, after = half[: len(half) // 2], half[len(half) // 2 :]
    first, last = (statistics.median(one["mib"] for one in rows) for rows in (before, after))
    wrong = [f"memory grew from {first:.0f} to {last:.0f} MiB"] if last > 1.1 * first + 32 else []
    for name in ("files", "threads"):
        most = max(one[name] for one in before)
        if idle[name] > most:
            wrong.append(f"{name} grew from {most} to {idle[name]}, with no client left")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of an environment that has vLLM")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama instead of --base")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--max-loaded", type=int, default=24)
    parser.add_argument("--changes", type=float, default=2.0, help="seconds between two changes of adapters")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=tuple(CLOSE), default="float32")
    parser.add_argument("--seed", type=int, default=0)
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


if __name__ == "__main__":
    main()
