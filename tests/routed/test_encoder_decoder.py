"""T5 and BART: the encoder's layers routed by the prompt that runs through them, the decoder's by what the encoder makes of it.

Against plain models that each prompt's decision amounts to, a prompt at a time, without padding and without a cache.
"""

from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import get_peft_model
from routed_models import ENCODER_DECODERS, MODES, routed_base, routed_config, trained_routers
from tiny_models import random_adapter, word_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from gatewise.bilevel import BilevelMixin
from gatewise.errors import GatewiseError
from gatewise.inspection.routing import routing_of_rows
from gatewise.inspection.text import routing_lines
from gatewise.losses import row_losses
from gatewise.routed import ACTIVATION_PARAMETERS, RoutingLog

NEW = 5
LENGTHS = torch.tensor([7, 4, 6])
families = pytest.mark.parametrize("family", ENCODER_DECODERS)


def prompts(left: bool = False) -> dict[str, torch.Tensor]:
    """Three prompts of different lengths."""
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(4))
    there = torch.arange(7) < LENGTHS[:, None]
    there = there.flip(1) if left else there
    return {"input_ids": torch.where(there, ids, 0), "attention_mask": there.long()}


def answers() -> torch.Tensor:
    return torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(5))


def alone(data: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    return data["input_ids"][row][data["attention_mask"][row].bool()][None]


def references(model: Any, family: str, data: dict[str, torch.Tensor], adapters: list[str] | None = None) -> list[Any]:
    """(plain model, gates, probabilities) of each row."""
    names = adapters or ["default"] * 3
    return [reference.merged_encoder_decoder(model, family, alone(data, row), names[row]) for row in range(3)]


def as_tensor(gates: list[list[float]]) -> torch.Tensor:
    """(l, m), zero where a layer has fewer experts than another."""
    most = max(map(len, gates))
    return torch.tensor([[*row, *[0.0] * (most - len(row))] for row in gates])


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **more}


# BART counts positions from the first column, padding or not.
@pytest.mark.parametrize(("family", "left"), [("t5", False), ("t5", True), ("bart", False)])
@pytest.mark.parametrize("more", [{}, {"top_k": 1, "pooler": "max"}, {"pooler": "last", "activation": "gelu"}], ids=str)
def test_both_stacks_are_routed_by_the_formula(routed, family, left, more):
    model, data, written = routed(family, **more), prompts(left), answers()
    with torch.no_grad():
        together = model(**data, decoder_input_ids=written).logits
    routing = model.routing()
    assert [len(names) for names in routing.modules] == ([7, 7, 11, 11] if family == "t5" else [6, 6, 10, 10])
    assert routing.layers == tuple(f"{stack}.{index}" for stack in reference.STACKS[family] for index in range(2))
    for row, (plain, gates, _) in enumerate(references(model, family, data)):
        same(routing.gates[row], as_tensor(gates))
        same(together[row], plain(input_ids=alone(data, row), decoder_input_ids=written[row : row + 1]).logits[0])
    kept = routing.gates > 0
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[:, 2], kept[:, 3])  # each of the decoder's layers for itself


@families
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_generation_is_that_of_the_prompts_decision(routed, family, mode):
    model, data = routed(family), prompts()
    written = model.generate(**data, **settings(**mode))
    beams = {name: value for name, value in mode.items() if name.startswith("num")}
    times = len(written) // 3
    for row, (plain, gates, _) in enumerate(references(model, family, data)):
        expected = plain.generate(alone(data, row), **settings(use_cache=False, **beams))
        assert written[row * times : (row + 1) * times].tolist() == expected.tolist()
        each = mode.get("num_beams", 1)
        same(model.routing().gates[row * each : (row + 1) * each], as_tensor(gates).expand(each, -1, -1))


@families
def test_the_encoder_by_itself_first(routed, family):
    """Its output given to the model, repeated, or to the decoder alone; the decision is that of one call."""
    model, data, written = routed(family), prompts(), answers()
    mask, base = data["attention_mask"], model.get_base_model()
    with torch.no_grad():
        expected = model(**data, decoder_input_ids=written).logits
        gates = model.routing().gates
        encoded = base.get_encoder()(**data)
        same(model.routing().gates, gates[:, :2, : model.routing().gates.shape[-1]])
        for given in (encoded, (encoded.last_hidden_state,)):
            same(model(encoder_outputs=given, attention_mask=mask, decoder_input_ids=written).logits, expected)
            same(model.routing().gates, gates)
        repeated = (encoded.last_hidden_state.repeat_interleave(2, dim=0),)
        doubled = {"attention_mask": mask.repeat_interleave(2, dim=0), "decoder_input_ids": written.repeat_interleave(2, dim=0)}
        same(model(encoder_outputs=repeated, **doubled).logits[::2], expected)
        same(model.routing().gates[::2], gates[:, 2:])  # whose encoder's that is nobody has said
        states = {"encoder_hidden_states": encoded.last_hidden_state, "encoder_attention_mask": mask}
        same(
            base.get_decoder()(input_ids=written, **states)[0],
            model(**data, decoder_input_ids=written, output_hidden_states=True).decoder_hidden_states[-1],
        )
        beams = model.generate(**data, **settings(num_beams=2))
        assert (
            model.generate(encoder_outputs=base.get_encoder()(**data), attention_mask=mask, **settings(num_beams=2)).tolist()
            == beams.tolist()
        )
        with pytest.raises(GatewiseError, match="without the encoder's hidden states, by which it is routed: call the whole model"):
            base.get_decoder()(input_ids=written)


@families
def test_adapters_of_one_batch_are_each_alone(routed, family):
    model, data, written = routed(family), prompts(), answers()
    model.add_adapter(
        "narrow",
        routed_config(family, r=2, top_k=1, pooler="mean", target_modules=["q", "v"] if family == "t5" else ["q_proj", "fc1"]),
    )
    trained_routers(random_adapter(model)).eval()
    names = ["narrow", "__base__", "default"]
    expected = references(model, family, data, ["narrow", "default", "default"])
    expected[1] = (reference.plain_copy(model), None, None)
    with torch.no_grad():
        together = model(**data, decoder_input_ids=written, adapter_names=names).logits
        gates = model.routing().gates
    for mode in ({}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}):
        rows = model.generate(**data, adapter_names=names, **settings(**mode))
        for row, (plain, _, _) in enumerate(expected):
            beams = mode.get("num_beams", 1)
            assert rows[row].tolist() == plain.generate(alone(data, row), **settings(num_beams=beams))[0].tolist()
        same(model.routing().gates[::beams], gates)
    for row, (plain, _, _) in enumerate(expected):
        same(together[row], plain(input_ids=alone(data, row), decoder_input_ids=written[row : row + 1]).logits[0])
    assert [int(n) for n in (gates > 0).sum(dim=(1, 2))] == [4, 0, 12]


@families
def test_the_balance_loss_is_that_of_both_stacks(routed, family):
    model, data = routed(family, balance_weight=0.5), prompts()
    labels = answers().index_fill_(1, torch.tensor([7, 8]), -100)
    rows = [p for _, _, p in references(model, family, data)]
    expected = 0.5 * sum(reference.balance([row[layer] for row in rows]) for layer in range(4)) / 4
    bare = model(**data, labels=labels).loss.detach()
    model.train()
    for items in ({}, {"num_items_in_batch": torch.tensor(84)}):  # these models' loss is the batch's mean all the same
        assert float(model(**data, labels=labels, **items).loss.detach() - bare) == pytest.approx(expected, rel=1e-3)
        assert float(model.balance_loss().detach()) == pytest.approx(expected, rel=1e-3)
    encoded = model.get_base_model().get_encoder()(**data)
    loss = model(encoder_outputs=encoded, attention_mask=data["attention_mask"], labels=labels).loss
    assert float(loss.detach() - bare) == pytest.approx(expected, rel=1e-3)
    statistics = model.routing_statistics()
    assert statistics.balance_loss == pytest.approx(2 * expected, rel=1e-3)
    assert len(statistics.share) == 4
    assert all(sum(row.values()) == pytest.approx(3) for row in statistics.share.values())
    loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for name, p in model.named_parameters() if "prompt_router" in name)
    sums, counts = row_losses(model, {**data, "labels": labels})
    same((sums.sum() / counts.sum()).detach(), bare)


def rows(count: int) -> list[dict[str, Any]]:
    """Texts whose answers are longer than they are: the first word, over and over."""
    ids = torch.randint(3, 20, (count, 4), generator=torch.Generator().manual_seed(6)).tolist()
    return [{"input_ids": one[: 2 + index % 3], "labels": [one[0]] * 6} for index, one in enumerate(ids)]


class Bilevel(BilevelMixin, Seq2SeqTrainer):
    """With the rationals' coefficients on rows of their own."""


@families
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_trained_by_seq2seq_trainer(tmp_path, family, checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(routed_base(family), routed_config(family))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=24,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        predict_with_generate=True,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(checkpointing)},
    )
    data = rows(32)
    upper = (
        {"upper_dataset": data[:8], "upper_parameters": ACTIVATION_PARAMETERS, "upper_learning_rate": 1e-3}
        if checkpointing is None
        else {}
    )
    trainer = (Bilevel if upper else Seq2SeqTrainer)(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=DataCollatorForSeq2Seq(word_tokenizer(), model=model),
        **upper,
    )
    RoutingLog.attach(trainer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "prompt_router" in name}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["loss"] for entry in logs[-4:]) < 0.8 * sum(entry["loss"] for entry in logs[:4])
    assert 1 <= logs[0]["routing/balance_loss"] < 10
    assert sum(name.startswith("routing/share/") for name in logs[0]) == (36 if family == "t5" else 32)
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert all(float(buffer) == 64 for name, buffer in model.named_buffers() if name.endswith("observed"))
    assert len(trainer.predict(data[:4]).predictions) == 4
    found = routing_of_rows(model, word_tokenizer(), data, batch_size=8)
    assert len(found.modules) == (36 if family == "t5" else 32)
    assert sum(one.share for one in found.modules) == pytest.approx(4 * 3)
    assert f"kept: 3 of {9 if family == 't5' else 8} modules a layer" in routing_lines(found)[2]


def test_models_whose_encoder_reads_no_text_are_refused():
    sizes = {"vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **heads, **ids, num_mel_bins=4, max_source_positions=10))
    with pytest.raises(
        GatewiseError, match="WhisperForConditionalGeneration is an encoder-decoder model whose encoder reads no text"
    ):
        get_peft_model(model, routed_config())
