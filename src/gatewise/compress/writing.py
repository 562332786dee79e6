"""What a compression writes: plain LoRA, what engines must be told of it, and a report."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from gatewise.adapters.export import copy_tokenizer, to_lora
from gatewise.adapters.files import ALLOCATION_FILE, CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE, read_config, read_lora, read_tensors
from gatewise.compress.goal import Candidate, Compressed
from gatewise.compress.search import Search
from gatewise.compress.timing import seconds_a_step
from gatewise.errors import GatewiseError, some
from gatewise.files import finite, whole_folder, write_json
from gatewise.losses import scored
from gatewise.serving.engines import SERVING_FILE, model_type_of, serving_settings
from gatewise.tasks.metrics import measuring

REPORT_FILE = "compress.json"
_CHECK = "gatewise-check"  # what the adapter as written is called, beside the one that was measured
_BOUND = 0.02  # of the largest logit: more than rounding


def written(chosen: Candidate, out: Path, search: Search, source: Path | None, used_on: bool = False) -> Compressed:
    """Writes the adapter that a search chose, and looks whether it is the one that was measured.

    Args:
        out: the folder to write.
        source: the folder of the whole adapter, whose tokenizer comes along; None for a model in memory.
        used_on: other adapters are measured and written on the same model afterwards.

    Raises:
        GatewiseError: it cannot be written, or what was written is another function.
    """
    model, name = search.loaded.model, search.name
    search.take(chosen)
    with whole_folder(out) as part:
        with tempfile.TemporaryDirectory() as folder:
            _save(model, name, Path(folder), source)
            saved = Path(folder) / ("" if name == "default" else name)
            # A model that RankAllocation trained writes it too, but its ranks are not these.
            (saved / ALLOCATION_FILE).unlink(missing_ok=True)
            to_lora(saved, part)
        if source is not None:
            _in_formats(part, search)
            copy_tokenizer(source, part)
            _named_as_in(source, part)
            if search.note:
                write_json(part / NOTE_FILE, search.note)
        deviation, seconds, merges = _compared(search, part, source is not None, used_on)
        result = Compressed(
            out=out, chosen=chosen, whole_size=search.whole_size, whole_quality=float(search.whole_rows.mean()),
            base_quality=float(search.base_rows.mean()), candidates=tuple(search.candidates), measure=search.rows.measure,
            order=search.order, goal=search.goal, rows=len(search.rows.held_out), seconds=seconds, deviation=deviation,
            merges=merges,
        )  # fmt: skip
        write_json(part / SERVING_FILE, serving_settings(read_lora(part), model_type_of(model)))
        write_json(part / REPORT_FILE, {"format": 1, **finite({**asdict(replace(result, out=Path())), "out": None})})
    return result


def _save(model: Any, name: str, folder: Path, source: Path | None) -> None:
    """Has PEFT save the adapter; base embeddings come along only if they did before, as with a vocabulary that was resized."""
    if source is None:
        model.save_pretrained(str(folder), selected_adapters=[name])
        return
    model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    weights = folder / ("" if name == "default" else name) / WEIGHTS_FILE
    tensors, metadata = read_tensors(weights)
    if missing := read_lora(source).others.keys() - tensors.keys():
        # PEFT would save both embeddings and all that is named like them.
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=True)
        with_embeddings, _ = read_tensors(weights)
        kept = {key: with_embeddings[key] for key in missing & with_embeddings.keys()}
        save_file({**tensors, **kept}, weights, metadata=metadata)


def _in_formats(part: Path, search: Search) -> None:
    """Gives tensors the number format that they have in the whole adapter's file."""
    now, metadata = read_tensors(part / WEIGHTS_FILE)
    cast = {name: tensor.to(search.format_of(name)).contiguous() for name, tensor in now.items()}
    save_file(cast, part / WEIGHTS_FILE, metadata=metadata)


def _named_as_in(source: Path, part: Path) -> None:
    """Has the configuration name the base model that the whole adapter names, and each module that is trained whole once.

    PEFT puts in the place that the base model was loaded from here, and adds a classifier's head each time it loads one.
    """
    config = read_config(part)
    config["base_model_name_or_path"] = read_config(source).get("base_model_name_or_path") or config["base_model_name_or_path"]
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    write_json(part / CONFIG_FILE, config)


@contextmanager
def _base_put_back(model: Any) -> Iterator[None]:
    """Puts back the base weights under an adapter exactly: merging and taking out again rounds them, in half precision by much."""
    bases = {id(base): base for module in model.modules() if isinstance(module, LoraLayer) and (base := module.get_base_layer())}
    held = [(base, key, own, own.detach().clone()) for base in bases.values() for key, own in base.named_parameters(recurse=False)]
    try:
        yield
    finally:
        for base, key, own, before in held:
            if getattr(base, key) is not own:  # a quantised layer has a new one when it was merged
                setattr(base, key, own)
            own.data.copy_(before)


def _compared(
    search: Search, folder: Path, merge: bool, used_on: bool
) -> tuple[dict[str, float], tuple[float, float, float] | None, bool | None]:
    """Loads what was written beside the adapter that was measured.

    Args:
        merge: also merge it.
        used_on: the model is used on, so that its base weights have to be put back after merging. That takes their memory twice.

    Returns:
        The largest difference of logits on a few rows; where time counts, the seconds of a step with the whole adapter, with what
        was written, and with none; and whether merging leaves the model as it is.

    Raises:
        GatewiseError: what was written is another function.
    """
    model, name = search.loaded.model, search.name
    few = {key: value[:4].to(next(model.parameters()).device) for key, value in search.batch.items()}
    found: dict[str, float] = {}
    seconds = None
    with measuring(model):
        wanted = scored(model, few).logits.float()

        def deviation() -> float:
            return float((scored(model, few).logits.float() - wanted).abs().max())

        try:
            result = model.load_adapter(str(folder), _CHECK)
            if odd := [*result.missing_keys, *result.unexpected_keys]:
                raise GatewiseError(
                    f"the adapter as written does not fit its base model ({some(sorted(odd), 1)}), so nothing was written: please "
                    "report this, with the adapter's adapter_config.json"
                )
            model.set_adapter(_CHECK)
            found["loaded"] = deviation()
            bound = _BOUND * max(1.0, float(wanted.abs().max()))
            if not found["loaded"] <= bound:
                raise GatewiseError(
                    f"the adapter as written gives logits that differ by {found['loaded']:.3g} from those of the one that was "
                    "measured, so nothing was written: please report this, with the adapter's adapter_config.json"
                )
            if search.goal.unit == "time":
                smaller = seconds_a_step(model)
                with model.disable_adapter():
                    none = seconds_a_step(model)
                model.set_adapter(name)
                search.back()
                seconds = (seconds_a_step(model), smaller, none)
                model.set_adapter(_CHECK)
            if merge:
                with _base_put_back(model) if used_on else nullcontext():
                    try:
                        model.merge_adapter([_CHECK])
                        found["merged"] = deviation()
                    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # layers that PEFT cannot merge
                        pass
                    model.unmerge_adapter()
        finally:
            model.set_adapter(name)
            if _CHECK in model.peft_config:
                model.delete_adapter(_CHECK)
    return found, seconds, found.get("merged", math.inf) <= bound if merge else None
