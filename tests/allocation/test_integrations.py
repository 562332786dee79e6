"""RankAllocation where people use it: TRL's SFTTrainer, and two processes of data-parallel training."""

import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from several_processes import in_processes
from tiny_models import tiny_base, word_tokenizer
from transformers import Trainer, TrainingArguments

from gatewise import ConstantBudget, RankAllocation, ranks

WHEN = ConstantBudget(rounds=2, first_round=2, recover=2)


def test_sft_trainer_that_makes_the_adapter_itself(batch, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": f" w{i + 3} w{i + 4}"} for i in range(16)]
    allocation = RankAllocation(schedule=WHEN, validation_batch=batch())
    trainer = trl.SFTTrainer(
        model=tiny_base("llama"),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=5e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[allocation],
    )
    trainer.train()
    assert [one.step for one in allocation.history] == [2, 4]
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "adapter")
    assert ranks(loaded) == {path: r for path, r in allocation.history[-1].ranks.items() if r}


def one_process(folder):
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base("llama"), config)
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 60, (24, 8), generator=generator)]
    # Each process scores rows of its own: without an agreement they would decide differently.
    own = torch.stack([row["input_ids"] for row in rows[12 * rank : 12 * rank + 6]])
    allocation = RankAllocation("taylor", WHEN, {"input_ids": own, "labels": own})
    arguments = TrainingArguments(
        output_dir=f"{folder}/run",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation]).train()
    state = {name: value.double().sum().item() for name, value in model.state_dict().items() if "lora_" in name}
    history = [{"scores": one.scores, "pruned": one.pruned, "grown": one.grown} for one in allocation.history]
    return {"state": state, "history": history}


def test_two_processes_take_the_same_decisions(tmp_path):
    first, second = in_processes(2, tmp_path, one_process, str(tmp_path))
    assert len(first["history"]) == 2
    assert first == second
