"""How fast does vLLM write with LoRA on a processor: as it is, with gatewise's plug-in, with routed adapters in it? SmolLM2-135M.

Engines: ``off``, vLLM without LoRA; ``stock``, vLLM with LoRA and no plug-in; ``gatewise``, with it. Each writes 32 tokens to one
prompt or to eight at once, in float32, without compiling and without reuse of prompts, on one thread. What the rows of a batch
have: nothing (``base``), one plain adapter or eight (LoRA, r = 8 on all linear layers), one routed adapter or eight that keep one,
two or three modules a layer. The rank limit is 8 or 64. Weights are random, of the size of trained ones, and so are the routers.

All engines of a rank limit are up together and take turns, in another order every round, so that what the machine does beside it
meets all of them; a load comes once unmeasured first. Ratios are those within a round, to ``stock`` with rows that have no adapter,
"the base with LoRA switched on". Seconds are those of the processor, and with a GPU those of the clock. Run it with nothing else
running.

``--first`` measures the first tokens of eight tenants that ask at once with one prompt of 512 tokens, keys and values being reused
where they may be: by a prompt that nobody read before (new), and once more by the same (again). Beside plain and routed adapters
there are routed ones that wait for the end of the prompt (``adapt="after_prompt"``, ``pooler="last"``).

    make serve-env
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/vllm_speed.py --python .venv-serve/bin/python
    python benchmarks/vllm_speed.py --report
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from campaign import RESULTS, append, machine, read

RESULTS_FILE = RESULTS / "vllm_speed.jsonl"
MODEL, TOKENS, ADAPTERS, RANK = "smollm2-135m-instruct", 32, 8, 8
LIMITS, BATCHES, KEPT = (8, 64), (1, 8), (1, 2, 3)
ENGINES = ("off", "stock", "gatewise")
TENANTS, SHARED = 8, 512
FIRST = ("base", "plain 8", "routed k=3 8", "waiting 8")
AIMS = {"plain 1": 0.70, "plain 8": 0.60, "routed k=3 1": 0.80}
"""Of the base with LoRA switched on; those of a batch of eight."""


def loads(engine: str, batch: int) -> list[str]:
    """What rows have: a kind of adapter, and how many of them."""
    kinds = {"off": [], "stock": ["plain"], "gatewise": ["plain", *(f"routed k={k}" for k in KEPT)]}[engine]
    return ["base", *(f"{kind} {count}" for kind in kinds for count in ((1,) if batch == 1 else (1, ADAPTERS)))]


# ---------------------------------------------------------------- adapters


def make_adapters(work: Path) -> dict[str, list[Path]]:
    """Folders of every kind, made where they are not there yet."""
    made = {"plain": [work / f"plain-{number}" for number in range(ADAPTERS)]}
    made |= {f"routed k={k}": [work / f"routed-{k}-{number}" for number in range(ADAPTERS)] for k in KEPT}
    made["waiting"] = [work / f"waiting-{number}" for number in range(ADAPTERS)]
    if all((folder / "adapter_config.json").exists() for folders in made.values() for folder in folders):
        return made
    import torch
    from peft import LoraConfig, get_peft_model

    from gatewise import RoutedLoraConfig
    from gatewise.files import write_json
    from gatewise.models import load_model

    common: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    most = f"routed k={max(KEPT)}"
    configs = {
        "plain": LoraConfig(**common),
        most: RoutedLoraConfig(**common, top_k=max(KEPT)),
        "waiting": RoutedLoraConfig(**common, top_k=max(KEPT), adapt="after_prompt", pooler="last"),
    }
    for number in range(ADAPTERS):
        for kind, config in configs.items():
            torch.manual_seed(number)
            model: Any = get_peft_model(load_model(MODEL, dtype=torch.float32), config)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(made[kind][number])
        whole = made[most][number]
        for k in KEPT[:-1]:
            folder = made[f"routed k={k}"][number]
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            told = json.loads((whole / "adapter_config.json").read_text(encoding="utf-8"))
            write_json(folder / "adapter_config.json", told | {"top_k": k})
    return made


# ---------------------------------------------------------------- engines


def has_gpu() -> bool:
    """Whether vLLM would take one."""
    import torch

    return torch.cuda.is_available()


class Engine:
    """vLLM in a process of its own, asked line by line."""

    def __init__(self, name: str, limit: int, python: Path, dtype: str, first: bool = False) -> None:
        lora = ["--enable-lora", "--max-lora-rank", str(limit), "--max-loras", str(ADAPTERS), "--max-cpu-loras", "40"]
        # vLLM 0.32 fails with LoRA and log-probabilities on processors where modules are not named.
        lora += ["--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        from gatewise.models import resolve

        arguments = ["--model", resolve(MODEL), "--dtype", dtype, "--enforce-eager", "--no-enable-chunked-prefill"]
        if has_gpu():  # on which all engines are at once
            arguments += ["--gpu-memory-utilization", "0.25"]
        if first:
            arguments += [
                "--max-model-len",
                "1024",
                "--max-num-batched-tokens",
                "8192",
                "--enable-prefix-caching",
                "--block-size",
                "32",
            ]
        else:
            arguments += ["--max-model-len", "256", "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching"]
        ours = {"VLLM_PLUGINS": "gatewise"} if name == "gatewise" else {"VLLM_PLUGINS": ""}
        environment = {
            **os.environ, **ours, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        told = json.dumps(arguments + (lora if name != "off" else []))
        self._process = subprocess.Popen(
            [str(python), __file__, "--child", told], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.version: str = self._answer()["version"]

    def ask(self, rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        """Writes greedily; seconds, and what was written."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"rows": rows, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended with exit code {self._process.wait()}: run `{' '.join(self._process.args[:2])}` by hand")  # type: ignore[index]
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def child(arguments: list[str]) -> None:
    """The engine's process. vLLM's own words go elsewhere than the answers."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams, __version__
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(arguments)))
    numbers: dict[str, int] = {}

    def request_of(folder: str | None) -> Any:
        return folder and LoRARequest(folder, numbers.setdefault(folder, len(numbers) + 1), folder)

    print(json.dumps({"version": __version__}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": row["prompt"]} for row in asked["rows"]]
        requests = [request_of(row["adapter"]) for row in asked["rows"]]
        sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        began, processor = time.perf_counter(), time.process_time()
        outputs = engine.generate(prompts, sampling, lora_request=requests if any(requests) else None, use_tqdm=False)
        processor, seconds = time.process_time() - processor, time.perf_counter() - began
        tokens = [list(one.outputs[0].token_ids) for one in outputs]
        taken = seconds if has_gpu() else processor
        print(json.dumps({"taken": taken, "seconds": seconds, "tokens": tokens}), file=out, flush=True)


# ---------------------------------------------------------------- the measurement


def measure(options: argparse.Namespace) -> None:
    """A row for each load, engine and round."""
    made = make_adapters(options.work)
    draw = random.Random(0)
    prompts = [[draw.randrange(1000, 40000) for _ in range(24)] for _ in range(max(BATCHES))]
    told = machine()
    for limit in options.limits:
        with ExitStack() as stack:
            engines = {name: stack.enter_context(Engine(name, limit, options.python, options.dtype)) for name in options.engines}
            turns = [(name, batch, load) for batch in options.batches for name in engines for load in loads(name, batch)]
            for number in range(options.rounds):
                for name, batch, load in draw.sample(turns, len(turns)):
                    kind, _, count = load.rpartition(" ")
                    folders = [str(made[kind][i % int(count)].resolve()) if kind else None for i in range(batch)]
                    rows = [{"prompt": prompts[i], "adapter": folders[i]} for i in range(batch)]
                    engines[name].ask(rows, 2)  # which loads the adapters
                    answer = engines[name].ask(rows, TOKENS)
                    written = hashlib.sha256(json.dumps(answer.pop("tokens")).encode()).hexdigest()[:12]
                    row = {
                        "limit": limit,
                        "dtype": options.dtype,
                        "engine": name,
                        "batch": batch,
                        "load": load,
                        "round": number,
                        **answer,
                    }
                    append({**row, "written": written, "vllm": engines[name].version, **told}, options.results)
                print(f"rank limit {limit}: round {number + 1} of {options.rounds}", flush=True)


def measure_first(options: argparse.Namespace) -> None:
    """A row for each load and round, new and again."""
    made = make_adapters(options.work)
    draw, told = random.Random(1), machine()
    with Engine("gatewise", LIMITS[0], options.python, options.dtype, first=True) as engine:

        def asked(load: str, prompt: list[int]) -> dict[str, Any]:
            kind = load.rpartition(" ")[0]
            rows = [{"prompt": prompt, "adapter": str(made[kind][i].resolve()) if kind else None} for i in range(TENANTS)]
            return engine.ask(rows, 1)

        for number in range(options.rounds):
            for load in draw.sample(FIRST, len(FIRST)):
                asked(load, [draw.randrange(1000, 40000) for _ in range(8)])  # which loads the adapters
                prompt = [draw.randrange(1000, 40000) for _ in range(SHARED)]
                for when in ("new", "again"):
                    answer = asked(load, prompt)
                    row = {"first": when, "dtype": options.dtype, "load": load, "round": number, "taken": answer["taken"]}
                    append({**row, "seconds": answer["seconds"], "vllm": engine.version, **told}, options.results)
            print(f"first tokens: round {number + 1} of {options.rounds}", flush=True)


# ---------------------------------------------------------------- the report


def ratios(rows: Sequence[dict[str, Any]], limit: int, batch: int, engine: str, load: str) -> list[float]:
    """Speed of a load, round by round, as a share of the base's with LoRA switched on."""

    def by_round(name: str, what: str) -> dict[int, float]:
        chosen = (one for one in rows if (one["limit"], one["batch"], one["engine"], one["load"]) == (limit, batch, name, what))
        return {one["round"]: one["taken"] for one in chosen}

    base, own = by_round("stock", "base"), by_round(engine, load)
    return [base[number] / own[number] for number in sorted(base.keys() & own.keys())]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95%, by the bootstrap over rounds."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The report."""
    firsts = [one for one in rows if "first" in one]
    for when in ("new", "again") if firsts else ():
        yield f"first tokens of {TENANTS} tenants, one prompt of {SHARED} tokens, {when}"
        for load in FIRST:
            held = [one["taken"] for one in firsts if (one["first"], one["load"]) == (when, load)]
            yield f"  {load:14} {statistics.median(held):.3f} s ({min(held):.3f} to {max(held):.3f})"
    rows = [one for one in rows if "first" not in one]
    for limit in sorted({one["limit"] for one in rows}):
        for batch in sorted({one["batch"] for one in rows}):
            yield f"rank limit {limit}, batch {batch}"
            for engine in ENGINES:
                for load in loads(engine, batch):
                    shares = ratios(rows, limit, batch, engine, load)
                    if not shares:
                        continue
                    chosen = [
                        one for one in rows
                        if (one["limit"], one["batch"], one["engine"], one["load"]) == (limit, batch, engine, load)
                    ]  # fmt: skip
                    speed = statistics.median(batch * TOKENS / one["taken"] for one in chosen)
                    low, high = interval(shares)
                    line = (
                        f"  {engine:9} {load:14} {speed:6.1f} tokens/s   {statistics.median(shares):.2f} ({low:.2f} to {high:.2f})"
                    )
                    if engine == "gatewise" and batch == max(BATCHES) and load in AIMS:
                        line += f"   aim {AIMS[load]:.2f}"
                    if engine == "gatewise" and not load.startswith("routed"):
                        stock = {
                            one["written"] for one in rows if (one["engine"], one["batch"], one["load"]) == ("stock", batch, load)
                        }
                        line += (
                            "   tokens as stock" if {one["written"] for one in chosen} == stock else "   OTHER TOKENS THAN STOCK"
                        )
                    yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python that has vLLM and gatewise")
    parser.add_argument(
        "--work", type=Path, default=Path(__file__).parents[1] / "runs" / "vllm-speed", help="where the adapters are"
    )
    parser.add_argument("--results", type=Path, default=RESULTS_FILE)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limits", nargs="+", type=int, default=LIMITS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--first", action="store_true", help="measure first tokens")
    parser.add_argument("--report", action="store_true", help="print the results, run nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(json.loads(options.child))
        return
    if not options.report:
        (measure_first if options.first else measure)(options)
    print("\n".join(lines(read(options.results))))


if __name__ == "__main__":
    main()
