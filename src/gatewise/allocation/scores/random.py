"""Numbers drawn at random, which other scores must beat: ranks are pruned and given by the same rules, and nothing is asked.

Each rank of a round has the same chance, whatever its module: its number is drawn from N(0, 1), times what a rank of its module
costs where the budget counts that, as ranks then go by score per cost. About zero, so that whole modules may go at random too.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.scoring import Batches, Score, Scores
from gatewise.allocation.slots import layers_of, live_ranks


@partial(Score, meaning="nothing: drawn at random", by_losses=False, options={}, takes=("costs", "seed"))
def random(
    model: nn.Module, batch: Batches, *, adapter: str | None = None, costs: Mapping[str, int] | None = None, seed: int = 0
) -> Scores:
    """A number for every live rank that has nothing to do with what it is worth.

    Args:
        batch: is not read.
        costs: path -> what one of its ranks costs; None for 1 each.
        seed: what is drawn comes from it alone, so that every process draws the same.

    Returns:
        Path -> (live ranks,) numbers.
    """
    name = active_adapter(model, adapter)
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(rank, generator=generator) * (1 if costs is None else costs[path])
        for path, rank in live_ranks(layers_of(model, name), name).items()
    }
