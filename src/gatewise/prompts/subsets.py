"""Layers chosen by what they do together: the loss of a searched network with only some of its gates open. Our own, not of SPT.

A gate's gradient says what a little more of its prompt does while the prompts of all other layers are there. The discrete model has
K of them alone. A search with ``consistency`` trains its network with random subsets of the gates, so it can be asked directly:
with many subsets S of K layers, on rows that trained no weight,

    ℓ_i = mean of L(S) over the S that hold layer i

and the K layers with the lowest ℓ are kept. The rows are the same for all subsets.
"""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

SUBSETS = 64
"""At most so many are looked at; where there are no more than that, all."""
ROWS_READ = 4096
"""Rows times subsets: what fits into about a third of the time of a short search."""


def balanced_subsets(layers: int, keep: int, seed: int = 0) -> Tensor:
    """Subsets (m, n) of ``keep`` layers, true where a layer is in; all of them if they are few, else each layer about as often."""
    if comb(layers, keep) <= SUBSETS:
        chosen = torch.tensor(list(combinations(range(layers), keep)))
    else:
        generator = torch.Generator().manual_seed(seed)
        # Each order of the layers is dealt out from its front; what is left of one is not enough for a subset.
        dealt = layers // keep
        orders = [
            torch.randperm(layers, generator=generator)[: dealt * keep].view(dealt, keep) for _ in range(-(-SUBSETS // dealt))
        ]
        chosen = torch.cat(orders)[:SUBSETS]
    return torch.zeros(len(chosen), layers, dtype=torch.bool).scatter_(1, chosen, True)


def mean_with(subsets: Tensor, losses: Tensor) -> Tensor:
    """ℓ (n,) from subsets (m, n) and their losses (m,): infinite for a layer that is in none."""
    counts = subsets.sum(dim=0)
    means = (subsets * losses[:, None]).sum(dim=0) / counts
    return torch.where(counts > 0, means, torch.inf)
