"""Rows that come and go between steps: each is what ``generate`` writes for it alone."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from served_models import adapter_folder, base_folder, writes
from tiny_models import random_adapter

from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.serving.products import BASE
from gatewise.serving.server.lanes import Kind, Lane

KINDS: list[tuple[Kind, list[dict[str, Any]]]] = [
    ("plain", [{}, {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}]),
    ("routed", [{"kind": "routed"}, {"kind": "routed", "top_k": 1, "r": 2}]),
    ("alone", [{"kind": "dora"}]),
    ("alone", [{"kind": "prompts"}]),
]


def run(lane: Lane, asked: list[tuple[str, list[int], int]], seed: int) -> list[list[int]]:
    """Lets rows come at random, and leave when they are done; the greedy tokens of each."""
    chance, waiting, running = random.Random(seed), list(range(len(asked))), list[int]()
    written: list[list[int]] = [[] for _ in asked]

    def write(rows: list[int], logits: torch.Tensor) -> None:
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            written[row].append(token)
        stay = [place for place, row in enumerate(running) if len(written[row]) < asked[row][2]]
        lane.keep(stay)
        running[:] = [running[place] for place in stay]

    while waiting or running:
        while waiting and (not running or chance.random() < 0.5):
            row = waiting.pop(0)
            read = lane.read(asked[row][1], asked[row][0])
            lane.join(read)
            running.append(row)
            write([row], read.logits)
        if running:
            write(list(running), lane.step([written[row][-1] for row in running]))
    return written


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("kind", "adapters"), KINDS, ids=["plain", "routed", "dora", "prompts"])
def test_rows_are_what_generate_writes_alone(kind: Kind, adapters: list[dict[str, Any]], family: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", family)
    bare = load_model(base)
    lane = Lane(bare, kind)
    folders: dict[str, Path | None] = {BASE: None} if kind == "plain" else {}
    for number, settings in enumerate(adapters):
        if family == "gpt2":
            settings = {**settings, "fan_in_fan_out": True} if settings.get("kind") != "prompts" else settings
            settings.pop("target_modules", None)
        name = f"a{number}"
        folders[name] = adapter_folder(base, tmp_path / name, seed=number, **settings)
        lane.load(folders[name], name, str(base))
    chance = random.Random(1)
    asked = [
        (name, [chance.randint(2, 59) for _ in range(chance.randint(1, 14))], chance.randint(1, 16))
        for name in [*folders] * (9 // len(folders))
    ]
    chance.shuffle(asked)
    found = run(lane, asked, seed=2)
    for (name, prompt, tokens), row in zip(asked, found, strict=True):
        alone = writes(base, folders[name], prompt, tokens)
        assert row[: len(alone)] == alone, (name, prompt)  # rows go on after the end of the text here
    assert not lane.rows


def test_no_adapter_changes_the_base_model_of_the_others(tmp_path: Path) -> None:
    """PEFT writes the base weights of a head with LoRA into its file, and reads them back."""
    base = base_folder(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(load_model(base), LoraConfig(r=3, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM"))
    random_adapter(model)
    model.save_pretrained(tmp_path / "head", save_embedding_layers=True)
    bare = load_model(base)
    before = bare.lm_head.weight.clone()
    lane = Lane(bare, "plain")
    lane.load(tmp_path / "head", "head", str(base))
    assert [int(lane.read([5, 6], "head").logits.argmax())] == writes(base, tmp_path / "head", [5, 6], 1)
    tensors = load_file(tmp_path / "head" / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.base_layer.weight"))
    other = shutil.copytree(tmp_path / "head", tmp_path / "other")
    embedding = {"base_model.model.model.embed_tokens.weight": bare.get_input_embeddings().weight.detach() + 1}  # without LoRA
    for own, named in (({name: tensors[name] + 1}, "lm_head"), (embedding, "embed_tokens")):
        save_file({**tensors, **own}, other / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(GatewiseError, match=rf"has other base weights .*{named}.* than the base model that all adapters share"):
            lane.load(other, "other", str(base))
    assert lane.names == {"head"}
    assert torch.equal(bare.lm_head.weight, before)


def test_a_routed_adapter_that_is_loaded_beside_rows_changes_nothing_for_them(tmp_path: Path) -> None:
    """Modules that become routed by it are not those that a running answer decided on."""
    base = base_folder(tmp_path / "base")
    few = adapter_folder(base, tmp_path / "few", "routed", seed=1, top_k=1, target_modules=["q_proj", "v_proj"])
    lane = Lane(load_model(base), "routed")
    lane.load(few, "few", str(base))
    read = lane.read([5, 6, 9], "few")
    lane.join(read)
    written = [int(read.logits.argmax())]
    written.append(int(lane.step(written[-1:]).argmax()))
    lane.load(adapter_folder(base, tmp_path / "all", "routed", seed=2), "all", str(base))
    for _ in range(4):
        written.append(int(lane.step(written[-1:]).argmax()))
    assert written == writes(base, few, [5, 6, 9], 6, ends=False)
