"""Several adapters made smaller together."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tiny_run import NAMED, SIZES, byte_tokenizer, weights, write_adapter, write_base, write_recipe, write_rows
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from gatewise.adapters.files import read_config, read_lora
from gatewise.adapters.loading import base_weights_in, load_adapter
from gatewise.allocation.slots import lora_layers
from gatewise.cli.main import app
from gatewise.compress import Goal, compress, compress_shared, sharing
from gatewise.compress.work import alone
from gatewise.errors import GatewiseError
from gatewise.files import write_json
from gatewise.runs.recipe_file import load_recipe
from gatewise.runs.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base, "one" and "two", trained on unlike seeds, and rows for each. Queries do nothing in either."""
    folder = tmp_path_factory.mktemp("shared")
    for seed, name in enumerate(("one", "two")):
        recipe = write_recipe(folder, training={"max_steps": 100, "batch_size": 8, "learning_rate": 0.02}, seed=seed)
        write_rows(folder / "train.jsonl", 200, seed=1 + seed)
        write_rows(folder / f"{name}.jsonl", 240, seed=5 + seed)
        train(load_recipe(recipe), folder / f"run-{name}")
        model, _, _ = load_adapter(folder / f"run-{name}" / "adapter")
        with torch.no_grad():
            for path, layer in lora_layers(model, "default").items():
                if "q_proj" in path:
                    layer.lora_B["default"].weight.mul_(1e-6)
        model.save_pretrained(str(folder / name), save_embedding_layers=False)
        shutil.copyfile(folder / f"run-{name}" / "adapter" / "gatewise.json", folder / name / "gatewise.json")
    return folder


def together(folder: Path, out: Path, goal: Goal, **settings: Any) -> Any:
    data = [str(folder / "one.jsonl"), str(folder / "two.jsonl")]
    return compress_shared([folder / "one", folder / "two"], data, out, goal, measure="loss", score_rows=30, **settings)


def test_merging_to_compare_leaves_the_base_of_the_others_as_it_was(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In bfloat16, where taking out again what was merged does not give back the same numbers."""
    monkeypatch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: True)
    real, seen = sharing.written, []

    def written(chosen: Any, out: Path, search: Any, *rest: Any, **more: Any) -> Any:
        def base() -> list[torch.Tensor]:
            named = search.loaded.model.named_parameters()
            return [value.detach().clone() for name, value in named if ".base_layer." in name]

        before = base()
        made = real(chosen, out, search, *rest, **more)
        assert made.deviation["merged"] > 0
        assert {value.dtype for value in before} == {torch.bfloat16}
        assert all(torch.equal(one, other) for one, other in zip(base(), before, strict=True))
        seen.append(out.name)
        return made

    monkeypatch.setattr(sharing, "written", written)
    together(folder, tmp_path / "out", Goal(modules=4))
    assert seen == ["one", "two"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_adapter_with_base_weights_of_its_own_is_refused(family: str, tmp_path: Path) -> None:
    """PEFT would read them into the base model after the first adapter was measured on it."""
    base, rows = write_base(tmp_path / "base", family), write_rows(tmp_path / "rows.jsonl", 60, seed=3)
    one = write_adapter(tmp_path / "one", base)
    words = "word_embeddings" if family == "bert" else "embed_tokens"
    two = write_adapter(tmp_path / "two", base, target_modules=[words, "query" if family == "bert" else "q_proj"])
    (name,) = (key for key in load_file(base / "model.safetensors") if words in key)
    prefix = "base_model.model." + ("" if name.startswith(("model.", "bert.")) else "bert.")
    held = load_file(base / "model.safetensors")[name]

    def shared(change: float, out: str) -> Any:
        own = weights(two) | {f"{prefix}{name}".replace(".weight", ".base_layer.weight"): held + change}
        save_file(own, two / "adapter_model.safetensors", metadata={"format": "pt"})
        return compress_shared([one, two], [str(rows)], tmp_path / out, Goal(modules=14), measure="loss", score_rows=8)

    with pytest.raises(GatewiseError, match=r"two has other base weights .* save_embedding_layers=False"):
        shared(0.5, "refused")
    assert shared(0.0, "same").adapters["one"].chosen.size.modules > 0


def test_embeddings_that_were_saved_without_lora_are_base_weights_too(tmp_path: Path) -> None:
    """``save_embedding_layers`` gives them the names of the base model."""
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 60, seed=3)
    one, two = write_adapter(tmp_path / "one", base), write_adapter(tmp_path / "two", base)
    whole = write_adapter(tmp_path / "whole", base, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    assert any("input_layernorm" in name for name in weights(whole))  # PEFT takes all names that end so
    assert base_weights_in(one) == base_weights_in(whole) == []
    save_file({"base_model.model.lm_head.original_module.weight": torch.ones(1)}, whole / "adapter_model.safetensors")
    assert base_weights_in(whole) == ["base_model.model.lm_head.original_module.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    held = load_file(base / "model.safetensors")["model.embed_tokens.weight"]

    def shared(change: float, out: str) -> Any:
        save_file(weights(two) | {key: held + change}, two / "adapter_model.safetensors", metadata={"format": "pt"})
        return compress_shared([one, two], [str(rows)], tmp_path / out, Goal(modules=10), measure="loss", score_rows=8)

    with pytest.raises(GatewiseError, match=rf"two has other base weights \({key}\) than the base model"):
        shared(0.5, "refused")
    shared(0.0, "same")
    assert torch.equal(weights(tmp_path / "same" / "two")[key], held)


def test_what_cannot_be_shared_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 60, seed=3)
    one, dora = write_adapter(tmp_path / "one", base), write_adapter(tmp_path / "dora", base, use_dora=True)
    tokens = write_adapter(tmp_path / "tokens", base, trainable_token_indices={"embed_tokens": [5, 6]})
    monkeypatch.setattr(sharing.Search, "prepare", lambda _: pytest.fail("an adapter was prepared"))
    goal = Goal(modules=8)
    with pytest.raises(
        GatewiseError, match=r"dora has a magnitude, .* so that the module cannot go as a whole: leave this adapter out"
    ):
        compress_shared([dora, one], [str(rows)], tmp_path / "out", goal)
    for order in ([one, tokens], [tokens, one]):
        with pytest.raises(GatewiseError, match=r"tokens trains single tokens .* and \S+one does not: compress them apart"):
            compress_shared(order, [str(rows)], tmp_path / "out", goal)
    with pytest.raises(GatewiseError, match="measure 'accuracy' is not known; expected one of right, loss"):
        compress_shared([one, one], [str(rows)], tmp_path / "out", goal, measure="accuracy")  # type: ignore[arg-type]
    with pytest.raises(GatewiseError, match="looks is 0: expected at least 1"):
        compress_shared([one, one], [str(rows)], tmp_path / "out", goal, looks=0)


def test_modules_without_a_rank_do_not_count(tmp_path: Path) -> None:
    """A padded export writes them as zeros."""
    base, rows = write_base(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl", 60, seed=3)
    folders = [write_adapter(tmp_path / name, base) for name in ("one", "two")]
    for one in folders:
        own = {name: held * (0 if "layers.1" in name else 1) for name, held in weights(one).items()}
        save_file(own, one / "adapter_model.safetensors", metadata={"format": "pt"})
    for asked, kept in ((14, 7), (5, 5)):
        out = tmp_path / str(asked)
        found = compress_shared(folders, [str(rows)], out, Goal(modules=asked), measure="loss", score_rows=8)
        assert (found.before.modules, found.after.modules) == (14, kept)
        assert len(json.loads((out / "serving.json").read_text())["modules"]) == kept


def test_all_adapters_keep_the_same_modules(folder: Path, tmp_path: Path) -> None:
    found = together(folder, tmp_path / "out", Goal(least="modules", tolerance=0.05))
    kept = {name: set(read_config(tmp_path / "out" / name)["target_modules"]) for name in ("one", "two")}
    union = set.union(*kept.values())
    assert not any("q_proj" in path for path in union)
    assert found.after.modules == len(union) < found.before.modules == 14
    for name, one in found.adapters.items():
        assert one.chosen.difference.within(0.05)
        assert one.deviation["loaded"] < 1e-4
        assert one.chosen.size.modules == len(kept[name])
        model, _, _ = load_adapter(tmp_path / "out" / name)
        assert set(lora_layers(model, "default")) == kept[name]
    told = json.loads((tmp_path / "out" / "serving.json").read_text())
    assert set(told["modules"]) == union
    assert told["largest_rank"] == found.after.rank
    # Room for both adapters at all modules that either has, at the largest rank.
    sizes = {"q_proj": 32, "o_proj": 32, "k_proj": 32, "v_proj": 32, "gate_proj": 40, "up_proj": 40, "down_proj": 40}
    assert found.after.numbers == 2 * found.after.rank * sum(sizes[path.rpartition(".")[2]] for path in union)


def test_a_number_of_modules_is_that_of_all(folder: Path, tmp_path: Path) -> None:
    found = together(folder, tmp_path / "out", Goal(modules=4, rank_cap=1))
    assert found.after.modules == 4
    assert found.after.rank == 1
    assert found.before.rank == 2, "what an engine paid for before no rank was capped"
    assert {one.whole_size.largest for one in found.adapters.values()} == {2}
    with pytest.raises(GatewiseError, match="give at least two, or leave --shared out"):
        compress_shared([folder / "one"], ["rows"], tmp_path / "none")
    with pytest.raises(GatewiseError, match="3 data were given for 2 adapters: give one for all, or one for each in order"):
        compress_shared([folder / "one", folder / "two"], ["a", "b", "c"], tmp_path / "none")
    with pytest.raises(GatewiseError, match="adapters share modules: take --least modules or time, or --modules"):
        together(folder, tmp_path / "none", Goal(parameters=100))


def test_an_adapter_that_would_have_no_module_left_is_named(folder: Path, tmp_path: Path) -> None:
    for name, path in (("little", "model.layers.0.self_attn.v_proj"), ("more", "model.layers.1.mlp.down_proj")):
        adapter = Path(shutil.copytree(folder / "one", tmp_path / name))
        tensors = {key: value for key, value in weights(adapter).items() if path in key}
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(adapter / "adapter_config.json", read_config(adapter) | {"target_modules": [path]})
    sentence = r"no module can go: model.layers..* is worth least to all 2 adapters together, and (little|more) has no other"
    given = ([tmp_path / "little", tmp_path / "more"], [str(folder / "one.jsonl")], tmp_path / "out")
    with pytest.raises(GatewiseError, match=sentence):  # and nothing is left of it
        compress_shared(*given, Goal(least="modules", tolerance=1e-6), measure="loss", score_rows=30)
    assert not (tmp_path / "out.work").exists()


def test_adapters_of_other_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", write_base(tmp_path / "base"))
    shutil.copyfile(folder / "one" / "gatewise.json", other / "gatewise.json")
    rows = str(folder / "one.jsonl")
    with pytest.raises(GatewiseError, match=r"other adapts .*base, but .*one adapts .*llama: give adapters of one base"):
        compress_shared([folder / "one", other], [rows], tmp_path / "out", Goal(modules=4))
    assert not (tmp_path / "out").exists()


def test_folders_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    """That of PEFT's first adapter, that of a module, one with a dot: each adapter stays what it is, and finds its own folder."""
    base, rows = folder / "llama", [str(write_rows(tmp_path / "rows.jsonl", 24))]
    names = ["one", "default", "q_proj", "my.two", "my_two"]
    targets = ["all-linear", ["q_proj", "down_proj"], ["q_proj"], ["up_proj"], ["v_proj"]]
    given = [write_adapter(tmp_path / name, base, target_modules=to) for name, to in zip(names, targets, strict=True)]
    before = [{module.path: module for module in read_lora(one).modules} for one in given]
    compress_shared(given, rows, tmp_path / "out", Goal(modules=14), measure="loss", score_rows=4, refitted=False)
    for name, whole in zip(names, before, strict=True):
        written = {module.path: module for module in read_lora(tmp_path / "out" / name).modules}
        assert written.keys() == whole.keys(), name
        for path, module in written.items():
            one, other = ((of.b @ of.a) * of.scaling for of in (module, whole[path]))
            assert torch.allclose(one, other, atol=1e-5)


def test_every_adapter_is_read_whole_and_with_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    rows = [str(write_rows(tmp_path / "rows.jsonl", 24))]
    two = Path(shutil.copytree(folder / "two", tmp_path / "two"))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(two)
    compress_shared([folder / "one", two], rows, tmp_path / "out", Goal(modules=14), measure="loss", score_rows=4)
    assert json.loads((tmp_path / "out" / "two" / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    tensors = weights(two)
    del tensors[next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)]
    save_file(tensors, two / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GatewiseError, match=r"two does not fit the base model .*: the adapter has no weights for .*up_proj"):
        compress_shared([folder / "one", two], rows, tmp_path / "none", Goal(modules=14), measure="loss", score_rows=4)


def test_two_commands_do_not_share_a_place(folder: Path, tmp_path: Path) -> None:
    """Each would go on with what the other one trains."""
    with alone(tmp_path / "out"):
        with pytest.raises(GatewiseError, match=r"another command is compressing to .*out now"):
            together(folder, tmp_path / "out", Goal(modules=4))
        with pytest.raises(GatewiseError, match=r"another command is compressing to .*out now"):
            compress(folder / "one", str(folder / "one.jsonl"), tmp_path / "out", Goal(modules=4))
    assert not list(tmp_path.iterdir())


def test_two_commands_do_not_lock_two_files_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes while another removes the lock file at its end, or has opened the file that is removed."""
    refused: list[str] = []
    unlink, acquire = Path.unlink, FileLock.acquire

    def unlink_while_another_comes(path: Path, missing_ok: bool = False) -> None:
        with pytest.raises(GatewiseError, match="another command is compressing"), alone(tmp_path / "out"):
            pass
        refused.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, alone(tmp_path / "out"):
        patch.setattr(Path, "unlink", unlink_while_another_comes)
    assert refused == [".out.work.lock"]

    def acquire_what_is_removed(lock: Any, **settings: Any) -> Any:
        found = acquire(lock, **settings)
        if len(refused) == 1:
            refused.append("it was")
            unlink(Path(lock.lock_file))
        return found

    monkeypatch.setattr(FileLock, "acquire", acquire_what_is_removed)
    with alone(tmp_path / "out"), pytest.raises(GatewiseError, match="another command is compressing"), alone(tmp_path / "out"):
        pass
    assert len(refused) == 2
    assert not list(tmp_path.iterdir())


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    given = ["compress", str(folder / "one"), str(folder / "two"), "--data", str(folder / "one.jsonl"), "--measure", "loss"]
    result = CliRunner().invoke(app, [*given, "--shared", "--modules", "5", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "modules of any: 5 of 14" in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "serving.json", "two"]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "2 adapters and 1 data were given: give one of each, or add --shared" in result.stderr


def test_half_precision_stays_so(folder: Path, tmp_path: Path) -> None:
    halves = []
    for name in ("one", "two"):
        halves.append(Path(shutil.copytree(folder / name, tmp_path / name)))
        tensors = {key: value.bfloat16() for key, value in weights(halves[-1]).items()}
        save_file(tensors, halves[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
    rows = [str(folder / "one.jsonl")]
    found = compress_shared(halves, rows, tmp_path / "out", Goal(modules=5), measure="loss", score_rows=30)
    for name, one in found.adapters.items():
        assert {value.dtype for value in weights(tmp_path / "out" / name).values()} == {torch.bfloat16}
        assert one.deviation["loaded"] < 1e-6


def test_an_interrupted_one_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatewise.compress import search

    measured: list[int] = []
    real = search.qualities

    def counted(*given: Any, **more: Any) -> Any:
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*given, **more)

    monkeypatch.setattr(search, "qualities", counted)
    goal, stop_at = Goal(least="modules", tolerance=0.05), 6
    with pytest.raises(KeyboardInterrupt):
        together(folder, tmp_path / "out", goal)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == ["one", "two"]
    stop_at = -1
    found = together(folder, tmp_path / "out", goal)
    assert not (tmp_path / "out.work").exists()
    total = len(measured)
    again = together(folder, tmp_path / "again", goal)
    assert len(measured) - total == total, "what was measured before the interruption was measured again"
    for name, one in found.adapters.items():
        assert one.chosen == again.adapters[name].chosen
    (tmp_path / "more.work").mkdir()
    (tmp_path / "more.work" / "state.json").write_text("{}")  # as compressing one adapter leaves it
    with pytest.raises(GatewiseError, match=r"more.work is in the way, and is not what an interrupted compression of several"):
        together(folder, tmp_path / "more", goal)


def test_a_folder_at_the_root_has_a_name_too() -> None:
    assert sharing._names(["/adapter", "/tmp/two", "/tmp/three/adapter"]) == ["adapter", "two", "three"]


def test_what_was_measured_of_others_is_said_to_be_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "out.work" / "three"
    other.mkdir(parents=True)
    (other / "state.json").write_text("{}")
    together(folder, tmp_path / "out", Goal(modules=6))
    assert "out.work still has what an earlier command measured of three: remove it if it is not" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out.work").iterdir()) == ["three"]


def test_what_must_not_be_merged_is_said_of_each(folder: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    given = {
        "tied": write_adapter(tmp_path / "tied", base, target_modules=["embed_tokens", "q_proj"]),
        "plain": write_adapter(tmp_path / "plain", base, target_modules=["q_proj", "v_proj"]),
    }
    rows = str(write_rows(tmp_path / "rows.jsonl", 40))
    words = ["compress", *map(str, given.values()), "--shared", "--data", rows, "--modules", "4", "--measure", "loss"]
    result = CliRunner().invoke(app, [*words, "--score-rows", "8", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "tied: do not merge it: the model is another one then" in result.stdout
    assert "plain: do not merge" not in result.stdout
    assert "too few rows to say at most how much worse: tied, plain" in result.stdout


def test_a_pooler_that_adapters_bring_is_not_asked_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    BertForMaskedLM(BertConfig(**{**NAMED, **SIZES, "vocab_size": len(byte_tokenizer())})).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    given = [write_adapter(tmp_path / name, base, target_modules=["query"], modules_to_save=["pooler"]) for name in ("one", "two")]
    model, _, _ = load_adapter(given[0])
    model.save_pretrained(str(given[0]), save_embedding_layers=True)
    rows = str(write_rows(tmp_path / "rows.jsonl", 40))
    compress_shared(given, [rows], tmp_path / "out", Goal(modules=1), measure="loss", score_rows=8)
    assert (tmp_path / "out" / "one").is_dir()
