"""What a batch's adapters add to one linear module, in few tensor operations: gathered once a request, used every step.

    y = W x + Σ_i gate_i · scaling_i · B_i A_i x        summed over the adapters i that serve the row

No loop over adapters runs in a step. There are two ways to the same sum, which differ in where work is wasted:

- *joined*: the A of all adapters stand one below the other, the B side by side. One product with each; between them, whatever a
  row's foreign adapters made is multiplied by zero. Every weight is read once, whatever the number of rows, and foreign products
  cost arithmetic only, of which decoding has some to spare.
- *by row*: every row has copies of its own A and B, in two batched products. Nothing is computed in vain, which is what counts
  where rows have few adapters in common, and where a pass has many tokens (the prompt).

Modules that read one tensor (q, k, v) could have one first product. On CPUs that was slower than three: what it saves in products
goes into cutting the result up.

Shapes: b batch, t tokens, r rank, R sum of the ranks of all adapters in a module, w the most columns that one row has.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gatewise.serving.compiled_step import MOST, step_of

BASE = "__base__"
"""PEFT's name for rows of a mixed batch that no adapter serves."""


_SPARE = 16
"""So many products with foreign weights are taken to cost as much as reading a weight of one's own from memory."""


_SPARE_ON_CPU = 3
"""As measured with 8 rows on 2 cores: 32 columns joined take as long as 8 columns by row."""


@dataclass(frozen=True)
class Part:
    """What one adapter adds in one module.

    Args:
        first: A (r, d_in).
        second: B (d_out, r).
        scaling: alpha / r.
        rows: the rows (n,) of the batch that it serves; None for all of them.
        gate: a factor for each of these rows (n,); None for ones.
    """

    first: Tensor
    second: Tensor
    scaling: float = 1.0
    rows: Sequence[int] | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Which rows have which of the R columns.

    Attributes:
        own: (b, R), one where a row has a column, else zero.
        columns: (b, w), those that a row has, filled up with R, which stands for a column of zeros.
        foreign: R - w, the foreign columns of the row that has the most.
        complete: every row has every column.
        _rows, _parts: which row and which part each gate is of, in the order of the parts.
        _part_of_column: (R,).
    """

    own: Tensor
    columns: Tensor
    foreign: int
    complete: bool
    _rows: Tensor
    _parts: Tensor
    _part_of_column: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part], batch: int, device: torch.device) -> "Layout":
        """The layout of parts for ``batch`` rows."""
        ranks = [len(part.first) for part in parts]
        rows = [range(batch) if part.rows is None else part.rows for part in parts]
        part_of_row = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(one) for one in rows]))
        part_of_column = torch.arange(len(parts)).repeat_interleave(torch.tensor(ranks))
        all_rows, end = torch.tensor([row for one in rows for row in one]), sum(ranks)
        own = torch.zeros(batch, len(parts)).index_put((all_rows, part_of_row), torch.ones(()))[:, part_of_column]
        widths = own.sum(dim=1)
        width = int(widths.max())
        columns = torch.arange(end).expand(batch, -1).masked_fill(own == 0, end).sort(dim=1).values[:, :width]
        complete = width == int(widths.min()) == end
        tensors = (one.to(device) for one in (own, columns, all_rows, part_of_row, part_of_column))
        own, columns, all_rows, part_of_row, part_of_column = tensors
        return cls(own, columns, end - width, complete, all_rows, part_of_row, part_of_column)

    def gated(self, parts: Sequence[Part]) -> Tensor:
        """``own`` with the parts' gates in place of ones."""
        device = self.own.device
        counts = [len(self.own) if part.rows is None else len(part.rows) for part in parts]
        gates = [
            torch.ones(count, device=device) if part.gate is None else part.gate.to(device)
            for part, count in zip(parts, counts, strict=True)
        ]
        values = gates[0] if len(gates) == 1 else torch.cat(gates)
        table = values.new_zeros(len(self.own), len(parts)).index_put_((self._rows, self._parts), values)
        return table[:, self._part_of_column]


class Request:
    """One batch of prompts from its first token to its last.

    Args:
        batch: how many rows it has. None where all parts serve all rows without gates; the batch's shape is then of no matter.
    """

    def __init__(self, batch: int | None = None) -> None:
        self.batch = batch
        self._layouts: dict[tuple[object, ...], Layout] = {}

    def gather(self, parts: Sequence[Part], result: Tensor, in_place: bool = False) -> "Gathered":
        """The parts of a module (at least one) as they stand now, for outputs like its base module's.

        Args:
            result: (b, ..., d_out), what its base module made of it.
            in_place: sums may be written into the ``result`` of every step, because nobody else holds it.
        """
        first, second = parts[0].first, parts[0].second
        if len(parts) > 1:
            first, second = torch.cat([part.first for part in parts]), torch.cat([part.second for part in parts], dim=1)
        alpha, *others = {part.scaling for part in parts}
        if others:  # a single scaling goes into the second product as it is
            columns = [part.scaling for part in parts for _ in range(len(part.first))]
            dtype = torch.promote_types(second.dtype, torch.float32)
            second, alpha = second * torch.tensor(columns, dtype=dtype, device=second.device), 1.0
        weight: Tensor | None = None
        layout: Layout | None = None
        if any(part.rows is not None or part.gate is not None for part in parts):
            layout = self._layout(parts, first.device)
            weight = layout.own
            if any(part.gate is not None for part in parts):
                weight = layout.gated(parts)
                if len(weight) == 1 or bool((weight == weight[:1]).all()):  # one row, or one gate for all
                    second, weight = second * weight[0], None
        return Gathered(first, second, alpha, weight, layout, result, in_place)

    def _layout(self, parts: Sequence[Part], device: torch.device) -> Layout:
        """The same for all modules with the same adapters and ranks."""
        key = (device, *((None if part.rows is None else tuple(part.rows), len(part.first)) for part in parts))
        if key not in self._layouts:
            self._layouts[key] = Layout.of(parts, cast(int, self.batch), device)
        return self._layouts[key]


class Gathered:
    """The adapters of one module for one request.

    Its products are joined or by row, whichever costs less in passes of one token a row, which is what steps are. Where they are
    joined, a longer pass (the prompt) may still go by row, with copies that are not kept.

    Args:
        first: A (R, d_in) of all of them.
        second: B (d_out, R).
        alpha: a factor of the sum.
        weight: (b, R), gates in the columns that a row has and zeros in the others. None: every row has all columns as they are.
        layout: there if ``weight`` is.
        result: what the base module made.
        in_place: sums may be written into it.

    Attributes:
        dtype: of the base module's output.
        _first, _second: A and B as they are multiplied: joined (d_in, R) and (R, d_out), by row (b, d_in, w) and (b, w, d_out).
        _weight: (b, 1, R), where there is one and the products are joined.
        _is_cast: the products are in float32, and only the sum is in the precision of the base module.
        _step: a step's products in one call (compiled_step.py); None where there is none, or one core has too much to do.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        alpha: float,
        weight: Tensor | None,
        layout: Layout | None,
        result: Tensor,
        in_place: bool,
    ) -> None:
        self.dtype = inner = result.dtype
        # In half precision on a CPU its products are in float32: CPU libraries take five times as long to begin a small product in
        # bfloat16 as one in float32. Autocast has decided already.
        is_half = inner in (torch.bfloat16, torch.float16)
        if is_half and result.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            inner = torch.float32
        # The sum is an operation of its own then, which takes no factor.
        self._is_cast = inner != self.dtype
        if self._is_cast:
            second, alpha = second * alpha, 1.0
        # A compiled step reads A where it lies now, and the model may move its parameters.
        first = first.to(inner, copy=self._is_cast and isinstance(first, nn.Parameter))
        self._first, self._second = first.contiguous().t(), second.to(inner).t().contiguous()
        self._weight = None if weight is None else weight.to(inner).contiguous()[:, None]
        self._alpha, self._layout, self._in_place = alpha, layout, in_place
        self._step = None
        if self._is_cast and self.dtype == torch.bfloat16:
            columns = len(first) if layout is None else layout.columns.shape[1]
            if len(result) * columns * (first.shape[1] + second.shape[0]) <= MOST:
                self._step = step_of(self._first.t(), self._second, self._weight, len(result))
        # How many tokens a row may have to be cheaper joined than by row, if zero times something foreign is zero at all. It is not
        # where the foreign product overflows, or where somebody's adapter is broken, who must not break the others' rows.
        self._longest = inf
        if layout is not None and weight is not None:
            spare = _SPARE_ON_CPU if first.device.type == "cpu" else _SPARE
            self._longest = spare * layout.columns.shape[1] / layout.foreign if layout.foreign else inf
            if not layout.complete:
                total = self._first.sum(dtype=torch.float32) + self._second.sum(dtype=torch.float32)
                if inner == torch.float16 or not total.isfinite():
                    self._longest = 0
        if self._longest < 1 and self._step is None:
            self._first, self._second = self._by_row()
            self._weight, self._longest = None, inf

    def add(self, x: Tensor, result: Tensor) -> Tensor:
        """``result`` (b, ..., d_out) with the adapters' part for x (b, ..., d_in) added."""
        if (step := self._step) is not None:
            if self._in_place:
                if step(x, result):
                    return result
            elif step(x, copied := result.clone()):
                return copied
        into = self._in_place and result.is_contiguous()
        first, second, weight = self._first, self._second, self._weight
        if weight is not None and x.ndim == 3 and x.shape[0] != weight.shape[0]:
            raise ValueError(f"{x.shape[0]} rows were given, expected the request's {weight.shape[0]}")
        tokens = x.shape[1] if x.ndim == 3 else prod(x.shape[1:-1])
        if tokens > self._longest:
            (first, second), weight = self._by_row(), None
        # All tokens in one matrix (b t, d) where joined, a matrix (t, d) for each row where by row.
        is_joined = first.ndim == 2
        product, shape = (torch.mm, (-1,)) if is_joined else (torch.bmm, (len(x), -1))
        x, total = x.reshape(*shape, x.shape[-1]), result.reshape(*shape, result.shape[-1])
        ranks = product(x.float() if self._is_cast else x, first)
        if weight is not None:
            ranks.view(len(weight), -1, ranks.shape[-1]).mul_(weight)
        if self._is_cast:
            delta = product(ranks, second).to(total.dtype)
            total = total.add_(delta) if into else total + delta
        elif is_joined:  # the product with B and the sum in one operation
            total = (total.addmm_ if into else total.addmm)(ranks, second, alpha=self._alpha)
        else:
            total = (total.baddbmm_ if into else total.baddbmm)(ranks, second, alpha=self._alpha)
        return result if into else total.view(result.shape)

    def _by_row(self) -> tuple[Tensor, Tensor]:
        """(b, d_in, w) and (b, w, d_out): copies of every row's own columns, with its gates in the second."""
        columns, weight = cast(Layout, self._layout).columns, cast(Tensor, self._weight)
        gates = pad(weight[:, 0], (0, 1)).gather(1, columns)
        first, second = (pad(one, (0, 0, 0, 1))[columns] for one in (self._first.t(), self._second))
        return first.mT, second * gates[..., None]


@contextmanager
def rows_side_by_side(model: nn.Module) -> Iterator[None]:
    """While open, the output head of a Transformers model, if it has one, is given its rows side by side. Values are the same.

    ``generate`` reads the logits of a prompt's last position only, so the head is given a slice, in which rows do not lie side by
    side. PyTorch 2's ``linear`` folds such rows into one product where the weight is trained, but multiplies each row by a copy of
    the whole weight where it is frozen, as PEFT freezes it: 0.5 s for eight prompts on SmolLM2-135M, as long as the rest of the
    model takes.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, nn.Module):
        yield
        return

    def contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and args[0].ndim > 2:
            x = args[0].contiguous()
            # Strides of dimensions of size one count too, and contiguous() does not look at them.
            return x.view(-1, x.shape[-1]).view(x.shape), *args[1:]
        return None

    handle = head.register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        handle.remove()
