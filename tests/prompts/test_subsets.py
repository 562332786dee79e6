"""Layers chosen by the losses of subsets: which subsets, what is read of them, and a search that chooses so."""

from collections import Counter
from typing import Any

import pytest
import torch
from prompted_models import arguments, hyper

from gatewise import GatewiseError, prompts
from gatewise.prompts.darts import SearchTrainer
from gatewise.prompts.subsets import SUBSETS, balanced_subsets, mean_with


def test_all_subsets_where_they_are_few():
    subsets = balanced_subsets(6, 2)
    assert subsets.shape == (15, 6)
    assert len({tuple(row) for row in subsets.tolist()}) == 15
    assert set(subsets.sum(dim=1).tolist()) == {2}


@pytest.mark.parametrize(("layers", "keep"), [(30, 6), (24, 5), (12, 9)])
def test_each_layer_about_as_often_where_they_are_many(layers, keep):
    subsets = balanced_subsets(layers, keep, seed=1)
    assert subsets.shape == (SUBSETS, layers)
    assert set(subsets.sum(dim=1).tolist()) == {keep}
    often = Counter(layer for row in subsets.tolist() for layer, kept in enumerate(row) if kept)
    share = SUBSETS * keep / layers
    assert len(often) == layers
    assert 0.6 * share < min(often.values()) <= max(often.values()) < 1.4 * share
    assert torch.equal(subsets, balanced_subsets(layers, keep, seed=1))
    assert not torch.equal(subsets, balanced_subsets(layers, keep, seed=2))


def test_means_by_layer():
    subsets = torch.tensor([[True, True, False, False], [True, False, True, False], [False, True, True, False]])
    assert mean_with(subsets, torch.tensor([1.0, 2.0, 6.0])).tolist() == [1.5, 3.5, 4.0, torch.inf]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses_of_subsets(tmp_path, data, family):
    """Each is the model's own loss on the upper rows with all other gates dropped, without dropout; nothing else changes."""
    model, rows = hyper(family), data(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    settings = {"args": arguments(tmp_path), "train_dataset": rows[:4], "upper_dataset": rows[4:12], "upper_learning_rate": 1e-2}
    trainer = SearchTrainer(model=model, **settings)
    with torch.no_grad():
        for layer, logit in enumerate(model.gate_parameters().values()):
            logit.fill_(layer - 1.0)
    subsets = balanced_subsets(3, 2)
    model.train()
    got = trainer.subset_losses(subsets)
    assert model.training
    batch: dict[str, Any] = {key: torch.stack([row[key] for row in rows[4:12]]) for key in rows[0]}
    model.eval()
    for kept, loss in zip(subsets, got, strict=True):
        with torch.no_grad(), model.gates_dropped(~kept):
            torch.testing.assert_close(loss, model(**batch).loss)
    assert len({round(loss, 6) for loss in got.tolist()}) == 3


def test_a_search_that_chooses_by_loss(tmp_path, data):
    """It is the search that chooses by gates, up to the choice."""
    by_gates = prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=2)
    seen: list[torch.Tensor] = []

    class Watched(SearchTrainer):
        def subset_losses(self, subsets: torch.Tensor) -> torch.Tensor:
            seen.append(super().subset_losses(subsets))
            return seen[-1]

    found = prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=2, choose="loss", trainer_class=Watched)
    assert torch.equal(found.gates, by_gates.gates)
    assert by_gates.losses is None
    pairs = dict(zip([(0, 1), (0, 2), (1, 2)], seen[0].tolist(), strict=True))
    means = [sum(loss for pair, loss in pairs.items() if layer in pair) / 2 for layer in range(3)]
    torch.testing.assert_close(found.losses, torch.tensor(means))
    assert found.layers == sorted(sorted(range(3), key=lambda layer: means[layer])[:2])
    assert found.config.prompt_layers == found.layers


def test_an_unknown_choice(tmp_path, data):
    with pytest.raises(GatewiseError, match="choose is 'luck': expected one of 'gates', 'loss'"):
        prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=1, choose="luck")
