"""Does it matter in reinforcement learning where the ranks lie? GRPO on one reasoning task, at equal stored parameters.

    python benchmarks/data.py --data-dir FOLDER --tasks matrix --rows 3000 100 200
    python benchmarks/grpo.py --data-dir FOLDER/matrix --device cuda    # goes on where it was; several processes may share the runs
    python benchmarks/grpo.py --report

It wants a GPU: 35 runs of 200 steps, each of 128 sampled answers.

SmolLM2-135M first learns the task for 40 steps of LoRA (r = 8), which are merged: without a few right answers there is no reward to
learn from. Then each arm trains a new LoRA with the stored parameters of r = 1 on all linear layers:

even      one rank a module;
random    ranks dealt to modules drawn at random, as many as the parameters allow (another draw each seed);
informed  ranks by the singular values of the first policy gradient on 64 prompts: the largest square per stored parameter first. A
          starts as in PEFT, so that it is placed by them alone. It sees 512 answers more than the others.

A step samples 8 answers to each of 16 prompts at temperature 1. The reward is 1 for the right answer, else 0.2 times the share of
right digits; advantages are the rewards minus their prompt's mean, over its standard deviation. One update a batch: there is no
ratio to clip, and no KL term. Each arm's learning rate: the one of three with the highest mean reward on the dev rows (greedy),
over two seeds. Then seeds 0 to 4, which tuned nothing, on the test rows. The model before GRPO is measured too: where no arm is
clearly better than that, nothing was learned, and where ranks lie cannot matter.
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

STEPS, PROMPTS, ANSWERS, NEW = 200, 16, 8, 7
RATES, TUNING, SEEDS = (1.67e-3, 3e-3, 5.4e-3), (1000, 1001), (0, 1, 2, 3, 4)
SETTINGS = {"steps": STEPS, "prompts": PROMPTS, "answers": ANSWERS, "new": NEW}
BEFORE, ARMS = "before", ("even", "random", "informed")
BUDGET = 305_280
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(path: Path) -> list[tuple[str, str]]:
    return [(one["question"] + " ->", one["answer"]) for one in map(json.loads, path.read_text().splitlines())]


class Policy:
    def __init__(self, device: str) -> None:
        self.tokenizer: Any = load_tokenizer("smollm2-135m-instruct")
        self.tokenizer.padding_side = "left"
        self.device = device
        self.model: Any = load_model("smollm2-135m-instruct", device=device)
        self.end = self.tokenizer.eos_token_id

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
        return batch["input_ids"], batch["attention_mask"]

    @torch.no_grad()
    def write(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, answers: int = 1, sample: bool = False) -> Tensor:
        """(rows times answers, up to NEW) tokens, the answers of a row one after the other; after an end all are ends."""
        model.eval()
        found, mask = self.read(model, ids, mask, answers)
        logits, out = found.logits[:, -1].float().repeat_interleave(answers, 0), []
        done = torch.zeros(len(mask), dtype=torch.bool, device=self.device)
        while True:
            token = torch.multinomial(logits.softmax(-1), 1)[:, 0] if sample else logits.argmax(-1)
            token = torch.where(done, self.end, token)
            done |= token == self.end
            out.append(token)
            if len(out) == NEW or (len(out) > 1 and done.all()):
                return torch.stack(out, 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            found = model(
                input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=found.past_key_values, use_cache=True,
            )  # fmt: skip
            logits = found.logits[:, -1].float()

    def read(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, answers: int) -> tuple[Any, Tensor]:
        """Each prompt once, with keys and values for its answers, and their mask."""
        position = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
        found.past_key_values.batch_repeat_interleave(answers)
        return found, mask.repeat_interleave(answers, 0)

    def loss(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        """Minus the mean log-likelihood of the written tokens, up to the first end of text, each times its row's weight."""
        answers = len(new) // len(ids)
        found, mask = self.read(model, ids, mask, answers)
        position = mask.sum(1, keepdim=True) + torch.arange(new.shape[1] - 1, device=self.device)
        more = model(
            input_ids=new[:, :-1], attention_mask=torch.cat([mask, torch.ones_like(new[:, :-1])], 1), position_ids=position,
            past_key_values=found.past_key_values, use_cache=True,
        )  # fmt: skip
        logits = torch.cat([found.logits.repeat_interleave(answers, 0), more.logits], 1).float()
        chosen = logits.log_softmax(-1).gather(-1, new[..., None])[..., 0]
        counts = ((new == self.end).cumsum(1) - (new == self.end).long() == 0).float()
        return -(chosen * counts * weight[:, None]).sum() / counts.sum()

    def rewards(self, model: torch.nn.Module, data: list[tuple[str, str]]) -> list[float]:
        """The reward of each row's answer by greedy decoding."""
        found: list[float] = []
        for start in range(0, len(data), 50):
            part = data[start : start + 50]
            new = self.write(model, *self.prompts([text for text, _ in part]))
            found += [reward(self.text(one), answer) for one, (_, answer) in zip(new, part, strict=True)]
        return found

    def text(self, tokens: Tensor) -> str:
        """What the tokens say; nothing where the answer does not end."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip() if (tokens == self.end).any() else ""


def reward(text: str, answer: str) -> float:
    if text == answer:
        return 1.0
    return 0.2 * sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))


def warm(policy: Policy, train: list[tuple[str, str]], steps: int = 40) -> None:
    """The base learns the task a little, and is merged."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model = get_peft_model(policy.model, LoraConfig(r=8, lora_alpha=16, target_modules=NAMES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        part = draw.sample(train, 8)
        ids, mask = policy.prompts([text for text, _ in part])
        new = torch.full((8, NEW), policy.end, device=policy.device)
        for i, (_, answer) in enumerate(part):
            tokens = policy.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
            new[i, : len(tokens)] = torch.tensor(tokens, device=policy.device)
        policy.loss(model.train(), ids, mask, new, torch.ones(len(new), device=policy.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.model = model.merge_and_unload()


def advantages(texts: list[str], answers: list[str]) -> tuple[Tensor, float]:
    r = torch.tensor([reward(t, a) for t, a in zip(texts, answers, strict=True)]).view(-1, ANSWERS)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1), r.mean().item()


def sampled(policy: Policy, model: torch.nn.Module, part: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    ids, mask = policy.prompts([text for text, _ in part])
    new = policy.write(model, ids, mask, ANSWERS, sample=True)
    weight, mean = advantages([policy.text(one) for one in new], [answer for _, answer in part for _ in range(ANSWERS)])
    return ids, mask, new, weight.to(policy.device), mean


def modules(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {
        name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name.split(".")[-1] in NAMES
    }


def dealt(policy: Policy, arm: str, seed: int, train: list[tuple[str, str]]) -> dict[str, int]:
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
        for _ in range(16):
            ids, mask, new, weight, _ = sampled(policy, policy.model, draw.sample(train, 4))
            policy.loss(policy.model, ids, mask, new, weight).backward()
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
        model = get_peft_model(policy.model, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        means, parameters = learn(policy, model, trained, train, rate, random.Random(seed)), sum(p.numel() for p in trained)
    part = "dev" if seed in TUNING else "test"
    rewards = policy.rewards(model, rows(data / f"{part}.jsonl"))
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
        "right": "".join(str(int(one == 1)) for one in rewards),
        "reward": round(statistics.fmean(rewards), 4),
        "steps": means,
        "seconds": round(time.perf_counter() - began),
        "settings": SETTINGS,
        "machine": machine(policy.device),
    }


def learn(
    policy: Policy, model: Any, trained: list[Any], train: list[tuple[str, str]], rate: float, draw: random.Random
) -> list[float]:
    """GRPO; the mean reward of what each step sampled."""
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    means = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 4) * (1 - step / STEPS)
        ids, mask, new, weight, mean = sampled(policy, model, draw.sample(train, PROMPTS))
        policy.loss(model.train(), ids, mask, new, weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(round(mean, 3))
    return means


def exactness(run: Run) -> float:
    return 100 * run["right"].count("1") / len(run["right"])


def tuned(done: list[Run], arm: str) -> dict[float, float]:
    """Rate -> mean reward of the arm's tuning runs, of those rates that have all."""
    found = {
        rate: [run["reward"] for run in done if (run["arm"], run["learning_rate"], run["part"]) == (arm, rate, "dev")]
        for rate in RATES
    }
    return {rate: statistics.fmean(own) for rate, own in found.items() if len(own) == len(TUNING)}


def best_rate(done: list[Run], arm: str) -> float | None:
    """The best tuned rate, the lowest of equal ones; None while tuning runs are missing."""
    found = tuned(done, arm)
    return max(RATES, key=lambda rate: (found[rate], -rate)) if len(found) == len(RATES) else None


def report(done: list[Run]) -> None:
    if len(machines := {json.dumps(run["machine"]) for run in done}) > 1:
        print(f"runs are of {len(machines)} machines, whose bases may have learned the task differently: {', '.join(machines)}\n")
    before = {run["part"]: run for run in done if run["arm"] == BEFORE}
    if len(before) < 2:
        print("the model before GRPO has not been measured")
        return
    print(
        f"before GRPO: reward {before['dev']['reward']:.3f} on dev, {exactness(before['test']):.1f} exact on test\n\n"
        f"| ranks | modules, largest rank | parameters | reward on dev, at {', '.join(map(str, RATES))} | rate "
        "| test, exact (sd) | minus before (95%) | minus even (95%) | p (Holm) |\n|---|---|---|---|---|---|---|---|---|"
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
            ", ".join(f"{value:.3f}" for value in tuned(done, arm).values()),
            f"{rate}{' (edge)' if rate in (min(RATES), max(RATES)) else ''}",
            spread([exactness(run) for run in own], 1),
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
    wanted += [(arm, rate, seed) for seed, arm, rate in product(TUNING, ARMS, RATES)]
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
