"""What a compression writes: plain LoRA, what engines must be told of it, and a report."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gatewise.adapters.export import to_lora
from gatewise.adapters.files import NOTE_FILE, WEIGHTS_FILE, LoraAdapter, read_lora, read_tensors
from gatewise.compress.goal import Candidate, Compressed
from gatewise.compress.search import Search
from gatewise.compress.timing import seconds_a_step
from gatewise.errors import GatewiseError
from gatewise.files import finite, whole_folder, write_json
from gatewise.losses import scored
from gatewise.tasks.metrics import measuring

REPORT_FILE = "compress.json"
SERVING_FILE = "serving.json"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM (0.32 and 0.33) takes as ``--max-lora-rank``."""
_PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_CHECK = "gatewise-check"  # what the adapter as written is called, beside the one that was measured
_BOUND = 0.02  # of the largest logit: more than rounding


def written(chosen: Candidate, out: Path, search: Search, source: Path | None) -> Compressed:
    """Writes the adapter that a search chose, and looks whether it is the one that was measured.

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
            # A base embedding comes along if it did before, as with a vocabulary that was resized.
            embedding: Any = "auto" if source is None else _has_embedding(source)
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=embedding)
            to_lora(Path(folder) / ("" if name == "default" else name), part)
        if source is not None:
            _as_in(source, part, search.dtype)
            if (source / "tokenizer_config.json").is_file():
                search.loaded.tokenizer.save_pretrained(str(part))
            if search.note:
                write_json(part / NOTE_FILE, search.note)
        deviation, seconds = _compared(search, part, merge=source is not None)
        result = Compressed(
            out=out, chosen=chosen, whole_size=search.sizes[0], whole_quality=float(search.whole_rows.mean()),
            base_quality=float(search.base_rows.mean()), candidates=tuple(search.candidates), measure=search.rows.measure,
            order=search.order, goal=search.goal, rows=len(search.rows.held_out), seconds=seconds, deviation=deviation,
        )  # fmt: skip
        write_json(part / SERVING_FILE, serving_settings(read_lora(part)))
        write_json(part / REPORT_FILE, {"format": 1, **finite({**asdict(replace(result, out=Path())), "out": None})})
    return result


def _has_embedding(source: Path) -> bool:
    return any(name.endswith(".base_layer.weight") or "embed" in name for name in read_lora(source).others)


def _as_in(source: Path, part: Path, dtype: torch.dtype) -> None:
    """Gives tensors the number format that they have in the whole adapter's file."""
    before, _ = read_tensors(source / WEIGHTS_FILE)
    now, metadata = read_tensors(part / WEIGHTS_FILE)
    formats = {name: dtype if ".lora_" in name or name not in before else before[name].dtype for name in now}
    cast = {name: tensor.to(formats[name]).contiguous() for name, tensor in now.items()}
    save_file(cast, part / WEIGHTS_FILE, metadata=metadata)


def _compared(search: Search, folder: Path, merge: bool) -> tuple[dict[str, float], tuple[float, float, float] | None]:
    """Loads what was written beside the adapter that was measured.

    Args:
        merge: also merge it. The base weights are not quite the same after that.

    Returns:
        The largest difference of logits on a few rows; and where time counts, the seconds of a step with the whole adapter, with
        what was written, and with none.

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
            model.load_adapter(str(folder), _CHECK)
            model.set_adapter(_CHECK)
            found["loaded"] = deviation()
            if not found["loaded"] <= _BOUND * max(1.0, float(wanted.abs().max())):
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
    return found, seconds


def serving_settings(adapter: LoraAdapter) -> dict[str, Any]:
    """What serving engines must be told of an adapter.

    vLLM runs its LoRA kernels on every module that any adapter could adapt, unless ``--lora-target-modules`` names those that are,
    and reserves room for ``--max-lora-rank``. It packs queries, keys and values into one module, and gate and up projections into
    another; both names are given. It takes no DoRA, no biases and no modules that were trained as a whole.
    """
    paths = sorted(module.path for module in adapter.modules)
    rank = max(len(module.a) // (module.blocks if module.stacked else 1) for module in adapter.modules)
    extra = any(module.others for module in adapter.modules) or bool(adapter.others)
    return _settings(paths, rank, adapter.config.get("base_model_name_or_path"), extra)


def settings_together(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of an engine that serves several adapters of one base."""
    modules = sorted({path for one in settings for path in one["modules"]})
    rank = max(one["largest_rank"] for one in settings)
    return _settings(modules, rank, settings[0]["base_model"], any(one["vllm"] is None for one in settings))


def _settings(modules: list[str], rank: int, base: str | None, extra: bool) -> dict[str, Any]:
    packed = {
        f"{owner}.{_PACKED[kind]}" for owner, dot, kind in (path.rpartition(".") for path in modules) if dot and kind in _PACKED
    }
    allowed = next((one for one in VLLM_RANKS if one >= rank), None)
    vllm: Mapping[str, Any] | None = None
    if not extra and allowed is not None:
        arguments = ["--enable-lora", "--max-lora-rank", str(allowed), "--lora-target-modules", *sorted({*modules, *packed})]
        vllm = {"max_lora_rank": allowed, "arguments": arguments}
    return {"format": 1, "base_model": base, "modules": modules, "largest_rank": rank, "vllm": vllm}
