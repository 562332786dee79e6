"""Runs with method spt: search, selection and retraining, each resumable; fixed layers; and PEFT's soft prompts as baselines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import assert_same_adapter, byte_tokenizer, stop_at, write_base, write_recipe
from transformers import AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

from gatewise.adapters.checkpoints import checkpoint_step, complete_checkpoints
from gatewise.adapters.export import to_lora
from gatewise.adapters.files import read_selection
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.inspection import read_prompts
from gatewise.models import load_adapter, load_model
from gatewise.prompts import SelectivePromptConfig
from gatewise.prompts.darts import SearchMixin
from gatewise.prompts.method import SelectivePrompts, fixed_layers
from gatewise.runs import run
from gatewise.runs.measure import measure_adapter
from gatewise.runs.recipe import load_recipe
from gatewise.runs.trainer import RecipeTrainer
from gatewise.tasks import PadCollator

SILENT = Console(quiet=True)
SETTINGS = ("training.gradient_accumulation=2", "training.group_by_length=true", "training.save_every=5")


def train(recipe: Path, output: Path, *overrides: str, **options: Any) -> run.RunResult:
    return run.train(load_recipe(recipe, overrides), output, console=SILENT, **options)


def written(output: Path, name: str = "search.json") -> Any:
    return json.loads((output / name).read_text(encoding="utf-8"))


class SearchingTrainer(SearchMixin, RecipeTrainer):
    """As a run makes it."""


def timeless(search: dict[str, Any]) -> dict[str, Any]:
    """Without what a resume changes: an entry of the Trainer's log knows only the steps since then."""
    return {key: value for key, value in search.items() if key not in ("seconds", "resumed_from", "log")}


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_run(family: str, tmp_path: Path) -> None:
    result = train(write_recipe(tmp_path, "spt", family), tmp_path / "out", "training.eval_every=4")
    search, metrics = written(tmp_path / "out"), written(tmp_path / "out", "metrics.json")
    assert (search["steps"], len(search["gates"]), len(search["layers"])) == (6, 2, 1)
    assert search["layers"] == [max(range(2), key=lambda layer: search["gates"][layer])]
    assert search["settings"]["search"]["keep"] == 1
    assert [entry["step"] for entry in search["log"]] == [2, 4, 6]
    assert all("upper_loss" in entry for entry in search["log"])
    assert metrics["prompt_layers"] == search["layers"]
    assert metrics["gates"] == search["gates"]
    assert metrics["seconds"].keys() == {"evaluation", "search", "training", "total"}
    assert metrics["metrics"]["dev"]["after"]["loss"] < metrics["metrics"]["dev"]["before"]["loss"]
    assert [entry["step"] for entry in metrics["log"] if "eval_loss" in entry] == [4, 8]
    names = ["adapter", "checkpoints", "layers.png", "metrics.json", "recipe.yaml", "rows.json", "search.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    model, _, _ = load_adapter(result.adapter)
    config: Any = model.peft_config["default"]
    assert (config.prompt_layers, config.bottleneck, config.num_prompt_tokens) == (search["layers"], 4, 3)
    stored = sum(value.numel() for value in load_file(result.adapter / "adapter_model.safetensors").values())
    assert result.parameters["adapter"] == stored
    assert result.parameters["base"] > stored
    head = 2 * 16 + 2 if family == "bert" else 0
    assert stored == 2 * 16 * 4 + head
    # What the run says of dev is what the saved adapter does.
    assert measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), console=SILENT) == result.metrics["dev"]["after"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_resumed_in_either_stage_it_ends_as_if_never_stopped(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "spt", family, search={"keep": 1, "max_steps": 8})
    torch.manual_seed(1)
    whole = train(recipe, tmp_path / "whole", *SETTINGS)
    stopped = tmp_path / "stopped"
    # Step 5 is behind the first checkpoint; a step is two batches, in the search with two passes each and one more for the gates.
    for call, stage in ((5 * 5 + 3, "checkpoints/search"), (3 * 5 + 11, "checkpoints")):
        torch.manual_seed(call)  # what is drawn before the run does not matter
        resume = stage == "checkpoints"
        with monkeypatch.context() as patch:
            stop_at(patch, call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                train(recipe, stopped, *SETTINGS, resume=resume)
        assert not (stopped / "adapter").exists()
        assert [checkpoint_step(path) for path in complete_checkpoints(stopped / stage)] == [5]
        assert (stopped / "search.json").exists() == resume
    assert written(stopped)["resumed_from"] == 5
    resumed = train(recipe, stopped, *SETTINGS, resume=True)
    assert (resumed.resumed_from, resumed.steps) == (5, 8)
    assert timeless(written(stopped)) == timeless(written(tmp_path / "whole"))
    assert resumed.metrics == whole.metrics
    assert_same_adapter(whole.adapter, resumed.adapter)


def test_interrupted_between_the_stages_the_search_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "spt")
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 19, KeyboardInterrupt())  # the first batch of the training
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out")
    assert not complete_checkpoints(tmp_path / "out" / "checkpoints")
    monkeypatch.setattr(SearchMixin, "search_from", lambda *_, **__: pytest.fail("it was searched again"))
    result = train(recipe, tmp_path / "out", resume=True)
    assert result.resumed_from is None
    assert result.metrics == whole.metrics
    assert_same_adapter(whole.adapter, result.adapter)


def test_a_search_that_was_tampered_with_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, "spt")
    with monkeypatch.context() as patch:
        stop_at(patch, 19, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "out")
    path = tmp_path / "out" / "search.json"
    good = path.read_text(encoding="utf-8")
    path.write_text('{"layers": [1]}', encoding="utf-8")
    with pytest.raises(GatewiseError, match=r"search.json is not what a search wrote .*: restore it, or search again"):
        train(recipe, tmp_path / "out", resume=True)
    path.write_text(good, encoding="utf-8")
    assert read_selection(path).layers
    overwritten = train(recipe, tmp_path / "out", "prompts.prompt_layers=[1]", "search=", overwrite=True)
    assert not path.exists()
    assert overwritten.numbers["prompt_layers"] == [1]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_step_of_the_search_is_the_formulas(family: str, tmp_path: Path) -> None:
    """CE of a pass with gates dropped plus λ ½ (KL + KL) to another pass, only the labelled logits being computed."""
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    base = load_model(
        write_base(tmp_path / family, family, num_hidden_layers=4, initializer_range=0.5, hidden_dropout_prob=0.0,
                   attention_probs_dropout_prob=0.0),
        task="classification" if family == "bert" else "causal", num_labels=3 if family == "bert" else None,
    )  # fmt: skip
    model = get_peft_model(base, SelectivePromptConfig(num_prompt_tokens=3, bottleneck=4, task_type=task))
    rows: list[dict[str, Any]] = [
        {"input_ids": [9, 4, 7, 30, 8], "labels": 1 if family == "bert" else [-100, -100, -100, 30, 8]},
        {"input_ids": [6, 11, 40, 21, 5, 17, 18], "labels": 2 if family == "bert" else [-100] * 5 + [17, -100]},
    ]
    args = TrainingArguments(str(tmp_path / "x"), max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    trainer = SearchingTrainer(
        model=model, args=args, train_dataset=rows, eval_dataset=[], collator=PadCollator(byte_tokenizer()), note={},
        callbacks=[], upper_dataset=rows, upper_learning_rate=1e-2, consistency=0.3, drop=0.5,
    )  # fmt: skip
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = PadCollator(byte_tokenizer())(rows)
    items = torch.tensor(3) if family == "llama" else torch.tensor(2)
    torch.manual_seed(4)
    got = trainer.training_step(model, dict(batch), items)
    torch.manual_seed(4)
    first, second = torch.rand(4) < 0.5, torch.rand(4) < 0.5
    assert not torch.equal(first, second)
    with torch.no_grad():
        with model.gates_dropped(first):
            one = model(**batch)
        with model.gates_dropped(second):
            other = model(**batch)
        # The labels tell the model its prompt; positions one before a label.
        p, q = one.logits.log_softmax(-1), other.logits.log_softmax(-1)
        if family == "llama":
            where = [(0, 2), (0, 3), (1, 4)]
            p, q = (torch.stack([x[i, j] for i, j in where]) for x in (p, q))
        kl = ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)).mean() / 2
    assert kl > 1e-4
    torch.testing.assert_close(got, one.loss + 0.3 * kl)
    upper = trainer.compute_upper_loss(model, dict(batch))
    torch.testing.assert_close(upper, model(**batch).loss)


def test_settings_reach_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = SearchMixin.search_from
    monkeypatch.setattr(SearchMixin, "search_from", lambda self, *more: seen.append(self) or original(self, *more))
    section = {"keep": 2, "epochs": 0.5, "gate_learning_rate": 0.05, "reparameterise": False, "consistency": 0.0, "drop": 0.25}
    prompts = {"num_prompt_tokens": 2, "bottleneck": 8, "tau": 0.5, "phm": 2, "activation": "tanh"}
    prompts |= {"balanced": False, "normalize_states": False}
    result = train(write_recipe(tmp_path, "spt", search=section, prompts=prompts), tmp_path / "out")
    trainer = seen[0]
    assert (trainer.reparameterise, trainer.consistency, trainer.drop) == (False, 0.0, 0.25)
    assert trainer.upper_learning_rate == 0.05
    # Half of 26 rows are four batches.
    assert trainer.args.max_steps == 2
    train_rows, upper_rows = ([tuple(r["input_ids"]) for r in rows] for rows in (trainer.train_dataset, trainer.upper_dataset))
    assert (len(train_rows), len(upper_rows)) == (13, 13)
    assert not set(train_rows) & set(upper_rows)
    config: Any = load_adapter(result.adapter)[0].peft_config["default"]
    assert config.prompt_layers == [0, 1]
    assert {key: getattr(config, key) for key in prompts} == prompts


def test_length_of_a_search(tmp_path: Path) -> None:
    write_recipe(tmp_path, "spt", search={"keep": 1})

    def steps(rows: int, *overrides: str) -> int:
        return SelectivePrompts(load_recipe(tmp_path / "spt.yaml", overrides)).stage_steps(rows)

    assert steps(26) == 8
    assert steps(26, "search.epochs=2") == 8
    assert steps(27, "search.epochs=1", "training.batch_size=13") == 2
    assert steps(26, "search.max_steps=3") == 3


def test_the_retraining_knows_nothing_of_the_search(tmp_path: Path) -> None:
    """It is the run that has the same layers by a list, on all rows, the head of a classifier included."""
    for family in ("llama", "bert"):
        searched = train(write_recipe(tmp_path, "spt", family), tmp_path / family / "searched")
        layers = f"prompts.prompt_layers={searched.numbers['prompt_layers']}"
        fixed = train(write_recipe(tmp_path, "spt", family), tmp_path / family / "fixed", layers, "search=")
        assert_same_adapter(searched.adapter, fixed.adapter)
        assert searched.metrics == fixed.metrics
        assert "gates" not in fixed.numbers
        assert "search" not in fixed.seconds


def test_fixed_choices(tmp_path: Path) -> None:
    assert fixed_layers("first", 4, 12) == [0, 1, 2, 3]
    assert fixed_layers("last", 4, 12) == [8, 9, 10, 11]
    assert fixed_layers("spread", 4, 12) == [0, 3, 6, 9]
    assert fixed_layers("spread", 4, 30) == [0, 7, 15, 22]
    drawn = [tuple(fixed_layers("random", 4, 12, seed)) for seed in range(20)]
    assert len(set(drawn)) > 10
    assert all(sorted(set(one)) == [*one] and len(one) == 4 and one[-1] < 12 for one in drawn)
    assert fixed_layers("random", 4, 12, 7) == list(drawn[7])
    write_recipe(tmp_path, "spt")
    del_search = ("search=", "prompts.keep=1", "training.max_steps=2")
    for choice, layer in (("first", 0), ("last", 1)):
        result = train(tmp_path / "spt.yaml", tmp_path / choice, *del_search, f"prompts.prompt_layers={choice}")
        prompts = read_prompts(result.adapter)
        assert (prompts.chosen, prompts.gates, prompts.layers) == ((layer,), None, 2)


@pytest.mark.parametrize("method", ["spt", "prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_before_is_the_base_model(method: str, family: str, tmp_path: Path) -> None:
    """The same for all methods, with the same head; and measuring it leaves the adapter trainable."""
    lora = train(write_recipe(tmp_path, "lora", family), tmp_path / "lora", "training.max_steps=1")
    more = ("prompts.prompt_layers=[0]", "search=") if method == "spt" else ()
    result = train(write_recipe(tmp_path, method, family), tmp_path / "out", *more)
    assert result.metrics["dev"]["before"] == lora.metrics["dev"]["before"]
    assert result.metrics["dev"]["after"]["loss"] < result.metrics["dev"]["before"]["loss"]


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_pefts_own_prompts(method: str, family: str, tmp_path: Path) -> None:
    """Trained, saved and measured again alike; PEFT loads them without gatewise."""
    result = train(write_recipe(tmp_path, method, family), tmp_path / "out")
    assert (result.pictures, result.ranks, result.numbers) == ({}, {}, {})
    head = 2 * 16 + 2 if family == "bert" else 0
    assert result.parameters["adapter"] == 3 * 16 * (1 if method == "prompt-tuning" else 2 * 2) + head
    assert measure_adapter(result.adapter, str(tmp_path / "dev.jsonl"), console=SILENT) == result.metrics["dev"]["after"]
    if family == "llama":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), str(result.adapter))
        kind = str(model.peft_config["default"].peft_type).rpartition(".")[2]
        assert kind == method.replace("-", "_").upper()
        # 96 positions, of which the prompt takes three.
        long = train(write_recipe(tmp_path, method, family), tmp_path / "long", "data.max_length=512", "training.max_steps=1")
        assert written(long.adapter, "gatewise.json")["max_length"] == 93


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_the_best_soft_prompt_is_loaded_at_the_end(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr("gatewise.runs.trainer.mean_loss", lambda *_, **__: next(losses))
    settings = ("training.load_best=true", "training.eval_every=2", "training.save_every=2")
    result = train(write_recipe(tmp_path, method, "bert"), tmp_path / "out", *settings)
    assert_same_adapter(result.adapter, tmp_path / "out" / "checkpoints" / "checkpoint-4")


@pytest.mark.parametrize("method", ["alora", "spt", "prompt-tuning"])
def test_mixed_precision_and_recomputed_activations(method: str, tmp_path: Path) -> None:
    more = ("dtype=bfloat16", "training.bf16=true", "training.gradient_checkpointing=true")
    result = train(write_recipe(tmp_path, method), tmp_path / "out", *more)
    assert {value.dtype for value in load_file(result.adapter / "adapter_model.safetensors").values()} == {torch.float32}
    assert result.metrics["dev"]["after"]["loss"] < result.metrics["dev"]["before"]["loss"]


@pytest.mark.usefixtures("pictures")
def test_inspect_and_export(tmp_path: Path) -> None:
    result = train(write_recipe(tmp_path, "spt"), tmp_path / "out")
    gates = result.numbers["gates"]
    adapter = str(result.adapter)
    shown = CliRunner().invoke(app, ["inspect", adapter, "--plot", str(tmp_path / "layers.svg")])
    assert shown.exit_code == 0, shown.output
    (layer,) = result.numbers["prompt_layers"]
    assert f"layers with a new prompt: {layer} of 2 (chosen by the search)" in shown.stdout
    assert f"{gates[1 - layer]:.3f}" in shown.stdout
    assert (tmp_path / "layers.svg").read_text().count("<svg") == 1
    told = json.loads(CliRunner().invoke(app, ["inspect", adapter, "--json"]).stdout)
    assert (told["chosen"], told["gates"]) == ([layer], pytest.approx(gates))
    # A checkpoint of the search is a hyper-network.
    folder = complete_checkpoints(tmp_path / "out" / "checkpoints" / "search")[-1]
    told = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert (told["hyper_network"], told["gates"]) == (True, pytest.approx(gates, abs=1e-6))
    soft = train(write_recipe(tmp_path, "prefix-tuning"), tmp_path / "soft", "training.max_steps=1")
    for args, said in ((["inspect", str(soft.adapter)], "peft_type is PREFIX_TUNING, expected a LoRA adapter"),):
        refused = CliRunner().invoke(app, args)
        assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr
    for one in (result.adapter, soft.adapter):
        with pytest.raises(GatewiseError, match=r"_(PROMPT|TUNING): it adds prompt tokens, not weights, so it cannot be LoRA"):
            to_lora(one, tmp_path / "exported")
    (result.adapter / "adapter_model.safetensors").write_bytes(b"no")
    refused = CliRunner().invoke(app, ["inspect", adapter])
    assert (refused.exit_code, "is damaged or cut short" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        ("spt", ["search.keep=3"], r"search.keep is 3, expected at most 2, the layers of .*llama"),
        ("spt", ["search=", "prompts.prompt_layers=random", "prompts.keep=3"], "prompts.keep is 3, expected at most 2"),
        ("spt", ["search=", "prompts.prompt_layers=[2]"], "prompt_layers names layer 2, but the model has 2 layers"),
        ("spt", ["prompts.bottleneck=9", "prompts.phm=3"], "phm is 3, which does not divide the model's hidden size 16"),
        ("prompt-tuning", ["prompts.num_prompt_tokens=96"], "num_prompt_tokens leaves none of .* positions .*: lower it by 1"),
        ("prompt-tuning", ["task=classification", "template="], "is a decoder, which classifies by the last token"),
    ],
)
def test_refused_before_anything_is_trained(
    method: str, overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, method)
    monkeypatch.setattr("gatewise.runs.trainer.RecipeTrainer.train", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises(GatewiseError, match=said):
        train(recipe, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()
