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
from torch import Tensor

MOST = 2_000_000
"""Multiplications in a call, above which PyTorch's products, which use all cores, are as fast."""


def step_of(first: Tensor, second: Tensor, weight: Tensor | None) -> Callable[[Tensor, Tensor], bool] | None:
    """``step(x, y)``, which adds a module's part into y (b, 1, d_out) for x (b, 1, d_in), both in bfloat16; None without Numba.

    None too where A and B have different ranks. ``step`` does nothing and returns False where x and y have other sizes than these,
    so that PyTorch's products say what is wrong. It raises ValueError for another number of rows than ``weight`` has.

    Args:
        first: A (R, d_in), in float32 as the next two.
        second: B transposed (R, d_out), memory of nobody else's, as ``weight``.
        weight: (b, R), of which zeros are not looked at; None for ones.
    All of them, x and y too, have their rows side by side in memory. They go as addresses: nothing of that is checked. Sizes are.
    """
    if (compiled := _compiled()) is None or len(first) != len(second):
        return None
    # What does not change from step to step is looked up once: each word of Python here is said in every module of every step.
    # A's address is not: it may be a parameter of the model's, which FSDP2 moves around each layer, and share_memory() once.
    weights, batch = (0, None) if weight is None else (weight.data_ptr(), len(weight))
    (ranks, d_in), d_out = first.shape, second.shape[1]
    fixed = second.data_ptr(), weights, ranks, d_in, d_out, weights

    def step(x: Tensor, y: Tensor) -> bool:
        rows = x.shape[0]
        if batch is not None and rows != batch:
            raise ValueError(f"{rows} rows were given, expected the request's {batch}")
        if x.shape != (rows, 1, d_in) or y.shape != (rows, 1, d_out):
            return False
        compiled(x.data_ptr(), y.data_ptr(), rows, first.data_ptr(), *fixed)
        return True

    step.held = second, weight  # type: ignore[attr-defined]  # as long as it can be called
    return step


@cache
def _compiled() -> Callable[..., None] | None:
    """``add(...)``, below, as a function of addresses and sizes; None without Numba. Compiled by the first call, in 2 seconds."""
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

    halves, floats, size = types.CPointer(types.uint16), types.CPointer(types.float32), types.intp

    @numba.cfunc(types.void(halves, halves, size, floats, floats, floats, *[size] * 4), fastmath=exact)
    def add(inputs, results, rows, first, second, weights, ranks, d_in, d_out, has_weights):  # type: ignore[no-untyped-def]  # pragma: no cover
        """x (rows, d_in), y (rows, d_out), A (ranks, d_in), B transposed (ranks, d_out), weights (rows, ranks) or none."""
        x, y = numba.carray(inputs, (rows, d_in)), numba.carray(results, (rows, d_out))
        a, b, weight = (
            numba.carray(first, (ranks, d_in)),
            numba.carray(second, (ranks, d_out)),
            numba.carray(weights, (rows, ranks)),
        )
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

    call = ctypes.PYFUNCTYPE(None, *[ctypes.c_ssize_t] * 10)(cast(int, add.address))
    call.compiled = add  # type: ignore[attr-defined]  # as long as it can be called
    return call
