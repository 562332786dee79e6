"""A finished LoRA adapter -> the smallest one that is as good on some data.

1. Every module is turned into its singular basis (``basis``), so that a rank is a singular direction.
2. Ranks are valued on rows of their own, and all that can be dropped is put into one order by value a unit of cost (``order``).
3. The whole adapter and what is left without any rank are measured on held-out rows (``quality``).
4. Bisection over the order finds how far one can go (``search``). Each candidate is measured on the same held-out rows; what is
   not good enough is trained on for some steps where there are rows to do so (``recovery``), and measured again.
5. The chosen one is written as plain LoRA at its true ranks, with what engines need to know, loaded again and compared (here).

The idea is gatewise's own, not a paper's; the parts that are others' (the scores, low-rank rotations) are named where they stand.
"""

import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from safetensors.torch import save_file

from gatewise import __version__
from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.export import check_plain_lora, copy_tokenizer, to_lora
from gatewise.adapters.files import CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE, fingerprint, read_lora
from gatewise.adapters.loading import Loaded, load_with_data
from gatewise.compress.order import ORDERS
from gatewise.compress.quality import Measure
from gatewise.compress.recovery import Recovery
from gatewise.compress.rows import Rows, rows_for
from gatewise.compress.search import Candidate, Goal, Search, Size
from gatewise.errors import GatewiseError, some
from gatewise.files import check_new_folder, finite, whole_folder, write_json
from gatewise.inspection.card import carry_card
from gatewise.losses import scored
from gatewise.models.loading import folder_of
from gatewise.progress import ConsoleProgress, quiet
from gatewise.serving.engines import SERVING_FILE, serving_settings
from gatewise.tasks.metrics import measuring

REPORT_FILE = "compress.json"
_CHECK = "gatewise-check"  # what the adapter as written is called, beside the one that was measured
WITHIN = Goal()
_BOUND = 0.02  # of the largest logit: more than rounding
_READ = (".json", ".txt", ".model", ".jinja", ".py")  # configurations, and what tokenizers are made of


@dataclass(frozen=True)
class Compressed:
    """What a compression did, which ``compress.json`` says too.

    Attributes:
        chosen: the smaller adapter; whole_size, whole_quality and base_quality: of the whole one, and quality without any.
        candidates: all that were measured, in order.
        measure: "right" or "loss"; order, goal: how it was searched.
        deviation: the largest difference of logits between the adapter as measured and as written.
    """

    chosen: Candidate
    whole_size: Size
    whole_quality: float
    base_quality: float
    candidates: tuple[Candidate, ...]
    measure: str
    order: str
    goal: Goal
    deviation: float


def compress(
    adapter: str | Path,
    data: str | Path,
    out: str | Path,
    goal: Goal = WITHIN,
    *,
    options: DataOptions = DataOptions(),
    recovery: Recovery | None = None,
    order: str = ORDERS[0],
    measure: Measure | None = None,
    score_rows: int = 128,
) -> Compressed:
    """Writes the smallest adapter that is as good on the data, or the best of a given size.

    As good is a bound of a paired bootstrap over the measuring rows, which holds for all candidates together: up to seven, twice as
    many with ``recovery``. It takes 300 rows for right answers and a tolerance of 0.01, 150 for losses; of rows that show a model
    the same text the first counts, and none that a measuring row shows is trained on. A bound beside a size takes 20 rows, or 150.

    DoRA modules, and those with a LoRA bias, keep one rank. LoRA on convolutions and ``nn.MultiheadAttention`` stays as it is. The
    experts of a stacked parameter are stored at the rank of the one that has most. Refused are routed adapters, prompts, AdaLoRA,
    LoRA on convolutions in groups, biases that were trained, PiSSA and its kin, and variants whose ranks cannot be taken away.

    Args:
        adapter: the folder of any LoRA adapter that PEFT loads.
        data: rows that measure, of which the scored ones are taken out unless there are rows to recover on.
        out: the folder to write, new or empty. Beside it lies OUT.work while this runs: what was measured and trained, so that the
            same call, or one with another tolerance or size, goes on after an interruption or a refusal.
        goal: what the smaller adapter is to be.
        options: how to read the data, and where the model runs.
        recovery: rows to train on after ranks are gone. Without them nothing is trained but one number a rank.
        order: how ranks are valued, see ``rank_values``.
        measure: "right" answers, or "loss"; None for right answers where there are some.
        score_rows: rows that value ranks, and that single numbers are fitted on.

    Raises:
        GatewiseError: adapter, model or data cannot be read or do not fit; too few rows; an adapter that does nothing here; a
            size or tolerance that nothing meets.
    """
    for name, value, known in (("order", order, ORDERS), ("measure", measure or "loss", get_args(Measure))):
        if value not in known:
            raise GatewiseError(f"{name} {value!r} is not known; expected one of {', '.join(known)}")
    check_new_folder(out)
    source, place, progress = Path(adapter), Path(out).resolve(), ConsoleProgress(Console(stderr=True))
    place = place.with_name(f"{place.name}.work")
    check_plain_lora(source)
    read_lora(source)  # refuses layers of which ranks cannot be taken
    with quiet(bars=True):
        loaded = load_with_data(source, str(data), options, trainable=True, say=progress.say)
        rows = rows_for(loaded, measure, goal.tolerance if goal.size is None else None, recovery, score_rows, progress.say)
        # Neither a tolerance nor a size changes what is measured, only how far the search goes.
        work = place / _fingerprint(source, loaded, rows, goal, recovery, order)
        search = Search(source, loaded, rows, goal, recovery, order, work, progress)
        result = _write(search, order, Path(out), source)
    for folder in place.glob("[0-9a-f]" * 16):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        place.rmdir()
    return result


def _fingerprint(source: Path, loaded: Loaded, rows: Rows, goal: Goal, recovery: Recovery | None, order: str) -> str:
    """Of all that measurements rest on: a call with another one does not go on with them."""
    weight = next(loaded.model.parameters())
    base = folder_of(loaded.base)
    asked = {
        "version": __version__, "adapter": fingerprint(source), "files": [_files(source), base and _files(base)],
        "base": loaded.base, "template": loaded.template, "max_length": loaded.max_length, "recovery": recovery, "order": order,
        "unit": goal.unit, "rows": rows, "dtype": weight.dtype, "device": weight.device,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, Any]:
    """File name -> what tells a change of it, for what is loaded from a model's folder; weights may be large and are not read."""
    found: dict[str, Any] = {}
    for path in filter(Path.is_file, folder.iterdir()):
        if path.suffix in _READ:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".safetensors", ".bin"):
            found[path.name] = path.stat().st_size, path.stat().st_mtime_ns
    return found


def _write(search: Search, order: str, out: Path, source: Path) -> Compressed:
    """Writes the adapter that a search chooses, checks that it is the one that was measured, and reports.

    Raises:
        GatewiseError: it cannot be written, or what was written is another function.
    """
    chosen = search.find()
    with whole_folder(out) as part:
        with tempfile.TemporaryDirectory() as folder:
            # Beside what was trained the file may have embeddings of the base model, whose vocabulary was resized.
            tensors = search.file_tensors | {name: value.cpu().contiguous() for name, value in search.rounded().items()}
            save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata=search.metadata)
            for name in filter(lambda name: (source / name).is_file(), (CONFIG_FILE, NOTE_FILE)):
                shutil.copyfile(source / name, Path(folder) / name)
            to_lora(folder, part, plain=False)
        copy_tokenizer(source, part)
        result = Compressed(
            chosen=chosen, whole_size=search.sizes[0], whole_quality=float(search.whole_rows.mean()),
            base_quality=float(search.base_rows.mean()), candidates=tuple(search.candidates), measure=search.rows.measure,
            order=order, goal=search.goal, deviation=_deviation(search, part),
        )  # fmt: skip
        write_json(part / SERVING_FILE, serving_settings(read_lora(part), search.loaded.model.config.model_type))
        write_json(part / REPORT_FILE, {"format": 1, **finite(asdict(result))})
        carry_card(source, part, "Compressed", _told(result))
    return result


def _told(result: Compressed) -> str:
    """What was done, for the model card."""
    size, whole, unit = result.chosen.size, result.whole_size, "right answers" if result.measure == "right" else "loss"
    base, before, now = (f"{abs(one):.4f}" for one in (result.base_quality, result.whole_quality, result.chosen.quality))
    return (
        f"`gatewise compress` left {size.parameters:,} of {whole.parameters:,} parameters, {size.modules} of {whole.modules} "
        f"modules{', and trained them on' if result.chosen.recovered else ''}. On rows that valued no rank, {unit}: base model "
        f"{base}, whole adapter {before}, this one {now}. Numbers and pictures above are of the whole adapter."
    )


def _deviation(search: Search, folder: Path) -> float:
    """Loads what was written beside the adapter that was measured: the largest difference of their logits on a few rows.

    Raises:
        GatewiseError: what was written is another function.
    """
    model = search.loaded.model
    few = {key: value[:4].to(next(model.parameters()).device) for key, value in search.batch.items()}
    report = "so nothing was written: please report this, with the adapter's adapter_config.json"
    with measuring(model):
        wanted = scored(model, few).logits.float()
        result = model.load_adapter(str(folder), _CHECK)
        if odd := [*result.missing_keys, *result.unexpected_keys]:
            raise GatewiseError(f"the adapter as written does not fit its base model ({some(sorted(odd), 1)}), {report}")
        model.set_adapter(_CHECK)
        found = float((scored(model, few).logits.float() - wanted).abs().max())
    if not found <= _BOUND * max(1.0, float(wanted.abs().max())):
        raise GatewiseError(
            f"the adapter as written gives logits that differ by {found:.3g} from those that were measured, {report}"
        )
    return found
