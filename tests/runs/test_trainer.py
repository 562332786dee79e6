"""The Trainer of a run: its loss is Transformers' loss, its order is fixed by seed and epoch, its checkpoints are judged."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import byte_tokenizer
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from gatewise.adapters.checkpoints import checkpoint_step, complete_checkpoints
from gatewise.errors import GatewiseError
from gatewise.runs.trainer import RecipeTrainer, RowOrder, has_stopped_early
from gatewise.tasks import PadCollator


def features(family: str, count: int = 10) -> list[dict[str, Any]]:
    """Rows of unlike length with one to three labels (or one class)."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        ids = torch.randint(3, 60, (4 + index % 5,), generator=draw).tolist()
        answer = 1 + index % 3
        labels: Any = index % 3 if family == "bert" else [-100] * (len(ids) - answer) + ids[-answer:]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    return TrainingArguments(**settings | changes)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_weights_are_those_of_transformers(
    family: str, accumulation: int, adapted: Callable[..., PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, collate = features(family), PadCollator(byte_tokenizer())
    # One epoch is five batches: the second step of three batches has only two.
    steps = 3 if accumulation == 1 else 2
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=steps)
    torch.manual_seed(0)
    ours = adapted(family)
    trainer = RecipeTrainer(ours, args, rows, rows, collate, {}, [])
    trainer.train()

    torch.manual_seed(0)
    theirs = adapted(family)
    # The reference is Transformers' own loss on the same rows in the same order.
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, _=None: SequentialSampler(self.train_dataset))
    order = [rows[index] for index in RowOrder([0] * len(rows), args.seed, lambda: 0)]
    reference = Trainer(model=theirs, args=args, train_dataset=order, data_collator=collate)
    if family == "bert":
        # A classifier takes num_items_in_batch and ignores it; Transformers then forgets to average over the batches.
        reference.model_accepts_loss_kwargs = False
    reference.train()

    for mine, other in zip(trainer.state.log_history[:steps], reference.state.log_history[:steps], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert float(mine["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, weights[name], atol=2e-4, rtol=1e-3)


def test_the_loss_on_dev_is_the_mean_over_all_labels(adapted: Callable[..., PeftModel], tmp_path: Path) -> None:
    rows, collate = features("llama", 7), PadCollator(byte_tokenizer())
    model = adapted("llama")
    trainer = RecipeTrainer(model, arguments(tmp_path, per_device_eval_batch_size=3), rows, rows, collate, {}, [])
    before = torch.get_rng_state()
    found = trainer.evaluate()["eval_loss"]
    assert torch.equal(before, torch.get_rng_state())
    total, count = 0.0, 0
    for row in rows:  # one at a time, all logits, no padding
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"]):
            if label != -100:
                total -= float(logits[position - 1].log_softmax(-1)[label])
                count += 1
    assert found == pytest.approx(total / count, rel=1e-5)


def test_row_order_is_a_permutation_fixed_by_seed_and_epoch() -> None:
    lengths = list(range(23))
    first = list(RowOrder(lengths, 1, lambda: 0))
    assert sorted(first) == list(range(23))
    assert first == list(RowOrder(lengths, 1, lambda: 0))
    assert first != list(RowOrder(lengths, 1, lambda: 1))
    assert first != list(RowOrder(lengths, 2, lambda: 0))


@pytest.mark.parametrize("count", [5, 64, 1001])
def test_grouped_rows_share_batches_with_rows_of_like_length(count: int) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (count,), generator=draw).tolist()

    def padding(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[i : i + 8]] for i in range(0, count, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    grouped = list(RowOrder(lengths, 0, lambda: 0, batch_size=8))
    assert sorted(grouped) == list(range(count))
    mixed = list(RowOrder(lengths, 0, lambda: 0))
    assert padding(grouped) < 0.2 * padding(mixed) or count < 8


def write_checkpoint(folder: Path, step: int, source: Path) -> Path:
    """A checkpoint made complete by hand; ``source`` has an adapter's two files."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, path / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes((source / name).read_bytes())
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    return path


def test_only_checkpoints_written_to_their_end_count(adapted: Callable[..., PeftModel], tmp_path: Path) -> None:
    adapted("llama").save_pretrained(str(tmp_path / "adapter"))
    folder = tmp_path / "checkpoints"
    assert complete_checkpoints(folder) == []
    paths = {step: write_checkpoint(folder, step, tmp_path / "adapter") for step in (2, 4, 10, 12, 14, 16, 18)}
    weights = paths[4] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    (paths[12] / "trainer_state.json").write_text('{"global_step": ', encoding="utf-8")
    (paths[14] / "optimizer.pt").unlink()
    (paths[18] / "rng_state_1.pth").touch()  # of a second process, which was killed as it began to write
    assert [checkpoint_step(path) for path in complete_checkpoints(folder)] == [2, 10, 16]
    (paths[16] / "diverged").touch()
    assert [checkpoint_step(path) for path in complete_checkpoints(folder)] == [2, 10]


def test_a_gradient_that_is_not_finite_stops_before_the_step(adapted: Callable[..., PeftModel], tmp_path: Path) -> None:
    rows = features("llama")
    model = adapted("llama")
    broken = next(p for p in model.parameters() if p.requires_grad)
    broken.register_hook(lambda grad: grad * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = RecipeTrainer(model, arguments(tmp_path), rows, rows, PadCollator(byte_tokenizer()), {}, [])
    with pytest.raises(GatewiseError, match="the gradient is not finite at step 1, so the run stopped: there is no"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("norm", [float("inf"), float("nan"), -1.0])
def test_under_deepspeed_the_norm_of_the_gradient_tells(adapted: Callable[..., PeftModel], tmp_path: Path, norm: float) -> None:
    """By then it has taken or left out its step, and the gradients are gone."""
    model, rows = adapted("llama"), features("llama")
    trainer = RecipeTrainer(model, arguments(tmp_path), rows, rows, PadCollator(byte_tokenizer()), {}, [])
    trainer.is_deepspeed_enabled, trainer.current_gradient_accumulation_steps = True, 1
    batch = PadCollator(byte_tokenizer())(rows[:2])
    for finite in (None, 0.5):
        trainer.deepspeed = SimpleNamespace(get_global_grad_norm=lambda value=finite: value)
        trainer.training_step(model, dict(batch))
    trainer.deepspeed = SimpleNamespace(get_global_grad_norm=lambda: norm)
    with pytest.raises(GatewiseError, match="the gradient is not finite at step 1, so the run stopped"):
        trainer.training_step(model, dict(batch))


def test_early_stopping_counts_evaluations_without_progress() -> None:
    losses = (1.0, 0.8, 0.9, 0.79, 0.8, 0.8)
    log = [{"eval_loss": loss, "eval_accuracy": 1 - loss} for loss in losses]
    by_loss, by_accuracy = (
        SimpleNamespace(metric_for_best_model=f"eval_{name}", greater_is_better=name != "loss") for name in ("loss", "accuracy")
    )
    for args in (by_loss, by_accuracy):
        assert [has_stopped_early(log[:count], 2, args) for count in range(1, 7)] == [False, False, False, False, False, True]
    assert not has_stopped_early(log, None, by_loss)
