"""A Trainer loads all active adapters of a checkpoint. Whole runs: tests/allocation/test_callback.py."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_adapter, tiny_base
from transformers import Trainer, TrainerCallback, TrainingArguments

from gatewise import RankAllocation
from gatewise.internals.several_adapters import load_all_active_adapters


class Load(TrainerCallback):
    def on_init_end(self, args, state, control, **kwargs):
        load_all_active_adapters()


@pytest.fixture
def trainer(tmp_path):
    """trainer(callbacks) -> a Trainer of two active adapters, the factors B of one of which are frozen, and a checkpoint of the
    same with other values."""

    def make(callbacks, late=False):
        model = get_peft_model(tiny_base("llama"), LoraConfig(r=2, target_modules=["q_proj"]))

        def add_other():
            model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
            model.base_model.set_adapter(["other", "default"])
            for name, parameter in model.named_parameters():
                if "lora_B.other" in name:
                    parameter.requires_grad_(False)

        if not late:
            add_other()
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
        made = Trainer(model=model, args=arguments, callbacks=callbacks)
        if late:
            add_other()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        made.saved = {name: p.detach().clone() for name, p in random_adapter(model).named_parameters()}
        model.save_pretrained(tmp_path)
        model.load_state_dict(before)
        made.state.best_model_checkpoint = str(tmp_path)
        return made

    return make


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_loaded(trainer):
    assert trainer.model.active_adapters == ["other", "default"]
    assert all(torch.equal(parameter, trainer.saved[name]) for name, parameter in trainer.model.named_parameters())


def test_resuming_keeps_what_is_active_and_what_is_trained(trainer, tmp_path):
    made = trainer([Load()])
    expected = trained(made.model)
    made._load_from_checkpoint(str(tmp_path))
    assert_loaded(made)
    assert trained(made.model) == expected


@pytest.mark.parametrize("late", [False, True], ids=["there before", "added after the Trainer was made"])
def test_the_best_checkpoint_of_each_is_its_own(trainer, late):
    made = trainer([Load(), Load()], late)
    made._load_best_model()
    assert_loaded(made)


def test_another_trainer_is_untouched(trainer, tmp_path):
    """Also by a RankAllocation. And when this fails, Transformers has mended it, and internals/several_adapters.py may go."""
    classes = Trainer._load_best_model, Trainer._load_from_checkpoint
    other = trainer([RankAllocation(adapter="default")])
    made = trainer([])
    assert (Trainer._load_best_model, Trainer._load_from_checkpoint) == classes
    assert "_load_best_model" in vars(other)
    assert not {"_load_best_model", "_load_from_checkpoint"} & vars(made).keys()
    made._load_best_model()
    weights = dict(made.model.named_parameters())
    assert not any(torch.equal(weights[name], saved) for name, saved in made.saved.items() if "lora_B" in name)
    made._load_from_checkpoint(str(tmp_path))
    assert made.model.active_adapters == ["other"]
