"""The router's maths against the formulas, written out in plain Python, and against finite differences."""

import copy
import math

import pytest
import routed_reference as reference
import torch
from scipy.special import erf

from gatewise.routed.router import Router, balance, gates_of, rational

POOLERS = ["attention", "mean", "max", "last"]
ACTIVATIONS = ["rational", "gelu", "relu", "identity"]


def random_router(pooler="attention", activation="rational", normalize=True, experts=5, hidden=8, center=False):
    router = Router(hidden, experts, pooler, activation, normalize, center).double()
    for name, parameter in router.named_parameters():
        if name in ("weight", "pool"):
            torch.nn.init.normal_(parameter)
    return router


def random_prompts(rows=4, width=6, hidden=8):
    prompt = torch.rand(rows, width) < 0.6
    prompt[:, 2] = True
    return torch.randn(rows, width, hidden, dtype=torch.float64), prompt


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_probabilities_by_hand(pooler, activation, normalize):
    router, (hidden, prompt) = random_router(pooler, activation, normalize), random_prompts()
    got = router(hidden, prompt)
    for row in range(len(hidden)):
        expected = reference.probabilities(hidden[row][prompt[row]].tolist(), router, pooler, activation, normalize)
        torch.testing.assert_close(got[row].tolist(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", [[5], [1, 4], [2, 1, 7, 3]])
@pytest.mark.parametrize("pooler", POOLERS)
def test_observing_by_hand(pooler, sizes):
    """The mean of all prompts seen, and how far they are from it, in whatever batches they came."""
    router = random_router(pooler, center=True)
    batches = [random_prompts(rows) for rows in sizes]
    before = router(*batches[0])
    uncentred = random_router(pooler)
    uncentred.load_state_dict(
        {name: value for name, value in router.state_dict().items() if name in dict(router.named_parameters())}
    )
    torch.testing.assert_close(before, uncentred(*batches[0]), rtol=0, atol=0)
    for hidden, prompt in batches:
        router.observe(hidden, prompt)
    numbers = router.pool.tolist() if pooler == "attention" else None
    pooled = [
        reference.pool([reference.divided_by_rms(token) for token in row[kept].tolist()], pooler, numbers)
        for hidden, prompt in batches
        for row, kept in zip(hidden, prompt, strict=True)
    ]
    center = [sum(h[d] for h in pooled) / len(pooled) for d in range(8)]
    torch.testing.assert_close(router.center.tolist(), center)
    squares = sum((x - c) ** 2 for h in pooled for x, c in zip(h, center, strict=True))
    torch.testing.assert_close(float(router.spread), squares / (8 * len(pooled)))
    hidden, prompt = batches[-1]
    expected = reference.probabilities(hidden[0][prompt[0]].tolist(), router, pooler, "rational")
    torch.testing.assert_close(router(hidden, prompt)[0].tolist(), expected)


def test_one_prompt_alone_or_many_that_are_the_same_are_not_centred():
    router, (hidden, prompt) = random_router(center=True).float(), random_prompts(1)
    hidden = hidden.float()
    before = router(hidden, prompt)
    for rows in (1, 2, 7):
        router.observe(hidden.expand(rows, -1, -1), prompt.expand(rows, -1))
        torch.testing.assert_close(router(hidden, prompt), before)


def test_a_prompt_of_infinite_states_is_not_observed():
    router, (hidden, prompt) = random_router(center=True), random_prompts()
    other = copy.deepcopy(router)
    router.observe(hidden[1:], prompt[1:])
    hidden[0, 2, 3] = torch.inf
    other.observe(hidden, prompt)
    torch.testing.assert_close(other.state_dict(), router.state_dict())
    other.observe(hidden[:1], prompt[:1])
    torch.testing.assert_close(other.state_dict(), router.state_dict())


def test_a_router_that_is_loaded_observes_again():
    router, (hidden, prompt) = random_router(center=True), random_prompts(70)
    new = copy.deepcopy(router.state_dict())
    router.observe(hidden, prompt)
    assert not router.observes
    router.load_state_dict(new)
    assert router.observes


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooler", POOLERS)
def test_what_lies_outside_the_prompt_changes_nothing(pooler, normalize):
    router, (hidden, prompt) = random_router(pooler, normalize=normalize), random_prompts()
    other = hidden.masked_fill(~prompt.unsqueeze(-1), torch.inf)
    torch.testing.assert_close(router(other, prompt), router(hidden, prompt), rtol=0, atol=0)
    router(other.requires_grad_(), prompt)[:, 0].sum().backward()
    assert torch.isfinite(other.grad).all()
    assert (other.grad[~prompt] == 0).all()
    assert float(other.grad[prompt].abs().max()) > 0
    assert torch.isfinite(router.weight.grad).all()


def test_rational_starts_as_gelu():
    x = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    router = Router(4, 2, "mean", "rational")
    got = rational(x, router.numerator.double(), router.denominator.double()).detach()
    gelu = 0.5 * x * (1 + torch.from_numpy(erf(x.numpy() / math.sqrt(2))))
    assert float((got - gelu).abs().max()) < 2.5e-3
    far = torch.cat([torch.linspace(5, 1000, 4000), -torch.linspace(5, 1000, 4000)]).double()
    tails = rational(far, router.numerator.double(), router.denominator.double()).detach() / far
    assert float(tails.abs().max()) < 1.1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gates_by_hand(k, normalize):
    p = torch.randn(6, 5, dtype=torch.float64).softmax(dim=-1)
    got = gates_of(p, k, normalize)
    for row in range(6):
        torch.testing.assert_close(got[row].tolist(), reference.gates(p[row].tolist(), k, normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("pooler", POOLERS)
def test_gradients_match_finite_differences(pooler, states, k, normalize):
    router, (hidden, prompt) = random_router(pooler, normalize=states), random_prompts()
    weights = torch.randn(len(hidden), 5, dtype=torch.float64)
    with torch.no_grad():  # the sum of the kept probabilities, which the gradient takes for a constant
        p = router(hidden, prompt)
        kept = (gates_of(p, k, normalize=False) > 0).double()
        constant = (p * kept).sum(dim=-1, keepdim=True) if normalize else 1.0

    def value():
        return float((router(hidden, prompt) * kept / constant * weights).sum())

    (gates_of(router(hidden, prompt), k, normalize) * weights).sum().backward()
    for name, parameter in router.named_parameters():
        numeric = torch.zeros_like(parameter)
        for index in range(parameter.numel()):
            with torch.no_grad():
                flat = parameter.view(-1)
                before = float(flat[index])
                flat[index] = before + 1e-6
                above = value()
                flat[index] = before - 1e-6
                below = value()
                flat[index] = before
            numeric.view(-1)[index] = (above - below) / 2e-6
        assert float(parameter.grad.abs().max()) > 1e-6, name
        torch.testing.assert_close(parameter.grad, numeric, rtol=1e-5, atol=1e-8)


def test_balance_by_hand_and_at_its_ends():
    p = torch.randn(7, 5, dtype=torch.float64).softmax(dim=-1)
    torch.testing.assert_close(float(balance(p)), reference.balance(p.tolist()))
    one = torch.tensor([[1.0, 0, 0, 0]] * 3)
    even = torch.eye(4)
    assert float(balance(one)) == 4.0
    assert float(balance(even)) == 1.0


def test_balance_gradient_is_that_of_the_mean_probability():
    p = torch.randn(7, 5, dtype=torch.float64).softmax(dim=-1).requires_grad_()
    balance(p).backward()
    shares = [sum(int(row.argmax()) == i for row in p) / 7 for i in range(5)]
    torch.testing.assert_close(p.grad, (5 / 7 * torch.tensor(shares, dtype=torch.float64)).expand(7, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states_are_read_in_float32(dtype):
    router = random_router().float()
    hidden, prompt = random_prompts()
    half = hidden.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(half, prompt)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, router(half.float(), prompt), rtol=0, atol=0)


def test_new_routers_find_the_experts_nearly_alike_and_pool_the_mean():
    hidden, prompt = random_prompts()
    attention, mean = Router(8, 7, "attention", "rational"), Router(8, 7, "mean", "rational")
    p = attention(hidden.float(), prompt)
    assert float((p.detach() - 1 / 7).abs().max()) < 0.15
    mean.load_state_dict(attention.state_dict(), strict=False)
    torch.testing.assert_close(mean(hidden.float(), prompt), p)
