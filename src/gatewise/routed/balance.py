"""The load-balancing loss joins the loss that the base model returns, in the proportion in which a step counts it.

total = CE + balance_weight · mean over layers of L_lb (MiLoRA, arXiv 2410.18035, section 3.4), L_lb over the prompts of the batch.

Shapes: b batch, t tokens.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from gatewise.losses import IGNORED, LossKind


def with_balance(output: Any, term: Tensor, arguments: Mapping[str, Any], kind: LossKind) -> Any:
    """The output of a forward that was given ``arguments``, with ``term`` added to its loss; unchanged if it has none.

    TRL's SFTTrainer does not read the loss: it sums the log-probabilities of all labels itself and divides by their number, in
    the batch or in the step. There the term is a cost of each label, which comes to the same. TRL's other trainers (DPO, GRPO and
    so on) do other things with log-probabilities, and get none.
    """
    if isinstance(output, MutableMapping):
        loss = output.get("loss")
        if loss is None:
            return output
        if _is_for_sft(output):
            cost = term.to(output["log_probs"]) * output["label_mask"]
            output["log_probs"] = output["log_probs"] - cost
        output["loss"] = loss + (term * _share_of_step(arguments, kind)).to(loss)
        return output
    if isinstance(output, tuple) and arguments.get("labels") is not None:
        return (output[0] + (term * _share_of_step(arguments, kind)).to(output[0]), *output[1:])
    return output


def _share_of_step(arguments: Mapping[str, Any], kind: LossKind) -> Tensor | float:
    """How much of an optimiser step's loss this batch is.

    With ``num_items_in_batch``, the number of labels of all batches of the step, the model's loss is a sum divided by it, and the
    shares of the step's batches add up to one. Without it, the loss is the batch's mean, and the caller divides.
    """
    items, labels = arguments.get("num_items_in_batch"), arguments.get("shift_labels")
    if labels is None:
        labels = arguments.get("labels")
        labels = labels[..., 1:] if kind == "causal" and labels is not None else labels
    if items is None or labels is None:
        return 1.0
    return (labels != IGNORED).sum() / torch.as_tensor(items, device=labels.device)


def _is_for_sft(output: Mapping[str, Any]) -> bool:
    """Whether these are the log-probabilities that TRL's SFTTrainer asked for: by the measures that it alone asks for with them."""
    there = {name: output.get(name) is not None for name in ("log_probs", "label_mask", "is_top1", "mean_logits")}
    return there["log_probs"] and there["label_mask"] and there["is_top1"] and not there["mean_logits"]
