"""Phrases of a text that do not overlap, scored as a whole: a semi-Markov model (Sarawagi and Cohen, 2004).

A text of n units is parted into phrases, each of a kind, and units that are outside. The score of a parting is the sum of the
scores of its phrases; a unit outside has none. Softmax over all partings gives each its probability, so that a phrase has one
as well, and neighbours compete for it.

Shapes: b texts, n units, l lengths (1 to l units), k kinds. Scores (b, n, l, k): of the phrase that begins at a unit, with this
length and kind; -inf where it would not end within its text. All sums run in float32 or better.
"""

import torch
from torch import Tensor


def log_partition(scores: Tensor, lengths: Tensor) -> Tensor:
    """log Σ over all partings of exp(score): (b,).

    Args:
        scores: (b, n, l, k).
        lengths: (b,), units of each text.
    """
    made = _by_end(scores.logsumexp(dim=-1))
    b, n, most = made.shape
    total = [scores.new_zeros(b)]
    for end in range(1, n + 1):
        reach = min(most, end)
        before = torch.stack([total[end - length] for length in range(1, reach + 1)], dim=1)
        inside = made[:, end - 1, :reach] + before
        total.append(torch.cat([inside, total[-1][:, None]], dim=1).logsumexp(dim=1))
    return torch.stack(total, dim=1).gather(1, lengths[:, None]).squeeze(1)


def marginals(scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each phrase, (b, n, l, k), and log_partition, (b,)."""
    with torch.enable_grad():
        free = scores.detach().requires_grad_()
        total = log_partition(free, lengths)
        (found,) = torch.autograd.grad(total.sum(), free)
    return found, total.detach()


def best_phrases(scores: Tensor, lengths: Tensor) -> list[list[tuple[int, int, int]]]:
    """The parting with the largest score for each text: its phrases as (first unit, unit after the last, kind), in order."""
    kinds = scores.max(dim=-1)
    values, chosen = _by_end(kinds.values).tolist(), kinds.indices.tolist()
    found = []
    for row, length in enumerate(lengths.tolist()):
        best, back = [0.0], [0]
        for end in range(1, length + 1):
            top, step = best[-1], 0
            for size in range(1, min(len(values[row][end - 1]), end) + 1):
                value = best[end - size] + values[row][end - 1][size - 1]
                if value > top:
                    top, step = value, size
            best.append(top)
            back.append(step)
        phrases, end = [], length
        while end:
            size = back[end]
            if size:
                phrases.append((end - size, end, chosen[row][end - size][size - 1]))
            end -= size or 1
        found.append(phrases[::-1])
    return found


def _by_end(scores: Tensor) -> Tensor:
    """(b, n, l) by the first unit -> (b, n, l) by the last one, -inf where a phrase would begin before the text."""
    b, n, most = scores.shape
    columns = []
    for size in range(min(most, n)):  # a phrase of size + 1 units that ends at unit e begins at e - size
        front = scores.new_full((b, size), float("-inf"))
        columns.append(torch.cat([front, scores[:, : n - size, size]], dim=1))
    return torch.stack(columns, dim=2)
