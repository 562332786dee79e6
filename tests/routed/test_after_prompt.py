"""Adapters that act from the prompt's last token on, against two plain models that read a prompt one after the other."""

import copy
import pickle
from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import PeftModel, get_peft_model
from routed_models import MODES, routed_base, routed_config, trained_routers
from test_packing import LENGTHS, PROMPTS, packed, padded, texts
from tiny_models import random_adapter
from transformers import AutoModel, LlamaForSequenceClassification, OPTConfig, OPTForCausalLM, StaticCache

from gatewise.errors import GatewiseError
from gatewise.losses import row_losses

NEW = 5
AFTER = {"adapt": "after_prompt"}
LAST = AFTER | {"pooler": "last"}


def alike(one: Any, other: Any, **more: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, **more)


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


@pytest.fixture
def prompts():
    """Left-padded prompts of eight, six, three and one tokens."""
    ids = torch.randint(1, 60, (4, 8), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(8) >= torch.tensor([0, 2, 5, 7])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(prompts, row):
    return prompts["input_ids"][row][prompts["attention_mask"][row].bool()][None]


@pytest.fixture
def tenants(routed):
    """Adapters that wait and one that does not, which differ in rank, number of experts and pooler."""
    model = routed("llama", **LAST)
    model.add_adapter("always", routed_config(r=2, top_k=1))
    model.add_adapter("pooled", routed_config(r=5, top_k=2, **AFTER))
    model.add_adapter("second", routed_config(r=3, top_k=2, target_modules=["k_proj", "v_proj", "up_proj"], **LAST))
    return trained_routers(random_adapter(model)).eval()


# ---- what it computes ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pooler", ["attention", "last"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_scoring_is_that_of_the_two_models(routed, family, pooler, padding):
    model = routed(family, top_k=2, pooler=pooler, **AFTER)
    data = padded()
    if padding == "left":
        shift = [9 - length for length in LENGTHS]
        data = {name: torch.stack([row.roll(by) for row, by in zip(value, shift, strict=True)]) for name, value in data.items()} | {
            "position_ids": (torch.arange(9) - torch.tensor(shift)[:, None]).clamp(min=0)
        }
    with torch.no_grad():
        logits = model(**data).logits
    gates = model.routing().gates
    alike(model(**data).logits.detach(), logits)  # with gradients it takes another way
    model.peft_config["default"].adapt = "always"
    assert not torch.allclose(model(**data).logits, logits)
    for row, (text, prompt) in enumerate(zip(texts(), PROMPTS, strict=True)):
        expected = reference.AfterPrompt(model, family, text[None, :prompt])
        own = logits[row, data["attention_mask"][row].bool()]
        alike(own[prompt - 1 :], expected.logits(text[None, prompt - 1 :]))
        alike(gates[row], torch.tensor(expected.gates))
        with model.disable_adapter():
            alike(own[: prompt - 1], model(input_ids=text[None, : prompt - 1]).logits[0].detach())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if "num_beams" not in mode], ids=str)
def test_writing_is_that_of_the_two_models(routed, prompts, family, mode):
    model = routed(family, top_k=2, **AFTER)
    written = model.generate(**prompts, **settings(**mode))[:, 8:].tolist()
    assert written == [reference.AfterPrompt(model, family, alone(prompts, row)).written(NEW) for row in range(4)]


def test_beams_are_those_of_each_prompt_alone(routed, prompts):
    model = routed("llama", top_k=2, **AFTER)
    beams = settings(num_beams=3)
    written = model.generate(**prompts, **beams)[:, 8:].tolist()
    for row in range(4):
        for more in ({}, {"use_cache": False}):
            ids = alone(prompts, row)
            assert model.generate(input_ids=ids, **beams, **more)[0, ids.shape[1] :].tolist() == written[row]


def test_keys_and_values_before_the_last_token_are_the_base_models(tenants, prompts):
    """To the last bit, so that a prefix cache can be shared; and those of the last token are the adapter's own."""
    ids = prompts["input_ids"][:1]
    with torch.no_grad():
        with tenants.disable_adapter():
            base = tenants(input_ids=ids, use_cache=True).past_key_values
        for adapter in ("default", "pooled", "second"):
            tenants.set_adapter(adapter)
            own = tenants(input_ids=ids, use_cache=True).past_key_values
            for mine, shared in zip(own.layers, base.layers, strict=True):
                for name in ("keys", "values"):
                    assert torch.equal(getattr(mine, name)[:, :, :-1], getattr(shared, name)[:, :, :-1])
            assert not torch.equal(own.layers[1].values[:, :, -1], base.layers[1].values[:, :, -1])


def test_it_starts_as_the_base_model(prompts):
    model = get_peft_model(routed_base("llama"), routed_config(**AFTER)).eval()
    with torch.no_grad():
        adapted = model(**prompts).logits
        with model.disable_adapter():
            assert torch.equal(adapted, model(**prompts).logits)


def test_a_row_without_a_prompt_has_its_first_token_for_one(routed):
    """Plain language modelling: nobody reads what it is used to predict."""
    model, data = routed("llama", **AFTER), padded(plain=True)
    with torch.no_grad():
        logits = model(**data).logits
        gates = model.routing().gates
        model(**data | {"input_ids": torch.cat([data["input_ids"][:, :1], data["input_ids"][:, 1:].flip(1)], dim=1)})
    assert torch.equal(model.routing().gates, gates)
    for row, text in enumerate(texts()):
        alike(logits[row, : len(text)], reference.AfterPrompt(model, "llama", text[None, :1]).logits(text[None]))


# ---- adapters of one batch ----


NAMES = ["second", "always", "default", "pooled"]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("names", [NAMES, ["default", "second", "__base__", "default"]], ids=["mixed", "all wait"])
def test_adapters_of_one_batch_are_each_alone(tenants, prompts, names, mode):
    beams = {name: value for name, value in mode.items() if name == "num_beams"}
    written = tenants.generate(**prompts, adapter_names=names, **settings(**mode))[:, 8:].tolist()
    for row, name in enumerate(names):
        ids = alone(prompts, row)
        expected = tenants.generate(input_ids=ids, adapter_names=[name], **settings(**beams))[0, ids.shape[1] :].tolist()
        assert written[row] == expected
        if name not in ("always", "__base__") and not beams:
            assert expected == reference.AfterPrompt(tenants, "llama", ids, name).written(NEW)


def test_adapters_of_one_batch_in_a_forward(tenants):
    """Scoring, right-padded: the places where they act differ from row to row."""
    data = padded()
    with torch.no_grad():
        together = tenants(**data, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            one = {key: value[row : row + 1, : LENGTHS[row]] for key, value in data.items()}
            alike(together[row, : LENGTHS[row]], tenants(**one, adapter_names=[name]).logits[0])


def test_two_active_adapters_that_act_at_other_places(tenants):
    data = padded()
    for names in (["default", "always"], ["default", "second"]):
        tenants.base_model.set_adapter(names)
        with torch.no_grad():
            logits = tenants(**data).logits
        alike(tenants(**data).logits.detach(), logits)
        with tenants.disable_adapter():
            base = tenants(**data).logits.detach()
        places = [torch.equal(logits[row, : prompt - 1], base[row, : prompt - 1]) for row, prompt in enumerate(PROMPTS)]
        assert all(places) == ("always" not in names)


# ---- prompts that come in parts ----


def test_tenants_share_a_prefix_that_the_base_model_has_read(tenants):
    """One row of the base model's cache for four tenants, of which each runs the last two tokens by itself."""
    ids = torch.randint(1, 60, (1, 9), generator=torch.Generator().manual_seed(4))
    names = ["second", "default", "second", "__base__"]
    with torch.no_grad():
        with tenants.disable_adapter():
            cache = tenants(input_ids=ids[:, :7], use_cache=True).past_key_values
        cache.batch_repeat_interleave(4)
        rest = ids[:, 7:].expand(4, -1)
        shared = tenants(input_ids=rest, past_key_values=copy.deepcopy(cache), adapter_names=names).logits[:, -1]
        alike(shared, tenants(input_ids=ids.expand(4, -1), adapter_names=names).logits[:, -1])
        together = {"input_ids": ids.expand(4, -1), "adapter_names": names}
        written = tenants.generate(**together, past_key_values=cache, **settings())
    assert written.tolist() == tenants.generate(**together, **settings()).tolist()
    assert written[1, 9:].tolist() == reference.AfterPrompt(tenants, "llama", ids).written(NEW)


@pytest.mark.parametrize("names", [None, ["second", "default", "__base__", "second"]], ids=["one", "several"])
@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_in_chunks(tenants, prompts, names, mode):
    expected = tenants.generate(**prompts, adapter_names=names, **settings())
    for chunk in (3, 7, 8):
        written = tenants.generate(**prompts, adapter_names=names, **settings(prefill_chunk_size=chunk, **mode))
        assert written.tolist() == expected.tolist()


def test_parts_of_a_prompt_without_a_mask(tenants):
    """A static cache gets a mask of its attention, in which the chunk's columns come after those of the chunks before."""
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(5))
    more = settings(prefill_chunk_size=3, cache_implementation="static")
    assert tenants.generate(input_ids=ids, **more).tolist() == tenants.generate(input_ids=ids, **settings()).tolist()


def test_an_emptied_cache_begins_anew(tenants):
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(6))
    expected = tenants.generate(input_ids=ids, **settings()).tolist()
    cache = StaticCache(tenants.config, max_cache_len=20)
    for more in ({}, {"prefill_chunk_size": 3}, {}):
        assert tenants.generate(input_ids=ids, past_key_values=cache, **settings(**more)).tolist() == expected
        cache.reset()


def test_what_reads_more_than_the_last_token_takes_no_parts(tenants, prompts):
    with pytest.raises(GatewiseError, match="cut into chunks of 3"):
        tenants.generate(**prompts, adapter_names=NAMES, **settings(prefill_chunk_size=3))
    ids = prompts["input_ids"][:1]
    with torch.no_grad():
        with tenants.disable_adapter():
            cache = tenants(input_ids=ids[:, :5], use_cache=True).past_key_values
        tenants.set_adapter("pooled")
        with pytest.raises(GatewiseError, match="that no routed adapter read"):
            tenants(input_ids=ids[:, 5:], past_key_values=cache)
        tenants.set_adapter("default")
        own = tenants(input_ids=ids, use_cache=True).past_key_values
        lost = pickle.loads(pickle.dumps(own))
        with pytest.raises(GatewiseError, match="that no routed adapter read"):  # not taken for the base model's
            tenants(input_ids=ids, past_key_values=lost)
        tenants.set_adapter("second")
        with pytest.raises(GatewiseError, match="filled with adapter 'default', but 'second' is in use"):
            tenants(input_ids=ids, past_key_values=own)


# ---- training ----


def trained_on(data: dict[str, Any], checkpointing: bool | None, **more: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(routed_base("llama"), routed_config(balance_weight=0.5, **AFTER, **more))
    trained_routers(random_adapter(model)).train()
    for name, buffer in model.named_buffers():
        if name.endswith("observed"):
            buffer.fill_(60)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    loss = model(**data).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("how", ["checkpointed", "checkpointed again", "packed", "packed, checkpointed", "padded more"])
def test_training_is_the_same_in_all_shapes(plain, how):
    """Loss, every gradient, and what the routers have learnt of what prompts have in common."""
    data: dict[str, Any] = padded(plain)
    expected = trained_on(data, None)
    if how == "padded more":
        data = {name: torch.nn.functional.pad(value, (2, 3), value=-100 if name == "labels" else 0) for name, value in data.items()}
        data["position_ids"] = (torch.arange(14) - 2).clamp(min=0).expand(4, -1)
        data["labels"][:, 2] = -100  # of the first token, which padding would predict now
    found = trained_on(
        packed(plain) if how.startswith("packed") else data,
        {"checkpointed": False, "checkpointed again": True, "packed, checkpointed": False}.get(how),
    )
    for name, value in expected.items():
        alike(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_those_of_the_answer_alone():
    """By differences of the loss, a number of every kind of weight."""
    torch.manual_seed(0)
    model = get_peft_model(routed_base("gpt2"), routed_config("gpt2", balance_weight=0.0, normalize_gates=False, **AFTER))
    trained_routers(random_adapter(model)).double().eval()
    data = padded()
    labels = data.pop("labels")[:, 1:]

    def loss() -> torch.Tensor:
        with model.prompt_positions(torch.arange(9) < torch.tensor(PROMPTS)[:, None]):
            return torch.nn.functional.cross_entropy(model(**data).logits[:, :-1].transpose(1, 2), labels)

    loss().backward()
    for name in ("c_attn.lora_A.default.weight", "c_proj.lora_B.default.weight", "c_attn.prompt_router.default.weight"):
        parameter = model.get_parameter(f"base_model.model.transformer.h.0.attn.{name}")
        at = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):
                parameter[at] += step
                values.append(float(loss()))
        assert float(parameter.grad[at]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


def test_packed_texts_are_each_alone(routed):
    model = routed("llama", **AFTER)
    with torch.no_grad():
        logits = model(**packed()).logits[0].split(LENGTHS)
        wide = model(**packed(rows=2)).logits.flatten(0, 1)
    for row, (text, prompt) in enumerate(zip(texts(), PROMPTS, strict=True)):
        expected = reference.AfterPrompt(model, "llama", text[None, :prompt]).logits(text[None, prompt - 1 :])
        alike(logits[row][prompt - 1 :], expected)
        start = sum(LENGTHS[:row])
        alike(wide[start + prompt - 1 : start + len(text)], expected)


# ---- around it ----


def test_it_is_saved_and_measured(routed, tmp_path):
    model, data = routed("llama", **LAST), padded()
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = PeftModel.from_pretrained(reference.plain_copy(model), str(tmp_path)).eval()
    assert again.peft_config["default"].adapt == "after_prompt"
    with torch.no_grad():
        assert torch.equal(again(**data).logits, model(**data).logits)
        sums, counts = row_losses(again, data)
        alike(sums.sum() / counts.sum(), model(**data).loss)


def test_hooks_see_what_the_base_module_made(routed, prompts):
    model, seen = routed("llama", **AFTER), []
    module = model.get_base_model().model.layers[0].mlp.gate_proj
    with torch.no_grad():
        expected = model(**prompts).logits
        module.base_layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
        alike(model(**prompts).logits, expected)
        x, output = seen[0]
        assert torch.equal(output, torch.nn.functional.linear(x, module.base_layer.weight))


def test_a_model_that_flattens_batch_and_tokens():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    base = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0))
    model = trained_routers(random_adapter(get_peft_model(base, routed_config(**AFTER)))).eval()
    data = padded()
    with torch.no_grad():
        logits = model(**data).logits
        with model.disable_adapter():
            plain = model(**data).logits
    alike(model(**data).logits.detach(), logits)
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        assert torch.equal(logits[row, : prompt - 1], plain[row, : prompt - 1])
        assert not torch.allclose(logits[row, prompt - 1 : length], plain[row, prompt - 1 : length])
    one = {"input_ids": data["input_ids"][:1, :2]}
    written = model.generate(**one, **settings())
    assert written.tolist() == model.generate(**one, **settings(use_cache=False)).tolist()


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "classifier", "backbone"])
def test_models_in_which_nothing_comes_after_a_prompt(family):
    base = routed_base("llama" if family in ("classifier", "backbone") else family)
    if family == "classifier":
        base = LlamaForSequenceClassification(base.config)
    elif family == "backbone":
        base = AutoModel.from_config(base.config)
    why = "an encoder reads the prompt there" if family in ("t5", "bart") else "nothing comes after the text that it reads"
    with pytest.raises(GatewiseError, match=rf"adapt is 'after_prompt', but .* is no decoder .* \({why}\): take adapt='always'"):
        get_peft_model(base, routed_config(family, task_type=None, **AFTER))
    get_peft_model(base, routed_config(family, task_type=None))


def test_a_setting_that_is_none():
    with pytest.raises(GatewiseError, match="adapt is 'sometimes': expected one of always, after_prompt"):
        routed_config(adapt="sometimes")
