"""A comparison is carried out run by run: in one process or several, stopped and gone on with, within its time."""

import io
import json
import os
import shutil
import signal
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from rich.console import Console
from tiny_run import stop_at, write_recipe, write_rows
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.comparing import running
from gatewise.comparing.arms import Arm
from gatewise.comparing.rates import rate_at
from gatewise.errors import DivergedError, GatewiseError
from gatewise.runs.recipe import Recipe, load_recipe
from gatewise.runs.run import RunResult
from gatewise.runs.trainer import RecipeTrainer

SILENT = Console(quiet=True)
Quality = Callable[[str, float, int], float]


TRAINING = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "save_every": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """One whose base model is not there."""
    (tmp_path / "llama").mkdir()
    write_rows(tmp_path / "train.jsonl", 26, seed=1)
    write_rows(tmp_path / "dev.jsonl", 10, seed=2)
    return write_recipe(tmp_path, training=TRAINING)


class Trainings:
    """Stands for ``train``: writes each call as a line of a file, which several processes share, and comes to a known quality."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, quality: Quality = lambda _, rate, seed: -abs(rate - 0.01)
    ) -> None:
        self.file, self.quality = folder / "calls.jsonl", quality
        monkeypatch.setattr(running, "train", self.train)
        monkeypatch.setattr(running, "_tried", lambda *_: 0.0)
        monkeypatch.setattr(running, "arms_of", self.arms_of)
        monkeypatch.setattr(running, "same_size", lambda arms: arms)
        monkeypatch.setattr(running, "draw", lambda _, out: out.touch())
        monkeypatch.setattr(running, "forgotten", lambda *_, **__: 0.1)

    def arms_of(self, recipe: Path, names: Sequence[str], overrides: Sequence[str]) -> list[Arm]:
        return [Arm(name, load_recipe(recipe, [*overrides, f"method={name}"]), (), 1) for name in names]

    def train(self, recipe: Recipe, output: Path, *, measured: Sequence[str], resume: bool, **_: Any) -> RunResult:
        rate = recipe.training.learning_rate
        with self.file.open("a") as file:
            file.write(json.dumps([recipe.method, rate, recipe.seed, list(measured)]) + "\n")
        value = self.quality(recipe.method, rate, recipe.seed)
        metrics: Any = {name: {"after": {"accuracy": value, "loss": 1.0}} for name in measured}
        (output / "adapter").mkdir(parents=True)
        rows = {name: [value] for name in measured}
        return RunResult(
            output,
            metrics,
            {"adapter": 1},
            {"total": 1.0, "evaluation": 0.0},
            4,
            "float32",
            "cpu",
            None,
            {},
            rows=rows,
            peak_memory=None,
        )

    @property
    def calls(self) -> list[tuple[str, float, int, list[str]]]:
        return [tuple(json.loads(line)) for line in self.file.read_text().splitlines()] if self.file.exists() else []  # type: ignore[misc]


def compared(recipe: Path, methods: Sequence[str] = ("lora", "dora"), **settings: Any) -> dict[str, Any]:
    return running.compare(recipe, methods, recipe.parent / "out", **{"seeds": 2, "rates": 3, "console": SILENT, **settings})


def in_another_process(work: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_rates_are_found_on_tuning_rows_alone_and_final_seeds_tuned_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {"lora": rate_at(0.01, 1), "dora": rate_at(0.01, 0)}
    trainings = Trainings(tmp_path, monkeypatch, lambda method, rate, seed: 1 - abs(rate - best[method]))
    content = compared(recipe, console=(console := Console(file=io.StringIO(), width=200)))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    before, between, after = told.split(" is found")  # before the first run, and when the rates are known
    assert ("seed 1000" in before, "seed 1002" in between, "seed 0" in between, "seed 0" in after) == (False, True, False, True)
    assert {arm["name"]: arm["learning_rate"] for arm in content["arms"]} == best
    assert (tmp_path / "out/compare.png").is_file()
    assert content["notes"][-1].startswith("all runs train on the same 20 rows, and other rows would teach otherwise")
    tuning = [call for call in trainings.calls if call[2] >= 1000]
    final = [call for call in trainings.calls if call[2] < 1000]
    assert {tuple(measured) for *_, measured in tuning} == {("tuning",)}
    assert sorted(final) == sorted((method, best[method], seed, ["dev", "test"]) for method in best for seed in (0, 1))
    once = [tuple(call[:3]) for call in trainings.calls]
    assert len(once) == len(set(once))


def test_what_was_forgotten_has_the_trained_models_memory_and_costs_no_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self) -> None:
            self.cycle = self

    models: list[weakref.ref[Model]] = []

    def quality(method: str, rate: float, seed: int) -> float:
        models.append(weakref.ref(Model()))
        return 0.5

    def forgotten(*_: Any, **__: Any) -> float:
        assert models[-1]() is None
        raise torch.OutOfMemoryError("CUDA out of memory")

    Trainings(tmp_path, monkeypatch, quality)
    monkeypatch.setattr(running, "forgotten", forgotten)
    content = compared(recipe, ["lora"], rates=1, console=(console := Console(file=io.StringIO(), width=200)))
    assert (content["missing"], content["arms"][0]["mean"]["dev"]) == (0, 50)
    assert "warning: what was forgotten could not be measured: CUDA out of memory" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_diverges_is_the_worst_of_its_rates_and_the_comparison_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quality(method: str, rate: float, seed: int) -> float:
        if rate > 0.015:
            raise DivergedError("the loss is nan")
        return rate

    Trainings(tmp_path, monkeypatch, quality)
    [arm] = compared(recipe, ["lora"])["arms"]
    assert arm["learning_rate"] == 0.01
    assert json.loads((tmp_path / "out/runs/lora/0.018-1000.json").read_text())["diverged"]


def test_a_run_that_fails_otherwise_ends_the_comparison_with_its_sentence(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quality(method: str, rate: float, seed: int) -> float:
        if method == "dora":
            raise GatewiseError("row 3 has no label")
        return -rate

    trainings = Trainings(tmp_path, monkeypatch, quality)
    for count in (1, 1):
        with pytest.raises(GatewiseError, match="row 3 has no label"):
            compared(recipe, rates=1)
        assert len([*(tmp_path / "out/runs/lora").glob("*.json")]) == count
    assert [call[0] for call in trainings.calls] == ["lora", "dora", "dora"]


def test_what_a_killed_process_had_finished_is_kept(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(tmp_path, monkeypatch)
    trains = trainings.train

    def killed(*args: Any, **settings: Any) -> RunResult:
        if len(trainings.calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return trains(*args, **settings)

    monkeypatch.setattr(running, "train", killed)
    _, status = os.waitpid(in_another_process(lambda: compared(recipe, ["lora"])), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(trainings.calls) == 3
    monkeypatch.setattr(running, "train", trains)
    assert not compared(recipe, ["lora"])["missing"]
    made = [tuple(call[:3]) for call in trainings.calls]
    assert len(made) == len(set(made))
    compared(recipe, ["lora"])
    assert len(trainings.calls) == len(made)


def test_several_processes_share_a_folder_and_make_each_run_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(tmp_path, monkeypatch, lambda _, rate, seed: time.sleep(0.02) or -abs(rate - 0.01))
    child = in_another_process(lambda: compared(recipe, seeds=1))
    assert not compared(recipe, seeds=1)["missing"]
    os.waitpid(child, 0)
    made = [tuple(call[:3]) for call in trainings.calls]
    assert len(made) == len(set(made)) == len([*(tmp_path / "out/runs").rglob("*.json")])


def test_no_run_begins_that_would_not_end_in_time(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(tmp_path, monkeypatch)
    monkeypatch.setattr(running, "_tried", lambda *_: 20.0)
    console = Console(file=io.StringIO(), width=200)
    made = compared(recipe, budget_minutes=0.25, console=console)
    # Of each method three rates, two of them twice more, and two seeds.
    assert (trainings.calls, made["missing"]) == ([], 2 * (3 + 2 + 2 + 2))
    assert "no run fits into the time: the shortest takes about 20 s" in console.file.getvalue()  # type: ignore[attr-defined]
    assert compared(recipe, budget_minutes=1)["missing"] == 0


def test_final_runs_take_longer_by_the_rows_that_they_measure(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 26 rows 6 are tuned on, and final runs measure the 10 of dev: 5 seconds more than the search's 3."""
    trainings, made = Trainings(tmp_path, monkeypatch), running._Comparison._make

    def make(self: Any, run: Any) -> None:
        made(self, run)
        file = tmp_path / f"out/runs/{run.name}.json"
        self.found[run.name] = json.loads(file.read_text()) | {"seconds": 10.0, "whole_seconds": 13.0}
        file.write_text(json.dumps(self.found[run.name]))

    monkeypatch.setattr(running._Comparison, "_make", make)
    monkeypatch.setattr(running, "_tried", lambda *_: 14.0)
    made_in_time = compared(recipe, ["lora"], overrides=["data.tuning=6"], budget_minutes=14.5 / 60)
    assert (len(trainings.calls), made_in_time["missing"]) == (7, 2)


def test_what_is_worth_telling_is_told(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(tmp_path, monkeypatch)
    train = trainings.train
    monkeypatch.setattr(
        running, "train", lambda *given, **more: replace(train(*given, **more), remarks=["dev: 3 answers were cut"])
    )
    console = Console(file=io.StringIO(), width=200)
    recipe = write_recipe(tmp_path, peft=None, training=TRAINING)
    compared(recipe, ["lora", "spt"], seeds=1, rates=1, console=console)
    monkeypatch.setattr(running, "_tried", lambda *_: pytest.fail("one final run has shown how long they take"))
    compared(recipe, ["lora", "spt"], seeds=2, rates=1, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "spt has a search of 4 steps before its training" in said
    assert "lora has a search" not in said
    assert said.count("dev: 3 answers were cut") == 4
    assert "is best on dev" not in said
    monkeypatch.setattr(running, "_tried", lambda *_: 0.0)
    size = "stores 1,020 parameters, 2.0% more than lora's 1,000"
    monkeypatch.setattr(
        running,
        "same_size",
        lambda arms: [replace(arms[0], parameters=1000), replace(arms[1], parameters=1020, told=(*arms[1].told, size))],
    )
    content = compared(recipe, ["lora", "spt"], seeds=2, rates=1, console=console, budget_minutes=0)
    assert f"spt {size}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "spt has a search of 4 steps before its training" in content["notes"]
    assert f"spt {size}" not in content["notes"]  # the final adapters store one number each
    monkeypatch.setattr(running, "same_size", lambda arms: arms)
    chosen = write_recipe(tmp_path, training=TRAINING | {"eval_every": 2, "save_every": 2, "load_best": True})
    running.compare(chosen, ["lora"], tmp_path / "best", seeds=1, rates=1, console=console)
    assert "lora ends where it is best on dev" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_of_several_files_are_those_of_each(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(tmp_path, monkeypatch)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:13]), ("b", lines[13:])):
        (tmp_path / f"part-{name}.jsonl").write_text("".join(part))
    one = {"rates": 1, "overrides": [f"data.train={tmp_path}/part-*.jsonl"]}
    compared(recipe, ["lora"], **one)
    (tmp_path / "part-b.jsonl").write_text("".join(lines[14:]))
    with pytest.raises(GatewiseError, match=r"the rows of data\.train are others"):
        compared(recipe, **one)


def test_an_arm_that_cannot_be_trained_is_refused_before_any_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(arm: Arm, *_: Any) -> float:
        if arm.name == "dora":
            raise GatewiseError("arm dora: does not fit")
        return 0.0

    trainings = Trainings(tmp_path, monkeypatch)
    monkeypatch.setattr(running, "_tried", tried)
    with pytest.raises(GatewiseError, match="arm dora: does not fit"):
        compared(recipe)
    assert trainings.calls == []


def test_a_folder_belongs_to_one_comparison_to_which_seeds_rates_and_arms_may_be_added(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = Trainings(tmp_path, monkeypatch)
    compared(recipe, ["lora"], seeds=1)
    before = len(trainings.calls)
    assert len(compared(recipe, ["lora", "dora"], seeds=2)["arms"]) == 2
    assert [call[:3] for call in trainings.calls[before:] if call[0] == "lora"] == [("lora", 0.01, 1)]
    with pytest.raises(GatewiseError, match=r"training\.max_steps of lora was 4, now 5"):
        compared(recipe, overrides=["training.max_steps=5"])
    assert [len(arm["seeds"]) for arm in compared(recipe, ["dora"], seeds=1)["arms"]] == [2]  # nothing is made, or lost
    with pytest.raises(GatewiseError, match=r"training\.max_steps of lora was 4, now 5"):
        compared(recipe, ["lora"], overrides=["training.max_steps=5"])
    (tmp_path / "moved").mkdir()
    moved, made = shutil.copy(tmp_path / "train.jsonl", tmp_path / "moved"), len(trainings.calls)
    compared(recipe, overrides=[f"data.train={moved}"])
    assert len(trainings.calls) == made
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    del plan["arms"]["lora"]["peft"]["use_rslora"]  # as if another version had written it
    (tmp_path / "out/plan.json").write_text(json.dumps(plan))
    with pytest.raises(GatewiseError, match=r"peft\.use_rslora of lora was False, now True"):
        compared(recipe, overrides=["peft.use_rslora=true"])
    assert not compared(recipe)["missing"]
    trainings.quality = lambda *_: float((tmp_path / "train.jsonl").write_text((tmp_path / "dev.jsonl").read_text()))
    with pytest.raises(GatewiseError, match=r"the rows of data\.train are others"):
        compared(recipe, seeds=4)  # they change while it runs
    with pytest.raises(GatewiseError, match=r"the rows of data\.train are others"):
        compared(recipe, overrides=["data.tuning=6"])


def test_an_arm_without_a_finished_run_may_change_and_go(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quality(method: str, rate: float, seed: int) -> float:
        if method == "dora":
            raise GatewiseError("peft.r does not fit")
        return rate

    once, changed = {"seeds": 1, "rates": 1}, ["training.max_steps=3"]
    trainings = Trainings(tmp_path, monkeypatch, quality)
    compared(recipe, **once, budget_minutes=0)  # a look at plan and time
    with pytest.raises(GatewiseError, match=r"peft\.r does not fit"):
        compared(recipe, **once, overrides=changed)
    with pytest.raises(GatewiseError, match=r"training\.max_steps of lora was 3, now 4"):
        compared(recipe, **once)
    other = ["training.max_steps=2"]  # while pi-lora runs, another process changes it
    trainings.quality = lambda *_: compared(recipe, ["pi-lora"], **once, overrides=other, budget_minutes=0)["missing"]
    with pytest.raises(GatewiseError, match=r"training\.max_steps of pi-lora was 2, now 3"):
        compared(recipe, ["lora", "pi-lora"], **once, overrides=changed)
    assert not (tmp_path / "out/runs/pi-lora").exists()


def test_what_a_process_is_making_is_known_whatever_another_one_plans(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, rows = {"seeds": 1, "rates": 1}, tmp_path / "train.jsonl"
    trainings = Trainings(tmp_path, monkeypatch)
    mkdtemp = tempfile.mkdtemp

    def another_begins(**settings: Any) -> str:
        monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
        folder = mkdtemp(**settings)
        compared(recipe, ["dora"], **once, budget_minutes=0)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", another_begins)
    compared(recipe, ["lora"], **once, budget_minutes=0)  # at the same moment
    trainings.quality = lambda *_: compared(recipe, ["dora"], **once, budget_minutes=0)["missing"]
    compared(recipe, ["lora"], **once)
    with pytest.raises(GatewiseError, match=r"training\.max_steps of lora was 4, now 5"):
        compared(recipe, ["lora"], **once, overrides=["training.max_steps=5"])

    def other_rows(*_: Any) -> float:
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
        return compared(recipe, ["pi-lora"], **once, budget_minutes=0)["missing"]

    shutil.rmtree(tmp_path / "out")
    trainings.quality = other_rows
    with pytest.raises(GatewiseError, match=r"the rows of data\.train are others"):
        compared(recipe, ["lora"], **once)
    assert not (tmp_path / "out/runs").exists()


def test_a_damaged_file_is_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(tmp_path, monkeypatch)
    whole = compared(recipe, ["lora"], rates=1)
    plan = (tmp_path / "out/plan.json").read_text()
    for name, advice in {
        "runs/lora/0.01-0.json": "remove it, and give the same command again",
        "plan.json": "put it back, or give another folder",
    }.items():
        for content in ('{"arm": "lora", "learn', "[]", '{"arm": "lora"}'):
            (tmp_path / "out" / name).write_text(content)
            with pytest.raises(GatewiseError, match=f"{name} is damaged: {advice}"):
                compared(recipe, ["lora"], rates=1)
        (tmp_path / "out" / name).unlink()
        if name == "plan.json":
            with pytest.raises(GatewiseError, match=f"has runs and no plan.json, which says of what they are: {advice}"):
                compared(recipe, ["lora"], rates=1)
            (tmp_path / "out" / name).write_text(plan)
        made = compared(recipe, ["lora"], rates=1, keep_adapters=True)
        assert made["arms"][0]["seeds"] == whole["arms"][0]["seeds"]
    assert [path.name for path in (tmp_path / "out/adapters/lora").iterdir()] == ["0.01-0"]
    console = Console(file=io.StringIO(), width=200)
    (left := tmp_path / "out" / running.WORK / "lora/0.01-0/checkpoints").mkdir(
        parents=True
    )  # by a process that was killed when it was done
    compared(recipe, ["lora"], rates=1, keep_adapters=True, console=console)
    assert "1 finished runs kept no adapter: remove their files in runs" in console.file.getvalue()  # type: ignore[attr-defined]
    assert not left.exists()
    (copy := tmp_path / "out/runs/lora/0.01-0 (1).json").write_bytes((tmp_path / "out/runs/lora/0.01-0.json").read_bytes())
    with pytest.raises(GatewiseError, match="has another name than its run: remove it if it is a copy"):
        compared(recipe, ["lora"], rates=1)
    copy.unlink()


def test_a_folder_of_something_else_is_left_as_it_is(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(tmp_path, monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(GatewiseError, match="is not empty and holds no comparison: give another folder"):
        compared(recipe)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(GatewiseError, match=rf"cannot write .*mine/{running.WORK}/plan\.json: .*; give a path that can be written"):
        running.compare(recipe, ["lora"], tmp_path / "out/mine", console=SILENT)


def test_runs_that_need_several_processes_are_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(tmp_path, monkeypatch)
    with pytest.raises(GatewiseError, match=r"launch\.processes is 2, but compare trains each run in one process"):
        compared(recipe, overrides=["launch.processes=2"])


@pytest.mark.parametrize("wrong", [{"methods": []}, {"seeds": 0}, {"seeds": 1001}, {"rates": 0}])
def test_counts_of_nothing_are_refused(recipe: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(GatewiseError, match="expected methods, 1 or more rates and 1 to 1000 seeds, got"):
        compared(recipe, **wrong)


def test_all_arms_of_a_seed_read_the_same_rows_in_the_same_order_and_none_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, read = RecipeTrainer.compute_loss, dict[tuple[str, int], list[Any]]()

    def compute_loss(self: RecipeTrainer, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        config = model.peft_config["default"]
        read.setdefault(("dora" if config.use_dora else "lora", self.args.seed), []).append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *args, **settings)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
    recipe = write_recipe(tmp_path, training=TRAINING)
    content = compared(recipe, seeds=1, rates=1, overrides=["data.tuning=6"], keep_adapters=True)
    assert not content["missing"]
    assert read["lora", 0] == read["dora", 0]
    assert len(read["lora", 0]) == 4
    out = tmp_path / "out"
    assert (out / "adapters/dora/0.01-0/adapter_model.safetensors").is_file()
    result = json.loads((out / "runs/lora/0.01-0.json").read_text())
    assert len(result["rows"]["dev"]) == 10
    assert sum(result["rows"]["dev"]) / 10 == pytest.approx(result["metrics"]["dev"]["accuracy"])
    assert content["arms"][0]["seeds"][0]["dev"] == 100 * result["metrics"]["dev"]["accuracy"]
    assert result["forgotten"] > 0
    assert not (out / "compare.png").exists()  # no rates were tried


def test_a_run_that_was_interrupted_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, training=TRAINING)
    words = f"compare {recipe} --rates 1 --seeds 1 --methods lora --out".split()
    whole = CliRunner().invoke(app, [*words, str(tmp_path / "whole"), "--json"])
    assert whole.exit_code == 0, whole.output
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    stopped = CliRunner().invoke(app, [*words, str(tmp_path / "stopped")])
    assert stopped.exit_code == 130
    assert "give the same command to go on" in stopped.stderr
    gone_on = CliRunner().invoke(app, [*words, str(tmp_path / "stopped"), "--json"])
    assert "from its last checkpoint" in gone_on.stderr
    found = [json.loads((tmp_path / name / "runs/lora/0.01-0.json").read_text()) for name in ("whole", "stopped")]
    assert all(found[0][key] == found[1][key] for key in ("metrics", "rows", "steps", "parameters"))
    assert json.loads(gone_on.stdout)["arms"][0]["seeds"] == json.loads(whole.stdout)["arms"][0]["seeds"]
    assert not [*(tmp_path / "stopped/work").rglob("checkpoint-*")]


@pytest.mark.parametrize(("file", "content"), [("recipe.yaml", "method: lora"), ("rows.json", '{"data.train": "others"}')])
def test_a_run_that_cannot_go_on_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str) -> None:
    recipe = write_recipe(tmp_path, training=TRAINING)
    stop_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compared(recipe, ["lora"], rates=1, seeds=1)
    (tmp_path / "out" / running.WORK / "lora/0.01-0" / file).write_text(content)  # by another version, say
    console = Console(file=io.StringIO(), width=400)
    [arm] = compared(recipe, ["lora"], rates=1, seeds=1, console=console)["arms"]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "which cannot go on and begins again" in said
    assert "--overwrite" not in said
    assert len(arm["seeds"]) == 1
    assert json.loads((tmp_path / "out/runs/lora/0.01-0.json").read_text())["seconds"] > 0  # and not a part of it


def test_one_option_takes_several_values() -> None:
    command: Any = typer.main.get_command(app)
    words = ["my.yaml", "--methods", "lora", "dora", "--set", "seed=1", "peft.r=2", "--methods=alora", "eva", "--out", "x"]
    found = command.commands["compare"].make_context("compare", words).params
    assert (found["methods"], found["set_"]) == (["lora", "dora", "alora", "eva"], ["seed=1", "peft.r=2"])
