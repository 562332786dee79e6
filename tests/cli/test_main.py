"""The command line: what it prints where, its exit codes, and one sentence for everything a user can put right."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import write_recipe
from typer.testing import CliRunner

from gatewise.cli.main import app
from gatewise.cli.options import print_table
from gatewise.errors import GatewiseError
from gatewise.runs.run import train
from gatewise.runs.trainer import RecipeTrainer

Gatewise = Callable[..., Any]


@pytest.fixture
def gatewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gatewise:
    """gatewise("train", ...) -> the result of the command, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an ALoRA run, beside its data and base model."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, "alora")
    result = CliRunner().invoke(app, ["train", str(recipe), "--output", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out"


def assert_refused(result: Any, *said: str) -> None:
    """Exit code 2 and one sentence on stderr, whatever progress came before it."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any(line.startswith(("error", "Traceback")) for line in lines[:-1])
    for text in said:
        assert text in lines[-1]
    assert result.stdout == ""


# Commands that work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "alora"])
def test_train_ends_with_a_summary(method: str, gatewise: Gatewise, tmp_path: Path) -> None:
    result = gatewise("train", write_recipe(tmp_path, method), "--set", "training.max_steps=6")
    assert result.exit_code == 0, result.output
    out = Path("runs") / method
    for text in ("dev accuracy", "before", "after", "parameters", "layer", "gate", f"{out}/adapter", f"{out}/ranks.png"):
        assert text in result.stdout
    assert "step 6/6: loss" in result.stderr
    assert ("round 1" in result.stderr) == (method == "alora")
    assert (tmp_path / out / "adapter" / "adapter_model.safetensors").is_file()


def test_the_summary_of_a_run_whose_base_was_not_measured(
    gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under FSDP and DeepSpeed on GPUs."""
    monkeypatch.setattr("gatewise.runs.run.train", functools.partial(train, before=False))
    result = gatewise("train", write_recipe(tmp_path, "lora"), "--set", "training.max_steps=1")
    assert result.exit_code == 0, result.output
    assert "dev accuracy" in result.stdout


def test_eval_repeats_the_runs_own_measurement(gatewise: Gatewise, trained: Path) -> None:
    expected = json.loads((trained / "metrics.json").read_text())["metrics"]["dev"]["after"]
    result = gatewise("eval", trained / "adapter", "--data", trained.parent / "dev.jsonl", "--json")
    assert json.loads(result.stdout) == pytest.approx(expected, rel=1e-5)
    table = gatewise("eval", trained / "adapter", "--data", trained.parent / "dev.jsonl")
    assert table.exit_code == 0
    assert f"{expected['loss']:.4f}" in table.stdout


def test_the_adapter_of_a_run_has_a_card_that_travels_with_it(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    card = (trained / "adapter" / "README.md").read_text()
    accuracy = json.loads((trained / "metrics.json").read_text())["metrics"]["dev"]["after"]["accuracy"]
    for text in (
        f"value: {round(accuracy, 4)}",
        "- alora",
        "`train.jsonl`",
        "method: alora",
        "![ranks](ranks.png)",
        "## How a prompt",
    ):
        assert text in card
    assert str(trained.parent) not in card
    assert (trained / "adapter" / "ranks.png").read_bytes() == (trained / "ranks.png").read_bytes()
    assert gatewise("export", trained / "adapter", "out", "--padded").exit_code == 0
    assert "`gatewise export` wrote it as plain LoRA.\n" in (tmp_path / "out" / "README.md").read_text()


def test_eval_writes_what_was_answered(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    words = ("eval", trained / "adapter", "--data", trained.parent / "dev.jsonl", "--json", "--out")
    metrics = json.loads(gatewise(*words, tmp_path / "new" / "answers.jsonl").stdout)
    rows = [json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in (trained.parent / "dev.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in ("text", "label")} for row in rows] == given
    assert all(row["right"] == (row["predicted"] == row["label"]) for row in rows)
    assert all(max(row["log_likelihoods"], key=row["log_likelihoods"].get) == row["predicted"] for row in rows)
    assert sum(row["right"] for row in rows) / len(rows) == metrics["accuracy"]
    assert_refused(gatewise(*words, tmp_path), f"{tmp_path} is a folder, expected a file to write")


def test_metrics_are_told_though_answers_cannot_be_written(
    gatewise: Gatewise, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise GatewiseError("the disk is full")

    monkeypatch.setattr("gatewise.runs.measure.write_json_lines", full)
    result = gatewise("eval", trained / "adapter", "--data", trained.parent / "dev.jsonl", "--out", tmp_path / "answers.jsonl")
    assert_refused(result, "the disk is full")
    assert re.search(r"accuracy 0\.\d+", result.stderr)


def test_rows_of_one_label_are_refused(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    alike = tmp_path / "alike.jsonl"
    alike.write_text("".join(json.dumps({"text": f"lamp {n}", "label": "good"}) + "\n" for n in range(8)))
    said = "all rows of alike.jsonl have the label 'good', so that any answer would be right: give rows with other labels too"
    result = gatewise("train", write_recipe(tmp_path, "lora"), "--set", "data.train=alike.jsonl")
    assert_refused(result, said.replace("alike.jsonl", str(alike)))
    assert gatewise("eval", trained / "adapter", "--data", alike, "--json").exit_code == 0  # the run knows its labels
    foreign = tmp_path / "foreign"
    shutil.copytree(trained / "adapter", foreign)
    (foreign / "gatewise.json").unlink()
    assert_refused(gatewise("eval", foreign, "--data", alike), "have the label 'good'", "give --labels with all of them")


def test_eval_takes_another_prompt_other_words_and_fewer_rows(gatewise: Gatewise, trained: Path) -> None:
    words = ("eval", trained / "adapter", "--data", trained.parent / "dev.jsonl", "--json", "--limit", 4)
    plain = json.loads(gatewise(*words).stdout)
    assert plain["n"] == 4
    prompt = json.loads(gatewise(*words, "--template-prompt", "Is {text} good?").stdout)
    spelt = json.loads(gatewise(*words, "--labels", "bad=no,good=yes").stdout)
    assert len({plain["loss"], prompt["loss"], spelt["loss"]}) == 3
    again = json.loads(gatewise(*words, "--template-prompt", "Text: {text}\nLabel:", "--labels", "bad,good").stdout)
    assert again == plain


def test_the_runs_label_words_stay_with_its_labels(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    spelt = tmp_path / "spelt"
    shutil.copytree(trained / "adapter", spelt)
    note = json.loads((spelt / "gatewise.json").read_text())
    (spelt / "gatewise.json").write_text(json.dumps(note | {"label_words": {"bad": "no", "good": "yes"}}))
    words = ("eval", spelt, "--data", trained.parent / "dev.jsonl", "--json")
    own, plain = json.loads(gatewise(*words).stdout), json.loads(gatewise(*words, "--labels", "bad=bad,good=good").stdout)
    assert own != plain
    for labels in ("bad,good", "good,bad"):
        assert json.loads(gatewise(*words, "--labels", labels).stdout) == pytest.approx(own)


def test_eval_says_what_was_cut_and_takes_a_length(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    rows = tmp_path / "written.jsonl"
    rows.write_text("".join(json.dumps({"source": f"lamp {n}", "target": "late"}) + "\n" for n in range(3)))
    words = ("eval", trained / "adapter", "--data", rows, "--template-prompt", "{source}:", "--max-new-tokens", 2)
    result = gatewise(*words, "--out", "answers.jsonl", "--json")
    assert result.exit_code == 0, result.output
    cut = [json.loads(line).get("cut", False) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert any(cut)
    assert f"{sum(cut)} of 3 answers had not ended when they were cut; --max-new-tokens lets them be longer" in result.stderr
    assert_refused(
        gatewise("eval", "x", "--harness", "arc_easy", "--max-new-tokens", 2), "--max-new-tokens does not go with --harness"
    )


def test_eval_refuses_what_it_would_ignore(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    adapter, dev = trained / "adapter", tmp_path / "dev.jsonl"
    dev.write_bytes((trained.parent / "dev.jsonl").read_bytes())
    assert_refused(gatewise("eval", adapter, "--data", dev, "--max-new-tokens", 3), "holds label rows, to which nothing is written")
    before = dev.read_bytes()
    assert_refused(gatewise("eval", adapter, "--data", dev, "--limit", 3, "--out", dev), "is a file that is read")
    config = adapter / "adapter_config.json"
    assert_refused(gatewise("eval", adapter, "--data", dev, "--out", config), f"{config} is a file that is read")
    pattern = dev.with_name("de*.jsonl")
    assert_refused(
        gatewise("inspect", adapter, "--scores", "--data", pattern, "--suggest", "1k", "--out", dev), "is a file that is read"
    )
    assert dev.read_bytes() == before


def test_a_classifier_of_a_run_keeps_its_order(gatewise: Gatewise, tmp_path: Path) -> None:
    assert gatewise("train", write_recipe(tmp_path, "lora", "bert"), "--output", "out").exit_code == 0
    words = ("eval", "out/adapter", "--data", "dev.jsonl", "--json")
    assert gatewise(*words, "--labels", "good,bad").stdout == gatewise(*words).stdout


def test_a_classifier_from_elsewhere_needs_the_order_of_its_classes(gatewise: Gatewise, tmp_path: Path) -> None:
    """Rows say what labels there are, not which class is which."""
    recipe = write_recipe(tmp_path, "lora", "bert")
    assert gatewise("train", recipe, "--set", "data.labels=[good, bad]", "--output", "out").exit_code == 0
    words = ("eval", "out/adapter", "--data", "dev.jsonl", "--json")
    expected = json.loads(gatewise(*words).stdout)
    (tmp_path / "out" / "adapter" / "gatewise.json").unlink()
    config = json.loads((tmp_path / "bert" / "config.json").read_text())

    def name_classes(*names: str) -> None:
        named = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config | named))

    name_classes("LABEL_0", "LABEL_1")
    assert_refused(gatewise(*words), "does not say which of its classes is which of the labels bad, good: give --labels")
    assert json.loads(gatewise(*words, "--labels", "good,bad").stdout) == pytest.approx(expected)
    name_classes("Good", "Bad")
    assert_refused(gatewise(*words), "its classes (Good, Bad) is which of the labels bad, good")
    name_classes("good", "bad")
    assert json.loads(gatewise(*words).stdout) == pytest.approx(expected)


def test_eval_says_what_the_harness_needs(gatewise: Gatewise, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval", trained / "adapter")
    assert_refused(gatewise(*words), "give either --data or --harness")
    assert_refused(
        gatewise(*words, "--data", trained.parent / "dev.jsonl", "--harness-shots", 2), "--harness-shots does not go with --data"
    )
    monkeypatch.delitem(sys.modules, "gatewise.runs.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = "--harness needs lm_eval, which is not installed: pip install 'gatewise[harness]'"
    assert_refused(gatewise(*words, "--harness", "arc_easy"), said)


def test_eval_of_a_checkpoint_and_of_an_adapter_from_elsewhere(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    data = trained.parent / "dev.jsonl"
    assert gatewise("eval", trained / "checkpoints" / "checkpoint-8", "--data", data, "--json").exit_code == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((trained / "adapter" / name).read_bytes())
    own = json.loads(gatewise("eval", trained / "adapter", "--data", data, "--json").stdout)
    assert json.loads(gatewise("eval", foreign, "--data", data, "--json").stdout) == pytest.approx(own)


def test_models_lists_and_finds(gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWISE_CACHE", str(tmp_path / "cache"))
    assert "smollm2-135m-instruct" in gatewise("models", "list").stdout
    listed = json.loads(gatewise("models", "list", "--json").stdout)
    assert {model["name"] for model in listed} >= {"smollm2-135m-instruct", "minilm-l6", "gemma3-270m"}
    assert not any(model["path"] for model in listed)
    assert_refused(gatewise("models", "path", "minilm-l6"), "is not fetched yet", "gatewise models fetch minilm-l6")
    assert_refused(gatewise("models", "path", "minilm"), "did you mean minilm-l6")
    assert_refused(gatewise("models", "fetch", "gemma3-270m"), "--accept-terms")


@pytest.mark.parametrize(
    "words", ["", "train", "eval", "inspect", "export", "models", "models list", "models fetch", "models path"]
)
def test_every_help_has_an_example(words: str, gatewise: Gatewise) -> None:
    result = gatewise(*words.split(), "--help")
    assert result.exit_code == 0
    assert f"  gatewise {words}".rstrip() in result.stdout


def test_the_version(gatewise: Gatewise) -> None:
    assert gatewise("--version").stdout.startswith("gatewise 0.")


def test_a_shell_completes_commands(gatewise: Gatewise, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_GATEWISE_COMPLETE": "complete_bash", "COMP_WORDS": "gatewise sch", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(app, [], prog_name="gatewise").stdout.strip() == "schema"


def test_commands_of_a_broken_package_do_not_take_the_others_along(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gatewise.commands]\ntrees = no_such_module:app\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "gatewise", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert (done.returncode, done.stdout.split()[:1]) == (0, ["gatewise"])
    assert done.stderr == "warning: the commands of gatewise trees cannot be used: No module named 'no_such_module'\n"


def test_help_and_refusals_do_without_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from gatewise.cli.main import app; "
        "a = CliRunner().invoke(app, ['--help']); b = CliRunner().invoke(app, ['train', 'none.yaml']); "
        "print(a.exit_code, b.exit_code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2", "False", "False"]


@pytest.mark.parametrize(("given", "kept"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_do_not_spin_unless_told_to(given: str | None, kept: str) -> None:
    """PyTorch reads the variable when it is imported: it has to stand there before."""
    code = (
        "import os, sys; from gatewise.cli import main as cli; "
        "cli.app = lambda: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules); cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kept, "False"]


# Bad input ------------------------------------------------------------------------------------------------------------


def test_missing_files(gatewise: Gatewise, tmp_path: Path) -> None:
    assert_refused(gatewise("train", "none.yaml"), "the recipe none.yaml cannot be read", "No such file or directory")
    recipe = write_recipe(tmp_path)
    assert_refused(gatewise("train", recipe, "--set", "data.train=none.jsonl"), "none.jsonl: there is no such file")
    assert_refused(gatewise("train", recipe, "--set", "model=./none"), "none' could be loaded")
    assert_refused(gatewise("inspect", "none"), "none is not an adapter")
    assert_refused(gatewise("export", "none", "out"), "none is not an adapter")
    assert_refused(gatewise("eval", "none", "--data", "dev.jsonl"), "none is not an adapter")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def test_one_set_changes_several_keys_and_the_recipe_may_follow_them(gatewise: Gatewise, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    inside = tmp_path / "r=8" / "recipe.yaml"
    inside.parent.mkdir()
    inside.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    for first, second in (("peft.r=x", "seed=x"), ("seed=x", "peft.r=x")):
        for words in (
            (recipe, "--set", first, second),
            ("--set", first, second, inside),
            (f"--set={first}", second, "--", inside),
        ):
            result = gatewise("train", *words)
            assert result.exit_code == 2
            assert all(f"{key}: Input should be a valid integer, got 'x'" in result.stderr for key in ("seed", "peft.r"))


def test_places_that_cannot_be_written(gatewise: Gatewise, trained: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_refused(gatewise("train", recipe, "--output", "file/out"), "file/out could not be written")
    assert_refused(gatewise("train", recipe, "--output", "file"), "file could not be written")
    assert_refused(gatewise("export", trained / "adapter", "file/out"), "file/out")
    assert_refused(gatewise("inspect", trained / "adapter", "--plot", "file/map.png"), "file/map.png")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("ended", "said"), [(False, "the earlier run in {} is untouched"), (True, "the run in {} is finished and whole")]
)
def test_an_interrupt_after_the_end_says_that_the_run_is_whole(
    ended: bool, said: str, gatewise: Gatewise, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not to resume it, which would be refused. One that was there before the new one began is called the earlier one."""

    def stopped(*_: Any, **__: Any) -> None:
        when = time.time() - (0 if ended else 3600)
        os.utime(trained / "metrics.json", (when, when))
        raise KeyboardInterrupt

    monkeypatch.setattr("gatewise.runs.run.train", stopped)
    result = gatewise("train", trained.parent / "alora.yaml", "--output", trained, "--overwrite")
    assert result.exit_code == 130
    assert result.stderr.endswith(f"interrupted: {said.format(trained)}\n")


def test_options_that_would_do_nothing_are_refused(gatewise: Gatewise, trained: Path) -> None:
    for option in ("--resume", "--overwrite"):
        assert_refused(gatewise("train", trained.parent / "alora.yaml", "--dry-run", option), "--dry-run writes nothing")
    assert_refused(gatewise("export", trained / "adapter", "out", "--columns", "text=message"), "given without --data")
    assert_refused(gatewise("eval", trained / "adapter", "--data", "~nobody.jsonl"), "~nobody.jsonl: there is no such file")


def test_a_narrow_terminal_loses_no_digit_of_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    print_table(["task", "metric"], ["value"], [("mmlu_high_school_government", "acc [none]", "0.1234")])
    assert capsys.readouterr().out.split()[-4:] == ["mmlu_high_school_government", "acc", "[none]", "0.1234"]


def test_a_narrow_terminal_loses_no_digit_of_the_table_of_ranks(
    gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    result = gatewise("train", write_recipe(tmp_path, "lora"), "--set", "peft.r=100", "training.max_steps=1")
    assert result.exit_code == 0, result.output
    (total,) = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["total"]]
    assert set(total[1:-1]) == {"200"}


def test_an_interrupt_says_how_to_go_on(gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "alora")
    original = RecipeTrainer.compute_loss

    def stopped(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "compute_loss", stopped)
        step = 1
        first = gatewise("train", recipe)
        assert first.exit_code == 130
        assert first.stderr.endswith("no checkpoint was written yet: give the same command to begin again\n")
        step = 5
        second = gatewise("train", recipe)
        assert second.exit_code == 130
        assert "interrupted: step 4 is kept: give the same command with --resume to go on" in second.stderr
    assert not (tmp_path / "runs/alora/adapter").exists()
    assert_refused(gatewise("train", recipe), "runs/alora is not empty: use --resume")
    last = gatewise("train", recipe, "--resume")
    assert last.exit_code == 0, last.output
    assert "8, resumed after 4" in last.stdout


def test_data_of_another_kind_than_the_adapters(gatewise: Gatewise, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora", "bert")
    assert gatewise("train", recipe, "--output", "out", "--set", "training.max_steps=1").exit_code == 0
    assert_refused(gatewise("eval", "out/adapter", "--data", "sample:reminder-dev"), "reminder-dev")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you Tried to allocate 2.00 GiB."),
    ],
    ids=type,
)
def test_a_want_of_memory_is_no_bug(gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(RecipeTrainer, "train", full)
    result = gatewise("train", write_recipe(tmp_path))
    assert_refused(result, "the device is out of memory")
    assert "training.batch_size" in result.stderr
    assert "Tried to allocate 2.00 GiB" in result.stderr


def test_a_place_that_may_not_be_read_is_no_bug(gatewise: Gatewise, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/home/she/adapter")

    monkeypatch.setattr("gatewise.inspection.read_budget", closed)
    monkeypatch.setattr("gatewise.adapters.files.peft_type", lambda _: "LORA")
    assert_refused(gatewise("inspect", "."), "/home/she/adapter: Permission denied: give another path")


@pytest.mark.parametrize("bug", [ZeroDivisionError(), EOFError("Ran out of input")], ids=repr)
def test_a_bug_shows_its_traceback(gatewise: Gatewise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise bug

    monkeypatch.setattr(RecipeTrainer, "train", broken)
    result = gatewise("train", write_recipe(tmp_path))
    assert bug in (result.exception, getattr(result.exception, "__cause__", None))
    assert not (tmp_path / "runs" / "lora").exists()
