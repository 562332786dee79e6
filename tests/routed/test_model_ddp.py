"""Two processes of data-parallel training: every expert has a gradient in both, though their prompts choose different ones."""

from typing import Any

import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from several_processes import in_processes
from tiny_models import random_adapter
from transformers import Trainer, TrainingArguments


def one_process(folder: str, checkpointing: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = routed_config(top_k=1, balance_weight=0.5)
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), config)))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (24, 8), generator=generator)
    rows = [{"input_ids": one, "labels": one.clone().index_fill_(0, torch.arange(5), -100)} for one in ids]
    arguments = TrainingArguments(
        output_dir=f"{folder}/run",
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    state = {name: p.double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    return {"state": state, "gates": model.routing().gates.tolist()}


def with_and_without_checkpointing(folder: str) -> list[dict[str, Any]]:
    return [one_process(folder, checkpointing) for checkpointing in (False, True)]


def test_two_processes_train_one_adapter(tmp_path):
    for first, second in zip(*in_processes(2, tmp_path, with_and_without_checkpointing, str(tmp_path)), strict=True):
        assert first["state"] == second["state"]
        assert first["gates"] != second["gates"]
