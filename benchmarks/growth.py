"""How does the price of a step, a round of allocation, a token and an adapter grow with the base model?

    gatewise models fetch qwen2.5-coder-0.5b-instruct
    gatewise models fetch qwen2.5-coder-1.5b-instruct
    python benchmarks/growth.py            # goes on where it was stopped; run it with nothing else running
    python benchmarks/growth.py --report   # the measured, a fit, and the same on paper for 8B and 70B on GPUs

Each model is measured in a process of its own, with LoRA of r = 8 on all linear layers, in the precision that suits the processor:

step     forward, backward and AdamW on 2 rows of 128 tokens, the median of three;
round    the default score of all ranks on 8 such rows, once; a round of 32 rows takes four times as long;
token    one step of greedy decoding for 8 rows after prompts of 16 tokens, the mean of 16: the bare base, and ``fast_lora``;
adapter  reading one more into the model, the median of three, from a file just written, so that the disk is not measured;
memory   the most that was in use during a step and a round, and what the loaded model has.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import RESULTS, append, read
from peft import LoraConfig, get_peft_model

from gatewise import fast_lora
from gatewise.models import load_model
from gatewise.models.device import PeakMemory, machine, pick_dtype
from gatewise.scores import path_moments

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct")
RANK, ROWS, SCORED, LENGTH = 8, 2, 8, 128
EIGHT, PROMPT, NEW = 8, 16, 16


def timed(what: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds, and the most memory in use meanwhile in bytes."""
    memory = PeakMemory(torch.device("cpu"))
    with memory:
        began = time.perf_counter()
        what()
        seconds = time.perf_counter() - began
    return seconds, memory.most


def measure(name: str, threads: int) -> dict[str, Any]:
    """All of it for one model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = pick_dtype("auto")
    base = load_model(name, dtype=dtype)
    loaded = sum(p.numel() * p.element_size() for p in base.parameters())
    multiplied = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))  # with the head, tied or not
    prompts = torch.randint(10, 10_000, (EIGHT, PROMPT))

    def token(model: Any) -> float:
        """Seconds of one step of decoding."""

        def write(new: int) -> None:
            model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts),
                do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
            )  # fmt: skip

        write(1)
        first, whole = (statistics.median(timed(partial(write, new))[0] for _ in range(3)) for new in (1, 1 + NEW))
        return (whole - first) / NEW

    bare = token(base.eval())
    model: Any = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def batch(rows: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(10, 10_000, (rows, LENGTH))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step(rows: dict[str, torch.Tensor]) -> None:
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    step(batch(1))  # weights into memory, kernels chosen
    rows = batch(ROWS)
    steps = [timed(lambda: step(rows)) for _ in range(3)]
    scored = [{key: value[at : at + ROWS] for key, value in batch(SCORED).items()} for at in range(0, SCORED, ROWS)]
    path_moments(model, scored[:1])
    one_round = timed(lambda: path_moments(model, scored))
    model.eval()
    with fast_lora(model):
        with_lora = token(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        read_seconds = [timed(lambda i=i: model.load_adapter(folder, f"another-{i}"))[0] for i in range(3)]
    return {
        "model": name,
        "multiplied": multiplied,
        "adapter": sum(p.numel() for p in trained),
        "dtype": str(dtype).removeprefix("torch."),
        "loaded_bytes": loaded,
        "step_seconds": [seconds for seconds, _ in steps],
        "step_bytes": steps[-1][1],
        "round_seconds": one_round[0],
        "round_bytes": one_round[1],
        "token_seconds": bare,
        "lora_token_seconds": with_lora,
        "adapter_seconds": read_seconds,
        "machine": machine("cpu"),
    }


# ---------------------------------------------------------------- on paper


@dataclass(frozen=True)
class Shape:
    """A decoder as Llama's: widths of its hidden states, its feed-forward part, its keys and values; and its vocabulary."""

    name: str
    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of the seven linear layers of a block."""
        h, f = self.hidden, self.inner
        return [(h, h), (h, self.kv), (h, self.kv), (h, h), (h, f), (h, f), (f, h)]

    @property
    def parameters(self) -> int:
        """Those that a token is multiplied with: the blocks, and the head."""
        return self.layers * sum(a * b for a, b in self.linear) + self.vocabulary * self.hidden

    @property
    def adapter(self) -> int:
        """Numbers in LoRA of rank ``RANK`` on all blocks' linear layers."""
        return self.layers * RANK * sum(a + b for a, b in self.linear)


SHAPES = (Shape("8B", 32, 4096, 14336, 1024, 128_256), Shape("70B", 80, 8192, 28672, 1024, 128_256))
GPU_BYTES, GPU_FLOPS, GPU_BANDWIDTH, SHARE = 80e9, 989e12, 3.35e12, 0.4
"""An H100's memory, its bfloat16 products a second and its memory's bytes a second; the share of the two that programs reach."""
BATCH_TOKENS, BATCH_ROWS, SCORED_TOKENS = 8 * 1024, 8, 32 * 1024


def on_paper(shape: Shape, gpus: int, bits: int) -> dict[str, float]:
    """What training and serving takes of each GPU, in bytes and seconds. The base is sharded, the adapter is whole everywhere.

    Gradient checkpointing: a step takes six flops a parameter and token (forward, again, backward through it), and keeps
    a hidden state for each layer and token, and one layer's inside. Logits of one row at a time are in float32, with their
    gradients. Scoring a row costs what training on it does, at each of two points of the path. Embeddings and head have 16 bits.
    """
    tokens = BATCH_TOKENS / gpus
    inside = tokens * (6 * shape.hidden + 3 * shape.inner) * 2 * 2
    flops = 6 * shape.parameters / (GPU_FLOPS * SHARE)
    head = shape.vocabulary * shape.hidden
    base = ((shape.parameters - head) * bits / 8 + 2 * head * 2) / gpus
    return {
        "base": base,
        "adapter": 16 * shape.adapter,
        "states": shape.layers * tokens * shape.hidden * 2 + inside + 2 * 4 * (BATCH_TOKENS / BATCH_ROWS) * shape.vocabulary,
        "step": tokens * flops,
        "round": 2 * SCORED_TOKENS / gpus * flops,
        "token": (base - 2 * head / gpus) / (GPU_BANDWIDTH * SHARE),
        "served": 2 * shape.adapter,
    }


def report(done: list[dict[str, Any]]) -> None:
    """The tables of docs/reports/growth.md."""
    print("| model | loaded | a step | memory | a round of 32 rows | memory | a token for 8 rows | with LoRA | adapter | read in |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for one in done:
        print(
            f"| {one['model']} ({one['multiplied'] / 1e9:.2f}B, {one['dtype']}) | {one['loaded_bytes'] / 1e9:.2f} GB | "
            f"{statistics.median(one['step_seconds']):.2f} s | {one['step_bytes'] / 1e9:.2f} GB | "
            f"{one['round_seconds'] * 32 / SCORED:.1f} s | {one['round_bytes'] / 1e9:.2f} GB | "
            f"{1e3 * one['token_seconds']:.0f} ms | {1e3 * one['lora_token_seconds']:.0f} ms | {one['adapter'] / 1e6:.2f}M | "
            f"{statistics.median(one['adapter_seconds']):.2f} s |"
        )
    if len(done) > 2:
        size = np.log([one["multiplied"] for one in done])
        print("\nThey grow with the parameters that a token is multiplied with to the power of:")
        for key in ("step_seconds", "round_seconds", "token_seconds", "lora_token_seconds", "step_bytes", "round_bytes", "adapter"):
            power = np.polyfit(size, np.log([np.median(one[key]) for one in done]), 1)[0]
            print(f"- {key.replace('_', ' ')}: {power:.2f}")
        price = [one["round_seconds"] / SCORED / (statistics.median(one["step_seconds"]) / ROWS) for one in done]
        print(
            f"A scored row costs as much as {', '.join(f'{one:.1f}' for one in price)} trained ones, so a round of 32 rows is",
            end="",
        )
        print(f" {', '.join(f'{one * 32 / (120 * 8):.0%}' for one in price)} of 120 steps of 8 rows.")
    print("\n| on paper | GPUs | base in | base | adapter's training | states | fits 80 GB | a step | a round | a token | served |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for gpus in (1, 8):
            for bits in (16, 4):
                one = on_paper(shape, gpus, bits)
                whole = one["base"] + one["adapter"] + one["states"]
                fits = "yes" if whole < GPU_BYTES else f"no, {whole / 1e9:.0f} GB"
                cells = [shape.name, gpus, f"{bits} bits", *(f"{one[key] / 1e9:.1f} GB" for key in ("base", "adapter", "states"))]
                cells += [fits, f"{one['step']:.2f} s", f"{one['round']:.1f} s", f"{1e3 * one['token']:.1f} ms"]
                print(f"| {' | '.join(map(str, cells))} | {one['served'] / 1e6:.0f} MB |")


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "growth.jsonl")
    parser.add_argument("--report", action="store_true", help="print the results, measure nothing")
    options = parser.parse_args()
    for name in () if options.report else options.models:
        if name not in {one["model"] for one in read(options.results)}:
            with ProcessPoolExecutor(1, get_context("spawn")) as own:  # so that memory is this model's alone
                append(own.submit(measure, name, options.threads).result(), options.results)
                print(name, flush=True)
    report(read(options.results))


if __name__ == "__main__":
    main()
