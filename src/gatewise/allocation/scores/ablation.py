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

from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores import Score
from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import Batches, Scores, losses_without_and_with, parts_of, scoring
from gatewise.allocation.slots import live_slots
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError

Mode = Literal["exact", "screened"]
MODES: tuple[str, ...] = get_args(Mode)
Rank = tuple[str, int]
"""A module path and one of its slots."""
Progress = Callable[[int, int], None]


def check_options(mode: str = "exact", prune: int | None = None, max_exact: int | None = None, **_: Any) -> None:
    """Raises GatewiseError for a mode that there is not, or numbers of ranks that are none."""
    for name, number in (("prune", prune), ("max_exact", max_exact)):
        if number is not None and not (is_whole(number) and number >= 0):
            raise GatewiseError(f"{name} is {number!r}; expected a number of ranks, at least 0")
    if mode not in MODES:
        raise GatewiseError(f"ablation mode {mode!r} is not known; expected one of {', '.join(MODES)}")


@partial(
    Score,
    meaning="the loss without it less the loss with all, plus what it takes away alone",
    unit="nats",
    idle_is_zero=False,
    options={"mode": "screened", "prune": None, "max_exact": None, "float32": True},
    takes=("prune", "costs", "progress"),
    check=check_options,
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
    float32: bool = True,
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
        float32: score in float32 even if the weights are in half precision.
        progress: called with (ranks done, ranks to do) while ranks are ablated.

    Returns:
        Path -> (live ranks,) scores CE(M\\r) - CE(M_r) in nats; the lowest are the ones to prune.

    Raises:
        GatewiseError: unknown mode, or a batch without labels.
    """
    check_options(mode, prune, max_exact)
    with scoring(model, float32), GateBank(model, adapter) as gates:
        live = {path: live_slots(layer, gates.adapter) for path, layer in gates.layers.items()}
        ranks = [(path, slot) for path, slots in live.items() for slot in slots]
        if mode == "exact":
            values = exact(model, batch, gates, ranks, progress)
        else:
            values = _screened(model, batch, gates, ranks, prune, max_exact, costs, progress)
    return dict(zip(live, values.float().split(list(map(len, live.values()))), strict=True))


def exact(model: nn.Module, batch: Batches, gates: GateBank, ranks: Sequence[Rank], progress: Progress | None = None) -> Tensor:
    """(len(ranks),) scores of the ranks named, float64 on the CPU: of all, a sample, or those that a screen left undecided."""
    scores = torch.zeros(len(ranks), dtype=torch.float64)
    parts = parts_of(model, batch)
    for index, (path, slot) in enumerate(ranks):
        without = gates.like(path, 1.0)
        without[slot] = 0.0
        gates.assign(path, without)
        loss_without = parts.loss(model)
        gates.assign(path, 1.0 - without)
        with gates.only({path}):
            scores[index] = loss_without - parts.loss(model)
        gates.open()
        if progress:
            progress(index + 1, len(ranks))
    return scores


def _screened(
    model: nn.Module,
    batch: Batches,
    gates: GateBank,
    ranks: Sequence[Rank],
    prune: int | None,
    max_exact: int | None,
    costs: Mapping[str, int] | None,
    progress: Progress | None,
) -> Tensor:
    """First-order scores (len(ranks),) of all live ranks, with those nearest the cut ablated exactly; float64 on the CPU.

    The median difference between exact and first order among the ablated ranks is added to all the others: what curvature does
    to every rank alike must not move the ablated ones across the cut.
    """
    scores = torch.cat(list(taylor(model, batch, adapter=gates.adapter).values())).double()
    limit = max(16, len(ranks) // 64) if max_exact is None else max_exact
    each, idle = torch.ones_like(scores), 0.0
    if costs is not None:
        each = scores.new_tensor([costs[path] for path, _ in ranks])
        without, whole = losses_without_and_with(model, batch, gates.adapter)
        idle = whole - without
    worth = (scores - idle) / each
    order = worth.argsort(stable=True)
    wanted = int(each.sum()) // 8 if prune is None else prune
    cut = int((each[order].cumsum(0) < wanted).sum()) + 1 if wanted else 0
    if 0 < cut < len(ranks) and limit > 0:
        middle = (worth[order[cut - 1]] + worth[order[cut]]) / 2
        near = ((worth - middle).abs() * each).argsort(stable=True)[:limit]
        ablated = exact(model, batch, gates, [ranks[i] for i in near], progress)
        scores += (ablated - scores[near]).median()
        scores[near] = ablated
    return scores
