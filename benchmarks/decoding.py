"""How fast do adapters decode that stay unmerged? Tokens/s relative to the bare base model.

PEFT's LoRA, DoRA and mixed batch, the same LoRA under ``gatewise.fast_lora``, and MiLoRA at k = 1, 2, 3, 7; one row and eight; one
adapter for all rows and a different one for each; one beam and three. Prompts are 64 tokens of the sample data, 64 new tokens are
forced. All adapters are on the seven linear modules of every layer, with random weights as large as trained ones'. Their routers
are random too, so that eight adapters agree on nothing and nearly every module is kept by one of them, the worst case; "alike" is
the best one, where all choose the same modules.

The bare base runs before and after every two methods, whose order changes with every repeat, and a method's figure is the ratio to
the mean of the two runs around it, so that the machine's drift falls on both. Run it with nothing else running.

    python benchmarks/decoding.py [--device cpu] [--dtype auto]     # SmolLM2-135M; bfloat16 where the device computes in it
    python benchmarks/decoding.py --base qwen2.5-coder-0.5b-instruct --beams 1 --without "PEFT DoRA"
    python benchmarks/decoding.py --report
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from campaign import RESULTS, append, read
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import StoppingCriteria

from gatewise import RoutedLoraConfig, fast_lora
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import machine, pick_dtype
from gatewise.tasks import load_records

EIGHT, PROMPT, TOKENS, RANK, THREADS = 8, 64, 64, 8, 2
KEPT = (1, 2, 3, 7)


@dataclass(frozen=True)
class Setting:
    """What is generated: rows, different adapters among them, beams."""

    batch: int
    adapters: int
    beams: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.adapters} adapter{'s' * (self.adapters > 1)}, beam {self.beams}"


BATCHES = ((1, 1), (8, 1), (8, EIGHT))
ALIKE = "MiLoRA k=3 alike"
METHODS = ("PEFT LoRA", "PEFT DoRA", "fast LoRA", *(f"MiLoRA k={k}" for k in KEPT), ALIKE)


class FirstToken(StoppingCriteria):
    """Stops nothing; ``at`` is when the prompt had been read and the first token chosen."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        if self.at is None:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class Bench:
    """The models, and runs of them."""

    def __init__(self, base: str, device: str, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype

    @cache  # noqa: B019 - one Bench a process
    def model(self, method: str) -> Any:
        """The model of a method; all k of MiLoRA are adapters of one."""
        torch.manual_seed(0)
        base = load_model(self.base, dtype=self.dtype).to(self.device).eval()
        common = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if method == "base":
            return base
        if method == "PEFT DoRA":
            return ready(get_peft_model(base, LoraConfig(use_dora=True, lora_alpha=16, **common), adapter_name="-0"))
        if method == "LoRA":
            configs = {f"-{number}": LoraConfig(lora_alpha=16, **common) for number in range(EIGHT)}
        else:
            configs = {f"{k}-{number}": RoutedLoraConfig(top_k=k, **common) for k in KEPT for number in range(EIGHT)}
            configs |= {f"alike-{number}": RoutedLoraConfig(top_k=3, **common) for number in range(EIGHT)}
        first, *others = configs.items()
        model = get_peft_model(base, first[1], adapter_name=first[0])
        for name, config in others:
            model.add_adapter(name, config)
        return ready(model)

    @cache  # noqa: B019
    def prompts(self) -> torch.Tensor:
        """(8, prompt) of the sample data, each from another place."""
        rows = load_records("sample:support-train").rows
        text = "\n".join(" ".join(str(value) for value in row.values()) for row in rows)
        ids = load_tokenizer(self.base)(text, return_tensors="pt").input_ids[0]
        return ids[: EIGHT * PROMPT].view(EIGHT, PROMPT).to(self.device)

    def run(self, method: str, setting: Setting, tokens: int) -> tuple[float, float, int | None]:
        """Seconds until the first new token, and of the others; and how many modules any row kept, where rows choose."""
        kind = "MiLoRA" if method.startswith("MiLoRA") else "LoRA" if method in ("PEFT LoRA", "fast LoRA") else method
        model, more = self.model(kind), {}
        if method != "base":
            prefix = "" if kind != "MiLoRA" else "alike" if method == ALIKE else method.split("=")[1]
            if setting.adapters > 1:
                more["adapter_names"] = [f"{prefix}-{row % setting.adapters}" for row in range(setting.batch)]
            model.set_adapter(f"{prefix}-0")
        ids, first = self.prompts()[: setting.batch], FirstToken()
        fixed = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": setting.beams}
        with fast_lora(model) if method == "fast LoRA" else nullcontext():
            began = time.perf_counter()
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[first], pad_token_id=0, **fixed, **more
            )
            if made.is_cuda:
                torch.cuda.synchronize()
            ended = time.perf_counter()
        assert made.shape[1] == ids.shape[1] + tokens
        assert first.at is not None
        kept = int((model.routing().gates > 0).any(dim=0).sum()) if kind == "MiLoRA" else None
        return first.at - began, ended - first.at, kept

    def measure(self, setting: Setting, methods: list[str]) -> Iterator[dict[str, Any]]:
        """Runs base, two methods, base, two methods, ... base."""
        for method in ("base", *methods):
            self.run(method, setting, 2)  # weights into memory, kernels chosen
        before = self.run("base", setting, TOKENS)
        for begin in range(0, len(methods), 2):
            seconds = {method: self.run(method, setting, TOKENS) for method in methods[begin : begin + 2]}
            after = self.run("base", setting, TOKENS)
            for method, (first, rest, kept) in seconds.items():
                yield {
                    **{"method": method, "kept": kept, "first": first, "rest": rest},
                    **{"base_first": [before[0], after[0]], "base_rest": [before[1], after[1]]},
                }
            before = after


def ready(model: PeftModel) -> PeftModel:
    """B random and small, in evaluation mode, without gradients; routers that are alike cannot tell prompts apart."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
        elif "prompt_router.alike" in name and name.endswith("weight"):
            torch.nn.init.zeros_(parameter)
    return model.eval().requires_grad_(False)


def measure(options: argparse.Namespace) -> None:
    """Measures all settings, in each repeat with the methods in another order."""
    torch.set_num_threads(THREADS)
    bench = Bench(options.base, options.device, dtype := pick_dtype(options.dtype, options.device))
    where = machine(options.device)
    device = where["gpu"] or f"{where['processor']}{' with bfloat16' * where['multiplies_bfloat16']}, {THREADS} cores"
    run = f"{options.base}, {device}, {str(dtype).removeprefix('torch.')}, prompt {PROMPT}, {TOKENS} new tokens, rank {RANK}"
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    for repeat in range(options.repeats):
        for setting in (Setting(batch, adapters, beams) for batch, adapters in BATCHES for beams in options.beams):
            methods = [
                method
                for method in METHODS
                if method not in options.without
                and (setting.adapters == EIGHT if method == ALIKE else method != "PEFT DoRA" or setting.adapters == 1)
            ]
            random.Random(repeat).shuffle(methods)
            for one in bench.measure(setting, methods):
                append({"run": run, **vars(setting), "repeat": repeat} | one | {"versions": versions}, options.out)
                print(f"{repeat} {setting}: {one['method']} {ratio(one, ('first', 'rest')):.3f}", flush=True)


def ratio(line: dict[str, Any], parts: tuple[str, ...]) -> float:
    """Tokens/s relative to the base runs around."""
    base = sum(statistics.mean(line[f"base_{part}"]) for part in parts)
    return base / sum(line[part] for part in parts)


def report(lines: list[dict[str, Any]]) -> None:
    """Medians and ranges over repeats: the whole generation, and its steps alone, after the prompt."""
    print("Tokens/s relative to the base alone: median over repeats (range); then without reading the prompt")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["run"], Setting(line["batch"], line["adapters"], line["beams"]), line["method"]), []).append(line)
    for (run, setting, method), mine in groups.items():
        kept = f", {mine[0]['kept']} modules in use" if mine[0]["kept"] else ""
        whole, steps = spread(mine, ("first", "rest")), spread(mine, ("rest",))
        print(f"{run}; {setting}: {method:<18} {whole}   {steps}   {len(mine)} repeats{kept}")


def spread(lines: list[dict[str, Any]], parts: tuple[str, ...]) -> str:
    """Median and range of the ratios."""
    ratios = [ratio(line, parts) for line in lines]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.jsonl")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--without", nargs="+", default=[], choices=METHODS, metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    options = parser.parse_args()
    if not options.report:
        measure(options)
    report(read(options.out))


if __name__ == "__main__":
    main()
