"""What does it cost to leave the prompt to the base model, and what does it save? MiLoRA with adapt="always" and "after_prompt".

Quality: arc_easy and openbookqa, SmolLM2-135M, rows, steps and rank as in ``milora.py`` (k = 3, centred, three times LoRA's alpha),
and plain LoRA beside it. Each method has a few learning rates; the report takes the one with the lowest loss on 128 rows of the
training split that nothing trained on, mean over the seeds that ran with all rates, and shows dev at that rate.

Time: the task ``first-token`` reads one prompt of 512 tokens for eight tenants and gives the first token of each: seconds, the
median of five, by the base model; by eight adapters that always adapt, each with its own row of the prompt; by eight that wait for
its end, too; and by eight that go on from one row of the base model's cache (``shared``), which holds the prompt without its last
token and was read before (``warm``) or is read first (``cold``). Routers are random. Run that task with nothing else running.

    python benchmarks/after_prompt.py --data-dir DATA --seeds 0 1 2 3 4
    python benchmarks/after_prompt.py --report
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign import campaign, spread
from milora import SETTINGS, SINGLE, trained_and_measured

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
CHOOSING = 128
ROUTED = {"top_k": 3, "lora_alpha": 48}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "milora-always": ROUTED,
    "milora-always-last": ROUTED | {"pooler": "last"},
    "milora-after": ROUTED | {"adapt": "after_prompt"},
    "milora-after-last": ROUTED | {"adapt": "after_prompt", "pooler": "last"},
}
METHODS = {f"{kind}@{rate:g}": (kind, rate) for kind in KINDS for rate in RATES}
FIRST_TOKEN = "first-token"
TIMED = ("base", "always", "after", "shared-cold", "shared-warm")
TENANTS, TOKENS, REPEATS = 8, 512, 5


def one_run(task: str, method: str, seed: int, data_dir: Path) -> dict[str, Any] | None:
    """An adapter of a kind at a learning rate; or how long the first tokens take."""
    if (task == FIRST_TOKEN) != (method in TIMED):
        return None
    if task == FIRST_TOKEN:
        return {"task": task, "method": method, "seed": seed, "seconds": seconds_of(method, seed)}
    kind, rate = METHODS[method]
    return trained_and_measured(task, method, seed, data_dir, SETTINGS | {"learning_rate": rate}, KINDS[kind], CHOOSING)


def seconds_of(method: str, seed: int) -> list[float]:
    """Of every repeat, after one that does not count: reading the prompt and choosing each tenant's first token."""
    import torch
    from peft import get_peft_model

    from gatewise import RoutedLoraConfig
    from gatewise.models import load_model

    torch.manual_seed(seed)
    model: Any = load_model(SETTINGS["model"], dtype=getattr(torch, SETTINGS["dtype"]))
    kind = "milora-always" if method in ("base", "always") else "milora-after-last"
    names = [f"tenant{number}" for number in range(TENANTS)]
    for number, name in enumerate(names):
        config = RoutedLoraConfig(r=SETTINGS["r"], target_modules="all-linear", task_type="CAUSAL_LM", **KINDS[kind])
        model = get_peft_model(model, config, name) if number == 0 else model
        if number:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    prompt = torch.randint(1000, 40000, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    rows, names = prompt.expand(TENANTS, -1), ["__base__"] * TENANTS if method == "base" else names

    def prefix() -> Any:
        with model.disable_adapter():
            cache = model(input_ids=prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(TENANTS)
        return cache

    def shared(cache: Any) -> Any:
        return model(input_ids=rows[:, -1:], past_key_values=cache, adapter_names=names).logits[:, -1].argmax(dim=-1)

    def first(cache: Any) -> Any:
        if method.startswith("shared"):
            return shared(cache if method == "shared-warm" else prefix())
        return model(input_ids=rows, use_cache=True, logits_to_keep=1, adapter_names=names).logits[:, -1].argmax(dim=-1)

    found = []
    with torch.no_grad():
        kept = prefix() if method == "shared-warm" else None
        for _ in range(REPEATS + 1):
            cache = copy.deepcopy(kept)
            found.append(timed(lambda cache=cache: first(cache)))
    return found[1:]


def timed(run: Callable[[], Any]) -> float:
    """Seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(runs: list[dict[str, Any]], plot: Path | None) -> None:
    """Prints each kind at its own best learning rate, the paired differences to "always", and seconds to the first token."""
    for task in SINGLE:
        here = [run for run in runs if run["task"] == task]
        best: dict[str, dict[int, dict[str, Any]]] = {}
        for kind in KINDS:
            by_rate = {rate: {r["seed"]: r for r in here if METHODS.get(r["method"]) == (kind, rate)} for rate in RATES}
            by_rate = {rate: cell for rate, cell in by_rate.items() if cell}
            if not by_rate:
                continue
            seeds = set.intersection(*(set(cell) for cell in by_rate.values()))  # the losses of two seeds do not compare
            rate = min(by_rate, key=lambda rate: statistics.mean(by_rate[rate][seed]["choosing_loss"] for seed in seeds))
            best[kind] = by_rate[rate]
            right, loss = (
                [factor * run["metrics"][task][name] for run in best[kind].values()]
                for name, factor in (("accuracy", 100), ("loss", 1))
            )
            line = f"{task} {kind:18} rate {rate:g} of {len(by_rate)}   accuracy {spread(right, 1)}   loss {spread(loss, 3)}"
            pairs = sorted(best[kind].keys() & best.get("milora-always", {}).keys())
            if pairs and kind not in ("lora", "milora-always"):
                gains, lower = (
                    [
                        factor * (best[kind][seed]["metrics"][task][name] - best["milora-always"][seed]["metrics"][task][name])
                        for seed in pairs
                    ]
                    for name, factor in (("accuracy", 100), ("loss", 1))
                )
                line += f"   - always, paired: {spread(gains, 1, True)}, loss {spread(lower, 3, True)}"
            print(f"{line}   seeds {len(best[kind])}")
    for method in TIMED:
        medians = [statistics.median(run["seconds"]) for run in runs if run["task"] == FIRST_TOKEN and run["method"] == method]
        if medians:
            print(f"first token of {TENANTS} tenants, {TOKENS} shared tokens, {method:12} {spread(medians, 3)} s")


def tell(run: dict[str, Any]) -> str:
    """A finished run in a line."""
    return f"{run['metrics']}, {run['seconds']} s" if "metrics" in run else f"{statistics.median(run['seconds']):.3f} s"


if __name__ == "__main__":
    campaign(__doc__, "after_prompt.jsonl", (*SINGLE, FIRST_TOKEN), (*METHODS, *TIMED), one_run, tell, report)
