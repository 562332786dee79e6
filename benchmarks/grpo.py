"""Does it matter in reinforcement learning where the ranks lie? GRPO on one reasoning task, at equal stored parameters.

    python benchmarks/data.py --tasks sums --rows 2400 400 1000
    python benchmarks/grpo.py --data-dir benchmarks/recipes/data/sums   # goes on where it was; several processes may share runs
    python benchmarks/grpo.py --report

The task is three one-digit numbers, added or subtracted, of which those are kept whose result is a digit: an answer is one token,
and a step takes a second or two of one processor core. SmolLM2-135M first learns it by LoRA (r = 8, 100 steps of 16 rows), which
is merged: without right answers there is no reward to learn from. Then each arm trains a new LoRA with the stored parameters of
r = 1 on all linear layers:

even      one rank a module;
random    ranks dealt to modules drawn at random, as many as the parameters allow (another draw each seed);
informed  ranks by the singular values of the first policy gradient on 64 prompts: the largest square per stored parameter first. A
          starts as in PEFT, so that it is placed by them alone. It sees 512 answers more than the others.

A step samples 8 answers to each of 16 prompts at temperature 1. The reward is 1 for the right digit, else 0; advantages are the
rewards minus their prompt's mean, over its standard deviation. One update a batch: there is no ratio to clip, and no KL term. Each
arm's learning rate: the one with the highest mean accuracy on the dev rows (the likeliest answer) over two seeds, of three rates
1.8 apart, and of a fourth where the best of them lies at an edge. Then seeds 0 to 4 on the test rows, which tuned nothing. The
model before GRPO is measured too: where no arm is clearly better than that, nothing was learned, and where ranks lie cannot matter.
"""

import argparse
import json
import random
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from campaign import RESULTS, Run, read, spread, work
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gatewise.comparing.statistics import Difference, difference, holm
from gatewise.models import load_model, load_tokenizer
from gatewise.models.device import machine

WARM, STEPS, PROMPTS, ANSWERS = 100, 200, 16, 8
RATES, TUNING, SEEDS = (3.2e-4, 5.6e-4, 1e-3, 1.8e-3, 3.2e-3), (1000, 1001), (0, 1, 2, 3, 4)
SETTINGS = {"warm": WARM, "steps": STEPS, "prompts": PROMPTS, "answers": ANSWERS}
BEFORE, ARMS = "before", ("even", "random", "informed")
BUDGET = 305_280
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Rows = list[tuple[str, str]]


def rows(path: Path) -> Rows:
    """Questions and answers, of those whose answer is one digit."""
    every = [(row["question"], row["answer"]) for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())]
    return [(question + " = ", answer) for question, answer in every if len(answer) == 1]


class Policy:
    """A model that answers with one token, and the tokens of the digits."""

    def __init__(self, device: str) -> None:
        self.tokenizer: Any = load_tokenizer("smollm2-135m-instruct")
        self.model: Any = load_model("smollm2-135m-instruct", device=device).requires_grad_(False).eval()
        self.digits = torch.tensor(self.tokenizer.convert_tokens_to_ids(list("0123456789")), device=device)
        self.device = device

    def answers(self, part: Rows) -> Tensor:
        """(rows,) the tokens that are right."""
        return self.digits[[int(answer) for _, answer in part]]

    def likelihood(self, model: torch.nn.Module, part: Rows) -> Tensor:
        """(rows, vocabulary) the logarithm of each token's probability after the question; all questions have as many tokens."""
        batch = self.tokenizer([question for question, _ in part], return_tensors="pt").to(self.device)
        return model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)

    @torch.no_grad()
    def right(self, model: torch.nn.Module, data: Rows) -> str:
        """A 1 for each row whose likeliest answer is right, else a 0."""
        parts = [data[start : start + 50] for start in range(0, len(data), 50)]
        found = torch.cat([self.likelihood(model, part).argmax(-1) == self.answers(part) for part in parts])
        return "".join(str(int(one)) for one in found)

    def loss(self, model: torch.nn.Module, part: Rows) -> tuple[Tensor, float]:
        """GRPO's loss on answers sampled now, and their mean reward."""
        likelihood = self.likelihood(model, part)
        sampled = torch.multinomial(likelihood.detach().exp(), ANSWERS, replacement=True)
        rewards = (sampled == self.answers(part)[:, None]).float()
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        return -(likelihood.gather(1, sampled) * advantages).mean(), rewards.mean().item()


def warm(policy: Policy, train: Rows) -> None:
    """The base learns the task a little, and is merged."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model: Any = get_peft_model(policy.model, LoraConfig(r=8, lora_alpha=16, target_modules=NAMES)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(WARM):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / WARM)
        part = draw.sample(train, 16)
        torch.nn.functional.nll_loss(policy.likelihood(model, part), policy.answers(part)).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.model = model.merge_and_unload().requires_grad_(False)


def modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name.split(".")[-1] in NAMES
    }


def dealt(policy: Policy, arm: str, seed: int, train: Rows) -> dict[str, int]:
    found = modules(policy.model)
    price = {name: part.in_features + part.out_features for name, part in found.items()}
    if arm == "even":
        return dict.fromkeys(found, 1)
    draw = random.Random(f"ranks {seed}")
    if arm == "random":
        order = (draw.choice(list(found)) for _ in iter(int, 1))
    else:
        torch.manual_seed(seed)
        for part in found.values():
            part.weight.requires_grad_(True)
        for _ in range(4):
            policy.loss(policy.model, draw.sample(train, PROMPTS))[0].backward()
        worth = []
        for name, part in found.items():
            values = torch.linalg.svdvals(part.weight.grad.float())
            worth += [(value.item() ** 2 / price[name], name) for value in values]
            part.weight.grad = None
            part.weight.requires_grad_(False)
        order = (name for _, name in sorted(worth, reverse=True))
    ranks: dict[str, int] = {}
    spent = 0
    for name in order:
        if spent + price[name] > BUDGET:
            break
        ranks[name] = ranks.get(name, 0) + 1
        spent += price[name]
    return ranks


def one_run(policy: Policy, data: Path, arm: str, rate: float, seed: int) -> Run:
    began = time.perf_counter()
    train = rows(data / "train.jsonl")
    ranks = {} if arm == BEFORE else dealt(policy, arm, seed, train)
    torch.manual_seed(seed)
    model: Any = policy.model
    means, parameters = [], 0
    if ranks:
        alphas = {name: 2 * r for name, r in ranks.items()}
        settings = LoraConfig(r=1, lora_alpha=2, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
        model = get_peft_model(policy.model, settings).eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        means, parameters = learn(policy, model, trained, train, rate, random.Random(seed)), sum(p.numel() for p in trained)
    part = "dev" if seed in TUNING else "test"
    right = policy.right(model, rows(data / f"{part}.jsonl"))
    if ranks:
        policy.model = model.unload()
    return {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "parameters": parameters,
        "modules": len(ranks),
        "largest": max(ranks.values(), default=0),
        "part": part,
        "right": right,
        "steps": means,
        "seconds": round(time.perf_counter() - began),
        "settings": SETTINGS,
        "machine": machine(policy.device),
    }


def learn(policy: Policy, model: Any, trained: list[Any], train: Rows, rate: float, draw: random.Random) -> list[float]:
    """GRPO; the mean reward of what each step sampled."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    means = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 4) * (1 - step / STEPS)
        loss, mean = policy.loss(model, draw.sample(train, PROMPTS))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(round(mean, 3))
    return means


def accuracy(run: Run) -> float:
    return 100 * run["right"].count("1") / len(run["right"])


def tuned(done: list[Run], arm: str) -> dict[float, float]:
    """Rate -> mean accuracy on dev of the arm's tuning runs, of those rates that have all."""
    found = {
        rate: [accuracy(run) for run in done if (run["arm"], run["learning_rate"], run["part"]) == (arm, rate, "dev")]
        for rate in RATES
    }
    return {rate: statistics.fmean(own) for rate, own in found.items() if len(own) == len(TUNING)}


def rates(done: list[Run], arm: str) -> tuple[float, ...]:
    """Those to try: the middle three, and the next one where the best of these is at the edge."""
    found, middle = tuned(done, arm), RATES[1:-1]
    if not set(middle) <= set(found):
        return middle
    best = max(middle, key=lambda rate: found[rate])
    return RATES[:-1] if best == middle[0] else RATES[1:] if best == middle[-1] else middle


def best_rate(done: list[Run], arm: str) -> float | None:
    """The best tuned rate, the lowest of equal ones; None while tuning runs are missing."""
    found = tuned(done, arm)
    return max(found, key=lambda rate: (found[rate], -rate)) if set(rates(done, arm)) <= set(found) else None


def report(done: list[Run]) -> None:
    if len(machines := {json.dumps(run["machine"]) for run in done}) > 1:
        print(f"runs are of {len(machines)} machines, whose bases may have learned the task differently: {', '.join(machines)}\n")
    before = {run["part"]: run for run in done if run["arm"] == BEFORE}
    if len(before) < 2:
        print("the model before GRPO has not been measured")
        return
    print(
        f"before GRPO: {accuracy(before['dev']):.1f} on dev, {accuracy(before['test']):.1f} on test\n\n"
        f"| ranks | modules, largest rank | parameters | dev (rate) | rate "
        "| test (sd) | minus before (95%) | minus even (95%) | p (Holm) |\n|---|---|---|---|---|---|---|---|---|"
    )
    tested = {
        arm: sorted(
            (run for run in done if run["arm"] == arm and run["part"] == "test" and run["learning_rate"] == best_rate(done, arm)),
            key=lambda run: run["seed"],
        )
        for arm in ARMS
    }

    def gap(arm: str, other: list[Run]) -> Difference | None:
        """Over the seeds that both have."""
        pairs = [(a, b) for a in tested[arm] for b in other if b["arm"] == BEFORE or a["seed"] == b["seed"]]
        rights = [[100.0 * (int(x) - int(y)) for x, y in zip(a["right"], b["right"], strict=True)] for a, b in pairs]
        return difference(np.array(rights)) if rights else None

    gaps = {arm: gap(arm, tested["even"]) for arm in ARMS[1:]}
    ps = dict(zip(gaps, holm([one.p if one else None for one in gaps.values()]), strict=True))
    for arm, own in tested.items():
        rate, p = best_rate(done, arm), ps.get(arm)
        if rate is None or not own:
            continue
        counts = [
            f"{min(values)} to {max(values)}" for values in zip(*((run["modules"], run["largest"]) for run in own), strict=True)
        ]
        cells = [
            arm,
            ", ".join(counts),
            f"{statistics.fmean(run['parameters'] for run in own):,.0f}",
            ", ".join(f"{value:.1f} ({at:g})" for at, value in tuned(done, arm).items()),
            f"{rate:g}",
            spread([accuracy(run) for run in own], 1),
            told(gap(arm, [before["test"]])),
            told(gaps.get(arm)),
            "" if p is None else f"{p:.2g}",
        ]
        print(f"| {' | '.join(cells)} |")


def told(one: Difference | None) -> str:
    """A difference and its interval, where there is one."""
    if one is None:
        return ""
    interval = "" if one.low is None else f" ({one.low:.1f} to {one.high:.1f})"
    return f"{one.mean:+.1f}{interval}".replace("-", "−")


def missing(done: list[Run]) -> list[tuple[str, float, int]]:
    have = {(run["arm"], run["learning_rate"], run["seed"]) for run in done}
    wanted = [(BEFORE, 0.0, TUNING[0]), (BEFORE, 0.0, SEEDS[0])]
    wanted += [(arm, rate, seed) for seed, arm in product(TUNING, ARMS) for rate in rates(done, arm)]
    wanted += [(arm, rate, seed) for seed, arm in product(SEEDS, ARMS) if (rate := best_rate(done, arm))]
    return [one for one in wanted if one not in have]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder with train.jsonl, dev.jsonl and test.jsonl of a reasoning task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "grpo.jsonl")
    parser.add_argument("--report", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if not options.report:
        if options.data_dir is None:
            parser.error("--data-dir is needed")
        policy = Policy(options.device)
        warm(policy, rows(options.data_dir / "train.jsonl"))
        if any(run["settings"] != SETTINGS for run in read(options.results)):
            parser.error(f"{options.results} has runs of other settings: give another file")
        work(missing, partial(one_run, policy, options.data_dir), options.results)
    report(read(options.results))


if __name__ == "__main__":
    main()
