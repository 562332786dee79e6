"""A finished LoRA adapter -> the smallest one that is as good on some data.

1. Every module is turned into its singular basis (``basis``), so that a rank is a singular direction.
2. Ranks are valued on rows of their own, and all that can be dropped is put into one order by value a unit of cost (``order``).
3. The whole adapter and what is left without any rank are measured on held-out rows (``quality``).
4. Bisection over the order finds how far one can go (``search``). Each candidate is measured on the same held-out rows; what does
   not hold is trained on for some steps where there are rows to do so (``recovery``), and measured again.
5. The winner is written as plain LoRA at its true ranks, with what engines need to know, loaded again and compared (``writing``).

The idea is gatewise's own, not a paper's; the parts that are others' (the scores, low-rank rotations) are named where they stand.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from gatewise import __version__
from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import read_note, read_tensors, weights_of
from gatewise.adapters.loading import Loaded, load_with_data, read_rows
from gatewise.adapters.lora import active_adapter
from gatewise.compress.goal import Compressed, Goal
from gatewise.compress.order import ORDERS
from gatewise.compress.quality import MEASURES, Measure
from gatewise.compress.recovery import Recovery
from gatewise.compress.rows import Rows, rows_for
from gatewise.compress.search import Search, left_as_it_was
from gatewise.compress.work import files_of, fingerprint_of, locked_work
from gatewise.compress.writing import write_chosen
from gatewise.errors import GatewiseError
from gatewise.files import check_new_folder
from gatewise.losses import base_of, loss_kind
from gatewise.models.cache import folder_of
from gatewise.models.loading import names_in
from gatewise.progress import ConsoleProgress, quiet
from gatewise.tasks import Records, default_template

WITHIN = Goal()


def compress(
    model_or_dir: PeftModel | str | Path,
    data: str | Path | Records,
    out: str | Path,
    goal: Goal = WITHIN,
    *,
    options: DataOptions = DataOptions(),
    recovery: Recovery | None = None,
    order: str = ORDERS[0],
    measure: Measure | None = None,
    score_rows: int = 128,
    looks: int = 7,
    seed: int = 0,
    tokenizer: Any = None,
    template: Any = None,
    adapter: str | None = None,
    console: Console | None = None,
) -> Compressed:
    """Gives back the smallest adapter that is as good on the data, or the best of a given size, and writes it.

    Args:
        model_or_dir: the folder of any LoRA adapter that PEFT loads, or a model in memory, which is afterwards as it was.
        data: rows that measure, of which the scored ones are taken out unless there are rows to recover on; with a model in memory
            a file, a sample or ``Records``.
        out: the folder to write, new or empty. Beside it lies OUT.work while this runs: what was measured and trained, so that the
            same call, or one with another tolerance, goes on after an interruption or a refusal. Not for a model in memory.
        goal: what the smaller adapter is to be.
        options: how to read the data, and where the model runs; of a model in memory, how to read a file.
        recovery: rows to train on after ranks are gone. Without them nothing is trained but one number a rank.
        order: how ranks are valued, see ``rank_values``.
        measure: "right" answers, or "loss"; None for right answers where there are some.
        score_rows: rows that value ranks, and that single numbers are fitted on.
        looks: candidates that bisection measures at most.
        seed: of all draws.
        tokenizer, template: of a model in memory, without a template ``default_template``; ``adapter``: which of its adapters,
            None for the active one.
        console: where progress is shown; stderr by default.

    Raises:
        GatewiseError: adapter, model or data cannot be read or do not fit; too few rows; an adapter that does nothing here; a
            target or tolerance that nothing meets.
    """
    if order not in ORDERS:
        raise GatewiseError(f"order {order!r} is not known; expected one of {', '.join(ORDERS)}")
    if measure is not None and measure not in MEASURES:
        raise GatewiseError(f"measure {measure!r} is not known; expected one of {', '.join(MEASURES)}")
    if score_rows < 1 or looks < 1:
        raise GatewiseError(f"score_rows is {score_rows} and looks is {looks}: expected at least 1 of each")
    check_new_folder(out)
    source = None if isinstance(model_or_dir, PeftModel) else Path(model_or_dir)
    progress = ConsoleProgress(console or Console(stderr=True))
    with quiet(bars=True):
        loaded, note = _loaded(model_or_dir, data, options, tokenizer, template, recovery is not None, progress)
        rows = rows_for(loaded, measure, goal, recovery, score_rows, seed, progress.say)
        # Neither a tolerance nor a size changes what is measured, only how far the search goes.
        settings = {
            "unit": goal.unit,
            "rank_cap": goal.rank_cap,
            "recovery": recovery and asdict(recovery),
            "order": order,
            "seed": seed,
        }
        fingerprint = None if source is None else _fingerprint(settings, source, loaded, rows, note)
        name = active_adapter(loaded.model, adapter)
        with locked_work(out, fingerprint) as work, left_as_it_was(loaded.model, name):
            formats = _stored_formats(source) if source is not None else (torch.float32, {})
            search = Search(loaded, name, rows, goal, recovery, order, seed, note, work, progress, *formats)
            try:
                search.prepare()
            except GatewiseError as error:
                if error.__cause__ is None:  # it would be refused again; a full disk may be mended
                    work.remove()
                raise
            chosen = search.of_size() if goal.has_target else search.smallest(looks)
            return write_chosen(chosen, Path(out), search, source)


def _loaded(
    model_or_dir: PeftModel | str | Path,
    data: str | Path | Records,
    options: DataOptions,
    tokenizer: Any,
    template: Any,
    trainable: bool,
    progress: ConsoleProgress,
) -> tuple[Loaded, Mapping[str, Any]]:
    data = str(data) if isinstance(data, Path) else data
    if not isinstance(model_or_dir, PeftModel):
        if not isinstance(data, str):
            raise GatewiseError(
                "data is Records, which go with a model in memory: give the name of a file with an adapter's folder"
            )
        return load_with_data(model_or_dir, data, options, trainable=trainable, say=progress.say), read_note(model_or_dir)
    if tokenizer is None:
        raise GatewiseError("a model in memory was given without its tokenizer: pass tokenizer=")
    kind, base = loss_kind(model_or_dir), base_of(model_or_dir)
    if kind not in ("causal", "rows"):
        named = type(base).__name__
        raise GatewiseError(f"{named} neither writes token by token nor sorts rows into classes: only such models are made smaller")
    if options.base is not None or options.device != "auto":
        raise GatewiseError("options name a base model or a device, but the model is in memory: leave them out")
    names = names_in(base.config)
    if isinstance(data, Records):
        if options != DataOptions():
            raise GatewiseError("options say how to read a file, but data is Records, which are read already: leave them out")
        records, own = data, default_template(data) if kind == "causal" else None
        if kind == "rows" and names is not None and set(data.labels or ()) == set(names):
            records = replace(data, labels=names)  # in the order of the classes, and not that of a file
    else:
        records, own = read_rows("the model in memory", data, options, {}, kind == "causal", lambda: names)
    if template is not None and kind == "rows":
        raise GatewiseError("a template was given for a classifier, which reads the text itself: leave it out")
    if template is not None and (options.prompt is not None or "=" in (options.labels or "")):
        raise GatewiseError("a template was given, and a prompt or words for labels in options: give them in one of the two")
    return Loaded(model_or_dir, tokenizer, "", records, template or own, 512), {}


def _fingerprint(settings: Mapping[str, Any], source: Path, loaded: Loaded, rows: Rows, note: Mapping[str, Any]) -> str:
    """Of a call's settings, data, adapter and base: another call with the same may go on with what it measured."""
    weight: Any = next(loaded.model.parameters())
    records = [one for one in (rows.held_out, rows.scored, rows.train) if one]
    base = folder_of(loaded.base)
    read = {
        "template": None if loaded.template is None else [loaded.template.prompt, loaded.template.labels],
        "max_length": loaded.max_length, "base": loaded.base, "dtype": str(weight.dtype), "device": str(weight.device),
        "note": note, "measure": rows.measure, "version": __version__,
        "rows": [one.rows for one in records], "labels": [one.labels for one in records],
        "base_files": files_of(base) if base else None,
    }  # fmt: skip
    return fingerprint_of({**settings, **read}, source)


def _stored_formats(folder: Path) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The number format of an adapter's factors on disk, and of its other tensors there by name."""
    tensors, _ = read_tensors(weights_of(folder))
    formats = {name: tensor.dtype for name, tensor in tensors.items()}
    factors = next((dtype for name, dtype in formats.items() if ".lora_" in name), torch.float32)
    return factors, {name: dtype for name, dtype in formats.items() if ".lora_" not in name}
