"""Prompts in the encoder of a model whose decoder writes: forwards, generation, training and searches."""

from types import SimpleNamespace
from typing import Any

import prompt_reference as reference
import pytest
import torch
from accelerate.state import AcceleratorState
from prompted_models import ENCODER_DECODERS, arguments, hyper, prompt_config, prompted
from test_forward import padded
from tiny_models import word_tokenizer
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from gatewise import WholeAdapter, prompts
from gatewise.losses import row_losses
from gatewise.prompts.darts import SearchMixin, SearchTrainer

WRITTEN = torch.tensor([[2, 7, 8, 9, 10], [2, 11, 12, 13, 14], [2, 5, 5, 6, 6], [2, 30, 31, 32, 33]])
"""What the decoder reads of four texts."""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_prompts_concatenated_by_hand(texts: list[Tensor], family: str, layers: Any, attention: str) -> None:
    """The decoder reads the encoder's text alone. Only T5's positions are no matter of the column."""
    model = prompted(family, attention, prompt_layers=layers, tau=0.7)
    base = reference.plain_copy(model)
    with torch.no_grad():
        expected = torch.stack([reference.decoded(base, model, *pair) for pair in zip(texts, WRITTEN, strict=True)])
        for side in ("right", "left") if family in ("t5", "mt5") else ("right",):
            got = model(**padded(texts, side), decoder_input_ids=WRITTEN).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        alone = model(input_ids=texts[0][None], decoder_input_ids=WRITTEN[:1]).logits
        torch.testing.assert_close(alone, expected[:1], rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            plain = model(input_ids=texts[0][None], decoder_input_ids=WRITTEN[:1]).logits
        assert (plain - alone).abs().max() > 1e-3


def test_biases_that_are_all_larger_change_nothing(texts: list[Tensor]) -> None:
    """Attention sees the differences of a head's biases, with prompts as without."""
    model = prompted("t5")
    given = {**padded(texts, "left"), "decoder_input_ids": WRITTEN}
    with torch.no_grad():
        wanted = model(**given).logits
        table = next(p for name, p in model.named_parameters() if "encoder.block.0" in name and "relative_attention_bias" in name)
        table += torch.tensor([3.0, -2.0, 1.0, 5.0])
        torch.testing.assert_close(model(**given).logits, wanted, rtol=1e-4, atol=1e-4)


def settings(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None, **more}


def by_hand(model: Any, text: Tensor, new: int = 4, **more: Any) -> list[int]:
    """Greedy, everything computed anew for every token; the prompt comes from the text whatever has been written."""
    base, row = reference.plain_copy(model), torch.tensor([model.config.decoder_start_token_id])
    with torch.no_grad():
        for _ in range(new):
            row = torch.cat([row, reference.decoded(base, model, text, row, **more)[-1:].argmax(-1)])
    return row[1:].tolist()


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_generation(texts: list[Tensor], family: str, layers: Any) -> None:
    """With and without a cache; the encoder runs once, and its generators too."""
    model, batch = prompted(family, prompt_layers=layers), padded(texts)
    base = model.get_base_model()
    expected = [by_hand(model, text) for text in texts]
    assert len(set(map(tuple, expected))) > 2
    runs: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("spt_generator.default"):
            module.register_forward_hook(lambda *_: runs.append(1))
    for mode in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        runs.clear()
        assert model.generate(**batch, **settings(**mode))[:, 1:].tolist() == expected, mode
        assert len(runs) == len(layers or range(3))
    assert base.generate(**batch, **settings())[:, 1:].tolist() == expected
    encoded = base.get_encoder()(**batch)
    given = {"attention_mask": batch["attention_mask"], "encoder_outputs": encoded}
    assert model.generate(**given, **settings())[:, 1:].tolist() == expected
    embedded = model.get_input_embeddings()(batch["input_ids"])
    assert model.generate(inputs_embeds=embedded, attention_mask=given["attention_mask"], **settings())[:, 1:].tolist() == expected
    with model.disable_adapter():
        assert model.generate(**batch, **settings())[:, 1:].tolist() != expected
        assert model.generate(**given, **settings())[:, 1:].tolist() == expected  # encoded with prompts it is, and stays


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_beams_and_samples(texts: list[Tensor], family: str, attention: str) -> None:
    model, batch = prompted(family, attention), padded(texts)
    for mode in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}):
        written = []
        for cached in (True, False):
            torch.manual_seed(5)
            written.append(model.generate(**batch, **settings(use_cache=cached, **mode)).tolist())
        assert written[0] == written[1]
    alone = model.generate(input_ids=texts[1][None], **settings(num_beams=3, num_return_sequences=2))
    together = model.generate(**batch, **settings(num_beams=3, num_return_sequences=2))
    assert together[2:4].tolist() == alone.tolist()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_outputs_are_the_encoders(texts: list[Tensor], family: str) -> None:
    """Made by the encoder alone, as tuple or not, in training too; of them the model is what it is of the texts."""
    model, batch = prompted(family, "eager", prompt_layers=[1]), padded(texts)
    written = {"attention_mask": batch["attention_mask"], "decoder_input_ids": WRITTEN}
    encoder = model.get_base_model().get_encoder()
    shown = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted = model(**batch, decoder_input_ids=WRITTEN, **shown)
        for encoded in (encoder(**batch), encoder(**batch, return_dict=False)):
            torch.testing.assert_close(model(encoder_outputs=encoded, **written).logits, wanted.logits)
        as_tuple = model(**batch, decoder_input_ids=WRITTEN, return_dict=False)
        torch.testing.assert_close(as_tuple[0], wanted.logits)
        assert [one.shape for one in wanted.encoder_hidden_states] == [(4, 11, 16)] * 4
        assert [one.shape[-2:] for one in wanted.encoder_attentions] == [(11, 11)] * 3
        assert [one.shape[-2:] for one in wanted.cross_attentions] == [(5, 11)] * 3
        real = wanted.encoder_attentions[1][0, :, :9].sum(dim=-1)
        assert (real < 0.999).all()  # the rest of the attention is on the prompt
        torch.testing.assert_close(wanted.encoder_attentions[0][0, :, :9].sum(dim=-1), torch.ones_like(real))
        with model.disable_adapter():
            plain = model(**batch, decoder_input_ids=WRITTEN, **shown)
    for layer, same in enumerate([True, True, False, False]):
        assert torch.equal(wanted.encoder_hidden_states[layer], plain.encoder_hidden_states[layer]) == same
    labels = WRITTEN.masked_fill(WRITTEN == 2, -100)
    model.train()(**batch, labels=labels).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    encoded = encoder(**batch)
    model(encoder_outputs=encoded, attention_mask=batch["attention_mask"], labels=labels).loss.backward()
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_prompt_positions_are_the_encoders(texts: list[Tensor], family: str) -> None:
    """Not needed, but whoever says which part of the input to read is heard, in generation with beams too."""
    model = prompted(family)
    base, told = reference.plain_copy(model), torch.ones(1, 5)
    ids = texts[0][None]
    with torch.no_grad(), model.prompt_positions(told):
        wanted = reference.decoded(base, model, texts[0], WRITTEN[0], read=5)
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=WRITTEN[:1]).logits[0], wanted, rtol=1e-4, atol=1e-4)
        assert model.generate(input_ids=ids, **settings())[0, 1:].tolist() == by_hand(model, texts[0], read=5)
        beams = [model.generate(input_ids=ids, **settings(num_beams=3, use_cache=cached)) for cached in (True, False)]
        assert torch.equal(*beams)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_half_precision_and_another_adapter(texts: list[Tensor], family: str, dtype: torch.dtype) -> None:
    """T5's last projections stay in float32 where Transformers loads it in half precision, and then so do its hidden states."""
    model = prompted(family)
    given = {**padded(texts), "decoder_input_ids": WRITTEN}
    with torch.no_grad():
        wanted = model(**given).logits
        model.add_adapter("late", prompt_config(family, prompt_layers=[2], num_prompt_tokens=5))
        model.to(dtype)
        for kept in (False, True):
            for name, module in model.named_modules():
                if kept and name.endswith(".wo"):
                    module.float()
            got = model(**given).logits
            assert got.dtype == dtype
            assert (got.float() - wanted).norm() / wanted.norm() < 0.1
        model.set_adapter("late")
        assert (model(**given).logits.float() - wanted).norm() / wanted.norm() > 0.1


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_losses_by_row_are_the_models(texts: list[Tensor], family: str) -> None:
    model = prompted(family)
    labels = WRITTEN.clone()
    labels[1, 3:] = -100
    batch = {**padded(texts), "labels": labels}
    with torch.no_grad():
        sums, counts = row_losses(model, batch)
        torch.testing.assert_close(sums.sum() / counts.sum(), model(**batch).loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", [None, [0], [1, 2]], ids=str)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_gradient_checkpointing(texts: list[Tensor], family: str, layers: Any, reentrant: bool) -> None:
    """Those of T5's table of biases too, which all layers share."""
    model = prompted(family, prompt_layers=layers).train()
    for name, parameter in model.named_parameters():
        if "encoder" in name and "relative_attention_bias" in name:
            parameter.requires_grad_(True)
    batch = {**padded(texts), "labels": WRITTEN}

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    wanted = gradients()
    assert all(gradient.abs().max() > 0 for gradient in wanted.values())
    assert any("relative" in name for name in wanted) == (family == "t5")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_fsdp_leaves_whole(monkeypatch: Any, family: str) -> None:
    """Prompts read T5's biases where the layer that has them is not running."""
    settings = dict.fromkeys(("ignored_modules", "state_dict_type", "transformer_cls_names_to_wrap"))
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False, **settings)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    model = prompted(family, prompt_layers=[1])
    args = SimpleNamespace(device=torch.device("cpu"), load_best_model_at_end=False)
    WholeAdapter().on_init_end(args, None, None, model=model)  # type: ignore[arg-type]
    whole = {parameter for module in plugin.ignored_modules for parameter in module.parameters()}
    names = [name for name, parameter in model.named_parameters() if parameter in whole]
    own = [name for name in names if "spt_" not in name]
    assert [name.split(".")[-2] for name in own] == (["shared", "relative_attention_bias"] if family == "t5" else ["shared"])
    assert len(names) == len(own) + 2


@pytest.fixture
def rows(data: Any) -> list[dict[str, Any]]:
    """Texts of one length, and as answers the three tokens in their middle."""
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"][2:5]} for row in data("bert")]


class Seq2SeqSearch(SearchMixin, Seq2SeqTrainer):
    """A search in the Trainer of encoder-decoder models."""


@pytest.mark.parametrize(("family", "choose", "trainer"), [("t5", "gates", Seq2SeqSearch), ("bart", "loss", SearchTrainer)])
def test_a_search_and_what_it_found(tmp_path: Any, rows: Any, family: str, choose: Any, trainer: Any) -> None:
    """Rows of different lengths, padded by the collator for such models, which also makes what the decoder reads."""
    for number, row in enumerate(rows):
        row.update({name: row[name][: len(row[name]) - number % 3].tolist() for name in ("input_ids", "labels")})
    model = hyper(family)
    collator = DataCollatorForSeq2Seq(word_tokenizer(), model=model.get_base_model())
    kind, plain = (Seq2SeqTrainingArguments, Seq2SeqTrainer) if trainer is Seq2SeqSearch else (TrainingArguments, Trainer)
    args = arguments(tmp_path, kind, label_smoothing_factor=0.1 if choose == "loss" else 0.0)
    found = prompts.search(model, rows, args, keep=1, choose=choose, trainer_class=trainer, data_collator=collator)
    assert found.gates.shape == (5, 3)
    assert all(not torch.equal(one, other) for one, other in zip(found.gates, found.gates[1:], strict=False))
    assert len(found.layers) == 1
    trained = []
    for start in (model, hyper(family).unload()):
        torch.manual_seed(8)
        trained.append(prompts.retrain(start, found.config, rows, args, trainer_class=plain, data_collator=collator))
    assert trained[0].peft_config["default"].prompt_layers == found.layers
    for (name, one), other in zip(trained[0].named_parameters(), trained[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)  # from scratch


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_consistency_loss(tmp_path: Any, rows: Any, family: str) -> None:
    """A lower step's loss: cross-entropy with some gates dropped, and how far the decoder's outputs lie from those with others."""
    model = hyper(family).train()
    trainer = SearchTrainer(
        model=model, args=arguments(tmp_path), train_dataset=rows, upper_dataset=rows, upper_learning_rate=1e-2, drop=0.4
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    batch = {key: torch.stack([row[key] for row in rows[:4]]) for key in rows[0]}
    batch["labels"][1, 1:] = -100
    torch.manual_seed(13)
    got = trainer.training_step(model, dict(batch))
    torch.manual_seed(13)
    first, second = torch.rand(3) < 0.4, torch.rand(3) < 0.4
    assert not torch.equal(first, second)
    with torch.no_grad(), model.gates_dropped(first):
        one = model(**batch)
    with torch.no_grad(), model.gates_dropped(second):
        other = model(**batch)
    p, q = (out.logits[batch["labels"] != -100].log_softmax(-1) for out in (one, other))
    both = [kl_div(y, x, log_target=True, reduction="batchmean") for x, y in ((p, q), (q, p))]
    torch.testing.assert_close(got, one.loss + sum(both) / 2)
