"""Forward and backward of routed models against the slow reference, and what must not change the result."""

import pytest
import routed_reference as reference
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from transformers import AutoModel, DebertaV2Config, OPTConfig, OPTForCausalLM

from gatewise.errors import GatewiseError

FAMILIES = ["llama", "gpt2", "bert"]


def alone(batch, row, prompt_only=False):
    """One row of a batch without its padding, as (1, t) ids; its prompt only if asked for."""
    mask = batch["attention_mask"][row].bool()
    if prompt_only and batch["labels"].ndim == 2:
        mask &= (batch["labels"][row] != -100).cumsum(0) == 0
    return batch["input_ids"][row][mask][None]


def check_against_reference(model, family, batch):
    """Logits of every real token, gates, and, for a batch with answers, a decision from the prompt alone."""
    with torch.no_grad():
        logits = model(**batch).logits
    routing = model.routing()
    for row in range(len(batch["input_ids"])):
        plain, gates, _ = reference.merged(model, family, alone(batch, row, prompt_only=True))
        torch.testing.assert_close(routing.gates[row].tolist(), gates, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            expected = plain(input_ids=alone(batch, row)).logits[0]
        got = logits[row] if family == "bert" else logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["rational", "gelu", "relu", "identity"])
@pytest.mark.parametrize("pooler", ["attention", "mean", "max", "last"])
def test_every_pooler_and_activation(routed, batch, pooler, activation):
    model = routed("llama", pooler=pooler, activation=activation)
    check_against_reference(model, "llama", batch())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("k", "normalize"), [(1, True), (1, False), (3, True), (3, False)])
def test_every_family(routed, batch, family, k, normalize):
    model = routed(family, top_k=k, normalize_gates=normalize)
    check_against_reference(model, family, batch(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_left_padding(routed, batch, family):
    data = batch(family, side="left")
    if family == "gpt2":  # its positions are counted from the first column unless given
        data["position_ids"] = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
    check_against_reference(routed(family), family, data)


def test_prompts_choose_differently(routed, batch):
    """Or the tests here would say little."""
    for family in FAMILIES:
        model = routed(family, top_k=1)
        with torch.no_grad():
            model(**batch(family, rows=8))
        kept = (model.routing().gates > 0).flatten(1)
        assert len({tuple(row.tolist()) for row in kept}) > 1, family


def test_modules_that_do_not_see_the_tokens_row_by_row_are_named(batch):
    """OPT's, which see batch and tokens as one dimension, and DeBERTa's, which also run on a table of positions."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16))
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
    deberta = AutoModel.from_config(DebertaV2Config(**sizes, **relative, intermediate_size=24))
    data = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    for base, path in ((opt, "decoder.layers.0.fc1"), (deberta, "encoder.layer.0.attention.self.query_proj")):
        model = get_peft_model(base, routed_config(task_type=None)).eval()
        with torch.no_grad(), pytest.raises(GatewiseError, match=rf"{path} was given .* exclude_modules"):
            model(**data)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_router_over_all_experts_is_lora(routed, batch, family):
    """W_r = 0 and k = m: every gate is 1 / m, so the model is plain LoRA at that part of its scale; normalised or not."""
    model = routed(family, trained=False, top_k={"llama": 7, "gpt2": 4, "bert": 6}[family])
    random_adapter(model)
    for name, parameter in model.named_parameters():
        if name.endswith("prompt_router.default.weight"):
            torch.nn.init.zeros_(parameter)
    config = model.peft_config["default"]
    plain = get_peft_model(
        reference.plain_copy(model), LoraConfig(r=3, lora_alpha=6, target_modules=config.target_modules, task_type=config.task_type)
    ).eval()
    result = plain.load_state_dict(model.state_dict(), strict=False)
    assert all("prompt_router" in key for key in result.unexpected_keys)
    assert not result.missing_keys
    for layer in plain.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] /= config.top_k
    data = batch(family)
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, plain(**data).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_is_the_base_model(routed, batch, family):
    model, data = routed(family, trained=False), batch(family)
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, reference.plain_copy(model)(**data).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("columns", [1, 6])
def test_amount_of_padding(routed, batch, family, columns):
    model, data = routed(family), batch(family)
    wider = {
        "input_ids": torch.nn.functional.pad(data["input_ids"], (0, columns), value=7),
        "attention_mask": torch.nn.functional.pad(data["attention_mask"], (0, columns), value=0),
        "labels": data["labels"] if family == "bert" else torch.nn.functional.pad(data["labels"], (0, columns), value=-100),
    }
    with torch.no_grad():
        narrow, loss = model(**data).logits, model(**data).loss
        gates = model.routing().gates
        torch.testing.assert_close(model(**wider).loss, loss)
        got = model(**wider).logits
    torch.testing.assert_close(model.routing().gates, gates)
    if family == "bert":
        torch.testing.assert_close(got, narrow)
    else:
        real = data["attention_mask"].bool()
        torch.testing.assert_close(got[:, : narrow.shape[1]][real], narrow[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_rows(routed, batch, family):
    model, data = routed(family), batch(family)
    with torch.no_grad():
        together = model(**data).logits
        for row in range(5):
            one = {name: value[row : row + 1] for name, value in data.items()}
            real = slice(None) if family == "bert" else data["attention_mask"][row].bool()
            torch.testing.assert_close(model(**one).logits[0][real], together[row][real], rtol=1e-4, atol=1e-5)


def test_an_expert_that_no_row_keeps_is_not_run(routed, batch):
    """In evaluation its A and B are not touched; in training all of them are, as data-parallel training needs."""
    model, ran = routed("llama", top_k=1), []
    for name, module in model.named_modules():
        if name.endswith(".lora_A.default"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    data = batch(rows=1)
    with torch.no_grad():
        model(**data)
        kept = len(ran)
        ran.clear()
        model.train()(**data)
    assert kept == 2
    assert len(ran) == 14


def test_gradients_match_differences_of_the_loss(batch):
    """The largest number of each kind of weight, in float64, from the loss on the answers; the balance loss left out."""
    config = routed_config("gpt2", balance_weight=0.0, normalize_gates=False)
    model = trained_routers(random_adapter(get_peft_model(routed_base("gpt2"), config))).double().train()
    data = batch("gpt2")

    def loss():  # the model's own is in float32
        return torch.nn.functional.cross_entropy(model(**data).logits[:, :-1].transpose(1, 2), data["labels"][:, 1:])

    loss().backward()
    for name in ("c_attn.lora_A.default.weight", "c_proj.lora_B.default.weight", "c_attn.prompt_router.default.weight"):
        parameter = model.get_parameter(f"base_model.model.transformer.h.0.attn.{name}")
        at = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):
                parameter[at] += step
                losses.append(float(loss()))
        assert float(parameter.grad[at]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3)


def test_every_parameter_gets_a_gradient_in_training(routed, batch):
    model = routed("llama", top_k=1).train()
    model(**batch()).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum("prompt_router" in name for name in trained) == 8
    assert all(grad is not None for grad in trained.values())
    routers = [grad for name, grad in trained.items() if "prompt_router" in name]
    assert all(float(grad.abs().max()) > 0 for grad in routers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(batch, family, dtype):
    base = routed_base(family).to(dtype)
    model = trained_routers(random_adapter(get_peft_model(base, routed_config(family)), 0.05)).eval()
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name or "prompt_router" in name)
    data = batch(family)
    with torch.no_grad():
        got = model(**data).logits
        gates = model.routing().gates
        expected = model.float()(**data).logits
    assert got.dtype == dtype
    assert float((got.float() - expected).abs().max()) < 0.2 * float(expected.abs().max())
    torch.testing.assert_close(gates.sum(dim=-1), torch.ones(5, 2))
    model.to(dtype)
    with torch.no_grad():  # everything in half precision, the router's parameters too: gates are still float32
        assert model(**data).logits.dtype == dtype
    torch.testing.assert_close(model.routing().gates.sum(dim=-1), torch.ones(5, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_trains(routed, batch, family):
    model, data = routed(family).train(), batch(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**data).loss
    loss.backward()
    plain = float(model(**data).loss.detach())
    assert float(loss.detach()) == pytest.approx(plain, rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_rslora_and_patterns_scale_the_experts(batch):
    config = routed_config(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}, lora_dropout=0.1)
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), config))).eval()
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"].weight.shape == (2, 16)
    assert attention.v_proj.scaling["default"] == pytest.approx(9 / 3**0.5)
    check_against_reference(model, "llama", batch())


def test_layers_without_experts_run_as_they_are(batch):
    model = get_peft_model(
        routed_base("llama"), routed_config(target_modules=["q_proj", "v_proj"], top_k=1, layers_to_transform=[1])
    )
    with torch.no_grad():
        trained_routers(random_adapter(model)).eval()(**batch())
    assert model.routing().layers == ("model.layers.1",)
    assert model.routing().gates.shape == (5, 1, 2)
    # The first layer is exchanged too, but its modules are the base model's.
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(("family", "modules"), [("llama", ["q_proj", "down_proj"]), ("bert", ["query", "intermediate.dense"])])
def test_compiled(routed, batch, family, modules):
    """torch.compile gives the same numbers, with labels and without, and routers read no answer."""
    torch._dynamo.reset()
    model, data = routed(family, target_modules=modules, top_k=1), batch(family)
    compiled = torch.compile(model, backend="eager")
    if family == "llama":
        with torch.no_grad():
            torch.testing.assert_close(compiled(**data).logits, model(**data).logits, rtol=1e-4, atol=1e-4)
    model.train()
    losses = [one(**data).loss for one in (compiled, model)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    got, wanted = (torch.autograd.grad(loss, parameters) for loss in losses)
    for name, one, other in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
