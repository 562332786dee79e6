"""What a batch's adapters add to one linear module, in few tensor operations: gathered once a request, used every step.

    y = W x + Σ_i gate_i · scaling_i · B_i A_i x        summed over the adapters i that serve the row

No loop over adapters runs in a step. There are two ways to the same sum, which differ in where work is wasted:

- *joined*: the A of all adapters stand one below the other, the B side by side. One product with each; between them, whatever a
  row's foreign adapters made is multiplied by zero. Every weight is read once, whatever the number of rows, and foreign products
  cost arithmetic only, of which decoding has plenty to spare. Modules that read one tensor (q, k, v) share their first product.
- *by row*: every row has copies of its own A and B, in two batched products. Nothing is computed in vain, which is what counts
  where a pass has many tokens (the prompt).

Shapes: b batch, t tokens, r rank, R sum of the ranks of all adapters in a module, w the most columns that one row has.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

_SPARE = 16
"""So many products with foreign weights cost about as much as reading a weight of one's own from memory."""


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
        self._newest: Gathered | None = None
        self._read: Callable[[], Tensor | None] = _nothing

    def gather(self, parts: Sequence[Part], x: Tensor, result: Tensor, in_place: bool = False) -> "Gathered":
        """The parts of a module (at least one) as they stand now, in the precision of its base module's output.

        The first pass of a request gathers module by module, and modules that are given the same tensor share it from then on.

        Args:
            x: (b, ..., d_in), what the module was given.
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
        factors = first.to(result.dtype), second.to(result.dtype)
        made = Gathered(*factors, alpha, None if weight is None else weight.to(result.dtype), layout, in_place)
        before = self._newest if self._read() is x else None
        if before is not None:
            before.share_with(made, x)
        self._newest, self._read = made, weakref.ref(x)
        return made

    def _layout(self, parts: Sequence[Part], device: torch.device) -> Layout:
        """The same for all modules with the same adapters and ranks."""
        key = (device, *((None if part.rows is None else tuple(part.rows), len(part.first)) for part in parts))
        if key not in self._layouts:
            self._layouts[key] = Layout.of(parts, cast(int, self.batch), device)
        return self._layouts[key]


class Gathered:
    """The adapters of one module for one request.

    Args:
        first: A (R, d_in) of all of them.
        second: B (d_out, R).
        alpha: a factor of the sum.
        weight: (b, R), gates in the columns that a row has and zeros in the others. None: every row has all columns as they are.
        layout: there if ``weight`` is.

    Attributes:
        place: its number among the modules that share its input.
    """

    def __init__(
        self, first: Tensor, second: Tensor, alpha: float, weight: Tensor | None, layout: Layout | None, in_place: bool
    ) -> None:
        self.first, self.second, self.dtype, self.weight = first, second, first.dtype, weight
        self._transposed, self._alpha, self._layout, self._in_place = second.t(), alpha, layout, in_place
        self._rows: tuple[Tensor, Tensor] | None = None
        self._shared: SharedInput | None = None
        self.place = 0
        self._longest = inf
        if weight is not None:
            self._longest = self._longest_joined(cast(Layout, layout))

    def add(self, x: Tensor, result: Tensor) -> Tensor:
        """``result`` (b, ..., d_out) with the adapters' part for x (b, ..., d_in) added, rounded once where they are joined."""
        if self.weight is not None and _tokens(x) > self._longest:
            return self._add_by_row(x, result)
        ranks = self.ranks(x) if self._shared is None else self._shared.ranks(self, x)
        if self._in_place and result.is_contiguous():
            result.view(-1, result.shape[-1]).addmm_(ranks, self._transposed, alpha=self._alpha)
            return result
        return torch.addmm(result.flatten(0, -2), ranks, self._transposed, alpha=self._alpha).view(result.shape)

    def ranks(self, x: Tensor) -> Tensor:
        """A x of every token, weighted: (b · t, R)."""
        return _ranks(x, self.first, self.weight)

    def share_with(self, other: "Gathered", x: Tensor) -> None:
        """This module and the other were both given x: in later passes they have one first product."""
        if (self.weight is None) is (other.weight is None) and self.dtype == other.dtype:
            self._shared = self._shared or SharedInput(self, x)
            if self._shared.join(other):
                other._shared = self._shared

    def _longest_joined(self, layout: Layout) -> float:
        """How many tokens a row may have to be cheaper joined than by row, if zero times something foreign is zero at all.

        It is not where the foreign product overflows, or where somebody's adapter is broken, who must not break the others' rows.
        """
        if not layout.complete:
            total = self.first.sum(dtype=torch.float32) + self.second.sum(dtype=torch.float32)
            if self.dtype == torch.float16 or not total.isfinite():
                return 0
        return _SPARE * layout.columns.shape[1] / layout.foreign if layout.foreign else inf

    def _add_by_row(self, x: Tensor, result: Tensor) -> Tensor:
        rows = self._rows or self._by_row()
        if _tokens(x) == 1:  # this is how steps run; a prompt is read once
            self._rows = rows
        flat = result.reshape(len(result), -1, result.shape[-1])
        ranks = torch.bmm(x.to(self.dtype).reshape(len(x), -1, x.shape[-1]), rows[0])
        return torch.baddbmm(flat, ranks, rows[1], alpha=self._alpha).view(result.shape)

    def _by_row(self) -> tuple[Tensor, Tensor]:
        """(b, d_in, w) and (b, w, d_out): copies of every row's own columns, with its gates in the second."""
        columns, weight = cast(Layout, self._layout).columns, cast(Tensor, self.weight)
        gates = pad(weight, (0, 1)).gather(1, columns)
        first = pad(self.first, (0, 0, 0, 1))[columns].transpose(1, 2)
        return first, pad(self._transposed, (0, 0, 0, 1))[columns] * gates[..., None]


class SharedInput:
    """Modules that are given one tensor: whichever runs first in a pass computes A x for all of them.

    Holds their factors and not the modules, which hold it: in a cycle, all would outlive their request.

    Args:
        member: the first of them.
        x: what they were given in the request's first pass, in which they are still being found.
    """

    def __init__(self, member: Gathered, x: Tensor) -> None:
        self._firsts, self._weights = [member.first], [member.weight]
        self._finding = weakref.ref(x)
        self._first: Tensor | None = None
        self._weight: Tensor | None = None
        self._x: Tensor | None = None
        self._version = 0
        self._ranks: tuple[Tensor, ...] = ()

    def join(self, member: Gathered) -> bool:
        """Adds one of the modules, unless the product has been prepared already without it."""
        if self._first is not None:
            return False
        member.place = len(self._firsts)
        self._firsts.append(member.first)
        self._weights.append(member.weight)
        return True

    def ranks(self, member: Gathered, x: Tensor) -> Tensor:
        """A x of this module: (b · t, R), maybe a slice of a wider tensor."""
        if x.is_inference() or self._finding() is x:
            return member.ranks(x)
        if self._first is None:
            self._stack()
        member.first = self._firsts[member.place]  # not kept twice
        # The same tensor is the same input only while nobody has written into it, which inference tensors cannot tell.
        version = x._version
        if self._x is not x or self._version != version:
            ranks = _ranks(x, cast(Tensor, self._first), self._weight)
            self._ranks = ranks.split([len(one) for one in self._firsts], dim=1)
            self._x, self._version = x, version
        mine = self._ranks[member.place]
        if member.place == len(self._firsts) - 1:
            self._x, self._ranks = None, ()
        return mine

    def _stack(self) -> None:
        self._first = torch.cat(self._firsts)
        if self._weights[0] is not None:
            self._weight = torch.cat(cast(list[Tensor], self._weights), dim=1)
        self._firsts, self._weights = list(self._first.split([len(one) for one in self._firsts])), []


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


def _nothing() -> None:
    return None


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else prod(x.shape[1:-1])


def _ranks(x: Tensor, first: Tensor, weight: Tensor | None) -> Tensor:
    ranks = linear(x if x.dtype == first.dtype else x.to(first.dtype), first)
    if weight is not None:
        ranks.mul_(weight.view(len(weight), *[1] * (x.ndim - 2), -1))
    return ranks.view(-1, len(first))


def _joined(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0].first, parts[0].second
    return torch.cat([part.first for part in parts]), torch.cat([part.second for part in parts], dim=1)


def _by_column(parts: Sequence[Part], second: Tensor) -> Tensor:
    """The scaling of every column (R,)."""
    dtype = torch.promote_types(second.dtype, torch.float32)
    return torch.tensor([part.scaling for part in parts for _ in range(len(part.first))], dtype=dtype, device=second.device)
