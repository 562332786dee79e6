"""The products of a batch of adapters against the plain sum, row by row; and the output head of a frozen model."""

import pytest
import torch
from counted import Operations
from torch import Tensor, nn

from gatewise.serving import products
from gatewise.serving.products import Part, Request, rows_side_by_side

IN, OUT, BATCH = 6, 5, 4


def part(rank: int, scaling: float = 1.0, rows: list[int] | None = None, gate: Tensor | None = None) -> Part:
    return Part(torch.randn(rank, IN), torch.randn(OUT, rank), scaling, rows, gate)


def plain_sum(parts: list[Part], x: Tensor, result: Tensor) -> Tensor:
    """y_row + gate · scaling · B A x_row, one row and one adapter at a time."""
    total = result.clone()
    for one in parts:
        rows = list(range(len(x))) if one.rows is None else one.rows
        for place, row in enumerate(rows):
            gate = 1.0 if one.gate is None else one.gate[place]
            total[row] += gate * one.scaling * (x[row] @ one.first.T @ one.second.T)
    return total


BATCHES = {
    "one adapter": lambda: [part(3, 2.0)],
    "one adapter, gates": lambda: [part(3, 2.0, gate=torch.rand(BATCH))],
    "one adapter, one gate": lambda: [part(3, 2.0, gate=torch.full((BATCH,), 0.3))],
    "two on all rows": lambda: [part(3, 2.0), part(2)],
    "two on all rows, gates": lambda: [part(3, 2.0, gate=torch.rand(BATCH)), part(2, gate=torch.rand(BATCH))],
    "two and the base": lambda: [part(3, 2.0, [0, 3]), part(2, 0.5, [1])],
    "two, one scaling": lambda: [part(3, 2.0, [0, 3]), part(2, 2.0, [1, 2])],
    "two, gates": lambda: [part(3, 2.0, [3, 0], torch.rand(2)), part(4, 0.5, [1], torch.rand(1))],
    "one and the base": lambda: [part(3, 2.0, [1, 2])],
    "one each": lambda: [part(1 + row % 2, 1.0 + row, [row]) for row in range(BATCH)],
}


@pytest.mark.parametrize("shape", [(1,), (7,), (100,), (), (2, 3)], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_products_are_the_plain_sum(name: str, shape: tuple[int, ...]) -> None:
    parts = BATCHES[name]()
    x, result = torch.randn(BATCH, *shape, IN), torch.randn(BATCH, *shape, OUT)
    gathered = Request(BATCH).gather(parts, result)
    for _ in range(2):  # the second time with what was prepared in the first
        torch.testing.assert_close(gathered.add(x, result), plain_sum(parts, x, result), rtol=1e-5, atol=1e-4)
    kept = result.clone()
    in_place = Request(BATCH).gather(parts, kept, in_place=True).add(x, kept)
    torch.testing.assert_close(in_place, plain_sum(parts, x, result), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, {"addmm_": 1}), (torch.bfloat16, {"mm": 2, "_to_copy": 2, "add_": 1})])
def test_a_step_is_two_products_and_two_views(dtype: torch.dtype, more: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base's products are quick, every further call counts."""
    monkeypatch.setattr(products, "step_of", lambda *_: None)
    x, result = torch.randn(BATCH, 1, IN, dtype=dtype), torch.randn(BATCH, 1, OUT, dtype=dtype)
    gathered = Request().gather([part(3, 2.0)], result, in_place=True)
    with Operations(views=True) as made:
        gathered.add(x, result)
    assert made.counts == {"view": 2, "mm": 1} | more


# ---- one call of compiled code for a step in bfloat16 ----


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_a_compiled_step_rounds_the_plain_sum_once(name: str, in_place: bool) -> None:
    """In and out of inference mode, between passes of many tokens."""
    parts = BATCHES[name]()
    gathered = Request(BATCH).gather(parts, torch.randn(BATCH, 1, OUT).bfloat16(), in_place=in_place)
    for tokens, mode in ((9, True), (1, True), (1, False), (9, False), (1, True)):
        x, result = torch.randn(BATCH, tokens, IN).bfloat16(), torch.randn(BATCH, tokens, OUT).bfloat16()
        before, plain = result.clone(), plain_sum(parts, x.float(), result.float())
        with torch.inference_mode(mode), torch.no_grad(), Operations() as made:
            total = gathered.add(x, result)
        assert torch.equal(result, total if in_place else before)
        if tokens == 1:
            assert made.counts == ({} if in_place else {"clone": 1})
            # But for sums so near the middle of two numbers that the order of the terms decides.
            assert (total != plain.bfloat16()).sum() <= 1
        torch.testing.assert_close(total.float(), plain, rtol=0.02, atol=0.1)


def test_a_compiled_step_reads_what_does_not_lie_side_by_side() -> None:
    one = Part(torch.randn(IN, 3).T, torch.randn(3, OUT).T, 2.0)
    x, result = torch.randn(IN, 1, BATCH).bfloat16().permute(2, 1, 0), torch.randn(OUT, 1, BATCH).bfloat16().permute(2, 1, 0)
    assert not x.is_contiguous()
    expected = plain_sum([one], x.float(), result.float())
    total = Request().gather([one], result, in_place=True).add(x, result)
    torch.testing.assert_close(total.float(), expected, rtol=0.01, atol=0.01)


BITS_SET = torch.tensor(-1, dtype=torch.int32).view(torch.float32).item()
"""No number either, and adding to its bits makes one."""


@pytest.mark.parametrize(
    "number", [float("nan"), BITS_SET, float("inf"), -float("inf"), 3.4e38, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40]
)
def test_a_compiled_step_rounds_as_pytorch_does(number: float) -> None:
    """Exactly: the nearest, the even one of two as near, infinity, what is no number, and the smallest."""
    one = Part(torch.tensor([[1.0]]), torch.tensor([[number]]))
    x, result = torch.ones(1, 1, 1).bfloat16(), torch.zeros(1, 1, 1).bfloat16()
    total = Request().gather([one], result).add(x, result)
    torch.testing.assert_close(total.flatten(), torch.tensor([number]).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_compiled_step_of_a_broken_adapter_breaks_its_own_rows_only(broken: str) -> None:
    parts = [part(3, 2.0, [0]), part(2, 0.5, [1, 2])]
    getattr(parts[0], broken)[0, 0] = float("nan")
    x, result = torch.randn(BATCH, 1, IN).bfloat16(), torch.randn(BATCH, 1, OUT).bfloat16()
    total = Request(BATCH).gather(parts, result).add(x, result)
    assert total[0].isnan().any()
    torch.testing.assert_close(total[1:].float(), plain_sum(parts, x.float(), result.float())[1:], rtol=0.01, atol=0.01)


def test_a_compiled_step_reads_no_rows_that_the_request_has_not() -> None:
    x, result = torch.randn(BATCH + 1, 1, IN).bfloat16(), torch.randn(BATCH + 1, 1, OUT).bfloat16()
    gathered = Request(BATCH).gather([part(3, 2.0, [0])], result[:BATCH])
    with pytest.raises(ValueError, match="5 rows were given, expected the request's 4"):
        gathered.add(x, result)


@pytest.mark.parametrize(("d_in", "d_out"), [(IN - 1, OUT), (IN + 1, OUT), (IN, OUT - 1), (IN, OUT + 1)])
def test_a_compiled_step_writes_to_no_sizes_that_the_adapter_has_not(d_in: int, d_out: int) -> None:
    """PyTorch says what is wrong."""
    gathered = Request().gather([part(3, 2.0)], torch.zeros(1, 1, OUT).bfloat16())
    with pytest.raises(RuntimeError):
        gathered.add(torch.randn(1, 1, d_in).bfloat16(), torch.zeros(1, 1, d_out).bfloat16())


def test_a_compiled_step_is_not_made_of_another_rank() -> None:
    result, x = torch.zeros(1, 1, OUT).bfloat16(), torch.randn(1, 1, IN).bfloat16()
    gathered = Request().gather([Part(torch.randn(4, IN), torch.randn(OUT, 3))], result)
    with pytest.raises(RuntimeError):
        gathered.add(x, result)


def test_a_step_has_a_gradient_where_one_is_asked_for() -> None:
    x = torch.randn(1, 1, IN).bfloat16().requires_grad_()
    result = torch.zeros(1, 1, OUT).bfloat16()
    assert Request().gather([part(3, 2.0)], result).add(x, result).requires_grad


def test_a_compiled_step_has_its_own_copies() -> None:
    """The model may move its parameters in the middle of a request, or let go of their memory."""
    first, second, gate = nn.Parameter(torch.randn(3, IN)), nn.Parameter(torch.randn(OUT, 3)), torch.rand(BATCH)
    x, result = torch.randn(BATCH, 1, IN).bfloat16(), torch.zeros(BATCH, 1, OUT).bfloat16()
    with torch.no_grad():
        gathered = Request(BATCH).gather([Part(first, second, gate=gate)], result)
        before = gathered.add(x, result)
        for one in (first, second, gate):
            one.fill_(torch.nan)
        assert torch.equal(gathered.add(x, result), before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the sizes do not change
def test_a_recorded_step_has_the_adapter() -> None:
    class Adapted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return gathered.add(x, x.new_zeros(1, 1, OUT))

    x, other = torch.randn(2, 1, 1, IN).bfloat16()
    with torch.no_grad():
        gathered = Request().gather([part(3, 2.0)], torch.zeros(1, 1, OUT).bfloat16())
        recorded = torch.jit.trace(Adapted(), x)
        torch.testing.assert_close(recorded(other), gathered.add(other, torch.zeros(1, 1, OUT).bfloat16()))


@pytest.mark.parametrize("too_much", [False, True])
def test_what_is_too_much_for_one_core_stays_with_pytorch(too_much: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that a row does not have are not counted."""
    parts = [part(2, 1.0, [row]) for row in range(BATCH)]
    monkeypatch.setattr(products, "MOST", BATCH * 2 * (IN + OUT) - too_much)
    x, result = torch.randn(BATCH, 1, IN).bfloat16(), torch.randn(BATCH, 1, OUT).bfloat16()
    gathered = Request(BATCH).gather(parts, result, in_place=True)
    with Operations() as made:
        gathered.add(x, result)
    assert bool(made.counts) is too_much


def test_any_shape_without_rows() -> None:
    parts, x, result = [part(3, 2.0), part(2)], torch.randn(11, IN), torch.randn(11, OUT)
    gathered = Request().gather(parts, result)
    torch.testing.assert_close(gathered.add(x, result), plain_sum(parts, x, result), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_broken_adapter_breaks_its_own_rows_only(broken: str, tokens: int) -> None:
    parts = [part(3, 2.0, [0]), part(2, 0.5, [1, 2])]
    getattr(parts[0], broken)[0, 0] = float("nan")
    x, result = torch.randn(BATCH, tokens, IN), torch.randn(BATCH, tokens, OUT)
    total = Request(BATCH).gather(parts, result).add(x, result)
    assert total[0].isnan().any()
    torch.testing.assert_close(total[1:], plain_sum(parts, x, result)[1:], rtol=1e-5, atol=1e-4)


def test_what_overflows_in_another_adapter_breaks_no_row() -> None:
    parts = [part(3, 2.0, [0]), part(2, 0.5, [1, 2])]
    parts[0].first.mul_(5e4)
    x = torch.randn(BATCH, 1, IN).half()
    x[1:] = x[1:].sign() * 3
    result = torch.zeros(BATCH, 1, OUT).half()
    total = Request(BATCH).gather(parts, result).add(x, result)
    assert total[1:].isfinite().all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_steps_after_a_prompt(name: str, in_place: bool) -> None:
    """The weights were gathered for the prompt; one token a row follows. Only if told so is the sum written into the result."""
    parts = BATCHES[name]()
    gathered = Request(BATCH).gather(parts, torch.randn(BATCH, 3, OUT).bfloat16(), in_place=in_place)
    x, result = torch.randn(BATCH, 1, IN).bfloat16(), torch.randn(BATCH, 1, OUT).bfloat16()
    before = result.clone()
    total = gathered.add(x, result)
    torch.testing.assert_close(total.float(), plain_sum(parts, x.float(), before.float()), rtol=0.03, atol=0.05)
    assert torch.equal(total, result) is in_place


# ---- the output head, given the last position of every prompt ----


class WithHead(nn.Module):
    """What has a head, as Transformers' models have."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def last_positions(rows: int) -> Tensor:
    return torch.randn(rows, 5, 4)[:, -1:]


@pytest.mark.parametrize("rows", [1, 3])
def test_weights_are_not_copied_for_every_row(rows: int) -> None:
    model, x = WithHead(), last_positions(rows)
    with torch.no_grad():
        with Operations() as before:
            expected = model.head(x)
        with rows_side_by_side(model), Operations() as inside:
            got = model.head(x)
        with Operations() as after:
            model.head(x)
    torch.testing.assert_close(got, expected)
    assert before.counts == after.counts
    assert inside.counts["bmm"] == 0
    if not before.counts["bmm"]:
        pytest.skip("this version of PyTorch copies no weights here, and has no need of this")
