"""Converts a GGUF file to an ordinary Transformers folder, once, so that later loads are quick and need no `gguf`."""

import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gatewise.errors import needs
from gatewise.internals.library_attributes import SAVED_NAMES
from gatewise.progress import quiet


def convert_gguf(gguf: Path, out: Path, dtype: str = "float32", *, ends: Sequence[str] = (), tied: bool = False) -> None:
    """Write config.json, generation_config.json, the weights in safetensors and the tokenizer of `gguf` into the folder `out`.

    A dequantised weight is scale * integer + offset with float16 scale and offset: `dtype` float32 keeps it exactly, bfloat16
    rounds it a second time. Each is rounded as it is read, and written in shards, so that memory holds the model once, in `dtype`,
    the GGUF, and its largest weight twice in float32. Generation stops at `ends` too. `tied`: embedding and head, which the GGUF
    has with different bits, are one matrix in the model, so the head's, which has more, is taken for both.
    """
    kind = getattr(torch, dtype)
    with needs("gguf", "reading a GGUF file"):
        import_module("gguf")  # Transformers reads it with that
    given: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    # The dequantisation bar of Transformers ignores its own switch, hence the redirection.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **given)
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=kind, **given, **_dequantise_option())
        if tied:
            loaded.get_input_embeddings().weight = loaded.get_output_embeddings().weight
        # A second, plain model holds what is saved: the loaded one still describes itself as quantised.
        settings = loaded.config.to_dict()
        for key in ("quantization_config", *SAVED_NAMES):
            settings.pop(key, None)
        settings["tie_word_embeddings"] = tied or loaded.config.tie_word_embeddings
        config = type(loaded.config).from_dict(settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
        model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
        model.tie_weights()
        eos = [config.eos_token_id, *(tokenizer.convert_tokens_to_ids(end) for end in ends)] if ends else config.eos_token_id
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=eos, pad_token_id=config.pad_token_id
        )
        model.save_pretrained(str(out), max_shard_size="2GB")
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(str(out))


def _dequantise_option() -> dict[str, Any]:
    # Transformers from 5.24 on may keep GGUF blocks packed when it finds a kernel for them; earlier ones always unpack.
    option = getattr(transformers, "GgufConfig", None)
    return {} if option is None else {"quantization_config": option(dequantize=True)}
