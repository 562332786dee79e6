"""Factors fitted anew, and more steps."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_adapter, tiny_base, word_tokenizer

from gatewise.allocation import scoring
from gatewise.allocation.slots import factors, live_mask, lora_layers, prune
from gatewise.compress.recovery import Recovery, recover, refit
from gatewise.errors import GatewiseError
from gatewise.losses import mean_loss


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    return random_adapter(get_peft_model(tiny_base("llama"), LoraConfig(r=3, target_modules="all-linear", **settings))).eval()


def rows_of(model: Any, count: int) -> dict[str, torch.Tensor]:
    """Texts that the adapter as it is finds likely: the tokens that it would write."""
    torch.manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (count, 6))
    labels = torch.full_like(ids, -100)
    with torch.no_grad():
        ids[:, -1] = model(input_ids=ids).logits[:, -2].argmax(-1)
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def test_factors_make_up_for_what_is_gone() -> None:
    model = adapted()
    rows = rows_of(model, 64)
    layers = lora_layers(model, "default")
    for layer in layers.values():
        prune(layer, "default", [0])
    before = mean_loss(model, [rows])
    held = {path: [factor.detach().clone() for factor in factors(layer, "default")] for path, layer in layers.items()}
    assert refit(model, rows) > 0
    assert mean_loss(model, [rows]) < before
    for path, layer in layers.items():
        a, b = factors(layer, "default")
        torch.testing.assert_close(a, held[path][0], atol=0, rtol=0)
        ratio = b[:, 1:] / held[path][1][:, 1:]  # one factor a rank
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)
        assert not live_mask(layer, "default")[0]


def test_nothing_is_fitted_that_does_worse_on_rows_apart() -> None:
    """The last quarter wants the opposite of what the first three want."""
    model = adapted()
    rows = rows_of(model, 32)
    with torch.no_grad():
        least = model(input_ids=rows["input_ids"]).logits[:, -2].argsort(-1)[:, 0]
    rows["labels"][:24, -1] = least[:24]
    held = {path: factors(layer, "default")[1].detach().clone() for path, layer in lora_layers(model, "default").items()}
    assert refit(model, rows, learning_rate=0.5) == 0
    assert all(torch.equal(held[path], factors(layer, "default")[1]) for path, layer in lora_layers(model, "default").items())
    assert refit(model, rows_of(model, 3)) == 0


def features(model: Any) -> list[dict[str, Any]]:
    rows = rows_of(model, 32)
    return [{key: value.tolist() for key, value in zip(rows, pair, strict=True)} for pair in zip(*rows.values(), strict=True)]


def test_recovery_trains_what_lives_and_leaves_dead_slots_dead() -> None:
    model = adapted()
    rows, batch = features(model), rows_of(model, 32)
    layers = lora_layers(model, "default")
    for layer in layers.values():
        prune(layer, "default", [0, 2])
    before = mean_loss(model, [batch])
    recover(model, word_tokenizer(), rows, Recovery("", steps=20, learning_rate=0.02), {"training": {"batch_size": 8}})
    assert mean_loss(model, [batch]) < before
    assert all(live_mask(layer, "default").tolist() == [False, True, False] for layer in layers.values())
    assert not model.training


def of_several_lengths() -> list[dict[str, Any]]:
    torch.manual_seed(2)
    rows: list[dict[str, Any]] = []
    for length in (3, 9, 5, 7, 2, 8, 6, 4):
        ids = torch.randint(2, VOCABULARY, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def test_a_batch_in_parts_of_like_length_gives_the_same_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = of_several_lengths()
    rows[1]["labels"] = [-100] * 9  # alone in its part, where there are parts
    trained = []
    for most, parts in ((10**6, range(8, 9)), (9, range(17, 33))):
        monkeypatch.setattr(scoring, "step_tokens", lambda *_, most=most: most)
        model, seen = adapted(), []
        model.get_base_model().register_forward_hook(lambda *_, seen=seen: seen.append(1))
        recover(model, word_tokenizer(), rows, Recovery("", steps=8, learning_rate=0.02), {"training": {"batch_size": 4}})
        assert len(seen) in parts
        trained.append([factor for layer in lora_layers(model, "default").values() for factor in factors(layer, "default")])
    for one, same in zip(*trained, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


def test_settings_of_the_run_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from gatewise.compress import recovery

    seen: list[Any] = []
    monkeypatch.setattr(recovery._Trainer, "train", lambda self: seen.append(self.args))
    model = adapted()
    note = {
        "training": {"learning_rate": 3e-3, "batch_size": 4, "weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation": 2}
    }
    recover(model, word_tokenizer(), features(model), Recovery("", steps=7), note)
    recover(model, word_tokenizer(), features(model), Recovery("", steps=7, learning_rate=1e-2), note)
    recover(model, word_tokenizer(), features(model), Recovery("", steps=7), {})
    recover(model, word_tokenizer(), features(model), Recovery("", steps=7), {"training": dict.fromkeys(note["training"])})
    told = [(one.learning_rate, one.per_device_train_batch_size, one.weight_decay, one.max_grad_norm) for one in seen]
    assert [one.gradient_accumulation_steps for one in seen] == [2, 2, 1, 1]
    assert told == [(3e-3 / 4, 4, 0.1, 0.5), (1e-2, 4, 0.1, 0.5), (1e-4, 16, 0.0, 1.0), (1e-4, 16, 0.0, 1.0)]


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = adapted()
    rows = features(model)
    with torch.no_grad():
        factors(lora_layers(model, "default")["model.layers.0.mlp.down_proj"], "default")[1][0, 0] = float("nan")
    with pytest.raises(GatewiseError, match="the loss is nan at recovery step 1: take a lower learning rate"):
        recover(model, word_tokenizer(), rows, Recovery("", steps=3), {})
