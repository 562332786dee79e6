"""One of each kind that gatewise can be extended by: a score, a rule, a schedule, a method and a task. See docs/guides/extend.md.

pip install --editable examples/extend
gatewise train recipes/quickstart.yaml --set allocation.score=my_parts:size allocation.rule=my_parts:to_the_best
gatewise train examples/extend/plurals.yaml
"""

import csv

from peft import LoraConfig

import gatewise
from gatewise.allocation.slots import by_slot, factors, live_mask, lora_layers
from gatewise.losses import mean_loss
from gatewise.parts import Count, Measured, Method, Section, Task
from gatewise.tasks import PadCollator, measuring


def size(model, batch, adapter):
    """A score: one number for each live rank of each module, higher for ranks worth keeping, zero for one that does nothing."""
    found = {}
    for path, layer in lora_layers(model, adapter).items():
        a, b = by_slot(layer, adapter, *factors(layer, adapter))  # (slots, d_in) and (slots, d_out)
        found[path] = (a.norm(dim=1) * b.norm(dim=1))[live_mask(layer, adapter)].detach()
    return found


def to_the_best(scores, limits):
    """A rule: who is pruned and who grows. The lowest ranks go, and the best module gets as many as it can hold, then the next."""
    pruned = gatewise.budget.prune_lowest(scores, limits)
    costs = limits.costs or dict.fromkeys(scores, 1)
    ranks = {path: len(own) - len(pruned.get(path, ())) for path, own in scores.items()}
    free = limits.budget - gatewise.budget.cost_of(ranks, limits.costs)
    grown = {}
    for path in sorted(scores, key=lambda path: sum(scores[path]) / costs[path], reverse=True):
        if path not in pruned:
            grown[path] = min(free // costs[path], limits.capacity[path] - ranks[path])
            free -= grown[path] * costs[path]
    return gatewise.budget.Plan(pruned, {path: count for path, count in grown.items() if count})


class Fading(gatewise.ConstantBudget):
    """A schedule: the second round moves half as much as the first, the third a third."""

    def cut(self, start, target, live, done, rounds):
        """How much a round prunes, and how much lives after it."""
        count, budget = super().cut(start, target, live, done, rounds)
        return max(1, count // done), budget


class ValuesSection(Section):
    """The section ``values`` of a recipe: its keys, with types and defaults."""

    rank: Count = 4


class ValuesOnly(Method):
    """A method: LoRA on the values alone."""

    values: ValuesSection

    def config(self, run, base):
        """The adapter."""
        return LoraConfig(r=self.values.rank, target_modules=["v_proj"], task_type=run.task.task_type)


class Plurals(Task):
    """A task: the model reads a word of a CSV file and writes its plural."""

    collator = PadCollator
    elsewhere = "writes plurals: load it in Python, with gatewise.models.load_adapter"

    def read(self, noted):
        """Rows to train on, and rows to measure on."""
        self.train, self.measured = rows_of(self.data.train), {"dev": rows_of(self.data.dev)}

    def encode(self, rows, tokenizer, max_length, *, key, say):
        """Rows as the model reads them: labels are -100 where it has nothing to learn."""
        features = []
        for word, plural in rows:
            prompt, answer = (tokenizer(text)["input_ids"] for text in (f"One {word}, two", f" {plural}."))
            features.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return features

    def measure(self, run, model, rows, counting):
        """How well it does."""
        features = self.encode(rows, run.tokenizer, run.max_length, key="data.dev", say=run.progress.say)
        with measuring(model):
            return Measured({"loss": mean_loss(model, [run.collate(features)]), "n": len(rows)})


def rows_of(path):
    """The lines of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))
