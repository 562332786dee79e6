"""The router of one Transformer layer: the prompt's hidden states to a gate for each expert. MiLoRA, arXiv 2410.18035, section 3.

    A = softmax over prompt tokens of H w      h = Aᵀ H          (or the mean, the maximum, the last token)
    p = softmax(g(h) W_r)                      keep the k largest
    g(x) = Σ_{j=0..6} a_j x^j / (1 + |Σ_{i=1..5} b_i x^i|)       (or GELU, ReLU, nothing)

A kept expert's gate is p_i / Σ_kept p, the sum held constant for the gradient, or p_i itself (reconstructed: the paper does not
say).

Each token's hidden state is divided by its root mean square first, unless told not to (reconstructed). Without that, new routers of
SmolLM2-135M-Instruct hardly see a short prompt: in layers 12 to 28 the first token's state has one number of 22,000 to 24,000,
whatever follows, where the others have a root mean square of 6 to 27. The pooled vector is then that number, and one expert begins
with a probability of 0.999 (median of 20 seeds, two prompts of a dozen tokens) instead of 0.2.

What all prompts have in common is then taken from the pooled vector, unless told not to, and the rest divided by its size (ours,
not the paper's):

    h <- (h - c) / s      c the mean of h over the first 64 prompts in training, s the root mean square of h - c then

Without that, the pooled vectors of all prompts are nearly the same one: all prompts choose alike whatever they say, by the random
W_r, and every step of the optimiser moves them together (docs/reports/milora.md).

Shapes: b batch, t tokens, d hidden size, m experts of the layer, k kept.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.routed.config import Activation, Pooler

ACTIVATION_PARAMETERS = r"\.prompt_router\.[^.]+\.(numerator|denominator)$"
"""The rationals' coefficients among a model's parameters, for ``upper_parameters``."""


RATIONAL_UNIT = 5.0
"""The rational's coefficients are those of the powers of x / 5, so that a step of the optimiser moves the function about alike by
each of them; of the powers of x, a_6 would be 1e-5, and no step size would suit both it and a_0. The functions are the same."""


# GELU as a rational of order (6, 5): least squares on [-5, 5], reweighted towards the smallest maximal error, and with a small
# weight on 5 < |x| < 1000, which keeps the tails from growing like x². Within 2.5e-3 of GELU on [-5, 5]; |g(x)| <= 1.1 |x| beyond.
GELU_NUMERATOR = (-2.40481574e-03, 4.99849287e-01, 4.44277016e-01, 1.41218348e-01, 1.89482431e-02, 9.55330177e-04, 1.29025066e-05)
GELU_DENOMINATOR = (6.04044611e-02, 2.32398785e-01, 1.40684711e-02, 4.52507245e-04, 3.17898493e-05)
OBSERVED_PROMPTS = 64
"""So many prompts, the first that the router reads in training mode, tell what prompts have in common; then it stays."""


class Router(nn.Module):
    """One adapter's router for one layer. Computes in float32 (float64 in a float64 model), whatever the base model's precision.

    W_r starts small and random, so that the first prompts find the experts nearly alike; w starts at zero, where the attention
    pooler is the mean (both reconstructed).

    Args:
        hidden_size: d.
        experts: m.
        pooler, activation, normalize_states, center_states: as in ``RoutedLoraConfig``.
    """

    center: Tensor
    spread: Tensor
    observed: Tensor

    def __init__(
        self,
        hidden_size: int,
        experts: int,
        pooler: Pooler,
        activation: Activation,
        normalize_states: bool = True,
        center_states: bool = True,
    ) -> None:
        super().__init__()
        self.pooler, self.activation, self.normalize_states = pooler, activation, normalize_states
        # All parameters lie directly in this module: PEFT takes the adapter's name out of keys of that depth only.
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.5 / math.sqrt(hidden_size))
        if pooler == "attention":
            self.pool = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        if activation == "rational":
            numerator = [value * RATIONAL_UNIT**power for power, value in enumerate(GELU_NUMERATOR)]
            denominator = [value * RATIONAL_UNIT**power for power, value in enumerate(GELU_DENOMINATOR, start=1)]
            self.numerator = nn.Parameter(torch.tensor(numerator, dtype=torch.float32))
            self.denominator = nn.Parameter(torch.tensor(denominator, dtype=torch.float32))
        self.center_states, self._settled = center_states, False
        if center_states:
            self.register_buffer("center", torch.zeros(hidden_size, dtype=torch.float32))
            self.register_buffer("spread", torch.zeros((), dtype=torch.float32))
            self.register_buffer("observed", torch.zeros((), dtype=torch.float32))

    @property
    def observes(self) -> bool:
        """Whether ``observe`` still changes anything."""
        # Remembered, because on a GPU every look at a number waits for all that is under way.
        self._settled = self._settled or not self.center_states or float(self.observed) >= OBSERVED_PROMPTS
        return not self._settled

    @torch.no_grad()
    def observe(self, hidden: Tensor, prompt: Tensor) -> None:
        """Takes note of what the prompts of a batch have in common, those with infinite states left out.

        The buffers are replaced, not written into, so that what ``centring`` gave before stays as it was.
        """
        dtype = torch.promote_types(self.center.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self._pooled(hidden.to(dtype), prompt.to(hidden.device))
        pooled = pooled[torch.isfinite(pooled).all(dim=-1)]
        if not len(pooled):
            return
        mean, before = pooled.mean(dim=0), self.observed.to(dtype)
        total = before + len(pooled)
        share = len(pooled) / total
        # Chan, Golub and LeVeque's rule for mean and variance of two sets together.
        away = mean - self.center.to(dtype)
        spread = self.spread.to(dtype) * (1 - share) + (pooled - mean).square().mean() * share
        spread = spread + away.square().mean() * share * (1 - share)
        made = {"center": self.center.to(dtype) + away * share, "spread": spread, "observed": total}
        for name, value in made.items():
            setattr(self, name, value.to(getattr(self, name).dtype))

    def centring(self) -> tuple[Tensor, Tensor] | None:
        """(c, s²) as they are now, for ``forward``; None where nothing is taken off."""
        return (self.center, self.spread) if self.center_states else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settled = False
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, hidden: Tensor, prompt: Tensor, centring: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Probabilities p (b, m) of the experts, from H (b, t, d) and the positions of the prompt (b, t), at least one a row.

        Args:
            centring: what ``centring`` gave earlier, for a layer that runs once more; by default what it gives now.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = self._pooled(hidden.to(dtype), prompt.to(hidden.device))
            centring = centring or self.centring()
            if centring is not None:
                # (h - c) / s; before any prompt was observed, or where all were the same, h as it is.
                center, spread = (one.to(dtype) for one in centring)
                least = 1e-6 * center.square().mean() + torch.finfo(torch.float32).tiny  # less than that is rounding
                pooled = torch.where(spread > least, (pooled - center) * torch.rsqrt(torch.maximum(spread, least)), pooled)
            if self.activation == "rational":
                pooled = rational(pooled, self.numerator.to(dtype), self.denominator.to(dtype))
            elif self.activation != "identity":
                pooled = F.gelu(pooled) if self.activation == "gelu" else F.relu(pooled)
            return (pooled @ self.weight.to(dtype).T).softmax(dim=-1)

    def _pooled(self, hidden: Tensor, prompt: Tensor) -> Tensor:
        outside = ~prompt.unsqueeze(-1)
        # Padding may hold anything, infinities too, and zero times those is not zero.
        hidden = hidden.masked_fill(outside, 0.0)
        if self.normalize_states:
            hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        if self.pooler == "last":
            columns = torch.arange(prompt.shape[1], device=prompt.device)
            last = columns.expand_as(prompt).masked_fill(~prompt, -1).amax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        if self.pooler == "max":
            return hidden.masked_fill(outside, -torch.inf).amax(dim=1)
        if self.pooler == "mean":
            return hidden.sum(dim=1) / prompt.sum(dim=1, keepdim=True)
        scores = (hidden @ self.pool.to(hidden.dtype)).masked_fill(~prompt, -torch.inf)
        return (scores.softmax(dim=1).unsqueeze(1) @ hidden).squeeze(1)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """g(x) by Horner's rule: ``numerator`` (7,) a_0 to a_6, ``denominator`` (5,) b_1 to b_5, of the powers of x / 5."""
    x = x / RATIONAL_UNIT
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for coefficient in reversed(numerator.unbind()):
        above = above * x + coefficient
    for coefficient in reversed(denominator.unbind()):
        below = (below + coefficient) * x
    return above / (1 + below.abs())


def gates_of(probabilities: Tensor, top_k: int, normalize: bool) -> Tensor:
    """Gates (b, m): those of the ``top_k`` most probable experts of p (b, m), zero for the others."""
    chosen = probabilities.topk(top_k, dim=-1).indices
    kept = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
    gates = probabilities * kept
    return gates / gates.detach().sum(dim=-1, keepdim=True) if normalize else gates


def balance(probabilities: Tensor) -> Tensor:
    """L_lb = m Σ_i f_i p̂_i of p (b, m): f_i the share of prompts whose most probable expert is i, p̂_i the mean probability.

    A scalar, 1 where both are uniform; its gradient is that of p̂.
    """
    experts = probabilities.shape[-1]
    shares = F.one_hot(probabilities.detach().argmax(dim=-1), experts).to(probabilities.dtype).mean(dim=0)
    return experts * (shares * probabilities.mean(dim=0)).sum()
