"""Adapters that act from the prompt's last token on, against two plain models that read a prompt one after the other."""

from typing import Any

import pytest
import routed_reference as reference
import torch
from peft import PeftModel, get_peft_model
from routed_models import MODES, routed_base, routed_config, trained_routers
from test_packing import LENGTHS, PROMPTS, packed, padded, texts
from tiny_models import random_adapter
from transformers import AutoModel, LlamaForSequenceClassification

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
