"""Methods that might win, to be compared before any of them becomes code of the library.

    cd benchmarks/recipes
    python ../candidates.py trec.yaml --methods lora candidates/squeeze.yaml --out FOLDER

This is `gatewise compare` with five more methods:

squeeze      LoRA that starts with four times the rank and comes down to it. Before each round a module's live ranks are rotated
             to the components of its update, which changes no output; `path_moments` scores the components, and the best per
             parameter stay.
frozen-a     LoRA with A frozen as it was drawn (Zhu et al. 2024, arXiv 2402.16842): a seed stands for A, so that as many trained
             numbers have about twice the rank. What is stored is counted so too, though the file written here has A.
riemannian   LoRA with preconditioned gradients (Zhang and Pilanci 2024, arXiv 2402.02347): what Adam sees of A is
             (B^T B + d I)^-1 times its gradient, and of B its gradient times (A A^T + d I)^-1.
one-shot     LoRA whose ranks are dealt once: of the gradients of the held-out rows by the base weights the largest squares of
             singular values per parameter. A starts at their right singular vectors, as long as LoRA's rows are; B at zero.
grow         ALoRA whose new ranks do not start from noise. A round takes the gradient by each adapted weight, leaves out what the
             live ranks span, and grows along its singular vectors, the largest squares per parameter first.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gatewise.adapters.method import Lora
from gatewise.allocation import slots
from gatewise.allocation.algorithm import Limits, Plan, plan_round
from gatewise.allocation.callback import RankAllocation
from gatewise.allocation.method import ALora
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

    makes_rounds = Squeezing

    def contradictions(self) -> Any:
        yield from ()


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


def gradients(model: Any, batch: Any, weights: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Path -> the gradient of the mean loss of a batch by a weight (d_out, d_in) that may be frozen."""
    was_training, frozen = model.training, [one for one in weights.values() if not one.requires_grad]
    model.eval()
    try:
        for one in frozen:
            one.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
    finally:
        for one in frozen:
            one.requires_grad_(False)
        model.train(was_training)
    return dict(zip(weights, found, strict=True))


def dealt(values: dict[str, Tensor], price: dict[str, int], room: dict[str, int], budget: int) -> dict[str, int]:
    """Path -> ranks: the largest squares of singular values per parameter first, while a rank's price still fits."""
    order = sorted(((s.item() ** 2 / price[path], path) for path, own in values.items() for s in own[: room[path]]), reverse=True)
    ranks: dict[str, int] = {}
    for _, path in order:
        if price[path] <= budget:
            ranks[path] = ranks.get(path, 0) + 1
            budget -= price[path]
    return ranks


class OneShot(Lora):
    """`one-shot`, see above."""

    ranks: dict[str, int] | None = None

    def config(self, run: Any, base: Any) -> Any:
        config = super().config(run, base)
        if self.ranks is not None:
            config.target_modules = list(self.ranks)
            config.rank_pattern = dict(self.ranks)
            config.alpha_pattern = {path: config.lora_alpha / config.r * rank for path, rank in self.ranks.items()}
        return config

    def adapt(self, run: Any, base: Any) -> Any:
        config = super().config(run, base)
        heads = ("classifier", "score", *(config.modules_to_save or ()))  # which PEFT trains whole
        linear = {
            path: part
            for path, part in base.named_modules()
            if isinstance(part, torch.nn.Linear) and part is not base.get_output_embeddings()
            if not any(f"{path}.".startswith(f"{head}.") for head in heads)
        }
        price = {path: part.in_features + part.out_features for path, part in linear.items()}
        found = gradients(base, run.collate(run.held_out), {path: part.weight for path, part in linear.items()})
        parts = {path: torch.linalg.svd(one.float(), full_matrices=False) for path, one in found.items()}
        room = {path: len(one.S) for path, one in parts.items()}
        self.ranks = dealt({path: one.S for path, one in parts.items()}, price, room, config.r * sum(price.values()))
        run.progress.say(f"ranks in {len(self.ranks)} of {len(linear)} modules, {max(self.ranks.values())} at most")
        model = super().adapt(run, base)
        layers = slots.layers_of(model, "default")
        assert slots.capacities(layers, "default") == self.ranks, "PEFT adapts other modules than all linear ones"
        for path, layer in layers.items():
            a, _ = slots.factors(layer, "default")
            a.data.copy_(parts[path].Vh[: len(a)] * 3**-0.5)  # as long as rows drawn from +-1/sqrt(d_in) are on average
        return model


class Growing(RankAllocation):
    """Rounds that grow along the gradient."""

    def _run_round(self, model: Any, optimizer: Any, step: int, last: bool = False) -> None:
        layers = slots.layers_of(model, self._name)
        weights = {path: layer.get_base_layer().weight for path, layer in layers.items()}
        found, parts = gradients(model, self.validation_batch, weights), {}
        with torch.random.fork_rng():
            torch.manual_seed(step)
            for path, one in found.items():
                a, b = slots.factors(layers[path], self._name)
                live = slots.live_slots(layers[path], self._name)
                rows, columns = (torch.linalg.qr(part.data.float()).Q for part in (a[live].T, b[:, live]))
                rest = one.float() - columns @ (columns.T @ one.float())
                parts[path] = torch.svd_lowrank(rest - (rest @ rows) @ rows.T, q=min(16, *one.shape))

        def rule(scores: Any, limits: Limits) -> Plan:
            lost = plan_round(scores, limits).pruned
            assert limits.costs is not None
            left = sum(limits.costs[path] * (len(own) - len(lost.get(path, ()))) for path, own in scores.items())
            room = {path: 0 if path in lost else limits.capacity[path] - len(own) for path, own in scores.items()}
            values = {path: one[1] for path, one in parts.items()}
            return Plan(lost, dealt(values, dict(limits.costs), room, limits.budget - left))

        self.rule = rule
        lengths = {path: slots.factors(layer, self._name)[0].data.norm(dim=1) for path, layer in layers.items()}
        super()._run_round(model, optimizer, step, last)
        for path, new in self.history[-1].grown.items():
            a, b = slots.factors(layers[path], self._name)
            live = lengths[path][lengths[path] > 0]
            a.data[new] = (parts[path][2].T[: len(new)] * (live.mean() if len(live) else 3**-0.5)).to(a)
            # These columns of B have larger gradients than those beside noise, and Adam's mean of squares is to know it.
            squares = slots._kept_of(b, optimizer)[1].get("exp_avg_sq") if optimizer is not None else None
            if squares is not None:
                slope = layers[path].scaling[self._name] * found[path].float() @ a.data[new].float().T
                squares[:, new] = torch.maximum(squares[:, new], slope.square().to(squares))


class Grow(ALora):
    """`grow`, see above."""

    makes_rounds = Growing


if __name__ == "__main__":
    from gatewise.cli.main import main

    METHODS.places.update(
        {
            "squeeze": "candidates:Squeeze",
            "frozen-a": "candidates:FrozenA",
            "riemannian": "candidates:Riemannian",
            "one-shot": "candidates:OneShot",
            "grow": "candidates:Grow",
        }
    )
    sys.argv[1:1] = ["compare"]
    main()
