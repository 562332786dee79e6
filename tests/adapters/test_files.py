"""The one reader of adapter files, on folders written by hand."""

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_folders import random_factors, write_folder
from maps import LLAMA_MODULES
from peft.utils.other import get_pattern_key

from gatewise.adapters.export import to_lora
from gatewise.adapters.files import Selection, fingerprint, read_allocation, read_lora, read_note, read_selection, stored_numbers
from gatewise.adapters.loading import load_adapter
from gatewise.errors import GatewiseError
from gatewise.inspection import read_budget, read_prompts

PATH = "model.layers.0.self_attn.q_proj"


def test_an_adapter_is_read_and_shown_without_peft(tmp_path: Path) -> None:
    """`gatewise inspect` needs no model, and PEFT with Transformers takes longer to import than a folder to read."""
    folder = write_folder(tmp_path, random_factors(PATH))
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
def test_every_reader_refuses_a_damaged_folder_in_a_sentence(reader: str, tmp_path: Path) -> None:
    def refuse(folder: Path, words: str) -> None:
        with pytest.raises(GatewiseError, match=words) as caught:
            READERS[reader](folder)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "gone", r"gone is not an adapter, it has no adapter_config\.json: give a folder saved by save_pretrained$")
    kind = {"peft_type": "SELECTIVE_PROMPT"} if reader == "prompts" else {"base_model_name_or_path": "none", "task_type": "SEQ_CLS"}
    folder = write_folder(tmp_path / "run" / "adapter", random_factors(PATH), **kind)
    refuse(folder.parent, r"run is not an adapter, it has no adapter_config\.json: give one of its sub-folders adapter$")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = weights.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refuse(folder, r"adapter_model\.safetensors is damaged or cut short, .* \(.*\): copy, download or save it again$")
    weights.rename(folder / "adapter_model.bin")
    refuse(folder, r"adapter has no adapter_model\.safetensors, and a pickle \(adapter_model\.bin\) is never read")
    weights.write_bytes(whole)
    for text, words in (
        ("{", "is not valid JSON"),
        ("\xff", "is not valid"),
        ("[" * 200000, "is not valid"),
        ("[1]", "holds no JSON"),
    ):
        config.write_bytes(text.encode("latin-1"))
        refuse(folder, rf"adapter_config\.json {words}.*: restore the file$")


def test_the_note_is_read_or_named(tmp_path: Path) -> None:
    assert read_note(tmp_path) == {}
    (tmp_path / "gatewise.json").write_text("{")
    with pytest.raises(GatewiseError, match=r"gatewise\.json is not valid JSON"):
        read_note(tmp_path)
    (tmp_path / "gatewise.json").write_text('{"dtype": "float32"}')
    assert read_note(tmp_path) == {"dtype": "float32"}
    others = (("label_words", "good"), ("columns", ["text"]), ("max_length", "x"), ("base", ["x"]))
    for key, value in (("labels", [0, 1]), ("template", 5), *others):
        (tmp_path / "gatewise.json").write_text(json.dumps({key: value}))
        with pytest.raises(GatewiseError, match=re.escape(f"gatewise.json: {key} is {value!r}, which no run writes there")):
            read_note(tmp_path)


def test_a_selection_is_written_and_read(tmp_path: Path) -> None:
    selection = Selection([0, 2], [0.7, 0.1, 0.6], 30, 1.5, settings={"keep": 2}, log=[{"loss": 1.0}])
    selection.write(tmp_path / "search.json")
    assert read_selection(tmp_path / "search.json") == selection
    (tmp_path / "search.json").write_text('{"layers": [0]}')
    with pytest.raises(GatewiseError, match=r"search\.json is not what a search wrote .*: restore it"):
        read_selection(tmp_path / "search.json")


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
    assert stored_numbers(folder) == len(paths) * 4 * 11
    scalings = {module.path: module.scaling for module in read_lora(folder).modules}
    assert len(scalings) == len(paths)
    for path in paths:
        rank = ranks.get(get_pattern_key(list(ranks), path), 4)
        alpha = alphas.get(get_pattern_key(list(alphas), path), 8)
        assert scalings[path] == pytest.approx(alpha / (math.sqrt(rank) if stabilised else rank))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is PREFIX_TUNING, expected a LoRA adapter"),
        ({"lora_alpha": "big"}, "has ranks or alphas that PEFT cannot use"),
        ({"rank_pattern": [1]}, "has ranks or alphas that PEFT cannot use"),
        ({"rank_pattern": {"q_proj": 0}}, "has ranks or alphas that PEFT cannot use"),
        ({"alpha_pattern": {"(": 1}}, "has ranks or alphas that PEFT cannot use"),
    ],
)
def test_a_configuration_that_is_not_of_lora(config: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=words):
        read_lora(write_folder(tmp_path, random_factors(PATH), **config))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_A": (4, 6)}, f"lora_A and lora_B of {PATH} are not both there or do not fit"),
        ({"lora_A": (4, 6), "lora_B": (5, 2)}, "do not fit each other"),
        ({"classifier": (2, 2)}, "holds no LoRA weights"),
    ],
)
def test_weights_that_are_not_lora(shapes: dict[str, tuple[int, int]], words: str, tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=words):
        read_lora(write_folder(tmp_path, {f"{PATH}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ('{"format": 2, "rounds": []}', "upgrade gatewise"),
        ('{"format": 1, "rounds": {}}', "restore or remove"),
        ('{"format": 1, "rounds": [{}]}', "restore or remove"),
        ('{"format": 1, "rounds": [3]}', "restore or remove"),
    ],
)
def test_a_damaged_allocation_file_is_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "allocation.json").write_text(content)
    with pytest.raises(GatewiseError, match=rf"allocation\.json .*{words}"):
        read_allocation(tmp_path)


def test_a_fingerprint_is_of_weights_and_configuration_in_whatever_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", random_factors("layer")).rename(tmp_path / "b")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert fingerprint(folder) == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    for file in files:
        before = fingerprint(folder)
        file.write_bytes(file.read_bytes() + b"\n")
        assert fingerprint(folder) != before
    with pytest.raises(GatewiseError, match="gone is not an adapter"):
        fingerprint(tmp_path / "gone")
