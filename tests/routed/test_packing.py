"""Rows that hold several texts, as TRL's packing and padding-free batches make them: each text is as it would be alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
)

from gatewise.errors import GatewiseError
from gatewise.internals import call_tracking
from gatewise.losses import row_losses
from gatewise.routed.request import Share

LENGTHS, PROMPTS = [5, 9, 3, 7], [2, 4, 2, 5]


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 60, (length,), generator=generator) for length in LENGTHS]


def padded(plain: bool = False) -> dict[str, torch.Tensor]:
    """A text a row; plain language modelling, or prompts with answers."""
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    there = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    answers = there if plain else there & (torch.arange(ids.shape[1]) >= torch.tensor(PROMPTS)[:, None])
    return {"input_ids": ids, "attention_mask": there.long(), "labels": torch.where(answers, ids, -100)}


def packed(plain: bool = False, rows: int = 1) -> dict[str, Any]:
    """The same texts in one row or, two and two, in rows of 14 and 10 tokens, the second filled up with a text of four."""
    data = padded(plain)
    labels = [row[:length].index_fill(0, torch.tensor(0), -100) for row, length in zip(data["labels"], LENGTHS, strict=True)]
    parts = {"input_ids": texts(), "labels": labels, "position_ids": [torch.arange(length) for length in LENGTHS]}
    if rows == 2:
        for name, filler in (("input_ids", 3), ("labels", -100), ("position_ids", 0)):
            parts[name].append(torch.arange(4) if name == "position_ids" else torch.full((4,), filler))
    made = {name: torch.cat(one).view(rows, -1) for name, one in parts.items()}
    return made | {"use_cache": False}


def alike(one: Any, other: Any, **more: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, **more)


def with_attention(model: Any, implementation: str) -> Any:
    model.get_base_model().set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"top_k": 1, "pooler": "last"}, {"pooler": "max"}], ids=str)
def test_each_text_is_as_it_would_be_alone(routed, family, implementation, more):
    model = with_attention(routed(family, **more), implementation)
    with torch.no_grad():
        logits = model(**packed()).logits[0].split(LENGTHS)
    routing = model.routing()
    assert len(routing.gates) == 4
    assert not torch.equal(routing.gates[0] > 0, routing.gates[1] > 0)
    for row, (text, length) in enumerate(zip(texts(), PROMPTS, strict=True)):
        plain, gates, _ = reference.merged(model, family, text[None, :length])
        alike(routing.gates[row], torch.tensor(gates))
        alike(logits[row], plain(input_ids=text[None]).logits[0])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_training_is_that_of_a_text_a_row(plain, checkpointing):
    """Loss, gradients, and what the routers have learnt of what prompts have in common."""
    found = []
    for data in (padded(plain), packed(plain)):
        torch.manual_seed(0)
        model = trained_routers(random_adapter(get_peft_model(routed_base("llama"), routed_config(balance_weight=0.5))))
        for name, buffer in model.named_buffers():
            if name.endswith("observed"):
                buffer.fill_(60)
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        loss = model(**data).loss
        loss.backward()
        named = [*((name, p.grad) for name, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]
        found.append(
            {"loss": loss.detach(), "balance": model.balance_loss().detach(), "gates": model.routing().gates, **dict(named)}
        )
    for name, value in found[0].items():
        alike(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert float(found[0]["base_model.model.model.layers.0.self_attn.q_proj.prompt_router.default.observed"]) == 64


def test_rows_of_several_texts_each(routed):
    model = routed("llama")
    with torch.no_grad():
        model(**padded())
        gates = model.routing().gates
        data = packed(rows=2)
        logits = model(**data).logits.flatten(0, 1)
        alike(model.routing().gates[:4], gates)
        assert len(model.routing().gates) == 5
        alike(logits[: sum(LENGTHS)], model(**packed()).logits[0])
        sums, counts = row_losses(model, data)
        alike(sums.sum() / counts.sum(), model(**data).loss)
        alike(model.routing().gates[:4], gates)


def test_where_texts_and_prompts_lie_may_be_told(routed):
    model, data = routed("llama"), packed()
    with torch.no_grad():
        expected = model(**data).logits
        gates = model.routing().gates
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        alike(model(**data, cu_seq_lens_q=ends).logits, expected)
        one = data["input_ids"][:, :5]
        alike(model(input_ids=one, cu_seq_lens_q=torch.tensor([0, 5])).logits, model(input_ids=one).logits)
        there = torch.cat([torch.arange(length) < prompt for length, prompt in zip(LENGTHS, PROMPTS, strict=True)])[None]
        del data["labels"]
        with model.prompt_positions(there):
            alike(model(**data).logits, expected)
        alike(model.routing().gates, gates)
        model(**data)  # all of every text
        assert not torch.allclose(model.routing().gates, gates)


def test_layers_with_masks_of_their_own():
    """Gemma 3: a sliding window in one layer, all of the text in the other."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3TextConfig(
        **sizes, num_key_value_heads=1, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    )
    model = trained_routers(random_adapter(get_peft_model(Gemma3ForCausalLM(config), routed_config()))).eval()
    with torch.no_grad():
        logits = model(**packed()).logits[0].split(LENGTHS)
        apart = model(**padded()).logits
    for one, row, length in zip(logits, apart, LENGTHS, strict=True):
        alike(one, row[:length])


def by_positions(_: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, position_ids: torch.Tensor, **__: Any) -> Any:
    """Attention that gets no mask and keeps texts apart itself, as the kernels of flash attention do for one row."""
    assert mask is None
    lengths = (position_ids[0] == 0).nonzero().flatten().diff(append=torch.tensor([position_ids.shape[1]])).tolist()
    parts = zip(*(one.split(lengths, dim=2) for one in (q, k, v)), strict=True)
    made = [torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scaling, enable_gqa=True) for one in parts]
    return torch.cat(made, dim=2).transpose(1, 2), None


def test_a_kernel_that_keeps_texts_apart_itself(routed, monkeypatch):
    """In the place of flash attention, which needs a GPU."""
    model = routed("llama")
    with torch.no_grad():
        expected = model(**packed()).logits
        AttentionInterface.register("by_positions", by_positions)
        monkeypatch.setattr(call_tracking, "attention_implementation", lambda _: "flash_attention_2")
        alike(with_attention(model, "by_positions")(**packed()).logits, expected)
        with pytest.raises(GatewiseError, match="or in flash attention of one row"):
            model(**packed(rows=2))


def test_a_module_that_sees_batch_and_tokens_as_one(routed):
    module = routed("llama").get_base_model().model.layers[0].mlp.up_proj
    x, gate = torch.randn(2, 5, 16), torch.rand(2, 5)
    plain = module.base_layer(x)
    share = (Share("default", None, gate),)
    running = SimpleNamespace(batch=2, tokens=5, adapted={})
    wide = module.add_shares(x, plain, share, running)
    alike(module.add_shares(x.flatten(0, 1), plain.flatten(0, 1), share, running), wide.flatten(0, 1))
    delta = module.scaling["default"] * (x @ module.lora_A["default"].weight.T @ module.lora_B["default"].weight.T)
    alike(wide, plain + gate[..., None] * delta)


def test_what_does_not_keep_texts_apart_is_refused(routed):
    model, data = routed("llama"), packed()
    refusal = r"a row holds several packed samples, but the model's attention does not keep them apart.*: give use_cache=False, or"
    with pytest.raises(GatewiseError, match=refusal):
        model(**{**data, "use_cache": True})
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
    blind = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=16))  # to position_ids, in its masks
    other = get_peft_model(blind, routed_config())
    for implementation in ("sdpa", "eager"):
        with pytest.raises(GatewiseError, match=refusal):
            with_attention(other, implementation)(**data)
    model.add_adapter("two", routed_config())
    with pytest.raises(GatewiseError, match="adapter_names was given for rows that hold several packed samples: give each text"):
        model(**data, adapter_names=["two"])
    encoder = routed("bert")
    with pytest.raises(GatewiseError, match="several packed samples, but routed adapters read one text a row"):
        encoder(input_ids=data["input_ids"], position_ids=data["position_ids"])
