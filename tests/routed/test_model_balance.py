"""The balance loss: against the formula, once in every loss that trainers make, and never in evaluation."""

from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter, word_tokenizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from gatewise.losses import row_losses
from gatewise.routed.model import with_balance

WEIGHT = 0.5


def by_hand(model, family, data):
    """WEIGHT · mean over layers of L_lb, every prompt alone."""
    rows = []
    for row, mask in enumerate(data["attention_mask"].bool()):
        if data["labels"].ndim == 2:
            mask = mask & ((data["labels"][row] != -100).cumsum(0) == 0)
        rows.append(reference.merged(model, family, data["input_ids"][row][mask][None])[2])
    layers = range(len(rows[0]))
    return WEIGHT * sum(reference.balance([row[layer] for row in rows]) for layer in layers) / len(layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_it_joins_the_models_loss(routed, batch, family, as_dict):
    model, data = routed(family, balance_weight=WEIGHT), batch(family)
    bare = model(**data, return_dict=as_dict)[0].detach()
    with_term = model.train()(**data, return_dict=as_dict)[0]
    expected = by_hand(model, family, data)
    assert float(with_term.detach() - bare) == pytest.approx(expected, rel=1e-3)
    assert float(model.balance_loss().detach()) == pytest.approx(expected, rel=1e-3)


def test_it_is_not_there_in_evaluation_or_with_weight_zero(routed, batch):
    data = batch()
    model = routed("llama", balance_weight=WEIGHT)
    with torch.no_grad():
        loss = model(**data).loss
        assert float(model.balance_loss()) == 0.0
        plain = [reference.merged(model, "llama", prompt_of(data, row))[0] for row in range(5)]
        sums = [
            plain[row](input_ids=data["input_ids"][row : row + 1], labels=data["labels"][row : row + 1]).loss for row in range(5)
        ]
    torch.testing.assert_close(loss, torch.stack(sums).mean(), rtol=1e-4, atol=1e-4)
    off = routed("llama", balance_weight=0.0).train()
    assert float(off(**data).loss.detach()) == pytest.approx(float(off.eval()(**data).loss.detach()), rel=1e-6)


def prompt_of(data, row):
    mask = data["attention_mask"][row].bool() & ((data["labels"][row] != -100).cumsum(0) == 0)
    return data["input_ids"][row][mask][None]


def test_it_has_a_gradient_for_the_routers_and_what_lies_below(routed, batch):
    model = routed("llama", balance_weight=WEIGHT).train()
    model(**batch())
    model.balance_loss().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert sum("prompt_router" in name for name in reached) == 8
    assert any("layers.0." in name and "lora_B" in name for name in reached)
    assert not any("layers.1." in name and "prompt_router" not in name for name in reached)


def test_a_loss_of_ones_own_adds_it(routed, batch):
    """gatewise's row losses take the labels out of the call; prompts are the same nevertheless, and the term is not in the loss."""
    model, data = routed("llama", balance_weight=WEIGHT).train(), batch()
    own = model(**data).loss
    gates = model.routing().gates
    sums, counts = row_losses(model, data)
    torch.testing.assert_close(model.routing().gates, gates)
    torch.testing.assert_close(sums.sum() / counts.sum() + model.balance_loss(), own)


def fused(**fields: Any) -> Any:
    """An output like those of TRL's models with a fused head."""
    output = CausalLMOutput(loss=torch.tensor(2.0))
    for name, value in fields.items():
        output[name] = value
    return output


def test_log_probabilities_of_sft_and_of_others():
    log_probs, mask, term = -torch.ones(2, 3), torch.tensor([[True, True, False], [True, False, False]]), torch.tensor(0.25)
    measures = {"log_probs": log_probs, "label_mask": mask, "is_top1": mask}
    sft = with_balance(fused(**measures), term, {}, "causal")
    assert -sft["log_probs"].sum() / 3 == -log_probs.sum() / 3 + 0.25
    torch.testing.assert_close(sft["log_probs"][~mask], log_probs[~mask])
    assert float(sft["loss"]) == 2.25
    dpo = with_balance(fused(**measures, mean_logits=log_probs), term, {}, "causal")
    torch.testing.assert_close(dpo["log_probs"], log_probs)


# ---- trainers ----


class Recorder(TrainerCallback):
    """Keeps the first step's batches and gradients, and stops."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def watch(self, model: nn.Module) -> None:
        keep = ("input_ids", "attention_mask", "labels")

        def look(_m, _args, kwargs):
            if model.training:
                self.batches.append({name: kwargs[name].clone() for name in keep if name in kwargs})

        model.register_forward_pre_hook(look, with_kwargs=True)


def arguments(folder: Any, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }


def routed_model(family: str, weight: float) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(routed_base(family), routed_config(family, balance_weight=weight))
    return trained_routers(random_adapter(model))


def expected_gradient(family: str, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of WEIGHT · Σ over a step's batches of their share of its labels · L_lb, by autograd from the routers' probabilities."""
    model = routed_model(family, WEIGHT).train()
    shifted = [batch["labels"] if family == "bert" else batch["labels"][:, 1:] for batch in batches]
    counts = [int((labels != -100).sum()) for labels in shifted]
    for batch, count in zip(batches, counts, strict=True):
        model(**batch)
        (model.balance_loss() * count / sum(counts)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(first: Recorder, second: Recorder) -> dict[str, torch.Tensor]:
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first.batches, second.batches, strict=True))
    return {name: first.gradients[name] - second.gradients[name] for name in first.gradients}


def check_once(family: str, with_term: Recorder, without: Recorder) -> None:
    """What the term added to a step's gradients is that of the term counted once."""
    assert len(with_term.batches) == 3
    expected, got = expected_gradient(family, with_term.batches), difference(with_term, without)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_counts_it_once_under_accumulation(batch, tmp_path, family, checkpointing):
    data = batch(family, rows=6)
    rows = [{name: value[row] for name, value in data.items()} for row in range(6)]
    recorders = []
    for weight in (WEIGHT, 0.0):
        model, recorder = routed_model(family, weight), Recorder()
        recorder.watch(model)
        args = TrainingArguments(**arguments(tmp_path), gradient_checkpointing=checkpointing)
        Trainer(model=model, args=args, train_dataset=rows, callbacks=[recorder]).train()
        recorders.append(recorder)
    check_once(family, *recorders)


def sft_trainer(model: Any, folder: Any, recorder: Any = None, **more: Any) -> Any:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [
        {"prompt": " ".join(f"w{7 * i % 50 + j}" for j in range(2 + i % 4)), "completion": " w3" * (1 + i % 3)} for i in range(12)
    ]
    settings = {key: value for key, value in more.items() if key != "peft_config"}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(folder, bf16=False, **settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=more.get("peft_config"),
        callbacks=[recorder] if recorder else [],
    )


def test_sft_trainer_counts_it_once_under_accumulation(tmp_path):
    recorders = []
    for weight in (WEIGHT, 0.0):
        model, recorder = routed_model("llama", weight), Recorder()
        trainer = sft_trainer(model, tmp_path, recorder)
        recorder.watch(model)
        trainer.train()
        recorders.append(recorder)
    check_once("llama", *recorders)
