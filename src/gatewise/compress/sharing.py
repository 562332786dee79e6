"""Several adapters of one base made smaller together, so that they all adapt the same few modules.

An engine that serves many adapters runs LoRA kernels on every module that any of them adapts, and reserves room there for all of
them at the largest rank. What it pays for is the union. So modules go in one order for all adapters, by the sum of what they are
worth to each, and an adapter that would have kept other modules by itself gives them up where the others do not need them.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import read_config, read_note, read_tensors, weights_of
from gatewise.adapters.loading import Loaded, base_weights_in, check_base_weights, load_beside, load_with_data, read_data
from gatewise.allocation.slots import lora_layers
from gatewise.compress.compressing import check_settings, fingerprint_with, stored_formats
from gatewise.compress.goal import Compressed, Goal, Size
from gatewise.compress.order import DEFAULT, Cost, Move, moves, stays_whole
from gatewise.compress.quality import Measure
from gatewise.compress.search import Search, furthest, rows_for
from gatewise.compress.work import STATE_FILE, Work, alone, beside, check_place, removed_if_refused
from gatewise.compress.writing import written
from gatewise.errors import GatewiseError, some
from gatewise.files import whole_folder, write_json
from gatewise.losses import base_of, loss_kind
from gatewise.models.loading import Task, load_model
from gatewise.progress import ConsoleProgress, quiet
from gatewise.serving.engines import SERVING_FILE, settings_together

FEWEST = Goal(least="modules")


@dataclass(frozen=True)
class Union:
    """What an engine pays for that serves all adapters.

    Attributes:
        modules: that any of them adapts.
        rank: the largest of any.
        numbers: that are reserved: for each adapter the factors of all these modules at that rank.
    """

    modules: int
    rank: int
    numbers: int


@dataclass(frozen=True)
class Shared:
    """What ``compress_shared`` did.

    Attributes:
        out: the folder with a folder for each adapter.
        adapters: folder name -> its compression.
        before, after: what an engine pays for.
    """

    out: Path
    adapters: Mapping[str, Compressed]
    before: Union
    after: Union


def compress_shared(
    adapters: Sequence[str | Path],
    data: Sequence[str],
    out: str | Path,
    goal: Goal = FEWEST,
    *,
    options: DataOptions = DataOptions(),
    order: str = DEFAULT,
    measure: Measure | None = None,
    score_rows: int = 128,
    refitted: bool = True,
    looks: int = 7,
    seed: int = 0,
    console: Console | None = None,
) -> Shared:
    """Makes several LoRA adapters of one base smaller together: the fewest modules in all with which each is as good on its data.

    A module is worth the sum over the adapters of its values there, each adapter's divided by the sum of their sizes, so that none
    outweighs the others. Each adapter is within the tolerance of its own whole one.

    Args:
        adapters: their folders, at least two, on the same base model.
        data: rows that measure, for each adapter or one for all.
        out: the folder to write; each adapter gets a folder in it.
        goal: with ``least`` "modules" or "time", or a target of ``modules``: of all adapters together.
        Others: as for ``compress``.

    Raises:
        GatewiseError: as ``compress``; adapters of different bases; a goal that is no number of modules.
    """
    check_settings(order, measure, score_rows, looks)
    names = _names(adapters)
    if len(names) < 2:
        raise GatewiseError("one adapter was given to be made smaller with others: give at least two, or leave --shared out")
    if len(data) not in (1, len(names)):
        raise GatewiseError(f"{len(data)} data were given for {len(names)} adapters: give one for all, or one for each in order")
    if goal.unit == "parameters" or goal.speed is not None:
        raise GatewiseError("adapters share modules: take --least modules or time, or --modules")
    check_place(out)
    if beside(out).is_file() or (beside(out) / STATE_FILE).exists():
        raise GatewiseError(
            f"{beside(out)} is in the way, and is not what an interrupted compression of several adapters left: remove it, or give "
            "another --out"
        )
    progress = ConsoleProgress(console or Console(stderr=True))
    folders = [Path(one) for one in adapters]
    sources = list(data) if len(data) == len(folders) else list(data) * len(folders)
    with alone(out), quiet(bars=True), _removed_if_empty(beside(out)):
        searches = _searches(
            folders, names, sources, beside(out), goal, options, order, measure, score_rows, refitted, seed, progress
        )
        with removed_if_refused([search.work for search in searches]):
            at = _step(searches, names, goal, looks)
        found: dict[str, Compressed] = {}
        before = _union(searches, [search.whole_size for search in searches], {path for one in searches for path in one.live})
        with whole_folder(out) as part:
            for name, search, folder in zip(names, searches, folders, strict=True):
                chosen = next(one for one in reversed(search.candidates) if one.dropped == at)
                found[name] = replace(written(chosen, part / name, search, folder, used_on=True), out=Path(out) / name)
            left = {move.path for move in searches[0].moves[at:]}
            after = _union(searches, [search.sizes[at] for search in searches], left)
            settings = [json.loads((part / name / SERVING_FILE).read_text(encoding="utf-8")) for name in names]
            write_json(part / SERVING_FILE, settings_together(settings))
        for search in searches:
            search.work.remove()
        if others := sorted(path.parent.name for path in beside(out).glob(f"*/{STATE_FILE}")):
            progress.say(
                f"{beside(out)} still has what an earlier command measured of {some(others)}: remove it if it is not wanted"
            )
    return Shared(Path(out), found, before, after)


def _step(searches: Sequence[Search], names: Sequence[str], goal: Goal, looks: int) -> int:
    """Arranges all in one order, and finds the step of it that is asked for."""
    shared, costs = _shared_order(searches)
    for search in searches:
        own = {
            path: tuple(at for at in range(len(values)) if at not in search.capped.get(path, ()))
            for path, values in search.values.items()
        }
        search.arrange([Move(path, own.get(path, ())) for path in shared], costs)
        search.shared_order = hashlib.sha256("\n".join(shared).encode()).hexdigest()[:16]
    # Every adapter keeps something.
    lasts = [max(at for at, size in enumerate(search.sizes) if size.ranks) for search in searches]
    last = min(lasts)
    union = [sum(costs[path].fixed for path in shared[at:]) for at in range(last + 1)]

    def holds(at: int) -> bool:
        return all(search.tried(at).difference.within(goal.tolerance) for search in searches)

    if goal.modules is not None:
        at = max(0, len(shared) - goal.modules)
        if at > last:
            raise GatewiseError(
                f"{goal.modules} modules were asked for, but with fewer than {len(shared) - last} an adapter has none: ask for more"
            )
        for search in searches:
            search.tried(at)
        return at
    if last == 0 and not any(search.capped for search in searches):
        raise GatewiseError(
            f"no module can go: {shared[0]} is worth least to all {len(names)} adapters together, and {names[lasts.index(0)]} has "
            "no other: leave that adapter out"
        )
    furthest(union, looks, holds, first=any(search.capped for search in searches))
    found = _furthest_for_all(searches, goal.tolerance)
    if found is None:
        raise _nothing_holds(names, searches, goal.tolerance)
    return found


def _furthest_for_all(searches: Sequence[Search], tolerance: float) -> int | None:
    """The last of the steps that were tried at which each adapter is within the tolerance, judged with all that was tried of it."""
    held: list[set[int]] = []
    for search in searches:
        search.judge()
        held.append({one.dropped for one in search.candidates if one.difference.within(tolerance)})
    return max(set.intersection(*held), default=None)


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _nothing_holds(names: Sequence[str], searches: Sequence[Search], tolerance: float) -> GatewiseError:
    tried = [(search.candidates[-1].difference, name) for name, search in zip(names, searches, strict=True) if search.candidates]
    gap, name = max(tried, key=lambda one: one[0].high)
    return GatewiseError(
        f"no smaller set of modules keeps all {len(names)} adapters within {tolerance:g} with 95% confidence ({name} is worse by "
        f"{gap.mean:.4f}, at most by {gap.high:.4f}): give more rows, or a larger tolerance"
    )


def _names(adapters: Sequence[str | Path]) -> list[str]:
    """A name for each adapter: its folder's, or where that is taken or just "adapter", with the folder's above."""
    paths = [Path(one).resolve() for one in adapters]
    names = [(path.parent.name if path.name == "adapter" else "") or path.name for path in paths]
    for at, name in enumerate(names):
        if names.count(name) > 1:
            names[at] = f"{paths[at].parent.name}-{name}"
    if len(set(names)) < len(names):
        raise GatewiseError("two adapters have the same name, and would be written into the same folder: rename one")
    return names


def _searches(
    folders: Sequence[Path],
    names: Sequence[str],
    data: Sequence[str],
    work: Path,
    goal: Goal,
    options: DataOptions,
    order: str,
    measure: Measure | None,
    score_rows: int,
    refitted: bool,
    seed: int,
    progress: ConsoleProgress,
) -> list[Search]:
    """All adapters on one model, each valued and measured."""
    first: Loaded | None = None
    called = "default"  # what PEFT calls the adapter
    searches: list[Search] = []
    with_tokens = [bool(read_config(one).get("trainable_token_indices")) for one in folders]
    if len(set(with_tokens)) > 1:  # PEFT saves and loads one of them only where the others are alike
        one, other = (folders[with_tokens.index(own)] for own in (True, False))
        raise GatewiseError(f"{one} trains single tokens (trainable_token_indices) and {other} does not: compress them apart")
    for folder, name, source in zip(folders, names, data, strict=True):
        base = options.base or read_config(folder).get("base_model_name_or_path")
        if first is None:
            first = loaded = load_with_data(folder, source, options, say=progress.say)
            _check_one_base(folders, first)
        else:
            if base != first.base:
                raise GatewiseError(f"{folder} adapts {base}, but {folders[0]} adapts {first.base}: give adapters of one base")
            # Not the folder's name: it may be that of the first one, or of a part of the model.
            called = f"gatewise-{len(searches):03d}"
            records, template, max_length = read_data(folder, source, options)
            tokenizer = load_beside(first.model, folder, called, first.base)
            loaded = Loaded(first.model, tokenizer, first.base, records, template, max_length)
        for path, layer in lora_layers(loaded.model, called).items():
            if stays_whole(layer, called):
                raise GatewiseError(
                    f"{folder} has a magnitude, a bias, stacked experts or a variant of LoRA at {path}, so that the module cannot "
                    "go as a whole: leave this adapter out"
                )
        progress.say(f"{name}:")
        rows, note = rows_for(loaded, measure, goal, None, score_rows, seed, progress.say), read_note(folder)
        settings = {"goal": asdict(goal), "order": order, "refitted": refitted, "seed": seed, "shared": True}
        search = Search(
            loaded,
            called,
            rows,
            goal,
            None,
            refitted,
            order,
            seed,
            note,
            Work(work / name, fingerprint_with(settings, folder, loaded, rows, note)),
            progress,
            *stored_formats(folder),
            shared=True,
        )
        with removed_if_refused([search.work]):
            search.prepare()
        searches.append(search)
    return searches


def _check_one_base(folders: Sequence[Path], first: Loaded) -> None:
    """Refuses adapters whose files have base weights of their own, which the others would then be measured on too."""
    own = []
    for one in folders:
        names = base_weights_in(one)
        tensors = read_tensors(weights_of(one))[0] if names else {}
        own.append({name: tensors[name] for name in names})
    if all(one.keys() == own[0].keys() and all(torch.equal(one[name], own[0][name]) for name in one) for one in own):
        return  # none, or all the same, as with one vocabulary that was resized
    model, base = first.model, base_of(first.model)
    classes = base.config.num_labels if loss_kind(model) == "rows" else None
    task: Task = "causal" if classes is None else "classification"
    brought = [name for one in folders for name in read_config(one).get("modules_to_save") or ()]
    bare = load_model(first.base, task=task, num_labels=classes, dtype=base.dtype, brought=brought)
    for folder in folders:
        check_base_weights(bare, folder)


def _shared_order(searches: Sequence[Search]) -> tuple[list[str], dict[str, Cost]]:
    """The modules in which any adapter has a rank, what is worth least to all of them first; and what each costs."""
    worth: dict[str, float] = {}
    costs: dict[str, Cost] = {}
    for search in searches:
        totals = {
            path: math.fsum(value for at, value in enumerate(values) if at not in search.capped.get(path, ()))
            for path, values in search.values.items()
            if search.live[path]
        }
        size = math.fsum(map(abs, totals.values())) or 1.0
        for path, total in totals.items():
            worth[path] = worth.get(path, 0.0) + total / size
        held = search.work.order()
        assert held is not None
        for path, cost in held[1].items():
            costs[path] = max(cost, costs.get(path, cost), key=lambda one: one.fixed)
    return [move.path for move in moves({path: [value] for path, value in worth.items()}, costs)], costs


def _union(searches: Sequence[Search], sizes: Sequence[Size], kept: set[str]) -> Union:
    each = {path: numbers for search in searches for path, numbers in search.each.items()}
    rank = max(size.largest for size in sizes)
    return Union(len(kept), rank, round(len(searches) * rank * sum(each[path] for path in kept)))
