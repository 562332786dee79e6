"""Whole runs on a tiny model: resuming, diverging, stopping, and what is and is not left in the output folder."""

import io
import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from several_processes import launched
from tiny_run import assert_same_adapter, stop_at, weights, write_base, write_recipe
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from gatewise.adapters.checkpoints import checkpoint_step, complete_checkpoints
from gatewise.adapters.loading import load_as_trained
from gatewise.allocation.slots import lora_layers
from gatewise.errors import GatewiseError
from gatewise.inspection import read_budget
from gatewise.parts import METHODS
from gatewise.progress import ConsoleProgress
from gatewise.runs import run
from gatewise.runs.measure import measure_adapter
from gatewise.runs.recipe import load_recipe
from gatewise.runs.trainer import RecipeTrainer
from gatewise.tasks import rows

SILENT = Console(quiet=True)


def train(recipe: Path, output: Path, *overrides: str, **options: Any) -> run.RunResult:
    return run.train(load_recipe(recipe, overrides), output, console=SILENT, **options)


@pytest.mark.parametrize("method", ["lora", "alora", "milora", "prefix-tuning"])
def test_resumed_after_an_interrupt_it_ends_as_if_never_stopped(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, method)
    # Seven batches an epoch, so four steps; the checkpoint is in the middle of the second epoch, and of alora's rounds.
    settings = ("training.gradient_accumulation=2", "training.group_by_length=true", "training.save_every=5")
    whole = train(recipe, tmp_path / "whole", *settings)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        # In the middle of step 6; milora has had two steps of its upper level too.
        stop_at(patch, 13 if method == "milora" else 11, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, stopped, *settings)
    assert not (stopped / "adapter").exists()
    assert [checkpoint_step(path) for path in complete_checkpoints(stopped / "checkpoints")] == [5]
    resumed = train(recipe, stopped, *settings, resume=True)
    assert (resumed.resumed_from, resumed.steps) == (5, 8)
    assert resumed.metrics == whole.metrics
    assert_same_adapter(whole.adapter, resumed.adapter)
    if method == "alora":
        first, second = (json.loads((r.adapter / "allocation.json").read_text()) for r in (whole, resumed))
        for one in (*first["rounds"], *second["rounds"]):
            del one["seconds"]
        assert first == second
        assert [one["step"] for one in first["rounds"]] == [3, 6]


def test_every_method_trains_on_the_same_rows_in_as_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe with ``--set method=...``: rows that one method scores ranks on are not trained on by the others either."""
    seen: dict[str, Any] = {}

    def begins(self: Any, **_: Any) -> None:
        seen["rows"], seen["steps"] = [row["input_ids"] for row in self.train_dataset], self.args.max_steps
        raise KeyboardInterrupt

    recipe = write_recipe(tmp_path, peft=None, training={"epochs": 3, "batch_size": 4})
    monkeypatch.setattr(RecipeTrainer, "train", begins)
    monkeypatch.setattr(run, "_measured", lambda *_: {})
    found = {}
    for method in METHODS:
        more = ("prompts.prompt_layers=[0]",) if method == "spt" else ()
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / method, f"method={method}", *more)
        found[method] = dict(seen)
        seen.clear()
    assert len(found["lora"]["rows"]) == 20
    assert found["lora"]["steps"] == 15
    assert {name: one == found["lora"] for name, one in found.items()} == dict.fromkeys(METHODS, True)


def test_a_cubic_budget_comes_down_to_loras(tmp_path: Path) -> None:
    """Twice the ranks at the start, those of plain LoRA and LoRA's scale at the end."""
    section = {"schedule": "cubic", "init_r": 4, "rounds": 3, "first_round": 2, "recover": 2}
    recipe = write_recipe(tmp_path, "pi-lora", allocation=section)
    plain = train(write_recipe(tmp_path), tmp_path / "plain").parameters["adapter"]
    cheaper = train(recipe, tmp_path / "parameters")
    assert plain - 40 < cheaper.parameters["adapter"] <= plain
    assert json.loads((cheaper.adapter / "allocation.json").read_text())["target"] == plain
    result = train(recipe, tmp_path / "out", "allocation.budget=ranks")
    record = json.loads((result.adapter / "allocation.json").read_text())
    assert (record["score"], record["schedule"], record["budget"], record["target"]) == ("path_integral", "cubic", 56, 28)
    # 28 + 28 (1 - i/3)^3
    assert [sum(one["ranks"].values()) for one in record["rounds"]] == [36, 29, 28]
    assert sum(result.ranks.values()) == 28
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), str(result.adapter))
    assert {layer.scaling["default"] for layer in lora_layers(model, "default").values()} == {2.0}


@pytest.mark.parametrize("method", ["lora", "alora", "adalora"])
def test_the_adapter_is_plain_lora_that_peft_loads(method: str, tmp_path: Path) -> None:
    changed = ["allocation.budget=ranks"] if method == "alora" else []
    result = train(write_recipe(tmp_path, method), tmp_path / "out", *changed)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), str(result.adapter))
    assert model.peft_config["default"].peft_type == "LORA"
    assert sum(result.ranks.values()) == 2 * 14  # two layers of seven modules
    assert (len(set(result.ranks.values())) > 1) == (method != "lora")
    stored = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert result.parameters == {"base": model.get_base_model().num_parameters() - stored, "adapter": stored}


@pytest.mark.parametrize(("method", "how", "kind"), [("alora", "nf4", "Linear4bit"), ("milora", "int8", "Linear8bitLt")])
def test_a_quantised_base_is_loaded_the_same_wherever_the_adapter_goes(method: str, how: str, kind: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, method, training={"max_steps": 5, "batch_size": 4, "optim": "paged_adamw_8bit"})
    write_base(tmp_path / "llama", hidden_size=64, intermediate_size=128)
    result = train(recipe, tmp_path / "out", f"quantization={how}")
    assert measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), console=SILENT) == result.metrics["dev"]["after"]
    model, *_ = load_as_trained(result.adapter)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(getattr(layer, "base_layer", layer)).__name__ == kind
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert result.parameters["base"] == plain.num_parameters()


@pytest.mark.parametrize("method", ["dora", "pi-lora", "milora"])
def test_with_lora_plus_only_the_rate_of_b_is_higher(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        names = {id(one): name for name, one in kwargs["model"].named_parameters()}
        seen.update({names[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]})

    monkeypatch.setattr(ConsoleProgress, "on_step_end", on_step_end)
    routers = ["data.held_out=0"] if method == "milora" else []  # they learn as all else does, and have vectors
    plus = ["training.lora_plus_ratio=8", "training.scheduler=constant", *routers]
    train(write_recipe(tmp_path, method), tmp_path / "out", *plus)
    assert {rate for name, rate in seen.items() if "lora_B" in name} == {0.08}
    assert {rate for name, rate in seen.items() if "lora_B" not in name} == {0.01}


@pytest.mark.parametrize("setting", ["quantization=nf4", "training.lora_plus_ratio=4", "peft.init_lora_weights=olora"])
def test_what_does_not_go_with_a_sharded_base_is_refused_before_it_is_loaded(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(GatewiseError, match=r"does not go with FSDP: take launch\.strategy ddp, or leave it out"):
        train(recipe, tmp_path / "out", setting, f"model={tmp_path / 'none'}")


@pytest.mark.usefixtures("pictures")
def test_what_is_written_down(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "alora", data={"train": "train.jsonl", "dev": "dev.jsonl", "test": "dev.jsonl"})
    result = train(recipe, tmp_path / "out", "training.eval_every=4", "template.prompt='Is {text} good or bad?'")
    written = json.loads(result.metrics_file.read_text())
    assert written["metrics"] == result.metrics
    assert written["metrics"]["dev"] == written["metrics"]["test"]
    assert written["metrics"]["dev"]["before"]["loss"] > written["metrics"]["dev"]["after"]["loss"]
    assert written["ranks"] == read_budget(result.adapter).ranks
    assert [entry["step"] for entry in written["log"] if "eval_loss" in entry] == [4, 8]
    assert (
        load_recipe(tmp_path / "out" / "recipe.yaml").template
        == load_recipe(recipe, ["template.prompt='Is {text} good or bad?'"]).template
    )
    note = json.loads((result.adapter / "gatewise.json").read_text())
    assert note["template"] == "Is {text} good or bad?"
    assert (note["labels"], note["task"], note["base"]) == (["bad", "good"], "causal", str(tmp_path / "llama"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter", "checkpoints", "metrics.json", "ranks.png", "recipe.yaml", "rows.json",
    ]  # fmt: skip
    assert result.pictures["ranks.png"].read_bytes().startswith(b"\x89PNG")


def test_checkpoints_hold_nothing_pickled_but_the_optimisers_state(tmp_path: Path) -> None:
    train(write_recipe(tmp_path), tmp_path / "out")
    folders = complete_checkpoints(tmp_path / "out" / "checkpoints")
    assert [checkpoint_step(path) for path in folders] == [6, 8]
    assert not list((tmp_path / "out").rglob("training_args.bin"))
    assert json.loads((folders[0] / "gatewise.json").read_text())["labels"] == ["bad", "good"]


def test_recomputed_activations_change_nothing_but_memory(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    plain = train(recipe, tmp_path / "plain")
    saved = train(recipe, tmp_path / "saved", "training.gradient_checkpointing=true")
    for name, value in weights(plain.adapter).items():
        torch.testing.assert_close(weights(saved.adapter)[name], value)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr("gatewise.runs.trainer.mean_loss", lambda *_, **__: next(losses))
    settings = ("training.load_best=true", "training.eval_every=2", "training.save_every=2")
    result = train(write_recipe(tmp_path), tmp_path / "out", *settings)
    assert_same_adapter(result.adapter, tmp_path / "out" / "checkpoints" / "checkpoint-4")


def test_the_best_checkpoint_may_be_that_of_the_tasks_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr("gatewise.runs.trainer.mean_loss", lambda *_, **__: next(losses))
    original, found = rows.evaluate, iter([0.1, 0.5, 0.6, 0.9, 0.7, 0.8])  # before training, four times meanwhile, after it
    monkeypatch.setattr(rows, "evaluate", lambda *args, **more: original(*args, **more) | {"accuracy": next(found)})
    settings = ("training.load_best=true", "training.eval_every=2", "training.save_every=2", "training.best_by=accuracy")
    result = train(write_recipe(tmp_path), tmp_path / "out", *settings)
    assert_same_adapter(result.adapter, tmp_path / "out" / "checkpoints" / "checkpoint-6")
    log = [entry for entry in json.loads(result.metrics_file.read_text())["log"] if "eval_loss" in entry]
    assert [(entry["eval_loss"], entry["eval_accuracy"]) for entry in log] == [(0.5, 0.5), (0.2, 0.6), (0.4, 0.9), (0.3, 0.7)]


def test_reporters_are_given_everything_under_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Reporter(TensorBoardCallback):
        def __init__(self) -> None:
            self.logging_dir = self.tb_writer = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["where"] = args.run_name, self.logging_dir

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.update(logs)

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    monkeypatch.setattr(run, "find_spec", {"tensorboard": "there"}.get)
    result = train(write_recipe(tmp_path, "alora"), tmp_path / "mine", "training.report_to=tensorboard", "training.eval_every=4")
    assert seen["where"] == ("mine", str(tmp_path / "mine" / "tensorboard"))
    assert {"loss", "eval_loss", "eval_accuracy", "allocation/loss_before"} <= seen.keys()
    refuses = type("UsageError", (Exception,), {"__module__": "tensorboard.errors"})
    monkeypatch.setattr(Reporter, "on_train_begin", lambda *_, **__: (_ for _ in ()).throw(refuses("No API key configured.")))
    with pytest.raises(GatewiseError, match=r"report_to: tensorboard says: No API key configured\. Put that right"):
        train(tmp_path / "alora.yaml", tmp_path / "other", "training.report_to=tensorboard")
    with pytest.raises(GatewiseError, match="report_to names wandb, which is not installed: pip install wandb"):
        train(tmp_path / "alora.yaml", tmp_path / "mine", "training.report_to=[tensorboard, wandb]", overwrite=True)
    assert result.adapter.is_dir()


def test_a_finished_adapter_is_uploaded_and_nothing_is_lost_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Hub:
        role, fails = "write", False

        def whoami(self) -> Any:
            return {"name": "ada", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": self.role}}}

        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
            calls.append((repository, private, exist_ok))
            return f"https://hub/{repository}"

        def upload_folder(self, folder_path: Path, **_: Any) -> None:
            if self.fails:
                raise OSError("the line\nis dead")
            calls.append({path.name for path in folder_path.iterdir()})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    told = Console(file=io.StringIO(), width=200)
    recipe, out = write_recipe(tmp_path, training={"max_steps": 1}), tmp_path / "out"
    run.train(load_recipe(recipe, ("push_to_hub=lab/mine",)), out, console=told)
    assert calls[0] == ("lab/mine", True, True)
    assert calls[1] >= {"adapter_model.safetensors", "gatewise.json"}
    assert "uploaded to https://hub/lab/mine" in told.file.getvalue()
    Hub.fails = True
    run.train(load_recipe(recipe, ("push_to_hub=ada/mine", "hub_private=false")), out, console=told, overwrite=True)
    assert "could not be uploaded (the line is dead)" in told.file.getvalue()
    assert f"this uploads it: hf upload ada/mine {out}/adapter\n" in told.file.getvalue()
    with pytest.raises(GatewiseError, match="your token writes for ada, lab: expected one of these names"):
        train(recipe, out, "push_to_hub=bob/mine", overwrite=True)
    Hub.role = "read"
    with pytest.raises(GatewiseError, match="your token may only read"):
        train(recipe, out, "push_to_hub=ada/mine", overwrite=True)
    monkeypatch.setattr(Hub, "whoami", lambda self: 1 / 0)
    for token, why in (("hf_x", "division by zero"), (None, "there is no token")):
        monkeypatch.setattr("huggingface_hub.get_token", lambda token=token: token)
        with pytest.raises(GatewiseError, match=rf"the hub does not say who you are \({why}\): log in with `hf auth login`"):
            train(recipe, out, "push_to_hub=ada/mine", overwrite=True)
    assert (out / "metrics.json").is_file()


def test_written_answers_are_as_long_as_the_recipe_says(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    rows = [{"source": f"{number} q", "target": "x"} for number in range(8)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    told = Console(file=io.StringIO(), width=200)
    recipe = load_recipe(tmp_path / "lora.yaml", ("training.max_steps=1", "data.max_new_tokens=2"))
    result = run.train(recipe, tmp_path / "out", console=told)
    lines = told.file.getvalue()
    answers = tmp_path / "answers.jsonl"
    assert (
        measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), out=answers, console=SILENT) == result.metrics["dev"]["after"]
    )
    cut = [json.loads(line) for line in answers.read_text().splitlines() if "cut" in json.loads(line)]
    assert cut
    assert all(len(answer["predicted"]) <= 2 for answer in cut)
    assert f"{len(cut)} of 8 answers had not ended when they were cut; data.max_new_tokens lets them be longer" in lines
    measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), max_new_tokens=5, out=answers, console=SILENT)
    assert any(len(json.loads(line)["predicted"]) > 2 for line in answers.read_text().splitlines())


def test_a_decoder_that_classifies_reads_its_last_token(tmp_path: Path) -> None:
    """Its configuration has no padding token, but its tokenizer has one, which is not the end of text."""
    recipe = write_recipe(tmp_path, task="classification")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config | {"pad_token_id": None, "eos_token_id": 2}))
    result = train(recipe, tmp_path / "out")
    found = [measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), batch_size=size, console=SILENT) for size in (1, 3, 16)]
    for one in found:
        assert one == pytest.approx(result.metrics["dev"]["after"], rel=1e-4)


def test_a_base_that_is_a_classifier_of_these_labels_keeps_their_order(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, family="bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    named = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | named))
    result = train(recipe, tmp_path / "out", "training.max_steps=1")
    assert json.loads((result.adapter / "gatewise.json").read_text())["labels"] == ["good", "bad"]
    result = train(recipe, tmp_path / "own", "training.max_steps=1", "data.labels=[bad, good]")
    assert json.loads((result.adapter / "gatewise.json").read_text())["labels"] == ["bad", "good"]


def test_rows_of_tensors_are_compared_in_full(tmp_path: Path) -> None:
    values = torch.zeros(2000)
    made = SimpleNamespace(train=[{"values": values}], held_out=[], dev=[], watched="dev", output=tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(run._fingerprints(made, resume=False)))
    run._fingerprints(made, resume=True)
    values[1000] = 1
    with pytest.raises(GatewiseError, match=r"the rows of data.train are not those"):
        run._fingerprints(made, resume=True)


def test_a_run_that_goes_on_keeps_the_order_of_its_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that began before its base model's configuration named them, or before gatewise looked there."""
    recipe = write_recipe(tmp_path, family="bert")
    with monkeypatch.context() as patch:
        stop_at(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    named = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | named))
    result = train(recipe, tmp_path / "out", resume=True)
    assert result.resumed_from == 4
    assert json.loads((result.adapter / "gatewise.json").read_text())["labels"] == ["bad", "good"]


@pytest.mark.parametrize("changed", ["another label", "a row more", "another dev"])
def test_a_run_is_not_resumed_with_other_rows(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out")
    file = tmp_path / ("dev.jsonl" if changed == "another dev" else "train.jsonl")
    lines = file.read_text().splitlines()
    other = {"another label": [lines[0].replace("good", "bad"), *lines[1:]], "a row more": [*lines, lines[0]]}
    file.write_text("\n".join(other.get(changed, lines[1:])) + "\n")
    with pytest.raises(GatewiseError, match=rf"the rows of data.{file.stem} are not those that the run in .*out was started with"):
        train(recipe, tmp_path / "out", resume=True)
    file.write_text("\n\n".join(lines))  # the same rows, written otherwise
    assert train(recipe, tmp_path / "out", resume=True).resumed_from == 4


def test_a_run_that_stopped_early_is_not_trained_on_when_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it measured, with the checkpoint of its last step written."""
    losses = itertools.count(1)
    monkeypatch.setattr("gatewise.runs.trainer.mean_loss", lambda *_, **__: float(next(losses)))
    settings = (
        "training.eval_every=2",
        "training.save_every=2",
        "training.early_stopping_patience=1",
        "training.eval_metric=false",
    )
    recipe = write_recipe(tmp_path)
    whole = train(recipe, tmp_path / "whole", *settings)
    original, calls = rows.evaluate, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed", *settings)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path / "killed" / "checkpoints")] == [2, 4]
    resumed = train(recipe, tmp_path / "killed", *settings, resume=True)
    assert (whole.steps, resumed.steps) == (4, 4)
    assert_same_adapter(whole.adapter, resumed.adapter)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ("training.learning_rate=1e30", "training.save_every=1", "training.max_grad_norm=0")
    with pytest.raises(GatewiseError, match=r"at step 3, so the run stopped: the last good checkpoint is .*checkpoint-1;"):
        train(write_recipe(tmp_path), out, *settings)
    # Step 1 only moves B, which leaves the function finite; checkpoint-2 holds the weights that gave no number.
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["checkpoint-1"]
    assert (out / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (out / "adapter").exists()
    assert all(torch.isfinite(value).all() for value in weights(out / "checkpoints" / "checkpoint-1").values())


def test_a_base_model_that_gives_nan_stops_before_the_first_step_and_leaves_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path / "llama")
    with pytest.raises(GatewiseError, match="what the model computes is not finite: look for such numbers"):
        train(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (2, "[enforce fail at inline_container.cc:672] . unexpected pos 16319 vs 16272"),
        (4, "basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_keeps_complete_checkpoints_only(step: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first checkpoint there is nothing to go on with."""
    original = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if f"checkpoint-{step}" in str(path) and str(path).endswith("scheduler.pt"):
            raise RuntimeError(says)
        original(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(GatewiseError, match=r"out could not be written \(.*: free some space"):
        train(write_recipe(tmp_path), tmp_path / "out")
    if step == 2:
        assert not (tmp_path / "out").exists()
        return
    assert [path.name for path in complete_checkpoints(tmp_path / "out" / "checkpoints")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train(write_recipe(tmp_path), tmp_path / "out", resume=True).resumed_from == 2


def test_a_fault_while_the_adapter_is_saved_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PeftModel.save_pretrained

    def broken(self: PeftModel, folder: str, **more: Any) -> None:
        original(self, folder, **more)
        if "checkpoint" not in folder:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", broken)
    with pytest.raises(GatewiseError, match="No space left on device"):
        train(write_recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    recipe = write_recipe(tmp_path)
    train(recipe, tmp_path / "out", "training.max_steps=2")
    return recipe, tmp_path / "out"


def test_an_output_folder_in_use_is_refused_before_any_work(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = finished
    monkeypatch.setattr(rows, "load_records", lambda *_, **__: pytest.fail("data was read"))
    for options, said in [
        ({}, "is not empty: use --resume to go on with the run in it, --overwrite to replace that run"),
        ({"resume": True}, "is finished, there is nothing to resume"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ]:
        with pytest.raises(GatewiseError, match=said):
            train(recipe, out, "training.max_steps=2", **options)
    with pytest.raises(GatewiseError, match=r"there is no complete checkpoint in .*new to resume from: leave --resume out"):
        train(recipe, out.parent / "new", resume=True)
    assert not (out.parent / "new").exists()
    (out.parent / "killed").mkdir()
    shutil.copy(out / "recipe.yaml", out.parent / "killed")  # before its first checkpoint
    with pytest.raises(GatewiseError, match=r"there is no complete checkpoint in .*killed to resume from: take --overwrite"):
        train(recipe, out.parent / "killed", resume=True)


def test_overwriting_replaces_the_run_and_leaves_the_rest(finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = weights(out / "adapter")
    result = train(recipe, out, "training.max_steps=4", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    assert any(not torch.equal(before[name], value) for name, value in weights(result.adapter).items())


def test_the_last_two_checkpoints_are_kept_whichever_is_the_best(tmp_path: Path) -> None:
    every = ("training.eval_every=2", "training.save_every=2")
    out = tmp_path / "out"
    train(write_recipe(tmp_path), out, *every, "training.learning_rate=10")  # by which the first is the best
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "recipe.yaml", "metrics.json"])
def test_a_folder_that_no_run_wrote_is_not_overwritten(name: str, tmp_path: Path) -> None:
    recipe, mine = write_recipe(tmp_path), tmp_path / "mine"
    mine.mkdir()
    if name.endswith(("yaml", "json")):
        (mine / name).write_text("{}" if name.endswith("json") else recipe.read_text())
    else:
        (mine / name).mkdir()
        (mine / name / "weights").write_text("years of work")
    before = sorted(str(path) for path in mine.rglob("*"))
    with pytest.raises(GatewiseError, match=r"mine was not written by gatewise train, so --overwrite leaves it alone"):
        train(recipe, mine, "training.max_steps=2", overwrite=True)
    assert sorted(str(path) for path in mine.rglob("*")) == before


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_two_processes_do_not_train_into_one_folder(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    original, told = RecipeTrainer.compute_loss, []

    def compute_loss(self: RecipeTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and not told:
            told.append(launched(tmp_path, "train", str(recipe), "--output", str(tmp_path / "out"), f"--{how}"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
    result = train(recipe, tmp_path / "out")
    assert told[0].returncode == 2
    assert "out: wait until it ends, or give another --output" in " ".join(told[0].stderr.split())
    assert result.steps == 8
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / ".gatewise.lock").exists()


def test_a_run_is_resumed_only_with_its_own_recipe(finished: tuple[Path, Path]) -> None:
    recipe, out = finished
    (out / "metrics.json").unlink()
    with pytest.raises(GatewiseError, match=r"peft.r is 3, but the run in .* was started with 2: resume it with that"):
        train(recipe, out, "training.max_steps=2", "peft.r=3", resume=True)
    # Only the last step's checkpoint is there, behind which there is nothing to resume: the run is repeated.
    result = train(recipe, out, "training.max_steps=2", "training.log_every=1", "training.eval_batch_size=3", resume=True)
    assert (result.resumed_from, result.steps) == (None, 2)
    (out / "metrics.json").unlink()
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text() + "smoothing: 0.0\n")
    with pytest.raises(GatewiseError, match=r"recipe\.yaml: smoothing is not a known key"):
        train(recipe, out, resume=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["peft.target_modules=[q_proj, k_prj]"], "peft.target_modules: 'k_prj' is no linear module .* k_proj"),
        (["template.prompt='{txet}'"], "{txet}.*but a row has text, label"),
        (["template.prompt='{text} {label}'"], "which is the answer"),
        (["data.dev=sample:none"], "there is no sample 'none'"),
        (["data.labels=[good, poor]"], "train.jsonl, line .*'bad', expected one of good, poor"),
        (["data.dev=sample:reminder-dev"], "holds generation rows, but data.train .* holds label rows"),
        (["data.max_length=8", "template={prompt: '{text}', labels: {good: absolutely, bad: dreadful}}"], "raise max_length"),
        (["method=alora", "allocation.first_round=8"], "allocation.first_round is 8, after step 8, but the run has 8"),
    ],
)
def test_everything_is_checked_before_training(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setattr(RecipeTrainer, "train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(GatewiseError, match=said):
        train(recipe, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=alora", "allocation.first_round=8"],
        ["method=alora", "allocation.score=no_such_module:score"],
        ["training.batch_size=5"],  # in two processes
    ],
)
def test_a_run_is_kept_where_the_one_that_should_overwrite_it_cannot_begin(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    train(recipe, out, "training.max_steps=1")
    monkeypatch.setattr("gatewise.runs.trainer.count", lambda: 2)
    with pytest.raises(GatewiseError, match=r"first_round is 8|no_such_module|cannot share"):
        train(recipe, out, *overrides, overwrite=True)
    assert (out / "metrics.json").is_file()
    assert weights(out / "adapter")


# RoBERTa's first position is the one behind its padding token's number.
@pytest.mark.parametrize(("family", "most"), [("llama", 16), ("bert", 16), ("roberta", 15)])
def test_rows_longer_than_the_model_has_positions_are_cut(family: str, most: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, family=family)
    write_base(tmp_path / family, family, max_position_embeddings=16)
    result = train(recipe, tmp_path / "out", "training.max_steps=1")
    assert json.loads((result.adapter / "gatewise.json").read_text())["max_length"] == most


# Device and precision --------------------------------------------------------------------------------------------------


def test_what_auto_came_to_is_said_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: True)
    said = Console(record=True, width=200, file=io.StringIO())
    result = run.train(load_recipe(write_recipe(tmp_path), ["training.max_steps=1", "device=cpu"]), tmp_path / "out", console=said)
    assert "in bfloat16 on cpu" in said.export_text()
    written = json.loads(result.metrics_file.read_text())
    assert (written["dtype"], written["device"]) == ("bfloat16", "cpu")
    note = json.loads((result.adapter / "gatewise.json").read_text())
    assert (note["dtype"], note["trained_in"]) == ("auto", "bfloat16")
    # The recipe left it open, so the machine that measures decides for itself.
    assert load_as_trained(result.adapter)[0].dtype == torch.bfloat16
    monkeypatch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: False)
    assert load_as_trained(result.adapter)[0].dtype == torch.float32


def test_a_classifier_is_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: True)
    result = train(write_recipe(tmp_path, "lora", "bert"), tmp_path / "out", "training.max_steps=1")
    assert result.dtype == "float32"
    assert load_as_trained(result.adapter)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "fails"),
    [
        ("lora", "gatewise.inspection.report.heatmap"),
        ("milora", "gatewise.inspection.routing.routing_of_rows"),
        ("milora", "gatewise.inspection.report.plot_routing"),
    ],
)
def test_a_picture_that_fails_does_not_lose_the_run(
    method: str, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        assert (tmp_path / "out" / "metrics.json").is_file()
        raise RuntimeError("Expected all tensors to be on the same device")

    monkeypatch.setattr(fails, broken)
    said = Console(record=True, width=300, file=io.StringIO())
    result = run.train(load_recipe(write_recipe(tmp_path, method), ["training.max_steps=1"]), tmp_path / "out", console=said)
    assert "could not be made (RuntimeError: Expected all tensors to be on the same device); adapter and" in said.export_text()
    assert json.loads(result.metrics_file.read_text())["metrics"] == result.metrics
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert ("routing" in result.numbers) == (fails == "gatewise.inspection.report.plot_routing")


@pytest.mark.parametrize("method", ["lora", "milora"])
def test_without_matplotlib_a_run_has_no_picture_and_says_so(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = Console(record=True, width=300, file=io.StringIO())
    result = run.train(load_recipe(write_recipe(tmp_path, method), ["training.max_steps=1"]), tmp_path / "out", console=said)
    assert "drawing needs matplotlib, which is not installed: pip install 'gatewise[plot]'); adapter and" in said.export_text()
    assert result.pictures == {}
    assert (result.adapter / "adapter_model.safetensors").is_file()


def without_pooler(folder: Path, method: str) -> Path:
    """A recipe for a BERT that was saved as a masked language model."""
    recipe = write_recipe(folder, method, "bert")
    config = BertConfig.from_pretrained(folder / "bert")
    BertForMaskedLM(config).save_pretrained(folder / "bert")
    return recipe


@pytest.mark.parametrize("method", ["lora", "adalora", "alora", "milora", "spt"])
def test_a_pooler_that_is_in_no_file_is_trained_and_saved(method: str, tmp_path: Path) -> None:
    """Of a masked language model: an adapter without it would be another one each time that it is loaded."""
    recipe = without_pooler(tmp_path, method)
    train(recipe, tmp_path / "run")
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["dev"]["after"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = measure_adapter(tmp_path / "run" / "adapter", str(tmp_path / "dev.jsonl"))
        assert found["loss"] == pytest.approx(after["loss"], abs=1e-4)
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier", "score"]
    name = "base_model.model.bert.pooler.dense.weight"
    held = weights(tmp_path / "run" / "adapter")
    assert held[name].shape == (16, 16)
    assert not any("pooler" in key and "lora_" in key for key in held)  # no LoRA on what is trained whole


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_prompts_have_no_room_for_a_pooler(method: str, tmp_path: Path) -> None:
    recipe = without_pooler(tmp_path, method)
    with pytest.raises(GatewiseError, match=r"no fitting weights for bert\.pooler\.dense\.bias and 1 more"):
        train(recipe, tmp_path / "run")
