"""SPT-DARTS: who moves on which data, its two additions, what a search returns, and the training of what it chose."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from prompted_models import arguments, hyper, prompt_config, prompted_base, stopped
from torch.nn.functional import kl_div
from transformers import BertConfig, BertForQuestionAnswering, Trainer

from gatewise import GatewiseError, SelectivePromptConfig, prompts
from gatewise.bilevel import split_in_half
from gatewise.prompts.darts import SearchMixin, SearchTrainer, chosen_layers, distance


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("additions", [True, False])
def test_a_search(tmp_path, data, family, additions):
    model = hyper(family)
    settings = {} if additions else {"reparameterise": False, "consistency": 0}
    result = prompts.search(model, data(family), arguments(tmp_path), keep=2, **settings)
    assert result.gates.shape == (5, 3)
    assert result.gates[0].tolist() == [0.5, 0.5, 0.5]
    assert all(not torch.equal(one, other) for one, other in zip(result.gates, result.gates[1:], strict=False))
    torch.testing.assert_close(result.gates[-1], model.gates())
    assert result.layers == sorted(result.gates[-1].topk(2).indices.tolist())
    assert result.config.prompt_layers == result.layers
    assert result.config.bottleneck == 4


def test_weights_and_gates_move_on_their_own_halves(tmp_path, data):
    model, rows = hyper(), data("bert")
    first, second = split_in_half(rows, 3)
    seen: dict[str, list[Any]] = {"lower": [], "upper": []}
    moved: dict[str, set[str]] = {"lower": set(), "upper": set()}

    class Watched(SearchTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen["lower" if self._in_lower_step else "upper"] += inputs["input_ids"].tolist()
            return super().compute_loss(model, inputs, *args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.before = snapshot(model)
            return super().training_step(*args, **kwargs)

        def upper_step(self) -> None:
            middle = snapshot(model)
            moved["lower"] |= {name for name, value in middle.items() if not torch.equal(value, self.before[name])}
            super().upper_step()
            moved["upper"] |= {name for name, value in snapshot(model).items() if not torch.equal(value, middle[name])}

    prompts.search(model, rows, arguments(tmp_path, seed=3), keep=1, trainer_class=Watched)
    assert all(any(row == one["input_ids"].tolist() for one in first) for row in seen["lower"])
    assert all(any(row == one["input_ids"].tolist() for one in second) for row in seen["upper"])
    assert moved["upper"] == {f"base_model.{name}" for name in model.gate_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved["lower"] == trainable - moved["upper"]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_resumed_search_is_one_never_stopped(tmp_path, data):
    whole = prompts.search(hyper(), data("bert"), arguments(tmp_path / "a", max_steps=5), keep=1)
    kept = arguments(tmp_path / "b", max_steps=5, save_strategy="steps", save_steps=3)

    with pytest.raises(KeyboardInterrupt):
        prompts.search(hyper(), data("bert"), kept, keep=1, trainer_class=stopped(SearchTrainer))
    torch.manual_seed(99)
    resumed = prompts.search(hyper(), data("bert"), kept, keep=1, resume_from_checkpoint=True)
    assert torch.equal(resumed.gates, whole.gates)
    assert resumed.layers == whole.layers
    (tmp_path / "b/search/checkpoint-3/gates.safetensors").unlink()
    with pytest.raises(GatewiseError, match=r"gates.safetensors cannot be read .*: resume from a checkpoint that a search wrote"):
        prompts.search(hyper(), data("bert"), kept, keep=1, resume_from_checkpoint=str(tmp_path / "b/search/checkpoint-3"))


def in_a_search(rows: Any, args: Any, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], SearchTrainer]:
    """A hyper-network, all rows as one batch, and a trainer of it that is ready for steps."""
    model = hyper().train()
    trainer = SearchTrainer(model=model, args=args, train_dataset=rows, upper_dataset=rows, drop=0.4, **settings)
    trainer.create_optimizer()
    return model, {key: torch.stack([row[key] for row in rows]) for key in rows[0]}, trainer


def test_the_consistency_loss(tmp_path, data):
    """A lower step's loss is that of a pass with gates dropped, and the distance to another one."""
    model, batch, trainer = in_a_search(data("bert")[:4], arguments(tmp_path), upper_learning_rate=1e-2, consistency=0.3)
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(13)
    got = trainer.training_step(model, dict(batch))
    torch.manual_seed(13)
    first, second = torch.rand(3) < 0.4, torch.rand(3) < 0.4
    assert not torch.equal(first, second)
    assert not first.all()
    assert not second.all()
    with torch.no_grad():
        with model.gates_dropped(first):
            one = model(**batch)
        with model.gates_dropped(second):
            other = model(**batch)
    wanted = one.loss + 0.3 * distance(one.logits, other.logits, batch["labels"], "rows")
    torch.testing.assert_close(got, wanted)
    plain = trainer.compute_upper_loss(model, dict(batch))
    torch.testing.assert_close(plain, model(**batch).loss)


@pytest.mark.parametrize("consistency", [1.0, 0.0])
def test_gates_move_on_passes_with_gates_dropped(tmp_path, data, consistency):
    """For those are what the network is trained for; without consistency there are no drops."""
    model, batch, trainer = in_a_search(data("bert")[:4], arguments(tmp_path), consistency=consistency)
    parameters = list(model.gate_parameters().values())
    trainer._upper.optimizer = torch.optim.SGD(parameters, lr=0.5)
    before = torch.cat(list(model.gate_parameters().values())).detach().clone()
    torch.manual_seed(13)
    dropped = torch.rand(3) < (0.4 if consistency else 0.0)
    assert dropped.sum() == (1 if consistency else 0)
    with model.gates_reparameterised(), model.gates_dropped(dropped):
        slopes = torch.autograd.grad(model(**batch).loss, list(model.gate_parameters().values()))
    torch.manual_seed(13)
    trainer.upper_step()
    after = torch.cat(list(model.gate_parameters().values())).detach()
    torch.testing.assert_close(after, before - 0.5 * torch.cat(slopes))
    assert torch.equal(after[dropped], before[dropped])
    assert not torch.equal(after, before)


def test_one_gate_always_stays(tmp_path, data):
    rows = data("bert")
    trainer = SearchTrainer(
        model=hyper(), args=arguments(tmp_path), train_dataset=rows, upper_dataset=rows, upper_learning_rate=1e-2, drop=0.8
    )
    kept = torch.stack([~trainer._draw() for _ in range(200)])
    assert kept.sum(dim=1).min() == 1
    assert kept.sum(dim=1).max() > 1
    assert kept.sum(dim=0).min() > 20


@pytest.mark.parametrize("kind", ["rows", "tokens", "causal"])
def test_distances(kind):
    shape = (4, 5) if kind == "rows" else (4, 6, 5)
    one, other = torch.randn(shape), torch.randn(shape)
    labels = torch.randint(0, 5, shape[:-1])
    if kind != "rows":
        labels[:, :3] = -100
        labels[0, :] = -100
        where = (labels[:, 1:] if kind == "causal" else labels) != -100
        p, q = (x[:, :-1][where] if kind == "causal" else x[where] for x in (one, other))
    else:
        p, q = one, other
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    wanted = (kl_div(q, p, log_target=True, reduction="batchmean") + kl_div(p, q, log_target=True, reduction="batchmean")) / 2
    torch.testing.assert_close(distance(one, other, labels, kind), wanted)
    assert kind == "rows" or distance(one, other, torch.full_like(labels, -100), kind) == 0


def test_distance_of_numbers():
    one, other = torch.randn(4, 1), torch.randn(4, 1)
    torch.testing.assert_close(distance(one, other, torch.randn(4), "rows"), ((one - other) ** 2).mean())


def test_refusals(tmp_path, data):
    rows = data("llama")
    for settings, message in (
        ({"keep": 4}, "keep is 4: expected a whole number from 1 to 3"),
        ({"drop": 1}, "drop is 1: expected a probability"),
        ({"drop": None}, "drop is None: expected"),
        ({"consistency": -1}, "consistency is -1: expected"),
    ):
        with pytest.raises(GatewiseError, match=message):
            prompts.search(hyper("llama"), rows, arguments(tmp_path), **{"keep": 1, **settings})
    with pytest.raises(GatewiseError, match="a search needs a PeftModel with a hyper-network"):
        prompts.search(hyper("llama", prompt_layers=[1]), rows, arguments(tmp_path), keep=1)
    # Labels say where a decoder's prompt ends: a generator that reads on would be shown the answer.
    smooth = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(GatewiseError, match="label_smoothing_factor and compute_loss_func have the Trainer keep them back"):
        prompts.search(hyper("llama"), rows, smooth, keep=1)
    assert prompts.search(hyper(), data("bert"), smooth, keep=1).layers


@pytest.mark.parametrize("bf16", [False, True])
def test_a_search_that_had_ended_is_read(tmp_path, data, bf16):
    """As a script that does search and retraining finds it when it is started again."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, bf16=bf16)
    found = prompts.search(hyper(), data("bert"), args, keep=1, upper_learning_rate=0.3)
    again = prompts.search(hyper(), data("bert"), args, keep=1, upper_learning_rate=0.3, resume_from_checkpoint=True)
    assert torch.equal(again.gates, found.gates)
    assert (again.layers, again.config) == (found.layers, found.config)
    assert again.log == found.log[:-1]  # without the summary of having trained
    longer = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=5, bf16=bf16)
    assert len(prompts.search(hyper(), data("bert"), longer, keep=1, resume_from_checkpoint=True).gates) == 6


def test_labels_without_a_prompt_are_told_of(data, caplog):
    batch = {key: torch.stack([row[key] for row in data("llama")[:3]]) for key in ("input_ids", "labels")}
    everything = {**batch, "labels": batch["input_ids"]}
    model = hyper("llama").train()
    model(**everything)
    model(**everything)
    wanted = "no row of the first batch has a prompt of more than one token"
    assert sum(wanted in message for message in caplog.messages) == 1
    caplog.clear()
    hyper("llama").train()(**batch)
    hyper("llama").eval()(**everything)
    assert not any(wanted in message for message in caplog.messages)


def test_a_model_without_logits(tmp_path, data):
    """Question answering has two kinds of them, and two labels."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}

    def fresh() -> Any:
        return get_peft_model(BertForQuestionAnswering(BertConfig(**sizes)), prompt_config("bert-mlm"))

    rows = [
        {"input_ids": row["input_ids"], "start_positions": row["labels"], "end_positions": row["labels"]} for row in data("bert")
    ]
    with pytest.raises(GatewiseError, match=r"consistency compares the logits that made the loss.* turn it off with consistency=0"):
        prompts.search(fresh(), rows, arguments(tmp_path), keep=1)
    assert prompts.search(fresh(), rows, arguments(tmp_path), keep=1, consistency=0).layers


def test_logits_of_another_pass(tmp_path, data):
    """As TRL's SFTTrainer gives them: made without a gradient, and without the labels that keep answers from the generators."""

    class TwoPasses(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            with torch.no_grad():
                other = model(input_ids=inputs["input_ids"])
            loss = model(**inputs).loss
            return (loss, other) if return_outputs else loss

    class Search(SearchMixin, TwoPasses):
        pass

    with pytest.raises(GatewiseError, match=r"another pass .*: search with gatewise.prompts.SearchTrainer"):
        prompts.search(hyper("llama"), data("llama"), arguments(tmp_path), keep=1, trainer_class=Search)
    prompts.search(hyper("llama"), data("llama"), arguments(tmp_path), keep=1, trainer_class=Search, consistency=0)


# ---- the training of what was chosen ----


def test_choosing_layers():
    assert chosen_layers(torch.tensor([0.1, 0.7, 0.3, 0.7]), 1) == [1]
    assert chosen_layers(torch.tensor([0.1, 0.7, 0.3, 0.7]), 3) == [1, 2, 3]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_retraining_is_from_scratch(tmp_path, data, family):
    """After a search it gives what it gives on a model that was never searched, its head included."""
    searched = hyper(family)
    result = prompts.search(searched, data(family), arguments(tmp_path / "s"), keep=1)
    models = []
    for model in (searched, prompted_base_again(family)):
        torch.manual_seed(8)
        models.append(prompts.retrain(model, result.config, data(family), arguments(tmp_path / "r")))
    one, other = (dict(model.named_parameters()) for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert models[0].gates().sum() == 1
    assert not models[0].gate_parameters()


def prompted_base_again(family: str) -> Any:
    torch.manual_seed(0)
    return prompted_base(family)


def test_search_and_retraining_with_the_same_arguments(tmp_path, data):
    """Neither takes the other's checkpoints for its own, or away."""
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    found = prompts.search(hyper(), data("bert"), args, keep=3)
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["checkpoint-4"]

    again = prompts.search(hyper(), data("bert"), args, keep=3, resume_from_checkpoint=True)
    assert (again.layers, again.config) == (found.layers, found.config)
    with pytest.raises(KeyboardInterrupt):  # there is no checkpoint to go on from yet
        prompts.retrain(hyper(), found.config, data("bert"), args, trainer_class=stopped(Trainer), resume_from_checkpoint=True)
    resumed = prompts.retrain(hyper(), found.config, data("bert"), args, resume_from_checkpoint=True)
    whole = prompts.retrain(hyper(), found.config, data("bert"), arguments(tmp_path / "whole"))
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    with pytest.raises(GatewiseError, match="give it the layers that were chosen"):
        prompts.retrain(hyper(), prompt_config("bert"), data("bert"), args)
    with pytest.raises(GatewiseError, match=r"has prompts at layers .*, but now they are at \[1\]"):
        prompts.retrain(hyper(), prompt_config("bert", prompt_layers=[1]), data("bert"), args, resume_from_checkpoint=True)


def test_a_model_whose_prompts_were_taken_off(tmp_path, data):
    """Whatever its base model carries next would answer in its place."""
    searched = hyper()
    found = prompts.search(searched, data("bert"), arguments(tmp_path), keep=1)
    first = prompts.retrain(searched, found.config, data("bert"), arguments(tmp_path))
    second = prompts.retrain(first, prompt_config("bert", prompt_layers=[0, 1]), data("bert"), arguments(tmp_path))
    assert second.gates().tolist() == [1, 1, 0]
    assert all(len(module._forward_pre_hooks) == 1 for module in second.base_model._stack.around)
    batch = {"input_ids": data("bert")[0]["input_ids"][None]}
    for model in (searched, first):
        for call in (
            lambda model: model(**batch),
            lambda model: model.gates(),
            lambda model: model.unload(),
            lambda model: prompts.retrain(model, found.config, data("bert"), arguments(tmp_path)),
        ):
            with pytest.raises(GatewiseError, match=r"prompts were taken off, by retrain\(\) or unload\(\)"):
                call(model)


def test_a_configuration_from_an_adapters_folder_is_trained(tmp_path, data):
    """It comes as one for inference."""
    get_peft_model(prompted_base("bert"), prompt_config("bert", prompt_layers=[1])).save_pretrained(tmp_path / "adapter")
    config = SelectivePromptConfig.from_pretrained(tmp_path / "adapter")
    model = prompts.retrain(prompted_base("bert"), config, data("bert"), arguments(tmp_path / "runs"))
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".spt_" in name)
    assert config.inference_mode
