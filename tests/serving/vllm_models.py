"""Base models and adapters for the real vLLM: `make test-serve`, which makes an environment for it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_adapter
from tiny_run import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

PYTHON = os.environ.get("GATEWISE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="GATEWISE_VLLM_PYTHON names no Python that has vLLM: run `make test-serve`")

# vLLM's attention needs heads of 32 numbers and more.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"head_dim": 32, "max_position_embeddings": 128}
UNEVEN = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 7, "layers.2.mlp.up_proj": 1},
    "exclude_modules": r".*layers\.1\.(mlp|self_attn\.v).*",
}

RUNNERS = ("V1", "V1 ahead", "V2", "V2 ahead")
"""vLLM's model runners. "ahead": a step is scheduled before the tokens of the last one are known, as is usual on GPUs."""


def environment_of(runner: str) -> dict[str, str]:
    """The environment in which vLLM takes this model runner. V2 has its kernels in Triton, which interprets them without a GPU."""
    if runner.startswith("V1"):
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    code = "import importlib.util, torch; print(importlib.util.find_spec('triton') is not None, torch.cuda.is_available())"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    has_triton, has_gpu = done.stdout.split()
    if has_triton == "False":
        pytest.skip("model runner V2 needs Triton, which is not installed beside vLLM")
    paths = [] if has_gpu == "True" else [str(Path(__file__).with_name("interpreted"))]
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))}


def write_base(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ends, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    config: Any = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
    model = random_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder
