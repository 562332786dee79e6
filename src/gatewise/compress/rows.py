"""Rows for three purposes: to measure on, to value ranks on, and to train on. None of them serves two."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from gatewise.adapters.loading import Loaded
from gatewise.compress.quality import LEAST_ROWS, Measure
from gatewise.compress.recovery import Recovery
from gatewise.errors import GatewiseError
from gatewise.losses import loss_kind
from gatewise.tasks import Prompting, Records
from gatewise.tasks.metrics import check_classes
from gatewise.tasks.records import Row
from gatewise.tasks.splitting import load_part

FREE_TEXT = ("generation", "chat")


@dataclass(frozen=True)
class Rows:
    """The rows that measure, those that value ranks, and those to train on."""

    held_out: Records
    scored: Records
    train: Records | None
    measure: Measure


def rows_for(
    loaded: Loaded,
    measure: Measure | None,
    tolerance: float | None,
    recovery: Recovery | None,
    score_rows: int,
    say: Callable[[str], None],
) -> Rows:
    """Deals out the rows. Rows that show a model the same count once, and are in one set only.

    Args:
        measure: None for right answers where rows have some.
        tolerance: that has to be shown; None for none.

    Raises:
        GatewiseError: too few rows, or rows that cannot be measured so.
    """
    records, template, train = loaded.records, loaded.template, None
    if loss_kind(loaded.model) == "rows":
        check_classes(loaded.model, records)
    measure = measure or ("loss" if records.kind in FREE_TEXT else "right")
    if measure == "right" and records.kind in FREE_TEXT:
        raise GatewiseError(f"{records.source} has free text, of which none is right or wrong: take --measure loss")
    held_out = _without_repeats(records, template, say)
    if recovery is None:
        scored, held_out = split(held_out, score_rows)
    else:
        train = load_part(recovery.data, recovery.split, loaded.note, labels=records.labels, columns=records.columns)
        if train.kind != records.kind:
            raise GatewiseError(f"{recovery.data} has {train.kind} rows, but {records.source} has {records.kind} rows")
        train = _without_repeats(train, template, say, set(_shown_text(records, template)))
        scored, train = split(train, score_rows)
    if tolerance is not None:
        check_enough(held_out, measure, tolerance)
    return Rows(held_out, scored, train, measure)


def _shown_text(records: Records, template: Prompting | None) -> list[str]:
    """What a model is shown of each row, whatever the spacing: its text and the choices it has, but not an id or the answer."""
    found = []
    for row in records.rows:
        shown = [template.render(row)] if template else [row.get(name) for name in ("text", "premise", "hypothesis")]
        choices = sorted(row["choices"]) if records.kind == "choice" else []
        found.append(json.dumps([" ".join(str(one).split()) for one in (*shown, *choices)]))
    return found


def _without_repeats(
    records: Records, template: Prompting | None, say: Callable[[str], None], elsewhere: Collection[str] = ()
) -> Records:
    """The first of the rows that show the same; of what rows ``elsewhere`` show, none.

    Raises:
        GatewiseError: fewer than two are left, which cannot serve two purposes.
    """
    kept: dict[str, Row] = {}
    for row, shown in zip(records.rows, _shown_text(records, template), strict=True):
        if shown not in elsewhere:
            kept.setdefault(shown, row)
    if len(kept) < 2:
        which = " that are not among the rows that measure" if elsewhere else ""
        raise GatewiseError(f"{records.source} has {len(kept)} different rows{which}: expected at least 2, give others")
    if len(kept) < len(records):
        say(f"{len(records) - len(kept)} rows of {records.source} show what other rows show and are left out")
    return replace(records, rows=list(kept.values()))


def split(records: Records, count: int) -> tuple[Records, Records]:
    """``count`` rows drawn at random, at most a quarter of all, and the others, each in their order."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = set(order[: min(count, max(1, len(records) // 4))])
    first = [row for at, row in enumerate(records.rows) if at in drawn]
    rest = [row for at, row in enumerate(records.rows) if at not in drawn]
    return replace(records, rows=first), replace(records, rows=rest)


def check_enough(records: Records, measure: Measure, tolerance: float) -> None:
    """Refuses rows that can show nothing, before long work.

    Right answers need 3 / tolerance rows, and ``LEAST_ROWS``: with fewer not even an adapter that answers all of them alike is
    within the tolerance with 95% confidence.

    Raises:
        GatewiseError: too few rows.
    """
    needed = LEAST_ROWS[measure] if measure == "loss" else max(LEAST_ROWS[measure], math.ceil(3 / tolerance))
    if len(records) < needed:
        larger = "a larger tolerance (--tolerance) " if LEAST_ROWS[measure] <= len(records) else ""
        raise GatewiseError(
            f"{records.source} has {len(records)} rows to measure on, and a tolerance of {tolerance:g} cannot be shown with fewer "
            f"than {needed}: give more rows, {larger}or ask for a size (--parameters, --modules)"
        )
