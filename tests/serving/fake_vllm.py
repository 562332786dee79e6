"""Stands in for ``run_vllm``: answers its requests with Transformers and PEFT, in this process.

Like vLLM it leaves out, without a word, the LoRA of modules that ``--lora-target-modules`` does not name, by full name or kind.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM


def fake_vllm(_: str | Path, request: Mapping[str, Any]) -> dict[str, Any]:
    models = {row["adapter"]: _model(request["arguments"], row["adapter"]) for rows in request["batches"] for row in rows}
    batches = [
        {"rows": [_answered(models[row["adapter"]].eval(), row["prompt"], request["tokens"]) for row in rows], "seconds": 0.1}
        for rows in request["batches"]
    ]
    return {"version": "0.fake", "batches": batches}


def _model(arguments: list[str], adapter: str | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(arguments[arguments.index("--model") + 1])
    if adapter is None:
        return base
    names = set(arguments[arguments.index("--lora-target-modules") + 1 :])
    model = PeftModel.from_pretrained(base, adapter)
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and not names & {path, path.rpartition(".")[2]}:
            layer.lora_B["default"].weight.data.zero_()
    return model


@torch.no_grad()
def _answered(model: Any, prompt: list[int], tokens: int) -> dict[str, Any]:
    ids, logprobs = list(prompt), []
    positions = getattr(model, "prompt_positions", lambda _: nullcontext())  # of a routed adapter
    for _ in range(tokens):
        with positions(torch.ones(1, len(prompt), dtype=torch.bool)):
            value, token = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
        ids.append(int(token))
        logprobs.append(float(value))
    return {"tokens": ids[len(prompt) :], "logprobs": logprobs}
