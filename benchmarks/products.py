"""What the products of unmerged adapters cost on a CPU, and in what form they cost least: why gatewise.serving computes as it does.

The 210 linear modules of SmolLM2-135M with random weights run one after the other in bfloat16, and after each the products of an
adapter (r = 8) or of eight in the forms that were tried. Microseconds a module are what that adds to the base modules alone: so
the products run as they do in a step, where the base model's weights have gone through the processor's cache since the last ones.
Beside them the same products over and over on one module, where everything is in the cache; and the output head with its weight
frozen and not.

    python benchmarks/products.py [--threads 2]      # on a quiet machine; a minute
    python benchmarks/products.py --report
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

RESULTS = Path(__file__).parent / "results" / "products.json"
LAYERS, HIDDEN, KEYS, WIDE, VOCABULARY, RANK, EIGHT = 30, 576, 192, 1536, 49152, 8, 8
SHAPES = [
    (HIDDEN, HIDDEN),
    (HIDDEN, KEYS),
    (HIDDEN, KEYS),
    (HIDDEN, HIDDEN),
    (HIDDEN, WIDE),
    (HIDDEN, WIDE),
    (WIDE, HIDDEN),
] * LAYERS
Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, A, B transposed, y) -> y with the sum


def halves(x: Tensor, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """Two products in bfloat16, the second with the sum."""
    y.view(-1, y.shape[-1]).addmm_(linear(x, first).view(-1, len(first)), second)
    return y


def singles(x: Tensor, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """In float32: a cast, two products, a cast, the sum."""
    return y.add_(torch.matmul(linear(x.float(), first), second).bfloat16())


def masked(x: Tensor, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """Eight adapters joined, each row's own columns kept."""
    return y.add_(torch.matmul(linear(x.float(), first).mul_(_OWN), second).bfloat16())


def by_row(x: Tensor, first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """Eight adapters, two batched products."""
    first, second = first.view(len(x), -1, first.shape[1]), second.view(len(x), -1, second.shape[1])
    return y.add_(torch.bmm(torch.bmm(x.float(), first.mT), second).bfloat16())


_OWN = torch.eye(EIGHT).repeat_interleave(RANK, dim=1)[:, None]
FORMS: dict[str, tuple[Form, torch.dtype, int]] = {
    "one adapter, bfloat16": (halves, torch.bfloat16, RANK),
    "one adapter, float32": (singles, torch.float32, RANK),
    "eight, joined, bfloat16": (halves, torch.bfloat16, RANK * EIGHT),
    "eight, joined, float32": (masked, torch.float32, RANK * EIGHT),
    "eight, by row, float32": (by_row, torch.float32, RANK * EIGHT),
}


def seconds(run: Callable[[], object], times: int) -> float:
    """The median of so many runs."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure(rows: int) -> dict[str, dict[str, float]]:
    """Microseconds a module of every form, in a step and over and over."""
    bases = [torch.randn(out, into).bfloat16() for into, out in SHAPES]
    inputs = {into: torch.randn(rows, 1, into).bfloat16() for into in (HIDDEN, WIDE)}

    def step(form: Form | None, factors: list[tuple[Tensor, Tensor]]) -> None:
        for place, (into, _) in enumerate(SHAPES):
            y = linear(inputs[into], bases[place])
            if form is not None:
                form(inputs[into], *factors[place], y)

    found = {}
    for name, (form, dtype, width) in FORMS.items():
        if name.startswith("eight") and rows != EIGHT:
            continue
        factors = [(torch.randn(width, into).to(dtype), torch.randn(width, out).to(dtype)) for into, out in SHAPES]
        pairs = [(seconds(lambda f=form, g=factors: step(f, g), 1), seconds(lambda: step(None, []), 1)) for _ in range(25)]  # type: ignore[misc]
        extra = statistics.median(ours - base for ours, base in pairs) / len(SHAPES)
        y = linear(inputs[HIDDEN], bases[0])
        alone = seconds(lambda f=form, g=factors, y=y: [f(inputs[HIDDEN], *g[0], y) for _ in range(200)], 15) / 200  # type: ignore[misc]
        found[name] = {"in a step": round(1e6 * extra, 1), "over and over": round(1e6 * alone, 1)}
    return found


def head(rows: int) -> dict[str, float]:
    """Seconds of the output head on the last of 64 positions, by what is done about its frozen weight."""
    states = torch.randn(rows, 64, HIDDEN).bfloat16()[:, -1:]
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN).bfloat16())
    side_by_side = states.contiguous().view(-1, HIDDEN).view(states.shape)
    found = {"trained": seconds(lambda: linear(states, weight), 9)}
    weight.requires_grad_(False)
    found |= {
        "frozen": seconds(lambda: linear(states, weight), 9),
        "frozen, rows side by side": seconds(lambda: linear(side_by_side, weight), 9),
    }
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    """Measures and writes, or prints what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    options = parser.parse_args()
    if not options.report:
        torch.set_num_threads(options.threads)
        with torch.no_grad():
            results = {
                f"{rows} rows": {"microseconds a module": measure(rows), "seconds of the head": head(rows)} for rows in (1, EIGHT)
            }
        options.out.write_text(json.dumps({"threads": options.threads, "torch": torch.__version__, **results}, indent=1) + "\n")
    print(options.out.read_text(), end="")


if __name__ == "__main__":
    main()
