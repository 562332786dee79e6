"""RankAllocation in several processes: the same ranks, losses and adapter as one process on the same global batch."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from several_processes import in_processes
from tiny_models import tiny_base
from transformers import Trainer, TrainingArguments

from gatewise import ConstantBudget, RankAllocation, processes, scores
from gatewise.allocation.scores import NAMES
from gatewise.allocation.scoring import parts_of
from gatewise.internals.sharding import share_cpu_models
from gatewise.internals.zero import without_compiling

FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SEEN: dict[str, scores.Scores] = {}
"""What each score said in the first round of a run with ``all_scores``."""


def all_scores(model: Any, batch: Any, adapter: str) -> scores.Scores:
    """path_moments, and in the first round the numbers of every other score too."""
    if not SEEN:
        SEEN.update({name: getattr(scores, name)(model, batch, adapter=adapter) for name in NAMES})
    return scores.path_moments(model, batch, adapter=adapter)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed file in which nothing of the tiny model is too small to be cut up."""
    sharded = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {"deepspeed": {**dict.fromkeys(AUTO, "auto"), "zero_optimization": sharded, **more}}


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
    folder: str,
    settings: dict[str, Any],
    score: Any = "path_moments",
    resume: str | None = None,
    rounds: int = 2,
    scored_rows: slice = slice(None),
) -> Any:
    """One run over a global batch of eight rows: losses, rounds, the adapter, and the ranks after loading what was saved."""
    share_cpu_models()
    if resume is None:
        SEEN.clear()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which a run with FSDP leaves behind
    settings = dict(settings)
    deepspeed = settings.pop("deepspeed", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(deepspeed is not None).lower()
    if deepspeed is not None:
        os.environ |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": json.dumps(deepspeed), "DS_ACCELERATOR": "cpu"}
        without_compiling()
    count = processes.count() if torch.distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    settings_of_lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_base("llama"), settings_of_lora)
    rows, scored = data()
    held_out = {name: value[scored_rows] for name, value in scored.items()}
    allocation = RankAllocation(score, ConstantBudget(rounds=rounds, first_round=2, recover=2), held_out)
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
        use_cpu=deepspeed is None,
        ddp_backend="gloo" if count > 1 else None,
        **settings,
    )
    arguments.bf16 = "bf16" in (deepspeed or {})  # which arguments refuse to be made with on a CPU, but DeepSpeed does there too
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[allocation])
    trainer.train(resume_from_checkpoint=resume)
    done = [(one.scores, one.pruned, one.grown, one.loss_before, one.loss_after) for one in allocation.history]
    state = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer.save_model(f"{folder}/adapter")
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "rounds": done,
        "state": state,
        "sharded": processes.is_sharded(model),
        "scores": dict(SEEN),
    }


def assert_same_run(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    assert other["losses"] == pytest.approx(one["losses"], rel=tolerance, abs=tolerance)
    assert len(one["rounds"]) == len(other["rounds"])
    for (of_ranks, pruned, grown, *losses), (others, also_pruned, also_grown, *also) in zip(
        one["rounds"], other["rounds"], strict=True
    ):
        assert (also_pruned, also_grown) == (pruned, grown)
        assert also == pytest.approx(losses, rel=tolerance)
        for path, values in of_ranks.items():
            assert others[path] == pytest.approx(
                values, rel=1e-3, abs=tolerance * max(abs(v) for row in of_ranks.values() for v in row)
            )
    torch.testing.assert_close(other["state"], one["state"], rtol=1e-3, atol=2e-5)


SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": FSDP,
    "ddp-accumulating": {"gradient_accumulation_steps": 2},
    "fsdp-accumulating": {**FSDP, "gradient_accumulation_steps": 2},
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-accumulating": {**zero(3), "gradient_accumulation_steps": 2},
}
SHARING = ("ddp", "fsdp", "zero3")
RESUMED = ("ddp", "fsdp", "zero2", "zero3")
HALF = zero(2, bf16={"enabled": True})
if find_spec("deepspeed") is None:
    SETTINGS = {name: settings for name, settings in SETTINGS.items() if "zero" not in name}
    SHARING, RESUMED = SHARING[:2], RESUMED[:2]


def parts(count_of_rows: int) -> tuple[list[torch.Tensor], int]:
    rows, _ = data()
    ids = torch.stack([row["input_ids"] for row in rows[:count_of_rows]])
    found = parts_of(tiny_base("llama"), {"input_ids": ids, "labels": ids})
    return [part["input_ids"] for part in found.own], found.copies


def all_of_two(folder: str) -> dict[str, Any]:
    """All that tests ask of two processes, which take longer to start than to work."""
    found: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        found[name] = trained(f"{folder}/{name}", settings, all_scores if name in SHARING else "path_moments")
    for name in RESUMED:
        score = all_scores if name in SHARING else "path_moments"
        found[f"{name}-resumed"] = trained(
            f"{folder}/{name}-resumed", SETTINGS[name], score, resume=f"{folder}/{name}/checkpoint-3"
        )
    mine = slice(3 * processes.index(), 3 * processes.index() + 3)
    found["own-rows"] = trained(f"{folder}/own-rows", SETTINGS["ddp"], scored_rows=mine)
    if "zero2" in SETTINGS:
        found["zero2-half"] = trained(f"{folder}/half", HALF, rounds=1)
    found["parts"] = {rows: parts(rows) for rows in (1, 3, 7)}
    return found


def one_of_four(folder: str) -> dict[str, Any]:
    """The strategy that cuts up most: pieces of a rank, in processes that have none of some of them."""
    return trained(folder, SETTINGS[SHARING[-1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    of = {"ddp": all_scores, "ddp-accumulating": "path_moments"}
    return {name: trained(f"{folder}/one/{name}", SETTINGS[name], score) for name, score in of.items()}


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    (folder / "two").mkdir()
    return in_processes(2, folder / "two", all_of_two, str(folder / "two"))


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    (folder / "four").mkdir()
    return in_processes(4, folder / "four", one_of_four, str(folder / "four"))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_the_adapter_of_one(one: dict[str, Any], two: list[dict[str, Any]], folder: Path, name: str) -> None:
    expected = one["ddp-accumulating" if "accumulating" in name else "ddp"]
    assert len(expected["rounds"]) == 2
    for found in two:
        assert found[name]["sharded"] == name.startswith(("fsdp", "zero3"))
        assert_same_run(expected, found[name])
    loaded = PeftModel.from_pretrained(tiny_base("llama"), folder / "two" / name / "adapter")
    state = {name: p.detach() for name, p in loaded.named_parameters() if "lora_" in name}
    torch.testing.assert_close(state, two[0][name]["state"])
    assert 1392 - 40 < sum(p.numel() for p in state.values()) <= 1392  # the largest rank has 40


def test_four_processes_train_the_adapter_of_one(one: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for found in four:
        assert_same_run(one["ddp"], found)


def test_processes_with_rows_of_their_own_take_the_same_decisions(two: list[dict[str, Any]]) -> None:
    """Without an agreement they would decide differently."""
    first, second = (found["own-rows"] for found in two)
    assert len(first["rounds"]) == 2
    assert first["rounds"] == second["rounds"]
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)


def test_shared_out_scores_are_those_of_one_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one["ddp"]["scores"]
    assert expected.keys() == set(NAMES)
    for score, of_modules in expected.items():
        largest = max(float(values.abs().max()) for values in of_modules.values())
        for name in SHARING:
            for found in two:
                torch.testing.assert_close(found[name]["scores"][score], of_modules, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_cut_between_rounds_resumes_bit_for_bit(two: list[dict[str, Any]], name: str) -> None:
    for found in two:
        whole, resumed = found[name], found[f"{name}-resumed"]
        assert resumed["rounds"] == whole["rounds"]
        torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=0)


@pytest.mark.skipif("zero2" not in SETTINGS, reason="DeepSpeed is not installed")
def test_half_precision_under_zero_trains_on_after_a_round(tmp_path: Path, two: list[dict[str, Any]]) -> None:
    """Its float32 copy of each weight is pruned and grown with it, and a round leaves the weights where ZeRO writes them."""
    expected = trained(str(tmp_path), {}, rounds=1)
    for found in two:
        half = found["zero2-half"]
        assert half["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert [one[1:3] for one in half["rounds"]] == [one[1:3] for one in expected["rounds"]]
        for name, value in expected["state"].items():
            assert half["state"][name].dtype == torch.bfloat16
            torch.testing.assert_close(half["state"][name].float(), value, rtol=0, atol=5e-3)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_every_row_is_scored_once(two: list[dict[str, Any]], rows: int) -> None:
    assert all(copies == 1 for _, copies in (found["parts"][rows] for found in two))
    seen = [tuple(row.tolist()) for found in two for part in found["parts"][rows][0] for row in part]
    assert sorted(seen) == sorted(tuple(row["input_ids"].tolist()) for row in data()[0][:rows])
