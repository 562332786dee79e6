"""Stands in for vLLM where ``serving-check`` asks it: answers with Transformers and PEFT, in this process."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from gatewise.serving.server.with_vllm import VllmServer


def ask_all(
    server: VllmServer,
    prompted: Sequence[Sequence[list[int]]],
    tokens: int,
    left_out: str = "nothing",
    dtype: torch.dtype = torch.float32,
) -> tuple[str, list[Any], list[Any]]:
    """Leaves out the LoRA of modules with ``left_out`` in their names, as vLLM does without a word where it has others for them;
    ``dtype`` has it round otherwise than PEFT."""
    base = server._arguments[server._arguments.index("--model") + 1]
    adapted, bare = [], []
    for version, prompts in zip(server.catalogue.versions.values(), prompted, strict=True):
        model = _model(base, version.folder, left_out).to(dtype)
        adapted.append([_answer(model, ids, tokens) for ids in prompts])
        with model.disable_adapter():
            bare.append([_answer(model, ids, tokens) for ids in prompts])
    return "0.fake", adapted, bare


def _model(base: str, adapter: Path, left_out: str) -> Any:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and left_out in path:
            layer.lora_B["default"].weight.data.zero_()
    return model


@torch.no_grad()
def _answer(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    ids, logprobs = list(prompt), []
    positions = getattr(model, "prompt_positions", lambda _: nullcontext())  # of a routed adapter
    for _ in range(tokens):
        with positions(torch.ones(1, len(prompt), dtype=torch.bool)):
            value, token = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
        ids.append(int(token))
        logprobs.append(float(value))
    return {"token_ids": ids[len(prompt) :], "token_logprobs": logprobs}
