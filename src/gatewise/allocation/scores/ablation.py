"""AB-LoRA importance scores (ALoRA, Liu et al., NAACL 2024, arXiv 2403.16187), exact and screened.

With S = -CE on one validation batch, M the model with all live ranks, M\\r without rank r and M_r with *only* rank r,

    IS(r) = S(M) - S(M\\r) + S(M_r)

S(M) is the same for every rank, so a score here is CE(M\\r) - CE(M_r): what is lost without r, less what is left with r alone.

Three ways to the same numbers:
- ``naive`` is the paper's loop, two full forwards a rank, kept as the reference;
- ``exact`` reruns only the layers from the ablated one up, several ablations a forward, without padding, the LM head only at
  labels and, in the second term, without the LoRA products of ranks that are off;
- ``screened`` takes the first-order scores and ablates exactly only the ranks nearest the cut.

Shapes: b batch, t tokens, r ranks of a module, c copies of the batch, each with its own ablated rank.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gatewise.adapters.lora import factors
from gatewise.allocation.gates import GateBank
from gatewise.allocation.layer_prefix import Record, Stack
from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import Batches, Scores, as_batches, on_device, parts_of, scoring, step_tokens
from gatewise.allocation.slots import live_slots
from gatewise.errors import GatewiseError
from gatewise.losses import mean_loss, row_losses

Mode = Literal["exact", "naive", "screened"]
MODES: tuple[str, ...] = get_args(Mode)
Rank = tuple[str, int]
"""A module path and one of its slots."""


Progress = Callable[[int, int], None]


def ablation(
    model: nn.Module,
    batch: Batches,
    mode: Mode = "exact",
    *,
    adapter: str | None = None,
    prune: int | None = None,
    max_exact: int | None = None,
    float32: bool = True,
    progress: Progress | None = None,
) -> Scores:
    """AB-LoRA score of every live rank.

    Args:
        batch: one validation batch (b, t) with labels, or several.
        mode: "exact" and "naive" give the same numbers; "screened" gives first-order numbers, shifted to agree with the exact
            ones of the ranks near the cut, which it ablates.
        prune: where "screened" puts the cut: the number of ranks to be pruned; None for an eighth of the live ranks.
        max_exact: at most this many ranks are ablated by "screened"; None for a 64th of the live ranks, at least 16.
        float32: score in float32 even if the weights are in half precision.
        progress: called with (ranks done, ranks to do) while ranks are ablated.

    Returns:
        Path -> (live ranks,) scores CE(M\\r) - CE(M_r) in nats; the lowest are the ones to prune.

    Raises:
        GatewiseError: unknown mode, or a batch without labels.
    """
    if mode not in MODES:
        raise GatewiseError(f"ablation mode {mode!r} is not known; expected 'exact', 'naive' or 'screened'")
    bank = GateBank(model, adapter)
    ranks: list[Rank] = [(path, slot) for path, layer in bank.layers.items() for slot in live_slots(layer, bank.adapter)]
    if mode == "screened":
        return _screened(model, batch, ranks, adapter, prune, max_exact, float32, progress)
    scores = ablate(model, batch, ranks, mode, adapter=adapter, float32=float32, progress=progress)
    return _by_path(ranks, scores, bank.layers)


def ablate(
    model: nn.Module,
    batch: Batches,
    ranks: Sequence[Rank],
    mode: Literal["exact", "naive"] = "exact",
    *,
    adapter: str | None = None,
    float32: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """(len(ranks),) AB-LoRA scores of the ranks named, in float64: for a sample, or for the ranks a screen left undecided."""
    run = _naive if mode == "naive" else _exact
    with torch.no_grad(), scoring(model, float32), GateBank(model, adapter) as gates:
        return run(model, gates, batch, list(ranks), progress or (lambda done, total: None))


def _naive(model: nn.Module, gates: GateBank, batch: Batches, ranks: list[Rank], progress: Progress) -> Tensor:
    """The paper's loop: two forwards of the whole batch for each rank."""
    device = next(model.parameters()).device
    batches = [on_device(one, device) for one in as_batches(batch)]
    scores = torch.zeros(len(ranks), dtype=torch.float64)
    for index, (path, slot) in enumerate(ranks):
        gates.fill(1.0)[path][slot] = 0.0
        without = mean_loss(model, batches)
        gates.fill(0.0)[path][slot] = 1.0
        scores[index] = without - mean_loss(model, batches)
        progress(index + 1, len(ranks))
    gates.open()
    return scores


def _exact(model: nn.Module, gates: GateBank, batch: Batches, ranks: list[Rank], progress: Progress) -> Tensor:
    """The same numbers by prefix reuse and batched ablation."""
    parts = parts_of(model, batch)
    most = step_tokens(next(model.parameters()).device)
    with gates.watching() as rows_apart:
        stack = Stack(model, gates.layers, lambda: row_losses(model, parts[0]))
    # Where gates cannot differ from row to row, all rows share them and a forward takes one ablation.
    per_row = rows_apart(len(parts[0]["labels"]))
    scores = torch.zeros(len(ranks), dtype=torch.float64)
    labels = 0
    for number, part in enumerate(parts):
        on, count = _recorded(model, gates, stack, part, off=False)
        off, _ = _recorded(model, gates, stack, part, off=True)
        labels += count
        copies = max(1, most // _padded_tokens(part)) if per_row else 1
        done = 0
        for stage, chunk in _chunks(ranks, stack.stage, copies):
            members = [ranks[i] for i in chunk]
            without = _ablated_losses(model, gates, stack, on, stage, part, members, off=False)
            alone = _ablated_losses(model, gates, stack, off, stage, part, members, off=True)
            scores[chunk] += (without - alone).double().cpu()
            done += len(chunk)
            progress((number * len(ranks) + done) // len(parts), len(ranks))
    return scores / labels


def _recorded(model: nn.Module, gates: GateBank, stack: Stack, part: dict[str, Any], off: bool) -> tuple[Record, int]:
    """The output of every layer with all ranks on, or all off, and the number of labels."""
    with stack.recording() as record, gates.only(set() if off else set(gates.layers)):
        _, counts = row_losses(model, part)
    return record, int(counts.sum())


def _chunks(ranks: list[Rank], stage: dict[str, int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(stage, indices of at most ``size`` ranks of that stage), modules together so that few LoRA modules are on at a time."""
    order = sorted(range(len(ranks)), key=lambda i: (stage[ranks[i][0]], ranks[i]))
    for at, group in itertools.groupby(order, key=lambda i: stage[ranks[i][0]]):
        yield from ((at, chunk) for chunk in _batched(group, size))


def _batched(items: Iterable[int], size: int) -> Iterator[list[int]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def _ablated_losses(
    model: nn.Module,
    gates: GateBank,
    stack: Stack,
    record: Record,
    stage: int,
    part: dict[str, Any],
    members: list[Rank],
    off: bool,
) -> Tensor:
    """(c,) summed losses of a microbatch, one for each member: that rank off and the others on, or (``off``) the reverse."""
    copies, rows = len(members), len(part["labels"])
    own: dict[str, Tensor] = {}
    for copy, (path, slot) in enumerate(members):
        a, _ = factors(gates.layers[path], gates.adapter)
        if path not in own:
            own[path] = torch.full((copies, len(a)), 0.0 if off else 1.0, device=a.device)
        own[path][copy, slot] = 1.0 if off else 0.0
    for path, gate in own.items():
        gates.assign(path, gate[0] if copies == 1 else gate.repeat_interleave(rows, dim=0)[:, None, :])
    repeated = {
        key: value.repeat(copies, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
        for key, value in part.items()
    }
    with stack.resumed(record, stage, copies), gates.only(set(own) if off else set(gates.layers)):
        sums, _ = row_losses(model, repeated)
    gates.open()
    return sums.view(copies, rows).sum(dim=1)


def _padded_tokens(part: dict[str, Any]) -> int:
    return max(value.shape[:2].numel() for value in part.values() if isinstance(value, Tensor) and value.ndim)


def _screened(
    model: nn.Module,
    batch: Batches,
    ranks: list[Rank],
    adapter: str | None,
    prune: int | None,
    max_exact: int | None,
    float32: bool,
    progress: Progress | None,
) -> Scores:
    """First-order scores, with the ranks nearest the cut ablated exactly.

    The median difference between exact and first order among the ablated ranks is added to all the others: what curvature does
    to every rank alike must not move the ablated ones across the cut.
    """
    screen = taylor(model, batch, adapter=adapter, float32=float32)
    scores = torch.cat(list(screen.values())).double()
    cut = len(ranks) // 8 if prune is None else prune
    limit = max(16, len(ranks) // 64) if max_exact is None else max_exact
    if 0 < cut < len(ranks) and limit > 0:
        ordered = scores.sort().values
        middle = (ordered[cut - 1] + ordered[cut]) / 2
        near = (scores - middle).abs().argsort(stable=True)[:limit]
        exact = ablate(model, batch, [ranks[i] for i in near], adapter=adapter, float32=float32, progress=progress)
        scores += (exact - scores[near]).median()
        scores[near] = exact
    return _by_path(ranks, scores, screen)


def _by_path(ranks: list[Rank], scores: Tensor, paths: Iterable[str]) -> Scores:
    """Path -> (live ranks,) float32, in the order of the slots; modules without a live rank get an empty tensor."""
    by_path: dict[str, list[float]] = {path: [] for path in paths}
    for (path, _), score in zip(ranks, scores.tolist(), strict=True):
        by_path[path].append(score)
    return {path: torch.tensor(values, dtype=torch.float32) for path, values in by_path.items()}
