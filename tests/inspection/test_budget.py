"""Budgets are checked against PEFT's own update weights and against folders written by hand."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import a_round, random_factors, write_folder
from maps import rendered
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig
from tiny_models import tiny_base
from torch import nn

from gatewise.errors import GatewiseError
from gatewise.inspection import budget_lines, grid_table, plot, read_budget


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


def adapted(base: Any, **config: Any) -> PeftModel:
    """Random factors everywhere, as training would leave them."""
    torch.manual_seed(0)
    kind = AdaLoraConfig if "init_r" in config else LoraConfig
    model = get_peft_model(tiny_base(base) if isinstance(base, str) else base(), kind(**config))
    for name, parameter in model.named_parameters():
        if re.search(r"lora_(embedding_)?[ABE]", name):
            torch.nn.init.normal_(parameter)
    return model


def norm_of(layer: Any) -> float:
    """The norm of the update that PEFT itself would merge."""
    return float(torch.linalg.norm(layer.get_delta_weight("default").detach().float()))


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("llama", {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
        (
            "llama",
            {
                "r": 4,
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {"layers.1.self_attn.q_proj": 6, "^model.layers.0.mlp.down_proj": 2, "v_proj": 3},
                "alpha_pattern": {"q_proj": 32, "model.layers.1.self_attn.q_proj": 1},
            },
        ),
        ("llama", {"r": 4, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 9}}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
        ("bert", {"r": 3, "target_modules": "all-linear", "task_type": "SEQ_CLS", "use_dora": True}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_alpha": 16}),
        (Mixture, {"r": 2, "target_parameters": ["experts.weight"], "target_modules": []}),
    ],
)
def test_folder_agrees_with_the_update_peft_applies(base: Any, config: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(adapted(base, **config), tmp_path / "adapter")
    budget = read_budget(folder)
    # Loaded anew, because PEFT sorts the patterns when it saves them and then takes the first that matches.
    model = PeftModel.from_pretrained(tiny_base(base) if isinstance(base, str) else base(), str(folder))
    layers = {
        path.removeprefix("base_model.model.") + (".weight" if base is Mixture else ""): layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
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
    assert budget.total("norm") == pytest.approx(math.sqrt(sum(module.norm**2 for module in budget.modules)))


def test_types_and_parameters_outside_lora(tmp_path: Path) -> None:
    budget = read_budget(saved(adapted("bert", r=3, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True), tmp_path))
    assert budget.adapter_type == "DoRA"
    assert budget.other_parameters == 16 * 3 + 3  # the classifier head, trained and saved whole
    assert {module.kind for module in budget.modules} == {"q", "k", "v", "o", "up", "down", "pooler"}


def test_adalora(tmp_path: Path) -> None:
    model = adapted("llama", init_r=5, target_r=2, total_step=100, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    budget = read_budget(saved(model, tmp_path))
    assert budget.adapter_type == "AdaLoRA"
    (module,) = (m for m in budget.modules if m.path == "model.layers.1.self_attn.v_proj")
    assert module.rank == 5
    assert module.norm == pytest.approx(norm_of(layer), rel=1e-5)
    assert module.parameters == 5 * (16 + 8 + 1)


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning", "ignore:.*invalid shape:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_counts_unless_both_halves_are_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("llama", r=4, lora_bias=True, target_modules=["q_proj", "v_proj"]).to(dtype)
    path = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        layer.lora_A["default"].weight[[0, 2]] = 0
        layer.lora_B["default"].weight[:, [0, 2]] = 0
        layer.lora_B["default"].weight[:, 1] = 0  # a freshly grown rank: alive, though it adds nothing yet
    budget = read_budget(saved(model, tmp_path))
    module = budget.modules[0]
    assert (module.path, module.rank, module.capacity) == (path, 2, 4)
    assert module.parameters == 2 * (16 + 16) + 16  # two slots and the bias of B
    assert module.allocated == 4 * (16 + 16) + 16
    assert module.norm == pytest.approx(norm_of(layer), rel=0.02)
    assert budget.rank == budget.total("capacity") - 2


def test_rounds_are_read_and_a_module_that_lost_all_stays_visible(tmp_path: Path) -> None:
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    rounds = [
        a_round(0, {q: 3, v: 3}, pruned={v: [1, 2]}, grown={q: [4, 5]}),
        a_round(1, {q: 4, v: 0}, pruned={v: [0, 3, 4]}, grown={q: [6]}, loss_before=None, loss_after=math.nan),
    ]
    folder = write_folder(tmp_path, random_factors(q), {"format": 1, "score": "ablation", "budget": 6, "rounds": rounds})
    budget = read_budget(folder)
    assert budget.ranks == {q: 4, v: 0}
    assert (budget.rounds, budget.score) == (2, "ablation")
    assert "rounds: 2, ranks scored by ablation" in budget_lines(budget)


def test_nan_weights_are_shown_not_hidden(tmp_path: Path) -> None:
    tensors = random_factors("model.layers.0.self_attn.q_proj")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"][1, 2] = math.nan
    budget = read_budget(write_folder(tmp_path, tensors))
    assert budget.rank == 4
    assert math.isnan(budget.modules[0].norm)
    assert "nan" in rendered(grid_table(budget.grid("norm")))
    assert plot(budget, tmp_path / "a.png", "norm").stat().st_size > 0


def test_factors_in_blocks_are_not_called_damaged(tmp_path: Path) -> None:
    blocks = BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False)
    model = adapted("llama", target_modules=["q_proj", "o_proj"], r=4, use_bdlora=blocks)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(GatewiseError, match=r"expected a LoRA adapter .* without use_bdlora"):
        read_budget(tmp_path / "saved")
