"""What a compression writes: plain LoRA, what engines must be told of it, and a report."""

import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from gatewise.adapters.export import copy_tokenizer, to_lora
from gatewise.adapters.files import ALLOCATION_FILE, CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE, read_config, read_lora, read_tensors
from gatewise.compress.goal import Candidate, Compressed
from gatewise.compress.search import Search
from gatewise.errors import GatewiseError, some
from gatewise.files import finite, whole_folder, write_json
from gatewise.losses import scored
from gatewise.serving.engines import SERVING_FILE, model_type_of, serving_settings
from gatewise.tasks.metrics import measuring

REPORT_FILE = "compress.json"
_CHECK = "gatewise-check"  # what the adapter as written is called, beside the one that was measured
_BOUND = 0.02  # of the largest logit: more than rounding


def write_chosen(chosen: Candidate, out: Path, search: Search, source: Path | None) -> Compressed:
    """Writes the adapter that a search chose, and checks that it is the one that was measured.

    Args:
        out: the folder to write.
        source: the folder of the whole adapter, whose tokenizer comes along; None for a model in memory.

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
            now, metadata = read_tensors(part / WEIGHTS_FILE)
            in_formats = {key: tensor.to(search.format_of(key)).contiguous() for key, tensor in now.items()}
            save_file(in_formats, part / WEIGHTS_FILE, metadata=metadata)
            copy_tokenizer(source, part)
            _name_as_in(source, part)
            if search.note:
                write_json(part / NOTE_FILE, search.note)
        deviation = _deviations(search, part, merge=source is not None)
        result = Compressed(
            out=out, chosen=chosen, whole_size=search.whole_size, whole_quality=float(search.whole_rows.mean()),
            base_quality=float(search.base_rows.mean()), candidates=tuple(search.candidates), measure=search.rows.measure,
            order=search.order, goal=search.goal, rows=len(search.rows.held_out),
            deviation={key: value for key, value in deviation.items() if key != "bound"},
            merges=None if source is None else deviation.get("merged", math.inf) <= deviation["bound"],
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


def _name_as_in(source: Path, part: Path) -> None:
    """Has the configuration name the base model that the whole adapter names, and each module that is trained whole once.

    PEFT puts in the place that the base model was loaded from here, and adds a classifier's head each time it loads one.
    """
    config = read_config(part)
    config["base_model_name_or_path"] = read_config(source).get("base_model_name_or_path") or config["base_model_name_or_path"]
    if config.get("modules_to_save"):
        config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))
    write_json(part / CONFIG_FILE, config)


def _deviations(search: Search, folder: Path, merge: bool) -> dict[str, float]:
    """Loads what was written beside the adapter that was measured, and compares logits on a few rows.

    Args:
        merge: also merge it. The base weights are rounded by that.

    Returns:
        The largest difference of logits, "loaded" and, if PEFT can merge it, "merged"; and the "bound" of what is rounding.

    Raises:
        GatewiseError: what was written is another function.
    """
    model = search.loaded.model
    few = {key: value[:4].to(next(model.parameters()).device) for key, value in search.batch.items()}
    report = "so nothing was written: please report this, with the adapter's adapter_config.json"
    with measuring(model):
        wanted = scored(model, few).logits.float()
        found = {"bound": _BOUND * max(1.0, float(wanted.abs().max()))}

        def deviation() -> float:
            return float((scored(model, few).logits.float() - wanted).abs().max())

        try:
            result = model.load_adapter(str(folder), _CHECK)
            if odd := [*result.missing_keys, *result.unexpected_keys]:
                raise GatewiseError(f"the adapter as written does not fit its base model ({some(sorted(odd), 1)}), {report}")
            model.set_adapter(_CHECK)
            found["loaded"] = deviation()
            if not found["loaded"] <= found["bound"]:
                raise GatewiseError(
                    f"the adapter as written gives logits that differ by {found['loaded']:.3g} from those of the one that was "
                    f"measured, {report}"
                )
            if merge:
                try:
                    model.merge_adapter([_CHECK])
                    found["merged"] = deviation()
                except (NotImplementedError, RuntimeError, TypeError, ValueError):  # layers that PEFT cannot merge
                    pass
                model.unmerge_adapter()
        finally:
            model.set_adapter(search.name)
            if _CHECK in model.peft_config:
                model.delete_adapter(_CHECK)
    return found
