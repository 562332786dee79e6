"""Methods that might win, to be compared before any of them becomes code of the library.

    cd benchmarks/recipes
    python ../candidates.py trec.yaml --methods lora candidates/squeeze.yaml --out FOLDER

This is `gatewise compare` with three more methods:

squeeze      LoRA that starts with four times the rank and comes down to it. Before each round a module's live ranks are rotated
             to the components of its update, which changes no output; `path_moments` scores the components, and the best per
             parameter stay.
frozen-a     LoRA with A frozen as it was drawn (Zhu et al. 2024, arXiv 2402.16842): a seed stands for A, so that as many trained
             numbers have about twice the rank. What is stored is counted so too, though the file written here has A.
riemannian   LoRA with preconditioned gradients (Zhang and Pilanci 2024, arXiv 2402.02347): what Adam sees of A is
             (B^T B + d I)^-1 times its gradient, and of B its gradient times (A A^T + d I)^-1.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gatewise.adapters.method import Lora
from gatewise.allocation import slots
from gatewise.allocation.algorithm import Cubic
from gatewise.allocation.callback import RankAllocation
from gatewise.allocation.method import ALora, _line
from gatewise.parts import METHODS


def components(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """T and its inverse, so that B T = Q_B U S^1/2 and T^-1 A = S^1/2 V^T Q_A^T, where B A = Q_B U S V^T Q_A^T.

    a (r, d_in), b (d_out, r). None where the product has not the full rank, as before the first step.
    """
    rb = torch.linalg.qr(b.double(), mode="r").R
    ra = torch.linalg.qr(a.double().T, mode="r").R
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    if not len(s) or s[0] == 0 or s[-1] <= 1e-7 * s[0]:
        return None
    root = s.rsqrt()
    return ra.T @ vt.T * root, root[:, None] * (u.T @ rb)


def refactor(layer: Any, adapter: str, optimizer: Any) -> None:
    """Rotates the live ranks of a layer to the components of its update. Its output is unchanged, and Adam's moments go along."""
    a, b = slots.factors(layer, adapter)
    live = slots.live_slots(layer, adapter)
    basis = components(a.data[live], b.data[:, live]) if live else None
    if basis is None:
        return
    t, back = basis
    a.data[live] = (back @ a.data[live].double()).to(a)
    b.data[:, live] = (b.data[:, live].double() @ t).to(b)
    if optimizer is None:
        return
    # A = T A', so dL/dA' = T^T dL/dA; B = B' T^-1, so dL/dB' = dL/dB T^-T. Second moments as if the entries were independent.
    state_a, state_b = (slots._kept_of(one, optimizer)[1] for one in (a, b))
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        if name in state_a:
            state_a[name][live] = (t.T.pow(power) @ state_a[name][live].double()).to(a)
            state_b[name][:, live] = (state_b[name][:, live].double() @ back.T.pow(power)).to(b)


class Squeezing(RankAllocation):
    """Rounds that begin with `refactor`."""

    def _run_round(self, model: Any, optimizer: Any, step: int, last: bool = False) -> None:
        for layer in slots.layers_of(model, self._name).values():
            refactor(layer, self._name, optimizer)
        super()._run_round(model, optimizer, step, last)


class Squeeze(ALora):
    """`squeeze`, see above."""

    def contradictions(self) -> Any:
        yield from ()

    def _rounds(self, run: Any) -> RankAllocation:
        section = self.allocation
        return Squeezing(
            section.score,
            Cubic(rounds=section.rounds, first_round=section.first_round, recover=section.recover, target_rank=self.peft.r),
            score_options=section.score_options,
            rule=section.rule,
            budget=section.budget,
            validation_batch=run.collate(run.held_out),
            seed=self.recipe.seed,
            on_round=lambda done: run.progress.say(_line(done)),
        )


class FrozenA(Lora):
    """`frozen-a`, see above."""

    def config(self, run: Any, base: Any) -> Any:
        config = super().config(run, base)
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        return config

    def saved_config(self, run: Any, base: Any) -> Any:
        return super().config(run, base)  # as many numbers as are trained

    def adapt(self, run: Any, base: Any) -> Any:
        model = super().adapt(run, base)
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return model


class Precondition(TrainerCallback):
    """The gradients that `riemannian` gives to Adam."""

    damping = 1e-6

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for layer in slots.layers_of(model, "default").values():
            a, b = slots.factors(layer, "default")
            if a.grad is None or b.grad is None:
                continue
            with torch.no_grad():
                eye = self.damping * torch.eye(a.shape[0])
                a.grad = torch.linalg.solve(b.float().T @ b.float() + eye, a.grad.float()).to(a)
                b.grad = torch.linalg.solve(a.float() @ a.float().T + eye, b.grad.float().T).T.contiguous().to(b)


class Riemannian(Lora):
    """`riemannian`, see above."""

    def callbacks(self, run: Any) -> Any:
        return [*super().callbacks(run), Precondition()]


if __name__ == "__main__":
    from gatewise.cli.main import main

    METHODS.places.update(
        {
            name: f"candidates:{part}"
            for name, part in [("squeeze", "Squeeze"), ("frozen-a", "FrozenA"), ("riemannian", "Riemannian")]
        }
    )
    sys.argv[1:1] = ["compare"]
    main()
