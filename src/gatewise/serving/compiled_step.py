"""What adapters add to a linear module in a decoding step, in one call: bfloat16 on CPUs, compiled by Numba where it is installed.

    y_row += Σ_j weight[row, j] · (A_j x_row) · B_j        over the columns j that the row has

In PyTorch these are two casts, two products and a sum, each of which takes longer to begin than to do: one call takes a third to a
half of their time. It reads no column that a row has not, so that no row can be broken by another's adapter.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

MOST = 2_000_000
"""Multiplications in a call, above which PyTorch's products, which use all cores, are as fast."""


def step_of(first: Tensor, second: Tensor, weight: Tensor | None, rows: int) -> "Step | None":
    """The step of a module's adapters; None without Numba, and where A and B have different ranks.

    Args:
        first: A (R, d_in), in float32 as the next two.
        second: B transposed (R, d_out).
        weight: (b, R), of which zeros are not looked at; None for ones.
        rows: b.
    These are read where they lie now, so all are memory of nobody else's: a parameter of the model's may move (FSDP2 moves it
    around each layer, ``share_memory()`` once).
    """
    return None if _compiled() is None or len(first) != len(second) else Step(first, second, weight, rows)


class Step:
    """``step(x, y)`` adds a module's part into y (b, 1, d_out) for x (b, 1, d_in), both in bfloat16, and returns True.

    It does nothing and returns False where PyTorch is to make the products: for x and y of other sizes or precision (a prompt;
    PyTorch says what is wrong if anything is), with values that do not lie side by side, and where they are recorded for a
    gradient or a graph, which would not hold a call that is not PyTorch's.

    The arguments are those of ``step_of``. All Python here runs in every module of every step, after the base module's weights have
    driven what it reads out of the processor's cache. So what modules do not have in common is one small object.
    """

    __slots__ = ("_call", "_fixed", "_held", "_of_x", "_of_y")

    def __init__(self, first: Tensor, second: Tensor, weight: Tensor | None, rows: int) -> None:
        tensors = first.contiguous(), second.contiguous(), None if weight is None else weight.contiguous()
        (ranks, d_in), d_out = first.shape, second.shape[1]
        fixed = np.array([*(0 if one is None else one.data_ptr() for one in tensors), rows, ranks, d_in, d_out], np.intp)
        self._held = tensors, fixed  # as long as it can be called
        self._fixed = fixed.ctypes.data
        self._call = cast(Callable[..., None], _compiled())
        self._of_x, self._of_y = _shape(rows, d_in), _shape(rows, d_out)

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        if x.shape != self._of_x or y.shape != self._of_y or x.dtype is not _HALF or y.dtype is not _HALF:
            return False
        if not (x.is_contiguous() and y.is_contiguous()) or type(x) is not Tensor or type(y) is not Tensor:
            return False
        if _is_compiling() or _is_tracing() or (_has_gradients() and (x.requires_grad or y.requires_grad)):
            return False
        self._call(x.data_ptr(), y.data_ptr(), self._fixed, self._fixed)
        return True


_HALF, _has_gradients = torch.bfloat16, torch.is_grad_enabled
_is_compiling, _is_tracing = torch.compiler.is_compiling, torch.jit.is_tracing


@cache
def _shape(rows: int, d: int) -> tuple[int, int, int]:
    """One object for all modules."""
    return rows, 1, d


@cache
def _compiled() -> Callable[..., None] | None:
    """``add(...)``, below, as a function of four addresses; None without Numba. Compiled by the first call, in 2 seconds."""
    try:
        import numba
        from numba import types
    except (ImportError, OSError):  # not installed, not for this NumPy, or without its shared library
        return None
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return None
    exact = {"contract", "nsz", "reassoc"}  # infinite and missing numbers stay what they are

    @numba.njit(fastmath=exact, inline="always")
    def widened(half):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)

    @numba.njit(fastmath=exact, inline="always")
    def rounded(wide):  # type: ignore[no-untyped-def]  # pragma: no cover
        """To the nearest, and of two as near to the even one."""
        if wide != wide:
            return np.uint16(0x7FC0)
        bits = np.float32(wide).view(np.uint32)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    halves, pointers, sizes = types.CPointer(types.uint16), types.CPointer(types.voidptr), types.CPointer(types.intp)

    @numba.cfunc(types.void(halves, halves, pointers, sizes), fastmath=exact)
    def add(inputs, results, addresses, numbers):  # type: ignore[no-untyped-def]  # pragma: no cover
        """x (rows, d_in) and y (rows, d_out); where A, B transposed and the weights lie, and b, R, d_in, d_out, seven in a row."""
        has_weights, rows, ranks, d_in, d_out = numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]
        x, y = numba.carray(inputs, (rows, d_in)), numba.carray(results, (rows, d_out))
        a = numba.carray(addresses[0], (ranks, d_in), np.float32)
        b = numba.carray(addresses[1], (ranks, d_out), np.float32)
        weight = numba.carray(addresses[2], (rows, ranks), np.float32)
        wide, delta = np.empty(d_in, np.float32), np.empty(d_out, np.float32)
        for row in range(rows):
            for i in range(d_in):
                wide[i] = widened(x[row, i])
            delta[:] = 0
            for j in range(ranks):
                gate = weight[row, j] if has_weights else np.float32(1)
                if gate != 0:
                    inner = np.float32(0)
                    for i in range(d_in):
                        inner += a[j, i] * wide[i]
                    inner *= gate
                    for i in range(d_out):
                        delta[i] += inner * b[j, i]
            for i in range(d_out):
                y[row, i] = rounded(widened(y[row, i]) + delta[i])

    # Addresses are handed over in half the time that other integers take.
    call = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 4)(cast(int, add.address))
    call.compiled = add  # type: ignore[attr-defined]  # as long as it can be called
    return call
