"""SPT in a Transformers script: search for the layers where a soft prompt helps, then train prompts at those layers only.

    python examples/selective_prompts.py [OUTPUT_FOLDER]

After an interruption, run the same command again: it goes on from the last checkpoint of the stage that was interrupted.
"""

import sys
from pathlib import Path

from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

import gatewise
from gatewise.models import load_model, load_tokenizer
from gatewise.tasks import PadCollator, encode_classification, evaluate, load_records

output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example-prompts")
tokenizer = load_tokenizer("minilm-l6")
records = load_records("sample:support-train")
held_out = load_records("sample:support-dev", labels=records.labels)
rows = encode_classification(records, tokenizer)


def base():
    set_seed(0)  # the classification head starts from random weights, the same ones in every call
    return load_model("minilm-l6", task="classification", num_labels=len(records.labels))


args = TrainingArguments(
    output_dir=str(output),  # the search keeps its checkpoints in the folder "search" below it
    max_steps=150,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    report_to="none",
    save_steps=50,
    logging_steps=25,
)
common = {
    "data_collator": PadCollator(tokenizer),
    "resume_from_checkpoint": any(output.glob("search/checkpoint-*")),
}

# Without prompt_layers there is a gate at every layer. With task_type SEQ_CLS the classification head is trained too.
network = get_peft_model(base(), gatewise.SelectivePromptConfig(num_prompt_tokens=10, bottleneck=64, task_type="SEQ_CLS"))
found = gatewise.prompts.search(network, rows, args, keep=2, **common)
print("gates at the end:", ", ".join(f"{gate:.2f}" for gate in found.gates[-1].tolist()), "- chosen layers:", found.layers)

# To train at guessed layers without a search, give SelectivePromptConfig(prompt_layers=[4, 5], ...) in place of found.config.
model = gatewise.prompts.retrain(base(), found.config, rows, args, **common)
model.save_pretrained(output / "adapter", save_embedding_layers=False)

loaded = PeftModel.from_pretrained(base(), output / "adapter")
print(f"accuracy on {len(held_out.rows)} held-out rows: {evaluate(loaded, tokenizer, held_out, None)['accuracy']:.3f}")
