"""A routed adapter whose choice hardly moves -> plain LoRA, which every engine serves and which can be merged. Ours, not a paper's.

    y = W x + gate · alpha / r · B A x      the gate of each prompt    becomes    y = W x + alpha / r · (c B) A x      one for all

1. Some rows choose: their prompts are routed, which gives each module the share of prompts that keep it and its mean gate, zeros
   counted. The mean is the constant c that is nearest to all gates in the mean square.
2. Modules that few prompts keep go, and leave ``target_modules``. A candidate is a set "kept by at least this share of prompts"
   with the mean gates, or with those of a layer scaled up until they add up to what they did before modules went.
3. Candidates are written and measured on the rows that choose. Taken is the one with the fewest modules whose loss is at most
   ``SLACK`` above the lowest of all.
4. It is compared with the routed adapter on the other rows, pair by pair (``quality``). What is measured is what is written.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.export import copy_tokenizer
from gatewise.adapters.files import CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE, LoraAdapter, LoraModule, read_config, read_lora
from gatewise.adapters.loading import Loaded, load_with_data
from gatewise.adapters.lora import rank_settings
from gatewise.compress.quality import Difference, Measure, check_rows, difference, measure_for, qualities, split
from gatewise.compress.search import shown_of, without_repeats
from gatewise.errors import GatewiseError
from gatewise.files import check_new_folder, finite, whole_folder, write_json
from gatewise.progress import ConsoleProgress, quiet
from gatewise.routed import RoutedLoraConfig
from gatewise.routed.statistics import routing_of_batches
from gatewise.serving.engines import SERVING_FILE, model_type_of, serving_settings
from gatewise.tasks import PadCollator, Records
from gatewise.tasks.metrics import encoded, measuring

SHARES = (0.5, 0.25, 0.1, 0.0)
"""The candidates: modules that at least this share of prompts keeps; 0 is those that any prompt keeps."""

SLACK = 0.01
"""Nats a token above the lowest loss of all candidates that fewer modules may cost."""

LEAST = 20
"""Rows that choose, and rows that measure."""

ROWS = 128
"""Rows that choose, unless told otherwise."""

REPORT_FILE = "static.json"
_ROUTER = ".lora_router."


@dataclass(frozen=True)
class Choice:
    """How much the choice of modules moves from prompt to prompt.

    Attributes:
        prompts: how many were routed.
        modal: layer -> the share of prompts that keep the set of modules that most of them keep. 1 is the same set for all.
        share, gate: module -> the share of prompts that keep it, and its mean gate over all prompts.
    """

    prompts: int
    modal: Mapping[str, float]
    share: Mapping[str, float]
    gate: Mapping[str, float]

    @property
    def mean_modal(self) -> float:
        """The mean of ``modal`` over layers."""
        return sum(self.modal.values()) / len(self.modal)


@dataclass(frozen=True)
class StaticCandidate:
    """A plain adapter that was measured on the rows that choose.

    Attributes:
        least_share: of prompts that keep one of its modules.
        scaled: the gates of a layer were scaled up.
        modules, parameters: its size; a trained head comes on top.
        loss: nats a token, the mean over rows.
    """

    least_share: float
    scaled: bool
    modules: int
    parameters: int
    loss: float


@dataclass(frozen=True)
class Static:
    """What became of a routed adapter.

    Attributes:
        out: the folder written.
        choice: how much the routing moved.
        chosen: the candidate that was taken; candidates: all of them.
        routed_modules, routed_parameters: the size of the routed adapter, its routers included.
        kept_modules: how many modules a prompt keeps.
        loss: how much worse the plain adapter is on the rows that measure, in nats a token; right: in shares of right answers,
            where there are such.
        quality: "routed", "static" and "base" (no adapter) -> loss and, where there are right answers, their share.
        measure: which of the two the tolerance is about.
    """

    out: Path
    choice: Choice
    chosen: StaticCandidate
    candidates: tuple[StaticCandidate, ...]
    routed_modules: int
    routed_parameters: int
    kept_modules: int
    loss: Difference
    right: Difference | None
    quality: Mapping[str, Mapping[str, float]]
    measure: Measure


def to_static(
    adapter: str | Path,
    data: str,
    out: str | Path,
    *,
    options: DataOptions = DataOptions(),
    modules: int | None = None,
    share: float | None = None,
    tolerance: float | None = None,
    measure: Measure | None = None,
    rows: int = ROWS,
    seed: int = 0,
    console: Console | None = None,
) -> Static:
    """Writes a routed adapter as plain LoRA in which all prompts have the same gates, and measures what that loses.

    The folder is an ordinary adapter of PEFT: gates are in B, ``target_modules`` names exactly what is left, and the note on
    prompts, the tokenizer, ``serving.json`` and the report ``static.json`` lie beside it.

    Args:
        adapter: the folder of a routed adapter.
        data, options: as for ``gatewise.adapters.loading.load_with_data``.
        out: the folder to write, new or empty.
        modules: keep so many, those that most prompts keep, instead of looking for the set.
        share: keep those that at least this share of prompts keeps, above 0 to 1; 0 those that any does.
        tolerance: write nothing if the plain adapter is worse by more, with a confidence of 95%: in shares of right answers or in
            nats a token, see ``measure``. None writes it whatever it loses.
        measure: "right" answers, or "loss"; None for right answers where there are some.
        rows: those that choose, drawn by the seed, at most half of all; the others measure.
        console: where progress is shown; stderr by default.

    Raises:
        GatewiseError: not a routed adapter, too few rows, settings out of range, an intolerable loss, or files that cannot be read
            or written.
    """
    _check(adapter, modules, share, tolerance, measure, rows)
    check_new_folder(out)
    progress = ConsoleProgress(console or Console(stderr=True))
    with quiet(bars=True):
        loaded = load_with_data(adapter, data, options, say=progress.say)
        records = without_repeats(loaded.records, loaded.template, progress.say)
        if len(records) < 2 * LEAST:
            raise GatewiseError(
                f"{records.source} has {len(records)} rows, and of those that choose modules none may measure: give at least "
                f"{2 * LEAST}"
            )
        shown = shown_of(records, loaded.template)
        choosing, held_out = split(records, min(rows, len(records) // 2), seed, shown)
        measure = measure or measure_for(records)
        if measure == "right" and records.kind == "generation":
            raise GatewiseError(f"{records.source} has free text, of which none is right or wrong: take --measure loss")
        if tolerance is not None:
            check_rows(held_out, measure, tolerance)
        work = _Work(loaded, read_lora(adapter), Path(adapter), choosing, held_out, progress)
        return work.run(Path(out), modules, share, tolerance, measure)


def _check(
    adapter: str | Path, modules: int | None, share: float | None, tolerance: float | None, measure: Measure | None, rows: int
) -> None:
    config = read_config(adapter)
    kind = str(config.get("peft_type"))
    if kind != "ROUTED_LORA":
        raise GatewiseError(
            f"{adapter} is of peft_type {kind!r}, expected a routed adapter (ROUTED_LORA, method milora): other adapters are the "
            "same for all prompts already; leave --static out"
        )
    if config.get("adapt", "always") != "always":
        raise GatewiseError(
            f"{adapter} adapts what comes after a prompt (adapt='after_prompt'), and plain LoRA adapts the prompt too, so that it "
            "would be another model: use it routed"
        )
    if modules is not None and share is not None:
        raise GatewiseError("modules and share were both given, which say the same in two ways: leave one of them out")
    if modules is not None and modules < 1:
        raise GatewiseError(f"modules is {modules}: expected at least 1 (--modules)")
    if share is not None and not 0 <= share <= 1:
        raise GatewiseError(f"share is {share}: expected a share of prompts from 0 to 1 (--share)")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise GatewiseError(f"the tolerance is {tolerance}: expected a number above zero, such as 0.01 (--tolerance)")
    if rows < LEAST:
        raise GatewiseError(f"rows is {rows}: expected at least {LEAST} to choose modules by (--rows)")
    if measure not in (None, "right", "loss"):
        raise GatewiseError(f"measure {measure!r} is not known; expected right or loss")


# ---------------------------------------------------------------- the choice


def choice_of(routing: Any) -> Choice:
    """What the gates of a ``Routing`` say of its prompts."""
    gates = routing.gates.double()  # (n, l, m)
    kept = gates > 0
    share: dict[str, float] = {}
    gate: dict[str, float] = {}
    for at, (layer, names) in enumerate(zip(routing.layers, routing.modules, strict=True)):
        for column, name in enumerate(names):
            share[f"{layer}.{name}"] = float(kept[:, at, column].double().mean())
            gate[f"{layer}.{name}"] = float(gates[:, at, column].mean())
    modal = {
        layer: float(one.unique(dim=0, return_counts=True)[1].max()) / len(kept)
        for layer, one in zip(routing.layers, kept.unbind(dim=1), strict=True)
    }
    return Choice(len(kept), modal, share, gate)


def static_gates(choice: Choice, paths: Sequence[str], layer_of: Mapping[str, str], scaled: bool) -> dict[str, float]:
    """The constant gates of the modules that are left.

    Args:
        layer_of: module -> its layer.
        scaled: scale those of a layer up until they add up to the mean gates of all its modules.
    """
    if not scaled:
        return {path: choice.gate[path] for path in paths}
    whole, left = (
        {layer: sum(choice.gate[path] for path in group if layer_of[path] == layer) for layer in set(layer_of.values())}
        for group in (choice.gate, paths)
    )
    return {path: choice.gate[path] * whole[layer_of[path]] / left[layer_of[path]] for path in paths}


# ---------------------------------------------------------------- candidates


class _Work:
    """The models and rows of one export."""

    def __init__(
        self, loaded: Loaded, file: LoraAdapter, source: Path, choosing: Records, held_out: Records, progress: ConsoleProgress
    ) -> None:
        self.loaded, self.file, self.source, self.progress = loaded, file, source, progress
        self.choosing, self.held_out = choosing, held_out
        self.modules = {module.path: module for module in file.modules}

    def run(self, out: Path, modules: int | None, share: float | None, tolerance: float | None, measure: Measure) -> Static:
        model = self.loaded.model
        choice, layer_of, top_k = self._routed_choice()
        by_measure = {"routed": self._measured(model, self.held_out)}
        with model.disable_adapter():
            by_measure["base"] = self._measured(model, self.held_out)
        base: Any = model.unload()
        sets = _sets(choice, modules, share)
        candidates: list[tuple[StaticCandidate, dict[str, float]]] = []
        for least, paths in sets:
            for scaled in (False, True):
                gates = static_gates(choice, paths, layer_of, scaled)
                if any(gates == other for _, other in candidates):
                    continue  # no gate was lost
                kept = [_gated(self.modules[path], gate) for path, gate in gates.items()]
                with tempfile.TemporaryDirectory() as folder:
                    self._write(Path(folder), kept)
                    with _plain(base, Path(folder)) as plain:
                        loss = -float(self._qualities(plain, self.choosing, "loss").mean())
                parameters = sum(one.a.numel() + one.b.numel() for one in kept)
                candidates.append((StaticCandidate(least, scaled, len(kept), parameters, loss), gates))
        if not all(math.isfinite(one.loss) for one, _ in candidates):
            raise GatewiseError(
                f"the loss on {self.choosing.source} is not finite: look for numbers that are not in the adapter and its base model"
            )
        lowest = min(one.loss for one, _ in candidates)
        good = [pair for pair in candidates if pair[0].loss <= lowest + SLACK]
        chosen, gates = min(good, key=lambda pair: (pair[0].modules, pair[0].loss))
        with whole_folder(out) as part:
            self._write(part, [_gated(self.modules[path], gate) for path, gate in gates.items()])
            self._write_beside(part, base)
            with _plain(base, part) as plain:
                by_measure["static"] = self._measured(plain, self.held_out)
            gaps = {name: difference(by_measure["routed"][name], by_measure["static"][name], name) for name in by_measure["routed"]}
            if tolerance is not None and not gaps[measure].within(tolerance):
                raise _intolerable(gaps[measure], measure, tolerance)
            result = Static(
                out=out, choice=choice, chosen=chosen, candidates=tuple(one for one, _ in candidates),
                routed_modules=len(self.modules),
                routed_parameters=sum(one.a.numel() + one.b.numel() for one in self.file.modules)
                + sum(tensor.numel() for name, tensor in self.file.others.items() if _ROUTER in name),
                kept_modules=top_k * len(choice.modal), loss=gaps["loss"], right=gaps.get("right"),
                quality={
                    who: {name: abs(float(found.mean())) for name, found in both.items()} for who, both in by_measure.items()
                },
                measure=measure,
            )  # fmt: skip
            write_json(part / REPORT_FILE, {"format": 1, **finite({**asdict(replace(result, out=Path())), "out": None})})
        return result

    def _routed_choice(self) -> tuple[Choice, dict[str, str], int]:
        loaded, records = self.loaded, self.choosing
        config = loaded.model.peft_config[str(loaded.model.active_adapter)]
        assert isinstance(config, RoutedLoraConfig)
        features = encoded(loaded.model, loaded.tokenizer, records, loaded.template, loaded.max_length)
        collate, device = PadCollator(loaded.tokenizer), next(loaded.model.parameters()).device
        batches = (
            {name: value.to(device) for name, value in collate(features[start : start + 16]).items()}
            for start in range(0, len(features), 16)
        )
        with measuring(loaded.model):
            routing = routing_of_batches(loaded.model, batches)
        layer_of = {
            f"{layer}.{name}": layer for layer, names in zip(routing.layers, routing.modules, strict=True) for name in names
        }
        return choice_of(routing), layer_of, config.top_k

    def _measured(self, model: nn.Module, records: Records) -> dict[Measure, Tensor]:
        wanted: list[Measure] = ["loss"] if records.kind == "generation" else ["loss", "right"]
        return {name: self._qualities(model, records, name) for name in wanted}

    def _qualities(self, model: nn.Module, records: Records, measure: Measure) -> Tensor:
        loaded = self.loaded
        with self.progress.counting("measuring") as count:
            return qualities(
                model, loaded.tokenizer, records, loaded.template, measure, max_length=loaded.max_length, progress=count
            )

    def _write(self, folder: Path, modules: Sequence[LoraModule]) -> None:
        """The adapter itself: weights and configuration."""
        tensors = {name: tensor for name, tensor in self.file.others.items() if _ROUTER not in name}
        for module in modules:
            name_of_a, name_of_b = module.keys
            tensors |= {name_of_a: module.a.contiguous(), name_of_b: module.b.contiguous()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"} | self.file.metadata)
        (folder / CONFIG_FILE).write_text(json.dumps(_config(self.file.config, modules), indent=2) + "\n", encoding="utf-8")

    def _write_beside(self, folder: Path, base: nn.Module) -> None:
        if (self.source / NOTE_FILE).is_file():
            shutil.copyfile(self.source / NOTE_FILE, folder / NOTE_FILE)
        copy_tokenizer(self.source, folder)
        write_json(folder / SERVING_FILE, serving_settings(read_lora(folder), model_type_of(base)))


def _sets(choice: Choice, modules: int | None, share: float | None) -> Iterator[tuple[float, list[str]]]:
    """Sets of modules to try, each with the least share of prompts that keep one of them; none twice."""
    kept = [path for path, kept_by in choice.share.items() if kept_by > 0]
    order = sorted(kept, key=lambda path: (-choice.share[path], -choice.gate[path]))
    if modules is not None:
        tried = [order[:modules]]
    else:
        tried = [[path for path in order if choice.share[path] >= least] for least in (SHARES if share is None else (share,))]
    seen: set[int] = set()
    for paths in tried:
        if paths and len(paths) not in seen:
            seen.add(len(paths))
            yield min(choice.share[path] for path in paths), paths
    if not seen:
        raise GatewiseError(
            f"no module is kept by {share:.0%} of the prompts, the most is {max(choice.share.values()):.0%}: give a lower share "
            "(--share)"
        )


def _gated(module: LoraModule, gate: float) -> LoraModule:
    """The module with a gate in its B."""
    return replace(module, b=(module.b.double() * gate).to(module.b.dtype))


def _config(config: Mapping[str, Any], modules: Sequence[LoraModule]) -> dict[str, Any]:
    """That of plain LoRA on exactly these modules."""
    routers_own = {one.name for one in fields(RoutedLoraConfig)} - {one.name for one in fields(LoraConfig)}
    ranks = rank_settings({module.path: len(module.a) for module in modules}, {module.path: module.scaling for module in modules})
    return {
        **{name: value for name, value in config.items() if name not in routers_own},
        **ranks,
        "peft_type": "LORA",
        "target_modules": sorted(module.path for module in modules),
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        "use_rslora": False,
        "inference_mode": True,
    }


@contextmanager
def _plain(base: Any, folder: Path) -> Iterator[PeftModel]:
    """The base model with the adapter of a folder, for a while."""
    model = PeftModel.from_pretrained(base, str(folder), torch_device="cpu").to(next(base.parameters()).device).eval()
    try:
        yield model
    finally:
        model.unload()


def _intolerable(gap: Difference, measure: Measure, tolerance: float) -> GatewiseError:
    unit = "of the answers" if measure == "right" else "nats a token"
    return GatewiseError(
        f"plain LoRA is worse than the routed adapter by {gap.mean:.4f} {unit}, at most by {gap.high:.4f} with 95% confidence "
        f"({gap.rows} rows), and the tolerance is {tolerance:g}, so nothing was written: allow more (--tolerance), keep more "
        "modules (--share 0), or use the adapter routed"
    )
