"""AB-LoRA, the score of ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187): what is lost without a rank, less what it does alone.

With S = -CE on one validation batch, M the model with all live ranks, M\\r without rank r and M_r with *only* rank r,

    IS(r) = S(M) - S(M\\r) + S(M_r)

S(M) is the same for every rank, so a score here is CE(M\\r) - CE(M_r). "exact" is the paper's loop, two forwards a rank. "screened"
takes the first-order scores of all ranks (``taylor``) and ablates only those nearest the cut, which is where an error would matter.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import Batches, GateBank, Parts, Score, Scores, parts_of, scoring
from gatewise.errors import GatewiseError

Mode = Literal["exact", "screened"]
Rank = tuple[str, int]
"""A module path and one of its slots."""
Progress = Callable[[int, int], None]


def check_mode(mode: str = "exact", **_: Any) -> None:
    """Raises GatewiseError for a mode that there is not."""
    if mode not in get_args(Mode):
        raise GatewiseError(f"ablation mode {mode!r} is not known; expected one of {', '.join(get_args(Mode))}")


@partial(
    Score,
    meaning="the loss without it less the loss with all, plus what it takes away alone",
    unit="nats",
    idle_is_zero=False,
    options={"mode": "screened", "max_exact": None},
    takes=("prune", "costs", "progress"),
    check=check_mode,
)
def ablation(
    model: nn.Module,
    batch: Batches,
    mode: Mode = "exact",
    *,
    adapter: str | None = None,
    prune: int | None = None,
    max_exact: int | None = None,
    costs: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """AB-LoRA score of every live rank.

    Args:
        batch: one validation batch (b, t) with labels, or several.
        mode: "exact" is the paper's loop; "screened" gives first-order numbers, shifted to agree with the exact ones of the ranks
            near the cut, which alone it ablates.
        prune: where "screened" puts the cut: the number of ranks to be pruned; None for an eighth of the live ranks.
        costs: path -> what a rank costs: the cut is then by score per cost, and ``prune`` what the pruned ranks cost at least.
        max_exact: at most this many ranks are ablated by "screened"; None for a 64th of the live ranks, at least 16.
        progress: called with (ranks done, ranks to do) while ranks are ablated.

    Returns:
        Path -> (live ranks,) scores CE(M\\r) - CE(M_r) in nats; the lowest are the ones to prune.

    Raises:
        GatewiseError: unknown mode, or a batch without labels.
    """
    check_mode(mode)
    with scoring(model), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        ranks = [(path, slot) for path, live in gates.live.items() for slot in live.nonzero().flatten().tolist()]
        if mode == "exact":
            values = exact(model, parts, gates, ranks, progress)
        else:
            values = torch.cat(list(taylor(model, batch, adapter=gates.adapter).values())).double()
            near = _near_the_cut(model, parts, gates, [path for path, _ in ranks], values, prune, max_exact, costs)
            if len(near):
                ablated = exact(model, parts, gates, [ranks[i] for i in near], progress)
                # What curvature does to every rank alike must not move the ablated ones across the cut.
                values += (ablated - values[near]).median()
                values[near] = ablated
        sizes = [int(live.sum()) for live in gates.live.values()]
    return dict(zip(gates.live, values.float().split(sizes), strict=True))


def exact(model: nn.Module, parts: Parts, gates: GateBank, ranks: Sequence[Rank], progress: Progress | None = None) -> Tensor:
    """(len(ranks),) scores of the ranks named, float64 on the CPU: of all, a sample, or those that a screen left undecided."""
    scores = torch.zeros(len(ranks), dtype=torch.float64)
    for index, (path, slot) in enumerate(ranks):
        gates.fill(1.0)[path][slot] = 0.0
        without = parts.loss(model)
        gates.fill(0.0)[path][slot] = 1.0
        scores[index] = without - parts.loss(model)
        if progress:
            progress(index + 1, len(ranks))
    return scores


def _near_the_cut(
    model: nn.Module,
    parts: Parts,
    gates: GateBank,
    modules: Sequence[str],
    scores: Tensor,
    prune: int | None,
    max_exact: int | None,
    costs: Mapping[str, int] | None,
) -> Tensor:
    """The places of the ranks nearest the cut by first-order ``scores``, at most ``max_exact``; none where there is no cut.

    Args:
        modules: the path of each rank's module.
    """
    limit = max(16, len(modules) // 64) if max_exact is None else max_exact
    each, idle = torch.ones_like(scores), 0.0
    if costs is not None:
        each = scores.new_tensor([costs[path] for path in modules])
        losses = []
        for value in (1.0, 0.0):
            gates.fill(value)
            losses.append(parts.loss(model))
        idle = losses[0] - losses[1]
    worth = (scores - idle) / each
    order = worth.argsort(stable=True)
    wanted = int(each.sum()) // 8 if prune is None else prune
    cut = int((each[order].cumsum(0) < wanted).sum()) + 1 if wanted else 0
    if not 0 < cut < len(modules):
        return order[:0]
    middle = (worth[order[cut - 1]] + worth[order[cut]]) / 2
    return ((worth - middle).abs() * each).argsort(stable=True)[:limit]
