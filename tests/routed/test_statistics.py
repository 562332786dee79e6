"""What ``routing()`` and ``routing_statistics()`` say, and that a Trainer's logs get it."""

import math

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from transformers import Trainer, TrainerCallback, TrainingArguments

from gatewise.errors import GatewiseError
from gatewise.routed import RoutingLog


def test_routing_names_layers_and_modules(routed, batch):
    model = routed("bert", top_k=2)
    with torch.no_grad():
        model(**batch("bert"))
    routing = model.routing()
    assert routing.gates.shape == (5, 2, 6)
    assert routing.gates.dtype == torch.float32
    assert routing.layers == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert routing.modules == (tuple(reference.EXPERTS["bert"]),) * 2
    assert ((routing.gates > 0).sum(dim=-1) == 2).all()


def test_layers_with_fewer_experts_are_padded(batch):
    config = routed_config(target_modules=r".*layers\.0\..*(q_proj|v_proj|up_proj)|.*layers\.1\..*(k_proj|down_proj)", top_k=2)
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), config))).eval()
    with torch.no_grad():
        model(**batch())
    routing = model.routing()
    assert routing.gates.shape == (5, 2, 3)
    assert routing.modules == (("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"), ("self_attn.k_proj", "mlp.down_proj"))
    assert (routing.gates[:, 1, 2] == 0).all()
    assert (routing.gates[:, 1, :2] > 0).all()


def test_statistics_by_hand(routed, batch):
    model, data = routed("llama", top_k=2), batch()
    with torch.no_grad():
        model(**data)
    statistics = model.routing_statistics()
    rows = []
    for row, mask in enumerate(data["attention_mask"].bool()):
        mask = mask & ((data["labels"][row] != -100).cumsum(0) == 0)
        rows.append(reference.merged(model, "llama", data["input_ids"][row][mask][None])[1:])
    per_layer = [[p[layer] for _, p in rows] for layer in range(2)]
    assert statistics["balance_loss"] == pytest.approx(sum(map(reference.balance, per_layer)) / 2, rel=1e-4)
    entropy = [-sum(x * math.log(x) for x in p) for layer in per_layer for p in layer]
    assert statistics["entropy"] == pytest.approx(sum(entropy) / 10, rel=1e-4)


def test_before_the_first_call(routed):
    model = routed("llama")
    for ask in (model.routing, model.routing_statistics):
        with pytest.raises(GatewiseError, match="no prompt has been routed yet"):
            ask()
    assert float(model.balance_loss()) == 0.0


class Logger(TrainerCallback):
    """Stands for TensorBoard and the like: keeps what it is given, when it is given it."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def test_a_trainers_logs(batch, tmp_path):
    data = batch(rows=8)
    rows = [{name: value[row] for name, value in data.items()} for row in range(8)]
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config())))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(model.routing_statistics()["balance_loss"]) if model.training else None)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    logger = Logger()
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[logger])
    RoutingLog.attach(trainer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for index, entry in enumerate(history):
        batches = seen[4 * index : 4 * index + 4]
        assert entry["routing/balance_loss"] == pytest.approx(sum(batches) / 4)
    assert len([entry for entry in logger.entries if "routing/entropy" in entry]) == 2
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others
    assert not any("routing/balance_loss" in entry for entry in others)
