"""The generator's parts against their formulas, and the gates' gradients against finite differences."""

import prompt_reference as reference
import pytest
import torch
from prompted_models import prompt_config, prompted
from torch.nn.functional import adaptive_avg_pool1d, normalize

from gatewise.prompts.generator import PromptGenerator, kronecker_sum, pooling_weights
from gatewise.prompts.layer import mixed


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_pooling_is_pytorchs_over_what_is_read(tokens):
    read = torch.rand(20, 13) < torch.rand(20, 1)
    states = torch.randn(20, 13, 5)
    pooled = pooling_weights(read, tokens) @ states
    for row in range(20):
        if not read[row].any():
            assert torch.equal(pooled[row], torch.zeros(tokens, 5))
            continue
        wanted = adaptive_avg_pool1d(states[row][read[row]].T, tokens).T
        torch.testing.assert_close(pooled[row], wanted)


def test_kronecker_products():
    a, b = torch.randn(3, 3, 3), torch.randn(3, 4, 2)
    torch.testing.assert_close(kronecker_sum(a, b), sum(torch.kron(a[i], b[i]) for i in range(3)))


@pytest.mark.parametrize("phm", [None, 2, 4])
def test_numbers_at_the_start(phm):
    generator = PromptGenerator(64, 32, phm, "gelu")
    down, up = generator.projection("down"), generator.projection("up")
    assert down.shape == (32, 64)
    assert up.shape == (64, 32)
    assert float(down.detach().std()) == pytest.approx(64**-0.5, rel=0.5)
    assert float(up.detach().std()) == pytest.approx(32**-0.5, rel=0.5)
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert count == (2 * 64 * 32 if phm is None else 2 * (phm**3 + 64 * 32 // phm))


@pytest.mark.parametrize("phm", [None, 2])
@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "identity"])
def test_the_whole_formula(phm, activation):
    config = prompt_config(num_prompt_tokens=4, bottleneck=6, phm=phm, activation=activation)
    generator = PromptGenerator(8, 6, phm, activation)
    hidden, read = torch.randn(2, 9, 8), torch.tensor([[1] * 6 + [0] * 3, [0, 0, 1, 0, 1] + [0] * 4]).bool()
    got = generator(hidden, pooling_weights(read, 4))
    for row in range(2):
        torch.testing.assert_close(
            got[row], reference.generated(hidden[row][read[row]], dict(generator.named_parameters()), config)
        )


@pytest.mark.parametrize("dropped", [None, [False, True, False]], ids=str)
@pytest.mark.parametrize("reparameterised", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "bert"])  # the others' norms are float32 at all times
def test_gradients_of_gates_are_finite_differences(texts, family, reparameterised, dropped):
    """Re-parameterised gates have the plain gates' values, so their loss is written out with the constant it leaves out."""
    model = prompted(family, tau=0.7).double()
    logits = list(model.gate_parameters().values())
    start = torch.cat([logit.detach().clone() for logit in logits])
    dropped_gates = [False] * 3 if dropped is None else dropped
    is_open = ~torch.tensor(dropped_gates)
    total = start.sigmoid()[is_open].sum()

    base = reference.plain_copy(model)

    def loss_at(values: torch.Tensor) -> torch.Tensor:
        gates = values.sigmoid()
        gates = gates * total / gates[is_open].sum() if reparameterised else gates
        gates = torch.where(is_open, gates, 0.0)
        with torch.no_grad():
            wanted = reference.logits(base, model, texts[0], gates=gates)
        return wanted.square().sum()

    with model.gates_reparameterised(reparameterised), model.gates_dropped(dropped_gates):
        loss = model(input_ids=texts[0][None]).logits.square().sum()
    loss.backward()
    torch.testing.assert_close(loss.detach(), loss_at(start))
    for layer, logit in enumerate(logits):
        step = torch.zeros(3, dtype=torch.float64)
        step[layer] = 1e-5
        wanted = (loss_at(start + step) - loss_at(start - step)) / 2e-5
        torch.testing.assert_close(logit.grad[0], wanted, rtol=1e-5, atol=1e-7)


def test_the_formula_of_the_mixture():
    old, new, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.25])
    torch.testing.assert_close(mixed(old, new, gate, 0.5, False), (1 - 0.125) * old + 0.125 * new)
    torch.testing.assert_close(mixed(None, new, gate, 0.5, False), 0.125 * new)
    torch.testing.assert_close(mixed(old, new, None, 1.0, False), new)


def test_a_balanced_mixture():
    old, new, gate = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.25])
    got = mixed(100 * old, new, gate, 0.5, True)
    for row in range(2):
        torch.testing.assert_close(got[row], reference.mixture(100 * old[row], new[row], torch.tensor(0.125), True))
    # Which way it points does not depend on the sizes.
    torch.testing.assert_close(normalize(got, dim=-1), normalize(mixed(old, new / 7, gate, 0.5, True), dim=-1))
    # Gates that are open or closed leave one of the two, bit by bit.
    assert torch.equal(mixed(100 * old, new, torch.ones(1), 1.0, True), new)
    assert torch.equal(mixed(100 * old, new, torch.zeros(1), 1.0, True), 100 * old)
    assert torch.equal(mixed(None, new, gate, 0.5, True), 0.125 * new)


@pytest.mark.parametrize("closed", [False, True])
def test_gradients_of_a_balanced_mixture_are_finite(closed):
    """At a prompt of zeros too, which carries the graph through layers below the first open gate."""
    old, new = torch.zeros(1, 2, 4, requires_grad=True), torch.zeros(1, 2, 4, requires_grad=True)
    gate = torch.tensor([0.0 if closed else 0.5], requires_grad=True)
    (mixed(old, new, gate, 1.0, True) + mixed(300 * torch.ones(1, 2, 4), new, gate, 1.0, True)).sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (old, new, gate))
