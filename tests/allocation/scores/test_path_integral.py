"""The path integral against its formula, and the properties that make it what it is."""

import pytest
import torch
from tiny_models import ALL_KINDS
from torch.nn.functional import cross_entropy

from gatewise.allocation import slots
from gatewise.allocation.gates import GateBank
from gatewise.allocation.scores.path_integral import quadrature
from gatewise.errors import GatewiseError
from gatewise.scores import losses_without_and_with, path_integral


def loss_of(model, data, family="llama"):
    """The loss as Transformers computes it."""
    return model.eval()(**data).loss


def reference(model, data, nodes, weights):
    """- sum_k w_k dCE/dalpha at alpha = c_k, the gate put on B by hand and differentiated by autograd, one node after another."""
    layers = slots.lora_layers(model)
    columns = {path: slots.factors(layer, "default")[1] for path, layer in layers.items()}
    saved = {path: b.detach().clone() for path, b in columns.items()}
    scores = {path: torch.zeros(slots.capacity(layer, "default")) for path, layer in layers.items()}
    for node, weight in zip(nodes, weights, strict=True):
        for path, b in columns.items():
            b.data = saved[path] * node
        model.zero_grad()
        loss_of(model, data).backward()
        for path, b in columns.items():
            # B(alpha) = B diag(alpha), so dCE/dalpha_r = sum over the column of dCE/dB(alpha) * B.
            _, by_slot = slots.by_slot(layers[path], "default", slots.factors(layers[path], "default")[0], b.grad * saved[path])
            scores[path] -= weight * by_slot.sum(dim=1)
    for path, b in columns.items():
        b.data = saved[path]
    model.zero_grad()
    return scores


@pytest.mark.parametrize(("family", "lora"), ALL_KINDS)
@pytest.mark.parametrize(
    ("rule", "points"), [("gauss-legendre", 1), ("gauss-legendre", 4), ("gauss-radau", 2), ("trapezoid", 2), ("trapezoid", 5)]
)
def test_equals_the_formula(adapted, batch, family, lora, rule, points):
    model, data = adapted(family, **lora), batch(family)
    if rule == "gauss-legendre":
        nodes, weights = {1: ([0.5], [1.0]), 4: (
            [0.0694318442029737, 0.3300094782075719, 0.6699905217924281, 0.9305681557970263],
            [0.1739274225687269, 0.3260725774312731, 0.3260725774312731, 0.1739274225687269],
        )}[points]  # fmt: skip
    elif rule == "gauss-radau":
        nodes, weights = [1 / 3, 1.0], [3 / 4, 1 / 4]
    else:
        nodes = [i / (points - 1) for i in range(points)]
        weights = [1 / (points - 1)] * points
        weights[0] = weights[-1] = 0.5 / (points - 1)
    expected = reference(model, data, nodes, weights)
    got = path_integral(model, data, points, rule)
    for path in expected:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "settings"), [("llama", {"use_rslora": True}), ("gpt2", {}), ("bert", {})])
def test_complete(adapted, batch, family, settings):
    """The scores add up to the loss the ranks take away, and the error shrinks as points grow."""
    model, data = adapted(family, **settings), batch(family)
    with torch.no_grad(), GateBank(model) as gates:
        gates.fill(0.0)
        off = loss_of(model, data).item()
        gates.fill(1.0)
        on = loss_of(model, data).item()
    assert losses_without_and_with(model, data) == pytest.approx((off, on), abs=1e-5)
    errors = [abs(total(path_integral(model, data, points)) - (off - on)) for points in (1, 48)]
    assert errors[1] < 3e-5
    assert errors[1] < errors[0] / 10


def total(scores):
    return sum(float(value.double().sum()) for value in scores.values())


def test_trapezoid_is_complete_too(adapted, batch):
    model, data = adapted(), batch()
    without, whole = losses_without_and_with(model, data)
    errors = [abs(total(path_integral(model, data, n, "trapezoid")) - (without - whole)) for n in (3, 9, 33)]
    assert errors[2] < errors[1] < errors[0]
    # The trapezoid's error falls with the square of the step.
    assert errors[2] < errors[1] / 8


def test_two_identical_ranks_score_the_same(adapted, batch):
    model, path = adapted(), "model.layers.1.mlp.up_proj"
    layer = slots.lora_layers(model)[path]
    with torch.no_grad():
        layer.lora_A["default"].weight[2] = layer.lora_A["default"].weight[0]
        layer.lora_B["default"].weight[:, 2] = layer.lora_B["default"].weight[:, 0]
    scores = path_integral(model, batch())[path]
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-5, atol=1e-8)
    assert abs(scores[1] - scores[0]) > 1e-5


def test_a_rank_that_does_nothing_scores_zero(adapted, batch):
    """A newborn rank (B zero) and a dead slot: the first scores 0, the second has no number."""
    model, path = adapted(), "model.layers.0.mlp.gate_proj"
    layer = slots.lora_layers(model)[path]
    slots.prune(layer, "default", [0])
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 2] = 0
    scores = path_integral(model, batch())[path]
    assert len(scores) == 2
    assert scores[1] == 0
    assert scores[0] != 0


def test_batches_in_parts_equal_one_batch(adapted, batch):
    model, data = adapted(), batch()
    # As many labels in both halves, so that the mean of means is the mean.
    halves = [{key: value[rows] for key, value in data.items()} for rows in (slice(0, 2), slice(2, 5))]
    whole, split = path_integral(model, data), path_integral(model, halves)
    for path in whole:
        torch.testing.assert_close(split[path], whole[path], rtol=1e-4, atol=1e-6)


def test_masked_language_model(batch):
    """Labels at the positions themselves, not one to the right."""
    from peft import LoraConfig, get_peft_model
    from tiny_models import VOCABULARY, random_adapter
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    model = random_adapter(get_peft_model(BertForMaskedLM(config), LoraConfig(r=3, target_modules=["query", "value", "dense"])))
    data = batch()
    scores = path_integral(model, data, 12)
    logits = model.eval()(data["input_ids"], attention_mask=data["attention_mask"]).logits.detach()
    with torch.no_grad(), model.disable_adapter():
        base = model(data["input_ids"], attention_mask=data["attention_mask"]).logits
    flat = data["labels"].flatten()
    reduction = cross_entropy(base.flatten(0, 1), flat) - cross_entropy(logits.flatten(0, 1), flat)
    assert total(scores) == pytest.approx(float(reduction), abs=1e-4)


def test_half_precision_is_scored_in_float32(adapted, batch):
    model, data = adapted().to(torch.bfloat16), batch()
    exact = path_integral(adapted_copy(model), data)
    got = path_integral(model, data, float32=True)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for path in exact:
        assert torch.equal(got[path], exact[path])
    own = path_integral(model, data, float32=False)
    everything = torch.cat([own[p] for p in own]), torch.cat([exact[p] for p in exact])
    assert all(value.dtype == torch.float32 for value in own.values())
    assert torch.corrcoef(torch.stack(everything))[0, 1] > 0.98


def adapted_copy(model):
    import copy

    return copy.deepcopy(model).float()


def test_progress_counts_points(adapted, batch):
    seen = []
    path_integral(adapted(), batch(), 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("rule", ["gauss-legendre", "gauss-radau", "trapezoid"])
@pytest.mark.parametrize("points", [2, 5, 16])
def test_quadrature_integrates_lines(rule, points):
    nodes, weights = quadrature(points, rule)
    assert len(nodes) == len(weights) == points
    assert sum(weights) == pytest.approx(1)
    assert sum(w * (3 * c + 1) for c, w in zip(nodes, weights, strict=True)) == pytest.approx(2.5)


def test_gauss_legendre_integrates_degree_seven_with_four_points():
    nodes, weights = quadrature(4)
    assert sum(w * c**7 for c, w in zip(nodes, weights, strict=True)) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("points", "rule", "message"),
    [
        (1, "trapezoid", "points is 1; expected a whole number of at least 2 with the trapezoid rule"),
        (0, "gauss-legendre", "points is 0; expected a whole number of at least 1"),
        (2.5, "gauss-legendre", "points is 2.5; expected a whole number"),
        (4, "simpson", "quadrature rule 'simpson' is not known; expected one of gauss-legendre, gauss-radau, trapezoid"),
    ],
)
def test_bad_settings(adapted, batch, points, rule, message):
    with pytest.raises(GatewiseError, match=message.replace("(", r"\(")):
        path_integral(adapted(), batch(), points, rule)


@pytest.mark.parametrize("points", [1, 2, 3, 6])
def test_radau_has_the_upper_end_and_is_exact_as_far_as_it_says(points):
    nodes, weights = quadrature(points, "gauss-radau")
    assert nodes[-1] == 1.0
    assert all(0 < node <= 1 for node in nodes)
    for degree in range(2 * points - 1):
        assert sum(w * x**degree for x, w in zip(nodes, weights, strict=True)) == pytest.approx(1 / (degree + 1), abs=1e-12)
