"""Converts a GGUF file to an ordinary Transformers folder, once, so that later loads are quick and need no `gguf`."""

import contextlib
import io
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gatewise.errors import needs
from gatewise.internals.library_attributes import SAVED_NAMES
from gatewise.progress import quiet


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer of `gguf` into the folder `out`.

    Weights are stored in float32: a dequantised weight is scale * integer + offset with float16 scale and offset, which
    float16 or bfloat16 would round a second time, and at these sizes the disk space is cheap.
    """
    with needs("gguf", "reading a GGUF file"):
        import_module("gguf")  # Transformers reads it with that
    given: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    # The dequantisation bar of Transformers ignores its own switch, hence the redirection.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **given)
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **given, **_dequantise_option())
        # A second, plain model holds what is saved: the loaded one still describes itself as quantised.
        settings = loaded.config.to_dict()
        for key in ("quantization_config", *SAVED_NAMES):
            settings.pop(key, None)
        config = type(loaded.config).from_dict(settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.save_pretrained(str(out), max_shard_size="100GB")
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(str(out))


def _dequantise_option() -> dict[str, Any]:
    # Transformers from 5.24 on may keep GGUF blocks packed when it finds a kernel for them; earlier ones always unpack.
    option = getattr(transformers, "GgufConfig", None)
    return {} if option is None else {"quantization_config": option(dequantize=True)}
