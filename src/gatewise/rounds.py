"""What the rounds of rank allocation saw and did, and what that means for the next one: smoothed scores, ranks too new to prune."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """What one round saw and did.

    Attributes:
        round: 1 for the first.
        step: the optimiser step after which it ran.
        scores: path -> score of each rank that was live, in the order of ``slots``, before any smoothing.
        slots: path -> the slots that were live.
        pruned: path -> slots switched off.
        grown: path -> slots brought to life.
        ranks: path -> live ranks after the round.
        loss_before, loss_after: cross-entropy (nats) on the validation batch before and right after pruning.
        seconds: what the round cost.
    """

    round: int
    step: int
    scores: dict[str, list[float]]
    slots: dict[str, list[int]]
    pruned: dict[str, list[int]]
    grown: dict[str, list[int]]
    ranks: dict[str, int]
    loss_before: float
    loss_after: float
    seconds: float


def smoothed(
    history: Sequence[Round], live: Mapping[str, list[int]], scores: Mapping[str, list[float]], smoothing: float
) -> dict[str, list[float]]:
    """The scores a round decides by: an exponential mean over the rounds each rank has lived through.

    smoothing * (the mean so far) + (1 - smoothing) * (its score now); a rank that was not live in the round before starts with
    its score. Computed from the history alone, so that a resumed run needs nothing else.

    Args:
        live: path -> live slots now, in the order of ``scores``.
    """
    if not smoothing:
        return dict(scores)
    mean: dict[tuple[str, int], float] = {}
    for one in history:
        mean = _mixed(mean, one.slots, one.scores, smoothing)
        for path, dead in one.pruned.items():
            for slot in dead:
                del mean[path, slot]  # should the slot come to life again it holds another rank
    mean = _mixed(mean, live, scores, smoothing)
    return {path: [mean[path, slot] for slot in live[path]] for path in scores}


def _mixed(
    mean: Mapping[tuple[str, int], float],
    live: Mapping[str, list[int]],
    scores: Mapping[str, list[float]],
    smoothing: float,
) -> dict[tuple[str, int], float]:
    now = {(path, slot): value for path in scores for slot, value in zip(live[path], scores[path], strict=True)}
    return {rank: smoothing * mean[rank] + (1 - smoothing) * value if rank in mean else value for rank, value in now.items()}


def spared(history: Sequence[Round], live: Mapping[str, list[int]], grace_rounds: int) -> dict[str, set[int]]:
    """Path -> positions among its live slots of the ranks grown in the last ``grace_rounds`` rounds."""
    young: dict[str, set[int]] = {}
    for one in history[-grace_rounds:] if grace_rounds else []:
        for path, grown in one.grown.items():
            young.setdefault(path, set()).update(grown)
    return {path: {at for at, slot in enumerate(live[path]) if slot in new} for path, new in young.items()}
