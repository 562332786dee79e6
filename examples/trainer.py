"""Rank allocation in a Transformers script: one callback. The result is a plain LoRA adapter that stock PEFT loads.

python examples/trainer.py [OUTPUT_FOLDER]
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import gatewise
from gatewise.models import load_model, load_tokenizer
from gatewise.tasks import PadCollator, encode, load_records

output = sys.argv[1] if len(sys.argv) > 1 else "runs/example-trainer"
tokenizer = load_tokenizer("smollm2-135m-instruct")
base = load_model("smollm2-135m-instruct")
rows = encode(load_records("sample:support-train"), tokenizer, None)  # a list of {"input_ids": [...], "labels": [...]}
rows, held_out = gatewise.hold_out(rows, tokenizer, n=16)  # ranks are scored on rows that nothing is trained on

model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
allocation = gatewise.RankAllocation(
    schedule=gatewise.ConstantBudget(rounds=2, first_round=6, recover=4),  # ints above 1 count steps, floats epochs
    validation_batch=held_out,
    on_round=lambda one: print(f"round {one.round}: validation loss {one.loss_before:.3f}, {sum(one.ranks.values())} ranks"),
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=output,
        max_steps=16,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=4,
    ),
    train_dataset=rows,
    data_collator=PadCollator(tokenizer),
    callbacks=[allocation],
)
trainer.train()
model.save_pretrained(f"{output}/adapter", save_embedding_layers=False)
print(f"a plain LoRA adapter, and allocation.json beside it: {output}/adapter")
