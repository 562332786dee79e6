"""Does a compressed adapter give the same in vLLM as in PEFT, and how fast? SmolLM2-135M-Instruct, in float32 on the CPU.

LoRA (r = 8 on all linear layers) is trained for twenty steps on the sample data, and compressed to a third of its modules and to a
quarter of its parameters. Then `gatewise serving-check` answers eight prompts with 16 tokens each: in PEFT unmerged and merged, and
in vLLM, started with exactly what serving.json says. After that vLLM writes 32 tokens to eight prompts at once: without LoRA, and
with the whole adapter and the third of it, with `--lora-target-modules` and without. All of it on one thread, without compiling and
without reuse of prompts. Speed is in tokens by second of processor time of all of vLLM's processes, so that other programs on the
machine hardly count; the best of `--repeats` runs.

    make serve-env
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/vllm_outputs.py --python .venv-serve/bin/python
    python benchmarks/vllm_outputs.py --report

What was measured is in results/vllm_outputs.json. The exit code is 1 where an answer differs.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gatewise.adapters.files import read_lora
from gatewise.cli.serving_check import line_of
from gatewise.compress import Goal, compress
from gatewise.files import write_json
from gatewise.models import load_tokenizer, resolve
from gatewise.runs.recipe import load_recipe
from gatewise.runs.run import train
from gatewise.serving.checking import check_in_vllm, run_vllm
from gatewise.serving.engines import SERVING_FILE, serving_settings
from gatewise.tasks import load_records

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "vllm_outputs.json"
MODEL, DATA = "smollm2-135m-instruct", "sample:support-dev"
SMALLER = {"a third of the modules": Goal(modules=70), "a quarter of the parameters": Goal(parameters=610_000)}
PROMPTS, NEW = 8, 32


def adapters(work: Path) -> dict[str, Path]:
    """The whole adapter and the smaller ones, made where they are not there yet."""
    recipe = ["dtype=float32", "training.max_steps=20"]
    made = {"whole": work / "run" / "adapter"}
    if not made["whole"].exists():
        train(load_recipe(HERE.parent / "recipes" / "lora-support.yaml", recipe), work / "run")
    for name, goal in SMALLER.items():
        made[name] = work / name.split()[1]
        if not made[name].exists():
            compress(made["whole"], DATA, made[name], goal, score_rows=40)
    return made


def told_of(folder: Path) -> dict[str, Any]:
    """serving.json, or for the whole adapter what would stand there."""
    if (folder / SERVING_FILE).exists():
        told: dict[str, Any] = json.loads((folder / SERVING_FILE).read_text(encoding="utf-8"))
        return told
    return serving_settings(read_lora(folder), "llama")


def size(folder: Path) -> dict[str, int]:
    told = told_of(folder)
    numbers = sum(module.a.numel() + module.b.numel() for module in read_lora(folder).modules)
    return {"parameters": numbers, "modules": len(told["modules"]), "rank": told["largest_rank"]}


def speeds(made: dict[str, Path], python: Path, repeats: int) -> Iterator[tuple[str, float]]:
    """Tokens by second of processor time: without LoRA, and for the adapters that differ in modules with names and without."""
    template = load_recipe(HERE.parent / "recipes" / "lora-support.yaml").template
    assert template is not None
    tokenizer = load_tokenizer(MODEL)
    texts = [template.prompt.format(**row) for row in load_records(DATA).rows[:PROMPTS]]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    common = ["--model", resolve(MODEL), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    common += ["--no-enable-prefix-caching"]

    def measured(arguments: list[str], adapter: Path | None) -> float:
        rows = [{"prompt": ids, "adapter": adapter and str(adapter.resolve())} for ids in prompts]
        request = {"arguments": [*common, *arguments], "tokens": NEW, "batches": [rows] * (repeats + 1)}  # the first warms up
        taken = [batch["seconds"] for batch in run_vllm(python, request)["batches"][1:]]
        return round(PROMPTS * NEW / min(taken), 1)

    yield "no LoRA", measured([], None)
    for name in ("a third of the modules", "whole"):
        arguments = told_of(made[name])["vllm"]["arguments"]
        yield f"{name}, named", measured(arguments, made[name])
        yield f"{name}, not named", measured(arguments[: arguments.index("--lora-target-modules")], made[name])


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the Python that has vLLM")
    parser.add_argument("--work", type=Path, default=Path("runs/vllm_outputs"), help="where the adapters are kept")
    parser.add_argument("--only", choices=("checks", "speed"), help="measure the one, and leave the other in the results as it is")
    parser.add_argument("--repeats", type=int, default=3, help="runs that measure speed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if options.report:
        return report(json.loads(options.results.read_text(encoding="utf-8")))
    made = adapters(options.work)
    found: dict[str, Any] = {}
    if options.results.exists():
        found = json.loads(options.results.read_text(encoding="utf-8"))
    if options.only != "speed":
        checked = {name: check_in_vllm([folder], DATA, python=options.python, prompts=PROMPTS)[0] for name, folder in made.items()}
        together = check_in_vllm(list(made.values()), DATA, python=options.python, prompts=PROMPTS)
        checked |= {f"{name}, all in one batch": one for name, one in zip(made, together, strict=True)}
        found |= {
            "machine": f"{processor()}, one thread", "vllm": together[0].vllm, "prompts": PROMPTS, "tokens": 16,
            "adapters": {name: size(folder) for name, folder in made.items()},
            "checks": {name: {**asdict(one), "adapter": one.adapter.name, "holds": one.holds} for name, one in checked.items()},
        }  # fmt: skip
        for name, one in checked.items():
            print(f"{name}: {line_of(one)}", flush=True)
        write_json(options.results, found)
    if options.only != "checks":
        for name, speed in speeds(made, options.python, options.repeats):
            print(f"{name}: {speed} tokens a second of processor time", flush=True)
            found.setdefault("tokens a processor second", {})[name] = speed
            write_json(options.results, found)
    return report(found)


def report(found: dict[str, Any]) -> int:
    """Prints what was measured."""
    print(f"{found['machine']}, vLLM {found['vllm']}, {found['prompts']} prompts, {found['tokens']} tokens each")
    for name, one in found["checks"].items():
        sides = {side: one[side] for side in ("unmerged", "merged", "without")}
        told = (f"{side} {match['same']}/{match['compared']} ({match['difference']:.1g} nats)" for side, match in sides.items())
        print(f"  {name}: {', '.join(told)}: {'the same' if one['holds'] else 'DIFFERS'}")
    for name, speed in found.get("tokens a processor second", {}).items():
        print(f"  {name}: {speed} tokens a second of processor time")
    return 0 if all(one["holds"] for one in found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
