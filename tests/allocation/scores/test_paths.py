"""The scores along a path, the path integral and the moments of its gradients, against their formulas."""

import pytest
import torch
from tiny_models import ALL_KINDS, OTHER_LAYERS

from gatewise.allocation import slots
from gatewise.allocation.scores.path_integral import quadrature
from gatewise.allocation.scoring import GateBank
from gatewise.losses import mean_loss
from gatewise.scores import losses_without_and_with, path_integral, path_moments, taylor


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
        model.eval()(**data).loss.backward()
        for path, b in columns.items():
            # B(alpha) = B diag(alpha), so dCE/dalpha_r = sum over the column of dCE/dB(alpha) * B.
            _, by_slot = slots.by_slot(layers[path], "default", slots.factors(layers[path], "default")[0], b.grad * saved[path])
            scores[path] -= weight * by_slot.sum(dim=1)
    for path, b in columns.items():
        b.data = saved[path]
    model.zero_grad()
    return scores


@pytest.mark.parametrize(("family", "lora"), ALL_KINDS)
def test_equals_the_formula(adapted, batch, family, lora):
    model, data = adapted(family, **lora), batch(family)
    expected = reference(model, data, [0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5], [0.5, 0.5])
    torch.testing.assert_close(path_integral(model, data, 2), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "lora"), [*ALL_KINDS, *((family, {"target_modules": t, "use_dora": True}) for family, t in OTHER_LAYERS.items())]
)
def test_taylor_is_the_ends_of_the_path(adapted, batch, family, lora):
    """The trapezoid of the path's two ends is half of it but for a constant."""
    model, data = adapted(family, **lora), batch(family)
    without, whole = losses_without_and_with(model, data)
    ends = reference(model, data, [0.0, 1.0], [0.5, 0.5])
    expected = {path: 2 * value - (without - whole) for path, value in ends.items()}
    torch.testing.assert_close(taylor(model, data), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "settings"), [("llama", {"use_rslora": True}), ("gpt2", {}), ("bert", {})])
def test_complete(adapted, batch, family, settings):
    """The scores add up to the loss the ranks take away, and the error shrinks as points grow."""
    model, data = adapted(family, **settings), batch(family)
    with torch.no_grad(), GateBank(model) as gates:
        gates.fill(0.0)
        off = model.eval()(**data).loss.item()
        gates.fill(1.0)
        on = model(**data).loss.item()
    assert losses_without_and_with(model, data) == pytest.approx((off, on), abs=1e-5)
    errors = [abs(total(path_integral(model, data, points)) - (off - on)) for points in (1, 48)]
    assert errors[1] < 3e-5
    assert errors[1] < errors[0] / 10


def total(scores):
    return sum(float(value.double().sum()) for value in scores.values())


def test_progress_counts_points(adapted, batch):
    seen = []
    path_integral(adapted(), batch(), 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("points", [1, 2, 4, 5, 16])
def test_the_quadrature_is_exact_for_polynomials_as_far_as_it_says(points):
    nodes, weights = quadrature(points)
    assert len(nodes) == len(weights) == points
    for power in range(2 * points):
        assert sum(w * x**power for x, w in zip(nodes, weights, strict=True)) == pytest.approx(1 / (power + 1), abs=1e-12)


def reference_moments(model, data):
    """The integral over the upper half of the path of the summed loss of one example after another, and its moments."""
    each = []
    for row in range(len(data["labels"])):
        one = {key: value[row : row + 1] for key, value in data.items()}
        labels = 1
        if one["labels"].ndim > 1:  # those that are predicted from what stands before them
            labels = int((one["labels"][:, 0 if model.config.is_encoder_decoder else 1 :] != -100).sum())
        own = reference(model, one, [2 / 3, 1.0], [3 / 4, 1 / 4])
        each.append({path: values * labels for path, values in own.items()})
    stacked = {path: torch.stack([own[path] for own in each]) for path in each[0]}
    mean = {path: values.mean(dim=0) for path, values in stacked.items()}
    rms = {path: values.square().mean(dim=0).sqrt() for path, values in stacked.items()}
    mean_spread = torch.cat(list(mean.values())).std(correction=0)
    rms_spread = torch.cat(list(rms.values())).std(correction=0)
    return {path: mean[path] / mean_spread + rms[path] / rms_spread for path in mean}


@pytest.mark.parametrize(("family", "lora"), ALL_KINDS)
def test_moments_equal_the_formula(adapted, batch, family, lora):
    model, data = adapted(family, **lora), batch(family)
    torch.testing.assert_close(path_moments(model, data), reference_moments(model, data), rtol=1e-4, atol=2e-5)


def test_rows_that_cannot_have_gates_of_their_own(adapted, batch, monkeypatch):
    """As with DoRA, or where a model flattens batch and tokens: every example runs alone, and the numbers are the same."""
    model, data = adapted(), batch()
    expected = path_moments(model, data)
    monkeypatch.setattr(GateBank, "rows_apart", property(lambda self: False, lambda self, value: None), raising=False)
    got = path_moments(model, data)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_examples_do_not_cancel(adapted, batch):
    """The same text as two classes pulls ranks of a classifier both ways: signed scores are small, the second moment is not."""
    model, data = adapted("bert"), batch("bert", rows=2)
    same = {key: value[:1].expand(2, *value.shape[1:]).clone() for key, value in data.items()}
    same["labels"] = torch.tensor([0, 1])
    signed = torch.cat(list(path_integral(model, same).values()))
    moments = torch.cat(list(path_moments(model, same).values()))
    assert (signed <= 0).float().mean() > 0.3
    assert (moments <= 0).float().mean() < (signed <= 0).float().mean()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_it_tells_the_loss_with_all_ranks(adapted, batch, family):
    model, data, told = adapted(family), batch(family), []
    path_moments(model, data, on_loss=told.append)
    with torch.no_grad():
        assert told == [pytest.approx(mean_loss(model.eval(), [data]), rel=1e-5)]


def test_equal_scores_are_not_divided_by_zero(adapted, batch):
    """A fresh adapter: every rank does nothing, and scores exactly that."""
    scores = path_moments(adapted(trained=False), batch())
    assert all((value == 0).all() for value in scores.values())
