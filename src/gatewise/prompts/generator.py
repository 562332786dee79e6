"""The prompt generator: from the hidden states of a text to l prompt tokens. SPT, arXiv 2310.20127.

    p^new = W_up act(pool_l(W_down h))

Shapes: b batch, t tokens, l prompt tokens, d hidden size, m bottleneck, n Kronecker products.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.prompts.config import Activation


class PromptGenerator(nn.Module):
    """A bottleneck without biases, as the parameter count of the ALoRA paper's SPT baseline has it.

    The projection and the pooling are both linear, so the states are pooled before they are projected: the same numbers for
    l · d · m multiplications a text in place of t · d · m.

    W_down starts as N(0, 1 / d) and W_up as N(0, 1 / m), so that new prompts are small random functions of the text with numbers
    below one (reconstructed). They are not zero, where a norm in front of attention would have a gradient a thousand times too
    large.

    Args:
        hidden_size: d.
        bottleneck: m.
        phm: n, which must divide both, for projections Σ_{i≤n} A_i ⊗ B_i with A (n, n, n) and B (n, rows / n, columns / n)
            (Zhang et al., ICLR 2021, arXiv 2102.08597; reconstructed: A is not shared between layers). None: plain matrices.
        activation, normalize_states: as in ``SelectivePromptConfig``.
    """

    def __init__(
        self, hidden_size: int, bottleneck: int, phm: int | None, activation: Activation, normalize_states: bool = True
    ) -> None:
        super().__init__()
        self.activation, self.normalize_states = activation, normalize_states
        # All parameters lie directly in this module: PEFT takes the adapter's name out of keys of that depth only.
        for name, rows, columns in (("down", bottleneck, hidden_size), ("up", hidden_size, bottleneck)):
            std = 1 / math.sqrt(columns)
            if phm is None:
                self.register_parameter(name, _normal((rows, columns), std))
            else:
                # Entries of the sum are N(0, std²) again.
                self.register_parameter(f"{name}_a", _normal((phm, phm, phm), 1 / math.sqrt(phm)))
                self.register_parameter(f"{name}_b", _normal((phm, rows // phm, columns // phm), std))

    def forward(self, hidden: Tensor, pooling: Tensor) -> Tensor:
        """p^new (b, l, d) in at least float32, from h (b, t, d) and the weights (b, l, t) of ``pooling_weights``."""
        down, up = self.projection("down"), self.projection("up")
        dtype = torch.promote_types(down.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            # Padding may hold anything, infinities too, and zero times those is not zero.
            states = hidden.to(dtype).masked_fill(~pooling.any(dim=1).unsqueeze(-1), 0.0)
            if self.normalize_states:
                states = F.rms_norm(states, states.shape[-1:], eps=1e-6)
            pooled = pooling.to(dtype) @ states
            return F.linear(self._activated(F.linear(pooled, down.to(dtype))), up.to(dtype))

    def projection(self, name: str) -> Tensor:
        """The matrix "down" (m, d) or "up" (d, m)."""
        if hasattr(self, name):
            return self.get_parameter(name)
        return kronecker_sum(self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b"))

    def _activated(self, x: Tensor) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(x)
        if self.activation == "relu":
            return F.relu(x)
        return x.tanh() if self.activation == "tanh" else x


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """Σ_i A_i ⊗ B_i (p·r, q·s), of A (n, p, q) and B (n, r, s)."""
    product = torch.einsum("npq,nrs->prqs", a, b)
    return product.reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


def pooling_weights(read: Tensor, tokens: int) -> Tensor:
    """Adaptive average pooling over the tokens of each row that are read, as a matrix (b, l, t).

    Of a row's k tokens in order, prompt token j averages those from floor(j k / l) up to ceil((j + 1) k / l), as PyTorch's
    ``adaptive_avg_pool1d`` does; where k < l, several prompt tokens share one. A row with none has zeros.

    Args:
        read: (b, t), true at the tokens to pool.
        tokens: l.
    """
    count = read.sum(dim=1)[:, None]
    place = torch.arange(tokens, device=read.device)
    start = place * count // tokens
    end = -((place + 1) * -count // tokens)  # the quotient rounded up
    rank = (read.cumsum(dim=1) - 1)[:, None, :]
    inside = read[:, None, :] & (rank >= start[:, :, None]) & (rank < end[:, :, None])
    return inside / (end - start).clamp(min=1)[:, :, None]


def _normal(shape: tuple[int, ...], std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(shape, dtype=torch.float32), std=std))
