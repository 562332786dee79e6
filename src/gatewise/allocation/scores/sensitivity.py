"""AdaLoRA's sensitivity score (Zhang et al., arXiv 2303.10512, eqs. 7 and 8), the control.

For a parameter w: s(w) = |w dCE/dw|. A rank of LoRA has no singular value, so its gate (1 when on) stands for it:

    S(r) = s(gate_r) + mean over row r of A of s(w) + mean over column r of B of s(w)

AdaLoRA smooths s over the steps of training. Here it is of one batch.
"""

from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from gatewise.allocation.scoring import Batches, GateBank, Score, Scores, gate_gradients, parts_of, scoring
from gatewise.allocation.slots import by_slot, factors


@partial(Score, meaning="AdaLoRA's |weight x gradient|, never below zero", by_losses=False, options={})
def sensitivity(model: nn.Module, batch: Batches, *, adapter: str | None = None) -> Scores:
    """AdaLoRA's score of every live rank.

    Cost: one forward and one backward pass over the batch.

    Args:
        batch: one batch (b, t) with labels, or several.

    Returns:
        Path -> (live ranks,) scores, never negative.
    """
    with scoring(model, float32=False), GateBank(model, adapter) as gates, ExitStack() as stack:
        both = {path: factors(layer, gates.adapter) for path, layer in gates.layers.items()}
        weights = {str(id(weight)): weight for pair in both.values() for weight in pair}  # experts share theirs
        for weight in weights.values():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(True)
        leaves: dict[str, Tensor] = {**weights, **gates.fill(1.0, requires_grad=True)}
        gradients, _ = gate_gradients(model, parts_of(model, batch), leaves)
        found = {name: (leaves[name].detach() * gradient).abs() for name, gradient in gradients.items()}
        scores = {}
        for path, layer in gates.layers.items():
            rows, columns = by_slot(layer, gates.adapter, *(found[str(id(weight))] for weight in both[path]))
            scores[path] = found[path] + rows.mean(dim=1) + columns.mean(dim=1)
        return gates.live_only(scores)
