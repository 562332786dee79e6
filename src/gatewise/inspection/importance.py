"""What the modules of an adapter are worth on some data: the scores of their ranks, and sums over layers and kinds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.loading import load_with_data
from gatewise.adapters.lora import active_adapter
from gatewise.allocation.scores import DEFAULT, as_score
from gatewise.allocation.scoring import from_nothing, losses_without_and_with
from gatewise.allocation.slots import Expert, costs, factors, left_alone, lora_layers
from gatewise.errors import GatewiseError
from gatewise.inspection.grid import Grid, grid_of
from gatewise.losses import Batch
from gatewise.progress import ConsoleProgress, quiet
from gatewise.sites import Site, sites_in_order
from gatewise.tasks import PadCollator
from gatewise.tasks.metrics import encoded

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class ModuleImportance(Site):
    """What the ranks of one module are worth.

    Attributes:
        path, layer, kind: see ``gatewise.sites.Site``.
        scores: one number for each live rank, in the order of the slots; zero is a rank that does nothing.
        scaling: what B @ A is multiplied by.
        room: the most ranks that make sense here, min(d_in, d_out).
        cost: the numbers of one rank, d_in + d_out.
        of_parameter: it is a parameter that ``target_parameters`` names, or an expert of one.
    """

    scores: tuple[float, ...]
    scaling: float
    room: int
    cost: int
    of_parameter: bool = False

    @property
    def rank(self) -> int:
        """Live ranks."""
        return len(self.scores)

    @property
    def total(self) -> float:
        """The sum of the scores; 0 for a module without a live rank."""
        return math.fsum(self.scores)


@dataclass(frozen=True)
class Importance:
    """What every LoRA module of an adapter is worth on some rows.

    Attributes:
        modules: one entry a module, by layer and then by kind.
        score: how ranks were scored, a name in ``gatewise.allocation.scores.NAMES`` or "module:function".
        rows: rows scored on.
        data: where they came from, as the user wrote it.
        base_model: the base model's name.
        loss_base, loss_adapted: mean cross-entropy (nats) on these rows without any rank and with all of them. Scores by
            ``path_integral``, and only those, add up to the difference between the two.
        unscored: paths of the adapter's modules that no score reads, such as convolutions in groups.
    """

    modules: tuple[ModuleImportance, ...]
    score: str
    rows: int
    loss_base: float
    loss_adapted: float
    base_model: str | None = None
    data: str | None = None
    unscored: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Live ranks over all modules scored."""
        return sum(module.rank for module in self.modules)

    @property
    def total(self) -> float:
        """The sum of all scores."""
        return _total(self.modules) or 0.0

    @property
    def unit(self) -> str:
        """The unit of the scores, "nats" or none."""
        return as_score(self.score).unit

    @property
    def useless(self) -> list[ModuleImportance]:
        """The modules whose scores add up to zero or less: on these rows the adapter does without them as well."""
        return [module for module in self.modules if module.total <= 0]

    def score_grid(self) -> Grid:
        """Total scores by layer and kind, in a power of ten that makes the cells easy to read."""
        grid = grid_of(self.modules, _total, title="", write=str, signed=True)
        exponent = 3 * math.floor(math.log10(grid.most) / 3) if grid.most else 0
        scaled = "" if exponent == 0 else f"10{str(exponent).translate(_RAISED)}"
        unit = " ".join(part for part in (scaled, self.unit) if part)
        write = partial(_scaled, exponent=exponent, decimals=2 if grid.most < 10.0 ** (exponent + 1) else 1)
        return replace(grid, title=f"{self.score} score" + (f" in {unit}" if unit else ""), write=write)


def _total(modules: Sequence[ModuleImportance]) -> float | None:
    return math.fsum(score for module in modules for score in module.scores) if modules else None


def _scaled(number: float | None, exponent: int, decimals: int) -> str:
    if number is None:
        return "·"
    return "0" if number == 0 else f"{number / 10.0**exponent:.{decimals}f}"


def score_adapter(
    adapter: str | Path,
    data: str,
    options: DataOptions = DataOptions(),
    *,
    score: str = DEFAULT,
    rows: int = 32,
    seed: int = 0,
    score_options: Mapping[str, Any] | None = None,
) -> Importance:
    """Scores every rank of a saved adapter on rows of data, which are prompted and encoded as ``gatewise eval`` does.

    Args:
        adapter: its folder; any LoRA adapter of PEFT's, trained by gatewise or not.
        data, options: as for ``gatewise.adapters.loading.load_with_data``.
        score: a name in ``gatewise.allocation.scores.NAMES``, or "module:function".
        rows: rows drawn from the data without replacement; all of them if there are fewer.
        seed: of that draw.
        score_options: further arguments of the score.

    Raises:
        GatewiseError: an unknown score; adapter, base model and data cannot be read or do not fit each other; or the adapter has
            no LoRA layer that scores read.
    """
    as_score(score, score_options)
    progress = ConsoleProgress(Console(stderr=True))
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, options, say=progress.say)
        drawn = torch.randperm(len(loaded.records), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        records = loaded.records.select(drawn)
        batch = PadCollator(loaded.tokenizer)(encoded(loaded.model, loaded.tokenizer, records, loaded.template, loaded.max_length))
        progress.say(f"scoring on {len(records):,} rows with {score}")
        with progress.counting("scoring") as count:
            found = importance_of(loaded.model, batch, score, score_options=score_options, progress=count)
        return replace(found, base_model=loaded.base, data=data)


def importance_of(
    model: PeftModel,
    batch: Batch,
    score: str = DEFAULT,
    *,
    score_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """``score_adapter`` for the active adapter of a model in memory and a batch (b, t) with labels.

    The numbers are the score's own, except that AB-LoRA's and its first-order form are counted from a rank that does nothing:
    CE(without r) - CE(with all) + CE(with none) - CE(only r), so that zero means the same for every score.

    Args:
        progress: called with (done, total) by scores that take long.

    Raises:
        GatewiseError: an unknown score, no LoRA layer that scores read, or a score that is not finite.
    """
    how = as_score(score, score_options)
    name = active_adapter(model)
    layers = lora_layers(model, name)
    if not layers:
        raise GatewiseError(f"adapter {name!r} has no LoRA on a linear layer, an embedding or experts: it has no ranks to score")
    scores: dict[str, Tensor] = how.of(model, batch, name, progress=progress)
    loss_base, loss_adapted = losses_without_and_with(model, batch, name, how.by_losses)
    # AB-LoRA gives a rank that does nothing CE(all ranks) - CE(no rank), far below zero for a good adapter: a sum over the ranks of
    # a module would mostly count them. Less that constant, zero is a rank that does nothing.
    shift = 0.0 if how.idle_is_zero else loss_base - loss_adapted
    shifted, cost = from_nothing(scores, shift), costs(layers, name)
    modules = []
    for place in sites_in_order(layers):
        path, layer = place.path, layers[place.path]
        values = shifted[path]
        if not bool(torch.isfinite(values).all()):
            raise GatewiseError(
                f"the {score} scores of {path} are not finite: look for numbers that are not in the adapter and its base model, "
                "or score on other data"
            )
        a, b = factors(layer, name)
        modules.append(
            ModuleImportance(
                path=path,
                layer=place.layer,
                kind=place.kind,
                scores=tuple(float(f"{value:.9g}") for value in values.tolist()),
                scaling=layer.scaling[name],
                room=min(a[0].numel(), len(b)),
                cost=cost[path],
                of_parameter=isinstance(layer, Expert),
            )
        )
    return Importance(
        modules=tuple(modules),
        score=score,
        rows=len(batch["labels"]),
        loss_base=loss_base,
        loss_adapted=loss_adapted,
        base_model=model.peft_config[name].base_model_name_or_path or None,
        unscored=tuple(left_alone(model, name)),
    )
