"""What a smaller adapter saves when it is served: decoding speed. SmolLM2-135M.

    python benchmarks/compress_speed.py alone --data-dir DATA       # one adapter of trec, at the sizes that gatewise compress makes
    python benchmarks/compress_speed.py report

"alone": tokens/s of each size in plain PEFT, under `gatewise.fast_lora` and merged; batch 1 and 8, prompts of 64 tokens and 64 new
ones. The bare base runs before and after every two others, whose order changes with every repeat, and a figure is the ratio to the
two base runs around it. Adapters are trained (LoRA r = 8 on all linear layers) and compressed once, and kept in --work. Lines are
written as they come; a run that was stopped goes on where it was. Time it with nothing else running.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from benchmark_data import TEMPLATES
from campaign import RESULTS, append, read
from compress import SETTINGS, Case, trained
from decoding import Bench
from peft import PeftModel

from gatewise import fast_lora
from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import read_lora
from gatewise.compress import Goal, compress
from gatewise.files import write_json
from gatewise.models import load_model
from gatewise.models.device import pick_dtype

MODEL = "smollm2-135m-instruct"
SIZES = {
    "1/2 of the parameters": ("parameters", 1 / 2), "1/4 of the parameters": ("parameters", 1 / 4),
    "1/16 of the parameters": ("parameters", 1 / 16), "1/2 of the modules": ("modules", 1 / 2),
    "1/3 of the modules": ("modules", 1 / 3), "1/4 of the modules": ("modules", 1 / 4),
}  # fmt: skip
WAYS = ("PEFT", "fast_lora", "merged")
NEW = 64


def whole_adapter(task: str, seed: int, steps: int, rate: float, options: argparse.Namespace) -> Path:
    """The folder of an adapter, trained where it is not there yet."""
    folder: Path = options.work / f"{task}-{seed}-{steps}"
    if not (folder / "adapter_config.json").is_file():
        print(f"training {folder.name}", flush=True)
        case = Case("smollm2", task, seed, options.data_dir)
        if steps == SETTINGS["smollm2"]["steps"]:  # that of the campaign, if it is in --work
            model = trained(case, options.work)
        else:
            model = case.fresh(8)
            case.train(model, steps, rate)
        model.save_pretrained(str(folder))
        case.tokenizer.save_pretrained(str(folder))
        note = {"task": "causal", "template": TEMPLATES[task], "labels": case.labels, "max_length": 512}
        write_json(folder / "gatewise.json", note)
    return folder


def smaller(whole: Path, data: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Name of a size -> folder of the adapter."""
    found = {"whole": whole}
    config = {"parameters": 0, "modules": 0}
    for name, (unit, share) in SIZES.items():
        out = whole.with_name(f"{whole.name}, {name}".replace("/", " of "))
        if not out.exists():
            if not config["parameters"]:
                config = _size(whole)
            print(f"compressing to {name}", flush=True)
            size = int(share * config[unit])
            goal = Goal(parameters=size) if unit == "parameters" else Goal(modules=size)
            compress(whole, str(data), out, goal, options=DataOptions(limit=200))
        found[name] = out
    return found


def _size(folder: Path) -> dict[str, int]:
    adapter = read_lora(folder)
    return {
        "parameters": sum(module.a.numel() + module.b.numel() for module in adapter.modules), "modules": len(adapter.modules),
    }  # fmt: skip


def loaded(folders: Sequence[Path]) -> PeftModel:
    """A base of its own with adapters "0", "1", ..."""
    model = PeftModel.from_pretrained(load_model(MODEL, dtype=pick_dtype("auto")), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=str(number))
    return model.eval().requires_grad_(False)


def seconds(model: Any, ids: torch.Tensor, tokens: int = NEW, fast: bool = False, **more: Any) -> float:
    """Seconds of one generation of so many tokens a row."""
    with fast_lora(model) if fast else nullcontext():
        began = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=tokens, max_new_tokens=tokens, **more,
        )  # fmt: skip
        return time.perf_counter() - began


def alone(options: argparse.Namespace, run: str) -> None:
    """Decoding speed by size and way of serving."""
    settings = SETTINGS["smollm2"]
    whole = whole_adapter("trec", 0, settings["steps"], settings["learning_rate"], options)
    folders = smaller(whole, options.data_dir / "trec" / "dev.jsonl", options)
    base = load_model(MODEL, dtype=pick_dtype("auto")).eval()
    models = {(name, "PEFT"): loaded([folder]) for name, folder in folders.items()}
    models |= {(name, "fast_lora"): model for (name, _), model in list(models.items())}
    models["whole", "merged"] = loaded([whole]).merge_and_unload()
    prompts = Bench(argparse.Namespace(prompt=64, device="cpu")).prompts()
    for repeat in range(options.repeats):
        for batch in (1, 8):
            ids = prompts[:batch]
            done = {
                (one["size"], one["way"])
                for one in _rows(options, run, "alone")
                if (one["batch"], one["repeat"]) == (batch, repeat)
            }
            left = [key for key in models if key not in done]
            random.Random(repeat).shuffle(left)
            if not left:
                continue
            before = max(seconds(base, ids, 2), seconds(base, ids))
            for at in range(0, len(left), 2):
                took = {}
                for size, way in left[at : at + 2]:
                    seconds(models[size, way], ids, 2, way == "fast_lora")
                    took[size, way] = seconds(models[size, way], ids, fast=way == "fast_lora")
                after = seconds(base, ids)
                for (size, way), took_it in took.items():
                    row = {"part": "alone", "run": run, "size": size, "way": way, "batch": batch, "repeat": repeat}
                    counts = _size(folders[size])
                    append({**row, **counts, "seconds": took_it, "base": [before, after]}, options.results)
                before = after
        print(f"repeat {repeat}", flush=True)


def _rows(options: argparse.Namespace, run: str, part: str) -> list[dict[str, Any]]:
    return [one for one in read(options.results) if one["run"] == run and one["part"] == part]


def _ratios(rows: list[dict[str, Any]]) -> str:
    ratios = sorted(statistics.mean(one["base"]) / one["seconds"] for one in rows)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def report(options: argparse.Namespace) -> None:
    """Speeds relative to the bare base: median over repeats (least to most)."""
    for run in dict.fromkeys(one["run"] for one in read(options.results)):
        print(f"\n{run}")
        rows = _rows(options, run, "alone")
        for batch in sorted({one["batch"] for one in rows}):
            here = [one for one in rows if one["batch"] == batch]
            base = batch * NEW / statistics.median(statistics.mean(one["base"]) for one in here)
            whole = statistics.median(
                statistics.mean(one["base"]) / one["seconds"] for one in here if (one["size"], one["way"]) == ("whole", "PEFT")
            )
            print(f"  batch {batch}: base {base:.0f} tokens/s; relative to it, and to the whole adapter in PEFT")
            for size, way in dict.fromkeys((one["size"], one["way"]) for one in sorted(here, key=lambda one: -one["parameters"])):
                mine = [one for one in here if (one["size"], one["way"]) == (size, way)]
                median = statistics.median(statistics.mean(one["base"]) / one["seconds"] for one in mine)
                counts = f"{mine[0]['parameters']:,} parameters, {mine[0]['modules']} modules"
                print(f"    {size:24s} {way:10s} {_ratios(mine)}   {median / whole:.2f} times   {counts}")


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["alone", "report"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gatewise-compress-speed")
    parser.add_argument("--results", type=Path, default=RESULTS / "compress_speed.jsonl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--machine", default="", help="what it ran on, for the results")
    options = parser.parse_args()
    if options.part != "report":
        if options.data_dir is None:
            parser.error("--data-dir is needed: the folder with a folder for each task")
        torch.set_num_threads(options.threads)
        options.work.mkdir(parents=True, exist_ok=True)
        dtype = str(pick_dtype("auto")).removeprefix("torch.")
        run = f"{options.machine or 'a machine not named'}, {options.threads} threads, {dtype}"
        alone(options, run)
    report(options)


if __name__ == "__main__":
    main()
