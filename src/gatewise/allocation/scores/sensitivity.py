"""AdaLoRA's sensitivity score (Zhang et al., arXiv 2303.10512, eqs. 7-10), the baseline.

For a parameter w: I(w) = |w dCE/dw|. A rank of LoRA has no singular value, so its gate (1 when on) stands for it:

    S(r) = s(gate_r) + mean over row r of A of s(w) + mean over column r of B of s(w)

With one batch s = I. With several, AdaLoRA's smoothing over time runs over them in order: I_bar = b1 I_bar + (1 - b1) I,
U_bar = b2 U_bar + (1 - b2) |I - I_bar|, s = I_bar U_bar.
"""

from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores import Score
from gatewise.allocation.scoring import Batches, Scores, as_batches, gate_gradients, live_only, parts_of, scoring
from gatewise.allocation.slots import by_slot, factors


@partial(
    Score,
    meaning="AdaLoRA's |weight x gradient|, never below zero",
    options={"beta1": 0.85, "beta2": 0.85, "float32": None},
)
def sensitivity(
    model: nn.Module,
    batch: Batches,
    *,
    adapter: str | None = None,
    beta1: float = 0.85,
    beta2: float = 0.85,
    float32: bool | None = None,
) -> Scores:
    """AdaLoRA's score of every live rank.

    Cost: one forward and one backward pass a batch.

    Args:
        batch: one batch (b, t) with labels, or several, over which the sensitivities are smoothed.
        beta1, beta2: smoothing of the sensitivity and of its uncertainty.
        float32: whether half-precision weights are scored in float32; None where that is needed, see ``scoring``.

    Returns:
        Path -> (live ranks,) scores, never negative.
    """
    batches = as_batches(batch)
    with scoring(model, float32), GateBank(model, adapter) as gates, ExitStack() as stack:
        leaves: dict[str, Tensor] = {}
        names: dict[str, tuple[str, str]] = {}  # path -> what A and B are called among the leaves; experts share theirs
        for path, layer in gates.layers.items():
            both = factors(layer, gates.adapter)
            names[path] = f"A:{id(both[0])}", f"B:{id(both[1])}"
            for name, weight in zip(names[path], both, strict=True):
                if name not in leaves:
                    stack.callback(weight.requires_grad_, weight.requires_grad)
                    leaves[name] = weight.requires_grad_(True)
        mean: dict[str, Tensor] = {}
        spread: dict[str, Tensor] = {}
        for one in batches:
            leaves.update(gates.fill(1.0, requires_grad=True))
            gradients, _ = gate_gradients(model, parts_of(model, one), leaves)
            for name, gradient in gradients.items():
                now = (leaves[name].detach() * gradient).abs()
                mean[name] = beta1 * mean[name] + (1 - beta1) * now if name in mean else (1 - beta1) * now
                change = (now - mean[name]).abs()
                spread[name] = beta2 * spread[name] + (1 - beta2) * change if name in spread else (1 - beta2) * change
                if len(batches) == 1:
                    mean[name], spread[name] = now, now.new_ones(())
        smooth = {name: mean[name] * spread[name] for name in mean}
        scores = {}
        for path, layer in gates.layers.items():
            rows, columns = by_slot(layer, gates.adapter, *(smooth[name] for name in names[path]))
            scores[path] = smooth[path] + rows.mean(dim=1) + columns.mean(dim=1)
        return live_only(gates, scores)
