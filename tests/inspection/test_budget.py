"""The report is checked against PEFT's own update weights and against folders written by hand."""

import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gatewise import inspection
from gatewise.errors import GatewiseError
from gatewise.inspection import BudgetMap, ModuleBudget, plot, ranks_table, read_budget, summary_lines, to_json
from gatewise.sites import site

LLAMA_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def test_an_adapter_is_read_without_peft() -> None:
    """`gatewise inspect` needs no model, and PEFT with Transformers takes longer to import than a folder to read."""
    asked = "import sys, gatewise.inspection; print({'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout == "set()\n"


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, bos_token_id=0, eos_token_id=0, **sizes))


class Odd(nn.Module):
    """The layer types that language models seldom have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.linear = nn.Linear(8, 8)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tb,ebc->tec", x, self.weight)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": Experts()})])


def trained(model: PeftModel) -> PeftModel:
    """Random factors everywhere, as training would leave them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"lora_(embedding_)?[ABE]", name):
                parameter.normal_()
    return model


def norm_of(layer: Any) -> float:
    """The norm of the update that PEFT itself would merge."""
    return float(torch.linalg.norm(layer.get_delta_weight("default").detach().float()))


def kill(model: PeftModel, path: str, slots: list[int]) -> None:
    layer = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        layer.lora_A["default"].weight[slots] = 0
        layer.lora_B["default"].weight[:, slots] = 0


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def written(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    allocation: Any = None,
    **config: Any,
) -> Path:
    """An adapter folder by hand: module path -> factors are given as ``path.lora_A.weight`` without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    if allocation is not None:
        (folder / "allocation.json").write_text(json.dumps(allocation))
    return folder


def factors(path: str, r: int = 4, d_in: int = 6, d_out: int = 5) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(r, d_in), f"{path}.lora_B.weight": torch.randn(d_out, r)}


def stack(layers: int, rank: int | None = None, parameters: int = 100) -> BudgetMap:
    """A Llama-shaped map with ranks 0 .. 16 unless one is given."""
    modules = []
    for layer in range(layers):
        for index, name in enumerate(LLAMA_MODULES):
            place = site(f"model.layers.{layer}.{name}")
            r = (3 * layer + 5 * index) % 17 if rank is None else rank
            modules.append(ModuleBudget(place.path, layer, place.kind, r, 16, r * parameters, 16 * parameters, 2.0, r / 37))
    return BudgetMap(tuple(modules), "tiny")


def a_round(number: int, ranks: dict[str, int], **changes: Any) -> dict[str, Any]:
    entry = {"round": number, "step": 10 * number, "scores": {}, "pruned": {}, "grown": {}, "ranks": ranks}
    return {**entry, "loss_before": 1.5, "loss_after": 1.25, "seconds": 0.1, **changes}


# ---- reading


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
        (
            llama,
            {
                "r": 4,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {"layers.1.self_attn.q_proj": 6, "^model.layers.0.mlp.down_proj": 2, "v_proj": 3},
                "alpha_pattern": {"q_proj": 32, "model.layers.1.self_attn.q_proj": 1},
            },
        ),
        (llama, {"r": 4, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 9}}),
        (llama, {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
        (bert, {"r": 3, "target_modules": "all-linear", "task_type": "SEQ_CLS", "use_dora": True}),
        (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 16}),
        (Odd, {"r": 4, "target_modules": ["embed", "conv", "linear"], "lora_alpha": 3}),
        (Mixture, {"r": 2, "target_parameters": ["experts.weight"], "target_modules": []}),
    ],
)
def test_folder_agrees_with_the_update_peft_applies(base: Any, config: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(trained(get_peft_model(base(), LoraConfig(**config))), tmp_path / "adapter")
    budget = read_budget(folder)
    # Loaded anew, because PEFT sorts the patterns when it saves them and then takes the first that matches.
    model = PeftModel.from_pretrained(base(), str(folder))
    layers = {
        path.removeprefix("base_model.model."): layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)
    }
    assert {module.path for module in budget.modules} == set(layers)
    for module in budget.modules:
        layer = layers[module.path]
        assert module.scaling == pytest.approx(layer.scaling["default"])
        update = layer.get_delta_weight("default").detach()
        assert module.norm == pytest.approx(float(torch.linalg.norm(update.flatten())), rel=1e-4)
        slots = layer.r["default"] * getattr(layer, "num_experts", 1)
        assert module.rank == module.capacity == slots
        stored = sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name)
        assert module.parameters == module.allocated == stored
    assert budget.norm == pytest.approx(math.sqrt(sum(module.norm**2 for module in budget.modules)))

    in_memory = read_budget(model)
    assert in_memory.ranks == budget.ranks
    for one, other in zip(in_memory.modules, budget.modules, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-5)
        assert one.scaling == pytest.approx(other.scaling)
    assert in_memory.other_parameters == budget.other_parameters


def test_types_and_parameters_outside_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True)
    budget = read_budget(saved(get_peft_model(bert(), config), tmp_path))
    assert budget.adapter_type == "DoRA"
    assert budget.other_parameters == 16 * 2 + 2  # the classifier head, trained and saved whole
    rows, kinds, cells = budget.matrix()
    assert rows == ["0", "1", "other"]
    assert kinds == ["q", "k", "v", "o", "up", "down", "pooler"]
    assert cells == [[3.0] * 6 + [None]] * 2 + [[None] * 6 + [3.0]]


def test_grouped_convolution(tmp_path: Path) -> None:
    # PEFT cannot merge these, so the update is written out: group g maps its own input rows to its own outputs.
    with pytest.warns(UserWarning, match="groups"):
        model = trained(get_peft_model(Odd(), LoraConfig(r=4, lora_alpha=4, target_modules=["grouped"])))
    layer = model.base_model.model.grouped
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    expected = sum(float(torch.linalg.norm(b[4 * g : 4 * g + 4, :, 0] @ a[2 * g : 2 * g + 2].flatten(1))) ** 2 for g in (0, 1))
    (module,) = read_budget(saved(model, tmp_path)).modules
    assert module.norm == pytest.approx(math.sqrt(expected), rel=1e-5)
    assert (module.rank, module.capacity) == (4, 4)


def test_adalora(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=5, target_r=2, total_step=100, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    model = trained(get_peft_model(llama(), config))
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    for budget in (read_budget(model), read_budget(saved(model, tmp_path))):
        assert budget.adapter_type == "AdaLoRA"
        (module,) = (m for m in budget.modules if m.path == "model.layers.1.self_attn.v_proj")
        assert module.rank == 5
        assert module.norm == pytest.approx(norm_of(layer), rel=1e-5)
        assert module.parameters == 5 * (16 + 8 + 1)


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning", "ignore:.*invalid shape:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_counts_unless_both_halves_are_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(get_peft_model(llama(), LoraConfig(r=4, lora_bias=True, target_modules=["q_proj", "v_proj"])))
    model.to(dtype)
    path = "model.layers.0.self_attn.q_proj"
    kill(model, path, [0, 2])
    layer = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        layer.lora_B["default"].weight[:, 1] = 0  # a freshly grown rank: alive, though it adds nothing yet
    for budget in (read_budget(model), read_budget(saved(model, tmp_path))):
        module = budget.modules[0]
        assert (module.path, module.rank, module.capacity) == (path, 2, 4)
        assert module.parameters == 2 * (16 + 16) + 16  # two slots and the bias of B
        assert module.allocated == 4 * (16 + 16) + 16
        assert module.norm == pytest.approx(norm_of(layer), rel=0.02)
        assert budget.rank == budget.capacity - 2
    assert inspection.rank_map(tmp_path)[path] == 2


def test_memory_trusts_the_layer_over_the_config() -> None:
    model = trained(get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])))
    model.peft_config["default"].lora_alpha = 800
    assert {module.scaling for module in read_budget(model).modules} == {2.0}


def test_named_adapters(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("wide", LoraConfig(r=7, target_modules=["v_proj"]))
    assert read_budget(model).capacity == 2 * 2
    assert read_budget(model, "wide").capacity == 2 * 7
    saved(model, tmp_path)
    assert read_budget(tmp_path).kinds == ["q"]
    assert read_budget(tmp_path, "wide").kinds == ["v"]
    with pytest.raises(GatewiseError, match=r"no adapter named 'narrow'; it has 'default', 'wide'"):
        read_budget(model, "narrow")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(GatewiseError, match="sub-folders wide"):
        read_budget(tmp_path)


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
        tensors |= factors(path)
    folder = written(tmp_path, tensors, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=stabilised)
    scalings = {module.path: module.scaling for module in read_budget(folder).modules}
    assert len(scalings) == len(paths)
    for path in paths:
        rank = ranks.get(get_pattern_key(list(ranks), path), 4)
        alpha = alphas.get(get_pattern_key(list(alphas), path), 8)
        assert scalings[path] == pytest.approx(alpha / (math.sqrt(rank) if stabilised else rank))


def test_the_usual_key_spellings_are_read(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj")
    plain = factors("model.layers.1.self_attn.q_proj")
    magnitude = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(5)}
    written(tmp_path, tensors)
    prefixed = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(prefixed | plain | magnitude, tmp_path / "adapter_model.safetensors")
    budget = read_budget(str(tmp_path))
    assert [module.parameters for module in budget.modules] == [4 * 11 + 5, 4 * 11]
    assert [module.layer for module in budget.modules] == [0, 1]


# ---- bad input


def test_bad_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refuse(folder: Path, words: str) -> None:
        with pytest.raises(GatewiseError, match=words) as caught:
            read_budget(folder)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "missing", "there is no such folder")
    refuse(tmp_path, r"not an adapter, it has no adapter_config\.json")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "is a file")

    good = factors("model.layers.0.self_attn.q_proj")
    no_weights = written(tmp_path / "no_weights", good)
    (no_weights / "adapter_model.safetensors").unlink()
    refuse(no_weights, r"has no adapter_model\.safetensors")
    (no_weights / "adapter_model.bin").write_bytes(b"\x80")
    refuse(no_weights, "a pickle.*save_pretrained to get safetensors")

    cut = written(tmp_path / "cut", good)
    weights = cut / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refuse(cut, r"adapter_model\.safetensors is damaged or cut short")

    broken = written(tmp_path / "broken", good)
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
    refuse(written(tmp_path / "half", {f"{path}.lora_A.weight": torch.ones(4, 6)}), f"{path} has no lora_B")
    uneven = {f"{path}.lora_A.weight": torch.ones(4, 6), f"{path}.lora_B.weight": torch.ones(5, 2)}
    refuse(written(tmp_path / "uneven", uneven), r"shape \(4, 6\) and lora_B of shape \(5, 2\), whose ranks differ")
    flat = {f"{path}.lora_A.weight": torch.ones(4), f"{path}.lora_B.weight": torch.ones(4)}
    refuse(written(tmp_path / "flat", flat), "ranks differ")
    refuse(written(tmp_path / "none", {"classifier.weight": torch.ones(2, 2)}), "holds no LoRA weights")


def test_a_model_without_adapter_is_refused() -> None:
    with pytest.raises(GatewiseError, match="expected an adapter folder or a PeftModel, got LlamaForCausalLM"):
        read_budget(llama())  # type: ignore[arg-type]


# ---- allocation.json


def test_rounds_are_read_and_a_module_that_lost_all_stays_visible(tmp_path: Path) -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    rounds = [
        a_round(0, {q: 3, v: 3}, pruned={v: [1, 2]}, grown={q: [4, 5]}),
        a_round(1, {q: 4, v: 0}, pruned={v: [0, 3, 4]}, grown={q: [6]}, loss_before=None, loss_after=math.nan),
    ]
    folder = written(tmp_path, factors(q), {"format": 1, "score": "ablation", "budget": 6, "rounds": rounds})
    budget = read_budget(folder)
    assert budget.ranks == {q: 4, v: 0}
    assert budget.matrix() == (["0", "1"], ["q", "v"], [[4, None], [None, 0]])
    first, second = budget.rounds
    assert (first.budget_before, first.budget_after, first.pruned, first.grown) == (6, 6, 2, 2)
    assert (second.budget_before, second.budget_after, second.pruned, second.grown) == (6, 4, 3, 1)
    plain = json.loads(json.dumps(to_json(budget), allow_nan=False))
    assert plain["score"] == "ablation"
    assert plain["rounds"][0] == {
        "round": 0,
        "step": 0,
        "budget_before": 6,
        "budget_after": 6,
        "pruned": 2,
        "grown": 2,
        "loss_before": 1.5,
        "loss_after": 1.25,
    }
    assert plain["rounds"][1]["loss_after"] is None
    assert "rounds: 2, ranks scored by ablation" in summary_lines(budget)
    page = plot(budget, tmp_path / "map.html").read_text()
    assert "<h2>Rounds</h2>" in page
    assert "<td>1.2500</td>" in page
    assert "<h2>Rounds</h2>" not in plot(stack(1), tmp_path / "none.html").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ('{"format": 2, "rounds": []}', "has format 2, this version reads format 1"),
        ('{"format": 1, "rounds": {}}', r"rounds\[0\] is not a round"),
        ('{"format": 1, "rounds": [{"ranks": {}, "pruned": {}}]}', r"rounds\[0\] is not a round.*grown"),
        ('{"format": 1, "rounds": [{"ranks": [], "pruned": {}, "grown": {}}]}', r"rounds\[0\] is not a round"),
    ],
)
def test_a_damaged_allocation_file_is_named(content: str, words: str, tmp_path: Path) -> None:
    folder = written(tmp_path, factors("model.layers.0.self_attn.q_proj"))
    (folder / "allocation.json").write_text(content)
    with pytest.raises(GatewiseError, match=words) as caught:
        read_budget(folder)
    assert "allocation.json" in str(caught.value)


def test_another_tools_allocation_file_is_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path, factors("model.layers.0.self_attn.q_proj"), {"cpu": 4})
    assert read_budget(folder).rounds == ()


# ---- the map


def test_matrix_adds_up_places_and_shows_holes(tmp_path: Path) -> None:
    tensors = factors("model.layers.3.mlp.experts.0.up_proj") | factors("model.layers.3.mlp.experts.1.up_proj", r=2)
    tensors |= factors("model.layers.1.self_attn.q_proj", r=1) | factors("classifier.dense", r=3)
    budget = read_budget(written(tmp_path, tensors))
    layers, kinds, cells = budget.matrix()
    assert (layers, kinds) == (["0", "1", "2", "3", "other"], ["q", "up", "dense"])
    assert cells == [[None] * 3, [1, None, None], [None] * 3, [None, 6, None], [None, None, 3]]
    norms = {module.path: module.norm for module in budget.modules}
    both = math.hypot(norms["model.layers.3.mlp.experts.0.up_proj"], norms["model.layers.3.mlp.experts.1.up_proj"])
    assert budget.matrix("norm")[2][3][1] == pytest.approx(both)
    assert budget.matrix("parameters")[2][3][1] == 6 * 11
    with pytest.raises(ValueError, match="expected one of rank, norm, parameters"):
        budget.matrix("size")  # type: ignore[arg-type]


def test_an_absurd_layer_number_makes_no_rows() -> None:
    module = ModuleBudget("model.layers.999999999.q_proj", 999_999_999, "q", 1, 1, 1, 1, 1.0, 1.0)
    assert BudgetMap((module,)).layers == ["999999999"]


def test_json_is_plain_and_complete() -> None:
    budget = stack(3)
    plain = json.loads(json.dumps(to_json(budget), allow_nan=False))
    assert plain["totals"]["rank"] == budget.rank == sum(module["rank"] for module in plain["modules"])
    assert plain["matrix"]["rank"] == budget.matrix()[2]
    assert plain["modules"][0] | {"norm": 0} == {
        "path": "model.layers.0.self_attn.q_proj",
        "layer": 0,
        "kind": "q",
        "rank": 0,
        "capacity": 16,
        "parameters": 0,
        "allocated": 1600,
        "scaling": 2.0,
        "norm": 0,
    }
    broken = BudgetMap((ModuleBudget("a.layers.0.q_proj", 0, "q", 1, 1, 9, 9, 1.0, math.nan),))
    assert json.loads(json.dumps(to_json(broken), allow_nan=False))["modules"][0]["norm"] is None


def test_nan_weights_are_shown_not_hidden(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"][1, 2] = math.nan
    budget = read_budget(written(tmp_path, tensors))
    assert budget.rank == 4
    assert math.isnan(budget.modules[0].norm)
    assert "nan" in rendered(budget, "norm")
    for name in ("a.png", "a.html"):
        assert plot(budget, tmp_path / name, "norm").stat().st_size > 0


def test_summary_says_where_it_went(tmp_path: Path) -> None:
    tensors = factors("model.layers.0.self_attn.q_proj", r=1) | factors("model.layers.3.self_attn.v_proj", r=3)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"][:] = 0
    tensors["model.layers.0.self_attn.q_proj.lora_B.weight"][:] = 0
    tensors["classifier.weight"] = torch.ones(2, 2)
    budget = read_budget(written(tmp_path, tensors, base_model_name_or_path="some/model", use_rslora=True))
    assert summary_lines(budget) == [
        "base model: some/model",
        "adapter: rsLoRA, 2 modules in 4 layers",
        "total rank: 3 of 4 slots",
        "parameters: 33 in use, 11 in dead slots, and 4 outside LoRA",
        "rank by kind: q 0%, v 100%",
        "most rank: layer 3 (3)",
        "empty layers: 0-2",
    ]


# ---- the table


def rendered(budget: BudgetMap, value: Any = "rank", width: int = 80, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(ranks_table(budget, value))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["rank", "norm", "parameters"])
def test_table_fits_eighty_columns_and_reads_without_colour(value: Any) -> None:
    budget = stack(80, parameters=123_457)
    text = rendered(budget, value)
    assert "…" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    rows = [line.split() for line in text.splitlines() if line.split()]
    assert rows[0] == ["layer", "q", "k", "v", "o", "gate", "up", "down", "total"]
    numbered = [row for row in rows if row[0].isdigit() or row[0] == "total"]
    assert [row[0] for row in numbered] == [*map(str, range(80)), "total"]
    assert all(len(row) == 9 for row in numbered)


def test_table_holds_every_rank_and_total() -> None:
    budget = stack(5)
    rows = [line.split() for line in rendered(budget).splitlines() if line.split()]
    cells = budget.matrix()[2]
    for index, row in enumerate(cells):
        assert [int(text) for text in rows[2 + index]] == [index, *row, sum(row)]  # type: ignore[arg-type]
    columns = [sum(row[x] for row in cells) for x in range(7)]  # type: ignore[misc]
    assert rows[-1] == ["total", *map(str, columns), str(budget.rank)]


def test_table_shades_differences_only() -> None:
    assert "48;2;" in rendered(stack(4), colour=True)
    assert "48;2;" not in rendered(stack(4, rank=8), colour=True)


# ---- the plot


@pytest.mark.parametrize("value", ["rank", "norm", "parameters"])
def test_png_and_svg(value: Any, tmp_path: Path) -> None:
    budget = stack(6)
    png = plot(budget, tmp_path / "new" / "map.png", value, title="ranks of $x_{ & <b>").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    svg = plot(budget, tmp_path / "map.svg", value)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    first = svg.read_bytes()
    assert plot(budget, svg, value).read_bytes() == first  # the same map gives the same bytes
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["map.png", "map.svg"]


def test_image_grows_with_the_layers(tmp_path: Path) -> None:
    def size(layers: int) -> tuple[int, int]:
        header = plot(stack(layers), tmp_path / "map.png").read_bytes()[16:24]
        return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")

    small, large = size(6), size(80)
    assert small[0] == large[0]
    assert large[1] - small[1] > 74 * 0.2 * 160 * 0.8  # every row keeps a readable height, about 0.2 inches


@pytest.mark.filterwarnings("error")
def test_empty_map_is_drawn(tmp_path: Path) -> None:
    for name in ("a.png", "a.svg", "a.html"):
        assert plot(BudgetMap(()), tmp_path / name).stat().st_size > 0
    assert summary_lines(BudgetMap(()))[2] == "total rank: 0"


class Page(HTMLParser):
    """Checks nesting and collects what a test asks about."""

    VOID = frozenset({"meta", "link", "input", "br", "hr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        found = {name: value or "" for name, value in attrs}
        if found.get("class") == "cell":
            self.cells.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_accessible_and_alone(tmp_path: Path) -> None:
    budget = stack(4)
    text = plot(budget, tmp_path / "map.html", "norm").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text.split("</style>")[0])
    assert not [value for name, value in page.attributes if name in ("src", "href") and value != "data:,"]
    assert "default-src 'none'" in text
    assert len(page.cells) == 4 * 7
    last = budget.modules[-1]
    assert page.cells[-1]["data-tip"].splitlines() == [
        last.path,
        f"rank {last.rank} of 16",
        f"{last.parameters:,} of 1,600 parameters",
        f"norm {last.norm:.3g}, scaling 2",
    ]
    assert ("data-value", "norm") in page.attributes
    assert [value for name, value in page.attributes if (name, value) == ("type", "radio")] == ["radio"] * 3
    assert {"caption", "thead", "tbody", "tfoot", "fieldset", "legend", "details"} <= set(page.tags)
    assert page.attributes.count(("scope", "row")) == 4 + 1 + 28  # layers, the totals, the list of modules
    assert "prefers-color-scheme:dark" in text
    heat = [float(n) for n in re.findall(r"--(?:rank|norm|parameters):([\d.]+)", " ".join(c["style"] for c in page.cells))]
    assert len(heat) == 3 * 28
    assert (min(heat), max(heat)) == (0.0, 1.0)


def test_page_escapes_whatever_it_is_given(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
    module = ModuleBudget(f'layers.0.{evil}"', 0, evil, 1, 1, 1, 1, 1.0, 1.0)
    entry = inspection.RoundSummary(0, None, 1, 1, 0, 0, None, None)
    budget = BudgetMap((module,), base_model=evil, adapter_type=evil, score=evil, rounds=(entry,))
    page = Page(plot(budget, tmp_path / "map.html", title=evil).read_text())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.cells[0]["data-tip"].startswith(module.path)


def test_unknown_suffix_and_value(tmp_path: Path) -> None:
    with pytest.raises(GatewiseError, match=r"map\.pdf.*\.png, \.svg or \.html"):
        plot(stack(1), tmp_path / "map.pdf")
    with pytest.raises(ValueError, match="expected one of"):
        plot(stack(1), tmp_path / "map.png", "size")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "map.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(GatewiseError, match=r"cannot write .*map\.html: No space left on device"):
        plot(stack(1), out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(GatewiseError, match=r"cannot write .*map\.png"):
        plot(stack(1), tmp_path / "file" / "map.png")
    assert (tmp_path / "file").read_text() == "here"
