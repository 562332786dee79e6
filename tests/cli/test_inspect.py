"""``gatewise inspect --scores``: what it prints where, the files it writes, and one sentence for everything that is wrong."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from adapter_folders import random_factors, write_folder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter
from tiny_run import write_adapter, write_base, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from gatewise.adapters.data_options import DataOptions
from gatewise.allocation.slots import lora_layers
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.inspection.importance import score_adapter
from gatewise.routed import RoutedLoraConfig

Inspect = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder, beside its base model and its data."""
    folder = tmp_path_factory.mktemp("saved")
    write_rows(folder / "rows.jsonl", 12)
    return write_adapter(folder / "adapter", write_base(folder / "base"))


@pytest.fixture
def inspect(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inspect:
    """inspect(...) -> the result of ``gatewise inspect ADAPTER ...``, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(app, ["inspect", str(saved), *map(str, words)])


@pytest.fixture
def data(saved: Path) -> Path:
    return saved.parent / "rows.jsonl"


def test_scores_are_shown_by_layer_and_module(inspect: Inspect, saved: Path, data: Path) -> None:
    result = inspect("--scores", "--data", data, "--score", "path_integral")
    assert result.exit_code == 0, result.output
    found = score_adapter(saved, str(data), score="path_integral")
    grid = found.score_grid()
    lines = [line.split() for line in result.stdout.splitlines() if line.split()]
    assert result.stdout.startswith("path_integral score in 10⁻³ nats, the sum over the ranks of a module\n")
    assert lines[1] == ["layer", "q", "k", "v", "o", "gate", "up", "down", "total"]
    assert ["0", *map(grid.write, grid.cells[0]), grid.write(grid.rows[0])] in lines
    assert ["total", *map(grid.write, grid.columns), grid.write(grid.total)] in lines
    assert f"rows: 12 of {data}" in " ".join(result.stdout.split())
    assert f"could go: {len(found.useless)} modules" in result.stdout
    assert "scoring on 12 rows with path_integral" in result.stderr
    assert "suggestion" not in result.stdout


def test_an_adapter_on_the_hub_is_fetched_and_needs_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, without a network. What else lies in such a place is not fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--somebody--small"
    write_folder(kept / "snapshots" / "abc", random_factors("model.layers.0.q_proj"), base_model_name_or_path="no/base")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "gatewise.adapters.files.snapshot_download",
        lambda *names, **chosen: asked.append(chosen) or huggingface_hub.snapshot_download(*names, **chosen),
    )
    result = CliRunner().invoke(app, ["inspect", "somebody/small"])
    assert "total rank: 4" in result.stdout
    files = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "vocab.txt"]
    others = ["adapter_model.bin", "model.safetensors", "checkpoint-5/a.json"]
    assert list(huggingface_hub.utils.filter_repo_objects([*files, *others], **asked[0])) == files
    refused = CliRunner().invoke(app, ["inspect", "somebody/else"])
    assert refused.exit_code == 2
    assert "error: somebody/else is no folder here, and cannot be had from the hub (" in refused.stderr


def test_every_setting_reaches_the_score(inspect: Inspect, saved: Path, data: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "other", rms_norm_eps=0.1)
    words = (
        "--score",
        "taylor",
        "--rows",
        5,
        "--base",
        base,
        "--template-prompt",
        "Is {text} good?",
        "--labels",
        "bad=no,good=yes",
    )
    told = json.loads(inspect("--scores", "--data", data, "--json", *words).stdout)
    settings = {"base": str(base), "prompt": "Is {text} good?", "labels": "bad=no,good=yes"}
    expected = score_adapter(saved, str(data), DataOptions(**settings), score="taylor", rows=5)
    assert (told["score"], told["rows"], told["base_model"]) == ("taylor", 5, str(base))
    assert [module["scores"] for module in told["modules"]] == [list(module.scores) for module in expected.modules]
    assert told["loss_adapted"] == expected.loss_adapted
    assert "suggestion" not in told


def test_json_is_alone_on_stdout_and_holds_the_suggestion(inspect: Inspect, data: Path, tmp_path: Path) -> None:
    result = inspect("--scores", "--data", data, "--json", "--suggest", "0.3k", "--out", "pattern.json", "--plot", "map.svg")
    told = json.loads(result.stdout)
    assert told["suggestion"] == json.loads((tmp_path / "pattern.json").read_text())
    assert (tmp_path / "map.svg").is_file()
    assert json.loads(inspect("--scores", "--data", data, "--json", "--suggest", 300).stdout) == told


def test_scores_are_told_though_the_last_step_fails(inspect: Inspect, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise GatewiseError("the disk is full")

    monkeypatch.setattr("gatewise.cli.inspect.write_json", full)
    result = inspect("--scores", "--data", data, "--json", "--suggest", 300, "--out", "pattern.json")
    assert (result.exit_code, "the disk is full" in result.stderr) == (2, True), result.output
    assert json.loads(result.stdout)["modules"]


def test_the_suggestion_is_a_lora_config_of_at_most_the_parameters_asked_for(
    inspect: Inspect, saved: Path, data: Path, tmp_path: Path
) -> None:
    _, brace, rest = inspect("--scores", "--data", data, "--suggest", "0.5k").stdout.partition("{\n")
    written = inspect("--scores", "--data", data, "--suggest", 500, "--out", "new/pattern.json")
    assert written.stdout.rstrip().endswith("suggestion written: new/pattern.json")
    assert "not shown to be better than even ranks (docs/reports/scores.md)" in written.stderr
    settings = json.loads(brace + rest)
    assert json.loads((tmp_path / "new" / "pattern.json").read_text()) == settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved.parent / "base"), LoraConfig(**settings))
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}
    stored = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert 500 - 40 < stored <= 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--scores", "--scores was given without --data"),
        ("--data DATA", "--data was given without --scores, where it means nothing: add --scores"),
        ("--suggest 9", "--suggest was given without --scores"),
        ("--labels no,yes", "how to read data was given without --scores or --routing"),
        ("--scores --data DATA --out pattern.json", "--out was given without --suggest"),
        ("--scores --data DATA --value norm", "--value was given with --scores"),
        ("--routing --data DATA --suggest 9", "--suggest was given with --routing"),
        ("--routing --data DATA --scores", "--scores was given with --routing"),
        ("--scores --data DATA --score pathintegral", "expected one of ablation, path_integral"),
        ("--scores --data DATA --suggest many", "--suggest is 'many': expected a number such as 500000, 500k or 1.5M"),
        ("--scores --data DATA --plot map.pdf", "cannot plot to map.pdf"),
        ("--scores --data DATA --suggest 99 --out .", ". is a folder, expected a file to write: give another path"),
        ("--scores --data DATA --plot DATA/map.png", "rows.jsonl/map.png"),
        ("--scores --data none.jsonl", "none.jsonl: there is no such file"),
        ("--scores --data DATA --base ./none", "no model './none' could be loaded"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(words: str, said: str, inspect: Inspect, data: Path, tmp_path: Path) -> None:
    result = inspect(*words.replace("DATA", str(data)).split())
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert said in lines[-1]
    assert not any(line.startswith(("error", "Traceback")) for line in lines[:-1])
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_refused_early_is_not_scored_first(inspect: Inspect, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.importance.load_with_data", lambda *_, **__: pytest.fail("the adapter was loaded"))
    for words in (("--suggest", "x"), ("--plot", "map.pdf"), ("--rows", 0), ("--score", "none")):
        assert inspect("--scores", "--data", data, *words).exit_code == 2


@pytest.mark.parametrize(
    ("kind", "hint"), [("ROUTED_LORA", "; --routing shows which of its modules"), ("SELECTIVE_PROMPT", "scored\n")]
)
def test_adapters_without_ranks_are_not_loaded_to_be_scored(
    kind: str, hint: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatewise.importance.load_with_data", lambda *_, **__: pytest.fail("the adapter was loaded"))
    adapter = write_adapter(tmp_path / "adapter", data.parent / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": kind}))
    result = CliRunner().invoke(app, ["inspect", str(adapter), "--scores", "--data", str(data)])
    assert result.exit_code == 2
    assert f"is of peft_type '{kind}', but only plain LoRA has ranks that can be scored" in result.stderr
    assert hint in result.stderr


def test_scores_are_shown_though_nothing_can_be_suggested(inspect: Inspect, data: Path, tmp_path: Path) -> None:
    shown = inspect("--scores", "--data", data, "--suggest", "1M", "--out", "pattern.json")
    assert shown.exit_code == 2
    assert "a budget of 1,000,000 parameters was asked for" in shown.stderr
    assert "could go: " in shown.stdout
    assert not (tmp_path / "pattern.json").exists()
    told = inspect("--scores", "--data", data, "--suggest", "1M", "--json")
    assert told.exit_code == 2
    assert json.loads(told.stdout)["modules"]


# ---- routing ----


def test_adapters_that_choose_nothing_are_not_loaded(inspect: Inspect, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.inspection.routing.load_with_data", lambda *_, **__: pytest.fail("the adapter was loaded"))
    result = inspect("--routing", "--data", data)
    assert result.exit_code == 2
    assert "is of peft_type 'LORA', and only routed LoRA (method milora) chooses modules" in result.stderr


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A routed classifier of two classes on a BERT of 96 positions."""
    folder = tmp_path_factory.mktemp("routed")
    base = AutoModelForSequenceClassification.from_pretrained(write_base(folder / "bert", "bert"))
    model = random_adapter(get_peft_model(base, RoutedLoraConfig(r=2, top_k=2, task_type="SEQ_CLS")))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def route(adapter: Path, rows: list[dict[str, str]], tmp_path: Path, *words: str) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CliRunner().invoke(app, ["inspect", str(adapter), "--routing", "--data", str(tmp_path / "rows.jsonl"), *words])


def test_another_number_of_classes_is_refused(routed: Path, tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": ("bad", "good", "so-so")[number % 3]} for number in range(44)]
    result = route(routed, rows, tmp_path, "--labels", "bad,good,so-so")
    assert result.exit_code == 2, result.output
    assert "the model has 2 classes, but" in result.stderr


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("adapter", "has numbers that are not finite"),
        ("bert", "are not finite: look for numbers that are not in the adapter and its base model"),
    ],
)
def test_routers_that_are_broken_choose_nothing(where: str, said: str, routed: Path, tmp_path: Path) -> None:
    shutil.copytree(routed.parent, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / where).glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if "lora_router" in name or "LayerNorm" in name:
            tensors[name] = torch.full_like(tensors[name], math.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    rows = [{"text": "nice", "label": "good"}, {"text": "awful", "label": "bad"}]
    result = route(tmp_path / "adapter", rows, tmp_path, "--base", str(tmp_path / "bert"))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_narrow_terminal_or_a_pipe_gets_every_number(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal goes on in its next line."""
    monkeypatch.setenv("COLUMNS", "40")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "shared_expert_gate")
    tensors: dict[str, Any] = {}
    for kind in kinds:
        tensors |= random_factors(f"model.layers.0.mlp.{kind}", r=16, d_in=64, d_out=64)
    write_folder(tmp_path / "adapter", tensors, r=16)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter"), "--value", "parameters"])
    rows = [line.split() for line in re.sub(r"\x1b\[[\d;]*m", "", result.stdout).splitlines()]
    assert ["0", *["2.05k"] * 7, "14.3k"] in rows
    assert ["total", *["2.05k"] * 7, "14.3k"] in rows
