"""How well a model does a task: accuracy by log-likelihood, BLEU and ROUGE-L of what it writes, or its final number.

Choosing among candidates. A candidate c after a prompt p scores the sum over its tokens of log P(c_k | p, c_<k). The
contexts needed are p and its continuations by c_<k; of all candidates of a row only the longest such contexts are run,
because a causal model's output at a position serves every context that ends there. So single-token candidates of a row
share one forward of the prompt, and the LM head is computed at the positions that are read and nowhere else.

Shapes: b batch, t tokens, n positions read, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from gatewise.errors import DivergedError, GatewiseError, needs
from gatewise.internals.soft_prompt_fixes import generate_after
from gatewise.losses import base_of, class_logits, labelled_logits, loss_kind, mean_loss, prompt_length, text_positions
from gatewise.processes import device_of
from gatewise.tasks.encoding import (
    PadCollator,
    Prompting,
    Template,
    candidate_ids,
    chat_format,
    encode,
    encode_classification,
    fields_template,
    pad,
    prompt_ids,
    references,
    room_for,
    token_ids,
)
from gatewise.tasks.records import Records, final_number

Progress = Callable[[int, int], None]
Metrics = dict[str, float | int]
Answers = list[dict[str, Any]]
Candidates = tuple[tuple[int, ...], ...]
METRICS = {
    "label": ("accuracy",),
    "choice": ("accuracy", "accuracy_norm"),
    "number": ("exact",),
    "generation": ("rougeL", "bleu"),
    "chat": ("rougeL", "bleu"),
}
"""What ``evaluate`` gives of a kind of rows beside loss and n; the first is a mean over the rows."""


# Logits kept at once: 2**26 of them are 256 MB in float32.
_MAX_LOGITS = 2**26
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    template: Prompting | None = None,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    max_length: int = 512,
    progress: Progress | None = None,
    answers: Answers | None = None,
) -> Metrics:
    """Measures a model on records. Dropout is off; training mode and random state are afterwards what they were.

    Args:
        model: a causal language model, or a sequence classifier for records with labels; with or without an adapter.
        template: for causal models; None takes `default_template`, and the tokenizer's own for conversations. Classifiers read the
            text itself.
        batch_size: sequences in one forward. The result does not depend on it.
        max_new_tokens: the most tokens written for a generation or number row; None takes 16 more than the longest right answer
            has, and 64 at least, but no more than half of the model's positions.
        max_length: tokens of prompt and candidate, or of a generation prompt; a longer prompt loses its beginning.
        progress: called with (done, total) after every batch.
        answers: a list to which is added what the model answered to each row, in order: ``predicted``, which is a label, the index
            of a choice, or the text that was written; ``right``, or of free text ``rougeL``; and ``log_likelihoods`` (nats) of all
            candidates, by label or in the order of the choices. A classifier's are those of its classes. Texts that did not end
            within ``max_new_tokens`` have ``cut``, which is True.

    Returns:
        By kind of records, always with ``n``, the number of rows:

        - label: ``accuracy`` (0 to 1) and ``loss``, the mean cross-entropy (nats) over the tokens of the right answers, of which
          the end of the text is none;
        - choice: these, and ``accuracy_norm``, by log-likelihood per token. By the sum, a choice that is the beginning of another
          one, such as "1" of "10", is always the likelier of the two;
        - generation: ``bleu`` (sacrebleu's, 0 to 100) and ``rougeL`` (rouge-score's F, 0 to 1; best of the references).
          If no reference has several lines, only the first line of what was written counts;
        - chat: ``loss``, the mean over the assistant's tokens that are trained, and ``bleu`` and ``rougeL`` of the last answer;
        - number: ``exact`` (0 to 1), the share of rows whose final number is right.

    Raises:
        GatewiseError: the model cannot do this kind of task, or template, labels or lengths do not fit.
        DivergedError: what the model computes is not finite.
    """
    positions, kind = most_positions(model), loss_kind(model)
    max_length = min(max_length, positions)
    if kind != "rows" and (kind != "causal" or base_of(model).get_output_embeddings() is None):
        raise GatewiseError(
            f"{type(base_of(model)).__name__} cannot be evaluated: expected a causal language model or a sequence classifier"
        )
    with measuring(model):
        if kind == "rows":
            metrics, found = _evaluate_classifier(model, tokenizer, records, batch_size, max_length, progress)
        elif records.kind in ("label", "choice"):
            chosen = fields_template(records, template)
            metrics, found = _evaluate_candidates(model, tokenizer, records, chosen, batch_size, max_length, progress)
        else:
            if max_new_tokens is None:
                right = [[row["answer"]] if records.kind == "number" else references(row) for row in records.rows]
                longest = max(map(len, token_ids(tokenizer, [text.strip() for texts in right for text in texts])))
                max_new_tokens = min(max(64, longest + 16), positions // 2)
            room = min(max_length, positions - max_new_tokens)
            how: Prompting = chat_format(records, template) if records.kind == "chat" else fields_template(records, template)
            prompts = prompt_ids(records, tokenizer, how, [room] * len(records.rows), positions)
            loss = _loss(model, tokenizer, records, template, batch_size, max_length) if records.kind == "chat" else {}
            written = write_texts(model, tokenizer, prompts, batch_size, max_new_tokens, progress=progress)
            metrics, found = _judge_texts(records, written)
            metrics = {**loss, **metrics}
    if answers is not None:
        answers += found
    return metrics


# ---- what was written ----


def _judge_texts(records: Records, written: Sequence[tuple[str, bool]]) -> tuple[Metrics, Answers]:
    found: Answers = [{"predicted": text, **({} if ended else {"cut": True})} for text, ended in written]
    if records.kind in ("generation", "chat"):
        rouge: list[float] = []
        metrics = generation_metrics(records, [text for text, _ in written], rouge)
        return metrics, [{**answer, "rougeL": one} for answer, one in zip(found, rouge, strict=True)]
    for answer, row in zip(found, records.rows, strict=True):
        answer["right"] = final_number(answer["predicted"]) == final_number(row["answer"])
    return {"exact": sum(answer["right"] for answer in found) / len(found), "n": len(found)}, found


def _loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    template: Prompting | None,
    batch_size: int,
    max_length: int,
) -> Metrics:
    """The mean cross-entropy (nats) over the tokens that are trained."""
    rows = sorted(encode(records, tokenizer, template, max_length=max_length), key=lambda row: -len(row["input_ids"]))
    collate, device = PadCollator(tokenizer), device_of(model)
    batches = (collate(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
    return {"loss": mean_loss(model, ({key: value.to(device) for key, value in one.items()} for one in batches))}


def generation_metrics(records: Records, written: Sequence[str], each: list[float] | None = None) -> Metrics:
    """``bleu``, ``rougeL`` and ``n`` of texts written for generation records, or as last answers of conversations.

    Chinese is split into characters for both measures, other text as sacrebleu's 13a and rouge-score do, except that
    letters outside a-z count as letters for ROUGE.

    Args:
        each: a list to which ``rougeL`` of each row is added.
    """
    with needs("metrics", "measuring written answers"):
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer

    golds = [[text.strip() for text in references(row)] for row in records.rows]
    several_lines = any("\n" in text for texts in golds for text in texts)
    outputs = [text.strip() if several_lines else text.strip().partition("\n")[0].strip() for text in written]
    width = max(map(len, golds))
    streams = [[texts[index] if index < len(texts) else None for texts in golds] for index in range(width)]
    tokenize = "zh" if any(_HAN.search(text) for texts in golds for text in texts) else "13a"
    bleu = sacrebleu.corpus_bleu(outputs, streams, tokenize=tokenize, force=True).score  # type: ignore[arg-type]
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [scorer.score_multi(texts, output)["rougeL"].fmeasure for texts, output in zip(golds, outputs, strict=True)]
    if each is not None:
        each += map(float, rouge)
    return {"bleu": float(bleu), "rougeL": float(sum(rouge) / len(rouge)), "n": len(records.rows)}


def worth(answer: Mapping[str, Any]) -> float:
    """The number that an answer of ``evaluate`` is worth: the mean of these over rows is the first of METRICS."""
    return float(answer["right"] if "right" in answer else answer["rougeL"])


class _Words:
    """Splits text for ROUGE into lower-case words and Chinese characters; rouge-score's own drops other alphabets."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"{_HAN.pattern}|(?:(?!{_HAN.pattern})[^\W_])+", text.lower())


def metrics_line(metrics: Mapping[str, float | int]) -> str:
    """Metrics as ``accuracy 0.912, loss 0.2871, n 200``."""
    return ", ".join(f"{name} {format_metric(name, value)}" for name, value in metrics.items())


def cut_line(answers: Answers, option: str) -> str | None:
    """How many of the written answers had not ended, and the option that lets them be longer; None if all had."""
    cut = sum("cut" in answer for answer in answers)
    return f"{cut} of {len(answers)} answers had not ended when they were cut; {option} lets them be longer" if cut else None


def format_metric(name: str, value: float | int) -> str:
    """A metric with a sensible number of digits."""
    if name == "n":
        return str(value)
    return f"{value:.1f}" if name == "bleu" else f"{value:.4f}" if name == "loss" else f"{value:.3f}"


# ---- choosing among candidates ----


@dataclass(frozen=True)
class _Run:
    """One sequence to run: a prompt, then the tokens of one context; the candidates read from it, and the first position read."""

    row: int
    ids: list[int]
    first_read: int
    members: list[int]


def scored_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    candidates: Sequence[Candidates],
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[tuple[float, bool]]]:
    """For each candidate of each row: log P(candidate | prompt) in nats, the sum over its tokens; and True if greedy decoding
    writes it."""
    runs = [
        _Run(row, [*prompt, *context], len(prompt) - 1, members)
        for row, prompt in enumerate(prompts)
        for context, members in _shared_contexts(candidates[row]).items()
    ]
    scores = [[(0.0, True)] * len(row) for row in candidates]
    device = device_of(model)
    vocabulary = int(cast(Any, model).config.get_text_config().vocab_size)
    batches = list(_batches(runs, batch_size, max(1, _MAX_LOGITS // vocabulary)))
    collate = PadCollator(tokenizer)
    done = 0
    for batch in batches:
        inputs = {key: value.to(device) for key, value in collate([{"input_ids": run.ids} for run in batch]).items()}
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        positions, tokens, owners = [], [], []
        offset = 0
        for index, run in enumerate(batch):
            mask[index, run.first_read : len(run.ids)] = True
            for member in run.members:
                for depth, token in enumerate(candidates[run.row][member]):
                    positions.append(offset + depth)
                    tokens.append(token)
                    owners.append((run.row, member))
            offset += len(run.ids) - run.first_read
        logits = labelled_logits(model, {**inputs, "use_cache": False}, mask)
        best = logits.argmax(dim=-1).tolist()
        # log softmax, in float32 without a second (n, V) tensor
        normalisers = torch.cat([part.float().logsumexp(dim=-1) for part in logits.split(64)])
        at = torch.tensor(positions, device=logits.device)
        values = (logits[at, torch.tensor(tokens, device=logits.device)].float() - normalisers[at]).tolist()
        for (row, member), position, token, value in zip(owners, positions, tokens, values, strict=True):
            score, is_greedy = scores[row][member]
            scores[row][member] = (score + value, is_greedy and best[position] == token)
        done += len(batch)
        if progress:
            progress(done, len(runs))
    return scores


def _shared_contexts(candidates: Candidates) -> dict[tuple[int, ...], list[int]]:
    """The contexts c[:-1] that are not the beginning of another one -> the candidates that each serves."""
    shared: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(candidates)), key=lambda index: (-len(candidates[index]), candidates[index])):
        needed = candidates[index][:-1]
        context = next((longer for longer in shared if longer[: len(needed)] == needed), needed)
        shared.setdefault(context, []).append(index)
    return shared


def _batches(runs: Sequence[_Run], batch_size: int, max_reads: int) -> Iterator[list[_Run]]:
    """Runs of like length together, the longest first; several runs in a batch read ``max_reads`` positions at most."""
    batch: list[_Run] = []
    reads = 0
    for run in sorted(runs, key=lambda run: -len(run.ids)):
        wanted = len(run.ids) - run.first_read
        if batch and (len(batch) == batch_size or reads + wanted > max_reads):
            yield batch
            batch, reads = [], 0
        batch.append(run)
        reads += wanted
    if batch:
        yield batch


def _evaluate_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    template: Template,
    batch_size: int,
    max_length: int,
    progress: Progress | None,
) -> tuple[Metrics, Answers]:
    candidates = candidate_ids(records, tokenizer, template)
    prompts = prompt_ids(records, tokenizer, template, room_for(candidates, max_length), max_length)
    scored = scored_candidates(model, tokenizer, prompts, candidates, batch_size, progress)
    found: Answers = []
    norm_hits = gold_tokens = 0
    gold_score = 0.0
    for gold, texts, pairs in zip(records.gold, candidates, scored, strict=True):
        scores = [score for score, _ in pairs]
        per_token = [score / len(text) for score, text in zip(scores, texts, strict=True)]
        # Two choices with the same text are the same answer.
        best = scores.index(max(scores))
        found.append(_chosen(records, best, texts[best] == texts[gold], scores))
        norm_hits += texts[per_token.index(max(per_token))] == texts[gold]
        gold_score += scores[gold]
        gold_tokens += len(texts[gold])
    n = len(found)
    metrics: Metrics = {"accuracy": sum(answer["right"] for answer in found) / n}
    if records.kind == "choice":
        metrics["accuracy_norm"] = norm_hits / n
    return {**metrics, "loss": -gold_score / gold_tokens, "n": n}, found


def _chosen(records: Records, index: int, right: bool, scores: Sequence[float]) -> dict[str, Any]:
    if any(map(math.isnan, scores)):
        raise DivergedError(
            "what the model computes is not finite: look for such numbers in the adapter and its base model, or take float32"
        )
    rounded = [round(score, 4) for score in scores]
    if records.labels is None:
        return {"predicted": index, "right": right, "log_likelihoods": rounded}
    return {
        "predicted": records.labels[index], "right": right, "log_likelihoods": dict(zip(records.labels, rounded, strict=True))
    }  # fmt: skip


# ---- sequence classifiers ----


def _evaluate_classifier(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    batch_size: int,
    max_length: int,
    progress: Progress | None,
) -> tuple[Metrics, Answers]:
    features = encode_classification(records, tokenizer, max_length=max_length)
    check_classes(model, records)
    order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
    device = device_of(model)
    collate = PadCollator(tokenizer)
    total = 0.0
    found: Answers = [{} for _ in features]
    for start in range(0, len(features), batch_size):
        rows = order[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate([features[row] for row in rows]).items()}
        labels = batch.pop("labels")
        logits = class_logits(model, batch).float()
        scores = logits.log_softmax(dim=-1)
        for row, best, scores_of_row in zip(rows, logits.argmax(dim=-1).tolist(), scores.tolist(), strict=True):
            found[row] = _chosen(records, best, best == features[row]["labels"], scores_of_row)
        total += float(F.nll_loss(scores, labels, reduction="sum"))
        if progress:
            progress(start + len(rows), len(features))
    n = len(features)
    return {"accuracy": sum(answer["right"] for answer in found) / n, "loss": total / n, "n": n}, found


def encoded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Records, template: Prompting | None, max_length: int
) -> list[dict[str, Any]]:
    """Rows with their labels as the model trains on them, cut to its positions.

    Raises:
        GatewiseError: a classifier with another number of classes than the records have labels, or an answer that leaves no room.
    """
    length = min(max_length, most_positions(model))
    if loss_kind(model) == "rows":
        check_classes(model, records)
        return encode_classification(records, tokenizer, max_length=length)
    return [dict(row) for row in encode(records, tokenizer, template, max_length=length)]


def check_classes(model: nn.Module, records: Records) -> None:
    """Raises GatewiseError when a classifier has another number of classes than the records have labels."""
    classes = base_of(model).config.num_labels
    if classes != len(records.labels or ()):
        raise GatewiseError(
            f"the model has {classes} classes, but {records.source} has the {len(records.labels or ())} labels "
            f"{', '.join(records.labels or ())}; give the labels the model was trained with"
        )


# ---- writing ----


def write_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int,
    max_new_tokens: int,
    *,
    until: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[tuple[str, bool]]:
    """What the model writes after each prompt, greedily, up to the end-of-text token or before the first of the texts ``until``.

    Returns:
        Each text, and whether it ended so; otherwise ``max_new_tokens`` cut it.
    """
    ends = end_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found = [("", True)] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        stopped = _Stopped(tokenizer, until, len(prompts[rows[0]]), min(ends)) if until and ends else None
        written = generate_ids(model, tokenizer, [prompts[row] for row in rows], max_new_tokens, stopped).tolist()
        for row, tokens in zip(rows, written, strict=True):
            end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
            text = str(tokenizer.decode(tokens[:end], skip_special_tokens=True))
            stop = min((text.index(one) for one in until if one in text), default=len(text))
            found[row] = text[:stop], end < len(tokens) or stop < len(text)
        if progress:
            progress(start + len(rows), len(prompts))
    return found


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    processor: LogitsProcessor | None = None,
) -> Tensor:
    """The most probable tokens after each prompt: (b, n), up to an end-of-text token (``end_ids``) and padding after it.

    Args:
        model: causal, with or without an adapter, PEFT's soft prompts among them.
        prompts: token ids, for one batch.
        processor: changes the scores of each next token. It is called with the prompts, padded on the left to the longest, and what
            was generated after them.

    Raises:
        GatewiseError: the tokenizer has no padding token.
    """
    pad_id = PadCollator(tokenizer).pad_id
    ids = pad(prompts, pad_id, side="left").to(device_of(model))
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left").to(device_of(model))
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(end_ids(model, tokenizer)) or None,
        pad_token_id=pad_id,
        # Values left open are filled in from the model's own defaults, which may sample or punish repetition.
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return generate_after(model, ids, mask, greedy, processor)


class _Stopped(LogitsProcessor):
    """Allows nothing but the end-of-text token once one of the texts ``until`` has been written.

    Args:
        start: tokens of the padded prompt.
        end: the end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], start: int, end: int) -> None:
        self.tokenizer, self.until, self.start, self.end = tokenizer, until, start, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, V) of the next token after ids (b, t)."""
        # Decodes everything each time: a token's text depends on those before it, and a stop text may begin inside a token.
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = torch.tensor([any(one in text for one in self.until) for text in texts], device=scores.device)
        scores = scores.masked_fill(done[:, None], -torch.inf)
        scores[done, self.end] = 0.0
        return scores


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End-of-text tokens: the tokenizer's, and those the model's own generation settings name."""
    named = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    ids = set(named) if isinstance(named, list) else {named}
    return {int(one) for one in ids | {tokenizer.eos_token_id} if one is not None}


# ---- around a measurement ----


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No gradients, dropout off; every module's training mode and the random states are put back."""
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            # Not inference_mode: buffers that a model fills in its forward would stay unusable for training.
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode


def most_positions(model: nn.Module) -> int:
    """How many tokens of text fit into the model's positions, beside a soft prompt."""
    return text_positions(base_of(model)) - prompt_length(model)
