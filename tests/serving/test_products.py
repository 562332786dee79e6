"""The products of a batch of adapters against the plain sum, row by row; and the output head of a frozen model."""

import pytest
import torch
from counted import Operations
from torch import Tensor, nn

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


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, {"addmm_": 1}), (torch.bfloat16, {"mm": 2, "copy_": 2, "add_": 1})])
def test_a_step_is_two_products_and_two_views(dtype: torch.dtype, more: dict[str, int]) -> None:
    """Where the base's products are quick, every further call counts."""
    x, result = torch.randn(BATCH, 1, IN, dtype=dtype), torch.randn(BATCH, 1, OUT, dtype=dtype)
    gathered = Request().gather([part(3, 2.0)], result, in_place=True)
    gathered.add(x, result)  # what is cast has room from the first step on
    with Operations(views=True) as made:
        gathered.add(x, result)
    assert made.counts == {"view": 2, "mm": 1} | more


@pytest.mark.parametrize("name", BATCHES)
def test_steps_in_half_precision_share_their_room(name: str) -> None:
    """In and out of inference mode, after prompts and other batches; what a step was given stays as it is."""
    parts = BATCHES[name]()
    request = Request(BATCH)
    gathered = request.gather(parts, torch.randn(BATCH, 1, OUT).bfloat16())
    made = []
    for tokens, mode in ((9, True), (1, True), (1, False), (9, False), (1, True)):
        x, result = torch.randn(BATCH, tokens, IN).bfloat16(), torch.randn(BATCH, tokens, OUT).bfloat16()
        with torch.inference_mode(mode), torch.no_grad():
            made.append((gathered.add(x, result), plain_sum(parts, x.float(), result.float())))
        assert (gathered._scratch is None) is (tokens > 1)
    for ours, plain in made:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), plain, rtol=0.02, atol=0.1)


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
