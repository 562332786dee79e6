"""AB-LoRA, the score of ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187): what is lost without a rank, less what it does alone.

With S = -CE on one validation batch, M the model with all live ranks, M\\r without rank r and M_r with *only* rank r,

    IS(r) = S(M) - S(M\\r) + S(M_r)

S(M) is the same for every rank, so a score here is CE(M\\r) - CE(M_r). This file has the paper's loop, two full forwards a rank,
kept as the reference. ``gatewise.allocation.fast_ablation`` comes to the same numbers faster.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gatewise.allocation import fast_ablation
from gatewise.allocation.fast_ablation import Rank
from gatewise.allocation.gates import GateBank
from gatewise.allocation.scoring import Batches, Scores, as_batches, as_read, scoring
from gatewise.allocation.slots import live_slots
from gatewise.checks import is_whole
from gatewise.errors import GatewiseError
from gatewise.losses import mean_loss

MEANING = "the loss without it less the loss with all, plus what it takes away alone"
UNIT = "nats"
FROM_BASE = True
IN_ROUNDS = {"mode": "screened"}

Mode = Literal["exact", "naive", "screened"]
MODES: tuple[str, ...] = get_args(Mode)


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
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """AB-LoRA score of every live rank.

    Args:
        batch: one validation batch (b, t) with labels, or several.
        mode: "naive" is the paper's loop; "exact" gives the same numbers faster; "screened" gives first-order numbers, shifted to
            agree with the exact ones of the ranks near the cut, which alone it ablates.
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
    layers, name = (bank := GateBank(model, adapter)).layers, bank.adapter
    ranks: list[Rank] = [(path, slot) for path, layer in layers.items() for slot in live_slots(layer, name)]
    settings: dict[str, Any] = {"adapter": name, "float32": float32, "progress": progress}
    if mode == "naive":
        values = naive(model, batch, ranks, **settings)
    elif mode == "exact":
        values = fast_ablation.exact(model, batch, ranks, **settings)
    else:
        values = fast_ablation.screened(model, batch, ranks, prune=prune, max_exact=max_exact, costs=costs, **settings)
    parts = values.float().split([sum(path == at for at, _ in ranks) for path in layers])
    return dict(zip(layers, parts, strict=True))


def naive(
    model: nn.Module,
    batch: Batches,
    ranks: Sequence[Rank],
    *,
    adapter: str | None = None,
    float32: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """(len(ranks),) scores of the ranks named, float64 on the CPU, by the paper's loop: two forwards of the whole batch a rank."""
    scores = torch.zeros(len(ranks), dtype=torch.float64)
    with torch.no_grad(), scoring(model, float32), GateBank(model, adapter) as gates:
        batches = [as_read(one, model) for one in as_batches(batch)]
        for index, (path, slot) in enumerate(ranks):
            gates.fill(1.0)[path][slot] = 0.0
            without = mean_loss(model, batches)
            gates.fill(0.0)[path][slot] = 1.0
            scores[index] = without - mean_loss(model, batches)
            if progress:
                progress(index + 1, len(ranks))
    return scores


def check_options(mode: str = "exact", prune: int | None = None, max_exact: int | None = None, **_: Any) -> None:
    """Raises GatewiseError for a mode that there is not, or numbers of ranks that are none."""
    for name, number in (("prune", prune), ("max_exact", max_exact)):
        if number is not None and not (is_whole(number) and number >= 0):
            raise GatewiseError(f"{name} is {number!r}; expected a number of ranks, at least 0")
    if mode not in MODES:
        raise GatewiseError(f"ablation mode {mode!r} is not known; expected one of {', '.join(MODES)}")
