"""The moments of path gradients against their formula."""

from contextlib import nullcontext

import pytest
import torch
from tiny_models import ALL_KINDS

from gatewise.allocation import slots
from gatewise.allocation.gates import GateBank
from gatewise.errors import GatewiseError
from gatewise.losses import mean_loss
from gatewise.scores import path_integral, path_moments

# Gauss-Radau on [0, 1] with the node 1: nodes and weights.
NODES = {1: ([1.0], [1.0]), 2: ([1 / 3, 1.0], [3 / 4, 1 / 4])}


def reference(model, data, start, points):
    """One example after another, the gate put on B by hand, plain autograd."""
    layers = slots.lora_layers(model)
    columns = {path: slots.factors(layer, "default")[1] for path, layer in layers.items()}
    saved = {path: b.detach().clone() for path, b in columns.items()}
    each = {path: [] for path in saved}
    rows = len(data["labels"])
    for row in range(rows):
        one = {key: value[row : row + 1] for key, value in data.items()}
        own = {path: torch.zeros(slots.capacity(layer, "default")) for path, layer in layers.items()}
        for node, weight in zip(*NODES[points], strict=True):
            scale = start + (1 - start) * node
            for path, b in columns.items():
                b.data = saved[path] * scale
            model.zero_grad()
            if one["labels"].ndim == 1:
                labels = 1
            else:  # those that are predicted from what stands before them
                labels = int((one["labels"][:, 0 if model.config.is_encoder_decoder else 1 :] != -100).sum())
            (model.eval()(**one).loss * labels).backward()  # the example's summed loss
            for path, b in columns.items():
                _, by_slot = slots.by_slot(layers[path], "default", slots.factors(layers[path], "default")[0], b.grad * saved[path])
                own[path] -= weight * by_slot.sum(dim=1)
        for path in each:
            each[path].append(own[path])
    for path, b in columns.items():
        b.data = saved[path]
    model.zero_grad()
    mean = {path: torch.stack(values).mean(dim=0) for path, values in each.items()}
    rms = {path: torch.stack(values).square().mean(dim=0).sqrt() for path, values in each.items()}
    mean_spread = torch.cat(list(mean.values())).std(correction=0)
    rms_spread = torch.cat(list(rms.values())).std(correction=0)
    return {path: mean[path] / mean_spread + rms[path] / rms_spread for path in each}


@pytest.mark.parametrize(("family", "lora"), ALL_KINDS)
@pytest.mark.parametrize(("start", "points"), [(0.5, 2), (0.0, 1), (1.0, 1)])
def test_equals_the_formula(adapted, batch, family, lora, start, points):
    model, data = adapted(family, **lora), batch(family)
    expected = reference(model, data, start, points)
    got = path_moments(model, data, start, points)
    for path in expected:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=2e-5)


def test_rows_that_cannot_have_gates_of_their_own(adapted, batch, monkeypatch):
    """As with DoRA, or where a model flattens batch and tokens: every example runs alone, and the numbers are the same."""
    model, data = adapted(), batch()
    expected = path_moments(model, data)
    monkeypatch.setattr(GateBank, "watching", lambda self: nullcontext(lambda rows: False))
    got = path_moments(model, data)
    for path in expected:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=1e-5)


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


def test_a_newborn_rank_scores_zero(adapted, batch):
    model, path = adapted(), "model.layers.0.mlp.gate_proj"
    with torch.no_grad():
        slots.lora_layers(model)[path].lora_B["default"].weight[:, 1] = 0
    scores = path_moments(model, batch())[path]
    assert scores[1] == 0
    assert (scores[[0, 2]] != 0).all()


def test_equal_scores_are_not_divided_by_zero(adapted, batch):
    """A fresh adapter: every rank does nothing, and scores exactly that."""
    scores = path_moments(adapted(trained=False), batch())
    assert all((value == 0).all() for value in scores.values())


@pytest.mark.parametrize(
    ("start", "points", "message"), [(1.5, 2, "start is 1.5"), (-0.1, 2, "start is -0.1"), (0.5, 0, "points is 0")]
)
def test_bad_settings(adapted, batch, start, points, message):
    with pytest.raises(GatewiseError, match=message):
        path_moments(adapted(), batch(), start, points)
