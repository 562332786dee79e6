"""Does vLLM, with the settings that ``serving.json`` gives, answer as PEFT does? Greedy tokens and their log-probabilities.

Where a module is not among ``--lora-target-modules``, or has another name in vLLM, vLLM leaves its LoRA out and says nothing.
So vLLM answers prompts, and PEFT, with the adapter unmerged and merged, says of each token whether it would have written it there.
If it would at every position, its own greedy answers are the same.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import CONFIG_FILE, read_config, read_lora
from gatewise.adapters.loading import load_adapter, read_data
from gatewise.errors import GatewiseError, reason_of
from gatewise.models.cache import resolve
from gatewise.models.loading import load_tokenizer
from gatewise.serving import vllm_process
from gatewise.serving.engines import ROUTED, ROUTER, SERVING_FILE, serving_settings, settings_together
from gatewise.serving.vllm_plugin.adapter import is_routed
from gatewise.tasks.encoding import prompt_ids

TOLERANCE = 1e-3
"""In nats: what rounding in float32 stays well below, 30 layers deep."""


@dataclass(frozen=True)
class Match:
    """How alike vLLM and another model are on the same prompts, token by token of vLLM's answers.

    Attributes:
        same: tokens that the other model would have written too. Where it finds another one as likely, as far as the tolerance
            goes, either is right.
        compared: tokens in all.
        difference: of their log-probabilities, the largest, in nats.
        holds: all are the same, and no log-probability differs by more than the tolerance.
    """

    same: int
    compared: int
    difference: float
    holds: bool


@dataclass(frozen=True)
class Checked:
    """An adapter in vLLM.

    Attributes:
        adapter: its folder.
        vllm: the version.
        unmerged, merged: vLLM beside PEFT; None for an adapter that PEFT cannot merge.
        base: vLLM without the adapter beside the base model in Transformers.
        without: vLLM without the adapter beside PEFT with it, at thrice the tolerance. Where that holds, these prompts cannot tell:
            of an adapter that changes less, vLLM could leave all out and yet be within the tolerance, where both sides round.
    """

    adapter: Path
    vllm: str
    unmerged: Match
    merged: Match | None
    base: Match
    without: Match

    @property
    def holds(self) -> bool:
        """Whether vLLM answers as PEFT does, and would not without the adapter."""
        return self.unmerged.holds and (self.merged is None or self.merged.holds) and not self.without.holds


def check_in_vllm(
    adapters: Sequence[str | Path],
    data: str,
    *,
    options: DataOptions = DataOptions(),
    settings: str | Path | None = None,
    python: str | Path = sys.executable,
    prompts: int = 8,
    tokens: int = 16,
    dtype: str = "float32",
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] | None = None,
) -> list[Checked]:
    """Answers prompts with LoRA adapters in PEFT and in vLLM, with the settings that were written for vLLM.

    All adapters are in one engine, and their rows in one batch.

    Args:
        adapters: their folders, of one base. Any plain LoRA adapter, compressed or not, and routed adapters.
        data: where the first ``prompts`` rows are taken from.
        options: how to read the data, and where PEFT runs; vLLM chooses by itself.
        settings: a ``serving.json``; by default what the adapters' own say together, and for those that have none what
            ``compress`` would write.
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
    if dtype not in ("float32", "bfloat16"):
        raise GatewiseError(f"dtype {dtype!r} is not known; expected float32 or bfloat16")
    folders = [Path(one).resolve() for one in adapters]
    base = _common_base(folders, options.base)
    config = _config_of(base)
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)
    prompted = [_prompts(folder, base, positions, data, replace(options, limit=prompts), tokens) for folder in folders]
    served = _settings_of(folders, config.model_type, settings)["vllm"]
    if served is None:
        raise GatewiseError(
            f"vLLM does not serve this: {SERVING_FILE} has no settings for it (DoRA, biases, modules that were trained as a whole, "
            "or too large a rank)"
        )
    say(f"answering {max(map(len, prompted))} prompts in vLLM")
    arguments = [
        "--model", resolve(base), "--dtype", dtype, "--enforce-eager", "--max-loras", str(len(folders)),
        "--max-model-len", str(tokens + max(len(ids) for one in prompted for ids in one)), *served["arguments"],
    ]  # fmt: skip
    rows = [{"prompt": ids, "adapter": str(folder)} for folder, one in zip(folders, prompted, strict=True) for ids in one]
    # Base rows are a batch of their own: beside rows with LoRA they get an adapter in vLLM 0.32 without GPU.
    batches = [rows, [{**row, "adapter": None} for row in rows]]
    try:
        found = run_vllm(python, {"arguments": arguments, "tokens": tokens, "batches": batches})
    except GatewiseError as error:
        if ROUTER not in str(error):
            raise
        raise GatewiseError(without_plugin(python)) from error
    written, bare = (batch["rows"] for batch in found["batches"])
    checked = []
    for folder, asked in zip(folders, prompted, strict=True):
        say(f"{folder.parent.name}/{folder.name}: comparing with PEFT")
        model, _, _ = load_adapter(folder, base=base, dtype=dtype, device=options.device)
        mine, written = written[: len(asked)], written[len(asked) :]
        without, bare = bare[: len(asked)], bare[len(asked) :]
        unmerged, told = _match(model, asked, mine, tolerance), _match(model, asked, without, 3 * tolerance)
        with model.disable_adapter():
            plain = _match(model, asked, without, tolerance)
        merged = None if is_routed(folder) or not _is_merged(model) else _match(model, asked, mine, tolerance)
        checked.append(Checked(folder, found["version"], unmerged, merged, plain, told))
    return checked


@torch.no_grad()
def _match(model: PeftModel, prompts: Sequence[list[int]], answers: Sequence[Mapping[str, Any]], tolerance: float) -> Match:
    same = compared = 0
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        chosen, theirs = torch.tensor(answer["tokens"]), torch.tensor(answer["logprobs"])
        ids = torch.tensor([[*prompt, *answer["tokens"]]], device=next(model.parameters()).device)
        positions = getattr(model, "prompt_positions", None)  # of a routed adapter, which reads the prompt alone
        with nullcontext() if positions is None else positions(torch.ones(1, len(prompt), dtype=torch.bool)):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu()
        ours = logits.log_softmax(-1)
        likelihood = ours.gather(-1, chosen[:, None])[:, 0]
        same += int((ours.max(-1).values - likelihood <= 2 * tolerance).sum())
        compared += len(chosen)
        gaps.append((likelihood - theirs).abs())
    difference = float(torch.cat(gaps).max())  # NaN where any of them is, unlike Python's max
    return Match(same, compared, difference, same == compared and difference <= tolerance)


def _common_base(folders: Sequence[Path], given: str | None) -> str:
    if given is not None:
        return given
    bases = [read_config(folder).get("base_model_name_or_path") for folder in folders]
    for folder, base in zip(folders, bases, strict=True):
        if not base:
            raise GatewiseError(f"{folder / CONFIG_FILE} does not name the base model: say which one it is (--base).")
        if base != bases[0]:
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


def _config_of(base: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve(base), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise GatewiseError(f"the base model {base!r} has no configuration that Transformers reads: {reason_of(error)}") from error


def _settings_of(folders: Sequence[Path], model_type: str, given: str | Path | None) -> dict[str, Any]:
    if given is not None:
        return _read_settings(Path(given))
    found = []
    for folder in folders:
        if (folder / SERVING_FILE).is_file():
            found.append(_read_settings(folder / SERVING_FILE))
        elif read_config(folder).get("peft_type") in ("LORA", ROUTED):
            found.append(serving_settings(read_lora(folder), model_type))
        else:
            raise GatewiseError(f"{folder} is neither a plain LoRA adapter nor a routed one, and vLLM serves no other")
    return found[0] if len(found) == 1 else settings_together(found)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert read["vllm"] is None or isinstance(read["vllm"]["arguments"], list)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise GatewiseError(f"{path} is not what compress writes ({reason_of(error)}): compress again") from error
    return read


def _is_merged(model: PeftModel) -> bool:
    with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):  # layers that PEFT cannot merge
        model.merge_adapter()
        return True
    return False


def run_vllm(python: str | Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs ``vllm_process.py``, where request and answer are described, by a Python that has vLLM.

    All processes that vLLM starts are gone at the end, also where this one is interrupted or killed.

    Raises:
        GatewiseError: there is no such Python, it has no vLLM, or vLLM ends with an error or without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), str(Path(vllm_process.__file__)), str(asked), str(answered)]
        try:
            with log.open("wb") as stream:
                code = _run_as_group(command, stream)
        except OSError as error:
            raise GatewiseError(f"{python} could not be run ({reason_of(error)}): give the Python that has vLLM") from error
        if code == vllm_process.NO_VLLM:
            raise GatewiseError(f"{python} has no vLLM: give the Python of an environment that has it (--python)")
        if code or not answered.exists():
            said = reason_in(log.read_text(encoding="utf-8", errors="replace"))
            if code < 0:
                raise GatewiseError(f"vLLM was killed by signal {-code}, as where memory runs out; the last it said: {said}")
            raise GatewiseError(f"vLLM ended with an error: {said}" if code else f"{python} gave no answer of vLLM: {said}")
        found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return found


def _run_as_group(command: Sequence[str], log: IO[bytes]) -> int:
    """Runs a command that leads a group of processes, and then kills what is left of the group."""
    # The pipe, which nobody writes into, ends with this process: see vllm_process.py.
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)


# An error as Python prints it at the end of a traceback, after what vLLM's logger puts before a line; and lines of that logger
# that tell of an error with which vLLM went on.
_ERROR = re.compile(r"(?:^|[\] ])((?:\w+\.)*\w*(?:Error|Exception)\b: ?.+)")
_NO_ERROR = re.compile(r"(?:^|\) )(?:DEBUG|INFO|WARNING) ")


def without_plugin(python: str | Path) -> str:
    """What to say where routed adapters meet a vLLM that does not know them."""
    return (
        f"vLLM does not know routed adapters, because {python} has no gatewise, whose plug-in serves them, or an old one without "
        "it, or VLLM_PLUGINS leaves it out: install gatewise beside vLLM"
    )


def reason_in(log: str) -> str:
    """The first error of the log: the later ones say that a process that another one waits for is gone."""
    errors = [found[1] for line in log.splitlines() if not _NO_ERROR.search(line) and (found := _ERROR.search(line))]
    lines = errors[:1] or log.strip().splitlines()[-1:] or ["it said nothing"]
    return lines[0].strip()
