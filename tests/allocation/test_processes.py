"""RankAllocation in several processes: the same ranks, losses and adapter as one process on the same global batch."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from several_processes import in_processes
from tiny_models import tiny_base
from transformers import Trainer, TrainerCallback, TrainingArguments

from gatewise import GatewiseError, RankAllocation, processes
from gatewise.allocation.scoring import parts_of
from gatewise.allocation.slots import ranks
from gatewise.internals.sharding import share_cpu_models

FSDP = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
SCORES = ("path_moments", "taylor", "ablation", "sensitivity", "path_integral")


class Killed(TrainerCallback):
    """Ends training after a step as a kill does: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def data() -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Rows of several lengths to train on, and a batch of padded ones to score on."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (48, 10), generator=generator)
    held = torch.randint(1, 60, (6, 9), generator=generator)
    lengths = torch.tensor([9, 4, 7, 9, 5, 3])
    mask = (torch.arange(9) < lengths[:, None]).long()
    scored = {"input_ids": held * mask, "attention_mask": mask, "labels": held.masked_fill(mask == 0, -100)}
    return [{"input_ids": row, "labels": row.clone()} for row in ids], scored


def trained(
    folder: str, settings: dict[str, Any], score: str = "path_moments", resume: bool = False, kill: int | None = None
) -> Any:
    """One run over a global batch of eight rows: losses, rounds, the adapter, and the ranks after loading what was saved."""
    share_cpu_models()
    count = processes.count() if torch.distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base("llama"), config)
    rows, scored = data()
    allocation = RankAllocation(score=score, rounds=2, first_round=2, recover=2, validation_batch=scored)
    accumulate = settings.get("gradient_accumulation_steps", 1)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=6,
        per_device_train_batch_size=8 // count // accumulate,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if count > 1 else None,
        **settings,
    )
    callbacks = [allocation, *([] if kill is None else [Killed(kill)])]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    rounds = [(one.scores, one.pruned, one.grown, one.loss_before, one.loss_after) for one in allocation.history]
    state = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer.save_model(f"{folder}/adapter")
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rounds": rounds,
        "state": state,
        "sharded": processes.is_sharded(model),
    }


def assert_same_run(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    assert other["losses"] == pytest.approx(one["losses"], rel=tolerance, abs=tolerance)
    assert len(one["rounds"]) == len(other["rounds"])
    for (scores, pruned, grown, *losses), (others, also_pruned, also_grown, *also) in zip(
        one["rounds"], other["rounds"], strict=True
    ):
        assert (also_pruned, also_grown) == (pruned, grown)
        assert also == pytest.approx(losses, rel=tolerance)
        for path, values in scores.items():
            assert others[path] == pytest.approx(
                values, rel=1e-3, abs=tolerance * max(abs(v) for row in scores.values() for v in row)
            )
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, {}),
        (4, {}),
        (2, FSDP),
        (4, FSDP),
        (2, {**FSDP, "gradient_accumulation_steps": 2}),
        (2, {"gradient_accumulation_steps": 2}),
    ],
    ids=["2-ddp", "4-ddp", "2-fsdp", "4-fsdp", "2-fsdp-accumulating", "2-ddp-accumulating"],
)
def test_several_processes_train_the_adapter_of_one(tmp_path: Path, count: int, settings: dict[str, Any]) -> None:
    alone = {key: value for key, value in settings.items() if key not in FSDP}
    one = trained(str(tmp_path / "one"), alone)
    several = in_processes(count, tmp_path, trained, str(tmp_path / "several"), settings)
    assert len(one["rounds"]) == 2
    for found in several:
        assert found["sharded"] == ("fsdp" in settings)
        assert_same_run(one, found)
    loaded = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "several" / "adapter")
    state = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert {name: tuple(value.shape) for name, value in state.items()} == {n: tuple(v.shape) for n, v in one["state"].items()}
    for name, value in state.items():
        torch.testing.assert_close(value.detach(), several[0]["state"][name])
    assert sum(ranks(loaded).values()) == 42


def scores_of(names: tuple[str, ...], settings: dict[str, Any], folder: str) -> Any:
    """Every score of one round each, of the same adapter."""
    return {name: trained(f"{folder}/{name}", {**settings}, name)["rounds"][0][0] for name in names}


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["ddp", "fsdp"])
def test_shared_out_scores_are_those_of_one_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    alone = scores_of(SCORES, {}, str(tmp_path / "one"))
    for found in in_processes(2, tmp_path, scores_of, SCORES, settings, str(tmp_path / "two")):
        for name, scores in alone.items():
            largest = max(abs(value) for values in scores.values() for value in values)
            for path, values in scores.items():
                assert found[name][path] == pytest.approx(values, rel=1e-3, abs=1e-4 * largest), (name, path)


def interrupted(folder: str, settings: dict[str, Any]) -> Any:
    whole = trained(f"{folder}/whole", settings)
    trained(f"{folder}/cut", settings, kill=5)
    return whole, trained(f"{folder}/cut", settings, resume=True)


@pytest.mark.parametrize("settings", [{}, FSDP], ids=["ddp", "fsdp"])
def test_a_run_cut_between_rounds_resumes_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    for whole, resumed in in_processes(2, tmp_path, interrupted, str(tmp_path), settings):
        assert resumed["rounds"] == whole["rounds"]
        assert resumed["state"].keys() == whole["state"].keys()
        assert all(torch.equal(resumed["state"][name], value) for name, value in whole["state"].items())


def parts(count_of_rows: int) -> Any:
    torch.distributed.init_process_group("gloo")
    rows, _ = data()
    ids = torch.stack([row["input_ids"] for row in rows[:count_of_rows]])
    found = parts_of(tiny_base("llama"), {"input_ids": ids, "labels": ids})
    return [part["input_ids"] for part in found.own], found.copies, [int(n) for n in found.total(torch.tensor([1.0]))[0]]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_every_row_is_scored_once(tmp_path: Path, rows: int) -> None:
    found = in_processes(2, tmp_path, parts, rows)
    assert all(copies == 1 for _, copies, _ in found)
    seen = [tuple(row.tolist()) for own, _, _ in found for part in own for row in part]
    assert sorted(seen) == sorted(tuple(row["input_ids"].tolist()) for row in data()[0][:rows])


def refused(settings: dict[str, Any]) -> str:
    try:
        trained("unused", settings)
    except GatewiseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("config", "sentence"),
    [({"version": 1}, "FSDP's version is 1"), ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false")],
)
def test_settings_of_fsdp_that_cannot_keep_an_adapter_whole_are_refused(
    tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    for message in in_processes(2, tmp_path, refused, {"fsdp": True, "fsdp_config": config}):
        assert sentence in message
