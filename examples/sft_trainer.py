"""Rank allocation in a TRL script: the same callback in SFTTrainer, which makes the LoRA model itself. Needs `pip install trl`.

python examples/sft_trainer.py [OUTPUT_FOLDER]
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import gatewise
from gatewise.models import load_model, load_tokenizer
from gatewise.tasks import load_records

output = sys.argv[1] if len(sys.argv) > 1 else "runs/example-sft"
tokenizer = load_tokenizer("smollm2-135m-instruct")
rows = load_records("sample:chat-train").rows
data = Dataset.from_list([{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows])

# Ranks are scored on rows that nothing is trained on, by the last answer of each, which is the completion.
data, held_out = gatewise.hold_out(data, tokenizer, n=8, assistant="last")
schedule = gatewise.ConstantBudget(rounds=2, first_round=4, recover=3)
allocation = gatewise.RankAllocation(schedule=schedule, validation_batch=held_out)

trainer = SFTTrainer(
    model=load_model("smollm2-135m-instruct"),
    args=SFTConfig(
        output_dir=output,
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=4,
        bf16=torch.cuda.is_available(),  # TRL switches bf16 on by default, which fails on a CPU
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[allocation],
)
trainer.train()
trainer.model.save_pretrained(f"{output}/adapter", save_embedding_layers=False)
for one in allocation.history:
    print(f"round {one.round}: validation loss {one.loss_before:.3f}, {sum(one.ranks.values())} ranks")
print(f"a plain LoRA adapter, and allocation.json beside it: {output}/adapter")
