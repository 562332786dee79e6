"""The trainers people use, with each method: real runs on tiny models. What is refused is refused in a sentence.

Of ``RankAllocation``: rounds move ranks at a constant budget, and what is saved is what was trained. Of the others: all that may
learn does, and what is saved is what was trained. That no prompt is read beyond its end is counted for every trainer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_base, word_tokenizer
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, Trainer, TrainingArguments

from gatewise import ConstantBudget, RankAllocation, RoutedLoraConfig, SelectivePromptConfig
from gatewise.errors import GatewiseError
from gatewise.internals.call_tracking import CallTracker

trl = pytest.importorskip("trl")

CONFIGS: dict[str, Callable[..., Any]] = {
    "ranks": lambda task: LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type=task),
    "routed": lambda task: RoutedLoraConfig(r=3, lora_alpha=6, task_type=task),
    "prompts": lambda task: SelectivePromptConfig(prompt_layers=[1], task_type=task),
}
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w50 {% generation %}{{ m['content'] }} {% endgeneration %}"
    "{% else %}w51 {{ m['content'] }} {% endif %}{% endfor %}"
)


def base(kind: type[Any] | None = None) -> Any:
    """The same random Llama every time."""
    torch.manual_seed(7)
    model = tiny_base("llama")
    if kind is None:
        return model
    model.config.num_labels, model.config.pad_token_id = 1, 0
    return kind(model.config)


def tokenizer() -> PreTrainedTokenizerFast:
    made = word_tokenizer()
    made.chat_template = CHAT
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (4, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(torch.arange(8) < 3, -100, ids)}


def rows() -> list[dict[str, Any]]:
    return [{name: value[index % 4] for name, value in batch().items()} for index in range(16)]


def stream() -> Iterator[dict[str, Any]]:
    yield from ({name: value.tolist() for name, value in row.items()} for row in rows())


def words(first: int, count: int) -> str:
    return " ".join(f"w{first + index}" for index in range(count))


ANSWERED = [{"prompt": words(i, 3), "completion": " " + words(i + 3, 2)} for i in range(16)]
TEXTS = [{"text": words(i, 4)} for i in range(16)]
CHATS = [
    {"messages": [{"role": "user", "content": words(i, 2)}, {"role": "assistant", "content": words(i + 2, 2)}]} for i in range(16)
]
PAIRS = [{"prompt": words(i, 2), "chosen": " " + words(i + 2, 2), "rejected": f" w{i + 5}"} for i in range(16)]
QUESTIONS = [{"prompt": words(i, 2)} for i in range(16)]

PLAIN: dict[str, dict[str, Any]] = {
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "re-entrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "streaming": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
}
TRL: dict[str, tuple[str, list[Any], dict[str, Any], int | None]] = {
    # trainer, rows, settings, and the longest prompt that a row of a training batch has; None where all is prompt
    "answers": ("SFT", ANSWERED, {}, 3),
    "plain text": ("SFT", TEXTS, {}, None),
    "packing": ("SFT", ANSWERED, {"packing": True, "max_length": 16}, 3),
    "packed plain text": ("SFT", TEXTS, {"packing": True, "max_length": 16}, None),
    "padding-free": ("SFT", ANSWERED, {"padding_free": True, "max_length": None}, 3),
    "assistant only": ("SFT", CHATS, {"assistant_only_loss": True}, 6),
    "chunked loss": ("SFT", ANSWERED, {"loss_type": "chunked_nll"}, 3),
    "dft": ("SFT", ANSWERED, {"loss_type": "dft"}, 3),
    "dpo": ("DPO", PAIRS, {}, 2),
    "dpo, precomputed": ("DPO", PAIRS, {"precompute_ref_log_probs": True}, 2),
    "grpo": ("GRPO", QUESTIONS, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}, 2),
    "reward": ("Reward", PAIRS, {}, None),
}
# With labels kept back routers and generators would read the answers, and generators read one text a row.
KEPT_BACK = "label_smoothing_factor and compute_loss_func have the Trainer keep them back: leave these out"
PACKED = "several packed samples, but (routed adapters|selective prompts) read one text a row: train without packing"
REFUSED = {
    ("routed", "re-entrant checkpointing"): "the load-balancing loss has no gradient",
    **{(method, "label smoothing"): KEPT_BACK for method in ("routed", "prompts")},
    **{(method, case): PACKED for method in ("routed", "prompts") for case in ("packing", "packed plain text", "padding-free")},
}


def callbacks(method: str, validation: Any = None) -> list[Any]:
    if method != "ranks":
        return []
    return [RankAllocation(schedule=ConstantBudget(rounds=2, first_round=2, recover=2), validation_batch=validation or batch())]


def settings(kind: type[Any], folder: Path, **more: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    return kind(**{**common, **more})


def check(trainer: Any, folder: Path, fresh: Any) -> None:
    """The end of a run: something was learnt, rounds kept the budget, and the saved adapter is the trained one."""
    model = trainer.model
    allocation = next((one for one in trainer.callback_handler.callbacks if isinstance(one, RankAllocation)), None)
    if allocation:
        assert [one.step for one in allocation.history] == [2, 4]
        assert all(one.pruned and one.grown for one in allocation.history)
        stored = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        assert 1392 - 40 < stored <= allocation.budget == 1392  # the largest rank has 40
    model.eval()
    data = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    with torch.no_grad():
        trained = model(**data).logits
        with model.disable_adapter():
            plain = model(**data).logits
    assert not torch.equal(trained, plain)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        again = PeftModel.from_pretrained(fresh, folder / "adapter").eval()(**data).logits
    torch.testing.assert_close(again, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("case", PLAIN)
def test_trainer(method: str, case: str, tmp_path: Path) -> None:
    if case == "compiled" and method != "ranks":
        pytest.skip("tests/routed and tests/prompts compile theirs")
    torch._dynamo.reset()
    data = IterableDataset.from_generator(stream) if case == "streaming" else rows()
    trainer = Trainer(
        model=get_peft_model(base(), CONFIGS[method]("CAUSAL_LM")),
        args=settings(TrainingArguments, tmp_path, **PLAIN[case]),
        train_dataset=data,
        callbacks=callbacks(method),
    )
    if (method, case) in REFUSED:
        with pytest.raises(GatewiseError, match=REFUSED[method, case]):
            trainer.train()
        return
    trainer.train()
    check(trainer, tmp_path, base())


class RunsOutOfMemory(Trainer):
    """At the fourth step batches of more than two rows do not fit."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 2 and self.state.global_step == 3:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("method", CONFIGS)
def test_smaller_batches_after_running_out_of_memory(method: str, tmp_path: Path) -> None:
    """After a round, too: training begins again, with as many rounds."""
    trainer = RunsOutOfMemory(
        model=get_peft_model(base(), CONFIGS[method]("CAUSAL_LM")),
        args=settings(TrainingArguments, tmp_path, auto_find_batch_size=True),
        train_dataset=rows(),
        callbacks=callbacks(method),
    )
    trainer.train()
    assert trainer._train_batch_size < 4
    check(trainer, tmp_path, base())


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("case", TRL)
def test_trl(method: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, data, more, longest = TRL[case]
    read: list[int] = []
    read_text = CallTracker.read_text

    def counted(*given: Any) -> Any:
        text = read_text(*given)
        read.append(int(text.prompt.sum(dim=1).max()))
        return text

    monkeypatch.setattr(CallTracker, "read_text", counted)
    rewards = kind == "Reward"
    head = LlamaForSequenceClassification if rewards else None
    validation = {**batch(), "labels": torch.tensor([0.0, 1.0, 0.0, 1.0])} if rewards else None
    extra = {"reward_funcs": lambda completions, **_: [float(len(one) % 3) for one in completions]} if kind == "GRPO" else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=base(head),
        args=settings(getattr(trl, f"{kind}Config"), tmp_path, bf16=False, **more),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
        peft_config=CONFIGS[method]("SEQ_CLS" if rewards else "CAUSAL_LM"),
        callbacks=callbacks(method, validation),
        **extra,
    )
    if (method, case) in REFUSED:
        with pytest.raises(GatewiseError, match=REFUSED[method, case]):
            trainer.train()
        return
    trainer.train()
    if longest is not None and method != "ranks":
        assert read
        assert max(read) <= longest
    check(trainer, tmp_path, base(head))


def test_the_reference_of_a_trained_routed_adapter_is_this_adapter(tmp_path: Path) -> None:
    """TRL adds the configuration once more and copies parameters; what routers take off prompts is in buffers."""
    model = get_peft_model(base(), CONFIGS["routed"]("CAUSAL_LM"))
    with torch.no_grad():
        for name, own in (*model.named_parameters(), *model.named_buffers()):
            if "lora_" in name or "prompt_router" in name:
                own.normal_()
            if name.endswith("spread") or "observed" in name:
                own.copy_(own.abs() + 1)
    trainer = trl.DPOTrainer(
        model=model,
        args=settings(trl.DPOConfig, tmp_path, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )
    policy = trainer.model.eval()
    assert set(policy.peft_config) == {"default", "ref"}
    data = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    with torch.no_grad():
        wanted = policy(**data).logits
        policy.set_adapter("ref")
        torch.testing.assert_close(policy(**data).logits, wanted)
