"""Two levels, two streams: alternation against a loop written by hand, nothing of one level in the other, resuming, refusals."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors import safe_open
from several_processes import in_processes
from tiny_models import tiny_base
from tiny_run import byte_tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

import gatewise
from gatewise.adapters.checkpoints import complete_checkpoints
from gatewise.bilevel import split_in_half
from gatewise.bilevel.state import CyclicRows, select_upper
from gatewise.bilevel.trainer import STATE_FILE, BilevelMixin, BilevelTrainer
from gatewise.errors import GatewiseError
from gatewise.runs.trainer import RecipeTrainer
from gatewise.tasks import PadCollator

WEIGHTS, GATES = ("inner.weight", "outer.weight"), ("gates", "idle", "sometimes")


class Gated(nn.Module):
    """Two weights (the lower level) and gates, of which one takes part never and one in some batches (the upper level)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 6, bias=False), nn.Linear(6, 1, bias=False)
        self.gates, self.idle = nn.Parameter(torch.randn(6)), nn.Parameter(torch.ones(2))
        self.sometimes, self.dropout = nn.Parameter(torch.ones(())), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        guess = self.outer(self.dropout(torch.tanh(self.inner(x))) * torch.sigmoid(self.gates)).squeeze(-1)
        if bool((x[:, 0] > 0.5).any()):
            guess = guess + self.sometimes * (x[:, 0] - 0.5).clamp(min=0)
        return {"logits": guess} if labels is None else {"loss": F.mse_loss(guess, labels), "logits": guess}


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4, generator=draw), "labels": torch.randn((), generator=draw)} for _ in range(count)]


TRAIN, UPPER = rows(10, 1), rows(7, 2)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "weight_decay": 0.3,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(**settings | changes)


def bilevel(
    folder: Path, kind: Any = BilevelTrainer, model: Any = None, callbacks: Any = None, args: Any = None, **upper: Any
) -> Any:
    settings = {"upper_dataset": UPPER, "upper_parameters": GATES, "upper_learning_rate": 0.02, "upper_batch_size": 3}
    return kind(
        model=model or Gated(),
        args=args or arguments(folder),
        train_dataset=TRAIN,
        callbacks=callbacks,
        **settings | upper,
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def stream(count: int, seed: int) -> Iterator[int]:
    number = 0
    while True:
        order = list(range(count))
        random.Random(f"upper/{seed}/{number}").shuffle(order)
        yield from order
        number += 1


def by_hand(
    model: Gated,
    args: TrainingArguments,
    upper: torch.optim.Optimizer,
    every: int,
    start: int,
    follows: bool = False,
    clip: float | None = None,
    bf16: bool = False,
) -> None:
    """The same training in plain torch. ``autograd.grad`` for one level at a time, so that nothing can leak."""
    named = dict(model.named_parameters())
    low, high = [named[name] for name in WEIGHTS], [named[name] for name in GATES]
    lower = torch.optim.AdamW(low, lr=args.learning_rate, weight_decay=args.weight_decay)
    upper_lr, order, step = upper.param_groups[0]["lr"], stream(len(UPPER), args.seed), 0

    def gradients(batch: list[Any], wanted: list[nn.Parameter], share: int) -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]})["loss"]
        return torch.autograd.grad(loss / share, wanted, allow_unused=True)

    while step < args.max_steps:
        size, batches = args.per_device_train_batch_size, []
        for first in range(0, len(TRAIN), size):
            batches.append(TRAIN[first : first + size])
        for first in range(0, len(batches), args.gradient_accumulation_steps):
            group = batches[first : first + args.gradient_accumulation_steps]
            for batch in group:
                for parameter, gradient in zip(low, gradients(batch, low, len(group)), strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            nn.utils.clip_grad_norm_(low, args.max_grad_norm)
            lower.param_groups[0]["lr"] = args.learning_rate * ((args.max_steps - step) / args.max_steps)
            lower.step()
            lower.zero_grad()
            step += 1
            if step > start and (step - start) % every == 0:
                for parameter, gradient in zip(high, gradients([UPPER[next(order)] for _ in range(3)], high, 1), strict=True):
                    parameter.grad = gradient
                if clip:
                    nn.utils.clip_grad_norm_(high, clip)
                if follows:
                    upper.param_groups[0]["lr"] = upper_lr * (lower.param_groups[0]["lr"] / args.learning_rate)
                upper.step()
                upper.zero_grad()
            if step == args.max_steps:
                return


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Make, dict[str, Any]]] = {
    # name: (arguments, upper settings, the upper optimiser by hand, what else the loop needs)
    "adamw": ({}, {}, lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0), {"every": 1, "start": 0}),
    "accumulation": (
        {"gradient_accumulation_steps": 3},
        {"upper_weight_decay": 0.5, "upper_betas": (0.5, 0.999), "upper_max_grad_norm": 0.01},
        lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.5, 0.999), weight_decay=0.5),
        {"every": 1, "start": 0, "clip": 0.01},
    ),
    "adam": (
        {},
        {"upper_optim": "adam", "upper_weight_decay": 0.5, "upper_every": 2, "upper_start": 3},
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.5),
        {"every": 2, "start": 3},
    ),
    "sgd": (
        {"gradient_accumulation_steps": 2},
        {"upper_optim": "sgd", "upper_start": 0.5, "upper_schedule": "lower"},
        lambda p: torch.optim.SGD(p, lr=0.02),
        {"every": 1, "start": 4, "follows": True},
    ),
    "bf16": ({"bf16": True}, {}, lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0), {"every": 1, "start": 0, "bf16": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_alternation_equals_a_loop_written_by_hand(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, settings, make, loop = CASES[case]
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, _=None: SequentialSampler(self.train_dataset))
    args = arguments(tmp_path, **changes)
    trainer = bilevel(tmp_path, args=args, **settings)
    before = weights(trainer.model)
    trainer.train()

    model = Gated()
    assert_same(weights(model), before)
    by_hand(model, args, make([dict(model.named_parameters())[name] for name in GATES]), **loop)
    assert_same(weights(trainer.model), weights(model))
    moved = {name for name, value in before.items() if not torch.equal(value, weights(model)[name])}
    assert moved == {*WEIGHTS, "gates", "sometimes"}
    assert dict(trainer.model.named_parameters())["gates"].dtype == torch.float32


class Watch(TrainerCallback):
    """Weights and gradients at every point of a step where callbacks come."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, dict[str, torch.Tensor]]] = []
        self.with_gradient: dict[str, set[str]] = {}

    def note(self, event: str, model: nn.Module, step: int) -> None:
        self.seen.append((event, step, weights(model)))
        self.with_gradient.setdefault(event, set()).update(n for n, p in model.named_parameters() if p.grad is not None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("before", kwargs["model"], state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("lower", kwargs["model"], state.global_step)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("substep", kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note("end", kwargs["model"], state.global_step)


@pytest.mark.parametrize(("every", "start", "expected"), [(1, 0, [1, 2, 3, 4, 5, 6, 7, 8]), (3, 1, [4, 7]), (2, 0.5, [6, 8])])
def test_each_level_moves_in_its_own_steps_only(every: int, start: float, expected: list[int], tmp_path: Path) -> None:
    watch, model = Watch(), Gated()
    fired: list[str] = []
    for name in WEIGHTS:
        dict(model.named_parameters())[name].register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    changes = {"upper_every": every, "upper_start": start, "upper_weight_decay": 0.5, "upper_max_grad_norm": 0.1}
    trainer = bilevel(tmp_path, model=model, callbacks=[watch], args=args, **changes)
    trainer.train()

    assert watch.with_gradient == {"substep": {*WEIGHTS}, "before": {*WEIGHTS}, "lower": {*WEIGHTS}, "end": set()}
    assert trainer.upper_steps == len(expected)
    upper_moved = []
    for (_, _, old), (event, step, new) in zip(watch.seen, watch.seen[1:], strict=False):
        changed = {name for name in new if not torch.equal(old[name], new[name])}
        if event == "lower":
            assert changed == {*WEIGHTS}
        elif event == "end":
            assert changed <= {"gates", "sometimes"}
            upper_moved += [step] if "gates" in changed else []
        else:
            assert not changed
    assert upper_moved == expected
    assert len(fired) == 2 * (5 + 5 + 4)  # the batches of eight lower steps; upper steps compute no gradient of theirs


class OtherLosses(BilevelTrainer):
    def compute_upper_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        return 3 * super().compute_upper_loss(model, inputs)

    def extra_lower_loss(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        return 0.5 * (outputs["logits"] + inputs["labels"]).square().mean()


@pytest.mark.parametrize("scaled", [False, True])
def test_losses_of_a_subclass(scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, _=None: SequentialSampler(self.train_dataset))
    watch = Watch()
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0, optim="sgd", weight_decay=0)
    trainer = bilevel(tmp_path, OtherLosses, callbacks=[watch], args=args, upper_optim="sgd")
    if scaled:  # divided by the number of labels in all batches of a step, as language models do
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
            F.mse_loss(outputs["logits"], labels, reduction="sum") / (num_items_in_batch or len(labels))
        )
    trainer.train()

    def losses(model: nn.Module, batch: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(**(inputs := {key: torch.stack([row[key] for row in batch]) for key in batch[0]}))
        return out["loss"], 0.5 * (out["logits"] + inputs["labels"]).square().mean()

    model = Gated()
    expected = sum(sum(losses(model, batch)) for batch in (TRAIN[:2], TRAIN[2:4])) / 2  # type: ignore[arg-type]
    gradients = torch.autograd.grad(expected, [model.inner.weight, model.outer.weight])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    for parameter, gradient in zip((model.inner.weight, model.outer.weight), gradients, strict=True):
        parameter.data -= 0.1 * gradient
    order = stream(len(UPPER), 42)
    above = losses(model, [UPPER[next(order)] for _ in range(3)])[0]
    assert trainer.state.log_history[0]["upper_loss"] == pytest.approx(3 * above.item(), rel=1e-5)
    model.gates.data -= 0.02 * torch.autograd.grad(3 * above, model.gates)[0]
    for name in (*WEIGHTS, "gates"):
        torch.testing.assert_close(weights(trainer.model)[name], weights(model)[name], rtol=1e-5, atol=1e-6)
    # Evaluation has the plain loss.
    assert trainer.evaluate(TRAIN)["eval_loss"] == pytest.approx(Trainer(trainer.model, args).evaluate(TRAIN)["eval_loss"])


@pytest.mark.parametrize("step", [3, 5])  # within an epoch, and where the second begins
@pytest.mark.parametrize("settings", [{}, {"upper_every": 2, "upper_start": 1, "upper_schedule": "lower"}])
def test_a_resumed_run_equals_one_never_stopped(step: int, settings: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path / "whole", save_strategy="steps", save_steps=step)
    whole = bilevel(tmp_path, model=Gated(dropout=0.5), args=args, **settings)
    whole.train()
    resumed = bilevel(tmp_path, model=Gated(dropout=0.5), args=arguments(tmp_path / "rest"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_same(weights(resumed.model), weights(whole.model))
    assert resumed.upper_steps == whole.upper_steps
    for mine, other in zip(resumed.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert mine == other
    # Without the state of the upper level, it does not: the comparison can fail.
    broken = tmp_path / "whole" / f"checkpoint-{step}"
    fresh = bilevel(tmp_path, model=Gated(dropout=0.5), args=arguments(tmp_path / "rest"), **settings)
    fresh._load_optimizer_and_scheduler = lambda checkpoint: Trainer._load_optimizer_and_scheduler(fresh, checkpoint)
    fresh.train(resume_from_checkpoint=str(broken))
    assert not torch.equal(fresh.model.gates, whole.model.gates)


def test_a_checkpoint_has_nothing_pickled_of_ours(tmp_path: Path) -> None:
    args = arguments(tmp_path / "ours", max_steps=2, save_strategy="steps", save_steps=2)
    trainer = bilevel(tmp_path, args=args)
    trainer.train()
    ours = tmp_path / "ours" / "checkpoint-2"
    Trainer(Gated(), arguments(tmp_path / "plain", max_steps=2, save_strategy="steps", save_steps=2), train_dataset=TRAIN).train()
    plain = {path.name for path in (tmp_path / "plain" / "checkpoint-2").iterdir()}
    assert {path.name for path in ours.iterdir()} == plain | {STATE_FILE}
    lower = torch.load(ours / "optimizer.pt", weights_only=True)
    assert sum(len(group["params"]) for group in lower["param_groups"]) == len(WEIGHTS)
    with safe_open(str(ours / STATE_FILE), framework="pt") as file:
        assert {*file.keys()} >= {"exp_avg/gates", "exp_avg_sq/gates", "step/gates"}
        assert not any(name.endswith("weight") for name in file.keys())  # noqa: SIM118
        about = json.loads(file.metadata()["bilevel"])
    assert (about["steps"], about["rows_seen"]) == (2, 6)

    def resume(**changes: Any) -> None:
        bilevel(tmp_path, args=arguments(tmp_path / "rest"), **changes).train(resume_from_checkpoint=str(ours))

    with pytest.raises(GatewiseError, match=r"is of the upper parameters .* but this run's are gates: resume with the"):
        resume(upper_parameters="gates")
    shutil.copy(ours / "model.safetensors", ours / STATE_FILE)
    with pytest.raises(GatewiseError, match="cannot be read"):
        resume()
    (ours / STATE_FILE).unlink()
    with pytest.raises(GatewiseError, match="another Trainer wrote it, or save_only_model was on"):
        resume()


def test_logs_have_the_mean_upper_loss_and_the_rate(tmp_path: Path) -> None:
    losses: list[float] = []

    class Noting(BilevelTrainer):
        def compute_upper_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
            losses.append((loss := super().compute_upper_loss(model, inputs)).item())
            return loss

    args = arguments(tmp_path, logging_steps=2)
    trainer = bilevel(tmp_path, Noting, args=args, upper_start=2, upper_schedule="lower")
    trainer.train()
    first, *later = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not any(key.startswith("upper") for key in first)
    for number, entry in enumerate(later):
        assert entry["upper_loss"] == pytest.approx(sum(losses[2 * number : 2 * number + 2]) / 2)
        # The rate of the lower step before it: of step 4, 6 and 8 when the learning rate falls to zero over 8 steps.
        assert entry["upper_learning_rate"] == pytest.approx(0.02 * (8 - (3 + 2 * number)) / 8)
        assert entry["learning_rate"] == pytest.approx(0.1 * (8 - (3 + 2 * number)) / 8)
        assert entry["upper_grad_norm"] > 0


def test_a_gradient_scaler_changes_nothing_and_leaves_out_what_overflows(tmp_path: Path) -> None:
    def run(scaler: Any, first: float = 1.0) -> Any:
        factors = iter([first])

        class Overflowing(BilevelTrainer):
            def compute_upper_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
                return super().compute_upper_loss(model, inputs) * next(factors, 1.0)

        watch = Watch()
        trainer = bilevel(
            tmp_path, Overflowing, callbacks=[watch], args=arguments(tmp_path, max_grad_norm=0), upper_max_grad_norm=0.1
        )
        trainer.accelerator.scaler = scaler
        trainer.train()
        return trainer, [seen["gates"] for event, _, seen in watch.seen if event == "end"]

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    plain, scaled = run(None)[0], run(scaler())[0]
    assert scaled.accelerator.scaler.get_scale() == 2.0**15  # doubled after every third of sixteen steps
    assert_same(weights(plain.model), weights(scaled.model))
    trainer, gates = run(scaler(), float("inf"))
    assert torch.equal(gates[0], Gated().gates)
    assert not torch.equal(gates[1], gates[0])
    assert bool(torch.isfinite(trainer.model.gates).all())
    with pytest.raises(GatewiseError, match="the upper gradient has norm nan after step 1, so the run stopped before it moved"):
        run(None, float("nan"))


def test_gradient_checkpointing(tmp_path: Path) -> None:
    ids = torch.randint(1, 60, (10, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]

    def run(**changes: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        args = arguments(tmp_path, max_steps=3, learning_rate=0.01, **changes)
        upper = {"upper_dataset": data, "upper_parameters": r"\.input_layernorm\.", "upper_learning_rate": 0.01}
        trainer = BilevelTrainer(tiny_base("llama"), args, train_dataset=data, **upper)
        trainer.train()
        return weights(trainer.model)

    plain = run()
    for reentrant in (False, True):
        again = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for name, value in plain.items():
            torch.testing.assert_close(value, again[name], rtol=1e-4, atol=1e-5)


class CutOff(Gated):
    """Reentrant checkpointing of a block whose input needs no gradient: what is inside the block gets none."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = checkpoint(lambda x: torch.tanh(self.inner(x)) * self.gates, x, use_reentrant=True)
        return {"loss": F.mse_loss(self.outer(hidden).squeeze(-1), labels)}


class TwoLevelRecipe(BilevelMixin, RecipeTrainer):
    """The mixin before gatewise's own Trainer, whose constructor is another."""


def test_a_recipe_trainer_with_two_levels(adapted: Callable[..., PeftModel], tmp_path: Path) -> None:
    draw = random.Random(0)
    data = [[draw.randrange(3, 60) for _ in range(4 + number % 4)] for number in range(10)]
    features = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in data]

    def run(folder: str, checkpoint: Path | None = None) -> tuple[Any, Watch]:
        torch.manual_seed(0)
        watch = Watch()
        args = arguments(
            tmp_path / folder, max_steps=6, save_strategy="steps", save_steps=4, remove_unused_columns=False, label_names=["labels"]
        )
        positional = (adapted("llama", lora_dropout=0.3), args, features[:6], features[:2], PadCollator(byte_tokenizer()))
        upper = {"upper_dataset": features[6:], "upper_parameters": "lora_B", "upper_learning_rate": 0.01, "upper_every": 2}
        trainer = TwoLevelRecipe(*positional, {"base": "tiny"}, [watch], group_by_length=True, **upper)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer, watch

    trainer, watch = run("whole")
    for (_, _, old), (event, step, new) in zip(watch.seen, watch.seen[1:], strict=False):
        changed = {name.split(".")[-3] for name in new if not torch.equal(old[name], new[name])}
        assert changed == {"lower": {"lora_A"}, "end": {"lora_B"} if step % 2 == 0 else set()}.get(event, set())
    (first, last) = complete_checkpoints(tmp_path / "whole", also=[STATE_FILE])
    assert (first.name, last.name) == ("checkpoint-4", "checkpoint-6")
    assert json.loads((first / "gatewise.json").read_text()) == {"base": "tiny"}
    assert_same(weights(run("rest", first)[0].model), weights(trainer.model))


def test_a_hub_data_set_with_other_columns_read_by_workers(tmp_path: Path) -> None:
    """The same rows in the same order as from a list, also after a resume: workers read ahead, which does not count."""
    table = Dataset.from_list([{"note": "-", **{key: value.tolist() for key, value in row.items()}} for row in UPPER])
    args = arguments(tmp_path / "workers", dataloader_num_workers=1, save_strategy="steps", save_steps=3)
    workers, plain = bilevel(tmp_path, args=args, upper_dataset=table), bilevel(tmp_path)
    workers.train()
    plain.train()
    assert_same(weights(workers.model), weights(plain.model))
    resumed = bilevel(tmp_path, args=arguments(tmp_path / "rest", dataloader_num_workers=1), upper_dataset=table)
    resumed.train(resume_from_checkpoint=str(tmp_path / "workers" / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(plain.model))


def test_training_twice_and_models_made_anew(tmp_path: Path) -> None:
    trainer = bilevel(tmp_path)
    trainer.train()
    optimizer, once = trainer.upper_optimizer, weights(trainer.model)
    trainer.train()
    assert trainer.upper_optimizer is optimizer
    assert trainer.upper_steps == 8
    assert not torch.equal(once["gates"], trainer.model.gates)
    settings = {"upper_dataset": UPPER, "upper_parameters": GATES, "upper_learning_rate": 0.02, "upper_batch_size": 3}
    made = BilevelTrainer(args=arguments(tmp_path), train_dataset=TRAIN, model_init=lambda: Gated(), **settings)
    made.train()
    first = weights(made.model)
    made.train()
    assert_same(weights(made.model), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upper_dataset": []}, "upper_dataset has 0 rows; expected at least 1"),
        ({"upper_dataset": None}, "upper_dataset is a NoneType; expected rows with a length"),
        ({"upper_dataset": Dataset.from_list([{"x": 1}]).to_iterable_dataset()}, "upper_dataset is a IterableDataset; .* stream"),
        (
            {"upper_dataset": Dataset.from_list([{"text": "a", "id": 1}])},
            "upper_dataset has the columns 'text', 'id', none of which",
        ),
        ({"upper_dataset": iter(UPPER)}, "upper_dataset is a list_iterator; expected rows"),
        (
            {"upper_parameters": []},
            "upper_parameters is empty; expected some of the trainable parameters: gates, idle, sometimes and 2 more",
        ),
        ({"upper_parameters": "gatse"}, "'gatse' fits no parameter of the model; did you mean gates"),
        ({"upper_parameters": ["gates", "xyz"]}, "'xyz' fits no parameter of the model; trainable are gates, idle, "),
        ({"upper_parameters": lambda name, parameter: False}, "the function upper_parameters fits no parameter"),
        ({"upper_parameters": "[a"}, r"'\[a' is no parameter and no regular expression"),
        ({"upper_parameters": "fro"}, "'fro' fits only parameters that do not require a gradient .frozen.: make"),
        ({"upper_parameters": lambda name, parameter: name == "frozen"}, "fits only parameters that do not require a gradient"),
        ({"upper_parameters": "."}, "upper_parameters fits all 5 trainable parameters and leaves none"),
        ({"upper_learning_rate": 0}, "upper_learning_rate is 0; expected a number above 0"),
        ({"upper_learning_rate": "1e-6"}, "upper_learning_rate is '1e-6'; expected a number above 0"),
        ({"upper_weight_decay": -1}, "upper_weight_decay is -1; expected"),
        ({"upper_betas": (0.9, 1)}, "upper_betas is .0.9, 1.; expected two numbers"),
        ({"upper_optim": "lion"}, "upper_optim is 'lion'; expected one of 'adamw', 'adam', 'sgd'"),
        ({"upper_schedule": "cosine"}, "upper_schedule is 'cosine'; expected 'constant' or 'lower'"),
        ({"upper_every": 0}, "upper_every is 0; expected a whole number"),
        ({"upper_start": 1.5}, "upper_start is 1.5; expected"),
        ({"upper_batch_size": 0}, "upper_batch_size is 0; expected"),
        ({"upper_max_grad_norm": 0}, "upper_max_grad_norm is 0; expected"),
        ({"upper_every": 9}, "upper_start=0 and upper_every=9 leave no upper step in a run of 8 steps"),
        ({"upper_parameters": "idle"}, "the loss on upper_dataset gives none of the upper parameters .idle. a gradient"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Gated()
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(GatewiseError, match=message):
        bilevel(tmp_path, model=model, **changes).train()


def test_gates_that_checkpointing_cuts_off_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"gives none of the upper parameters .* reentrant activation checkpointing"):
        bilevel(tmp_path, model=CutOff(), upper_parameters="gates").train()


@pytest.mark.parametrize("flag", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_runs_and_foreign_optimizers_are_refused(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated()
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GatewiseError, match=r"the Trainer's optimizer holds upper parameters .gates, idle, sometimes"):
        BilevelTrainer(
            model,
            arguments(tmp_path),
            upper_dataset=UPPER,
            upper_parameters=GATES,
            upper_learning_rate=0.1,
            optimizers=(both, None),
        )
    original = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        Trainer, "create_accelerator_and_postprocess", lambda self: (original(self), setattr(self, flag, True), None)[-1]
    )
    with pytest.raises(GatewiseError, match=r"shards its parameters .(DeepSpeed|FSDP).*with DDP"):
        bilevel(tmp_path)


def test_the_stream_is_one_permutation_a_pass_shared_by_all_processes() -> None:
    def take(count: int, **where: int) -> list[list[int]]:
        return [batch for _, batch in zip(range(count), CyclicRows(7, 3, seed=5, **where), strict=False)]

    flat = [row for batch in take(7) for row in batch]
    passes = [flat[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert take(4, start=9) == take(7)[3:]
    pairs = zip(take(3, processes=2), take(3, process=1, processes=2), strict=True)
    assert [batch for pair in pairs for batch in pair] == take(6)


def test_names_patterns_and_functions_choose_trainable_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "xa": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].bias.requires_grad_(False)
    assert [*select_upper(model, "a.weight")] == ["a.weight"]  # a name, though it also matches within xa.weight
    assert [*select_upper(model, "a.weigh")] == ["a.weight", "xa.weight"]
    assert [*select_upper(model, [r"^b\.", "a.bias"])] == ["a.bias", "b.weight"]
    assert [*select_upper(model, lambda name, parameter: parameter.ndim == 1)] == ["a.bias", "xa.bias"]


def test_halves_are_disjoint_and_of_the_same_kind() -> None:
    first, second = split_in_half(list(range(9)), seed=1)
    assert (len(first), len(second), sorted(first + second)) == (5, 4, list(range(9)))
    assert (first, second) == split_in_half(list(range(9)), seed=1)
    assert split_in_half(list(range(9)), seed=2) != (first, second)
    halves = split_in_half(Dataset.from_dict({"x": list(range(9))}), seed=1)
    assert [half["x"][:] for half in halves] == [first, second]
    subsets = split_in_half(torch.utils.data.TensorDataset(torch.arange(9)), seed=1)
    assert [[int(row[0]) for row in subset] for subset in subsets] == [first, second]
    with pytest.raises(GatewiseError, match="the data set to split has 1 rows; expected at least 2"):
        split_in_half([1])
    with pytest.raises(GatewiseError, match="expected rows with a length that can be read by number: of a stream"):
        split_in_half(IterableDataset.from_generator(lambda: iter(())))


def test_it_is_part_of_the_public_api() -> None:
    assert gatewise.BilevelTrainer is BilevelTrainer


RUNS = [(1, True), (2, True), (1, False)]  # gradient accumulation, and whether DDP looks for parameters without a gradient


def distributed(folder: Path, accumulation: int, unused: bool, processes: int) -> Any:
    args = arguments(
        folder,
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        ddp_backend="gloo" if processes > 1 else None,
        ddp_find_unused_parameters=unused,
    )
    model = Gated()
    for parameter in (model.idle, model.sometimes):
        parameter.requires_grad_(unused)
    upper = {"upper_parameters": GATES if unused else "gates", "upper_batch_size": 4 // processes, "upper_weight_decay": 0.5}
    trainer = bilevel(folder, model=model, args=args, **upper)
    trainer.train()
    return weights(trainer.model), [entry["upper_loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_process(folder: str) -> list[Any]:
    return [distributed(Path(folder), *run, 2) for run in RUNS]


def test_two_processes_equal_one_with_batches_of_twice_the_size(tmp_path: Path) -> None:
    pairs = zip(*in_processes(2, tmp_path, one_process, str(tmp_path)), strict=True)
    for run, ((first, losses), (second, others)) in zip(RUNS, pairs, strict=True):
        assert_same(first, second)
        expected, whole = distributed(tmp_path, *run, 1)
        for name, value in expected.items():
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
        assert losses == others == pytest.approx(whole, rel=1e-4)
