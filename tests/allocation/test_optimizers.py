"""RankAllocation with each optimiser of ``TrainingArguments(optim=...)`` that runs here: dead ranks stay dead, grown ones learn."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gatewise import ConstantBudget, RankAllocation
from gatewise.allocation import slots
from gatewise.errors import GatewiseError

# Name -> a learning rate at which it moves weights in a few steps.
TORCH = {"adamw_torch": 3e-3, "adamw_torch_fused": 3e-3, "adafactor": 3e-3, "sgd": 3.0, "adagrad": 3e-2, "rmsprop": 3e-4}
BITSANDBYTES = {
    "adamw_8bit": 3e-3,
    "lion_8bit": 1e-3,
    "rmsprop_bnb_8bit": 3e-4,
    "paged_adamw_32bit": 3e-3,
    "lion_32bit": 1e-3,
    "rmsprop_bnb": 3e-4,
}
RATES = {**TORCH, **BITSANDBYTES}


class Watch(TrainerCallback):
    """Notes which slots live after each step and its round."""

    def __init__(self):
        self.live = []

    def on_step_end(self, args, state, control, **kwargs):
        self.live.append({path: slots.live_slots(layer, "default") for path, layer in slots.lora_layers(kwargs["model"]).items()})


def factors_of(model):
    layers = slots.lora_layers(model)
    return {path: [one.detach().clone() for one in slots.factors(layer, "default")] for path, layer in layers.items()}


@pytest.fixture
def run(tmp_path):
    """run(optimiser, ...) -> model, allocation, live slots after each step, factors at the end and when grown.

    The factors have 4,096 numbers each, from which on 8-bit optimisers really keep 8 bits.
    """

    def train(name, resume=None, **arguments):
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, **shape))
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        ids = torch.randint(1, 60, (24, 8), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": one, "labels": one} for one in ids]
        factors = {}

        allocation = RankAllocation(
            score="taylor",
            schedule=ConstantBudget(rounds=3, first_round=4, recover=4, prune_fraction=1 / 16),
            budget="ranks",
            validation_batch={"input_ids": ids[:6], "labels": ids[:6]},
            on_round=lambda one: factors.update(grown=factors_of(model)),
        )
        watch = Watch()
        end = type("End", (TrainerCallback,), {"on_train_end": lambda self, *_, **kwargs: factors.update(end=factors_of(model))})()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=16,
                per_device_train_batch_size=4,
                learning_rate=RATES.get(name, 3e-3),
                weight_decay=0.1,
                optim=name,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **{"save_strategy": "no", **arguments},
            ),
            train_dataset=rows,
            eval_dataset=rows[:4],
            callbacks=[end, allocation, watch],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, allocation, watch.live, factors

    return train


@pytest.mark.parametrize("name", RATES)
def test_dead_ranks_stay_dead_and_grown_ones_learn(run, name):
    _, allocation, live, factors = run(name)
    assert [one.step for one in allocation.history] == [4, 8, 12]
    for step, (before, after) in enumerate(itertools.pairwise(live), start=2):
        assert after == before or step in (4, 8, 12)  # only rounds change which slots live
    assert all(sum(map(len, one.values())) <= allocation.budget for one in live)
    last = allocation.history[-1]
    assert last.grown
    for path, grown in last.grown.items():
        (a, b), (old_a, _) = factors["end"][path], factors["grown"][path]
        assert (b[:, grown] != 0).any(dim=0).all()
        # No optimiser draws a new row away from where it was drawn. RMSprop's first steps are ten learning rates.
        assert (a[grown] - old_a[grown]).norm() < 0.4 * old_a[grown].norm()


def test_an_optimiser_that_trains_beside_its_result_is_refused(run):
    with pytest.raises(GatewiseError, match="the optimizer is AdamWScheduleFree, which trains beside the average"):
        run("schedule_free_adamw")


def test_resumed_equals_uninterrupted(run, tmp_path):
    whole, *_ = run("adamw_8bit", save_strategy="steps", save_steps=6)
    resumed, *_ = run("adamw_8bit", resume=str(tmp_path / "run" / "checkpoint-6"))
    expected, found = factors_of(whole), factors_of(resumed)
    assert found.keys() == expected.keys()
    for path in expected:
        for one, other in zip(found[path], expected[path], strict=True):
            torch.testing.assert_close(one, other)
