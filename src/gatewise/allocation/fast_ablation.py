"""The scores of AB-LoRA (``scores/ablation.py``), faster than by the paper's loop.

- ``exact`` gives the same numbers. It reruns only the layers from the ablated one up, several ablations a forward, without padding,
  the LM head only at labels and, for "only rank r", without the LoRA products of ranks that are off.
- ``screened`` takes the first-order scores of all ranks and ablates exactly only those nearest the cut.

Shapes: b batch, t tokens, r ranks of a module, c copies of the batch, each with its own ablated rank.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores.taylor import taylor
from gatewise.allocation.scoring import Batches, parts_of, scoring, step_tokens
from gatewise.losses import row_losses

Rank = tuple[str, int]
"""A module path and one of its slots."""
Progress = Callable[[int, int], None]
Record = list[Tensor]
"""The output hidden states (b, t, d) of every layer, in order."""


def screened(
    model: nn.Module,
    batch: Batches,
    ranks: Sequence[Rank],
    *,
    prune: int | None = None,
    max_exact: int | None = None,
    costs: Mapping[str, int] | None = None,
    adapter: str | None = None,
    float32: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """First-order scores (len(ranks),) of all live ranks, with those nearest the cut ablated exactly; float64 on the CPU.

    The median difference between exact and first order among the ablated ranks is added to all the others: what curvature does
    to every rank alike must not move the ablated ones across the cut.

    Args:
        ranks: all live ranks, in module order.
        prune, max_exact, costs: as in ``ablation``.
    """
    scores = torch.cat(list(taylor(model, batch, adapter=adapter, float32=float32).values())).double()
    limit = max(16, len(ranks) // 64) if max_exact is None else max_exact
    each, nothing = torch.ones_like(scores), 0.0
    if costs is not None:
        each = scores.new_tensor([costs[path] for path, _ in ranks])
        nothing = _nothing(model, batch, adapter, float32)  # what a rank that does nothing scores
    worth = (scores - nothing) / each
    order = worth.argsort(stable=True)
    wanted = int(each.sum()) // 8 if prune is None else prune
    cut = int((each[order].cumsum(0) < wanted).sum()) + 1 if wanted else 0
    if 0 < cut < len(ranks) and limit > 0:
        middle = (worth[order[cut - 1]] + worth[order[cut]]) / 2
        near = ((worth - middle).abs() * each).argsort(stable=True)[:limit]
        ablated = exact(model, batch, [ranks[i] for i in near], adapter=adapter, float32=float32, progress=progress)
        scores += (ablated - scores[near]).median()
        scores[near] = ablated
    return scores


def _nothing(model: nn.Module, batch: Batches, adapter: str | None, float32: bool) -> float:
    """AB-LoRA's score of a rank that does nothing: CE(all ranks) - CE(no rank)."""
    with scoring(model, float32), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        with gates.only(set()):
            without = parts.loss(model)
        return parts.loss(model) - without


def exact(
    model: nn.Module,
    batch: Batches,
    ranks: Sequence[Rank],
    *,
    adapter: str | None = None,
    float32: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """(len(ranks),) scores of the ranks named, float64 on the CPU: of all, a sample, or those that a screen left undecided."""
    with torch.no_grad(), scoring(model, float32), GateBank(model, adapter) as gates:
        parts = parts_of(model, batch)
        most = step_tokens(parts.device)
        scores = torch.zeros(len(ranks), dtype=torch.float64)
        labels = 0
        for number, (part, width) in enumerate(zip(parts.own, parts.widths, strict=True)):
            if number == 0:
                with gates.watching() as rows_apart:
                    stack = Stack(model, gates.modules, lambda part=part: row_losses(model, part))  # type: ignore[misc]
                # Where gates cannot differ from row to row, all rows share them and a forward takes one ablation.
                per_row = rows_apart(len(part["labels"]))
            with stack.recording() as on:
                _, counts = row_losses(model, part)
            with stack.recording() as off, gates.only(set()):
                row_losses(model, part)
            labels += int(counts.sum())
            copies = max(1, most // width) if per_row else 1
            done = 0
            for stage, chunk in _chunks(ranks, stack.stage, copies):
                members = [ranks[i] for i in chunk]
                without = _ablated_losses(model, gates, stack, on, stage, part, members, off=False)
                alone = _ablated_losses(model, gates, stack, off, stage, part, members, off=True)
                scores[chunk] += (without - alone).cpu().double()
                done += len(chunk)
                if progress:
                    progress((number * len(ranks) + done) // len(parts.own), len(ranks))
        scores, counted = parts.total(scores, torch.tensor([float(labels)], dtype=torch.float64))
        return scores / counted


class Stack:
    """The layers of a model, of which the upper ones can run again from the kept output of the one below.

    A change in layer l leaves every activation below l as it was. Embeddings, masks, the final norm, the head and the loss run as
    the model wrote them, so nothing here knows an architecture.

    ``stage[path]`` is the first layer that has to run again when ranks of that module change: the module's layer, 0 for a
    module below the stack, ``len(layers)`` for one above it (only the head runs). Where no stack of layers that run once each
    in order and return a tensor is found (ALBERT shares one layer) all stages are 0: everything runs, slower and right.

    Args:
        sites: the LoRA layers by path.
        run: one forward of the model, used to see the order in which modules act.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, nn.Module], run: Callable[[], object]) -> None:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
        wanted = {id(layer) for layer in sites.values()}

        def sites_inside(modules: nn.ModuleList) -> int:
            return sum(id(module) in wanted for module in modules.modules())

        best = max(lists, key=sites_inside, default=None)
        self.layers: list[nn.Module] = list(best) if best is not None and sites_inside(best) else []
        events = self._trace(sites, run)
        if [index for index in events if isinstance(index, int)] != list(range(len(self.layers))):
            self.layers = []
        self.stage = dict.fromkeys(sites, 0)
        done = 0
        for event in events if self.layers else []:
            if isinstance(event, int):
                done = event + 1
            else:
                self.stage[event] = done

    def _trace(self, sites: Mapping[str, nn.Module], run: Callable[[], object]) -> list[int | str]:
        """Layer indices as they finish and module paths as they first act, in the order of one forward."""
        events: list[int | str] = []
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):

                def finished(_m: nn.Module, _a: object, output: object, index: int = index) -> None:
                    # An output that is not a tensor breaks the order on purpose: such layers cannot be passed through.
                    events.append(index if isinstance(output, Tensor) else -1)

                stack.callback(layer.register_forward_hook(finished).remove)
            for path, site in sites.items():

                def seen(*_: object, path: str = path) -> None:
                    if path not in events:
                        events.append(path)

                stack.callback(site.register_forward_hook(seen).remove)
            run()
        return events

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """Keeps the output of every layer of the forward that runs while open."""
        record: Record = []
        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.register_forward_hook(lambda _m, _a, output: record.append(output))
                stack.callback(handle.remove)
            yield record

    @contextmanager
    def resumed(self, record: Record, stage: int, copies: int = 1) -> Iterator[None]:
        """While open, a forward starts at layer ``stage`` with the recorded input, repeated ``copies`` times along the batch.

        The batch given to the model must be repeated in the same way: copy-major, that is ``tensor.repeat(copies, ...)``.
        """
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers[:stage]):
                last = index == stage - 1
                kept = record[index].repeat(copies, *[1] * (record[index].ndim - 1)) if last else None
                stack.enter_context(_passing(layer, kept))
            yield


@contextmanager
def _passing(layer: nn.Module, output: Tensor | None) -> Iterator[None]:
    """The layer returns ``output``, or its own input when None (its result will not be used)."""
    own = layer.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if output is not None:
            return output
        return args[0] if args else kwargs["hidden_states"]

    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _chunks(ranks: Sequence[Rank], stage: dict[str, int], size: int) -> Iterator[tuple[int, list[int]]]:
    """(stage, indices of at most ``size`` ranks of that stage), modules together so that few LoRA modules are on at a time."""
    order = sorted(range(len(ranks)), key=lambda i: (stage[ranks[i][0]], ranks[i]))
    for at, group in itertools.groupby(order, key=lambda i: stage[ranks[i][0]]):
        members = list(group)
        yield from ((at, members[start : start + size]) for start in range(0, len(members), size))


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
        if path not in own:
            own[path] = gates.like(path, 0.0 if off else 1.0).expand(copies, -1).clone()
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
