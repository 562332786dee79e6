"""Generation with a cache against plain models that each prompt's decision amounts to, run without any cache."""

import copy
from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import MODES, routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from transformers import StaticCache

from gatewise.errors import GatewiseError

NEW = 6
FAMILIES = ["llama", "gpt2"]


@pytest.fixture
def prompts():
    """Left-padded prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (4, 8), generator=generator)
    mask = (torch.arange(8) >= torch.tensor([0, 2, 5, 1])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}


def expected_rows(model, family, prompts, adapters=None, **more):
    """What each prompt's own plain model writes, alone, without padding and without a cache."""
    rows = []
    for row, mask in enumerate(prompts["attention_mask"].bool()):
        ids = prompts["input_ids"][row][mask][None]
        adapter = adapters[row] if adapters else "default"
        plain = reference.plain_copy(model) if adapter == "__base__" else reference.merged(model, family, ids, adapter)[0]
        rows.append(plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings(use_cache=False, **more)))
    return [row[:, -NEW:].tolist() for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mode", [*MODES, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_generation_is_that_of_the_prompts_decision(routed, prompts, family, k, mode):
    model = routed(family, top_k=k)
    one_row_only = "prompt_lookup_num_tokens" in mode
    if one_row_only:
        prompts = {name: value[:1] for name, value in prompts.items()}
    beams = {name: value for name, value in mode.items() if name in ("num_beams", "num_return_sequences")}
    written = model.generate(**prompts, **settings(**mode))[:, 8:]
    expected = [row for rows in expected_rows(model, family, prompts, **beams) for row in rows]
    assert written.tolist() == expected
    # The rows of the routing are those that ran, beams and all; each prompt's are alike.
    gates = model.routing().gates
    each = gates.view(len(prompts["input_ids"]), -1, *gates.shape[1:])
    torch.testing.assert_close(each, each[:, :1].expand_as(each))


def test_embeddings_as_prompts(routed, prompts):
    model = routed("llama")
    written = model.generate(
        inputs_embeds=model.get_input_embeddings()(prompts["input_ids"]), attention_mask=prompts["attention_mask"], **settings()
    )
    assert written[:, -NEW:].tolist() == [rows[0] for rows in expected_rows(model, "llama", prompts)]


def test_the_decision_is_the_prompts_and_stays(routed, prompts):
    """Also where a new decision from prompt and answer would be another one; otherwise these tests could not fail."""
    model = routed("llama", top_k=1)
    written = model.generate(**prompts, **settings())
    gates = model.routing().gates
    mask = torch.cat([prompts["attention_mask"], torch.ones(4, NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(input_ids=written, attention_mask=mask)
        assert not torch.equal(model.routing().gates > 0, gates > 0)
        with model.prompt_positions(prompts["attention_mask"]):
            model(input_ids=written, attention_mask=mask)
        torch.testing.assert_close(model.routing().gates, gates)


def decode(model, prompts, steps=NEW, **call):
    """A loop of one's own: greedy, with a cache. What has been written so far, step by step."""
    mask = prompts["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids, cache, written = prompts["input_ids"], None, []
    for _ in range(steps):
        with torch.no_grad():  # not around the yield, which would leave it to others
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **call)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions[:, -1:] + 1
        written.append(ids)
        yield torch.cat(written, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_with_a_cache(routed, prompts, family):
    model = routed(family)
    *_, written = decode(model, prompts)
    assert written.tolist() == [rows[0] for rows in expected_rows(model, family, prompts)]


def test_a_copied_cache_goes_on_with_its_prompt(routed, prompts):
    model = routed("llama")
    ids = prompts["input_ids"][:1]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        gates = model.routing().gates
        model(input_ids=ids.flip(1))  # another request in between
        longer = torch.cat([ids, ids[:, :3]], dim=1)
        one = model(input_ids=longer[:, 8:], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(model.routing().gates, gates)
        plain, _, _ = reference.merged(model, "llama", ids)
        torch.testing.assert_close(one, plain(input_ids=longer).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_the_base_models_own_generate(routed, prompts):
    """Called around PEFT, as some trainers do."""
    model = routed("llama")
    written = model.get_base_model().generate(**prompts, **settings())[:, 8:]
    assert written.tolist() == [rows[0] for rows in expected_rows(model, "llama", prompts)]


@pytest.mark.parametrize("mode", [{}, {"use_cache": False}], ids=str)
def test_a_peft_model_without_a_task(prompts, mode):
    """Its ``generate`` takes another way to the base model."""
    model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config(task_type=None)))).eval()
    written = model.generate(**prompts, **settings(**mode))[:, 8:]
    assert written.tolist() == [rows[0] for rows in expected_rows(model, "llama", prompts)]


# ---- adapters of one batch ----


@pytest.fixture
def three(routed):
    """Adapters that differ in rank, number of experts, pooler and targets; and the base model."""
    model = routed("llama")
    model.add_adapter("narrow", routed_config(r=2, top_k=1, pooler="mean", activation="gelu"))
    model.add_adapter("partial", routed_config(r=5, top_k=2, pooler="last", target_modules=["v_proj", "o_proj", "up_proj"]))
    return trained_routers(random_adapter(model)).eval()


NAMES = ["narrow", "__base__", "default", "partial"]


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_adapters_of_one_batch_are_each_alone(three, prompts, mode):
    beams = {name: value for name, value in mode.items() if name == "num_beams"}
    written = three.generate(**prompts, adapter_names=NAMES, **settings(**mode))[:, 8:]
    expected = expected_rows(three, "llama", prompts, adapters=NAMES, **beams)
    assert written.tolist() == [row for rows in expected for row in rows]


def test_adapters_of_one_batch_in_a_forward(three, prompts):
    names = ["partial", "narrow", "partial", "__base__"]
    with torch.no_grad():
        together = three(**prompts, adapter_names=names).logits
        gates = three.routing().gates
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in prompts.items()}
            real = one["attention_mask"][0].bool()
            if name == "__base__":
                with three.disable_adapter():
                    alone = three(**one).logits
            else:
                three.set_adapter(name)
                alone = three(**one).logits
            torch.testing.assert_close(together[row][real], alone[0][real], rtol=1e-4, atol=1e-4)
    assert gates.shape == (4, 2, 7)
    assert [int(n) for n in (gates > 0).sum(dim=-1)[:, 0]] == [2, 1, 2, 0]


def test_adapters_of_one_batch_in_a_loop_with_a_cache(three, prompts):
    *_, written = decode(three, prompts, adapter_names=NAMES)
    assert written.tolist() == [rows[0] for rows in expected_rows(three, "llama", prompts, adapters=NAMES)]


def test_two_active_adapters_add_up(three, prompts):
    """PEFT allows it on the tuner: each is routed by its own routers."""
    three.base_model.set_adapter(["default", "narrow"])
    block = three.base_model.model.model.layers[0]
    layer, seen = block.self_attn.q_proj, {}
    block.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0]))
    layer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        three(**prompts)
        for row, mask in enumerate(prompts["attention_mask"].bool()):
            expected = layer.base_layer(seen["x"][row])
            for name in ("default", "narrow"):
                config, router = three.peft_config[name], layer.prompt_router[name]
                hidden = seen["hidden"][row][mask].double().tolist()
                p = reference.probabilities(hidden, router, config.pooler, config.activation, config.normalize_states)
                gate = reference.gates(p, config.top_k, config.normalize_gates)[0]
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                expected = expected + gate * layer.scaling[name] * seen["x"][row] @ a.T @ b.T
            torch.testing.assert_close(seen["out"][row], expected, rtol=1e-4, atol=1e-5)


# ---- refusals ----


def test_names_that_do_not_fit(three, prompts):
    with pytest.raises(GatewiseError, match="has 'other'; the model has 'default'"):
        three(**prompts, adapter_names=["other"] * 4)
    for number in (1, 2, 3, 8):  # not spread over the rows where their number divides it
        with pytest.raises(GatewiseError, match=f"{number} names for a batch of 4 rows: give one name a row"):
            three(**prompts, adapter_names=["default"] * number)
        with pytest.raises(GatewiseError, match=f"{number} names for a batch of 4 rows"):
            three.generate(**prompts, adapter_names=["default"] * number, num_beams=2, max_new_tokens=2)
    with pytest.raises(GatewiseError, match="training mode"):
        three.train()(**prompts, adapter_names=["default"] * 4)


def test_caches_that_do_not_fit(three, prompts):
    with torch.no_grad():
        with three.disable_adapter():
            unrouted = three(**prompts, use_cache=True).past_key_values
        step = {"input_ids": torch.ones(4, 1, dtype=torch.long)}
        with pytest.raises(GatewiseError, match="no routed adapter read"):
            three(**step, past_key_values=unrouted)
        cache = three(**prompts, use_cache=True).past_key_values
        with pytest.raises(GatewiseError, match="belongs to 4 prompts, but the batch has 2 rows"):
            three(input_ids=step["input_ids"][:2], past_key_values=cache)
        three.set_adapter("narrow")
        with pytest.raises(GatewiseError, match="filled with adapter 'default', but 'narrow' is in use"):
            three(**step, past_key_values=cache)
        other = copy.deepcopy(three)
        other.set_adapter("default")
        with pytest.raises(GatewiseError, match="no routed adapter read"):
            other(**step, past_key_values=cache)


def test_caches_of_other_kinds(routed, prompts):
    with pytest.raises(GatewiseError, match="past_key_values is a tuple: expected a Cache of Transformers"):
        routed("llama").get_base_model().model(input_ids=prompts["input_ids"], past_key_values=((torch.zeros(1),) * 2,))


def test_an_empty_static_cache_starts_a_request(routed, prompts):
    model, ids = routed("llama"), prompts["input_ids"][:1]
    cache = StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids, past_key_values=cache).logits, plain, rtol=1e-4, atol=1e-4)


def test_ways_of_writing_that_are_refused(routed, prompts):
    model, ids, padded = routed("llama"), prompts["input_ids"][:1], prompts["input_ids"][1:2]
    assert model.generate(ids, **settings()).tolist() == model.generate(inputs=ids, **settings(use_cache=False)).tolist()
    for call, message in (
        (
            lambda: model.generate(ids, **settings(guidance_scale=1.5, negative_prompt_ids=ids)),
            "guidance_scale is 1.5, but routers",
        ),
        (lambda: model.generate(padded, **settings(cache_implementation="static")), r"attention_mask is not of shape \(b, t\)"),
        (lambda: model.generate(ids, **settings(prefill_chunk_size=3)), "was cut into chunks of 3"),
        (lambda: model.generate_batch([ids[0].tolist()]), "generate_batch packs many texts into a row, but routed adapters"),
    ):
        with pytest.raises(GatewiseError, match=message):
            call()
    model.generation_config.guidance_scale = 1.5
    with pytest.raises(GatewiseError, match=r"guidance_scale is 1\.5, but routers"):
        model.generate(ids, **settings(negative_prompt_ids=ids))
