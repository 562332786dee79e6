"""Scoring a saved adapter: the same rows as ``gatewise eval``, sums that mean what they say, and a zero that means nothing lost."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS
from tiny_run import write_adapter, write_base, write_rows

from gatewise.adapters.data_options import DataOptions
from gatewise.adapters.loading import load_with_data
from gatewise.allocation.scores import NAMES
from gatewise.allocation.slots import factors, lora_layers
from gatewise.errors import GatewiseError
from gatewise.inspection.importance import importance_of, score_adapter
from gatewise.inspection.suggestion import suggest
from gatewise.losses import mean_loss
from gatewise.runs.measure import measure_adapter
from gatewise.tasks import PadCollator, encode

Adapted = Callable[..., PeftModel]
Batch = Callable[..., dict[str, torch.Tensor]]
QUERY = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter of rank 3 from elsewhere (no gatewise.json) and 12 labelled rows."""
    folder = tmp_path_factory.mktemp("saved")
    write_rows(folder / "rows.jsonl", 12)
    write_adapter(folder / "adapter", write_base(folder / "base"))
    return folder


def scored(folder: Path, adapter: str = "adapter", options: DataOptions = DataOptions(), **settings: Any) -> Any:
    settings = {"score": "path_integral"} | settings  # whose numbers add up to the loss that the adapter takes away
    return score_adapter(folder / adapter, str(folder / "rows.jsonl"), options, **settings)


# ---- the rows and what is summed


def test_the_loss_is_that_of_training_and_the_scores_add_up_to_what_the_adapter_takes_away(saved: Path) -> None:
    """It counts the end of an answer, which is trained, too, and which eval leaves out where it compares candidates."""
    found = scored(saved, rows=99, score_options={"points": 64})  # the path of so strong a random adapter is crooked
    loaded = load_with_data(saved / "adapter", str(saved / "rows.jsonl"), DataOptions())
    batch = PadCollator(loaded.tokenizer)(encode(loaded.records, loaded.tokenizer, loaded.template))
    assert found.rows == len(batch["labels"]) == measure_adapter(saved / "adapter", str(saved / "rows.jsonl"))["n"] == 12
    with torch.no_grad():
        assert found.loss_adapted == pytest.approx(float(loaded.model(**batch).loss), rel=1e-5)
    assert abs(found.loss_base - found.loss_adapted) > 1e-3
    assert found.total == pytest.approx(found.loss_base - found.loss_adapted, rel=1e-3)
    assert (found.score, found.unit, found.data) == ("path_integral", "nats", str(saved / "rows.jsonl"))
    assert found.base_model == str(saved / "base")


def test_the_base_loss_is_that_of_the_model_without_the_adapter(adapted: Adapted, batch: Batch) -> None:
    model, rows = adapted().eval(), batch()
    found = importance_of(model, rows, "taylor")
    with model.disable_adapter():
        assert found.loss_base == pytest.approx(mean_loss(model, [rows]), rel=1e-6)
    assert found.loss_adapted == pytest.approx(mean_loss(model, [rows]), rel=1e-6)


def test_every_module_has_its_place_and_the_sums_are_those_of_its_ranks(saved: Path) -> None:
    found = scored(saved, rows=4)
    assert [module.path for module in found.modules[:3]] == [f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"]
    assert len(found.modules) == 14
    assert {module.rank for module in found.modules} == {3}
    assert found.rank == 42
    assert {module.scaling for module in found.modules} == {2.0}
    rooms = {module.kind: module.room for module in found.modules}
    assert rooms == {"q": 16, "k": 16, "v": 16, "o": 16, "gate": 16, "up": 16, "down": 16}
    assert {module.path for module in found.useless} == {module.path for module in found.modules if sum(module.scores) <= 0}


def test_rows_are_drawn_by_seed(saved: Path) -> None:
    one, again, other = (scored(saved, rows=5, seed=seed) for seed in (3, 3, 4))
    assert one == again
    assert one.rows == other.rows == 5
    assert one.loss_adapted != other.loss_adapted


def test_a_classifier_and_rows_longer_than_its_positions(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", "bert"))
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    rows.write_text(rows.read_text() + json.dumps({"text": "very " * 60, "label": "good"}) + "\n")
    found = scored(tmp_path)
    assert found.rows == 7
    assert {"q", "up", "down", "pooler"} <= {module.kind for module in found.modules}
    assert found.total == pytest.approx(found.loss_base - found.loss_adapted, rel=1e-3)
    rows.write_text(rows.read_text() + json.dumps({"text": "middling", "label": "so so"}) + "\n")
    with pytest.raises(GatewiseError, match=r"its classes \(bad, good\) is which of the labels bad, good, so so: give --labels"):
        scored(tmp_path)


# ---- what a score of zero means


@pytest.mark.parametrize("score", [name for name in NAMES if name != "random"])
def test_a_rank_that_does_nothing_scores_zero(score: str, adapted: Adapted, batch: Batch) -> None:
    model = adapted()
    layer = lora_layers(model)[QUERY]
    with torch.no_grad():
        factors(layer, "default")[1][:, 1] = 0  # alive, because its row of A is not zero
    options = {"mode": "exact"} if score == "ablation" else None
    found = importance_of(model, batch(), score, score_options=options)
    (module,) = (module for module in found.modules if module.path == QUERY)
    assert module.rank == 3
    assert module.scores[1] == pytest.approx(0, abs=0.02 * max(map(abs, module.scores)) if score == "sensitivity" else 1e-12)
    assert all(abs(module.scores[slot]) > 1e-6 for slot in (0, 2))


def test_a_modules_total_does_not_depend_on_how_its_update_is_cut_into_ranks(adapted: Adapted, batch: Batch) -> None:
    model, rows = adapted(), batch()
    before = {module.path: module for module in importance_of(model, rows, "path_integral").modules}
    a, b = factors(lora_layers(model)[QUERY], "default")
    mix = torch.randn(3, 3)
    with torch.no_grad():
        a.copy_(mix @ a)
        b.copy_(b @ mix.inverse())
    after = {module.path: module for module in importance_of(model, rows, "path_integral").modules}
    assert after[QUERY].scores != pytest.approx(before[QUERY].scores, rel=0.05)
    for path, module in before.items():
        assert after[path].total == pytest.approx(module.total, rel=1e-3, abs=1e-6)


def test_dead_slots_have_no_score_and_a_dead_module_is_worth_nothing(adapted: Adapted, batch: Batch) -> None:
    model = adapted()
    with torch.no_grad():
        for path, slots in {QUERY: [0, 1, 2], "model.layers.0.mlp.up_proj": [1]}.items():
            a, b = factors(lora_layers(model)[path], "default")
            a[slots], b[:, slots] = 0, 0
    modules = {module.path: module for module in importance_of(model, batch()).modules}
    assert (modules[QUERY].scores, modules[QUERY].total) == ((), 0.0)
    assert modules["model.layers.0.mlp.up_proj"].rank == 2


# ---- what is refused


def test_each_expert_is_scored_and_none_is_suggested_a_rank(adapted, batch) -> None:
    found = importance_of(adapted("mixtral", **EXPERTS), batch("mixtral"))
    assert not found.unscored
    assert [one.kind for one in found.modules if one.layer == 1] == ["q", "v", *["gate_up"] * 3, *["down"] * 3]
    assert {one.rank for one in found.modules} == {3}
    with pytest.raises(GatewiseError, match=r"adapts parameters or stacked experts \(target_parameters\)"):
        suggest(found, 400)


def test_modules_that_no_score_reads_are_named_or_refused(adapted, batch) -> None:
    both = adapted("wav2vec2", r=4, target_modules=["pos_conv_embed.conv", "q_proj"])
    found = importance_of(both, batch("wav2vec2"))
    assert found.unscored == ("wav2vec2.encoder.pos_conv_embed.conv",)
    assert [module.kind for module in found.modules] == ["q", "q"]
    with pytest.raises(GatewiseError, match=r"adapter 'default' has no LoRA on .*: it has no ranks to score$"):
        importance_of(adapted("wav2vec2", r=4, target_modules=["pos_conv_embed.conv"]), batch("wav2vec2"))


def test_scores_that_are_not_finite_are_refused_with_the_module(saved: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(saved / "base", tmp_path / "base"))
    broken = write_adapter(tmp_path / "broken", base)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GatewiseError, match=r"^the path_integral scores of model\.layers\.\S+ are not finite: "):
        score_adapter(broken, str(saved / "rows.jsonl"), score="path_integral")
