"""Does vLLM, started as ``gatewise serve`` starts it, answer as PEFT does? Greedy tokens and their log-probabilities.

Where a module has another name in vLLM than it is told of, vLLM leaves its LoRA out and says nothing. So vLLM answers prompts,
and PEFT says of each token whether it would have written it there. If it would everywhere, its own greedy answers are the same.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import CONFIG_FILE, base_of
from gatewise.adapters.loading import load_adapter, read_data
from gatewise.errors import GatewiseError, reason_of
from gatewise.models.loading import load_config, load_tokenizer, resolve
from gatewise.serving.server.with_vllm import DIRECT, VllmServer
from gatewise.tasks.encoding import prompt_ids

TOLERANCE = 1e-3
"""In nats: what rounding in float32 stays well below, 30 layers deep, where nothing makes it larger."""

_ROUNDING = 2.0**-20
"""Of a number that float32 has after many operations, about: as far as two engines are from each other at the same place."""
_ROOM = 4.0
"""Times what one such difference, at the beginning, does to a log-probability: others begin later. Measured are one to two."""


@dataclass(frozen=True)
class Match:
    """How alike vLLM and another model are on the same prompts, token by token of vLLM's answers.

    Attributes:
        same: tokens that the other model would have written too. Where it finds another one as likely, as far as the tolerance
            goes, either is right.
        compared: tokens in all.
        difference: of their log-probabilities, the largest, in nats.
        tolerance: what was asked for or, where rounding does more than that to this adapter, ``_ROOM`` times what it does: a router
            whose gates change steeply with the prompt makes small differences large, and is right all the same.
        holds: all are the same, and no log-probability differs by more than the tolerance.
    """

    same: int
    compared: int
    difference: float
    tolerance: float
    holds: bool


@dataclass(frozen=True)
class Checked:
    """An adapter in vLLM.

    Attributes:
        adapter: its folder.
        vllm: the version.
        unmerged: vLLM beside PEFT.
        without: vLLM without the adapter beside PEFT with it, at thrice the tolerance. Where that holds, these prompts cannot tell:
            of an adapter that changes less, vLLM could leave all out and yet be within the tolerance, where both sides round.
    """

    adapter: Path
    vllm: str
    unmerged: Match
    without: Match

    @property
    def holds(self) -> bool:
        """Whether vLLM answers as PEFT does, and would not without the adapter."""
        return self.unmerged.holds and not self.without.holds


def check_in_vllm(
    adapters: Sequence[str | Path],
    data: str,
    *,
    options: DataOptions = DataOptions(),
    python: str | Path = sys.executable,
    prompts: int = 8,
    tokens: int = 16,
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] | None = None,
) -> list[Checked]:
    """Answers prompts with LoRA adapters in PEFT and in vLLM.

    All adapters are in one engine, and their rows in one batch.

    Args:
        adapters: their folders, of one base. Any plain LoRA adapter, compressed or not, and routed adapters.
        data: where the first ``prompts`` rows are taken from.
        options: how to read the data, and where PEFT runs; vLLM chooses by itself.
        python: of an environment that has vLLM; gatewise need not be there, unless an adapter is routed.
        tokens: that are written after each prompt.
        dtype: of the base model on both sides.
        tolerance: of log-probabilities, in nats. In half precision the two sides round differently, so that it has to be larger.
        say: told in a line what happens now.

    Raises:
        GatewiseError: an adapter cannot be loaded, or is none that vLLM serves; there is no vLLM, or it refuses settings or
            adapters.
    """
    say = say or (lambda _: None)
    folders = [Path(one).resolve() for one in adapters]
    base = _common_base(folders, options.base)
    positions = int(getattr(load_config(base).get_text_config(), "max_position_embeddings", None) or 2**31)
    prompted = [_prompts(folder, base, positions, data, replace(options, limit=prompts), tokens) for folder in folders]
    say(f"answering {max(map(len, prompted))} prompts in vLLM")
    log: list[str] = []
    server = VllmServer(
        base, [f"adapter{number}={folder}" for number, folder in enumerate(folders)], python=python, name="base", port=0,
        dtype=dtype, most_tokens=tokens + max(len(ids) for one in prompted for ids in one), most_running=256, settled=0.0,
        rest=["--enforce-eager", "--max-loras", str(len(folders) + 1)], say=log.append,
        environment={"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")},  # GiB; else half of the memory
    )  # fmt: skip
    try:
        version, answers, bare = _ask_all(server, prompted, tokens)
    except GatewiseError:
        say("\n".join(log))
        raise
    checked = []
    for folder, asked, written, plain in zip(folders, prompted, answers, bare, strict=True):
        say(f"{folder.parent.name}/{folder.name}: comparing with PEFT")
        model, _, _ = load_adapter(folder, base=base, dtype=dtype, device=options.device)
        unmerged, without = _match(model, asked, written, tolerance), _match(model, asked, plain, tolerance, 3)
        checked.append(Checked(folder, version, unmerged, without))
    return checked


Written = Mapping[str, list[Any]]
"""An answer of vLLM: ``token_ids``, and the ``token_logprobs`` of these."""


def _ask_all(
    server: VllmServer, prompted: Sequence[Sequence[list[int]]], tokens: int
) -> tuple[str, list[list[Written]], list[list[Written]]]:
    """vLLM's version, and for the prompts of each adapter its answers with that adapter, and without."""
    found: list[Any] = []

    def ask(name: str, ids: list[int]) -> Written:
        body = {
            "model": name, "prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        choice = _json_of(f"{server.url}/v1/completions", json.dumps(body).encode())["choices"][0]
        return {"token_ids": choice["token_ids"], "token_logprobs": choice["logprobs"]["token_logprobs"]}

    def ask_batch(names: Sequence[str]) -> list[list[Written]]:
        with ThreadPoolExecutor(sum(map(len, prompted))) as threads:
            asked = [[threads.submit(ask, name, ids) for ids in one] for name, one in zip(names, prompted, strict=True)]
            return [[one.result() for one in own] for own in asked]

    def ready() -> None:
        batches = [[f"adapter{number}" for number in range(len(prompted))], [server.name] * len(prompted)]
        found.extend((_json_of(f"{server.url}/version")["version"], *map(ask_batch, batches)))
        server.end()

    server.run(ready)
    return found[0], found[1], found[2]


def _json_of(url: str, body: bytes | None = None) -> Any:
    try:
        with DIRECT.open(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=3600) as answer:
            return json.load(answer)
    except OSError as error:
        said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else reason_of(error)
        raise GatewiseError(f"vLLM gave no answer: {said}") from error


@torch.no_grad()
def _match(model: PeftModel, prompts: Sequence[list[int]], answers: Sequence[Written], tolerance: float, times: float = 1) -> Match:
    """How alike they are, at so many times the tolerance."""
    best, compared, gaps, moved = [], 0, [], 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen, theirs = torch.tensor(answer["token_ids"]), torch.tensor(answer["token_logprobs"])
        ours, nudged = (_logprobs(model, prompt, answer["token_ids"], by) for by in (0.0, _ROUNDING))
        likelihood = ours.gather(-1, chosen[:, None])[:, 0]
        moved = max(moved, float((likelihood - nudged.gather(-1, chosen[:, None])[:, 0]).abs().max()))
        best.append(ours.max(-1).values - likelihood)
        compared += len(chosen)
        gaps.append((likelihood - theirs).abs())
    tolerance = times * max(tolerance, _ROOM * moved)
    same = int((torch.cat(best) <= 2 * tolerance).sum())
    difference = float(torch.cat(gaps).max())  # NaN where any of them is, unlike Python's max
    return Match(same, compared, difference, tolerance, same == compared and difference <= tolerance)


def _logprobs(model: PeftModel, prompt: list[int], written: list[int], nudge: float) -> Tensor:
    """Of each token that is written, log-probabilities (t, v), with the embeddings moved by this share of themselves at random.

    Half precision rounds such a small share away: there the tolerance stays what it is.
    """
    ids = torch.tensor([[*prompt, *written]], device=next(model.parameters()).device)
    chance = torch.Generator().manual_seed(0)

    def move(module: Any, given: Any, states: Tensor) -> Tensor:
        signs = torch.randint(0, 2, states.shape, generator=chance).to(states) * 2 - 1
        return states * (1 + nudge * signs)

    moving: Any = model.get_input_embeddings().register_forward_hook(move) if nudge else nullcontext()
    positions = getattr(model, "prompt_positions", None)  # of a routed adapter, which reads the prompt alone
    with moving, nullcontext() if positions is None else positions(torch.ones(1, len(prompt), dtype=torch.bool)):
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu()
    return logits.log_softmax(-1)


def _common_base(folders: Sequence[Path], given: str | None) -> str:
    if given is not None:
        return given
    bases = [base_of(folder) for folder in folders]
    for folder, base in zip(folders, bases, strict=True):
        if not base:
            raise GatewiseError(f"{folder / CONFIG_FILE} does not name the base model: say which one it is (--base).")
        if base != bases[0] and resolve(base) != resolve(str(bases[0])):  # an embedded model has two names
            raise GatewiseError(f"{folder} adapts {base}, but {folders[0]} adapts {bases[0]}: give adapters of one base")
    return str(bases[0])


def _prompts(folder: Path, base: str, positions: int, data: str, options: DataOptions, tokens: int) -> list[list[int]]:
    records, template, max_length = read_data(folder, data, options)
    max_length = min(max_length, positions)
    if template is None:
        raise GatewiseError(f"{folder} is for classification: this check is for adapters that write text")
    if tokens >= max_length:
        raise GatewiseError(
            f"{tokens} tokens are to be written, but text and answer have {max_length} in all: ask for fewer (--tokens)"
        )
    tokenizer = load_tokenizer(folder if (folder / "tokenizer_config.json").is_file() else base)
    return prompt_ids(records, tokenizer, template, [max_length - tokens] * len(records), max_length)
