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
    made = _by_end(_summable(scores).logsumexp(dim=-1))
    b, n, most = made.shape
    if not most:  # no phrase fits: a sum of nothing, which has a gradient all the same
        return made.sum(dim=(1, 2))
    total = [made.new_zeros(b)]
    before = made.new_zeros(
        b, most
    )  # [:, i]: of what stands before the last i + 1 units; there is no phrase of more than there are
    for end in range(n):
        inside = torch.cat([made[:, end] + before, total[-1][:, None]], dim=1)
        total.append(inside.logsumexp(dim=1))
        before = torch.cat([total[-1][:, None], before[:, :-1]], dim=1)
    return torch.stack(total, dim=1).gather(1, lengths[:, None]).squeeze(1)


def marginals(scores: Tensor, lengths: Tensor) -> Tensor:
    """The probability of each phrase: (b, n, l, k)."""
    with torch.inference_mode(False), torch.enable_grad():
        free = _summable(scores).detach().clone().requires_grad_()
        total = log_partition(free, lengths.clone())
        return torch.autograd.grad(total.sum(), free)[0]


def best_phrases(scores: Tensor, lengths: Tensor) -> list[list[tuple[int, int, int]]]:
    """The parting with the largest score for each text: its phrases as (first unit, unit after the last, kind), in order.

    A phrase has to be better than none: of equal partings it is one that leaves the last units outside.
    """
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
    return torch.stack(columns, dim=2) if columns else scores[:, :, :0]


def _summable(scores: Tensor) -> Tensor:
    """In float32 or better, and without -inf: where all terms of a sum are -inf, its logarithm has no gradient."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).clamp(min=-1e30)
