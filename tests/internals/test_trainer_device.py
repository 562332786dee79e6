"""A Trainer on a device that is neither the CPU nor the first accelerator."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tiny_models import tiny_base
from transformers import Trainer, TrainingArguments

from gatewise.internals.trainer_device import run_on

CHANGED = "Transformers or Accelerate keep the device elsewhere: read TrainingArguments._setup_devices and mend trainer_device.py"


def test_model_and_batches_go_to_the_device_that_is_named(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    run_on(arguments, torch.device("meta"))
    assert arguments.device.type == "meta", CHANGED
    trainer = Trainer(model=tiny_base("llama"), args=arguments)
    assert trainer.accelerator.device.type == "meta", CHANGED
    assert {parameter.device.type for parameter in trainer.model.parameters()} == {"meta"}, CHANGED
    assert trainer._prepare_inputs({"input_ids": torch.ones(1, 2)})["input_ids"].device.type == "meta"
    assert arguments.n_gpu <= 1


@pytest.mark.parametrize(("name", "set_to"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_without_a_number_is_the_current_one(name: str, set_to: list[int], tmp_path: Path, monkeypatch: Any) -> None:
    """``torch.cuda.set_device`` refuses it, without a GPU too."""
    given: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", given.append, raising=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    run_on(arguments, torch.device(name))
    assert (arguments.device, given) == (torch.device(name), set_to)


def test_the_next_trainer_is_where_it_belongs(tmp_path: Path) -> None:
    run_on(TrainingArguments(output_dir=str(tmp_path), report_to="none"), torch.device("meta"))
    plain = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert plain.device.type == "cpu"
    assert PartialState().device.type == "cpu"
