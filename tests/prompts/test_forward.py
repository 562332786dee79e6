"""Forwards of every family against a loop that concatenates prompts by hand."""

from typing import Any

import prompt_reference as reference
import pytest
import torch
from prompted_models import CLASSIFIERS, DECODERS, ENCODERS, FAMILIES, prompted
from torch import Tensor
from torch.nn.functional import cross_entropy


def padded(texts: list[Tensor], side: str = "right", width: int = 11) -> dict[str, Tensor]:
    """A batch of texts with padding, two columns more than the longest needs."""
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def rows_of(values: Tensor, mask: Tensor) -> list[Tensor]:
    """The values at each row's tokens; all of them where there is one for a row."""
    return [value[real.bool()] if values.ndim > 2 else value for value, real in zip(values, mask, strict=True)]


def sides_of(family: str) -> list[str]:
    # With learned positions counted from the first column, padding on the left moves the text of the base model too.
    among_themselves = ("llama", "gemma3", "qwen2", "qwen3", "llama-classifier")
    return ["right", "left"] if family in among_themselves else ["right"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_concatenated_by_hand(texts, family, layers, attention):
    model = prompted(family, attention, prompt_layers=layers, tau=0.7)
    base = reference.plain_copy(model)
    with torch.no_grad():
        expected = [reference.logits(base, model, text) for text in texts]
        for side in sides_of(family):
            batch = padded(texts, side)
            for got, wanted in zip(rows_of(model(**batch).logits, batch["attention_mask"]), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        alone = model(input_ids=texts[0][None]).logits[0]
        torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-4)
        # Otherwise these tests could not fail.
        with model.disable_adapter():
            plain = model(input_ids=texts[0][None]).logits[0]
        assert (plain - alone).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_balanced_or_not(texts, family):
    """They are so if they are not told, but for those whose layers end in a norm."""
    model, logits = prompted(family), {}
    base = reference.plain_copy(model)
    for balanced in (True, False, None):
        model.peft_config["default"].balanced = balanced
        with torch.no_grad():
            logits[balanced] = model(input_ids=texts[0][None]).logits[0]
        torch.testing.assert_close(logits[balanced], reference.logits(base, model, texts[0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[None], logits[family != "bert"])
    assert (logits[True] - logits[False]).abs().max() > 1e-4


@pytest.mark.parametrize("dropped", [[True, False, False], [True, False, True], [False, True, False]], ids=str)
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_gates_left_out(texts, family, balanced, dropped):
    """The first prompt enters at the first open gate, where there is nothing to mix it with."""
    model = prompted(family, balanced=balanced)
    gates = model.gates().masked_fill(torch.tensor(dropped), 0.0)
    expected = reference.logits(reference.plain_copy(model), model, texts[0], gates=gates)
    with torch.no_grad(), model.gates_dropped(dropped):
        torch.testing.assert_close(model(input_ids=texts[0][None]).logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "gpt2-classifier"])
def test_padding_on_the_left_with_positions_of_its_own(texts, family):
    """Learned positions are the caller's: with the text's own ones padding on the left changes nothing."""
    model = prompted(family)
    right, left = padded(texts), padded(texts, "left")
    start = 1 if family == "roberta" else 0  # RoBERTa counts from after the padding token's number
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0) + start
    with torch.no_grad():
        if family in ("gpt2", "gpt2-classifier"):
            got = rows_of(model(**left, position_ids=positions).logits, left["attention_mask"])
            wanted = rows_of(model(**right).logits, right["attention_mask"])
        else:  # their heads read the first column
            got = rows_of(
                model(**left, position_ids=positions, output_hidden_states=True).hidden_states[-1], left["attention_mask"]
            )
            positions = (right["attention_mask"].cumsum(1) - 1).clamp(min=0) + start
            out = model(**right, position_ids=positions, output_hidden_states=True)
            wanted = rows_of(out.hidden_states[-1], right["attention_mask"])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"phm": 2}, {"activation": "relu"}, {"activation": "tanh"}, {"normalize_states": False}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_settings_of_the_generator(texts, family, settings):
    model = prompted(family, num_prompt_tokens=5, **settings)
    base = reference.plain_copy(model)
    batch = padded(texts)
    with torch.no_grad():
        for got, text in zip(rows_of(model(**batch).logits, batch["attention_mask"]), texts, strict=True):
            torch.testing.assert_close(got, reference.logits(base, model, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_below_the_first_prompt_are_the_base_models(texts, family):
    model = prompted(family, prompt_layers=[2])
    batch = padded(texts)
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True).hidden_states
        with model.disable_adapter():
            plain = model(**batch, output_hidden_states=True).hidden_states
    for below in range(3):
        assert torch.equal(got[below], plain[below])
    assert not torch.equal(got[3], plain[3])


@pytest.mark.parametrize("family", [*DECODERS, "llama-classifier"])
def test_labels_tell_prompt_from_answer(texts, family):
    """A decoder's generators read what stands before the first label; a classifier's read everything."""
    model = prompted(family)
    base = reference.plain_copy(model)
    batch = padded(texts)
    with torch.no_grad():
        if family == "llama-classifier":
            out = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
            torch.testing.assert_close(out.logits[0], reference.logits(base, model, texts[0]), rtol=1e-4, atol=1e-4)
            return
        labels = batch["input_ids"].masked_fill(torch.arange(11) < torch.tensor([5, 3, 1, 0])[:, None], -100)
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        # The last row is all labels, of which the first is of no use: that token is its prompt.
        out = model(**batch, labels=labels)
        wanted = [reference.logits(base, model, text, read=n) for text, n in zip(texts, [5, 3, 1, 1], strict=True)]
        for got, one in zip(rows_of(out.logits, batch["attention_mask"]), wanted, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)
        targets = [labels[row, 1 : len(text)] for row, text in enumerate(texts)]
        losses = [cross_entropy(one[:-1], target, reduction="sum") for one, target in zip(wanted, targets, strict=True)]
        torch.testing.assert_close(out.loss, sum(losses) / (labels[:, 1:] != -100).sum(), rtol=1e-4, atol=1e-4)
        with model.prompt_positions(torch.arange(6) < torch.tensor([5, 3, 1, 1])[:, None]):
            torch.testing.assert_close(model(**batch).logits, out.logits)


@pytest.mark.parametrize("family", DECODERS)
def test_answers_do_not_change_the_prompt(texts, family):
    model = prompted(family)
    labels = texts[0].clone()
    labels[:5] = -100
    other = texts[0].clone()
    other[6:] = (other[6:] + 7) % 50 + 3
    with torch.no_grad():
        one = model(input_ids=texts[0][None], labels=labels[None]).logits[0, :6]
        two = model(input_ids=other[None], labels=labels[None]).logits[0, :6]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
def test_padding_that_is_not_finite_reaches_nobody(texts, family, layers):
    model = prompted(family, prompt_layers=layers)
    text = texts[0][None]
    embedded = model.get_input_embeddings()(torch.cat([text, text[:, :2]], dim=1)).detach()
    mask = torch.ones(1, 11, dtype=torch.long)
    mask[:, 9:] = 0
    with torch.no_grad():
        wanted = model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, :9]
        embedded[:, 9:] = 1e6
        got = model(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True).hidden_states[-1][:, :9]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(texts, family):
    model = prompted(family)
    batch = padded(texts)
    with torch.no_grad():
        wanted = model(**batch).logits
        model.to(torch.bfloat16)
        for one in (True, False):  # all of it in half precision, and with the adapter in float32 as PEFT has it
            got = model(**batch).logits
            assert got.dtype == torch.bfloat16
            real = batch["attention_mask"].bool() if got.ndim > 2 else slice(None)
            difference = (got.float() - wanted)[real].norm() / wanted[real].norm()
            assert difference < 0.1
            model.base_model._cast_adapter_dtype("default", True)
            assert one or all(p.dtype == torch.float32 for n, p in model.named_parameters() if "spt_" in n)


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def labelled(texts: list[Tensor], family: str) -> dict[str, Tensor]:
    batch = padded(texts)
    if family in CLASSIFIERS:
        return {**batch, "labels": torch.tensor([0, 1, 2, 0])}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels if family in ENCODERS else labels.masked_fill(torch.arange(11) < 3, -100)}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bert"])
def test_gradient_checkpointing(texts, family, layers, reentrant):
    model = prompted(family, prompt_layers=layers).train()
    batch = labelled(texts, family)
    dropped = torch.tensor([False, True, False])
    with model.gates_reparameterised():
        wanted = gradients(model, batch)
        with model.gates_dropped(dropped):
            wanted_dropped = gradients(model, batch)
    assert len(wanted) >= (3 if layers is None else 2)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with model.gates_reparameterised():
        got = gradients(model, batch)
        with model.gates_dropped(dropped):
            model.zero_grad()
            loss = model(**batch).loss
        loss.backward()  # outside, where nothing tells which gates were dropped
    got_dropped = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for one, other in ((got, wanted), (got_dropped, wanted_dropped)):
        assert one.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(texts, family):
    model = prompted(family, prompt_layers=None, phm=2).train()
    found = gradients(model, labelled(texts, family))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == trainable
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize(("family", "layers"), [("llama", [1]), ("bert", None)], ids=str)
def test_compiled(texts, family, layers):
    """torch.compile gives the same numbers, in the order in which a user calls what it made."""
    torch._dynamo.reset()
    model, batch = prompted(family, prompt_layers=layers), padded(texts)
    compiled = torch.compile(model, backend="eager")
    if family == "llama":
        with torch.no_grad():
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
    model.train()
    labels = {"labels": torch.where(torch.arange(11) < 3, -100, batch["input_ids"])} if family != "bert" else {}
    losses = [one(**batch, **labels).logits.square().mean() for one in (compiled, model)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    got, wanted = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    for name, one, other in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
