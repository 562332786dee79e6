"""PEFT's LoRA variants: those whose ranks can be moved train and load, those whose ranks cannot are refused in a sentence."""

import logging

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.loraga import preprocess_loraga
from tiny_models import load_in_peft, logits_of, tiny_base
from transformers import Trainer, TrainingArguments

from gatewise import ConstantBudget, RankAllocation, ranks
from gatewise.allocation import slots
from gatewise.allocation.scoring import GateBank
from gatewise.errors import GatewiseError

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(**settings):
    torch.manual_seed(0)
    return get_peft_model(tiny_base("llama"), config(**settings))


def config(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": MODULES, "task_type": "CAUSAL_LM", **settings})


@pytest.fixture
def trainer(batch, tmp_path):
    """trainer(model) -> a Trainer with a RankAllocation, and that."""

    def make(model):
        data = batch(rows=8)
        rows = [{key: value[row] for key, value in data.items()} for row in range(8)]
        schedule = ConstantBudget(rounds=2, first_round=3, recover=3, prune_fraction=1 / 6)
        allocation = RankAllocation(schedule=schedule, validation_batch=data, budget="ranks")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=9,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation]), allocation

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "mica"},
        {"kasa_config": KasaConfig()},
        {"monteclora_config": MontecloraConfig()},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=MODULES, nblocks=2)},
    ],
)
def test_variants_whose_ranks_cannot_be_moved_are_refused(trainer, settings):
    with pytest.raises(GatewiseError, match=r"^model\.layers.* has LoRA of the variant \w+Variant, whose ranks cannot be moved"):
        trainer(made(**settings))


def gradients_first(base, settings):
    data = torch.arange(1, 25).view(3, 8)
    preprocess_loraga(base, settings, lambda: base(input_ids=data, labels=data).loss.backward())


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
        {"use_dora": True},
        {"velora_config": VeloraConfig()},
        {"alora_invocation_tokens": [7]},
    ],
    ids=lambda settings: "_".join(map(str, settings.values()))[:20],
)
def test_starts_and_variants_that_work(trainer, batch, tmp_path, settings):
    model = made(**settings)
    data = batch(rows=8)
    data["input_ids"][:, 1] = 7  # aLoRA adapts what follows this token
    if settings.get("init_lora_weights") == "eva":
        initialize_lora_eva_weights(model, [data] * 3, show_progress_bar=False)
    before = logits_of(model, data)
    running, allocation = trainer(model)
    assert torch.equal(logits_of(model, data), before)
    running.train()
    assert len(allocation.history) == 2
    assert all(one.grown for one in allocation.history)
    assert sum(ranks(model).values()) <= allocation.budget
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_in_peft("llama", tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, data), logits_of(model, data))
    assert not torch.allclose(logits_of(loaded, data), before)


@pytest.mark.parametrize("settings", [{"velora_config": VeloraConfig()}, {"alora_invocation_tokens": [7]}])
def test_the_gates_of_a_variant_take_a_rank_out(batch, settings):
    """Which is what scores measure."""
    model = made(**settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    data = batch()
    data["input_ids"][:, 1] = 7
    path, layer = next(iter(slots.lora_layers(model).items()))
    whole = logits_of(model, data)
    with GateBank(model) as bank:
        bank.gates[path] = torch.tensor([1.0, 1.0, 0.0, 1.0])
        found = logits_of(model, data)
    with torch.no_grad():
        slots.factors(layer, "default")[1][:, 2] = 0
    torch.testing.assert_close(found, logits_of(model, data))
    assert not torch.allclose(found, whole)


@pytest.mark.parametrize("start", ["pissa", "olora", "lora_ga"])
def test_a_start_that_changes_the_base_says_that_the_base_must_be_saved(trainer, batch, tmp_path, start, caplog):
    torch.manual_seed(0)
    base = tiny_base("llama")
    settings = config(init_lora_weights=start, lora_ga_config=LoraGAConfig() if start == "lora_ga" else None)
    if start == "lora_ga":
        gradients_first(base, settings)
    model = get_peft_model(base, settings)
    with caplog.at_level(logging.WARNING, logger="gatewise"):
        running, _ = trainer(model)
    assert f"init_lora_weights='{start}', which changed the base weights" in caplog.text
    running.train()
    data = batch()
    expected = logits_of(model, data)
    with pytest.raises(
        GatewiseError, match="takes an adapter's start off it, rank by rank, but its ranks have moved: leave it out"
    ):
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, data), expected)
