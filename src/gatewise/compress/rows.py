"""Rows for three purposes: to measure on, to value ranks on, and to train on. None of them serves two."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from gatewise.adapters.loading import Loaded
from gatewise.compress.goal import Goal
from gatewise.compress.quality import Measure, least_rows
from gatewise.compress.recovery import Recovery
from gatewise.errors import GatewiseError
from gatewise.losses import loss_kind
from gatewise.tasks import Records, Template
from gatewise.tasks.encoding import check_labelled, references
from gatewise.tasks.metrics import check_classes
from gatewise.tasks.records import Row, load_like


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
    goal: Goal,
    recovery: Recovery | None,
    score_rows: int,
    seed: int,
    say: Callable[[str], None],
) -> Rows:
    """Deals out the rows. Rows that say the same count once, and rows that show the same are in one set only.

    Raises:
        GatewiseError: too few rows, or rows that cannot be measured so.
    """
    template = loaded.template
    if loss_kind(loaded.model) == "rows":
        check_labelled(loaded.records)
        check_classes(loaded.model, loaded.records)
    records, train = _without_repeats(loaded.records, template, say), None
    measure = measure or ("loss" if records.kind == "generation" else "right")
    if measure == "right" and records.kind == "generation":
        raise GatewiseError(f"{records.source} has free text, of which none is right or wrong: take --measure loss")
    if recovery is None:
        shown = _shown_text(records, template)
        if len(set(shown)) < 2:
            rows = "1 row" if len(shown) == 1 else f"{len(shown)} rows, which all show the same"
            raise GatewiseError(f"{records.source} has {rows}: expected some to value ranks on and some to measure on")
        scored, held_out = split(records, min(score_rows, max(1, len(records) // 4)), seed, shown)
    else:
        held_out = records
        train = load_like(recovery.data, records.labels, split=recovery.split)
        if train.kind != records.kind:
            raise GatewiseError(f"{recovery.data} has {train.kind} rows, but {records.source} has {records.kind} rows")
        measuring = set(_shown_text(records, template))
        others = set(_shown_text(train, template)) - measuring
        if len(others) < 2:
            rows = f"all rows of {recovery.data}" + (" but one" if others else "")
            raise GatewiseError(f"{rows} are in {held_out.source} too, which measures: train (--recover) on other rows")
        train = _without_repeats(train, template, say, measuring)
        scored, train = split(train, min(score_rows, max(1, len(train) // 4)), seed, _shown_text(train, template))
    if not goal.has_target:
        check_enough(held_out, measure, goal.tolerance)
    return Rows(held_out, scored, train, measure)


def _shown_text(records: Records, template: Template | None) -> list[str]:
    """What a model is shown of each row, whatever the spacing: its text and the choices it has. An id does not count."""
    found = []
    for row in records.rows:
        shown = [template.render(row)] if template else [row.get(name) for name in ("text", "premise", "hypothesis")]
        choices = sorted(row["choices"]) if records.kind == "choice" else []
        found.append(json.dumps([" ".join(str(one).split()) for one in (*shown, *choices)]))
    return found


def _answers(records: Records, row: Row) -> list[str]:
    if records.kind == "choice":
        answers = [row["choices"][records.gold_index(row)]]
    else:
        answers = references(row) if records.kind == "generation" else [row["label" if records.kind == "label" else "answer"]]
    return [" ".join(str(one).split()) for one in answers]


def _without_repeats(
    records: Records, template: Template | None, say: Callable[[str], None], apart_from: Collection[str] = ()
) -> Records:
    """The rows that say, with their answer, what no row before them says.

    Args:
        apart_from: what the rows of another set show. Rows that show it too are left out, whatever their answer.
    """
    kept, seen = [], set()
    for row, shown in zip(records.rows, _shown_text(records, template), strict=True):
        said = json.dumps([shown, _answers(records, row)])
        if shown not in apart_from and said not in seen:
            seen.add(said)
            kept.append(row)
    if len(kept) < len(records):
        say(f"{len(records) - len(kept)} rows of {records.source} say what other rows say and are left out")
    return replace(records, rows=kept)


def split(records: Records, count: int, seed: int, alike: Sequence[str] | None = None) -> tuple[Records, Records]:
    """``count`` rows drawn by the seed, and the others in their order.

    Args:
        alike: a key for each row. Rows with the same key are on the same side, for which fewer than ``count`` may be drawn, or more
            where each key has more rows.
    """
    groups: dict[str | int, list[int]] = {}
    for at in range(len(records)):
        groups.setdefault(at if alike is None else alike[at], []).append(at)
    together, drawn = list(groups.values()), set[int]()
    for number in torch.randperm(len(together), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(drawn) + len(together[number]) <= count:
            drawn.update(together[number])
    if not drawn:
        fewest = min(together, key=len)
        drawn.update(fewest)
    first = [row for at, row in enumerate(records.rows) if at in drawn]
    rest = [row for at, row in enumerate(records.rows) if at not in drawn]
    return replace(records, rows=first), replace(records, rows=rest)


def check_enough(records: Records, measure: Measure, tolerance: float) -> None:
    """Refuses rows that can show nothing, before long work.

    Right answers need 3 / tolerance rows: with fewer not even an adapter that answers all of them alike is within the tolerance
    with 95% confidence. Losses need ``quality.LEAST_ROWS``.

    Raises:
        GatewiseError: too few rows.
    """
    least = least_rows(measure)
    needed = least if measure == "loss" else max(least, math.ceil(3 / tolerance))
    if len(records) < needed:
        answers = "losses" if measure == "loss" else "right answers"
        what = f"a tolerance of {tolerance:g}" if needed > least else f"that {answers} are as good"
        more = "rows" if len(records) < least else "rows, or a larger tolerance (--tolerance)"
        raise GatewiseError(
            f"{records.source} has {len(records)} rows to measure on, and {what} cannot be shown with fewer than {needed}: "
            f"give more {more}"
        )
