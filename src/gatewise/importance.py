"""What every layer and module of a LoRA adapter is worth on some data: any adapter's ranks scored once, after training."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.gates import GateBank, scoring
from gatewise.lora import active_adapter, factors, lora_layers
from gatewise.losses import Batch, loss_kind, mean_loss
from gatewise.measure import Loaded, load_with_data
from gatewise.models.convert import quiet
from gatewise.progress import RunProgress
from gatewise.report import Importance, ModuleImportance
from gatewise.scores import SCORES
from gatewise.scores.base import parts_of
from gatewise.sites import kind_key, site
from gatewise.tasks import score_batch
from gatewise.tasks.evaluate import check_classes, most_positions

# CE(M without r) - CE(only r) of a rank that does nothing is CE(M) - CE(base), far below zero for a good adapter: a sum over the
# ranks of a module would mostly count them. Less that constant, zero is a rank that does nothing.
_COUNTED_FROM_THE_ADAPTER = ("ablation", "taylor")


def score_adapter(
    adapter: str | Path,
    data: str,
    *,
    score: str = "path_integral",
    base: str | None = None,
    split: str | None = None,
    prompt: str | None = None,
    labels: str | None = None,
    rows: int = 32,
    seed: int = 0,
    score_options: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Importance:
    """Scores every rank of a saved adapter on rows of data, which are prompted and encoded as ``gatewise eval`` does.

    Args:
        adapter: its folder; any LoRA adapter of PEFT's, trained by gatewise or not.
        data, base, split, prompt, labels: as for ``gatewise.measure.measure_adapter``.
        score: a name in ``gatewise.scores.SCORES``.
        rows: rows drawn from the data without replacement; all of them if there are fewer.
        seed: of that draw.
        score_options: further arguments of the score.
        console: where progress is shown; stderr by default.

    Raises:
        GatewiseError: an unknown score; adapter, base model and data cannot be read or do not fit each other; or the adapter has
            no LoRA on a linear layer.
    """
    check_score(score)
    if rows < 1:
        raise GatewiseError(f"{rows} rows to score on were asked for: expected at least 1")
    progress = RunProgress(console or Console(stderr=True))
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, base=base, split=split, prompt=prompt, labels=labels, say=progress.say)
        batch = _batch(loaded, rows, seed)
        used = len(batch["labels"])
        progress.say(f"scoring on {used:,} rows with {score}")
        with progress.counting("scoring") as count:
            return importance_of(
                loaded.model, batch, score, score_options=score_options, progress=count, base_model=loaded.base, data=data
            )


def importance_of(
    model: PeftModel,
    batch: Batch,
    score: str = "path_integral",
    *,
    adapter: str | None = None,
    score_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
    data: str | None = None,
) -> Importance:
    """The same for a model in memory and a batch (b, t) with labels.

    The numbers are the score's own, except that AB-LoRA's and its first-order form are counted from a rank that does nothing:
    CE(without r) - CE(with all) + CE(with none) - CE(only r), so that zero means the same for every score.

    Args:
        adapter: which adapter; None for the active one.
        progress: called with (done, total) by scores that take long.
        base_model, data: names to keep with the result; by default the base model's is that of the adapter's config.

    Raises:
        GatewiseError: an unknown score, no LoRA on a linear layer, or a score that is not finite.
    """
    check_score(score)
    name = active_adapter(model, adapter)
    layers = lora_layers(model, name)
    if not layers:
        raise GatewiseError(f"adapter {name!r} has no LoRA on a linear layer, and only those have ranks that can be scored")
    options = dict(score_options or {})
    if score == "ablation":
        options.setdefault("mode", "screened")
    if progress and "progress" in inspect.signature(SCORES[score]).parameters:
        options["progress"] = progress
    scores: dict[str, Tensor] = SCORES[score](model, batch, adapter=name, **options)
    loss_base, loss_adapted = _losses(model, batch, name, options.get("float32", True))
    shift = loss_base - loss_adapted if score in _COUNTED_FROM_THE_ADAPTER else 0.0
    noise = 4 * torch.finfo(torch.float32).eps * abs(shift)  # what float32 scores this far from zero cannot tell from it
    modules = []
    for path, layer in layers.items():
        values = scores[path].double() + shift
        values[values.abs() < noise] = 0.0
        if not bool(torch.isfinite(values).all()):
            raise GatewiseError(
                f"the {score} scores of {path} are not finite: look for numbers that are not in the adapter and its base model, "
                "or score on other data"
            )
        place, (a, b) = site(path), factors(layer, name)
        modules.append(
            ModuleImportance(
                path=path,
                layer=place.layer,
                kind=place.kind,
                scores=tuple(float(f"{value:.9g}") for value in values.tolist()),
                scaling=layer.scaling[name],
                room=min(a.shape[1], b.shape[0]),
            )
        )
    return Importance(
        modules=tuple(sorted(modules, key=lambda m: (m.layer is None, m.layer or 0, kind_key(m.kind), m.path))),
        score=score,
        rows=len(batch["labels"]),
        loss_base=loss_base,
        loss_adapted=loss_adapted,
        base_model=base_model or model.peft_config[name].base_model_name_or_path or None,
        data=data,
        unscored=tuple(path for path in _targeted(model) if path not in layers),
    )


def check_score(score: str) -> None:
    """Raises GatewiseError for a name that is not in ``gatewise.scores.SCORES``."""
    if score not in SCORES:
        near = difflib.get_close_matches(score, SCORES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise GatewiseError(f"score {score!r} is not known; expected one of {', '.join(SCORES)}{hint}")


def _batch(loaded: Loaded, rows: int, seed: int) -> dict[str, Tensor]:
    classification = loss_kind(loaded.model) == "rows"
    if classification:
        check_classes(loaded.model, loaded.records)
    return score_batch(
        loaded.records,
        loaded.tokenizer,
        loaded.template,
        n=rows,
        seed=seed,
        classification=classification,
        max_length=min(loaded.max_length, most_positions(loaded.model)),
    )


def _losses(model: nn.Module, batch: Batch, adapter: str, float32: bool) -> tuple[float, float]:
    """Mean cross-entropy (nats) without any rank and with all of them."""
    with scoring(model, float32), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        with gates.only(set()):
            without = mean_loss(model, parts)
        return without, mean_loss(model, parts)


def _targeted(model: PeftModel) -> list[str]:
    """Paths of everything PEFT adapted, linear or not."""
    tuner: Any = model.base_model
    return [*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ())]
