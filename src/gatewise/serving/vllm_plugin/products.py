"""B A x in vLLM's modules, with gates between A and B: by vLLM's own products, or, on processors, adapter by adapter.

In PyTorch's place of its kernels vLLM copies A and B for every token, as large as the rank limit, and works on every slice by
itself. Here the tokens of one adapter are multiplied together, by what the adapter really has: no rows that fill up to the limit,
one product with A for all slices that share their input, and nothing for slices that nobody keeps. While requests write, a step is
mostly like the one before; then all that was found out about it is used again.

Nothing here imports vLLM. Its LoRA modules are used by ``punica_wrapper``, ``lora_a_stacked``, ``lora_b_stacked`` and
``output_slices``.

Shapes: n tokens of a step, s slices of a module, r ranks that an adapter has there in all slices together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PACKED = "gatewise_packed"  # on a module of vLLM: slot -> _Packed


def add_lora(module: Any, x: Tensor, output: Tensor, gates: Tensor) -> Tensor:
    """``output`` (n, ..., d_out) of a module's base, with B A x (n, d_in) of every token added in place, by vLLM's products.

    Both may have a batch of one in front.

    Args:
        module: vLLM's, with LoRA.
        gates: (s, n, 1), which go between A and B.
    """
    shape = output.shape
    x, output = x.flatten(0, -2), output.flatten(0, -2)
    rank = module.lora_b_stacked[0].size(-1)
    products = torch.zeros(len(module.output_slices), len(x), rank, dtype=torch.float32, device=x.device)
    module.punica_wrapper.add_shrink(products, x, module.lora_a_stacked, 1.0)
    products *= gates
    module.punica_wrapper.add_expand(output, products, module.lora_b_stacked, module.output_slices, add_inputs=True)
    return output.view(shape)


class Groups:
    """The tokens of a step by adapter, for processors, and what modules multiply them by.

    Args:
        adapters: of each token, by vLLM's numbers, 0 for none.
        slots: the number that each slot holds.

    Attributes:
        tokens: how many there are.
    """

    def __init__(self, adapters: Sequence[int], slots: Sequence[int | None]) -> None:
        self.tokens = len(adapters)
        self._rows: dict[int, Tensor | slice] = {}  # slot -> its tokens; tokens without an adapter are in none
        self._products: dict[int, list[_Product]] = {}  # of a module
        of_token = torch.tensor(adapters)
        for number in sorted(one for one in set(adapters) if one > 0):
            own = (of_token == number).nonzero()[:, 0]
            first, last = int(own[0]), int(own[-1]) + 1
            self._rows[slots.index(number)] = slice(first, last) if last - first == len(own) else own

    def add(self, module: Any, x: Tensor, output: Tensor, gates: Callable[[], Tensor | None] | None = None) -> Tensor:
        """As ``add_lora``.

        Args:
            gates: asked for (s, n, 1) the first time; None where nobody keeps any slice. So that gates are decided before a module
                asks for them, this object is for one step, or for steps that have the same gates.
        """
        products = self._products.get(id(module))
        if products is None:
            found = None if gates is None else gates()
            nobody = gates is not None and found is None
            products = self._products[id(module)] = [] if nobody else self._products_of(module, found, output.dtype)
        shape = output.shape
        x, output = x.flatten(0, -2), output.flatten(0, -2)
        for one in products:
            # In float32 up to B, and B in the precision of the output, as in vLLM.
            product = x[one.rows].float() @ one.a
            if one.factors is not None:
                product *= one.factors
            product, own = product.to(output.dtype), output[one.rows]
            for part in one.parts:
                own[:, part.start : part.end].addmm_(product[:, part.first : part.last], part.b)
            if not isinstance(one.rows, slice):
                output[one.rows] = own
        return output.view(shape)

    def _products_of(self, module: Any, gates: Tensor | None, dtype: torch.dtype) -> list["_Product"]:
        made = []
        for slot, rows in self._rows.items():
            packed = _packed(module, slot, dtype)
            kept = [one for one in packed.parts if gates is None or bool(gates[one.slice, rows].any())]
            factors = None
            if kept and gates is not None:
                factors = torch.cat([gates[one.slice, rows].expand(-1, one.last - one.first) for one in packed.parts], dim=1)
                factors = None if bool((factors == 1).all()) else factors
            if kept:
                made.append(_Product(rows, packed.a, factors, kept))
        return made


@dataclass(frozen=True)
class _Part:
    """A slice of a module: its ranks ``first:last``, and the outputs ``start:end`` that b (ranks, end - start) adds to."""

    slice: int
    first: int
    last: int
    start: int
    end: int
    b: Tensor


@dataclass(frozen=True)
class _Packed:
    """An adapter's A (d_in, r) in float32, and the slices that it adapts."""

    a: Tensor
    parts: list[_Part]


@dataclass(frozen=True)
class _Product:
    """What tokens are multiplied by: a, ``factors`` (tokens, r), then the parts of the slices that any of them keeps."""

    rows: Tensor | slice
    a: Tensor
    factors: Tensor | None
    parts: list[_Part]


def _packed(module: Any, slot: int, dtype: torch.dtype) -> _Packed:
    """Made when it is first asked for; ``forget`` it when the slot holds another adapter."""
    kept: dict[int, _Packed] = module.__dict__.setdefault(_PACKED, {})
    if slot not in kept:
        factors, parts, first, start = [], [], 0, 0
        for s, size in enumerate(module.output_slices):
            a, b = module.lora_a_stacked[s][slot, 0], module.lora_b_stacked[s][slot, 0]
            ranks = (a.any(dim=1) & b.any(dim=0)).nonzero()[:, 0]
            if len(ranks):
                last = first + len(ranks)
                factors.append(a[ranks].float())
                parts.append(_Part(s, first, last, start, start + size, b[:, ranks].to(dtype).T.contiguous()))
                first = last
            start += size
        kept[slot] = _Packed(torch.cat(factors).T if factors else torch.empty(0), parts)
    return kept[slot]


def forget(module: Any, slot: int) -> None:
    """The slot holds another adapter now."""
    module.__dict__.get(_PACKED, {}).pop(slot, None)
