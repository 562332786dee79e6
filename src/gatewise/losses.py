"""Cross-entropy of every row of a batch, with the LM head computed only where there is a label.

The head of a small model with 50,000 tokens takes a fifth of the forward pass, most of it at positions that nobody reads. Scores,
training and evaluation all use this file and so save that time.

Shapes: b batch, t tokens (the decoder's where there is an encoder too), d hidden size, n labelled positions, V vocabulary.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gatewise.errors import GatewiseError
from gatewise.processes import device_of, summed

IGNORED = -100
Batch = Mapping[str, Any]
LossKind = Literal["causal", "tokens", "rows", "seq2seq"]
_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio"))


def inside(model: nn.Module) -> nn.Module:
    """Unwraps a model that DDP or DeepSpeed has wrapped; returns any other unchanged."""
    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        return model.module  # type: ignore[return-value]
    return model


def base_of(model: nn.Module) -> Any:
    """The Transformers model in a ``PeftModel``, or the model itself."""
    # Not at the top: gatewise.routed imports this file, which has to be complete when PEFT is (see internals/registry.py).
    from peft import PeftModel

    model = inside(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def loss_kind(model: nn.Module) -> LossKind:
    """How the model's labels line up with its logits.

    "causal": the logits at position i predict label i + 1. "tokens": they predict label i (masked language models, token
    classification). "rows": one label a row (classification of texts, images, videos and sounds), or a model that measures the
    loss of a row by itself (``measures_itself``). "seq2seq": those of an encoder-decoder model, whose decoder reads the labels
    shifted by one, predict label i.
    """
    base = base_of(model)
    loss_type = getattr(base, "loss_type", None)
    if loss_type in _CLASSIFIERS or measures_itself(base):
        return "rows"
    if getattr(base.config, "is_encoder_decoder", False) and loss_type != "ForTokenClassification":
        return "seq2seq"
    # Transformers has no loss type for BERT's and its kin's with two heads, whose words are masked ones.
    is_token = loss_type in ("ForMaskedLM", "ForTokenClassification") or type(base).__name__.endswith("ForPreTraining")
    return "tokens" if is_token else "causal"


def measures_itself(model: nn.Module) -> bool:
    """True for a model that computes its loss itself, such as a pointing model, which has ``measures_itself = True``.

    The output of its forward has ``row_losses`` (b,). Each row has one label, which only counts the row.
    """
    return bool(getattr(base_of(model), "measures_itself", False))


@contextmanager
def logits_at(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Context in which the LM head computes only the positions where ``mask`` (b, t) is true.

    ``model(...).logits`` is then (1, n, V), the positions in row-major order. The mask does not cover the positions that PEFT's
    prompt tuning adds in front of the text. A model without an LM head computes all its logits; ``labelled_logits`` tells the two
    apart.
    """
    head = base_of(model).get_output_embeddings()
    if head is None:
        yield
        return

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        text = args[0][:, -mask.shape[1] :]
        return (text[mask.to(text.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def before_first(mask: Tensor) -> Tensor:
    """(b, t): true before the first position of the row where ``mask`` is true; everywhere in a row without one."""
    return mask.cumsum(dim=1) == 0


def prompts_by_labels(labels: Tensor) -> Tensor:
    """(b, t): true in the prompts of a causal model's texts, which end before the first label that is not -100."""
    return before_first(labels != IGNORED)


def prompts_at(model: nn.Module, prompt: Tensor | None) -> AbstractContextManager[None]:
    """Context in which a model that routes by the prompt finds it where ``prompt`` (b, t) is true. Other models ignore it.

    Such a model finds the prompt by the labels, which it is not given here. With None it decides by itself.
    """
    tell = getattr(inside(model), "prompt_positions", None)
    return nullcontext() if tell is None or prompt is None else tell(prompt)


def labelled_logits(model: nn.Module, inputs: Batch, mask: Tensor, prompt: Tensor | None = None) -> Tensor:
    """(n, V) logits at the positions where ``mask`` (b, t) is true, in row-major order.

    Args:
        prompt: (b, t), true in the prompts, for ``prompts_at``. None: in a causal model they end at the first position of
            ``mask``, as the logits at a prompt's last token predict the answer's first; in other models the whole text is the
            prompt, in an encoder-decoder model the encoder's text.
    """
    kind = loss_kind(model)
    if prompt is None and kind != "seq2seq":
        prompt = before_first(F.pad(mask, (1, 0))[:, :-1]) if kind == "causal" else torch.ones_like(mask)
    with logits_at(model, mask), prompts_at(model, prompt):
        logits = model(**inputs).logits
    return logits[0] if logits.shape[:2] == (1, int(mask.sum())) else logits[:, -mask.shape[1] :][mask]


@dataclass(frozen=True)
class Scored:
    """The logits and labels of a batch, at the positions that the loss reads.

    Attributes:
        logits: (n, V) at the labelled positions in row-major order, or (b, c) of a classifier; of a model that measures itself
            the losses, (b,).
        labels: (n,), or (b,) or (b, c) of a classifier.
        rows: (n,) the row of each labelled position; None for a classifier.
        batch: b.
        problem: a classifier's ``config.problem_type``; None to decide by the labels.
        measured: ``logits`` are losses, of a model that computes them itself.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor | None
    batch: int
    problem: str | None = None
    measured: bool = False

    def losses(self) -> tuple[Tensor, Tensor]:
        """What ``row_losses`` returns."""
        logits = self.logits.float()
        if self.measured:
            return logits, torch.ones_like(logits, dtype=torch.long)
        if self.rows is None:
            losses = _class_losses(logits, self.labels, self.problem)
            return losses, torch.ones_like(losses, dtype=torch.long)
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        return losses.new_zeros(self.batch).index_add(0, self.rows, losses), self.rows.bincount(minlength=self.batch)


def row_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of labels of every row.

    ``sums.sum() / counts.sum()`` is the loss that Transformers computes. Differentiable; switching gradients and training mode on
    or off is left to the caller.

    Args:
        batch: tensors for the model's forward and ``labels``: (b, t) with -100 where ignored, or (b,) for a classifier.

    Returns:
        (b,) sums in float32 (nats) and (b,) counts.

    Raises:
        GatewiseError: the batch has no labels, or all of them are -100.
    """
    return scored(model, batch).losses()


def scored(model: nn.Module, batch: Batch) -> Scored:
    """Logits and labels at the positions that the loss reads. Arguments and errors as for ``row_losses``."""
    if batch.get("labels") is None:
        raise GatewiseError(f"the batch has no 'labels', only {', '.join(batch) or 'nothing'}: a loss needs labels")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels: Tensor = batch["labels"]
    kind = loss_kind(model)
    if measures_itself(model):
        return Scored(model(**inputs).row_losses, labels, None, len(labels), measured=True)
    if kind == "rows":
        problem = getattr(base_of(model).config, "problem_type", None)
        return Scored(class_logits(model, inputs), labels, None, len(labels), problem)
    prompt = prompts_by_labels(labels) if kind == "causal" else None
    if kind in ("causal", "seq2seq"):
        inputs.setdefault("use_cache", False)
    if kind == "causal":
        labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    elif kind == "seq2seq" and inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
        inputs["decoder_input_ids"] = _read_by_decoder(base_of(model), labels)
    mask = labels != IGNORED
    if not bool(mask.any()):
        raise GatewiseError("every label of the batch is -100 (ignored): there is nothing to compute a loss on")
    logits = labelled_logits(model, inputs, mask, prompt)
    return Scored(logits, labels[mask], mask.nonzero()[:, 0], len(labels))


def _read_by_decoder(model: Any, labels: Tensor) -> Tensor:
    """(b, t) what the decoder of an encoder-decoder model reads to predict ``labels``: mostly a start token and the labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):  # not Whisper and NLLB
        return model.prepare_decoder_input_ids_from_labels(labels)
    shifted = F.pad(labels, (1, 0), value=model.config.decoder_start_token_id)[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, model.config.pad_token_id)


def mean_loss(model: nn.Module, batches: Iterable[Batch], over_all: bool = False) -> float:
    """The mean cross-entropy over all labels of the batches, without gradients.

    Args:
        over_all: average over the batches of all processes, of which these are one's own.
    """
    device = device_of(model)
    total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64)
    with torch.no_grad():
        for batch in batches:
            sums, counts = row_losses(model, batch)
            total += torch.tensor([float(sums.sum()), float(counts.sum())], dtype=total.dtype)
    if over_all:
        (total,) = summed([total], device)
    return float(total[0] / total[1])


def microbatches(batch: Batch, max_tokens: int, kind: LossKind = "causal") -> list[dict[str, Any]]:
    """Splits a batch into parts of rows of similar length, of at most ``max_tokens`` tokens with padding, and trims the padding.

    The loss sums of the parts add up to those of the batch. Only right padding is trimmed: a model with learned absolute positions
    counts them from the first column. Sounds, images, embedded texts and what a decoder beside an encoder reads are not trimmed.

    Args:
        kind: the model's ``loss_kind``. The labels of "rows" have a column for each class, not token.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
    others = {"rows": ("labels",), "seq2seq": ("labels", "decoder_")}.get(kind, ())
    text = {key: value for key, value in tensors.items() if value.ndim > 1 and not key.startswith(others)}
    rows, width = len(next(iter(tensors.values()))), next((value.shape[1] for value in text.values()), 1)
    lengths, attention = [width] * rows, text.get("attention_mask")
    as_ids = not any(value.is_floating_point() for value in text.values())
    if as_ids and attention is not None and attention.ndim == 2 and bool((attention.cummin(dim=1).values == attention).all()):
        lengths = [max(1, int(n)) for n in attention.sum(dim=1).tolist()]
    groups: list[list[int]] = []
    for row in sorted(range(rows), key=lambda row: (lengths[row], row)):  # the last of a group is its longest
        if groups and (len(groups[-1]) + 1) * lengths[row] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    parts = []
    for members in groups:
        part, longest = dict(batch), lengths[members[-1]]
        for key, value in tensors.items():
            own = value[torch.as_tensor(members, device=value.device)]
            part[key] = own[:, :longest] if key in text and value.ndim == 2 and value.shape[1] == width else own
        parts.append(part)
    return parts


def labelled_microbatches(batches: Sequence[Batch], max_tokens: int, kind: LossKind) -> list[dict[str, Any]]:
    """The ``microbatches`` of several batches, without rows that have no label, such as a text cut too short.

    Without any label at all they are left as they are, and the loss says so.
    """
    parts = [part for one in batches for part in microbatches(one, max_tokens, kind)]
    if kind == "rows":
        return parts
    labelled = []
    for part in parts:
        labels = part.get("labels")
        if labels is None:
            labelled.append(part)
            continue
        rows = ((labels[:, 1:] if kind == "causal" else labels) != IGNORED).any(dim=1)
        if bool(rows.any()):
            labelled.append(part if bool(rows.all()) else rows_of(part, rows))
    return labelled or parts


def rows_of(batch: Batch, rows: slice | Tensor) -> dict[str, Any]:
    """Some rows of a batch."""
    return {key: value[rows] if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()}


def padded_tokens(batch: Batch) -> int:
    """How many positions a model computes for a batch, padding included: those of its widest tensor."""
    widths = [value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1]
    return len(batch["labels"]) * max(widths, default=1)


def _class_losses(logits: Tensor, labels: Tensor, problem: str | None) -> Tensor:
    """(b,) losses of a sequence classifier, whose mean is Transformers' loss for this ``problem_type``.

    Whole numbers (b,) are always one class a row, in a model with several classes. Else, without a ``problem_type``, a model with
    one output is taken for a regression, and one with several for multi-label classification.
    """
    if labels.ndim == 1 and not labels.is_floating_point() and logits.shape[-1] > 1:
        problem = "single_label_classification"
    elif problem is None:
        problem = "regression" if logits.shape[-1] == 1 else "multi_label_classification"
    labels = labels.to(logits.device)
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1), reduction="none")
    measure = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return measure(logits, labels.to(logits.dtype).view(logits.shape), reduction="none").mean(dim=-1)


def soft_prompt(model: nn.Module) -> Any | None:
    """The active adapter's configuration if it is one of PEFT's soft prompts, else None."""
    from peft import PeftModel  # not at the top, see base_of

    model = inside(model)
    if not isinstance(model, PeftModel) or not model.peft_config or not model.has_active_enabled_adapter:
        return None
    config = model.peft_config.get(model.active_adapters[0]) if model.active_adapters else None
    return config if config is not None and config.is_prompt_learning else None


def text_positions(model: Any) -> int:
    """How many tokens of a text the positions of a base model allow; 2**31 where its configuration names no number.

    RoBERTa and its kin begin to count behind the padding token's number, so the first entries of their table are no text's.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    tables = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    ]
    return min([positions, *tables])


def prompt_length(model: nn.Module) -> int:
    """How many of the model's positions PEFT's soft prompt takes; 0 for other adapters."""
    config = soft_prompt(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def class_logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(b, c) logits of a sequence classifier.

    ``model(**inputs).logits``, except for prefix tuning: PEFT 0.21 gives its prefix only to models with an argument
    ``past_key_values``, which Transformers 5 has renamed, and does not extend the mask of encoders by it.
    """
    config = soft_prompt(model)
    if config is None or config.peft_type != "PREFIX_TUNING":
        return model(**inputs).logits
    inner: Any = inside(model)
    if inner is not model:
        raise GatewiseError("prefix tuning of a classifier does not train in several processes: take launch.processes 1")
    base, given = model.get_base_model(), dict(inputs)
    rows = len(given["input_ids"])
    text = given.pop("attention_mask", None)
    text = torch.ones_like(given["input_ids"]) if text is None else text
    seen = torch.cat([text.new_ones(rows, config.num_virtual_tokens), text], dim=1)
    own = cache_argument(base)
    if own is None:  # an encoder, whose classifier passes on what it does not know
        blocked = torch.finfo(base.dtype).min
        mask = torch.zeros(seen.shape, dtype=base.dtype, device=seen.device).masked_fill(seen == 0, blocked)
        given["attention_mask"] = mask[:, None, None, :].expand(-1, -1, text.shape[1], -1)
    else:
        given["attention_mask"] = seen
    given[own or cache_argument(base.base_model) or "past_key_values"] = model.get_prompt(rows)
    return base(**given).logits


def cache_argument(model: nn.Module) -> str | None:
    """The argument of a model's forward that takes a key-value cache: "cache" or "past_key_values"; None without one."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)
