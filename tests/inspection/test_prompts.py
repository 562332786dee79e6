"""Where an SPT adapter's prompts enter, read from folders written by hand and shown."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import write_folder
from maps import rendered

from gatewise.adapters.files import Selection
from gatewise.errors import GatewiseError
from gatewise.inspection import plot_prompts, prompts_lines, prompts_table, read_prompts


def folder_of(folder: Path, layers: dict[int, float | None], **config: Any) -> Path:
    """An adapter with a generator of 6 numbers in each layer named, with a gate's logit where one is given; 4 numbers outside."""
    tensors = {"classifier.weight": torch.ones(2, 2)}
    for layer, logit in layers.items():
        place = f"model.layers.{layer}.selective_prompt"
        tensors[f"{place}.spt_generator.down.weight"] = torch.randn(2, 3)
        if logit is not None:
            tensors[f"{place}.spt_gate_logit"] = torch.tensor(logit)
    settings = {"peft_type": "SELECTIVE_PROMPT", "num_prompt_tokens": 10, "base_model_name_or_path": "some/model"}
    return write_folder(folder, tensors, **settings | config)


def test_layers_and_roles_without_a_search(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {1: None, 3: None})
    (folder / "gatewise.json").write_text(json.dumps({"num_layers": 6}))
    prompts = read_prompts(folder)
    assert (prompts.layers, prompts.chosen, prompts.gates, prompts.hyper_network) == (6, (1, 3), None, False)
    assert [prompts.role(layer) for layer in range(6)] == ["none", "new", "carried", "new", "carried", "carried"]
    assert (prompts.parameters, prompts.other_parameters) == ({1: 6, 3: 6}, 4)
    assert prompts_lines(prompts) == [
        "base model: some/model",
        "adapter: selective prompts (SPT), 10 prompt tokens",
        "layers with a new prompt: 1, 3 of 6 (fixed by the recipe)",
        "parameters: 12, and 4 outside the generators",
    ]
    rows = [line.split() for line in rendered(prompts_table(prompts)).splitlines() if line.split()]
    assert ["1", "new", "6"] in rows
    assert ["2", "carried", "·"] in rows


def test_a_search_leaves_its_gates(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {1: None})
    Selection([1], [0.25, 0.75, 0.5], 30, 1.0).write(folder / "search.json")
    prompts = read_prompts(folder)
    assert (prompts.layers, prompts.gates) == (3, (0.25, 0.75, 0.5))
    assert "1 of 3 (chosen by the search)" in prompts_lines(prompts)[2]
    assert plot_prompts(prompts, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_made_in_python_says_itself_how_many_layers_the_model_has(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {1: None}, made_for={"model_type": "llama", "layers": 4, "hidden_size": 3})
    assert "1 of 4 (fixed by the recipe)" in prompts_lines(read_prompts(folder))[2]


def test_gates_that_are_no_numbers_are_drawn_as_none(tmp_path: Path) -> None:
    prompts = read_prompts(folder_of(tmp_path, {0: math.nan, 1: -2000.0, 2: 0.0}))
    assert prompts.gates is not None
    assert (math.isnan(prompts.gates[0]), prompts.gates[1:]) == (True, (0.0, 0.5))
    assert plot_prompts(prompts, tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_of_a_search_is_a_hyper_network(tmp_path: Path) -> None:
    prompts = read_prompts(folder_of(tmp_path, {0: 0.0, 1: 2.0}))
    assert prompts.hyper_network
    assert prompts.gates == pytest.approx((0.5, 1 / (1 + math.exp(-2.0))))
    assert prompts.parameters == {0: 7, 1: 7}


def test_what_is_no_such_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match="peft_type LORA, expected SELECTIVE_PROMPT"):
        read_prompts(folder_of(tmp_path / "lora", {0: None}, peft_type="LORA"))
    with pytest.raises(GatewiseError, match="holds no prompt generators"):
        read_prompts(folder_of(tmp_path / "empty", {}))
    odd = folder_of(tmp_path / "odd", {})
    write_folder(odd, {"layers.0.selective_prompt.spt_gate_logit": torch.ones(2)}, peft_type="SELECTIVE_PROMPT")
    with pytest.raises(GatewiseError, match=r"spt_gate_logit has shape \(2,\), expected one number"):
        read_prompts(odd)
