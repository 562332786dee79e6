"""How good an adapter is on rows, one number a row, and whether a smaller one is as good: a paired bootstrap.

Two adapters are compared on the same rows, and only the differences row by row count: what is hard about a row is hard for both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatewise.losses import loss_kind, microbatches, row_losses
from gatewise.tasks import PadCollator, Records, Template, evaluate
from gatewise.tasks.metrics import encoded, measuring

Measure = Literal["right", "loss"]
MEASURES: tuple[str, ...] = get_args(Measure)
CONFIDENCE = 0.95
LEAST_ROWS = 150
"""Rows that measure losses. Where one row in fifty gets much worse, fewer may hold none of them, and the bootstrap cannot know."""
_LEAST_ANSWERS = 20  # rows that measure right answers, whatever the tolerance
_DRAWS = 10_000
_TOKENS = 4096  # padded, in one forward pass that takes losses


def qualities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Records,
    template: Template | None,
    measure: Measure,
    *,
    max_length: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(n,) one number a row, higher is better: 1 for a right answer and 0 for another, or minus the loss (nats a token)."""
    if measure == "right":
        answers: list[dict[str, Any]] = []
        evaluate(model, tokenizer, records, template, max_length=max_length, progress=progress, answers=answers)
        return torch.tensor([float(one["right"]) for one in answers], dtype=torch.float64)
    features = encoded(model, tokenizer, records, template, max_length)
    order = sorted(range(len(features)), key=lambda row: -len(features[row]["input_ids"]))
    collate, device = PadCollator(tokenizer), next(model.parameters()).device
    found = torch.zeros(len(features), dtype=torch.float64)
    with measuring(model):
        for start in range(0, len(order), 16):
            rows = order[start : start + 16]
            batch: dict[str, Any] = dict(collate([features[row] for row in rows]))
            batch["at"] = torch.tensor(rows)
            for part in microbatches(batch, _TOKENS, loss_kind(model)):
                at = part.pop("at")
                sums, counts = row_losses(model, {key: value.to(device) for key, value in part.items()})
                found[at] = -(sums.double().cpu() / counts.cpu())
            if progress:
                progress(min(start + 16, len(order)), len(order))
    return found


@dataclass(frozen=True)
class Difference:
    """How much worse a smaller adapter is than the whole one, on the same rows.

    Attributes:
        mean: the mean over rows of the whole one's quality less the smaller one's; below zero where the smaller one is better.
        low, high: it is at most ``high`` with a confidence of 95%, and at least ``low`` with one of 95%. NaN where there are too
            few rows for a bound, see ``least_rows``.
        rows: how many were compared.
    """

    mean: float
    low: float
    high: float
    rows: int

    def within(self, tolerance: float) -> bool:
        """Whether the smaller adapter is worse by at most the tolerance, with a confidence of 95%."""
        return self.high <= tolerance

    @property
    def at_most(self) -> str:
        """The upper bound in words."""
        return "too few rows to say at most how much" if math.isnan(self.high) else f"at most by {self.high:.4f}"


def difference(whole: Tensor, smaller: Tensor, measure: Measure = "right", seed: int = 0) -> Difference:
    """Compares two adapters by their qualities (n,) on the same rows: ``differences`` of one; bounds need ``least_rows``."""
    found = differences(whole, [smaller], measure, seed)[0]
    return found if len(whole) >= least_rows(measure) else replace(found, low=math.nan, high=math.nan)


def differences(whole: Tensor, smaller: Sequence[Tensor], measure: Measure = "right", seed: int = 0) -> list[Difference]:
    """Compares adapters with the whole one by their qualities (n,) on the same rows: the percentile bootstrap of mean differences.

    The bounds of several hold together: with a confidence of 95% none of the true differences is above its own. So whichever is
    picked for its bound keeps it. Each draw of rows is the same for all of them; it counts by the one whose mean is highest among
    its own draws, and all bounds lie at the one rank that 95% of the draws stay within (Besag's simultaneous bounds). Adapters that
    fail on the same rows cost hardly more than one.

    What is rare is seldom among the rows: where answers differ in none of them the bootstrap would be sure of that, and of losses
    it would see too short a tail. So one row more is drawn from, on which the smaller adapter fails, or loses as much as on the
    worst row there is. For equal answers the bound is then 3 / n, the rule of three. For the lower bound that row is one on
    which the whole adapter fails.
    """
    gaps = torch.stack([whole.double() - one.double() for one in smaller])
    both = torch.cat([gaps, -gaps])
    unseen = torch.ones_like(both[:, :1]) if measure == "right" else both.amax(dim=1, keepdim=True).clamp_min(0.0)
    drawn_from = torch.cat([both, unseen], dim=1)
    generator = torch.Generator().manual_seed(seed)
    n = drawn_from.shape[1]
    parts = []
    for part in torch.arange(_DRAWS).split(max(1, 4_000_000 // n)):
        rows = torch.randint(n, (len(part), n), generator=generator)
        parts.append(torch.stack([one[rows].mean(dim=1) for one in drawn_from]))
    means = torch.cat(parts, dim=1)
    high, low = _at_one_rank(means[: len(gaps)]), -_at_one_rank(means[len(gaps) :])
    return [
        Difference(float(gap.mean()), float(bottom), float(top), len(gap)) for gap, bottom, top in zip(gaps, low, high, strict=True)
    ]


def _at_one_rank(draws: Tensor) -> Tensor:
    """(k,) of draws (k, m): the values at the least rank for which a share CONFIDENCE of the m columns are all at it or below."""
    in_order = draws.sort(dim=1).values
    ranks = torch.searchsorted(in_order, draws.contiguous(), right=True)  # of equal ones the last
    rank = int(ranks.amax(dim=0).sort().values[math.ceil(CONFIDENCE * draws.shape[1]) - 1])
    return in_order[:, rank - 1]


def least_rows(measure: Measure) -> int:
    """The rows without which nothing can be said with 95% confidence, see ``LEAST_ROWS``."""
    return LEAST_ROWS if measure == "loss" else _LEAST_ANSWERS
