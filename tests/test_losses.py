"""Row losses against the losses Transformers computes, and microbatches against the whole batch."""

import pytest
import torch
from tiny_models import tiny_base
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
)

from gatewise.allocation.scoring import parts_of
from gatewise.errors import GatewiseError
from gatewise.losses import logits_at, loss_kind, mean_loss, microbatches, row_losses

SMALL = BertConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3)


def assert_same_loss(model, data):
    sums, counts = row_losses(model, data)
    torch.testing.assert_close(sums.sum() / counts.sum(), model(**data).loss)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "wav2vec2", "t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_totals_are_the_models_own_loss(batch, family, side):
    model, data = tiny_base(family).eval(), batch(family, side=side)
    assert_same_loss(model, data)
    sums, counts = row_losses(model, data)
    for row in range(len(sums)):
        one = {key: value[row : row + 1] for key, value in data.items()}
        torch.testing.assert_close(sums[row] / counts[row], model(**one).loss)


def test_a_decoder_whose_model_says_nowhere_what_it_reads(batch):
    sizes = {name: size for name, size in tiny_base("bart").config.to_dict().items() if name in M2M100Config().to_dict()}
    model = M2M100ForConditionalGeneration(M2M100Config(**sizes | {"model_type": "m2m_100"})).eval()
    assert_same_loss(model, batch("bart"))


def test_a_decoder_that_reads_its_last_label_first(batch):
    """A language, whatever the configuration says."""
    settings = tiny_base("bart").config.to_dict()
    sizes = {key: settings[key] for key in settings if key.startswith(("encoder_", "decoder_")) or key in ("vocab_size", "d_model")}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    assert_same_loss(MBartForConditionalGeneration(MBartConfig(**{**sizes, **ids, "init_std": 0.3})).eval(), batch("bart"))


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
def test_labels_at_their_own_tokens(batch, kind):
    model, data = kind(SMALL).eval(), batch()
    data["labels"] = data["labels"].clamp(max=2)
    assert_same_loss(model, data)


def classifier(number, problem=None):
    settings = {**SMALL.to_dict(), "num_labels": number, "id2label": None, "label2id": None, "problem_type": problem}
    return BertForSequenceClassification(BertConfig(**settings)).eval()


@pytest.mark.parametrize(
    ("problem", "labels", "outputs"),
    [
        (None, torch.rand(5), 1),
        (None, torch.randint(0, 2, (5, 3)).float(), 3),
        ("regression", 3 * torch.randn(5, 3), 3),  # several numbers a row may be regressed on
        ("multi_label_classification", torch.randint(0, 2, (5, 3)).float(), 3),
        ("single_label_classification", torch.randint(0, 3, (5,)), 3),
        ("single_label_classification", torch.randint(0, 3, (5, 1)), 3),
    ],
)
def test_the_problem_type_decides_or_else_the_labels(batch, problem, labels, outputs):
    assert_same_loss(classifier(outputs, problem), {**batch("bert"), "labels": labels})


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("labels_first", [True, False])
def test_microbatches_leave_a_classifiers_labels_whole(batch, classes, labels_first):
    """Nine classes are as many as the padded batch has columns."""
    model, data = classifier(classes, "multi_label_classification"), batch("bert")
    labels = {"labels": torch.randint(0, 2, (5, classes)).float()}
    data = {**labels, **{key: data[key] for key in ("input_ids", "attention_mask")}} if labels_first else {**data, **labels}
    parts = microbatches(data, 10, loss_kind(model))
    assert {part["labels"].shape[1] for part in parts} == {classes}
    assert min(part["input_ids"].shape[1] for part in parts) < 9
    assert mean_loss(model, parts) == pytest.approx(float(model(**data).loss.detach()), rel=1e-5)
    assert mean_loss(model, parts_of(model, data).own) == pytest.approx(float(model(**data).loss.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_masked_words_are_predicted_where_they_stand(kind):
    assert loss_kind(kind(SMALL)) == "tokens"


def test_the_head_sees_only_what_is_asked_for(batch):
    model, data = tiny_base("llama").eval(), batch()
    mask = data["labels"] != -100
    with logits_at(model, mask):
        kept = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    full = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    torch.testing.assert_close(kept, full[mask][None])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("most", [1, 10, 25, 1000])
def test_microbatches_add_up(batch, side, most):
    model, data = tiny_base("gpt2").eval(), batch("gpt2", rows=7, side=side)
    parts = microbatches(data, most)
    assert sum(len(part["labels"]) for part in parts) == 7
    assert all(len(part["labels"]) == 1 or part["input_ids"].numel() <= most for part in parts)
    if side == "right":
        assert all(part["attention_mask"].any(dim=0).all() for part in parts)
    with torch.no_grad():
        assert mean_loss(model, parts) == pytest.approx(float(model(**data).loss.detach()), rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("most", [1, 14, 1000])
def test_microbatches_of_a_text_and_another_add_up(batch, family, most):
    """The encoder's text is trimmed. Here both have as many columns, and one must not be taken for the other."""
    model, data = tiny_base(family).eval(), batch(family, rows=7, width=6)
    expected = float(model(**data).loss.detach())
    if family == "bart":  # as the collator of Transformers gives it
        data["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(data["labels"])
    parts = microbatches(data, most, loss_kind(model))
    assert sum(len(part["labels"]) for part in parts) == 7
    for part in parts:
        assert len(part["labels"]) == 1 or part["input_ids"].numel() <= most
        assert part["attention_mask"].any(dim=0).all()
    assert mean_loss(model, parts) == pytest.approx(expected, rel=1e-5)


def test_classifiers_with_an_encoder_and_a_decoder(batch):
    model = BartForSequenceClassification(BartConfig(**{**tiny_base("bart").config.to_dict(), "num_labels": 3})).eval()
    data = batch("bert")
    data["input_ids"][:, 1:] = data["input_ids"][:, 1:].clamp(min=3) * data["attention_mask"][:, 1:]
    data["input_ids"][:, 0] = 2  # it reads the last end of text
    assert_same_loss(model, data)


def test_microbatches_of_embedded_texts(batch):
    """They are cut with their masks as wide as they are."""
    model, data = tiny_base("llama").eval(), batch()
    embedded = {"inputs_embeds": model.get_input_embeddings()(data.pop("input_ids")).detach(), **data}
    assert mean_loss(model, microbatches(embedded, 20)) == pytest.approx(float(model(**embedded).loss.detach()), rel=1e-5)


def test_refusals(batch):
    model, data = tiny_base("llama"), batch()
    with pytest.raises(GatewiseError, match="no 'labels', only input_ids"):
        row_losses(model, {"input_ids": data["input_ids"]})
    with pytest.raises(GatewiseError, match="every label"):
        row_losses(model, {**data, "labels": torch.full_like(data["labels"], -100)})
