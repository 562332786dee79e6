"""The one reader of adapter files, on folders written by hand; and whatever reads an adapter says the same of the same fault."""

import errno
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import random_factors, write_folder
from maps import LLAMA_MODULES
from peft.utils.other import get_pattern_key

from gatewise.adapters.export import to_lora
from gatewise.adapters.files import (
    Allocation,
    Selection,
    fingerprint,
    read_allocation,
    read_lora,
    read_note,
    read_selection,
    stored_numbers,
)
from gatewise.adapters.loading import load_adapter
from gatewise.errors import GatewiseError
from gatewise.inspection import read_budget, read_prompts


def test_an_adapter_is_read_and_shown_without_peft(tmp_path: Path) -> None:
    """`gatewise inspect` needs no model, and PEFT with Transformers takes longer to import than a folder to read."""
    folder = write_folder(tmp_path, random_factors("model.layers.0.self_attn.q_proj"))
    asked = (
        "import sys; from gatewise import inspection; from gatewise.adapters.files import peft_type; "
        f"folder = {str(folder)!r}; budget = inspection.read_budget(folder); "
        "inspection.grid_table(budget.grid()); inspection.budget_lines(budget); inspection.plot(budget, folder + '/map.png'); "
        "print(peft_type(folder), budget.rank, {'peft', 'transformers'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert told == "LORA 4 set()\n"


READERS: dict[str, Callable[[Path], object]] = {
    "export": lambda folder: to_lora(folder, folder.parent / "out"),
    "inspect": read_budget,
    "prompts": read_prompts,
    "load": load_adapter,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_says_the_same_of_the_same_fault(reader: str, tmp_path: Path) -> None:
    def refuse(folder: Path, words: str) -> None:
        with pytest.raises(GatewiseError, match=words) as caught:
            READERS[reader](folder)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "gone", r"gone is not an adapter, there is no such folder: give the folder that holds adapter_config\.json$")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", r"file is not an adapter, it is a file: give the folder")
    kind = {"peft_type": "SELECTIVE_PROMPT"} if reader == "prompts" else {"base_model_name_or_path": "none"}
    folder = write_folder(tmp_path / "run" / "adapter", random_factors("model.layers.0.self_attn.q_proj"), **kind)
    refuse(folder.parent, r"run is not an adapter, it has no adapter_config\.json: give one of its sub-folders adapter$")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, plain = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-1])
    refuse(folder, r"adapter_model\.safetensors is damaged or cut short \(.*\): copy, download or save it again$")
    weights.unlink()
    refuse(folder, r"adapter has no adapter_model\.safetensors: expected it beside adapter_config\.json$")
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    refuse(folder, "has its weights in adapter_model.bin, which is a pickle and is never read")
    weights.write_bytes(whole)
    for text, words in (("{", "is not valid JSON"), ("[" * 200000, "is not valid"), ("[1]", "holds a list, expected an object")):
        config.write_text(text)
        refuse(folder, rf"adapter_config\.json {words}.*: save the adapter again or repair the file$")
    config.write_text(plain)
    assert stored_numbers(folder) == 4 * 11


@pytest.mark.parametrize(
    ("call", "name"), [("open", "model.safetensors"), ("read_text", "config.json"), ("is_file", "config.json")]
)
def test_what_may_not_be_read_is_not_called_damaged(call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes files for their owner alone, and says of those of others that there are none."""
    folder = write_folder(tmp_path, random_factors("model.layers.0.self_attn.q_proj"))
    known = getattr(Path, call)

    def forbidden(path: Path, *given: Any, **more: Any) -> Any:
        if path.name == f"adapter_{name}":
            raise PermissionError(errno.EACCES, "Permission denied")
        return known(path, *given, **more)

    def opened(path: str, **_: Any) -> Any:
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(Path, call, forbidden)
    monkeypatch.setattr("gatewise.adapters.files.safe_open", opened)
    with pytest.raises(GatewiseError) as caught:
        read_lora(folder)
    assert str(caught.value) == f"{folder}/adapter_{name} cannot be read (Permission denied): let the user of this process read it"


def test_the_note_is_read_or_named(tmp_path: Path) -> None:
    assert read_note(tmp_path) == {}
    for text, words in (("{", "is not valid JSON"), ("[]", "holds a list, expected an object")):
        (tmp_path / "gatewise.json").write_text(text)
        with pytest.raises(GatewiseError, match=rf"gatewise\.json {words}.*remove it and give --template-prompt and --labels"):
            read_note(tmp_path)
    (tmp_path / "gatewise.json").write_text('{"dtype": "float32"}')
    assert read_note(tmp_path) == {"dtype": "float32"}


def test_a_selection_comes_back_as_it_was_written(tmp_path: Path) -> None:
    selection = Selection([0, 2], [0.7, 0.1, 0.6], 30, 1.5, losses=[1.0, 3.0, 2.0], settings={"keep": 2}, log=[{"loss": 1.0}])
    selection.write(tmp_path / "search.json")
    assert read_selection(tmp_path / "search.json") == selection
    for changed in ({"layers": [2, 0]}, {"layers": []}, {"layers": [3]}, {"gates": None}, {"steps": float("inf")}):
        told = json.loads((tmp_path / "search.json").read_text()) | changed
        (tmp_path / "other.json").write_text(json.dumps(told))
        with pytest.raises(GatewiseError, match=r"other\.json is not what a search wrote .*: restore it"):
            read_selection(tmp_path / "other.json")


@pytest.mark.parametrize("stabilised", [False, True])
def test_patterns_match_as_peft_matches_them(stabilised: bool, tmp_path: Path) -> None:
    paths = [f"model.layers.{layer}.{name}" for layer in (0, 1, 10, 11) for name in LLAMA_MODULES]
    ranks = {
        "1.self_attn.q_proj": 2,
        r"^model\.layers\.1\.mlp\.up_proj": 3,
        "q_proj": 5,
        r"layers\.1\d\..*": 7,
        "proj": 9,
    }
    alphas = {r".*\.(gate|up)_proj": 32, "layers.10.self_attn.k_proj": 4, "odel.layers.0.self_attn.v_proj": 99}
    tensors = {}
    for path in paths:
        tensors |= random_factors(path)
    folder = write_folder(tmp_path, tensors, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=stabilised)
    scalings = {module.path: module.scaling for module in read_lora(folder).modules}
    assert len(scalings) == len(paths)
    for path in paths:
        rank = ranks.get(get_pattern_key(list(ranks), path), 4)
        alpha = alphas.get(get_pattern_key(list(alphas), path), 8)
        assert scalings[path] == pytest.approx(alpha / (math.sqrt(rank) if stabilised else rank))


def test_bad_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refuse(folder: Path, words: str) -> None:
        with pytest.raises(GatewiseError, match=words) as caught:
            read_lora(folder)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "missing", "there is no such folder")
    refuse(tmp_path, r"not an adapter, it has no adapter_config\.json")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "is a file")

    good = random_factors("model.layers.0.self_attn.q_proj")
    no_weights = write_folder(tmp_path / "no_weights", good)
    (no_weights / "adapter_model.safetensors").unlink()
    refuse(no_weights, r"has no adapter_model\.safetensors")
    (no_weights / "adapter_model.bin").write_bytes(b"\x80")
    refuse(no_weights, "a pickle.*save_pretrained to get safetensors")

    cut = write_folder(tmp_path / "cut", good)
    weights = cut / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refuse(cut, r"adapter_model\.safetensors is damaged or cut short")

    broken = write_folder(tmp_path / "broken", good)
    for text, words in (
        ("{", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[1]", "holds a list, expected an object"),
        ('{"peft_type": "PREFIX_TUNING"}', "peft_type is PREFIX_TUNING, expected a LoRA adapter"),
        ("{}", "peft_type is None, expected a LoRA adapter"),
        ('{"peft_type": "LORA", "r": 0}', "r is 0, expected a positive number"),
        ('{"peft_type": "LORA", "lora_alpha": "big"}', "lora_alpha is 'big', expected a number"),
        ('{"peft_type": "LORA", "rank_pattern": [1]}', "rank_pattern is a list, expected an object"),
        ('{"peft_type": "LORA", "rank_pattern": {"q": -1}}', r"rank_pattern\['q'\] is -1, expected a positive number"),
        ('{"peft_type": "LORA", "alpha_pattern": {"(": 1}}', r"alpha_pattern has the key '\(', which is not a valid"),
    ):
        (broken / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refuse(broken, words)

    path = "model.layers.0.self_attn.q_proj"
    refuse(write_folder(tmp_path / "half", {f"{path}.lora_A.weight": torch.ones(4, 6)}), f"{path} has no lora_B")
    uneven = {f"{path}.lora_A.weight": torch.ones(4, 6), f"{path}.lora_B.weight": torch.ones(5, 2)}
    refuse(write_folder(tmp_path / "uneven", uneven), r"shape \(4, 6\) and lora_B of shape \(5, 2\), whose ranks differ")
    flat = {f"{path}.lora_A.weight": torch.ones(4), f"{path}.lora_B.weight": torch.ones(4)}
    refuse(write_folder(tmp_path / "flat", flat), "ranks differ")
    refuse(write_folder(tmp_path / "none", {"classifier.weight": torch.ones(2, 2)}), "holds no LoRA weights")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ('{"format": 2, "rounds": []}', "has format 2, this version reads format 1"),
        ('{"format": 1, "rounds": {}}', r"rounds\[0\] is not a round"),
        ('{"format": 1, "rounds": [{"ranks": {}, "pruned": {}}]}', r"rounds\[0\] is not a round.*grown"),
        ('{"format": 1, "rounds": [{"ranks": [], "pruned": {}, "grown": {}}]}', r"rounds\[0\] is not a round"),
        ('{"format": 1, "rounds": [{"ranks": {"q": Infinity}, "pruned": {}, "grown": {}}]}', r"rounds\[0\] is not a round"),
    ],
)
def test_a_damaged_allocation_file_is_named(content: str, words: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, random_factors("model.layers.0.self_attn.q_proj"))
    (folder / "allocation.json").write_text(content)
    with pytest.raises(GatewiseError, match=words) as caught:
        read_allocation(folder)
    assert "allocation.json" in str(caught.value)


def test_another_tools_allocation_file_is_left_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, random_factors("model.layers.0.self_attn.q_proj"), {"cpu": 4})
    assert read_allocation(folder) == Allocation()


def test_a_fingerprint_is_of_weights_and_configuration_wherever_they_lie(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", random_factors("layer"))
    weights, config = (tmp_path / "a" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    first = fingerprint(tmp_path / "a")
    assert first == hashlib.sha256(weights.read_bytes() + config.read_bytes()).hexdigest()
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    for file in (tmp_path / "b" / config.name, tmp_path / "b" / weights.name):
        before = fingerprint(tmp_path / "b")
        file.write_bytes(file.read_bytes() + b"\n")
        assert fingerprint(tmp_path / "b") != before
    (tmp_path / "b" / config.name).unlink()
    with pytest.raises(GatewiseError, match="cannot be read"):
        fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ({"template": 5}, "template is 5, expected text"),
        ({"max_length": "x"}, "max_length is 'x', expected a whole number of at least 1"),
        ({"max_length": -3}, "max_length is -3, expected a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number of at least 1"),
        ({"labels": 5}, "labels is 5, expected a list of texts"),
        ({"labels": ["a", 1]}, r"labels is \['a', 1\], expected a list of texts"),
        ({"label_words": ["a"]}, r"label_words is \['a'\], expected a text for each label"),
        ({"training": "x"}, "training is 'x', expected an object"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate is 'fast', expected a number above 0"),
        ({"training": {"learning_rate": 0}}, "learning_rate is 0, expected a number above 0"),
        ({"training": {"batch_size": 0}}, "batch_size is 0, expected a whole number of at least 1"),
        ({"training": {"max_grad_norm": -1.0}}, "max_grad_norm is -1.0, expected a number of at least 0"),
    ],
)
def test_a_note_of_other_kinds_of_values_is_refused(note: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "gatewise.json"
    path.write_text(json.dumps(note))
    with pytest.raises(GatewiseError, match=rf"gatewise\.json: {said}: restore it, or remove it"):
        read_note(tmp_path)
    empty = dict.fromkeys(note)
    path.write_text(json.dumps(empty))
    assert read_note(tmp_path) == empty  # says nothing
