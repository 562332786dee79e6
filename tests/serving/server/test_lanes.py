"""Rows that come and go between steps: each is what ``generate`` writes for it alone."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from served_models import adapter_folder, base_folder, writes
from tiny_models import random_adapter

from gatewise.adapters.loading import likeness
from gatewise.errors import GatewiseError
from gatewise.models import load_model
from gatewise.serving.products import BASE
from gatewise.serving.server.lanes import Kind, Lane

KINDS: list[tuple[Kind, list[dict[str, Any]]]] = [
    ("plain", [{}, {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}]),
    ("routed", [{"kind": "routed"}, {"kind": "routed", "top_k": 1, "r": 2}, {"kind": "routed", "adapt": "after_prompt"}]),
    ("alone", [{"kind": "dora"}]),
    ("alone", [{"kind": "prompts"}]),
]


def run(lane: Lane, asked: list[tuple[str, list[int], int]], seed: int) -> list[list[int]]:
    """Lets rows come at random, and leave when they are done; the greedy tokens of each."""
    chance, waiting, running = random.Random(seed), list(range(len(asked))), list[int]()
    written: list[list[int]] = [[] for _ in asked]

    def note(rows: list[int], logits: torch.Tensor) -> None:
        for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            written[row].append(token)
        stay = [place for place, row in enumerate(running) if len(written[row]) < asked[row][2]]
        lane.keep(stay)
        running[:] = [running[place] for place in stay]

    while waiting or running:
        if waiting and (not running or chance.random() < 0.5):
            count = chance.randint(1, 3)
            new, waiting = waiting[:count], waiting[count:]
            read = lane.read([asked[row][1] for row in new], [asked[row][0] for row in new])
            lane.join(read)
            running += new
            note(new, read.logits)
        if running:
            note(list(running), lane.step([written[row][-1] for row in running]))
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


def test_an_adapter_may_go_and_come_back_beside_rows_of_others(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    folders = {name: adapter_folder(base, tmp_path / name, "routed", seed=seed) for seed, name in enumerate(("stays", "goes"))}
    lane = Lane(load_model(base), "routed")
    for name, folder in folders.items():
        lane.load(folder, name, str(base))
    asked = [("stays", [5, 6, 7]), ("goes", [8, 9]), ("stays", [3])]
    written: list[list[int]] = [[], [], []]
    running: list[int] = []
    for row, (name, prompt) in enumerate(asked):
        read = lane.read([prompt], [name])
        lane.join(read)
        running.append(row)
        written[row].append(int(read.logits.argmax()))
        for _ in range(3):
            for place, token in zip(running, lane.step([written[one][-1] for one in running]).argmax(-1).tolist(), strict=True):
                written[place].append(token)
        if row == 0:
            lane.unload("goes")
            lane.load(folders["goes"], "goes", str(base))
    for (name, prompt), row in zip(asked, written, strict=True):
        alone = writes(base, folders[name], prompt, len(row))
        assert row[: len(alone)] == alone


@pytest.mark.parametrize("kind", ["plain", "routed"])
def test_an_adapter_takes_the_place_of_one_like_it_beside_rows_of_others(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_folder(tmp_path / "base")
    folders = {name: adapter_folder(base, tmp_path / name, kind, seed=seed) for seed, name in enumerate("abcd")}
    folders["other"] = adapter_folder(base, tmp_path / "other", kind, seed=9, r=5)
    config = json.loads((folders["c"] / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "elsewhere", "target_modules": config["target_modules"][::-1]}
    (folders["c"] / "adapter_config.json").write_text(json.dumps(config))
    lane = Lane(load_model(base), kind)
    for name in ("a", "b", "other"):
        lane.load(folders[name], name, str(base))
    monkeypatch.setattr(PeftModel, "load_adapter", None)
    monkeypatch.setattr(PeftModel, "delete_adapter", None)
    assert lane.alike["a"] == lane.alike["b"] == likeness(folders["c"]) != lane.alike["other"]
    assert not lane.replace("other", folders["c"], "c")
    prompt, written = [5, 6, 7], {name: list[int]() for name in ("b", "c", "a", "d")}

    def step(*names: str) -> None:
        assert lane.rows == list(names)
        for name, token in zip(names, lane.step([written[name][-1] for name in names]).argmax(-1).tolist(), strict=True):
            written[name].append(token)

    def enter(name: str) -> None:
        read = lane.read([prompt], [name])
        lane.join(read)
        written[name].append(int(read.logits.argmax()))

    enter("b")
    step("b")
    assert lane.replace("a", folders["c"], "c")
    assert lane.names == {"b", "c", "other"}
    enter("c")
    step("b", "c")
    lane.keep([0])
    assert lane.replace("c", folders["a"], "a")  # which had that place before
    enter("a")
    step("b", "a")
    lane.keep([1])
    assert lane.replace("b", folders["d"], "d")
    enter("d")
    step("a", "d")
    monkeypatch.undo()
    for name, tokens in written.items():
        alone = writes(base, folders[name], prompt, len(tokens))
        assert tokens[: len(alone)] == alone, name
    assert len({tuple(writes(base, folders[name], prompt, 12)) for name in written}) == 4


def test_rows_tell_of_the_modules_that_their_own_adapter_decided_on(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    lane = Lane(load_model(base), "routed")
    lane.load(adapter_folder(base, tmp_path / "all", "routed"), "all", str(base))
    some = adapter_folder(base, tmp_path / "some", "routed", target_modules=r".*layers\.0\..*(q_proj|v_proj)", top_k=1)
    lane.load(some, "some", str(base))
    prompts = [[5, 6, 7], [8, 9]]
    found = lane.read(prompts, ["all", "some"]).routed
    assert found == [lane.read([one], [name]).routed[0] for one, name in zip(prompts, ("all", "some"), strict=True)]
    assert {layer: sorted(modules) for layer, modules in found[1].kept.items()} == {
        "model.layers.0": ["self_attn.q_proj", "self_attn.v_proj"]
    }


def test_an_adapter_that_cannot_be_read_takes_no_place(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    folders = [adapter_folder(base, tmp_path / str(seed), seed=seed) for seed in range(3)]
    lane = Lane(load_model(base), "plain")
    lane.load(folders[0], "a", str(base))
    whole = (folders[1] / "adapter_model.safetensors").read_bytes()
    (folders[1] / "adapter_model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(GatewiseError, match="damaged or cut short"):
        lane.replace("a", folders[1], "b")
    tensors = load_file(folders[2] / "adapter_model.safetensors")
    name, tensor = tensors.popitem()
    save_file({**tensors, f"more.{name}": tensor}, folders[2] / "adapter_model.safetensors")
    assert not lane.replace("a", folders[2], "b")
    read = lane.read([[5, 6]], ["a"])
    assert [int(read.logits.argmax())] == writes(base, folders[0], [5, 6], 1)


def test_adapters_are_alike_only_where_they_compute_alike(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    one = adapter_folder(base, tmp_path / "one", rank_pattern={"v_proj": 5, ".*self_attn.*": 3})
    assert likeness(one) == likeness(adapter_folder(base, tmp_path / "two", seed=1, rank_pattern={"v_proj": 5, ".*self_attn.*": 3}))
    for key, value in [("alpha_pattern", {"v_proj": 60}), ("lora_alpha", 60), ("use_rslora", True), ("bias", "all")]:
        changed = shutil.copytree(one, tmp_path / key)
        config = json.loads((one / "adapter_config.json").read_text())
        (changed / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        assert likeness(changed) != likeness(one), key
    patterns = [{"v_proj": 60, ".*self_attn.*": 3}, {".*self_attn.*": 3, "v_proj": 60}]  # of which the first that matches decides
    for folder, pattern in zip((one, changed), patterns, strict=True):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": pattern}))
    assert likeness(changed) != likeness(one)


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
    assert [int(lane.read([[5, 6]], ["head"]).logits.argmax())] == writes(base, tmp_path / "head", [5, 6], 1)
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
