"""Turns every module's B A into its singular basis, so that a rank is a singular direction of what the module adds.

How B A is cut into ranks is chance: any invertible R gives the same update as (B R^-1)(R A). What is dropped rank by rank should
not depend on it. With thin QR factorisations B = Q_b R_b and A^T = Q_a R_a and the singular value decomposition of the small core
R_b R_a^T = U S V^T (r, r), the update is B A = (Q_b U) S (Q_a V)^T. The new factors are B' = Q_b U S^1/2 and A' = S^1/2 (Q_a V)^T:
rank i is the i-th singular direction, the largest first, and shares its size evenly between both factors.
"""

import torch
from torch import Tensor, nn

from gatewise.adapters.lora import active_adapter
from gatewise.allocation.slots import by_slot, check_movable, factors, lora_layers, set_slots


def to_singular_basis(model: nn.Module) -> None:
    """Rewrites the factors of every LoRA layer in its singular basis. The function computed does not change.

    Slots that B A does not need (dead ones, and those of more ranks than its true one) are zero afterwards, behind the others.

    Raises:
        GatewiseError: no LoRA adapter, or layers that share their factors.
    """
    name = active_adapter(model)
    check_movable(model, name)
    for layer in lora_layers(model, name).values():
        rows, columns = by_slot(layer, name, *(factor.detach().cpu().double() for factor in factors(layer, name)))
        set_slots(layer, name, *_turned(rows, columns))


def _turned(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B^T (r, d_out) in the singular basis of B A."""
    (q_a, r_a), (q_b, r_b) = (torch.linalg.qr(factor.T) for factor in (rows, columns))
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    # What float32 factors cannot hold beside the largest direction is rounding: such a rank is none.
    s = torch.where(s > s.max() * len(rows) * torch.finfo(torch.float32).eps, s, 0.0)
    root = s.sqrt()[:, None]
    missing = (0, 0, 0, len(rows) - len(s))  # more ranks than the module has dimensions
    return nn.functional.pad(root * (v @ q_a.T), missing), nn.functional.pad(root * (q_b @ u).T, missing)
