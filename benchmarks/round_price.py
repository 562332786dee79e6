"""What a round of RankAllocation costs, and what may be saved without pruning other ranks. SmolLM2-135M, trec.

    agreement   an adapter (LoRA, r = 8 on all linear layers, no rounds) is scored while it trains, in several ways on the same 32
                rows, and once on 32 other rows. How alike two ways are: Spearman's correlation over all ranks, and which share of
                the lowest eighth is the same. What other rows change is the yardstick: less than that is noise of the rows anyhow.
    price       a training of 120 steps with 6 rounds as in methods.py: seconds of a step (median) and of a round (mean), and the
                share of the rounds in this run and in one of 1,000 steps. Nothing else may run beside it.
    memory      a random Llama of 1.1 billion parameters: the most memory of a process that takes two training steps, and of one
                that has a round after them.

    python benchmarks/round_price.py agreement --data-dir DATA [--seeds 0 1 2]
    python benchmarks/round_price.py price --data-dir DATA
    python benchmarks/round_price.py memory
    python benchmarks/round_price.py report

Results are appended to results/round_price.jsonl as they come, with the processor they were measured on.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from campaign import machine
from methods import SETTINGS, adapted

HERE = Path(__file__).parent
OUT = HERE / "results" / "round_price.jsonl"
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"float32": False},
    "float32, 1 point": {"points": 1},
    "float32, 6 points": {"points": 6},
    "bfloat16, 1 point": {"float32": False, "points": 1},
}
SCORES_OF = ("path_moments", "taylor", "path_integral", "sensitivity")
AT = (40, 80, 120)


def keep(row: dict[str, Any]) -> None:
    """Appends a result."""
    with OUT.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **machine()}) + "\n")


def prepared(data_dir: Path, seed: int) -> tuple[Any, list[Any], list[Any], Any]:
    """Base model, training rows, held-out rows and collator."""
    from benchmark_data import load_task

    from gatewise.models import load_model, load_tokenizer
    from gatewise.tasks import PadCollator, encode

    train, _, template = load_task("trec", data_dir)
    tokenizer = load_tokenizer(SETTINGS["model"])
    features = encode(train, tokenizer, template)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, rows = [features[i] for i in order[:64]], [features[i] for i in order[64:]]
    return load_model(SETTINGS["model"], dtype=torch.bfloat16), rows, held_out, PadCollator(tokenizer)


def trained(model: Any, rows: list[Any], collator: Any, seed: int, callbacks: list[Any]) -> None:
    """The training of methods.py."""
    from transformers import TrainingArguments

    from gatewise.runs.trainer import RecipeTrainer

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=SETTINGS["steps"], per_device_train_batch_size=SETTINGS["batch_size"],
            learning_rate=SETTINGS["learning_rate"], warmup_steps=SETTINGS["warmup_steps"], lr_scheduler_type="linear", seed=seed,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        RecipeTrainer(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:1], collator=collator, note={},
            callbacks=callbacks, group_by_length=True,
        ).train()  # fmt: skip


def flat(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """All scores in one row, modules in order."""
    return torch.cat([scores[path] for path in sorted(scores)]).double()


def alike(one: torch.Tensor, other: torch.Tensor, share: float = 1 / 8) -> dict[str, float]:
    """Spearman's correlation, and the common part of the lowest ``share``."""
    places = [values.argsort().argsort().double() for values in (one, other)]
    count = round(share * len(one))
    lowest = [set(values.argsort()[:count].tolist()) for values in (one, other)]
    correlation = float(torch.corrcoef(torch.stack(places))[0, 1])
    return {"spearman": round(correlation, 4), "lowest": round(len(lowest[0] & lowest[1]) / count, 4)}


def agreement(data_dir: Path, seeds: list[int]) -> None:
    """Compares ways of scoring while an adapter trains."""
    from transformers import TrainerCallback, set_seed

    from gatewise.scores import SCORES

    for seed in seeds:
        base, rows, held_out, collator = prepared(data_dir, seed)
        set_seed(seed)
        model = adapted(base, "lora", SETTINGS)
        batch, other = collator(held_out[:32]), collator(held_out[32:])

        class Scores(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step not in AT:
                    return
                for name in SCORES_OF:
                    score = SCORES[name]
                    wanted = flat(score(model, batch, float32=True))  # noqa: B023
                    found = {"other rows": flat(score(model, other, float32=True))}  # noqa: B023
                    for way, options in WAYS.items():
                        if way != "float32" and ("points" not in options or name in ("path_moments", "path_integral")):
                            found[way] = flat(score(model, batch, **{"float32": True, **options}))  # noqa: B023
                    for way, values in found.items():
                        row = {
                            "what": "agreement", "score": name, "way": way, "seed": seed, "step": state.global_step,  # noqa: B023
                            **alike(wanted, values),
                        }  # fmt: skip
                        keep(row)
                        print(row, flush=True)

        trained(model, rows, collator, seed, [Scores()])


def price(data_dir: Path, float32: bool) -> None:
    """Times steps and rounds of one training."""
    from transformers import TrainerCallback, set_seed

    from gatewise import RankAllocation

    base, rows, held_out, collator = prepared(data_dir, 0)
    set_seed(0)
    model = adapted(base, "lora", SETTINGS)
    allocation = RankAllocation(
        rounds=SETTINGS["rounds"], first_round=SETTINGS["first_round"], recover=SETTINGS["recover"],
        validation_batch=collator(held_out[:32]), score_options={"float32": True} if float32 else {}, budget="ranks",
    )  # fmt: skip
    steps: list[float] = []

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # before on_step_end, where rounds run
            steps.append(time.perf_counter() - self.began)

    trained(model, rows, collator, 0, [Clock(), allocation])
    step, one_round = statistics.median(steps), statistics.mean(one.seconds for one in allocation.history)
    rounds = len(allocation.history)
    shares = {str(n): round(rounds * one_round / (rounds * one_round + n * step), 4) for n in (SETTINGS["steps"], 1000)}
    row = {
        "what": "price",
        "float32": float32,
        "step": round(step, 4),
        "round": round(one_round, 4),
        "rounds": rounds,
        "share": shares,
    }
    keep(row)
    print(row)


def memory() -> None:
    """The most memory of two training steps without and with a round, in a process each."""
    for with_round in (False, True):
        command = [sys.executable, __file__, "memory-of", *(["--round"] if with_round else [])]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row = {"what": "memory", "round": with_round, **told}
        keep(row)
        print(row, flush=True)


def memory_of(with_round: bool) -> None:
    """Two training steps of a large random model in bfloat16, and a round; prints the most memory that the process had, in MiB."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from gatewise.allocation.algorithm import Rules, run_round
    from gatewise.allocation.slots import ranks, widen
    from gatewise.scores import SCORES

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    adapted_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    capacity = widen(adapted_model)
    optimizer = torch.optim.AdamW([p for p in adapted_model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 32000, (4, 128))
    adapted_model.train()
    for _ in range(2):
        adapted_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if with_round:
        budget = sum(ranks(adapted_model).values())
        rules = Rules(score=SCORES["path_moments"], score_name="path_moments", score_options={})
        run_round(
            adapted_model, "default", optimizer, {"input_ids": ids, "labels": ids}, rules, [], 2, budget // 8, budget, capacity
        )
    print(json.dumps({
        "parameters": sum(p.numel() for p in model.parameters()),
        "most_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))  # fmt: skip


def report() -> None:
    """Tables from the results file."""
    rows = [json.loads(line) for line in OUT.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row["what"] == "agreement"]
    for score in SCORES_OF:
        for way in ("other rows", *WAYS):
            group = [row for row in found if (row["score"], row["way"]) == (score, way)]
            if group:
                spearman, lowest = (statistics.mean(row[key] for row in group) for key in ("spearman", "lowest"))
                print(
                    f"{score:14} {way:18} Spearman {spearman:.3f}   lowest eighth in common {100 * lowest:.0f}%   of {len(group)}"
                )
    for row in rows:
        if row["what"] == "price":
            shares = ", ".join(f"{100 * share:.0f}% of {steps} steps" for steps, share in row["share"].items())
            where = (
                f"{row['processor']}, bfloat16 {'native' if row['multiplies_bfloat16'] else 'emulated'}, {row['threads']} threads"
            )
            scored = "float32" if row["float32"] else "bfloat16 where it is native"
            took = f"a step {row['step']:.2f} s, a round {row['round']:.2f} s in {scored}"
            print(f"{took}: {row['rounds']} take {shares} ({where})")
        if row["what"] == "memory":
            what = "and a round" if row["round"] else "alone"
            print(f"two steps {what}: {row['most_mib']} MiB at most, {row['parameters'] / 1e9:.2f} billion parameters in bfloat16")


def main() -> None:
    """One of the measurements, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("agreement", "price", "memory", "memory-of", "report"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--round", action="store_true", help="of memory-of")
    parser.add_argument("--float32", action="store_true", help="of price: score in float32, as every score did before")
    options = parser.parse_args()
    if options.what in ("agreement", "price") and not options.data_dir:
        parser.error(f"{options.what} needs --data-dir")
    if options.what == "agreement":
        agreement(options.data_dir, options.seeds)
    elif options.what == "price":
        price(options.data_dir, options.float32)
    elif options.what == "memory":
        memory()
    elif options.what == "memory-of":
        memory_of(options.round)
    else:
        report()


if __name__ == "__main__":
    main()
