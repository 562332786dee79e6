"""A run with method milora: what it trains, writes and says of the routing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tiny_run import write_adapter, write_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.export import to_lora
from gatewise.bilevel import BilevelMixin
from gatewise.cli.main import app
from gatewise.errors import GatewiseError
from gatewise.inspection.routing import route_data, routing_of_rows
from gatewise.models import load_model, load_tokenizer
from gatewise.routed import RoutedLoraModel
from gatewise.runs import run
from gatewise.runs.recipe import load_recipe
from gatewise.runs.trainer import RecipeTrainer
from gatewise.tasks import default_template, encode, load_records


def train(recipe: Path, output: Path, *overrides: str) -> run.RunResult:
    return run.train(load_recipe(recipe, overrides), output, console=Console(quiet=True))


def numbers(folder: Path, ending: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(folder / "adapter_model.safetensors").items() if name.endswith(ending)}


@pytest.mark.usefixtures("pictures")
def test_the_adapter_is_routed_lora_that_peft_loads(tmp_path: Path) -> None:
    result = train(write_recipe(tmp_path, "milora"), tmp_path / "out", "peft.lora_dropout=0.0")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), str(result.adapter))
    assert isinstance(model.base_model, RoutedLoraModel)
    learnt = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name or "prompt_router" in name)
    kept = sum(value.numel() for name, value in model.named_buffers() if "prompt_router" in name)
    assert kept == 2 * (16 + 2)
    assert result.parameters == {"base": model.get_base_model().num_parameters() - learnt, "adapter": learnt + kept}
    assert set(result.ranks.values()) == {2}
    assert result.metrics["dev"]["after"]["loss"] < result.metrics["dev"]["before"]["loss"]
    # What the run says of dev is what the saved adapter does with it.
    rows = load_records(str(tmp_path / "dev.jsonl"))
    tokenizer = load_tokenizer(str(tmp_path / "llama"))
    routing = routing_of_rows(model, tokenizer, list(encode(rows, tokenizer, default_template(rows), max_length=64)), 3)
    written = json.loads(result.metrics_file.read_text())
    assert written["routing"] == result.numbers["routing"]
    assert [one["share"] for one in written["routing"]["modules"]] == [one.share for one in routing.modules]
    assert written["routing"]["prompts"] == 10
    assert sum(one["share"] for one in written["routing"]["modules"] if one["layer"] == 1) == pytest.approx(2)
    assert (tmp_path / "out" / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_the_activation_learns_on_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upper steps move the rational's coefficients alone, on rows that no lower step sees; with 0 rows all learn together."""
    seen: list[int] = []
    made: list[RecipeTrainer] = []
    original = BilevelMixin.upper_step

    def upper_step(self: BilevelMixin) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        original(self)
        moved = {name for name, p in self.model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert moved
        assert all(name.endswith(("numerator", "denominator")) for name in moved)
        seen.append(self.state.global_step)
        made.append(self)

    monkeypatch.setattr(BilevelMixin, "upper_step", upper_step)
    recipe = write_recipe(tmp_path, "milora")
    train(recipe, tmp_path / "two")
    assert seen == [2, 4, 6, 8]
    trainer: Any = made[0]
    own = [tuple(row["input_ids"]) for row in trainer.upper_dataset]
    assert len(own) == 6
    assert not set(own) & {tuple(row["input_ids"]) for row in trainer.train_dataset}
    train(recipe, tmp_path / "one", "data.held_out=0")
    assert len(seen) == 4
    start = numbers(tmp_path / "two" / "checkpoints" / "checkpoint-6", "numerator")
    assert not torch.equal(*(numbers(tmp_path / name / "adapter", "numerator").popitem()[1] for name in ("two", "one")))
    assert start


def test_the_balance_joins_the_loss_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two batches counts the balance of each by its share of the labels."""
    terms: list[tuple[float, float, float]] = []
    original = RecipeTrainer.compute_loss

    def compute_loss(self: RecipeTrainer, model: Any, inputs: Any, **more: Any) -> Any:
        loss = original(self, model, inputs, **more)
        items = more.get("num_items_in_batch")
        share = float((inputs["labels"] != -100).sum() / items)
        balance = float(model.base_model.balance_loss())
        weight, model.base_model.peft_config["default"].balance_weight = model.base_model.peft_config["default"].balance_weight, 0.0
        state = torch.get_rng_state()
        plain = float(original(self, model, inputs, **more))
        torch.set_rng_state(state)
        model.base_model.peft_config["default"].balance_weight = weight
        terms.append((float(loss) - plain, share * balance, share))
        return loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
    more = ("data.held_out=0", "routing.balance_weight=3.0", "peft.lora_dropout=0.0", "training.max_steps=2")
    train(write_recipe(tmp_path, "milora"), tmp_path / "out", *more, "training.gradient_accumulation=2")
    assert len(terms) == 4
    assert all(added == pytest.approx(expected, rel=1e-4) for added, expected, _ in terms)
    assert all(expected > 0.5 for _, expected, _ in terms)
    assert sum(share for *_, share in terms[:2]) == pytest.approx(1)


def test_agreement_is_that_of_pairs(tmp_path: Path) -> None:
    train(write_recipe(tmp_path, "milora"), tmp_path / "out", "training.learning_rate=0.3")
    model = PeftModel.from_pretrained(load_model(str(tmp_path / "llama")), str(tmp_path / "out" / "adapter"))
    tokenizer, rows = load_tokenizer(str(tmp_path / "llama")), load_records(str(tmp_path / "train.jsonl"))
    features = list(encode(rows, tokenizer, default_template(rows), max_length=64))
    routing = routing_of_rows(model, tokenizer, features)
    choices = []
    for row in features:  # one at a time, and every pair by hand
        routing_of_rows(model, tokenizer, [row])
        gates = model.base_model.routing().gates[0]
        choices.append([{int(i) for i in layer.nonzero()[:, 0]} for layer in gates])
    pairs = [(a, b) for i, a in enumerate(choices) for j, b in enumerate(choices) if i != j]
    overlaps = [len(x & y) / 2 for a, b in pairs for x, y in zip(a, b, strict=True)]
    assert routing.agreement == pytest.approx(sum(overlaps) / len(overlaps))
    distinct = [len({frozenset(choice[layer]) for choice in choices}) for layer in range(2)]
    assert routing.distinct == pytest.approx(sum(distinct) / 2)


def test_what_does_not_go_with_routing_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lora")
    with pytest.raises(GatewiseError, match="routing is not a known key"):
        load_recipe(recipe, ["routing.top_k=2"])
    with pytest.raises(GatewiseError, match=r"top_k is 8, but layer .* has 7 experts"):
        train(write_recipe(tmp_path, "milora"), tmp_path / "out", "routing.top_k=8")
    plain = write_adapter(tmp_path / "plain", tmp_path / "llama")
    with pytest.raises(GatewiseError, match="of type LORA, expected ROUTED_LORA"):
        route_data(plain, str(tmp_path / "dev.jsonl"), DataOptions(base=str(tmp_path / "llama")), console=Console(quiet=True))
    result = train(write_recipe(tmp_path, "milora"), tmp_path / "routed", "training.max_steps=2")
    with pytest.raises(GatewiseError, match="ROUTED_LORA"):
        to_lora(result.adapter, tmp_path / "exported")
    for more, expected in (
        (["--scores"], "--scores was given with --routing"),
        ([], "--routing was given without --data"),
        (["--data", "x.jsonl", "--plot", "map.html"], "ends in .png or .svg"),
    ):
        told = CliRunner().invoke(app, ["inspect", str(plain), "--routing", *more])
        assert (told.exit_code, expected in told.stderr) == (2, True), told.stderr
