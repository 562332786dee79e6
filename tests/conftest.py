"""Tiny models with trained-looking random adapters, shared by all tests."""

import gc
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, random_adapter, tiny_base


def pytest_configure(config: pytest.Config) -> None:
    """pytest-randomly chooses the order, and leaves the seed of each test to ``_one_seed``: it would set its own one after it."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_is_not_looked_through() -> None:
    """Every training run collects garbage, which would take most of its time: looking through all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _float32() -> Iterator[None]:
    """dtype "auto" is float32 on the CPU, whatever this one can do: the same numbers on every machine, and none needs bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatewise.models.device.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _interrupts() -> None:
    """They reach what tests start. A shell's background process ignores them, and so would all of its children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def adapted() -> Callable[..., PeftModel]:
    """adapted(family, **LoraConfig) -> a tiny model with a random LoRA adapter, rank 3 on all linear layers by default."""

    def make(family: str = "llama", trained: bool = True, **settings: Any) -> PeftModel:
        tasks = {"bert": "SEQ_CLS", "vit": None, "wav2vec2": None, "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
        settings = {
            "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": tasks.get(family, "CAUSAL_LM"), **settings
        }  # fmt: skip
        model = get_peft_model(tiny_base(family), LoraConfig(**settings))
        return random_adapter(model) if trained else model

    return make


@pytest.fixture
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """batch(family, rows, side) -> rows of different lengths, padded right (or left), labels on the last third.

    Images and sounds of one size for models that read those, and for those with an encoder and a decoder labels of their own.
    """

    def make(family: str = "llama", rows: int = 5, width: int = 9, side: str = "right") -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        if family in ("vit", "wav2vec2"):
            shape, name = ((3, 8, 8), "pixel_values") if family == "vit" else ((120,), "input_values")
            labels = torch.randint(0, 3, (rows,), generator=generator)
            return {name: torch.randn(rows, *shape, generator=generator), "labels": labels}
        ids = torch.randint(1, VOCABULARY, (rows, width), generator=generator)
        lengths = torch.randint(4, width + 1, (rows,), generator=generator)
        lengths[0] = width
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = ids * mask
        labels = ids.masked_fill((torch.arange(width) < lengths[:, None] - 3) | (mask == 0), -100)
        if side == "left":
            ids, mask, labels = ids.clone(), mask.clone(), labels.clone()
            for row, length in enumerate(lengths.tolist()):
                for tensor in (ids, mask, labels):
                    tensor[row] = tensor[row].roll(width - length)
        if family in ("t5", "bart"):
            labels = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
            labels[torch.arange(6) >= torch.randint(2, 7, (rows, 1), generator=generator)] = -100
        if family == "bert":
            labels = torch.randint(0, 3, (rows,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make
