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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from gatewise.serving.direct import Run

_SPARE = 16
"""So many products with foreign weights are taken to cost as much as reading a weight of one's own from memory."""


_SPARE_ON_CPU = 3
"""As measured with 8 rows on 2 cores: 32 columns joined take as long as 8 columns by row."""


# Faster than .to(dtype), which reads its arguments first.
_TO = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half}


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
        first, second = _joined(parts)
        alpha, *others = {part.scaling for part in parts}
        if others:  # a single scaling goes into the second product as it is
            second, alpha = second * _by_column(parts, second), 1.0
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
        first: A, joined (R, d_in) or by row (b, w, d_in), in the precision of the products.
        weight: (b, 1, R), where there is one and the products are joined.
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
        self.dtype, inner = result.dtype, _inner(result)
        # The sum is an operation of its own then, which takes no factor.
        self._back = _TO[self.dtype] if inner != self.dtype else None
        if self._back is not None:
            second, alpha = second * alpha, 1.0
        self.first, self._second = first.to(inner), second.to(inner).t().contiguous()
        self.weight = None if weight is None else weight.to(inner)[:, None]
        self._alpha, self._layout, self._in_place = alpha, layout, in_place
        self._longest = inf if layout is None or weight is None else self._longest_joined(layout)
        if self._longest < 1:
            self.first, self._second = self._by_row()
            self.weight, self._longest = None, inf

    def add(self, x: Tensor, result: Tensor) -> Tensor:
        """``result`` (b, ..., d_out) with the adapters' part for x (b, ..., d_in) added."""
        second = self._second
        if _tokens(x) > self._longest:
            first, second = self._by_row()
            ranks = _ranks(x, first, None)
        else:
            ranks = _ranks(x, self.first, self.weight)
        if self._back is None:
            return self._add_product(ranks, second, result)
        delta = self._back(torch.matmul(ranks, second))
        if delta.ndim != result.ndim:
            delta = delta.view(result.shape)
        return result.add_(delta) if self._in_place and result.is_contiguous() else result + delta

    def step(self, base: Run, otherwise: Run, shape: torch.Size) -> Run:
        """What the module runs for one more token a row: base(x) and these products, with one look at whether that is right.

        Where the sum is part of the second product, that is not written out, and ``otherwise`` is returned.

        Args:
            base: the base module.
            otherwise: what the module runs in other passes.
            shape: (b, t, d_in), of what it was given in one.
        """
        back, dtype, first, second, weight = self._back, self.dtype, self.first, self._second, self.weight
        if back is None or not self._in_place or len(shape) != 3:
            return otherwise
        product: Callable[[Tensor, Tensor], Tensor] = linear
        if first.ndim == 3:
            product, first = torch.bmm, first.mT
        one_token = torch.Size((shape[0], 1, shape[2]))
        # Local names: what a step touches has left the processor's cache since the step before, name by name.
        matmul, is_grad_enabled, float32 = torch.matmul, torch.is_grad_enabled, Tensor.float

        def run(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            if x.shape != one_token or is_grad_enabled() or args or kwargs:
                return otherwise(x, *args, **kwargs)
            result = base(x)
            if result.dtype is not dtype:
                return otherwise(x)
            ranks = product(float32(x), first)
            if weight is not None:
                ranks.mul_(weight)
            return result.add_(back(matmul(ranks, second)))

        return run

    def _add_product(self, ranks: Tensor, second: Tensor, result: Tensor) -> Tensor:
        """The product with B and the sum in one operation."""
        into = self._in_place and result.is_contiguous()
        if second.ndim == 3:
            wide = result.reshape(len(result), -1, result.shape[-1])
            total = (wide.baddbmm_ if into else wide.baddbmm)(ranks, second, alpha=self._alpha)
        else:
            flat = result.view(-1, result.shape[-1]) if into else result.flatten(0, -2)
            total = (flat.addmm_ if into else flat.addmm)(ranks.reshape(len(flat), -1), second, alpha=self._alpha)
        return result if into else total.view(result.shape)

    def _longest_joined(self, layout: Layout) -> float:
        """How many tokens a row may have to be cheaper joined than by row, if zero times something foreign is zero at all.

        It is not where the foreign product overflows, or where somebody's adapter is broken, who must not break the others' rows.
        """
        if not layout.complete:
            total = self.first.sum(dtype=torch.float32) + self._second.sum(dtype=torch.float32)
            if self.first.dtype == torch.float16 or not total.isfinite():
                return 0
        spare = _SPARE_ON_CPU if self.first.device.type == "cpu" else _SPARE
        return spare * layout.columns.shape[1] / layout.foreign if layout.foreign else inf

    def _by_row(self) -> tuple[Tensor, Tensor]:
        """(b, w, d_in) and (b, w, d_out): copies of every row's own columns, with its gates in the second."""
        columns, weight = cast(Layout, self._layout).columns, cast(Tensor, self.weight)
        gates = pad(weight[:, 0], (0, 1)).gather(1, columns)
        first, second = (pad(one, (0, 0, 0, 1))[columns] for one in (self.first, self._second))
        return first, second * gates[..., None]


def is_plain(dropout: nn.Module, first: nn.Module, second: nn.Module, x: Tensor) -> bool:
    """Whether three modules do nothing but multiply by two matrices, here and without anybody watching."""
    if any(one._forward_hooks or one._forward_pre_hooks or "forward" in one.__dict__ for one in (dropout, first, second)):
        return False
    if not (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training)):
        return False
    if type(x) is not Tensor:
        return False
    return all(
        type(one) is nn.Linear
        and one.bias is None
        and type(one.weight) is nn.Parameter
        and one.weight.is_floating_point()
        and one.weight.device == x.device
        for one in (first, second)
    )


def _inner(result: Tensor) -> torch.dtype:
    """The precision of the products beside a base module's output.

    It is the output's, but for half precision on CPUs: their libraries take five times as long to begin a small product in
    bfloat16 as one in float32. Autocast has decided already.
    """
    is_half = result.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and result.device.type == "cpu" and not torch.is_autocast_enabled("cpu") else result.dtype


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else prod(x.shape[1:-1])


def _ranks(x: Tensor, first: Tensor, weight: Tensor | None) -> Tensor:
    """A x, weighted: (b, ..., R) joined, (b, t, w) by row."""
    x = x.to(first.dtype)
    if first.ndim == 3:
        return torch.bmm(x if x.ndim == 3 else x.reshape(len(x), -1, x.shape[-1]), first.mT)
    ranks = linear(x, first)
    if weight is not None:
        ranks.mul_(weight if x.ndim == 3 else weight.view(len(weight), *[1] * (x.ndim - 2), -1))
    return ranks


def _joined(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0].first, parts[0].second
    return torch.cat([part.first for part in parts]), torch.cat([part.second for part in parts], dim=1)


def _by_column(parts: Sequence[Part], second: Tensor) -> Tensor:
    """The scaling of every column (R,)."""
    dtype = torch.promote_types(second.dtype, torch.float32)
    return torch.tensor([part.scaling for part in parts for _ in range(len(part.first))], dtype=dtype, device=second.device)
