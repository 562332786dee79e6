"""Layers chosen by what they do together: the loss of a searched network with only some of its gates open. Our own, not of SPT.

A gate's gradient says what a little more of its prompt does, where the discrete model has all of it or none. A search with
``consistency`` trains its network with random subsets of the gates left out, so it can be asked directly: with many subsets S of K
layers, on rows that trained no weight,

    ℓ_i = mean of L(S) over the S that hold layer i

and the K layers with the lowest ℓ are kept. The rows are the same for all subsets. The gates in S stay as the search left them, as
the generators know them, where the discrete model has ones; and the network knows subsets of about (1 − ``drop``) n layers best, so
a ``drop`` near 1 − K / n suits this choice.
"""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

SUBSETS = 64
"""About so many are looked at; where there are no more than that, all."""
ROWS_READ = 4096
"""Rows times subsets, at most."""


def balanced_subsets(layers: int, keep: int, seed: int = 0) -> Tensor:
    """Subsets (m, n) of ``keep`` layers, true where a layer is in; all of them if they are few, else each layer about as often.

    Args:
        keep: less than ``layers``.
    """
    if comb(layers, keep) <= SUBSETS:
        chosen = torch.tensor(list(combinations(range(layers), keep)))
        return torch.zeros(len(chosen), layers, dtype=torch.bool).scatter_(1, chosen, True)
    if 2 * keep > layers:  # then it is the layers left out that are dealt
        return ~balanced_subsets(layers, layers - keep, seed)
    generator = torch.Generator().manual_seed(seed)
    # Orders of the layers on end, each drawn anew, are dealt out from the front; a layer that would come twice waits for the next.
    waiting: list[int] = []
    dealt: list[list[int]] = []
    while len(dealt) < max(SUBSETS, -(-layers // keep)) or len(waiting) >= keep:
        if len(waiting) < keep:
            waiting += torch.randperm(layers, generator=generator).tolist()
        dealt.append(list(dict.fromkeys(waiting))[:keep])
        for layer in dealt[-1]:
            waiting.remove(layer)
    return torch.zeros(len(dealt), layers, dtype=torch.bool).scatter_(1, torch.tensor(dealt), True)


def mean_with(subsets: Tensor, losses: Tensor) -> Tensor:
    """ℓ (n,) from subsets (m, n), which hold every layer, and their losses (m,)."""
    return (subsets * losses[:, None]).sum(dim=0) / subsets.sum(dim=0)
