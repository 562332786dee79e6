"""How good an adapter is on rows, one number a row, and whether a smaller one is as good: a paired bootstrap.

Two adapters are compared on the same rows, and only the differences row by row count: what is hard about a row is hard for both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatewise.errors import GatewiseError
from gatewise.losses import loss_kind, microbatches, row_losses
from gatewise.tasks import PadCollator, Records, Template, encode, evaluate
from gatewise.tasks.encoding import encode_classification
from gatewise.tasks.metrics import measuring, most_positions

Measure = Literal["right", "loss"]
MEASURES: tuple[str, ...] = get_args(Measure)
CONFIDENCE = 0.95
LEAST_ROWS = 150
"""Rows that measure losses. Where one row in fifty gets much worse, fewer may hold none of them, and the bootstrap cannot know."""
_DRAWS = 10_000
_TOKENS = 4096  # padded, in one forward pass that takes losses


def measure_for(records: Records) -> Measure:
    """What is measured unless told otherwise: right answers, and the loss where answers are free text."""
    return "loss" if records.kind == "generation" else "right"


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


def encoded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Records, template: Template | None, max_length: int
) -> list[dict[str, Any]]:
    """Rows as the model trains on them."""
    length = min(max_length, most_positions(model))
    if loss_kind(model) == "rows":
        return encode_classification(records, tokenizer, max_length=length)
    return [dict(row) for row in encode(records, tokenizer, template, max_length=length)]


@dataclass(frozen=True)
class Difference:
    """How much worse a smaller adapter is than the whole one, on the same rows.

    Attributes:
        mean: the mean over rows of the whole one's quality less the smaller one's; below zero where the smaller one is better.
        low, high: the interval that holds it with a confidence of 90%. So it is at most ``high`` with one of 95%.
        rows: how many were compared.
    """

    mean: float
    low: float
    high: float
    rows: int

    def within(self, tolerance: float) -> bool:
        """Whether the smaller adapter is worse by at most the tolerance, with a confidence of 95%."""
        return self.high <= tolerance


def difference(whole: Tensor, smaller: Tensor, measure: Measure = "right", seed: int = 0) -> Difference:
    """Compares two adapters by their qualities (n,) on the same rows: the percentile bootstrap of the mean difference.

    Answers that are right or wrong differ in few rows, and where they differ in none the bootstrap would be sure of that. One row
    more, on which the smaller adapter fails, keeps it from that: without any difference the bound is then 3 / n, the rule of three.
    """
    gap = whole.double() - smaller.double()
    drawn_from = gap
    if measure == "right":
        drawn_from = torch.cat([gap, torch.ones(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(seed)
    n = len(drawn_from)
    means = torch.cat(
        [
            drawn_from[torch.randint(n, (len(part), n), generator=generator)].mean(dim=1)
            for part in torch.arange(_DRAWS).split(max(1, 4_000_000 // n))
        ]
    )
    low, high = torch.quantile(means, torch.tensor([1 - CONFIDENCE, CONFIDENCE], dtype=torch.float64)).tolist()
    return Difference(float(gap.mean()), low, high, len(gap))


def rows_needed(tolerance: float) -> int:
    """The rows without which not even an adapter that answers all of them alike is within the tolerance with 95% confidence."""
    return int(3 / tolerance) + 1


def check_rows(records: Records, measure: Measure, tolerance: float) -> None:
    """Refuses rows that can show nothing, before long work: see ``rows_needed``, and ``LEAST_ROWS`` for losses.

    Raises:
        GatewiseError: too few rows.
    """
    needed = max(20, rows_needed(tolerance)) if measure == "right" else LEAST_ROWS
    if len(records) < needed:
        raise GatewiseError(
            f"{records.source} has {len(records)} rows to measure on, and a tolerance of {tolerance:g} cannot be shown with fewer "
            f"than {needed}: give more rows, or a larger tolerance (--tolerance)"
        )


def split(records: Records, count: int, seed: int) -> tuple[Records, Records]:
    """``count`` rows drawn by the seed, and the others in their order."""
    drawn = set(torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    first = [row for at, row in enumerate(records.rows) if at in drawn]
    rest = [row for at, row in enumerate(records.rows) if at not in drawn]
    return replace(records, rows=first), replace(records, rows=rest)
