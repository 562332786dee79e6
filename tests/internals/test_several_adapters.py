"""A Trainer loads all active adapters of a checkpoint. Whole runs: tests/allocation/test_callback.py."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_adapter, tiny_base
from transformers import Trainer, TrainingArguments

from gatewise.internals.several_adapters import load_all_active_adapters


@pytest.fixture
def trainer(tmp_path):
    """With two active adapters, the factors B of one of which are frozen, and a checkpoint of the same with other values."""
    model = get_peft_model(tiny_base("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    model.base_model.set_adapter(["other", "default"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.requires_grad_(False)
    load_all_active_adapters()
    made = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.saved = {name: p.detach().clone() for name, p in random_adapter(model).named_parameters()}
    model.save_pretrained(tmp_path)
    model.load_state_dict(before)
    return made


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def assert_loaded(trainer):
    assert trainer.model.active_adapters == ["other", "default"]
    assert all(torch.equal(parameter, trainer.saved[name]) for name, parameter in trainer.model.named_parameters())


def test_resuming_keeps_what_is_active_and_what_is_trained(trainer, tmp_path):
    expected = trained(trainer.model)
    trainer._load_from_checkpoint(str(tmp_path))
    assert_loaded(trainer)
    assert trained(trainer.model) == expected


def test_the_best_checkpoint_of_each_is_its_own(trainer, tmp_path):
    trainer.state.best_model_checkpoint = str(tmp_path)
    trainer._load_best_model()
    assert_loaded(trainer)


def test_transformers_alone_still_does_not(trainer, tmp_path):
    """When this fails, Transformers has mended it, and internals/several_adapters.py may go."""
    trainer.state.best_model_checkpoint = str(tmp_path)
    Trainer._load_best_model.__wrapped__(trainer)
    weights = dict(trainer.model.named_parameters())
    assert not any(torch.equal(weights[name], saved) for name, saved in trainer.saved.items() if "lora_B" in name)
    Trainer._load_from_checkpoint.__wrapped__(trainer, str(tmp_path))
    assert trainer.model.active_adapters == ["other"]
