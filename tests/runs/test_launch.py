"""Runs in several processes through the command line: the same adapter as of one, one message when they fail, and resuming."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several_processes import FORKS, forked, launched
from tiny_run import write_recipe
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.internals.sharding import join
from gatewise.runs import launch
from gatewise.runs.launch import environment
from gatewise.runs.recipe import LaunchSection

ALLOCATION = {"score": "path_moments", "rounds": 2, "first_round": 2, "recover": 2}
LONGER = ("--set", "training.max_steps=30")


class Started(Exception):  # noqa: N818
    """With the environments that processes would have begun in."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    peft = {"r": 2, "lora_alpha": 4}
    return write_recipe(tmp_path, method="alora", allocation=ALLOCATION, peft=peft, dtype="float32")


def words(recipe: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(recipe), "--device", "cpu", "--output", str(output), *more]


def gatewise(recipe: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A run of one process is run in this one."""
    if "--processes" in more:
        return launched(recipe.parent, *words(recipe, output, *more))
    done = CliRunner().invoke(app, words(recipe, output, *more))
    return subprocess.CompletedProcess(more, done.exit_code, done.stdout, done.stderr)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path, tolerance: float = 5e-3) -> None:
    """But for rounding, which Adam makes into a good part of a step where a gradient is next to nothing."""
    expected, found = adapter(one), adapter(other)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def test_two_processes_train_the_adapter_of_one(recipe: Path, tmp_path: Path) -> None:
    alone = gatewise(recipe, tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    for strategy in ("ddp", "fsdp2"):
        done = gatewise(recipe, tmp_path / strategy, "--processes", "2", "--strategy", strategy)
        assert done.returncode == 0, done.stderr
        assert "2 processes" in done.stderr
        assert done.stdout.count("parameters") == alone.stdout.count("parameters") == 1  # one summary
        assert_same_adapter(tmp_path / "one", tmp_path / strategy)
        told = json.loads((tmp_path / strategy / "metrics.json").read_text())
        assert told["ranks"] == metrics["ranks"]
        assert told["metrics"]["dev"]["before"] == pytest.approx(metrics["metrics"]["dev"]["before"])
        assert told["metrics"]["dev"]["after"] == pytest.approx(metrics["metrics"]["dev"]["after"], rel=1e-3)
        assert [entry["loss"] for entry in told["log"]] == pytest.approx([entry["loss"] for entry in metrics["log"]], rel=1e-4)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_a_run_goes_on_with_another_strategy_of_deepspeed_or_without(recipe: Path, tmp_path: Path) -> None:
    """ZeRO-3 is told in a file of DeepSpeed's own, by which nothing is too small to be cut up."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file = tmp_path / "zero3.json"
    file.write_text(
        json.dumps({**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    strategies: dict[str, tuple[str, ...]] = {
        "alone": (),
        "zero2": ("--processes", "2", "--strategy", "zero2"),
        "zero3": ("--processes", "2", "--strategy", "zero3", "--set", f"launch.deepspeed_config_file={file}"),
    }
    for name in ("alone", "zero3"):
        done = gatewise(recipe, tmp_path / name, *strategies[name])
        assert done.returncode == 0, done.stderr
    assert_same_adapter(tmp_path / "alone", tmp_path / "zero3", 1e-4)
    for name, then in (("alone", "zero2"), ("zero3", "alone")):
        output = tmp_path / f"{name}-{then}"
        shutil.copytree(tmp_path / name, output)
        for finished in ("adapter", "checkpoints/checkpoint-8"):
            shutil.rmtree(output / finished)
        (output / "metrics.json").unlink()
        done = gatewise(recipe, output, *strategies[then], "--resume")
        assert done.returncode == 0, done.stderr
        assert json.loads((output / "metrics.json").read_text())["resumed_from"] == 6
        assert_same_adapter(tmp_path / "alone", output, 1e-4)


def test_two_levels_over_sharded_models(tmp_path: Path) -> None:
    """MiLoRA's activations on rows of their own, under FSDP2, with measurements and saves between.

    Not to the last digit: each process centres by its own prompts.
    """
    recipe = write_recipe(tmp_path, method="milora", dtype="float32")
    logs = []
    for name, more in (("one", ()), ("fsdp2", ("--processes", "2", "--strategy", "fsdp2", "--set", "training.eval_every=2"))):
        done = gatewise(recipe, tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
        told = json.loads((tmp_path / name / "metrics.json").read_text())
        assert told["routing"]
        logs.append([entry["loss"] for entry in told["log"] if "loss" in entry])
    assert logs[1] == pytest.approx(logs[0], abs=0.02)


@pytest.mark.skipif(not (FORKS and Path("/proc/self/task").is_dir()), reason="finds the process to kill in /proc")
def test_a_run_whose_process_is_killed_between_rounds_says_so_once_and_is_resumed(tmp_path: Path) -> None:
    """By one process alone. Other strategies go on where DeepSpeed's are shown."""
    rounds = ALLOCATION | {"recover": 22}  # after steps 2 and 24
    recipe = write_recipe(tmp_path, method="alora", allocation=rounds, peft={"r": 2, "lora_alpha": 4}, dtype="float32")
    whole, output = tmp_path / "whole", tmp_path / "cut"
    done = gatewise(recipe, whole, *LONGER)
    assert done.returncode == 0, done.stderr
    running, _, told = forked(tmp_path, *words(recipe, output, *LONGER, "--processes", "2", "--strategy", "fsdp2"))
    checkpoint = output / "checkpoints" / "checkpoint-6" / "trainer_state.json"  # then the one before it is whole
    deadline = time.monotonic() + 500
    while not checkpoint.is_file() and running.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    _, second = children_of(running.pid)  # in the order in which they were started
    os.kill(second, signal.SIGKILL)
    running.join(300)
    errors = told.read_text()
    assert running.exitcode == 1
    assert errors.count("error: ") == 1
    assert re.search(r"error: process 2 of 2 was ended by SIGKILL, so the others were ended too; step \d+ is kept", errors)
    assert "Traceback" not in errors
    resumed = gatewise(recipe, output, *LONGER, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, output))
    assert found["resumed_from"] >= 4
    assert found["ranks"] == expected["ranks"]
    assert_same_adapter(whole, output)


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_what_a_user_can_put_right_is_said_once(recipe: Path, tmp_path: Path) -> None:
    said = words(recipe, tmp_path / "out", "--processes", "2", "--set", "data.dev=missing.jsonl")
    done = launched(tmp_path, *said, anew=True)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "missing.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = gatewise(recipe, tmp_path / "out", "--processes", "2", "--set", "training.batch_size=3")
    assert done.returncode == 2
    assert done.stderr.count("error: training.batch_size is 3, which 2 processes cannot share: give a multiple of 2") == 1


def test_a_setting_of_the_launcher_counts_in_one_process_too(recipe: Path, tmp_path: Path) -> None:
    done = gatewise(recipe, tmp_path / "out", "--set", "launch.proceses=2")
    assert done.returncode == 2
    assert "launch.proceses is not a known key" in done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GatewiseError, match="2 processes were asked for, but there are 1 GPUs here"):
        join(torch.device("cuda"))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_processes_on_the_cpu_see_no_gpu(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate under DeepSpeed, and FSDP, take the GPUs that there are, whatever the device is."""

    def begin(name: str, command: str, words: object, environments: object, logs: object) -> None:
        raise Started(environments)

    monkeypatch.setattr(launch, "start_processes", begin)
    with pytest.raises(Started) as started:
        launch.start(["train"], LaunchSection(processes=2), on_cpu=on_cpu)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in started.value.args[0].values()] == [("" if on_cpu else None)] * 2


def test_strategies_are_environment_variables_of_accelerate() -> None:
    made = environment(LaunchSection(processes=2, strategy="fsdp2", fsdp_offload_params=True))
    assert {name: made[name] for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS")} == {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "true",
    }
    assert made["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert "ACCELERATE_USE_FSDP" not in environment(LaunchSection(processes=2))


def test_deepspeed_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.runs.launch.find_spec", lambda _: None)
    with pytest.raises(GatewiseError, match=r"pip install 'gatewise\[deepspeed\]'"):
        environment(LaunchSection(processes=2, strategy="zero2"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"fsdp_ofload_params": True}, "launch.fsdp_ofload_params is not a known key: expected processes, strategy"),
        ({"mixed_precision": "fp3"}, "launch: accelerate does not take these settings"),
        ({"num_machines": 2}, "on one machine"),
        ({"num_processes": 4}, "launch.num_processes is not a known key: expected processes"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(GatewiseError, match=sentence):
        environment(LaunchSection(processes=2, **settings))
