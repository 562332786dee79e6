"""Layers chosen by the losses of subsets: which subsets, what is read of them, and a search that chooses so."""

from typing import Any

import pytest
import torch
from prompted_models import arguments, hyper

from gatewise import GatewiseError, prompts
from gatewise.prompts.darts import SearchTrainer
from gatewise.prompts.stages import SUBSETS, balanced_subsets, mean_with


def test_all_subsets_where_they_are_few():
    subsets = balanced_subsets(6, 2)
    assert subsets.shape == (15, 6)
    assert len({tuple(row) for row in subsets.tolist()}) == 15
    assert set(subsets.sum(dim=1).tolist()) == {2}


@pytest.mark.parametrize(("layers", "keep"), [(30, 6), (24, 5), (12, 9), (24, 13), (80, 1), (200, 3)])
def test_each_layer_about_as_often_where_they_are_many(layers, keep):
    subsets = balanced_subsets(layers, keep, seed=1)
    assert len(subsets) >= SUBSETS
    assert set(subsets.sum(dim=1).tolist()) == {keep}
    often = subsets.sum(dim=0)
    assert often.min() >= 1
    assert often.max() - often.min() <= 1
    assert torch.equal(subsets, balanced_subsets(layers, keep, seed=1))
    assert not torch.equal(subsets, balanced_subsets(layers, keep, seed=2))


def test_means_by_layer():
    subsets = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    assert mean_with(subsets, torch.tensor([1.0, 2.0, 6.0])).tolist() == [1.5, 3.5, 4.0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses_of_subsets(tmp_path, data, family):
    """Each is the model's own loss on the upper rows, each once, with all other gates dropped, without dropout."""
    model, rows = hyper(family), data(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    settings = {"args": arguments(tmp_path), "train_dataset": rows[:4], "upper_dataset": rows[4:10], "upper_learning_rate": 1e-2}
    trainer = SearchTrainer(model=model, **settings)
    with torch.no_grad():
        for layer, logit in enumerate(model.gate_parameters().values()):
            logit.fill_(layer - 1.0)
    subsets = balanced_subsets(3, 2)
    model.train()
    got = trainer.subset_losses(subsets)
    assert model.training
    batch: dict[str, Any] = {key: torch.stack([row[key] for row in rows[4:10]]) for key in rows[0]}
    model.eval()
    for kept, loss in zip(subsets, got, strict=True):
        with torch.no_grad(), model.gates_dropped(~kept):
            torch.testing.assert_close(loss, model(**batch).loss)
    assert len({round(loss, 6) for loss in got.tolist()}) == 3


def test_as_many_rows_as_fit(tmp_path, data, monkeypatch):
    monkeypatch.setattr("gatewise.prompts.darts.ROWS_READ", 15)
    rows = data("bert")
    trainer = SearchTrainer(
        model=hyper(), args=arguments(tmp_path), train_dataset=rows, upper_dataset=rows, upper_learning_rate=1e-2
    )
    seen: list[int] = []
    original = trainer.compute_upper_loss
    monkeypatch.setattr(
        trainer, "compute_upper_loss", lambda model, inputs: seen.append(len(inputs["labels"])) or original(model, inputs)
    )
    trainer.subset_losses(balanced_subsets(3, 2))
    assert seen == [4, 1] * 3


def test_a_loss_that_is_not_finite(tmp_path, data, monkeypatch):
    rows = data("bert")
    trainer = SearchTrainer(
        model=hyper(), args=arguments(tmp_path), train_dataset=rows, upper_dataset=rows, upper_learning_rate=1e-2
    )
    monkeypatch.setattr(trainer, "compute_upper_loss", lambda model, inputs: torch.tensor(torch.nan))
    with pytest.raises(GatewiseError, match="a subset's loss is not finite after the search"):
        trainer.subset_losses(balanced_subsets(3, 2))


def test_a_search_that_chooses_by_loss(tmp_path, data):
    """It is the search that chooses by gates, up to the choice."""
    by_gates = prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=2)
    assert by_gates.losses is None
    unlike = next(pair for pair in ([0, 1], [1, 2]) if pair != by_gates.layers)

    class Told(SearchTrainer):
        def subset_losses(self, subsets: torch.Tensor) -> torch.Tensor:
            assert super().subset_losses(subsets).isfinite().all()
            return torch.tensor([1.0 if kept.nonzero().flatten().tolist() == unlike else 4.0 for kept in subsets])

    found = prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=2, choose="loss", trainer_class=Told)
    assert torch.equal(found.gates, by_gates.gates)
    assert found.layers == found.config.prompt_layers == unlike
    assert found.losses.tolist() == [2.5 if layer in unlike else 4.0 for layer in range(3)]


def test_all_layers_need_no_choice(tmp_path, data):
    found = prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=3, choose="loss")
    assert (found.layers, found.losses) == ([0, 1, 2], None)


def test_an_unknown_choice(tmp_path, data):
    with pytest.raises(GatewiseError, match="choose is 'luck': expected one of 'gates', 'loss'"):
        prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=1, choose="luck")
    with pytest.raises(GatewiseError, match="choose is 'loss' and consistency is 0"):
        prompts.search(hyper(), data("bert"), arguments(tmp_path), keep=1, choose="loss", consistency=0)
