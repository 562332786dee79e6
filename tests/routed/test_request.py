"""Which positions a decision is made from, in calls of every kind; and that training, scoring and generation agree on them."""

import warnings

import pytest
import torch
from peft import get_peft_model
from routed_models import routed_base, routed_config
from transformers import BertConfig, BertForTokenClassification, BertModel

from gatewise.errors import GatewiseError
from gatewise.losses import labelled_logits, row_losses


def prompt_of(model, **call):
    """Where the model found its prompts."""
    with torch.no_grad():
        model(**call)
    return model.base_model._tracker.now.last.prompt.int().tolist()


IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize(
    ("labels", "mask", "expected"),
    [
        pytest.param([-100, -100, 3, 4, 5, 6], [1] * 6, [1, 1, 0, 0, 0, 0], id="answer"),
        pytest.param([-100, -100, 3, 4, -100, -100], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], id="padded right"),
        pytest.param([-100, -100, -100, -100, 5, 6], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], id="padded left"),
        pytest.param([-100, 2, 3, -100, -100, 6], [1] * 6, [1, 0, 0, 0, 0, 0], id="second turn of a chat"),
        pytest.param([-100, -100, 3, -100, -100, -100], [1] * 6, [1, 1, 0, 0, 0, 0], id="unlabelled end"),
        pytest.param([1, 2, 3, 4, 5, 6], [1] * 6, [1] * 6, id="language modelling"),
        pytest.param([1, 2, 3, 4, -100, -100], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], id="language modelling, padded right"),
        pytest.param([-100, -100, 3, 4, 5, 6], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], id="language modelling, padded left"),
        pytest.param([-100] * 6, [1] * 6, [1] * 6, id="no label"),
        pytest.param([-100] * 6, [0] * 6, [1] * 6, id="nothing but padding"),
    ],
)
def test_prompts_by_labels(routed, labels, mask, expected):
    model = routed("llama")
    call = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, mask]), "labels": torch.tensor([[-100] * 5 + [6], labels])}
    assert prompt_of(model, **call) == [[1] * 5 + [0], expected]


def test_prompts_without_labels_are_whole_rows(routed):
    model, mask = routed("llama"), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    assert prompt_of(model, input_ids=IDS, attention_mask=mask) == mask.tolist()
    assert prompt_of(model, input_ids=IDS) == [[1] * 6] * 2
    assert prompt_of(model, inputs_embeds=torch.randn(2, 6, 16), attention_mask=mask) == mask.tolist()


def test_positional_arguments_are_seen(routed):
    model, mask = routed("llama"), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        model.get_base_model()(IDS, mask)
    assert model.base_model._tracker.now.last.prompt.int().tolist() == mask.tolist()


def test_prompts_that_are_told(routed):
    model, mask = routed("llama"), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    told = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    labels = torch.full_like(IDS, -100)
    with model.prompt_positions(told):
        assert prompt_of(model, input_ids=IDS, attention_mask=mask, labels=labels) == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert prompt_of(model, input_ids=IDS, attention_mask=mask) == mask.tolist()
    for wrong in (torch.ones(3, 4), torch.ones(2, 7), torch.ones(4)):
        with pytest.raises(GatewiseError, match=r"were given for a batch of shape \(2, 6\)"), model.prompt_positions(wrong):
            model(input_ids=IDS)


def test_encoders_read_the_whole_text(batch):
    data = batch("bert")
    mask = data["attention_mask"].tolist()
    model = get_peft_model(routed_base("bert"), routed_config("bert")).eval()
    assert prompt_of(model, **data) == mask
    small = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    tagger = get_peft_model(BertForTokenClassification(small), routed_config(task_type="TOKEN_CLS")).eval()
    labels = batch()["labels"].clamp(max=2)
    assert prompt_of(tagger, input_ids=data["input_ids"], attention_mask=data["attention_mask"], labels=labels) == mask
    backbone = get_peft_model(BertModel(small), routed_config(task_type="FEATURE_EXTRACTION")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    assert backbone.base_model._tracker.now.last.prompt.int().tolist() == mask


def test_packed_rows_are_refused(routed):
    model = routed("llama")
    for call in ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, {"cu_seq_lens_q": torch.tensor([0, 3, 6])}):
        with pytest.raises(GatewiseError, match="several packed samples"):
            model(input_ids=IDS[:1], **call)


def test_training_without_labels_is_refused(routed):
    model = routed("llama").train()
    with pytest.raises(GatewiseError, match="trained without labels in its call, so that its routers would read the answers"):
        model(input_ids=IDS)
    with model.prompt_positions(torch.ones(2, 6)):
        model(input_ids=IDS)
    with model.disable_adapter():
        model(input_ids=IDS)
    with torch.no_grad():
        model(input_ids=IDS)
    model.eval()(input_ids=IDS)


def test_scoring_without_labels_says_so_once(routed, caplog):
    """Who goes on after a prompt, or tells where it is, is not told."""
    model = routed("llama").eval()
    counts = []
    for settings in ({"labels": IDS}, {"use_cache": True}, {}, {}):
        model(input_ids=IDS, **settings)
        model.generate(input_ids=IDS, max_new_tokens=2, use_cache=False)
        counts.append(sum("called without labels, so its routers read" in message for message in caplog.messages))
    other = routed("llama").eval()
    with other.prompt_positions(torch.ones(2, 6)):
        other(input_ids=IDS)
    assert counts == [0, 0, 1, 1]
    assert sum("called without labels" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_row_losses_are_the_models_own(routed, batch, family, side):
    model, data = routed(family), batch(family, side=side)
    with torch.no_grad():
        sums, counts = row_losses(model, data)
        torch.testing.assert_close(sums.sum() / counts.sum(), model(**data).loss)


def test_labelled_logits_take_the_prompt_they_are_given(routed, batch):
    model, data = routed("llama"), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    read = torch.zeros(5, 9, dtype=torch.bool)
    read[:, 2:4] = True
    with torch.no_grad():
        labelled_logits(model, inputs, read)
        assert model.base_model._tracker.now.last.prompt.sum(dim=1).tolist() == [3] * 5
        labelled_logits(model, inputs, read, prompt=torch.arange(9).expand(5, 9) < 1)
        assert model.base_model._tracker.now.last.prompt.sum(dim=1).tolist() == [1] * 5
