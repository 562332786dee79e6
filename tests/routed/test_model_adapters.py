"""What PEFT asks of a tuner: saving, loading, several adapters, switching, disabling, deleting, unloading; and what is refused."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.optimizers import create_lorafa_optimizer
from peft.utils import get_peft_model_state_dict
from routed_models import routed_base, routed_config, trained_routers
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter
from transformers import Trainer, TrainingArguments

from gatewise.errors import GatewiseError

FAMILIES = ["llama", "gpt2", "bert"]


def logits_of(model, data):
    with torch.no_grad():
        return model(**data).logits


def same_base(model):
    """A base model with the weights of the one under ``model``."""
    family = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2"}.get(type(model.get_base_model()).__name__, "bert")
    base = routed_base(family)
    weights = {
        key.replace(".base_layer", "").replace(".original_module", ""): value
        for key, value in model.get_base_model().state_dict().items()
        if not any(part in key for part in ("lora_", "prompt_router", "modules_to_save"))
    }
    base.load_state_dict(weights)
    return base.eval()


def rewritten(folder, config, tensors):
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def test_the_order_of_the_experts_is_saved(routed, batch, tmp_path):
    model, data = routed("llama", top_k=2), batch("llama")
    expected, gates = logits_of(model, data), model.routing().gates
    model.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    assert config["experts"] == dict(zip(model.routing().layers, map(list, model.routing().modules), strict=True))
    # Another order is another order of the router's rows, and its first expert keeps the router.
    for layer, names in config["experts"].items():
        for key in [key for key in tensors if f"{layer}.{names[0]}.lora_router." in key]:
            value = tensors.pop(key)
            tensors[key.replace(names[0], names[-1])] = value.flip(0).contiguous() if key.endswith(".weight") else value
        names.reverse()
    rewritten(tmp_path, config, tensors)
    loaded = PeftModel.from_pretrained(same_base(model), tmp_path)
    torch.testing.assert_close(logits_of(loaded, data), expected)
    torch.testing.assert_close(loaded.routing().gates, gates)  # which are told in the model's order
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["experts"] == config["experts"]


def test_adapters_without_the_order_have_the_models(routed, batch, tmp_path):
    model, data = routed("llama", top_k=2), batch("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    order = config.pop("experts")
    rewritten(tmp_path, config, load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(same_base(model), tmp_path)
    torch.testing.assert_close(logits_of(loaded, data), logits_of(model, data))
    assert loaded.peft_config["default"].experts == order


def test_an_order_that_does_not_fit_the_model_is_refused(routed, tmp_path):
    model = routed("llama")
    model.save_pretrained(tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    layer, names = next(iter(config["experts"].items()))
    for order, reason in (
        ({**config["experts"], layer: names[1:]}, rf"the experts of {layer} are .*load the adapter on the base model"),
        ({**config["experts"], "model.layers.7": names}, r"the experts of model\.layers\.7 are .*make them none"),
        ({**config["experts"], layer: [*names, names[0]]}, rf"the experts of {layer} are "),
    ):
        rewritten(tmp_path, {**config, "experts": order}, tensors)
        with pytest.raises(GatewiseError, match=reason):
            PeftModel.from_pretrained(same_base(model), tmp_path)


def test_an_adapter_that_left_the_prompt_alone_is_refused(routed, tmp_path):
    model = routed("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert "adapt" not in saved
    path.write_text(json.dumps(saved | {"adapt": "always"}))
    PeftModel.from_pretrained(same_base(model), tmp_path)
    path.write_text(json.dumps(saved | {"adapt": "after_prompt"}))
    with pytest.raises(GatewiseError, match="adapt='after_prompt', which gatewise no longer has"):
        PeftModel.from_pretrained(same_base(model), tmp_path)


def test_one_configuration_serves_several_models():
    config = routed_config(target_modules=["q_proj", "v_proj", "query", "value"], top_k=1)
    for family in ("llama", "bert", "llama"):
        config.task_type = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
        model = get_peft_model(routed_base(family), config)
        assert next(map(tuple, model.peft_config["default"].experts.values())) in (
            ("self_attn.q_proj", "self_attn.v_proj"),
            ("attention.self.query", "attention.self.value"),
        )


def test_what_is_saved(routed, tmp_path):
    routed("llama").save_pretrained(tmp_path)
    names = {key.split(".layers.1.")[1] for key in load_file(tmp_path / "adapter_model.safetensors") if ".layers.1." in key}
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    routers = {f"self_attn.q_proj.lora_router.{name}" for name in ("weight", "pool", "numerator", "denominator")}
    routers |= {f"self_attn.q_proj.lora_router.{name}" for name in ("center", "spread", "observed")}
    assert names == routers | {f"{m}.lora_{f}.weight" for m in (*modules, "mlp.down_proj") for f in "AB"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["top_k"] == 3


def test_training_goes_on_after_loading(routed, batch, tmp_path):
    model = routed("llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(same_base(model), tmp_path, is_trainable=True).train()
    loaded(**batch()).loss.backward()
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if ".lora_" in name or ".prompt_router." in name}
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)


def test_a_resumed_run_is_one_never_stopped(batch, tmp_path):
    """Routers, and what the optimiser knows of them, come back from a Trainer's checkpoint."""
    rows = [dict(zip(batch(rows=8), one, strict=True)) for one in zip(*batch(rows=8).values(), strict=True)]

    def run(folder, resume=False):
        torch.manual_seed(0)
        model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config(balance_weight=0.5))))
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model=model, args=args, train_dataset=rows).train(
            resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None
        )
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole = run(tmp_path)
    for name, value in run(tmp_path, resume=True).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0, msg=name)


def test_lora_fa_trains_routers_by_adam(routed, batch):
    """It takes every two parameters with "lora" in their names for an A and a B, so routers are called something else."""
    model = routed("llama", top_k=7).train()
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(**batch()).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_B." in name or "router" in name}


def test_half_precision_bases_keep_the_router_in_float32(routed, tmp_path):
    model = routed("llama")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for low_memory in (False, True):
        base = same_base(model).to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory, autocast_adapter_dtype=False)
        got = get_peft_model_state_dict(loaded)
        for name, value in saved.items():
            if "lora_router" in name:
                torch.testing.assert_close(got[name], value, rtol=0, atol=0)


# ---- several adapters ----


SECOND = {"r": 5, "top_k": 1, "pooler": "max", "activation": "gelu", "target_modules": ["k_proj", "up_proj", "down_proj"]}


@pytest.fixture
def two(routed):
    model = routed("llama")
    model.add_adapter("second", routed_config(**SECOND))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def test_disabled_calls_do_not_count_as_requests(two, batch):
    """As in DPO, where the reference model is the one without its adapter."""
    data = batch()
    two.train()(**data)
    gates, term = two.routing().gates, float(two.balance_loss().detach())
    with two.disable_adapter():
        two(**{name: value[:2] for name, value in data.items()})
    assert float(two.balance_loss().detach()) == term > 0
    torch.testing.assert_close(two.routing().gates, gates)


@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("deleted", ["default", "second"])
def test_delete(two, batch, active, deleted):
    data, left = batch(), {"default": "second", "second": "default"}[deleted]
    two.set_adapter(left)
    expected = logits_of(two, data)
    two.set_adapter(active)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two.delete_adapter(deleted)
    assert two.active_adapters == [left]
    assert not any(f".{deleted}." in name for name, _ in two.named_parameters())
    torch.testing.assert_close(logits_of(two, data), expected)
    assert {name for name, p in two.named_parameters() if p.requires_grad} == {
        name for name, _ in two.named_parameters() if f".{left}." in name
    }


# ---- refusals ----


def test_what_else_is_refused(routed, tmp_path):
    model = routed("llama")
    with pytest.raises(GatewiseError, match="cannot be added up"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(GatewiseError, match="cannot be converted to plain LoRA"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not model.supports_lora_conversion()
    with pytest.raises(GatewiseError, match="without input_ids or inputs_embeds"):
        model.get_base_model()(attention_mask=torch.ones(1, 3))
    with pytest.raises(GatewiseError, match="modules saved with an adapter"):
        routed("bert")(input_ids=torch.ones(1, 3, dtype=torch.long), adapter_names=["default"])
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(routed_config(), routed_base("llama"))


def test_plain_lora_on_a_base_that_is_still_routed(routed, batch):
    """It would train one model and run another."""
    settings = {"target_modules": ["v_proj"]}
    model, data = routed("llama"), batch()
    bare = same_base(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own word on it
        with pytest.raises(GatewiseError, match=r"carries routed adapters.*call unload\(\) on the routed PeftModel first"):
            get_peft_model(model.get_base_model(), LoraConfig(r=2, **settings), adapter_name="plain")
    plain = model.unload()
    torch.testing.assert_close(logits_of(plain, data), logits_of(bare, data))
    again = random_adapter(get_peft_model(plain, LoraConfig(r=2, **settings)))
    assert not torch.allclose(logits_of(again, data), logits_of(bare, data))


def test_a_failed_add_leaves_the_others(routed, batch):
    model, data = routed("llama"), batch()
    before = logits_of(model, data)
    with pytest.raises(GatewiseError, match="top_k is 9"):
        model.add_adapter("other", routed_config(top_k=9))
    assert list(model.peft_config) == ["default"]
    torch.testing.assert_close(logits_of(model, data), before)
