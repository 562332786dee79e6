"""Does training with RankAllocation run at stock LoRA's speed between rounds? SmolLM2-135M, the same width of LoRA for both.

Two Trainers, stock LoRA of r = 16 and RankAllocation on r = 8 widened to 16 slots, take turns step by step on the same
batches, who goes first alternating, so that the machine's drift falls on both. The figure is the median over steps of the ratio.

    python benchmarks/training_speed.py [--out benchmarks/results/training_speed.json]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from gatewise import RankAllocation
from gatewise.models import load_model, load_tokenizer
from gatewise.tasks import PadCollator, encode, load_records

MODEL = "smollm2-135m-instruct"


def trainer(allocation: RankAllocation | None, collate: PadCollator, folder: str) -> Trainer:
    """A Trainer ready to step, its adapter 16 wide; a round is planned far beyond what is measured."""
    config = LoraConfig(r=8 if allocation else 16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(MODEL, dtype=torch.bfloat16), config)
    arguments = TrainingArguments(output_dir=folder, max_steps=10_000, report_to="none", disable_tqdm=True, use_cpu=True)
    made = Trainer(model=model, args=arguments, data_collator=collate, callbacks=[allocation] if allocation else [])
    made.current_gradient_accumulation_steps = 1
    made.state.max_steps = 10_000
    made.create_optimizer_and_scheduler(10_000)
    if allocation:
        allocation.on_train_begin(arguments, made.state, made.control, model=model)
    return made


def step(one: Trainer, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one optimiser step with every callback."""
    began = time.perf_counter()
    one.training_step(one.model, dict(batch))
    one.callback_handler.on_pre_optimizer_step(one.args, one.state, one.control)
    one.optimizer.step()
    one.callback_handler.on_optimizer_step(one.args, one.state, one.control)
    one.model.zero_grad()
    one.state.global_step += 1
    one.callback_handler.on_step_end(one.args, one.state, one.control)
    return time.perf_counter() - began


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_speed.json")
    parser.add_argument("--pairs", type=int, default=30)
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    rows = encode(load_records("sample:support-train"), tokenizer, None)
    collate = PadCollator(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        held = RankAllocation(first_round=9_000, recover=100, rounds=1, validation_batch=collate(rows[:8]))
        both = {"stock": trainer(None, collate, folder), "allocation": trainer(held, collate, folder)}
        pairs = []
        for pair in range(options.pairs + 4):
            at = pair * 8 % (len(rows) - 8)
            names = ["stock", "allocation"] if pair % 2 else ["allocation", "stock"]
            seconds = {name: step(both[name], collate(rows[at : at + 8])) for name in names}
            if pair >= 4:  # the first ones warm up
                pairs.append({name: round(seconds[name], 4) for name in ("stock", "allocation")})
    ratios = sorted(one["allocation"] / one["stock"] for one in pairs)
    median, low, high = statistics.median(ratios), ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
    spread = f"quartiles {low:.3f} to {high:.3f}, {len(ratios)} paired steps"
    print(f"RankAllocation / stock LoRA of the same width: {median:.3f} ({spread})")
    result = {"model": MODEL, "ratio_median": median, "quartiles": [low, high], "pairs": pairs}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
