"""How far a metric can be trusted: 95% bootstrap intervals over passages (Efron, Annals of Statistics 7, 1979; percentile method).

A draw takes as many passages as there are, with replacement, sums up their counts, and computes every metric from the sums, as
``metrics`` does from those of all passages. An interval runs from the 2.5th to the 97.5th percentile of a metric over the draws.

Passages of one document are alike and are drawn one by one, so that an interval says nothing of how much documents differ. Of few
passages, or where all are right or all wrong, it is too narrow.
"""

from collections.abc import Callable

import numpy as np

from gatewise_mdt.evaluation.metrics import Counts, rates

DRAWS = 2000


def intervals(
    counts: Counts, *, of: Callable[[Counts], Counts] = rates, draws: int = DRAWS, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Metric -> its interval, as ``low`` and ``high``; equal for equal seeds.

    Args:
        counts: of n passages, from :func:`gatewise_mdt.evaluation.metrics.count_trees`.
        of: the metrics of summed up counts, NaN where one is not defined.

    Returns:
        Nothing at all for a single passage, of which every draw is the same. A draw in which a metric is not defined does not
        count for it, and a metric that is defined in none is left out.
    """
    table = np.stack(list(counts.values()), axis=1).astype(np.float64)  # (n, counts); sums of whole numbers stay exact
    n = len(table)
    if n < 2:
        return {}
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)  # how often a draw has each passage
    totals = dict(zip(counts, (times @ table).T, strict=True))
    defined = {name: values[~np.isnan(values)] for name, values in of(totals).items()}
    ends = {name: np.percentile(values, (2.5, 97.5)) for name, values in defined.items() if len(values)}
    return {name: {"low": float(low), "high": float(high)} for name, (low, high) in ends.items()}
