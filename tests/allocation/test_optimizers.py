"""RankAllocation with each optimiser of ``TrainingArguments(optim=...)`` that runs here: dead ranks stay dead, grown ones learn."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
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


def lora_fa(model):
    return create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=3e-4)


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

    ``ready``: makes an optimiser for the prepared model. ``kind``: the Trainer's class.
    The factors have 4,096 numbers each, from which on 8-bit optimisers really keep 8 bits.
    """

    def train(name, resume=None, ready=None, kind=Trainer, made=None, **arguments):
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
        optimizer = None
        if ready is not None:
            allocation.prepare(model)
            optimizer = ready(model)
        trainer = kind(
            model=model,
            optimizers=(optimizer, None),
            optimizer_cls_and_kwargs=made,
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


@pytest.mark.parametrize("settings", [{}, {"ready": lora_fa}], ids=["adamw_8bit", "lora_fa"])
def test_resumed_equals_uninterrupted(run, tmp_path, settings):
    whole, *_ = run("adamw_8bit", save_strategy="steps", save_steps=6, **settings)
    resumed, *_ = run("adamw_8bit", resume=str(tmp_path / "run" / "checkpoint-6"), **settings)
    assert_same(resumed, whole)


def test_a_ready_optimiser_trains_as_the_trainers_own(run):
    """Whether it came by a factory, after ``prepare``, or the Trainer makes it of a class."""
    expected, allocation, *_ = run("adamw_torch")
    settings = {"lr": RATES["adamw_torch"], "loraplus_lr_ratio": 1.0, "loraplus_weight_decay": 0.1}
    found, other, *_ = run("adamw_torch", ready=lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, **settings))
    assert [(one.pruned, one.grown) for one in other.history] == [(one.pruned, one.grown) for one in allocation.history]
    assert_same(found, expected)
    found, *_ = run("sgd", made=(torch.optim.AdamW, {"lr": RATES["adamw_torch"]}))
    assert_same(found, expected)


def test_lora_fa_trains_b_alone_and_ranks_grow_in_it(run):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = lora_fa(self.model)
            return self.optimizer

    kept = {}

    def fa(model):
        kept["optimizer"], kept["start"] = lora_fa(model), factors_of(model)
        return kept["optimizer"]

    model, allocation, live, factors = run("adamw_torch", ready=fa)
    assert_same(model, run("adamw_torch", kind=Own)[0])
    for step, (before, after) in enumerate(itertools.pairwise(live), start=2):
        assert after == before or step in (4, 8, 12)
    never = {path: set(range(8)).difference(*(one.pruned.get(path, ()) for one in allocation.history)) for path in kept["start"]}
    for path, slots_of in never.items():
        rows = sorted(slots_of)
        assert torch.equal(factors["end"][path][0][rows], kept["start"][path][0][rows])
    for path, grown in allocation.history[-1].grown.items():
        (a, b), (old_a, _) = factors["end"][path], factors["grown"][path]
        assert (b[:, grown] != 0).any(dim=0).all()
        assert torch.equal(a[grown], old_a[grown])


def assert_same(one, other):
    expected, found = factors_of(other), factors_of(one)
    assert found.keys() == expected.keys()
    for path in expected:
        for one, other in zip(found[path], expected[path], strict=True):
            torch.testing.assert_close(one, other)
