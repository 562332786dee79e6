"""Two levels, two streams: alternation against a loop written by hand, nothing of one level in the other, resuming, refusals."""

import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from several_processes import in_processes
from tiny_models import tiny_base
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from gatewise.bilevel import split_in_half
from gatewise.bilevel.state import CyclicRows
from gatewise.bilevel.trainer import STATE_FILE, BilevelTrainer
from gatewise.errors import GatewiseError

WEIGHTS, GATES = ("inner.weight", "outer.weight"), ("gates", "idle", "sometimes")
PATTERN = "^(gates|idle|sometimes)$"


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
    settings = {"upper_dataset": UPPER, "upper_parameters": PATTERN, "upper_learning_rate": 0.02}
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


def by_hand(model: Gated, args: TrainingArguments, every: int, bf16: bool) -> None:
    """The same training in plain torch. ``autograd.grad`` for one level at a time, so that nothing can leak."""
    named = dict(model.named_parameters())
    low, high = [named[name] for name in WEIGHTS], [named[name] for name in GATES]
    lower = torch.optim.AdamW(low, lr=args.learning_rate, weight_decay=args.weight_decay)
    upper = torch.optim.AdamW(high, lr=0.02, weight_decay=0.0)
    size, order, step = args.per_device_train_batch_size, stream(len(UPPER), args.seed), 0

    def gradients(batch: list[Any], wanted: list[nn.Parameter], share: int) -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]})["loss"]
        return torch.autograd.grad(loss / share, wanted, allow_unused=True)

    while step < args.max_steps:
        batches = [TRAIN[first : first + size] for first in range(0, len(TRAIN), size)]
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
            if step % every == 0:
                rows = [UPPER[next(order)] for _ in range(size)]
                for parameter, gradient in zip(high, gradients(rows, high, 1), strict=True):
                    parameter.grad = gradient
                upper.step()
                upper.zero_grad()
            if step == args.max_steps:
                return


@pytest.mark.parametrize(
    ("changes", "every"),
    [({}, 1), ({"gradient_accumulation_steps": 3}, 2), ({"bf16": True}, 1)],
    ids=["plain", "every", "bf16"],
)
def test_alternation_equals_a_loop_written_by_hand(
    changes: dict[str, Any], every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, _=None: SequentialSampler(self.train_dataset))
    args = arguments(tmp_path, **changes)
    trainer = bilevel(tmp_path, args=args, upper_every=every)
    before = weights(trainer.model)
    trainer.train()

    model = Gated()
    assert_same(weights(model), before)
    by_hand(model, args, every, "bf16" in changes)
    assert_same(weights(trainer.model), weights(model))
    moved = {name for name, value in before.items() if not torch.equal(value, weights(model)[name])}
    assert moved == {*WEIGHTS, "gates", "sometimes"}
    assert dict(trainer.model.named_parameters())["gates"].dtype == torch.float32


@pytest.mark.parametrize("step", [3, 5])  # within an epoch, and where the second begins
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_equals_one_never_stopped(step: int, every: int, tmp_path: Path) -> None:
    args = arguments(tmp_path / "whole", save_strategy="steps", save_steps=step)
    whole = bilevel(tmp_path, model=Gated(dropout=0.5), args=args, upper_every=every)
    whole.train()
    resumed = bilevel(tmp_path, model=Gated(dropout=0.5), args=arguments(tmp_path / "rest"), upper_every=every)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_same(weights(resumed.model), weights(whole.model))
    for mine, other in zip(resumed.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        assert mine == other


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path / "ours", max_steps=2, save_strategy="steps", save_steps=2)
    bilevel(tmp_path, args=args).train()
    ours = tmp_path / "ours" / "checkpoint-2"
    lower = torch.load(ours / "optimizer.pt", weights_only=True)
    assert sum(len(group["params"]) for group in lower["param_groups"]) == len(WEIGHTS)

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


def test_an_upper_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Overflowing(BilevelTrainer):
        def compute_upper_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
            return super().compute_upper_loss(model, inputs) * float("nan")

    with pytest.raises(GatewiseError, match="the upper gradient has norm nan after step 1, so the run stopped before it moved"):
        bilevel(tmp_path, Overflowing).train()


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


def test_a_hub_data_set_with_other_columns_read_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in the same order as from a list, also after a resume: workers read ahead, which does not count."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds; the end of a worker would take 5
    table = Dataset.from_list([{"note": "-", **{key: value.tolist() for key, value in row.items()}} for row in UPPER])
    args = arguments(tmp_path / "workers", dataloader_num_workers=1, save_strategy="steps", save_steps=3)
    workers, plain = bilevel(tmp_path, args=args, upper_dataset=table), bilevel(tmp_path)
    workers.train()
    plain.train()
    assert_same(weights(workers.model), weights(plain.model))
    resumed = bilevel(tmp_path, args=arguments(tmp_path / "rest", dataloader_num_workers=1), upper_dataset=table)
    resumed.train(resume_from_checkpoint=str(tmp_path / "workers" / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(plain.model))
    del workers, resumed
    gc.collect()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upper_dataset": []}, "upper_dataset has 0 rows; expected at least 1"),
        ({"upper_dataset": None}, "upper_dataset is a NoneType; expected rows with a length"),
        ({"upper_dataset": Dataset.from_list([{"x": 1}]).to_iterable_dataset()}, "upper_dataset is a IterableDataset; .* stream"),
        ({"upper_parameters": "gatse"}, "'gatse', which fits 0 of the 5 trainable parameters .gates, idle"),
        ({"upper_parameters": "fro"}, "'fro', which fits 0 of the 5"),
        ({"upper_parameters": "."}, "which fits 5 of the 5 trainable parameters"),
        ({"upper_every": 9}, "upper_every=9 leaves no upper step in a run of 8 steps"),
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


def test_runs_that_would_move_what_they_should_not_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"upper_dataset": UPPER, "upper_parameters": PATTERN, "upper_learning_rate": 0.1}
    model = Gated()
    with pytest.raises(GatewiseError, match="the Trainer was given a ready optimizer"):
        BilevelTrainer(model, arguments(tmp_path), optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), **settings)
    original = Trainer.create_accelerator_and_postprocess
    with monkeypatch.context() as patched:  # by the launcher; Accelerate refuses fp16 on a CPU, so it is told nothing
        make = lambda self: (original(self), setattr(self.args, "mixed_precision", "fp16"))[-1]  # noqa: E731
        patched.setattr(Trainer, "create_accelerator_and_postprocess", make)
        with pytest.raises(GatewiseError, match="fp16 is on"):
            bilevel(tmp_path)
    for flag in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        monkeypatch.setattr(
            Trainer, "create_accelerator_and_postprocess", lambda self, flag=flag: (original(self), setattr(self, flag, True))[-1]
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


def test_halves_are_disjoint_and_of_the_same_kind() -> None:
    first, second = map(list, split_in_half(list(range(9)), seed=1))
    assert (len(first), len(second), sorted(first + second)) == (5, 4, list(range(9)))
    assert list(split_in_half(list(range(9)), seed=2)[1]) != second
    halves = split_in_half(Dataset.from_dict({"x": list(range(9))}), seed=1)
    assert [half["x"][:] for half in halves] == [first, second]
    with pytest.raises(GatewiseError, match="the data set to split has 1 rows; expected at least 2"):
        split_in_half([1])
    with pytest.raises(GatewiseError, match="expected rows with a length that can be read by number: of a stream"):
        split_in_half(IterableDataset.from_generator(lambda: iter(())))


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
    trainer = bilevel(folder, model=model, args=args, upper_parameters=PATTERN if unused else "gates")
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
