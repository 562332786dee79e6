"""Phrases against all partings of a text, one by one."""

import math
from collections.abc import Iterator

import pytest
import torch
from gatewise_mdt.pointing.chart import best_phrases, log_partition, marginals

Phrases = list[tuple[int, int, int]]
INFINITY = float("inf")


def partings(n: int, longest: int, kinds: int) -> Iterator[Phrases]:
    """All ways to put phrases that do not overlap into n units."""
    if n == 0:
        yield []
        return
    for before in partings(n - 1, longest, kinds):
        yield before
    for size in range(1, min(longest, n) + 1):
        for before in partings(n - size, longest, kinds):
            for kind in range(kinds):
                yield [*before, (n - size, n, kind)]


def score(row: torch.Tensor, phrases: Phrases) -> float:
    return sum(float(row[begin, end - begin - 1, kind]) for begin, end, kind in phrases)


def random_scores(b: int, n: int, longest: int, kinds: int, lengths: list[int], seed: int) -> torch.Tensor:
    """With -inf where a phrase would not end within its text, and for some others."""
    torch.manual_seed(seed)
    made = torch.randn(b, n, longest, kinds, dtype=torch.float64)
    made[torch.rand_like(made) < 0.15] = -INFINITY
    begin, size = torch.arange(n)[:, None], torch.arange(1, longest + 1)[None]
    outside = (begin + size)[None] > torch.tensor(lengths)[:, None, None]
    return made.masked_fill(outside[..., None], -INFINITY)


SHAPES = [
    ([5, 3, 1, 0], 5, 3, 2),
    ([4, 4], 4, 1, 3),
    ([2, 3], 3, 5, 2),  # phrases longer than the texts
    ([1], 1, 4, 2),
    ([0, 0], 0, 3, 2),
    ([3], 3, 0, 2),
]


@pytest.mark.parametrize(("lengths", "n", "longest", "kinds"), SHAPES)
def test_everything_is_as_over_all_partings(lengths: list[int], n: int, longest: int, kinds: int) -> None:
    scores = random_scores(len(lengths), n, longest, kinds, lengths, n)
    total = log_partition(scores, torch.tensor(lengths))
    found = marginals(scores, torch.tensor(lengths))
    best = best_phrases(scores, torch.tensor(lengths))
    assert found.shape == scores.shape
    for row, length in enumerate(lengths):
        every = [(score(scores[row], phrases), phrases) for phrases in partings(length, longest, kinds)]
        assert float(total[row]) == pytest.approx(math.log(sum(math.exp(value) for value, _ in every)))
        expected = torch.zeros_like(scores[row])
        for value, phrases in every:
            for begin, end, kind in phrases:
                expected[begin, end - begin - 1, kind] += math.exp(value - float(total[row]))
        assert torch.allclose(found[row], expected)
        assert best[row] == max(every, key=lambda item: item[0])[1]


def test_padding_and_the_company_of_longer_texts_change_nothing() -> None:
    short = random_scores(1, 4, 3, 2, [4], 1)
    batch = torch.randn(2, 9, 3, 2, dtype=torch.float64)  # finite even where no text is
    batch[0, :4] = short[0]
    lengths = torch.tensor([4, 9])
    assert torch.allclose(log_partition(batch, lengths)[:1], log_partition(short, lengths[:1]))
    assert best_phrases(batch, lengths)[0] == best_phrases(short, lengths[:1])[0]
    found = marginals(batch, lengths)
    assert torch.allclose(found[0, :4], marginals(short, lengths[:1])[0])
    assert not found[0, 4:].any()


@pytest.mark.parametrize(("lengths", "n", "longest", "kinds"), SHAPES)
def test_gradients_are_the_marginals_and_finite(lengths: list[int], n: int, longest: int, kinds: int) -> None:
    scores = random_scores(len(lengths), n, longest, kinds, lengths, 7).requires_grad_()
    log_partition(scores, torch.tensor(lengths)).sum().backward()
    assert scores.grad is not None
    assert torch.allclose(scores.grad, marginals(scores, torch.tensor(lengths)))
    impossible = torch.full_like(scores, -INFINITY).requires_grad_()
    log_partition(impossible, torch.tensor(lengths)).sum().backward()
    assert impossible.grad is not None
    assert not impossible.grad.any()


def test_ties_and_scores_that_are_no_numbers_leave_units_outside() -> None:
    lengths = torch.tensor([3])
    assert best_phrases(torch.zeros(1, 3, 2, 2), lengths) == [[]]
    assert best_phrases(torch.full((1, 3, 2, 2), float("nan")), lengths) == [[]]
    scores = torch.zeros(1, 3, 2, 2)
    scores[0, 0, 0, 1] = scores[0, 1, 0, 0] = 1
    scores[0, 0, 1] = 2  # one phrase of both is as good
    assert best_phrases(scores, lengths)[0] in ([(0, 1, 1), (1, 2, 0)], [(0, 2, 0)])


def test_low_precision_is_summed_in_float32() -> None:
    scores = random_scores(1, 60, 4, 3, [60], 3).bfloat16()
    lengths = torch.tensor([60])
    total = log_partition(scores, lengths)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(log_partition(scores.double(), lengths)), rel=1e-5)


def test_marginals_in_inference_mode() -> None:
    with torch.inference_mode():
        scores, lengths = random_scores(1, 4, 2, 2, [4], 2), torch.tensor([4])
        found = marginals(scores, lengths)
    assert torch.allclose(found, marginals(scores.clone(), lengths.clone()))
