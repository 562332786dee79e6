"""Prompts in the encoder of a model whose decoder writes: forwards, generation, training and searches."""

from types import SimpleNamespace
from typing import Any

import prompt_reference as reference
import pytest
import torch
from accelerate.state import AcceleratorState
from prompted_models import ENCODER_DECODERS, arguments, hyper, prompted
from test_forward import padded
from tiny_models import word_tokenizer
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from gatewise import WholeAdapter, prompts
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


@pytest.mark.parametrize(("family", "trainer"), [("t5", Seq2SeqSearch), ("bart", SearchTrainer)])
def test_a_search_and_what_it_found(tmp_path: Any, rows: Any, family: str, trainer: Any) -> None:
    """Rows of different lengths, padded by the collator for such models, which also makes what the decoder reads."""
    for number, row in enumerate(rows):
        row.update({name: row[name][: len(row[name]) - number % 3].tolist() for name in ("input_ids", "labels")})
    model = hyper(family)
    collator = DataCollatorForSeq2Seq(word_tokenizer(), model=model.get_base_model())
    kind, plain = (Seq2SeqTrainingArguments, Seq2SeqTrainer) if trainer is Seq2SeqSearch else (TrainingArguments, Trainer)
    args = arguments(tmp_path, kind, label_smoothing_factor=0.1 if family == "bart" else 0.0)
    found = prompts.search(model, rows, args, keep=1, trainer_class=trainer, data_collator=collator)
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
