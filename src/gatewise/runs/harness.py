"""Measures a saved adapter on tasks of EleutherAI's lm-evaluation-harness (``lm_eval``), through its own Python API.

The harness gives texts and does the counting, and tokens are made by its rules, so that numbers compare with published ones. What
the model does with them is ``gatewise.tasks.metrics``. The harness's own class for Transformers models would not do: it runs
context and continuation in one call without saying where one ends, and an adapter that decides by its prompt must read the context
alone. An adapter that was trained on conversations is asked in its chat template, as lm_eval's ``--apply_chat_template`` does.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from gatewise.adapters.files import read_note
from gatewise.adapters.loading import load_as_trained
from gatewise.errors import GatewiseError, reason_of
from gatewise.files import check_new_file, finite, write_json_lines
from gatewise.losses import base_of, inside, loss_kind
from gatewise.progress import ConsoleProgress, quiet
from gatewise.tasks.metrics import Progress, measuring, most_positions, scored_candidates, write_texts

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Of lm_eval: what it is asked for, the tokens of the context, and those of the continuation."""

_UNTOLD = 2048  # positions of a model that does not say how many it has, as lm_eval has it
_NEW_TOKENS = 256  # of an answer whose task does not say how many, as lm_eval has it


def measure_with_harness(
    adapter: str | Path,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    shots: int | None = None,
    base: str | None = None,
    device: str = "auto",
    limit: int | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """What lm_eval measures of an adapter on its base model.

    Args:
        adapter: its folder.
        tasks: names of tasks, groups or tags, or patterns of them.
        folder: where more tasks are, as YAML files; such a file may name Python code beside it, which is then run.
        shots: examples in each prompt; None leaves it to the tasks.
        base, device, limit: see ``DataOptions``.
        out: a JSON-lines file for lm_eval's samples: a row, what was asked about it, what came, and the metrics of the row.

    Returns:
        lm_eval's ``results``, ``groups`` (where there are any), ``versions``, ``n-shot`` and ``n-samples``, by task.

    Raises:
        GatewiseError: the tasks cannot be loaded, or ask for what the model cannot do; the adapter cannot be loaded; ``out`` cannot
            be written.
    """
    if out is not None:
        check_new_file(out)
    progress = ConsoleProgress(console or Console(stderr=True))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with quiet(bars=True):
        manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [name for name in tasks if not manager.match_tasks([name])]:
            raise GatewiseError(f"lm_eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
        names = manager.match_tasks(list(tasks))
        model, tokenizer, _ = load_as_trained(adapter, base=base, device=device, say=progress.say)
        is_chat = bool(chat := read_note(adapter).get("chat_template"))
        if is_chat:
            tokenizer.chat_template = chat
            progress.say("questions are written as conversations, by the chat template that the adapter was trained with")
        with progress.counting("measuring") as count, measuring(model):
            asked: Any = HarnessModel(model, tokenizer, batch_size, count)
            try:
                found: Any = simple_evaluate(
                    asked,
                    tasks=names,
                    num_fewshot=shots,
                    limit=limit,
                    log_samples=out is not None,
                    task_manager=manager,
                    apply_chat_template=is_chat,
                )
            except (OSError, ValueError) as error:  # of the hub, of datasets, or a task that gatewise does not do
                raise GatewiseError(f"{', '.join(names)} cannot be measured: {reason_of(error)}") from error
    if out is not None:
        rows = ({"task": task, **sample} for task, samples in found["samples"].items() for sample in samples)
        write_json_lines(out, map(_plain, rows))
    wanted = ("results", "groups", "versions", "n-shot", "n-samples")
    return {name: _plain(found[name]) for name in wanted if name in found}


def _plain(value: Any) -> Any:
    """A value of lm_eval's as JSON can hold it, with NumPy's numbers as Python's."""
    return finite(json.loads(json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other))))


class HarnessModel(TemplateLM):
    """A causal model with or without an adapter, as lm_eval asks it.

    Args:
        model: in evaluation mode.
        batch_size: sequences in one forward. The answers do not depend on it.
        progress: called with (done, total) after every batch.

    Raises:
        GatewiseError: it is no causal language model.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16, progress: Progress | None = None
    ) -> None:
        super().__init__()
        if loss_kind(model) != "causal" or base_of(model).get_output_embeddings() is None:
            raise GatewiseError(f"{type(base_of(model)).__name__} cannot be evaluated: expected a causal language model")
        self.model, self.tokenizer, self.batch_size, self.progress = model, tokenizer, batch_size, progress
        positions = most_positions(model)
        self.is_chat = False
        self.max_length = positions if positions < 2**30 else _UNTOLD

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer that has the chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text, with the header of an answer, or with an answer that is begun at their end."""
        self.is_chat = True
        text: Any = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless the text begins with the first of them already.

        A chat template writes them itself.
        """
        if add_special_tokens is None:
            add_special_tokens = not self.is_chat and not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log P of each continuation after its context in nats, and whether greedy decoding writes it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        # Of all continuations of a context, the context is run once wherever it can be.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_texts, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is read by nobody
            if room < 1:
                raise GatewiseError(
                    f"a continuation of {len(continuation)} tokens was asked for, but the model has {self.max_length} positions: "
                    "leave this task out"
                )
            groups.setdefault(tuple(context[-room:]), []).append(index)
        scored = scored_candidates(
            self.model,
            self.tokenizer,
            [list(context) for context in groups],
            [tuple(tuple(requests[index][2]) for index in members) for members in groups.values()],
            self.batch_size,
            self.progress,
        )
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for members, scores in zip(groups.values(), scored, strict=True):
            for index, score in zip(members, scores, strict=True):
                found[index] = score
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of whole texts in nats, each token after as many others as the model has positions for."""
        if hasattr(inside(self.model), "prompt_positions"):
            raise GatewiseError(
                f"{requests[0].task_name} measures the probability of whole texts, which have no prompt, and this adapter decides "
                "by its prompt: leave this task out"
            )
        windows: list[Pair] = []
        owners = []
        for owner, (text,) in enumerate(request.args for request in requests):
            pairs = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append(((text, ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, greedily, up to the task's stop texts."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], _NEW_TOKENS))
            most = settings["max_gen_toks"]
            if settings["do_sample"] or most >= self.max_length:
                what = f"of {most} tokens, but the model has {self.max_length} positions"
                what = "that are drawn, and gatewise writes the most probable" if settings["do_sample"] else what
                raise GatewiseError(f"{request.task_name} wants answers {what}: leave it out")
            groups.setdefault((most, tuple(one for one in settings["until"] if one)), []).append(index)
        texts = [""] * len(requests)
        for (most, until), members in groups.items():
            prompts = [self.tok_encode(requests[index].args[0])[-(self.max_length - most) :] for index in members]
            written = write_texts(self.model, self.tokenizer, prompts, self.batch_size, most, until=until, progress=self.progress)
            for index, (text, _) in zip(members, written, strict=True):
                texts[index] = text
        return texts
