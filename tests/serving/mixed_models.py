"""Tiny models with several trained-looking adapters that differ in all that adapters of one model may differ in."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, random_adapter, tiny_base
from torch import Tensor

from gatewise import fast_lora

BASE = "__base__"
TARGETS = {
    "llama": (["q_proj", "up_proj"], ["q_proj", "k_proj", "o_proj", "lm_head"]),
    "gpt2": (["c_attn"], ["c_proj", "c_fc"]),
    "bert": (["query", "dense"], ["key", "value"]),
}
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}


def mixed_model(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Adapters "all" (rank 3), "some" (rank 5, patterns) and "other" (rank 2, rsLoRA), in evaluation mode."""
    base = tiny_base(family)
    some, other = TARGETS[family]
    task, fan = TASKS[family], family == "gpt2"
    common: dict[str, Any] = {"task_type": task, "fan_in_fan_out": fan, **settings}
    whole = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.1, **common)
    model = get_peft_model(base.to(dtype), whole, adapter_name="all")
    patterns = {"rank_pattern": {some[0]: 4}, "alpha_pattern": {some[0]: 7}}
    model.add_adapter("some", LoraConfig(r=5, lora_alpha=20, target_modules=some, **patterns, **common))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=other, **common))
    random_adapter(model)
    return model.eval()


def prompts(rows: int, width: int = 7, padded: bool = False) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left if asked."""
    ids = torch.randint(1, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, : row % 4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


NAMES = {
    "one adapter": None,
    "mixed": ["all", BASE, "some", "other", "some"],
    "mixed, one adapter": ["some"] * 5,
    "mixed, one and the base": [BASE, "other", BASE, BASE, "other"],
    "mixed, the base": [BASE] * 5,
}


def both(model: PeftModel, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What PEFT makes of it, and what we do."""
    theirs = run()
    with fast_lora(model):
        ours = run()
    return theirs, ours


def logits(model: PeftModel, names: list[str] | None, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **({} if names is None else {"adapter_names": names})).logits


def generation(model: PeftModel, names: list[str] | None, inputs: dict[str, Tensor], **settings: Any) -> Any:
    more = {} if names is None else {"adapter_names": names}
    fixed = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(**inputs, **fixed, **settings, **more)
