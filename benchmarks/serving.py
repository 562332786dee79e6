"""A soak of `gatewise serve`: many clients over more adapters than are loaded at a time, whose files change meanwhile.

Adapters with random weights (plain LoRA of several ranks, rank-stabilised, routed) are written to a temporary folder, and what each
writes alone, greedily, is noted before the server starts. Then clients send random work: completions and chats, streamed and whole,
some given up in the middle, and what has to be refused. A fifth of the adapters change: folders swapped by renaming, files written
over in place, folders deleted that come back. After a third of the time the engine is killed, and the server started again.

Right is an answer of a known prompt if it is that of a version that the adapter had while it was asked; any other is counted as
wrong, and told. Texts are compared up to the first token where the reference's two best are so close that rounding decides. At the
end everything has to have been given back.

    python benchmarks/serving.py                                     # SmolLM2-135M, 64 clients, 100 adapters, 300 seconds
    python benchmarks/serving.py --engine vllm --python .venv-serve/bin/python

With vLLM on processors set VLLM_CPU_KVCACHE_SPACE (GiB) and OMP_NUM_THREADS.
"""

import argparse
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
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import torch
from campaign import RESULTS, append
from peft import LoraConfig, get_peft_model

from gatewise import RoutedLoraConfig
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import machine

BASE, KEY = "base", "soak-key"
TOKENS = 16  # of a known answer, at most
CLOSE = 0.02  # logits that rounding may swap
MOST_LOADED = 24
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"r": 4}),
    ("routed", {"r": 4}),
    ("plain", {"r": 8, "use_rslora": True}),
    ("plain", {"r": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("routed", {"r": 8, "top_k": 2}),
    ("plain", {"r": 2, "target_modules": ["o_proj", "up_proj"]}),
]

# ---- what is served, and what is right ----


@dataclass
class Adapter:
    """``changes``: from when to when one content took the place of another; None is no folder."""

    name: str
    folder: Path
    changes: list[tuple[float, float, int | None]]

    def possible(self, asked: float, grace: float) -> set[int | None]:
        """The contents that may have answered, until now, what was asked then. Old ones answer for a while."""
        later = [change[1] for change in self.changes[1:]] + [float("inf")]
        return {content for (_, _, content), end in zip(self.changes, later, strict=True) if end + grace >= asked}


@dataclass
class Material:
    """Adapters, bodies of requests, and what each content writes: answers[content][prompt][tokens - 1], base model under None."""

    base: str
    served: Path
    contents: list[Path]
    adapters: list[Adapter]
    prompts: list[dict[str, Any]]
    answers: dict[int | None, list[list[str]]]

    @property
    def distinct(self) -> float:
        """The share of pairs of contents and prompts whose answers differ, as far as both are known."""
        pairs = [(a, b) for one in self.answers for other in self.answers if one != other
                 for a, b in zip(self.answers[one], self.answers[other], strict=True)]  # fmt: skip
        return statistics.mean(a[: len(b)][-1:] != b[: len(a)][-1:] for a, b in pairs)


def make(root: Path, base: str, adapters: int, seed: int = 0) -> Material:
    """Writes adapters, a fifth of which have a second content of the same kind, and notes what each content writes alone."""
    chance = random.Random(seed)
    model: Any = load_model(base, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # requests go on after it, too
    tokenizer = load_tokenizer(base)
    texts = [" ".join(f"w{chance.randint(2, 50)}" for _ in range(chance.randint(3, 24))) for _ in range(6)]
    prompts: list[dict[str, Any]] = [{"prompt": text} for text in texts[:2]]
    prompts += [{"prompt": tokenizer(text)["input_ids"]} for text in texts[2:4]]
    prompts += [{"messages": [{"role": "w1", "content": text}]} for text in texts[4:]]
    answers: dict[int | None, list[list[str]]] = {None: _answers(model, tokenizer, prompts)}
    contents = [root / "contents" / str(number) for number in range(adapters + max(1, adapters // 5))]
    for kind, (family, settings) in enumerate(KINDS):
        config: Any = RoutedLoraConfig if family == "routed" else LoraConfig
        common = {"target_modules": "all-linear"} if family == "plain" else {}
        adapted = get_peft_model(model, config(task_type="CAUSAL_LM", lora_alpha=16, **(common | settings))).eval()
        for number in range(len(contents)):
            if number % adapters % len(KINDS) == kind:
                torch.manual_seed(1000 * seed + number)
                _randomise(adapted)
                adapted.save_pretrained(contents[number], save_embedding_layers=False)
                answers[number] = _answers(adapted, tokenizer, prompts)
        model = adapted.unload()
    served = root / "served"
    rows = []
    for number in range(adapters):
        folder = Path(shutil.copytree(contents[number], served / f"adapter-{number}"))
        rows.append(Adapter(folder.name, folder, [(0.0, 0.0, number)]))
    return Material(base, served, contents, rows, prompts, answers)


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Updates as large as a good part of the weights, and routers that tell prompts apart."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "lora_A" in name:
            value.normal_(std=value.shape[1] ** -0.5)
        elif "lora_B" in name:
            value.normal_(std=0.1)
        elif ".prompt_router." in name and name.endswith("center"):
            value.copy_(0.3 * torch.randn_like(value))
        elif ".prompt_router." in name and name.endswith(("spread", "observed")):
            value.fill_(0.8 if name.endswith("spread") else 70.0)
        elif ".prompt_router." in name and not name.endswith(("numerator", "denominator")):
            value.normal_(std=1.0 if value.ndim < 2 else 2 * value.shape[-1] ** -0.5)


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """After each prompt the text of one token, of two, and so on, as far as no rounding decides."""
    found = []
    for prompt in prompts:
        given = prompt.get("prompt")
        if given is None:
            given = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
            given = tokenizer(given, add_special_tokens=False)["input_ids"]
        ids = tokenizer(given)["input_ids"] if isinstance(given, str) else given
        written = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=TOKENS, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
        best = torch.cat(written.logits).float().topk(2).values
        doubts = [*(best[:, 0] - best[:, 1] < CLOSE).tolist(), True]
        all_ids = written.sequences[0].tolist()
        texts = [
            tokenizer.decode(all_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for end in range(len(ids), len(ids) + doubts.index(True) + 1)
        ]
        found.append([text[len(texts[0]) :] for text in texts[1:]])
    return found


def is_right(text: str, answers: Sequence[str], tokens: int) -> bool:
    """Whether a text is the answer, as far as that is known. Of bytes that are no whole character at its end, and of space around
    it, engines make different things."""
    mine, sure = text.strip(" \ufffd"), (answers[:tokens] or [""])[-1].strip(" \ufffd")
    return mine.startswith(sure) if tokens > len(answers) else mine == sure


# ---- clients ----


class Soak:
    """Clients of a server, changes of its adapters, and what they found.

    Args:
        url: of the server.
        grace: seconds after a change in which the old content may still answer.
        settled: seconds for which the server leaves files alone that change.
        vllm: whether errors are vLLM's own, which has other statuses for some of them.
    """

    def __init__(
        self, url: str, material: Material, *, seed: int = 0, grace: float = 15.0, settled: float = 2.0, vllm: bool = False
    ) -> None:
        self.url, self.material, self.seed, self.grace, self.settled, self.vllm = url, material, seed, grace, settled, vllm
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tokens = 0
        self.down = (float("inf"), float("inf"))  # from when to when the server was away
        self._lock, self._stop, self._threads = threading.Lock(), threading.Event(), list[threading.Thread]()

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

    def _note(self, what: str, wrong: str = "", tokens: int = 0) -> None:
        with self._lock:
            self.done[what] += 1
            self.tokens += tokens
            self.wrong += [wrong] if what == "wrong" else []

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        works = {self._known: 66, self._given_up: 14, self._refused: 20}
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=140) as client:
            while not self._stop.is_set():
                row = None if chance.random() < 0.1 else chance.choice(self.material.adapters)
                asked, [work] = time.monotonic(), chance.choices([*works], [*works.values()])
                try:
                    work(client, chance, row)
                except Exception as error:
                    if self.down[0] <= time.monotonic() and asked <= self.down[1]:
                        self._note("cut off by the kill")
                        time.sleep(1)
                    else:
                        self._judge(error, row, asked)

    def _ask(self, client: openai.OpenAI, number: int, row: Adapter | None, **more: Any) -> Any:
        create: Callable[..., Any] = client.completions.create
        if "messages" in self.material.prompts[number]:
            create = client.chat.completions.create
        return create(model=BASE if row is None else row.name, **self.material.prompts[number], **more)

    def _known(self, client: openai.OpenAI, chance: random.Random, row: Adapter | None) -> None:
        number, tokens = chance.randrange(len(self.material.prompts)), chance.randint(1, TOKENS)
        stream, asked, text = chance.random() < 0.5, time.monotonic(), ""
        more = {"temperature": 0, "max_tokens": tokens, "extra_body": {"ignore_eos": True}}
        answer = self._ask(client, number, row, stream=stream, **more)
        for event in answer if stream else [answer]:
            for choice in event.choices:
                content = getattr(choice, "delta" if stream else "message", None)
                text += (choice.text if content is None else content.content) or ""
        contents = {None} if row is None else row.possible(asked, self.grace) - {None}
        known = {one: self.material.answers[one][number] for one in contents}
        if any(is_right(text, one, tokens) for one in known.values()):
            self._note("right", tokens=tokens)
        else:
            self._note("wrong", f"{row and row.name}, prompt {number}, {tokens} tokens: {text!r}, expected one of {known}")

    def _given_up(self, client: openai.OpenAI, chance: random.Random, row: Adapter | None) -> None:
        """Reads the first event and goes, or goes before the answer is there."""
        if chance.random() < 0.3:
            answer = self._ask(client, 0, row, max_tokens=100, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with suppress(openai.APITimeoutError):
                self._ask(client.with_options(timeout=0.05 + 0.3 * chance.random()), 0, row, max_tokens=100, n=2)
        self._note("given up")

    def _refused(self, client: openai.OpenAI, chance: random.Random, row: Adapter | None) -> None:
        """What must not be answered. vLLM has other statuses for some of it, and answers some."""
        body: dict[str, Any] = {"model": BASE, "prompt": "w2 w3", "max_tokens": 4}
        good = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        whole = json.dumps(body)
        content, headers, due = chance.choice([
            (whole[: chance.randint(0, 20)], good, 400),
            (json.dumps(body | chance.choice([{"max_tokens": -1}, {"temperature": "hot"}, {"n": 0}, {"top_p": 7}])), good, 400),
            (json.dumps(body | {"user": "w" * (9 * 2**20)}), good, 413),
            (json.dumps(body | {"model": f"nobody-{chance.random()}"}), good, 404),
            (json.dumps(body | {"model": str(chance.choice(self.material.contents))}), good, 404),
            (json.dumps(body | {"prompt": [5] * 100_000}), good, 400),
            (whole, good | {"Authorization": "Bearer wrong"}, 401),
            (whole, good | {"Content-Type": "text/plain"}, 415),
        ])  # fmt: skip
        try:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/completions", content.encode(), headers), timeout=140)
            status = 200
        except urllib.error.HTTPError as error:
            status = error.code
        if status not in ({due, 400, 404, 415, 422, 200} if self.vllm and due != 401 else {due}):
            self._note("wrong", f"status {due} was due, and not {status}: {content[:300]}")
        else:
            self._note("refused as due")

    def _judge(self, error: Exception, row: Adapter | None, asked: float) -> None:
        """An error instead of an answer: no room, or an adapter that is away or changes."""
        status = getattr(error, "status_code", None)
        possible = set() if row is None else row.possible(asked, self.grace)
        is_changing = len(possible) > 1 or None in possible
        if status == 503 and not self.vllm:
            self._note("refused: no room")
        elif status == 404 and is_changing:
            self._note("refused: the adapter is away")
        else:
            self._note("wrong", f"{row and (row.name, row.changes[-2:])}: {type(error).__name__}: {error}"[:400])

    # ---- changes ----

    def _change(self, every: float) -> None:
        chance, total = random.Random(f"{self.seed} changes"), len(self.material.adapters)
        while not self._stop.wait(every):
            number = chance.randrange(len(self.material.contents) - total)
            row = self.material.adapters[number]
            begun, before = time.monotonic(), row.changes[-1][2]
            if row.changes[-1][1] + 2 * self.settled > begun:
                continue
            how = "come back" if before is None else chance.choice(["rename", "in place", "delete"])
            then = None if how == "delete" else total + number if before == number else number
            row.changes.append((begun, float("inf"), then))
            if then is None:
                shutil.rmtree(row.folder)
            elif how == "in place":
                write_over(self.material.contents[then], row.folder, self.settled / 6)
            else:
                swap(self.material.contents[then], row.folder)
            row.changes[-1] = (begun, time.monotonic(), then)
            self._note(f"change: {how}")


def write_over(source: Path, folder: Path, pause: float) -> None:
    """Each file in two halves."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = (source / name).read_bytes()
        with (folder / name).open("wb") as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(pause)


def swap(source: Path, place: Path) -> None:
    """Puts a copy of a folder in the place of another, at once."""
    new, old = place.parent / f".new-{place.name}", place.parent / f".old-{place.name}"
    shutil.copytree(source, new)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


# ---- the server ----


class Server:
    """``gatewise serve`` in a process of its own, which can be killed and started again."""

    def __init__(self, options: argparse.Namespace, material: Material, root: Path) -> None:
        self._log, self.temporary, self._is_vllm = root / "log", root / "temporary", options.engine == "vllm"
        self.temporary.mkdir()
        self._command = [
            sys.executable, "-m", "gatewise", "serve", material.base, "--adapters", str(material.served), "--dtype", "float32",
            "--engine", options.engine, "--served-model-name", BASE, "--max-loaded", str(MOST_LOADED),
            *(["--python", str(options.python)] if self._is_vllm else ["--max-waiting", "48"]),
        ]  # fmt: skip
        self.url, self._port = "", "0"
        self.start()

    def start(self) -> float:
        """Seconds until it serves."""
        began = time.monotonic()
        environment = {**os.environ, "GATEWISE_API_KEY": KEY, "TMPDIR": str(self.temporary)}
        with self._log.open("a") as log:
            self.process = psutil.Popen(
                [*self._command, "--port", self._port], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        line = self.process.stdout.readline()
        if not line.startswith("serving: "):
            raise SystemExit(f"the server did not start: {self._log.read_text(errors='replace')[-3000:]}")
        self.url = line.split()[1].removesuffix("/v1")
        self._port = self.url.rpartition(":")[2]
        return time.monotonic() - began

    def stop(self, kill: bool) -> list[str]:
        """Kills the engine, or interrupts all; what was not as it has to be then."""
        children = self.process.children(recursive=True)
        engines = [one for one in children if "EngineCore" in " ".join(one.cmdline())] if kill and self._is_vllm else [self.process]
        for one in engines:
            one.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        code = self.process.wait(120)
        _, left = psutil.wait_procs(children, 20)
        wrong = [f"processes are left: {left}"] if left else []
        return wrong if (code == 0) is not kill else [*wrong, f"exit code {code}"]

    def usage(self) -> dict[str, int]:
        """MiB, open files and threads of all its processes."""
        found: Counter[str] = Counter()
        for one in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.Error):
                found.update(mib=one.memory_info().rss // 2**20, files=one.num_fds(), threads=one.num_threads())
        return dict(found)


def soak(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One run."""
    material = make(root, options.base, options.adapters)
    server = Server(options, material, root)
    load = Soak(server.url, material, grace=20.0, vllm=options.engine == "vllm")
    problems: list[str] = []
    samples: list[dict[str, int]] = []
    began, restart = time.monotonic(), 0.0
    load.start(options.clients, 2.0)
    try:
        while (now := time.monotonic() - began) < options.seconds:
            time.sleep(min(10.0, options.seconds - now))
            if not restart and now > options.seconds / 3:
                load.down = (time.monotonic(), float("inf"))
                problems += server.stop(kill=True)
                restart = server.start()
                load.down = (load.down[0], time.monotonic() + 1)
                began += load.down[1] - load.down[0]  # nobody is served meanwhile
                samples.clear()
            samples.append({"second": round(time.monotonic() - began), **server.usage()})
            print(f"{load.tokens} tokens  {dict(load.done)}  {samples[-1]}", flush=True)
    finally:
        written = load.tokens  # in the time that is told; what ends now waits for all that is under way
        load.end()
        idle = server.usage()
        problems += server.stop(kill=False)
    # A process that is killed may leave a copy behind: there is one at a time.
    if len(files := list(server.temporary.glob("gatewise-*"))) > (options.engine == "transformers"):
        problems.append(f"files are left: {files}")
    return {
        "engine": options.engine, "base": options.base, "dtype": "float32", "clients": options.clients, "machine": machine(),
        "adapters": options.adapters, "max_loaded": MOST_LOADED, "seconds": options.seconds, "restart_seconds": round(restart, 1),
        "counts": dict(load.done), "wrong": len(load.wrong), "wrong_answers": load.wrong[:20],
        "problems": problems + grown(samples, idle), "answers_differ": round(material.distinct, 3),
        "tokens_per_second": round(written / options.seconds, 1), "usage": samples, "usage_idle": idle,
    }  # fmt: skip


def grown(samples: Sequence[dict[str, int]], idle: dict[str, int]) -> list[str]:
    """What grew after a warm-up, the first half of the time since the last start; nothing is said of a run that is too short."""
    if len(samples) < 8:
        return []
    half = samples[len(samples) // 2 :]
    before, after = half[: len(half) // 2], half[len(half) // 2 :]
    first, last = (statistics.median(one["mib"] for one in rows) for rows in (before, after))
    wrong = [f"memory grew from {first:.0f} to {last:.0f} MiB"] if last > 1.1 * first + 32 else []
    most = {name: max(one[name] for one in before) for name in ("files", "threads")}
    return wrong + [
        f"{name} grew from {most[name]} to {idle[name]}, with no client left" for name in most if idle[name] > most[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of an environment that has vLLM")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS / "serving.jsonl")
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
