"""`gatewise train` with task text2mdt: every method, what it writes, resuming, and data that cannot be pointed at."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gatewise_mdt import DecisionTree, Extraction, load_extractor, measure, sample
from gatewise_mdt.pointing.calibration import Calibration
from gatewise_mdt.pointing.extractor import PointingExtractor
from gatewise_mdt.pointing.model import PointingCollator, PointingModel, encode_texts
from gatewise_mdt.pointing.task import METRICS, Text2Mdt, read_records, training_rows
from gatewise_mdt.records import TreeRecord
from mdt_trees import node, triple
from pointing_models import GOUT, RECORDS, write_pointing, write_trees
from rich.console import Console
from tiny_run import assert_same_adapter, byte_tokenizer, stop_at, weights
from transformers import PreTrainedTokenizerFast

from gatewise.adapters.checkpoints import checkpoint_step, complete_checkpoints
from gatewise.errors import GatewiseError
from gatewise.internals.soft_prompt_fixes import without_prompts
from gatewise.prompts.forward import PromptPass
from gatewise.runs import run
from gatewise.runs.recipe import load_recipe, recipe_as_yaml

TEXTS = [record.text for record in RECORDS]


def train(recipe: Path, output: Path, *overrides: str, **options: Any) -> run.RunResult:
    return run.train(load_recipe(recipe, overrides), output, console=Console(quiet=True), **options)


def told(recipe: Path, output: Path, *overrides: str) -> str:
    stream = io.StringIO()
    run.train(load_recipe(recipe, overrides), output, console=Console(file=stream, width=300))
    return stream.getvalue()


def found_by(extractor: PointingExtractor) -> list[Any]:
    found = extractor(TEXTS)
    assert all(isinstance(one, Extraction) for one in found)
    return [(one.tree, one.confidence) for one in found if isinstance(one, Extraction)]


# One of each way in which PEFT saves: heads beside LoRA, compacted, and in the two types of gatewise's own.
@pytest.mark.parametrize(("method", "family"), [("lora", "llama"), ("alora", "llama"), ("milora", "llama"), ("spt", "bert")])
def test_what_is_loaded_is_what_was_trained(method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees and confidence bit for bit, heads in the adapter's own file, calibration in its note."""
    kept: list[Any] = []
    note_after = Text2Mdt.note_after
    monkeypatch.setattr(Text2Mdt, "note_after", lambda self, run, model: kept.append(model) or note_after(self, run, model))
    monkeypatch.setattr("gatewise_mdt.pointing.task.fitted", lambda *_: Calibration((0.5, 1.0, 1.5, 0.25), 0.75))
    result = train(write_pointing(tmp_path, method, family), tmp_path / "out")
    assert sum("heads" in name for name in weights(result.adapter)) > 10
    loaded = PointingExtractor.load(result.adapter, batch_size=3)
    assert loaded.calibration == Calibration((0.5, 1.0, 1.5, 0.25), 0.75)
    in_memory = PointingExtractor(kept[0].eval(), loaded.tokenizer, 3, loaded.calibration)
    assert found_by(loaded) == found_by(in_memory)
    assert {name: measure(loaded, RECORDS)[name] for name in METRICS} == result.metrics["dev"]["after"]
    assert result.parameters["adapter"] == sum(one.numel() for one in weights(result.adapter).values())
    if method == "milora":
        assert result.numbers["routing"]["prompts"] == len(RECORDS)
    if method in ("alora", "pi-lora"):
        (one,) = json.loads((result.adapter / "allocation.json").read_text())["rounds"]
        assert one["loss_before"] > 1  # nats of a whole tree
        assert sum(map(len, one["pruned"].values())) > 0


def test_resumed_after_an_interrupt_it_ends_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_pointing(tmp_path, "alora")
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped")
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path / "stopped" / "checkpoints")] == [2]
    resumed = train(recipe, tmp_path / "stopped", resume=True)
    assert resumed.metrics == whole.metrics
    assert_same_adapter(whole.adapter, resumed.adapter)


def test_texts_to_tune_on_are_not_trained_on_and_each_text_has_its_f1(tmp_path: Path) -> None:
    def half(texts: list[str], **_: Any) -> list[Any]:
        """Finds the trees of the first and third text alone."""
        return [Extraction(one.text, one.tree, "en") if at % 2 == 0 else GatewiseError("") for at, one in enumerate(RECORDS)]

    each: list[float] = []
    assert 0 < measure(half, RECORDS, each=each)["triplet_f1"] < 1
    assert each == [1, 0, 1, 0]
    # Each text is there twice, and a quarter of all are two.
    result = train(write_pointing(tmp_path), tmp_path / "out", "data.tuning=5", measured=("tuning",), before=False)
    assert [len(one) for one in result.rows.values()] == [2]
    said = told(tmp_path / "lora-llama.yaml", tmp_path / "again", "data.tuning=5")
    assert "data.tuning: 2 of the 8 rows of data.train are not trained on" in said


def test_merged_it_finds_the_same_trees(tmp_path: Path) -> None:
    result = train(write_pointing(tmp_path), tmp_path / "out")
    extractor = PointingExtractor.load(result.adapter)
    before = found_by(extractor)
    merged = replace(extractor, model=extractor.model.merge_and_unload())
    assert isinstance(merged.model, PointingModel)
    assert [tree for tree, _ in found_by(merged)] == [tree for tree, _ in before]


def test_a_checkpoint_is_an_adapter_without_calibration(tmp_path: Path) -> None:
    train(write_pointing(tmp_path), tmp_path / "out")
    extractor = load_extractor(tmp_path / "out" / "checkpoints" / "checkpoint-2")
    assert isinstance(extractor, PointingExtractor)
    assert extractor.calibration is None
    assert found_by(extractor)


@pytest.mark.parametrize(
    "settings",
    [
        ("training.gradient_accumulation=2", "training.group_by_length=true", "dtype=bfloat16"),
        (
            *("training.bf16=true", "training.eval_every=1", "training.early_stopping_patience=2"),
            *("training.load_best=true", "training.save_every=1"),
        ),
    ],
)
def test_settings_of_training(settings: tuple[str, ...], tmp_path: Path) -> None:
    result = train(write_pointing(tmp_path), tmp_path / "out", *settings)
    assert {one.dtype for name, one in weights(result.adapter).items() if "heads" in name} == {torch.float32}
    log = json.loads(result.metrics_file.read_text())["log"]
    assert all(0 < entry["loss"] < 1000 for entry in log if "loss" in entry)
    if "training.load_best=true" in settings:
        losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
        best = min(losses, key=lambda step: losses[step])
        best_weights = weights(tmp_path / "out" / "checkpoints" / f"checkpoint-{best}")
        assert all(torch.equal(one, best_weights[name]) for name, one in weights(result.adapter).items())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_prompts_stand_beside_the_text_and_move_none_of_it(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no token of the text may look at the prompts, each state is that of the model without any."""
    settings = {"num_prompt_tokens": 3, "prompt_layers": [0]}
    extractor = PointingExtractor.load(
        train(write_pointing(tmp_path, "spt", family, search=None, prompts=settings), tmp_path / "out").adapter
    )
    batch = PointingCollator(extractor.tokenizer)(encode_texts(TEXTS, extractor.tokenizer))
    there = batch["attention_mask"].bool()
    model, mask = extractor.model, PromptPass.mask

    def hidden(self: PromptPass, given: Any) -> Any:
        made = mask(self, given).clone()
        made[..., 3:, :3] = False if made.dtype == torch.bool else torch.finfo(made.dtype).min
        return made

    with torch.no_grad():
        prompted = model(**batch).states
        with without_prompts(model):
            bare = model(**batch).states
        monkeypatch.setattr(PromptPass, "mask", hidden)
        unseen = model(**batch).states
    assert prompted.shape == bare.shape
    assert not torch.allclose(prompted[there], bare[there], atol=1e-4)
    assert torch.allclose(unseen[there], bare[there], atol=1e-5)


# ---- recipes ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"template": {"prompt": "{text}"}}, "template is not a known key"),
        ({"task": "causal"}, "pointing is not a known key"),
        ({"data": {"train": "train.json", "dev": "dev.json", "labels": ["a", "b"]}}, "data.labels is not a known key"),
        ({"pointing": {"width": 10}}, "pointing.width: Input should be a multiple of 4, got 10"),
        ({"pointing": {"longest": 0}}, "pointing.longest: Input should be greater than 0, got 0"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError) as error:
        load_recipe(write_pointing(tmp_path, **changes))
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning"])
def test_prompts_in_front_of_the_text_are_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=f"method is {method}, whose prompts stand before the text"):
        load_recipe(write_pointing(tmp_path, method, peft=None))


def test_a_search_that_compares_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"search\.consistency compares the classes or words .* set it to 0"):
        load_recipe(write_pointing(tmp_path, "spt", search=None))
    assert load_recipe(write_pointing(tmp_path, "spt")).search.consistency == 0


def test_trees_beside_the_recipe_are_found(tmp_path: Path) -> None:
    recipe = write_pointing(tmp_path, data={"train": "train.json", "dev": "dev.json"})
    assert load_recipe(recipe).data.train == str(tmp_path / "train.json")


def test_the_recipe_is_written_back_whole(tmp_path: Path) -> None:
    recipe = load_recipe(write_pointing(tmp_path))
    (tmp_path / "again.yaml").write_text(recipe_as_yaml(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


# ---- data ----


def test_the_sample_has_two_sides() -> None:
    dev, rest = (read_records(f"sample:guideline-trees-{side}") for side in ("dev", "train"))
    assert read_records("sample:guidelines") == sample()
    assert sorted(one.number for one in (*dev, *rest)) == [one.number for one in sample()]
    assert all(one.number % 5 == 0 for one in dev)
    assert read_records("sample:guideline-trees-dev", 2) == dev[:2]
    with pytest.raises(GatewiseError, match="there is no sample 'sample:trees' of trees: expected sample:guidelines, "):
        read_records("sample:trees")


def test_what_is_put_right_in_trees_is_told(tmp_path: Path) -> None:
    items = [record.to_json() for record in RECORDS]
    items[2]["tree"] = [node("D", triple("blisters"), triple("rash"))]
    (tmp_path / "slips.json").write_text(json.dumps(items))
    told: list[str] = []
    assert read_records(str(tmp_path / "slips.json"), told=told)[2].tree.nodes[0].logical_rel == "and"
    assert told == [f'{tmp_path}/slips.json: once "null" over several triples read as "and"']


def test_files_with_faults_are_refused(tmp_path: Path) -> None:
    items = [record.to_json() for record in RECORDS]
    items[2]["tree"] = [node("C", triple("blisters"))]
    (tmp_path / "faults.json").write_text(json.dumps(items))
    with pytest.raises(GatewiseError, match=r"faults\.json, record 3"):
        read_records(str(tmp_path / "faults.json"))
    with pytest.raises(GatewiseError, match=r"nowhere\.json"):
        read_records(str(tmp_path / "nowhere.json"))


BARE = [TreeRecord(f"{i}@nothing to do", DecisionTree.from_preorder([node("D")])) for i in range(3)]
ELSEWHERE = [TreeRecord("a@b c", DecisionTree.from_preorder([node("D", triple("not there", "drug therapy", "a"))]))]


@pytest.mark.parametrize(
    ("train_on", "dev", "overrides", "said"),
    [
        (BARE, RECORDS, (), "of the 3 trees of data.train none is left with a triple"),
        (ELSEWHERE, RECORDS, (), "of the 1 trees of data.train none is left with a triple"),
        (RECORDS, RECORDS, ("data.max_length=8",), "of the 4 trees of data.train none is left with a triple"),
        (RECORDS, [GOUT], ("data.max_length=130",), "of the 1 trees of data.dev none is left"),
    ],
)
def test_nothing_to_learn_from_is_said_before_training(
    train_on: list[TreeRecord], dev: list[TreeRecord], overrides: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    recipe = write_pointing(tmp_path)
    write_trees(tmp_path / "train.json", train_on)
    write_trees(tmp_path / "dev.json", dev)
    with pytest.raises(GatewiseError, match=said):
        train(recipe, tmp_path / "out", *overrides)
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_pointing(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(GatewiseError, match="does not say where in a text its tokens stand: give a model with a fast tokenizer"):
        train(recipe, tmp_path / "out")


@pytest.mark.parametrize("swapped", [0, 3])
def test_what_is_left_out_is_told(swapped: int, tmp_path: Path) -> None:
    recipe = write_pointing(tmp_path)
    long = TreeRecord(f"gout@{'very ' * 120}bad", DecisionTree.from_preorder([node("D", triple("bad", "drug therapy", "gout"))]))
    write_trees(tmp_path / "train.json", [*RECORDS, *ELSEWHERE, long])
    said = told(recipe, tmp_path / "out", f"pointing.swapped={swapped}", "training.max_steps=1")
    assert "data.train: 1 of 19 triples cannot be pointed at" in said
    assert "data.train: 1 of 6 trees lose a node by that, or have a node twice: only their phrases are trained on" in said
    assert f"data.train: {1 + swapped} of {6 * (1 + swapped)} texts have more than 512 tokens and are left out" in said


def test_a_tree_with_a_node_twice_is_told_of(tmp_path: Path) -> None:
    twice = node("D", triple("bad", "drug therapy", "gout"))
    other = node("C", triple("worse", "clinical manifestation", "gout"))
    write_trees(tmp_path / "train.json", [TreeRecord("gout@bad or worse", DecisionTree.from_preorder([other, twice, twice]))])
    recipe = write_pointing(tmp_path / "recipe")
    said = told(recipe, tmp_path / "out", f"data.train={tmp_path}/train.json", "training.max_steps=1")
    assert "data.train: 1 of 1 trees lose a node by that, or have a node twice" in said
    assert "cannot be pointed at" not in said.replace("data.dev", "")


def test_what_is_left_out_is_counted_as_all_is() -> None:
    """A triple of several nodes stands in each."""
    finding, drug = triple("absent finding"), triple("another drug", "drug therapy")
    tree = DecisionTree.from_preorder([node("C", finding), node("C", finding), node("D", drug), node("D", drug), node("D", drug)])
    said: list[str] = []
    records = [*RECORDS, TreeRecord("a@something else", tree)]
    training_rows(records, byte_tokenizer(), longest=8, max_length=512, say=said.append)
    triples = sum(len(one.triples) for record in RECORDS for one in record.tree.nodes)
    assert said[0].startswith(f"data.train: 5 of {triples + 5} triples cannot be pointed at")


@pytest.mark.parametrize("swapped", [0, 3])
def test_what_is_held_out_has_no_copy_in_training(swapped: int) -> None:
    tokenizer = byte_tokenizer()
    limits: dict[str, Any] = {"longest": 8, "max_length": 512, "say": lambda _: None}
    rows = training_rows(sample(), tokenizer, swapped=swapped, **limits)
    kept, held = run._hold_out(rows, 10, 0)
    assert len(held) == 10
    assert len(kept) == len(rows) - 10 * (1 + swapped)
    assert not {row["group"] for row in kept} & {row["group"] for row in held}
    originals = training_rows(sample(), tokenizer, **limits)
    assert [row["input_ids"] for row in held] == [originals[row["group"]]["input_ids"] for row in held]


def test_one_record_of_one_node_and_a_dev_of_nothing(tmp_path: Path) -> None:
    recipe = write_pointing(tmp_path)
    write_trees(tmp_path / "train.json", RECORDS[3:])
    write_trees(tmp_path / "dev.json", BARE)
    result = train(recipe, tmp_path / "out", "pointing.swapped=3", "training.eval_every=2", f"data.test={tmp_path}/dev.json")
    assert result.metrics["dev"]["after"]["n"] == 3


def test_documents_are_not_dealt_out(tmp_path: Path) -> None:
    with pytest.raises(
        GatewiseError, match=r"data.dev: expected a file or another source of rows, .* does not split its rows, got 0.1"
    ):
        load_recipe(write_pointing(tmp_path), ["data.dev=0.1"])
