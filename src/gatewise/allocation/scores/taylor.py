"""First-order AB-LoRA: the score of every rank from two backward passes.

AB-LoRA (ALoRA, arXiv 2403.16187) ranks by IS(r) = CE(M without r) - CE(only r). To first order in the gates

    CE(M without r) ~ CE(M) - dCE/dalpha_r at all gates on,      CE(only r) ~ CE(base) + dCE/dalpha_r at all gates off,

so up to a constant IS(r) ~ -(dCE/dalpha_r |on + dCE/dalpha_r |off). The constant is kept, which makes the numbers comparable with
the exact ones.
"""

from functools import partial

from torch import nn

from gatewise.allocation.scoring import Batches, GateBank, Score, Scores, gate_gradients, parts_of, scoring


@partial(
    Score,
    meaning="the loss without it less the loss with all, plus what it takes away alone, to first order",
    unit="nats",
    idle_is_zero=False,
    by_losses=False,
    options={},
)
def taylor(model: nn.Module, batch: Batches, *, adapter: str | None = None) -> Scores:
    """First-order estimate of the AB-LoRA score of every live rank.

    Cost: two forward and two backward passes over the batch, whatever the number of ranks.

    Args:
        batch: one batch (b, t) with labels, or several.

    Returns:
        Path -> (live ranks,) estimates of CE(M without r) - CE(only r), in nats.
    """
    with scoring(model, float32=False), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        on, loss_on = gate_gradients(model, parts, gates.fill(1.0, requires_grad=True))
        off, loss_off = gate_gradients(model, parts, gates.fill(0.0, requires_grad=True))
        return gates.live_only({path: (loss_on - loss_off) - (on[path] + off[path]) for path in on})
