"""Exports load in stock PEFT with the logits of the trained model, from a model and from a folder, packed and padded."""

import json

import pytest
import torch
from adapter_folders import a_round, random_factors, write_folder
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from saved_models import tiny_tokenizer
from tiny_models import load_in_peft, logits_of, random_adapter, tiny_base

from gatewise.adapters.export import to_lora
from gatewise.allocation import slots
from gatewise.errors import GatewiseError
from gatewise.models import load_tokenizer


def assert_loads(folder, family, data, expected):
    """Stock PEFT loads it, with these logits."""
    loaded = load_in_peft(family, folder)
    torch.testing.assert_close(logits_of(loaded, data), expected, rtol=1e-5, atol=1e-5)
    return loaded


def half_done(adapted, family, **settings):
    """A model as it is in mid-training: wide, with dead slots and a module without any rank."""
    model = adapted(family, **settings)
    slots.widen(model, 8)
    layers = slots.lora_layers(model)
    paths = list(layers)
    slots.prune(layers[paths[0]], "default", [0, 1, 2])
    slots.prune(layers[paths[1]], "default", [2])
    slots.grow(layers[paths[3]], "default", 4, torch.Generator().manual_seed(3))
    torch.nn.init.normal_(layers[paths[3]].lora_B["default"].weight[:, :7])
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.filterwarnings(
    "ignore:.*lora_bias:UserWarning", "ignore:.*alpha_pattern:RuntimeWarning"
)  # Llama's linear layers have no bias of their own
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"use_dora": True},
        {"lora_bias": True},
        {"lora_bias": True, "use_rslora": True, "alpha_pattern": {"q_proj": 5, "c_attn": 5, "query": 5}},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_loads_in_stock_peft_with_the_same_logits(adapted, batch, tmp_path, family, settings, padded, source):
    model, data = half_done(adapted, family, **settings), batch(family)
    expected = logits_of(model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if source == "folder":
        model.save_pretrained(tmp_path / "saved")
    plain = not settings.keys() & {"use_dora", "lora_bias"}  # else magnitudes and biases would have to become LoRA
    out = to_lora(model if source == "model" else tmp_path / "saved", tmp_path / "out", padded=padded, plain=plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loaded = assert_loads(out, family, data, expected)
    config = json.loads((out / "adapter_config.json").read_text())
    widths = {len(layer.lora_A["default"].weight) for layer in slots.lora_layers(loaded).values()}
    if padded:
        assert widths == {7}
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    else:
        assert widths == ({1, 2, 3, 7} if settings.get("use_dora") or settings.get("lora_bias") else {2, 3, 7})


def test_embeddings_patterns_and_modules_to_save_come_along(batch, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["embed_tokens", "q_proj", "v_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
    )
    model = get_peft_model(tiny_base("llama"), config)
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    expected = logits_of(model, batch())
    for padded in (False, True):
        out = to_lora(model, tmp_path / str(padded), padded=padded, plain=False)
        assert_loads(out, "llama", batch(), expected)


class Part(torch.nn.Module):
    def __init__(self, tower=None):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "out": torch.nn.Linear(4, 4)})])
        if tower is not None:
            self.tower = tower

    def forward(self, x):
        x = self.tower(x) if hasattr(self, "tower") else x
        return self.layers[0]["out"](self.layers[0]["fc"](x))


@pytest.mark.parametrize("how", ["exported", "compacted", "exported without its allocation"])
@pytest.mark.parametrize(
    ("targets", "gone"),
    [
        (["fc", "out"], "tower.layers.0.fc"),
        (r"(tower\.)?layers\.0\.(fc|out)", "tower.layers.0.fc"),
        (r"layers\.0\.(fc|out)", "layers.0.out"),
    ],
)
def test_a_module_that_is_gone_does_not_come_back_in_a_tower(tmp_path, how, targets, gone):
    """PEFT takes a module whose path ends in a listed one: "layers.0.fc" would bring "tower.layers.0.fc" back."""
    torch.manual_seed(0)
    model = random_adapter(get_peft_model(Part(Part()), LoraConfig(r=2, target_modules=targets))).eval()
    layers = slots.lora_layers(model)
    slots.prune(layers[gone], "default", [0, 1])
    x = torch.randn(3, 4)
    expected = model(x)
    out = tmp_path / "saved"
    if "exported" not in how:
        slots.compact(model)
    model.save_pretrained(out)
    if "exported" in how:
        if how == "exported":  # after a later round, it is in no file but this one
            slots.compact(model)
            model.save_pretrained(out)
            one = a_round(1, {**slots.ranks(model), gone: 0})
            (out / "allocation.json").write_text(json.dumps({"format": 1, "score": "taylor", "rounds": [one]}))
        out = to_lora(out, tmp_path / "out")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Part(Part()), out).eval()
    torch.testing.assert_close(loaded(x), expected)
    assert set(slots.lora_layers(loaded)) == set(layers) - {gone}


def test_the_adapters_own_tokenizer_comes_along(adapted, tmp_path):
    adapted().save_pretrained(tmp_path / "whole")
    tiny_tokenizer(pad=True).save_pretrained(tmp_path / "whole")
    out = to_lora(tmp_path / "whole", tmp_path / "out")
    assert load_tokenizer(out).pad_token == "<pad>"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


def test_a_named_adapter(adapted, batch, tmp_path):
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    expected = logits_of(model, batch())
    out = to_lora(model, tmp_path / "out", adapter="second")
    assert_loads(out, "llama", batch(), expected)


def test_refusals_leave_nothing(adapted, tmp_path):
    saved = tmp_path / "saved"
    adapted().save_pretrained(saved)
    weights, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    out = tmp_path / "out"

    def refused(message, source=saved, target=out):
        with pytest.raises(GatewiseError, match=message):
            to_lora(source, target, plain=False)
        assert not out.exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    refused("is not empty", target=saved)
    refused("is a file", target=weights)
    refused("cannot write", target=weights / "below")
    save_file({key: torch.zeros_like(value) for key, value in load_file(weights).items()}, weights)
    refused("has no live rank")
    written = json.loads(config.read_text())
    for changes, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"peft_type": "ROUTED_LORA"}, "peft_type 'ROUTED_LORA', expected 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', for which PEFT changes the base model by the rank"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora', for which"),
        ({"kasa_config": {"beta": 1.0}}, "the adapter has kasa_config, for which there is no plain LoRA"),
        ({"monteclora_config": {"n": 1}}, "the adapter has monteclora_config, for which"),
        ({"use_bdlora": {"nblocks": 2}}, "expected a LoRA adapter .* without use_bdlora"),
    ):
        config.write_text(json.dumps(written | changes))
        refused(message)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"], ["experts.gate_up_proj"]]
)
def test_stacked_experts_are_written_one_by_one(adapted, batch, tmp_path, family, parameters):
    """Under the names that vLLM wants. PEFT reads them too and stacks them again, which checks order, rank and scale."""
    settings = {"target_modules": ["q_proj"], "target_parameters": parameters, "rank_pattern": {"q_proj": 5}}
    torch.manual_seed(0)
    model = adapted(family, **settings)
    expected = logits_of(model, batch(family))
    out = to_lora(model, tmp_path / "out")
    assert_loads(out, family, batch(family), expected)
    experts = "block_sparse_moe.experts.{}.w{}" if family == "mixtral" else "mlp.experts.{}.{}_proj"
    kinds = (1, 2, 3) if family == "mixtral" else ("gate", "up", "down")
    names = {f"base_model.model.model.layers.1.{experts.format(at, kind)}.lora_A.weight" for at in range(3) for kind in kinds}
    tensors = load_file(out / "adapter_model.safetensors")
    assert names <= tensors.keys()
    assert {len(tensors[name]) for name in names} == {5}
    whole = to_lora(model, tmp_path / "whole", plain=False)
    assert_loads(whole, family, batch(family), expected)
    assert not names & load_file(whole / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("parameters", [["mlp.gate.weight"], ["mlp.gate.weight", "experts.down_proj"]])
def test_a_router_with_lora_goes_with_the_experts(adapted, batch, tmp_path, parameters):
    model = adapted("qwen3_moe", target_modules=["q_proj"], target_parameters=parameters)
    expected = logits_of(model, batch("qwen3_moe"))
    out = to_lora(model, tmp_path / "out")
    assert_loads(out, "qwen3_moe", batch("qwen3_moe"), expected)
    names = load_file(out / "adapter_model.safetensors")
    assert any("experts.0.down_proj" in name for name in names) == (len(parameters) == 2)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("source", ["model", "folder", "compacted"])
def test_biases_of_a_module_without_a_rank_come_along(adapted, batch, tmp_path, bias, source):
    model, data = adapted("gpt2", bias=bias, fan_in_fan_out=True), batch("gpt2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    for path, layer in slots.lora_layers(model).items():
        if path.endswith("c_attn"):
            slots.prune(layer, "default", [0, 1, 2])
    expected = logits_of(model, data)
    if source == "compacted":
        slots.compact(model)
    model.save_pretrained(tmp_path / "saved")
    out = tmp_path / "saved"
    if source != "compacted":
        out = to_lora(model if source == "model" else out, tmp_path / "out", plain=False)
    assert_loads(out, "gpt2", data, expected)


def allocated(family, seed, folder):
    """An adapter whose second layer has lost modules, as a Trainer saves it, and its logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_base(family), config)
    torch.manual_seed(seed)
    layers = slots.lora_layers(model)
    for layer in layers.values():
        for factor in slots.factors(layer, "default"):
            torch.nn.init.normal_(factor, std=0.3)
    gone = [path for path in layers if ".1." in path][seed::3]
    for path in gone:
        slots.prune(layers[path], "default", [0, 1, 2])
    ranks = slots.ranks(model)
    slots.compact(model)
    model.save_pretrained(folder)
    (folder / "allocation.json").write_text(json.dumps({"format": 1, "score": "taylor", "rounds": [a_round(1, ranks)]}))
    return model, set(gone)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_of_different_allocations_are_hotswapped(batch, tmp_path, family):
    (first, gone), (second, others) = (allocated(family, seed, tmp_path / f"{seed}") for seed in (0, 1))
    assert gone != others
    folders = [to_lora(tmp_path / f"{seed}", tmp_path / f"out{seed}", rank=4) for seed in (0, 1)]
    model = load_in_peft(family, folders[0])
    assert {len(layer.lora_A["default"].weight) for layer in slots.lora_layers(model).values()} == {4}
    assert gone < set(slots.lora_layers(model))
    torch.testing.assert_close(logits_of(model, batch(family)), logits_of(first, batch(family)))
    hotswap_adapter(model, folders[1], adapter_name="default")
    torch.testing.assert_close(logits_of(model, batch(family)), logits_of(second, batch(family)))


def test_a_rank_that_cannot_be_padded_to(tmp_path):
    allocated("llama", 0, tmp_path / "in")
    with pytest.raises(GatewiseError, match=r"^rank is 2, but the largest live rank is 3: give at least that$"):
        to_lora(tmp_path / "in", tmp_path / "out", padded=True, rank=2)
    record = json.loads((tmp_path / "in" / "allocation.json").read_text())
    record["rounds"][0]["ranks"]["model.layers.0.unheard_of"] = 0
    (tmp_path / "in" / "allocation.json").write_text(json.dumps(record))
    with pytest.raises(GatewiseError, match=r"^module model\.layers\.0\.unheard_of has no rank left, and its size cannot be told"):
        to_lora(tmp_path / "in", tmp_path / "out", padded=True, rank=4)
    assert not (tmp_path / "out").exists()


def test_a_share_to_keep_is_not_ignored_without_a_word(tmp_path):
    write_folder(tmp_path / "lora", random_factors("model.layers.0.q_proj"))
    (tmp_path / "lora" / "tokenizer").mkdir()  # no file of a tokenizer
    said: list[str] = []
    to_lora(tmp_path / "lora", tmp_path / "out", keep=0.5, say=said.append)
    assert said == ["keep changes nothing: this adapter is written exactly; gatewise compress makes a smaller one"]
    assert not (tmp_path / "out/tokenizer").exists()
