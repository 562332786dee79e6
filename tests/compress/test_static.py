"""Routed adapters as plain LoRA: constant routers against the same outputs, choices against counts made by hand."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from routed_reference import gates as reference_gates
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter
from tiny_run import write_adapter, write_base, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.files import read_config
from gatewise.adapters.loading import load_adapter
from gatewise.compress import Static, static, to_static
from gatewise.compress.static import Choice, choice_of, static_gates
from gatewise.errors import GatewiseError
from gatewise.routed import RoutedLoraConfig
from gatewise.routed.statistics import Routing
from gatewise.runs.recipe_file import load_recipe
from gatewise.runs.run import train


def write_routed(folder: Path, base: Path, scale: float = 0.0, **settings: Any) -> Path:
    """A routed adapter whose experts have logits of their own whatever the prompt, and more or less of the prompt's."""
    bert = "Bert" in (base / "config.json").read_text(encoding="utf-8")
    auto: Any = AutoModelForSequenceClassification if bert else AutoModelForCausalLM
    torch.manual_seed(1)
    kind = "SEQ_CLS" if bert else "CAUSAL_LM"
    model = get_peft_model(auto.from_pretrained(base), RoutedLoraConfig(**{"r": 3, "task_type": kind, **settings}))
    random_adapter(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("numerator"):
                # g(x) = 1 for every x, and so logits that are the sums of W_r's rows; with a scale, something of the prompt too.
                parameter.copy_(torch.tensor([1.0, 5 * scale, 0, 0, 0, 0, 0]))
            elif name.endswith("denominator"):
                parameter.zero_()
            elif ".prompt_router." in name and name.endswith(".weight"):
                parameter.copy_(torch.randn(len(parameter), 1) / parameter.shape[1] + scale * torch.randn(parameter.shape))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60, seed=3)


@pytest.fixture(scope="module", params=["llama", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits.flatten() for text in ("very nice", "7 poor", "x")]
    return torch.cat(found)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 3}, {"top_k": 2, "normalize_gates": False}], ids=str)
def test_a_constant_router_loses_nothing(base: Path, rows: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = write_routed(tmp_path / "adapter", base, **settings)
    found = to_static(adapter, str(rows), tmp_path / "static")
    routed, tokenizer, _ = load_adapter(adapter)
    auto: Any = type(routed.get_base_model())
    plain: Any = PeftModel.from_pretrained(auto.from_pretrained(base), str(tmp_path / "static")).eval()
    torch.testing.assert_close(logits(plain, tokenizer), logits(routed, tokenizer), rtol=1e-5, atol=1e-5)
    assert set(found.choice.modal.values()) == {1.0}
    assert found.chosen.modules == found.kept_modules == len(read_config(tmp_path / "static")["target_modules"])
    assert len(found.candidates) == 1  # every share is the same set
    assert abs(found.loss.mean) < 1e-6
    assert found.right is not None
    assert found.right.mean == 0
    config = read_config(tmp_path / "static")
    assert config["peft_type"] == "LORA"
    assert not {"top_k", "pooler", "requires"} & config.keys()


def test_the_files_are_those_of_plain_lora(rows: Path, tmp_path: Path) -> None:
    """Gates are in B, and A is as it was; every module but those that are kept is gone, routers too."""
    base = write_base(tmp_path / "llama")
    adapter = write_routed(
        tmp_path / "adapter", base, top_k=2, use_rslora=True, lora_alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"o_proj": 9}
    )
    (adapter / "gatewise.json").write_text(json.dumps({"task": "causal", "template": "{text} ->", "label_words": None}))
    to_static(adapter, str(rows), tmp_path / "static")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "static"))
    config = read_config(tmp_path / "static")
    paths = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in after})
    assert config["target_modules"] == paths
    assert len(paths) == 2 * 2
    assert not any("lora_router" in name for name in after)
    layers: dict[str, torch.Tensor] = {name: value for name, value in before.items() if name.endswith("lora_router.weight")}
    for name, weight in layers.items():
        layer = name.partition(".self_attn")[0]
        own = [f"{layer}.self_attn.{kind}_proj" for kind in "qkvo"] + [
            f"{layer}.mlp.{kind}_proj" for kind in ("gate", "up", "down")
        ]
        p = weight.double().sum(dim=1).softmax(dim=0).tolist()
        for module, gate in zip(own, reference_gates(p, 2, True), strict=True):
            assert (f"{module}.lora_B.weight" in after) == (gate > 0)
            if gate:
                torch.testing.assert_close(after[f"{module}.lora_B.weight"], gate * before[f"{module}.lora_B.weight"])
                assert torch.equal(after[f"{module}.lora_A.weight"], before[f"{module}.lora_A.weight"])
    assert json.loads((tmp_path / "static" / "gatewise.json").read_text())["template"] == "{text} ->"
    assert json.loads((tmp_path / "static" / "serving.json").read_text())["modules"] == paths
    routed, tokenizer, _ = load_adapter(adapter)
    plain, _, _ = load_adapter(tmp_path / "static")
    torch.testing.assert_close(logits(plain, tokenizer), logits(routed, tokenizer), rtol=1e-5, atol=1e-5)


def routing() -> Routing:
    """Four prompts in two layers of three and two experts."""
    first = [[0.6, 0.4, 0], [0.5, 0.5, 0], [0.7, 0, 0.3], [0.6, 0.4, 0]]
    second = [[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]]
    return Routing(torch.tensor([first, second]).transpose(0, 1), ("a", "b"), (("x", "y", "z"), ("x", "y")))


def test_choices_are_counted() -> None:
    found = choice_of(routing())
    assert found.modal == {"a": 0.75, "b": 0.5}
    assert found.mean_modal == 0.625
    assert found.share == {"a.x": 1.0, "a.y": 0.75, "a.z": 0.25, "b.x": 0.5, "b.y": 0.5}
    assert found.gate == pytest.approx({"a.x": 0.6, "a.y": 0.325, "a.z": 0.075, "b.x": 0.5, "b.y": 0.5})


def test_gates_that_are_left() -> None:
    found, layers = choice_of(routing()), {"a.x": "a", "a.y": "a", "a.z": "a", "b.x": "b", "b.y": "b"}
    assert static_gates(found, ["a.x", "b.y"], layers, scaled=False) == pytest.approx({"a.x": 0.6, "b.y": 0.5})
    assert static_gates(found, ["a.x", "a.y", "b.y"], layers, scaled=True) == pytest.approx(
        {"a.x": 0.6 / 0.925, "a.y": 0.325 / 0.925, "b.y": 1.0}
    )


@pytest.mark.parametrize(
    ("asked", "sets"),
    [
        ({}, [(0.5, ["a.x", "a.y", "b.x", "b.y"]), (0.25, ["a.x", "a.y", "b.x", "b.y", "a.z"])]),
        ({"share": 0.6}, [(0.75, ["a.x", "a.y"])]),
        ({"modules": 1}, [(1.0, ["a.x"])]),
        ({"modules": 9}, [(0.25, ["a.x", "a.y", "b.x", "b.y", "a.z"])]),
    ],
)
def test_sets_go_by_the_share_of_prompts(asked: Mapping[str, Any], sets: list[Any]) -> None:
    found = choice_of(routing())
    assert list(static._sets(found, asked.get("modules"), asked.get("share"))) == sets


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained adapter whose choice moves, and 240 rows."""
    folder = tmp_path_factory.mktemp("moving")
    recipe = write_recipe(folder, "milora", training={"max_steps": 80, "batch_size": 8, "learning_rate": 0.02})
    write_rows(folder / "train.jsonl", 200, seed=1)
    train(load_recipe(recipe), folder / "run")
    model, tokenizer, _ = load_adapter(folder / "run" / "adapter")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("prompt_router.default.weight"):
                parameter.mul_(20)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder / "adapter"))
    shutil.copyfile(folder / "run" / "adapter" / "gatewise.json", folder / "adapter" / "gatewise.json")
    return folder / "adapter", write_rows(folder / "rows.jsonl", 240, seed=3)


def test_what_is_taken_is_what_the_rule_says(moving: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, data = moving
    found: Static = to_static(adapter, str(data), tmp_path / "static", measure="loss")
    assert found.choice.mean_modal < 1
    assert len(found.candidates) > 2
    lowest = min(one.loss for one in found.candidates)
    assert found.chosen.loss <= lowest + static.SLACK
    assert all(
        (one.modules, one.loss) >= (found.chosen.modules, found.chosen.loss)
        for one in found.candidates
        if one.loss <= lowest + static.SLACK
    )
    stored = load_file(tmp_path / "static" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == found.chosen.parameters
    assert found.quality["static"]["loss"] - found.quality["routed"]["loss"] == pytest.approx(found.loss.mean)
    assert found.loss.rows == 240 - 120
    assert math.isnan(found.loss.high)  # too few rows to measure losses
    assert found.right is not None
    assert found.right.low <= found.right.mean <= found.right.high
    # The rows that measure, with the adapter as it lies there, loaded by itself.
    from gatewise.adapters.loading import load_with_data
    from gatewise.compress.quality import qualities, split

    loaded = load_with_data(tmp_path / "static", str(data))
    _, held_out = split(loaded.records, 120, 0)
    again = qualities(loaded.model, loaded.tokenizer, held_out, loaded.template, "loss", max_length=loaded.max_length)
    assert -float(again.mean()) == pytest.approx(found.quality["static"]["loss"], abs=1e-5)
    report = json.loads((tmp_path / "static" / "static.json").read_text())
    assert report["chosen"]["modules"] == found.chosen.modules
    assert report["out"] is None


def test_so_many_modules_and_no_more(moving: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, data = moving
    found = to_static(adapter, str(data), tmp_path / "static", modules=3, measure="loss", rows=80)
    assert found.loss.low <= found.loss.mean <= found.loss.high
    assert found.loss.rows == 240 - 80
    assert len(read_config(tmp_path / "static")["target_modules"]) == 3
    assert all(one.modules == 3 for one in found.candidates)


def test_more_than_the_tolerance_writes_nothing(moving: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, data = moving
    refusal = r"worse than the routed adapter by .* with 95% confidence \(192 rows\), and the tolerance is 1e-06, so nothing was"
    with pytest.raises(GatewiseError, match=refusal):
        to_static(adapter, str(data), tmp_path / "static", modules=1, measure="loss", tolerance=1e-6, rows=48)
    assert list(tmp_path.iterdir()) == []
    to_static(adapter, str(data), tmp_path / "static", modules=1, measure="loss", tolerance=9, rows=48)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules": 2, "share": 0.5}, "modules and share were both given"),
        ({"modules": 0}, "modules is 0: expected at least 1"),
        ({"share": 1.5}, "share is 1.5: expected a share of prompts from 0 to 1"),
        ({"tolerance": 0.0}, "the tolerance is 0.0: expected a number above zero"),
        ({"rows": 5}, "rows is 5: expected at least 20 to choose modules by"),
        ({"measure": "best"}, "measure 'best' is not known; expected right or loss"),
    ],
)
def test_settings_out_of_range(moving: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(GatewiseError, match=said):
        to_static(moving[0], str(moving[1]), tmp_path / "static", **settings)


def test_losses_that_are_no_numbers_are_said(moving: tuple[Path, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(read_config(moving[0])["base_model_name_or_path"], tmp_path / "damaged"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GatewiseError, match="is not finite: look for numbers that are not in the adapter and its base model"):
        to_static(moving[0], str(moving[1]), tmp_path / "static", options=DataOptions(base=str(base)))
    assert not (tmp_path / "static").exists()


def test_what_cannot_be_made_static(moving: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, data = moving
    with pytest.raises(GatewiseError, match=r"is of peft_type 'LORA', expected a routed adapter .*; leave --static out"):
        to_static(write_adapter(tmp_path / "plain", write_base(tmp_path / "llama")), str(data), tmp_path / "static")
    later = write_routed(tmp_path / "later", tmp_path / "llama", adapt="after_prompt")
    with pytest.raises(GatewiseError, match=r"later adapts what comes after a prompt .*: use it routed"):
        to_static(later, str(data), tmp_path / "static")
    few = write_rows(tmp_path / "few.jsonl", 39)
    with pytest.raises(GatewiseError, match="has 39 rows, and of those that choose modules none may measure: give at least 40"):
        to_static(adapter, str(few), tmp_path / "static")
    with pytest.raises(
        GatewiseError, match=r"120 rows to measure on, and a tolerance of 0\.01 cannot be shown with fewer than 300"
    ):
        to_static(adapter, str(data), tmp_path / "static", tolerance=0.01)
    with pytest.raises(GatewiseError, match="is not empty"):
        to_static(adapter, str(data), adapter)
    with pytest.raises(GatewiseError, match="no module is kept by 100% of the prompts"):
        list(static._sets(Choice(4, {"a": 0.5}, {"a.x": 0.5}, {"a.x": 0.5}), None, 1.0))
    assert not (tmp_path / "static").exists()
