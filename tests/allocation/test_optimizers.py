"""RankAllocation with each optimiser of ``TrainingArguments(optim=...)`` that runs here: dead ranks stay dead, grown ones learn."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

from gatewise import ConstantBudget, RankAllocation
from gatewise.allocation import slots

# Name -> a learning rate at which it moves weights in a few steps.
TORCH = {"adamw_torch": 3e-3, "adamw_torch_fused": 3e-3, "adafactor": 3e-3, "sgd": 3.0, "adagrad": 3e-2, "rmsprop": 3e-4}
BITSANDBYTES = {
    "adamw_8bit": 3e-3,
    "ademamix_8bit": 3e-3,
    "lion_8bit": 1e-3,
    "rmsprop_bnb_8bit": 3e-4,
    "paged_adamw_32bit": 3e-3,
    "ademamix": 3e-3,
    "lion_32bit": 1e-3,
    "rmsprop_bnb": 3e-4,
}
# A second name of one of these, or on a CPU the same without pages.
ALIASES = {
    *("adamw_bnb_8bit", "rmsprop_bnb_32bit", "paged_adamw_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("paged_lion_8bit", "paged_lion_32bit"),
}
SCHEDULE_FREE = {"schedule_free_adamw": 3e-3, "schedule_free_radam": 3e-3, "schedule_free_sgd": 3.0}
TORCHAO = {"adamw_torch_8bit": 3e-3, "adamw_torch_4bit": 3e-3}
RATES = {**TORCH, **BITSANDBYTES, **SCHEDULE_FREE, **TORCHAO}
# These need another device, or a package that is no dependency of the tests; docs/fitting.md says which were tried.
ELSEWHERE = {
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "lomo", "adalomo", "grokadamw", "stable_adamw"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw", "apollo_adamw_layerwise"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
}


class Watch(TrainerCallback):
    """Notes which slots live after each step: before its round where it stands before RankAllocation, else after."""

    def __init__(self):
        self.live = []

    def on_step_end(self, args, state, control, **kwargs):
        self.live.append({path: slots.live_slots(layer, "default") for path, layer in slots.lora_layers(kwargs["model"]).items()})


def factors_of(model):
    layers = slots.lora_layers(model)
    return {path: [one.detach().clone() for one in slots.factors(layer, "default")] for path, layer in layers.items()}


@pytest.fixture
def run(tmp_path):
    """run(optimiser, ...) -> model, allocation, live slots before and after each step's round, factors at the end and when grown.

    The factors have 4,096 numbers each, from which on 8-bit optimisers really keep 8 bits.
    """

    def train(name, rounds=3, allocate=True, resume=None, also=(), dtype=torch.float32, **arguments):
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=60, pad_token_id=0, **shape)).to(dtype)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
        ids = torch.randint(1, 60, (24, 8), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": one, "labels": one} for one in ids]
        factors = {}

        allocation = RankAllocation(
            score="taylor",
            schedule=ConstantBudget(rounds=rounds, first_round=4, recover=4, prune_fraction=1 / 16),
            budget="ranks",
            validation_batch={"input_ids": ids[:6], "labels": ids[:6]},
            on_round=lambda one: factors.update(grown=factors_of(model)),
        )
        before, after = Watch(), Watch()
        end = type("End", (TrainerCallback,), {"on_train_end": lambda self, *_, **kwargs: factors.update(end=factors_of(model))})()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path / "run"),
                max_steps=16,
                per_device_train_batch_size=4,
                learning_rate=RATES[name],
                weight_decay=0.1,
                optim=name,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **{"save_strategy": "no", **arguments},
            ),
            train_dataset=rows,
            eval_dataset=rows[:4],
            callbacks=[before, end, allocation, after, *also] if allocate else [],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, allocation, before.live, after.live, factors, trainer

    return train


def test_the_optimisers_of_transformers_are_all_here():
    assert {one.value for one in OptimizerNames} == {*RATES, *ALIASES, *ELSEWHERE}


@pytest.mark.parametrize("name", RATES)
def test_dead_ranks_stay_dead_and_grown_ones_learn(run, name):
    if name in TORCHAO:
        pytest.importorskip("torchao")
    _, allocation, before, after, factors, _ = run(name)
    assert [one.step for one in allocation.history] == [4, 8, 12]
    for earlier, later in zip(after, before[1:], strict=False):
        assert later == earlier  # only rounds change which slots live
    assert all(sum(map(len, live.values())) <= allocation.budget for live in after)
    last = allocation.history[-1]
    assert last.grown
    for path, grown in last.grown.items():
        (a, b), (old_a, _) = factors["end"][path], factors["grown"][path]
        assert (b[:, grown] != 0).any(dim=0).all()
        # No optimiser draws a new row away from where it was drawn. RMSprop's first steps are ten learning rates.
        assert (a[grown] - old_a[grown]).norm() < 0.4 * old_a[grown].norm()


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_a_schedule_free_run_ends_with_the_average(run, name):
    """The optimiser trains beside it. Without rounds the end is that of stock PEFT in the mode of evaluation.

    In float64: the optimiser makes more of rounding than others do, and processors round in their own ways.
    """
    model, *_ = run(name, rounds=0, dtype=torch.float64)
    stock, *_, trainer = run(name, allocate=False, dtype=torch.float64)
    in_training = factors_of(stock)
    trainer.optimizer.eval()
    for path, both in factors_of(model).items():
        for found, expected, beside in zip(both, factors_of(stock)[path], in_training[path], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-6)
            assert not torch.allclose(found, beside, rtol=1e-4, atol=5e-6)


class StopBetweenEvaluations(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 14


def test_a_schedule_free_best_checkpoint_stays_as_it_was_saved(run):
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    model, *_, trainer = run("schedule_free_adamw", also=[StopBetweenEvaluations()], load_best_model_at_end=True, **often)
    saved = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    for path, (a, b) in factors_of(model).items():
        stem = f"base_model.model.{path}.lora_"
        torch.testing.assert_close(b @ a, saved[f"{stem}B.weight"] @ saved[f"{stem}A.weight"])


@pytest.mark.parametrize("name", ["adamw_8bit", "schedule_free_adamw", "adamw_torch_8bit"])
def test_resumed_equals_uninterrupted(run, tmp_path, name):
    if name in TORCHAO:
        pytest.importorskip("torchao")
    whole, *_ = run(name, save_strategy="steps", save_steps=6)
    resumed, *_ = run(name, resume=str(tmp_path / "run" / "checkpoint-6"))
    expected, found = factors_of(whole), factors_of(resumed)
    assert found.keys() == expected.keys()
    for path in expected:
        for one, other in zip(found[path], expected[path], strict=True):
            torch.testing.assert_close(one, other)
