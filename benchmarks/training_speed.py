"""Does training with RankAllocation run at stock LoRA's speed between rounds? SmolLM2-135M, the same width of LoRA for both.

Two Trainers take turns on the same batches: stock LoRA of r = 16, and RankAllocation on r = 8, widened to 16 slots. Turns
alternate, so that the machine's drift falls on both; the figure is the median over pairs of turns of the ratio of their step times.

    python benchmarks/training_speed.py [--out benchmarks/results/training_speed.json]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from gatewise import RankAllocation
from gatewise.models import load_model, load_tokenizer
from gatewise.tasks import PadCollator, encode, load_records

MODEL, STEPS = "smollm2-135m-instruct", 6


class StepTimes(TrainerCallback):
    """Seconds from the start of a step to its end, after every other callback."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def turn(model: Any, rows: list[Any], collate: PadCollator, allocation: RankAllocation | None) -> float:
    """Seconds a step, the median over one short training, its first step left out."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        callbacks = [*([allocation] if allocation else []), times]
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks).train()
    return statistics.median(times.seconds[1:])


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_speed.json")
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    rows = encode(load_records("sample:support-train"), tokenizer, None)
    collate = PadCollator(tokenizer)
    base = load_model(MODEL, dtype=torch.bfloat16)
    pairs = []
    for pair in range(options.pairs + 1):
        seconds = {}
        # Who goes first alternates too.
        for name in ("stock", "allocation") if pair % 2 else ("allocation", "stock"):
            config = LoraConfig(r=16 if name == "stock" else 8, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(base, config)
            # A round is planned, beyond the last step: what is measured is training between rounds.
            held = (
                RankAllocation(first_round=10_000, rounds=1, validation_batch=collate(rows[:8])) if name == "allocation" else None
            )
            seconds[name] = turn(model, rows, collate, held)
            base = model.unload()
        if pair:  # the first pair warms up
            pairs.append(seconds)
            print(f"pair {pair}: stock {seconds['stock']:.3f} s, RankAllocation {seconds['allocation']:.3f} s a step", flush=True)
    ratios = [one["allocation"] / one["stock"] for one in pairs]
    result = {
        "model": MODEL,
        "pairs": pairs,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    print(f"RankAllocation / stock LoRA of the same width: {result['ratio_median']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
