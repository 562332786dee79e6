"""How good an adapter is on rows, one number a row, and whether a smaller one is as good: a paired bootstrap.

Two adapters are compared on the same rows, and only the differences row by row count: what is hard about a row is hard for both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gatewise.adapters.loading import Loaded
from gatewise.losses import loss_kind, microbatches, row_losses
from gatewise.tasks import PadCollator, Records, evaluate
from gatewise.tasks.metrics import cut_line, encoded, measuring

Measure = Literal["right", "loss"]
CONFIDENCE = 0.95
LEAST_ROWS: dict[Measure, int] = {"right": 20, "loss": 150}
"""Fewer rows have no bound. Where one row in fifty loses much more, fewer than 150 may hold none, and the bootstrap cannot know."""
_DRAWS = 10_000
_TOKENS = 4096  # padded, in one forward pass that takes losses


def qualities(
    loaded: Loaded,
    records: Records,
    measure: Measure,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Tensor:
    """(n,) one number a row, higher is better: 1 for a right answer and 0 for another, or minus the loss (nats a token).

    Args:
        say: told how many answers were cut.
    """
    model, tokenizer, template, max_length = loaded.model, loaded.tokenizer, loaded.template, loaded.max_length
    if measure == "right":
        answers: list[dict[str, Any]] = []
        most = loaded.note.get("max_new_tokens")
        evaluate(
            model, tokenizer, records, template, max_length=max_length, max_new_tokens=most, progress=progress, answers=answers
        )
        if line := cut_line(answers, "data.max_new_tokens of the adapter's run"):
            say(line)
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
        high: with a confidence of 95% it is no more than this. NaN where there are fewer than ``LEAST_ROWS``.
        rows: how many were compared.
    """

    mean: float
    high: float
    rows: int

    def within(self, tolerance: float) -> bool:
        """Whether the smaller adapter is worse by at most the tolerance, with a confidence of 95%."""
        return self.high <= tolerance

    def __str__(self) -> str:
        found, most = ("better", "worse at most by") if self.mean < 0 else ("worse", "at most by")
        bound = "too few rows to say at most how much" if math.isnan(self.high) else f"{most} {self.high:.4f} with 95% confidence"
        return f"{found} by {abs(self.mean):.4f}, {bound}"


def difference(whole: Tensor, smaller: Tensor, measure: Measure = "right", seed: int = 0) -> Difference:
    """``differences`` for one adapter."""
    return differences(whole, [smaller], measure, seed)[0]


def differences(whole: Tensor, smaller: Sequence[Tensor], measure: Measure = "right", seed: int = 0) -> list[Difference]:
    """Compares adapters with the whole one by their qualities (n,) on the same rows: the percentile bootstrap of mean differences.

    The bounds of several hold together: with a confidence of 95% none of the true differences is above its own. So whichever is
    picked for its bound keeps it. Each draw of rows is the same for all of them; it counts by the one whose mean is highest among
    its own draws, and all bounds lie at the one rank that 95% of the draws stay within (Besag's simultaneous bounds). Adapters that
    fail on the same rows cost hardly more than one.

    What is rare is seldom among the rows: where answers differ in none of them the bootstrap would be sure of that, and of losses
    it would see too short a tail. So one row more is drawn from, on which the smaller adapter fails, or loses as much as on the
    worst row there is. For equal answers the bound is then 3 / n, the rule of three.
    """
    gaps = torch.stack([whole.double() - one.double() for one in smaller])
    unseen = torch.ones_like(gaps[:, :1]) if measure == "right" else gaps.amax(dim=1, keepdim=True).clamp_min(0.0)
    drawn_from = torch.cat([gaps, unseen], dim=1)
    generator = torch.Generator().manual_seed(seed)
    n = drawn_from.shape[1]
    parts = []
    for part in torch.arange(_DRAWS).split(max(1, 4_000_000 // n)):
        rows = torch.randint(n, (len(part), n), generator=generator)
        parts.append(torch.stack([one[rows].mean(dim=1) for one in drawn_from]))
    means = torch.cat(parts, dim=1)
    in_order = means.sort(dim=1).values
    ranks = torch.searchsorted(in_order, means, right=True)  # of equal means the last
    rank = int(ranks.amax(dim=0).sort().values[math.ceil(CONFIDENCE * _DRAWS) - 1])
    bounds = in_order[:, rank - 1] if len(whole) >= LEAST_ROWS[measure] else torch.full((len(gaps),), math.nan)
    return [Difference(float(gap.mean()), float(high), len(gap)) for gap, high in zip(gaps, bounds, strict=True)]
