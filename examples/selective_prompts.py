"""SPT in a Transformers script: search the layers that deserve a soft prompt, then train prompts at those alone.

Started again after an interruption, it goes on from its last checkpoint in either stage.

python examples/selective_prompts.py [OUTPUT_FOLDER]
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
    set_seed(0)  # its head is drawn afresh
    return load_model("minilm-l6", task="classification", num_labels=len(records.labels))


args = TrainingArguments(
    output_dir=str(output),  # the search has its checkpoints in the folder "search" in it
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

# No prompt_layers: a gate at every layer. task_type SEQ_CLS trains the classifier's head too.
network = get_peft_model(base(), gatewise.SelectivePromptConfig(num_prompt_tokens=10, bottleneck=64, task_type="SEQ_CLS"))
found = gatewise.prompts.search(network, rows, args, keep=2, **common)
print("gates at the end:", ", ".join(f"{gate:.2f}" for gate in found.gates[-1].tolist()), "- chosen layers:", found.layers)

# To train at guessed layers instead: SelectivePromptConfig(prompt_layers=[4, 5], ...) in place of found.config.
model = gatewise.prompts.retrain(base(), found.config, rows, args, **common)
model.save_pretrained(output / "adapter", save_embedding_layers=False)

loaded = PeftModel.from_pretrained(base(), output / "adapter")
print(f"accuracy on {len(held_out.rows)} held-out rows: {evaluate(loaded, tokenizer, held_out, None)['accuracy']:.3f}")
