"""The second moment of path gradients against its formula."""

import pytest
import torch

from gatewise import slots
from gatewise.errors import GatewiseError
from gatewise.scores import path_moment

# Gauss-Legendre on [0, 1]: nodes and weights.
NODES = {1: ([0.5], [1.0]), 2: ([0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5], [0.5, 0.5])}


def reference(model, data, start, points):
    """One example after another, the gate put on B by hand, plain autograd."""
    layers = slots.lora_layers(model)
    saved = {path: layer.lora_B["default"].weight.detach().clone() for path, layer in layers.items()}
    squares = {path: torch.zeros(value.shape[1]) for path, value in saved.items()}
    rows = len(data["labels"])
    for row in range(rows):
        one = {key: value[row : row + 1] for key, value in data.items()}
        mean = {path: torch.zeros(value.shape[1]) for path, value in saved.items()}
        for node, weight in zip(*NODES[points], strict=True):
            scale = start + (1 - start) * node
            for path, layer in layers.items():
                layer.lora_B["default"].weight.data = saved[path] * scale
            model.zero_grad()
            labels = 1 if one["labels"].ndim == 1 else int((one["labels"][:, 1:] != -100).sum())
            (model.eval()(**one).loss * labels).backward()  # the example's summed loss
            for path, layer in layers.items():
                mean[path] += weight * (layer.lora_B["default"].weight.grad * saved[path]).sum(dim=0)
        for path in squares:
            squares[path] += mean[path] ** 2
    for path, layer in layers.items():
        layer.lora_B["default"].weight.data = saved[path]
    model.zero_grad()
    return {path: (value / rows).sqrt() for path, value in squares.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("start", "points"), [(0.5, 2), (0.0, 1), (1.0, 1)])
def test_equals_the_formula(adapted, batch, family, start, points):
    model, data = adapted(family), batch(family)
    expected = reference(model, data, start, points)
    got = path_moment(model, data, start, points)
    for path in expected:
        torch.testing.assert_close(got[path], expected[path], rtol=1e-4, atol=1e-6)


def test_rows_that_cannot_have_gates_of_their_own(adapted, batch):
    """DoRA computes its norm through the same modules, so every example is run alone; the numbers are those of single rows."""
    model, data = adapted(use_dora=True), batch()
    single = [path_moment(model, {key: value[row : row + 1] for key, value in data.items()}) for row in range(5)]
    got = path_moment(model, data)
    for path in got:
        expected = torch.stack([one[path] for one in single]).square().mean(dim=0).sqrt()
        torch.testing.assert_close(got[path], expected, rtol=1e-5, atol=1e-7)


def test_examples_do_not_cancel(adapted, batch):
    """Two classes that pull a rank of a classifier in opposite directions: the mean is small, the moment is not."""
    from gatewise.scores import path_integral

    model, data = adapted("bert"), batch("bert", rows=2)
    same = {key: value[:1].expand(2, *value.shape[1:]).clone() for key, value in data.items()}
    same["labels"] = torch.tensor([0, 1])
    signed = torch.cat(list(path_integral(model, same).values())).abs()
    moment = torch.cat(list(path_moment(model, same).values()))
    assert moment.median() > 2 * signed.median()


def test_a_newborn_rank_scores_zero(adapted, batch):
    model, path = adapted(), "model.layers.0.mlp.gate_proj"
    with torch.no_grad():
        slots.lora_layers(model)[path].lora_B["default"].weight[:, 1] = 0
    scores = path_moment(model, batch())[path]
    assert scores[1] == 0
    assert (scores[[0, 2]] > 0).all()


@pytest.mark.parametrize(
    ("start", "points", "message"), [(1.5, 2, "start is 1.5"), (-0.1, 2, "start is -0.1"), (0.5, 0, "points is 0")]
)
def test_bad_settings(adapted, batch, start, points, message):
    with pytest.raises(GatewiseError, match=message):
        path_moment(adapted(), batch(), start, points)
