"""Routed adapters in the real vLLM, through the plug-in, beside PEFT: `make test-serve`.

The engine runs in a process of the other Python (vllm_driver.py), started once for all tests that its settings suit.
"""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from routed_models import trained_routers
from test_vllm import PYTHON, pytestmark, write_adapter, write_base
from tiny_models import random_adapter
from transformers import AutoModelForCausalLM

from gatewise import RoutedLoraConfig

__all__ = ["pytestmark"]

DRIVER = Path(__file__).with_name("vllm_driver.py")
TOLERANCE = 1e-4  # nats, in float32
ARGUMENTS = [
    "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--max-model-len", "96", "--block-size", "32",
    "--max-num-seqs", "32",
]  # fmt: skip
IN_ONE_PIECE = "--no-enable-chunked-prefill"


def write_routed(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    torch.manual_seed(seed)
    config = RoutedLoraConfig(**{"r": 3, "lora_alpha": 6, "top_k": 2, "task_type": "CAUSAL_LM", **settings})
    model = trained_routers(random_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose prompts differ as those of a trained one do, two routed adapters and a plain one."""
    folder = tmp_path_factory.mktemp("vllm")
    base = write_base(folder / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    model.save_pretrained(base)
    write_routed(folder / "one", base, 1)
    write_routed(folder / "two", base, 2, r=8, pooler="last", activation="gelu", exclude_modules=r".*(layers\.1\.mlp|k_proj).*")
    write_adapter(folder / "plain", base, 3)
    return folder


def run(folder: Path, steps: Sequence[Mapping[str, Any]], *arguments: str, **environment: str) -> list[Any]:
    """What the steps of vllm_driver.py gave."""
    asked, answered = folder / "request.json", folder / "answer.json"
    answered.unlink(missing_ok=True)
    told = {"arguments": ["--model", str(folder / "base"), *ARGUMENTS, *arguments], "steps": steps}
    asked.write_text(json.dumps(told), encoding="utf-8")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    command = [str(PYTHON), str(DRIVER), str(asked), str(answered)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert answered.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    answers: list[Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answers


def rows_of(prompts: Sequence[Sequence[int]], *adapters: Path | None) -> list[dict[str, Any]]:
    return [{"prompt": list(prompt), "adapter": adapter and str(adapter)} for prompt in prompts for adapter in adapters]


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


class InPeft:
    """Greedy answers of PEFT and Transformers, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.base, self.models = folder / "base", {}  # type: Path, dict[str | None, Any]

    def model(self, adapter: str | None) -> Any:
        if adapter not in self.models:
            base = AutoModelForCausalLM.from_pretrained(self.base)
            self.models[adapter] = (PeftModel.from_pretrained(base, adapter) if adapter else base).eval()
        return self.models[adapter]

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], adapter: str | None, tokens: int) -> tuple[list[int], list[float]]:
        ids = torch.tensor([prompt])
        out = self.model(adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = out.sequences[0, len(prompt) :].tolist()
        return written, [float(at[0].log_softmax(-1)[one]) for one, at in zip(written, out.logits, strict=True)]

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], adapter: str | None, written: Sequence[int]) -> list[float]:
        model, ids = self.model(adapter), torch.tensor([[*prompt, *written]])
        with model.prompt_positions(torch.ones(1, len(prompt), dtype=torch.bool)):
            at = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return [float(one) for one in at.gather(-1, torch.tensor(written)[:, None])[:, 0]]

    def check(self, rows: Sequence[Mapping[str, Any]], answers: Any) -> None:
        assert isinstance(answers, list), answers
        for row, [one] in zip(rows, answers, strict=True):
            tokens, logprobs = self.answer(row["prompt"], row["adapter"], len(one["tokens"]))
            assert one["tokens"] == tokens, row["adapter"]
            assert one["logprobs"] == pytest.approx(logprobs, abs=TOLERANCE), row["adapter"]

    def check_sampled(self, rows: Sequence[Mapping[str, Any]], answers: Any, n: int) -> None:
        assert isinstance(answers, list), answers
        for row, found in zip(rows, answers, strict=True):
            assert len({tuple(one["tokens"]) for one in found}) == n
            for one in found:
                expected = self.logprobs(row["prompt"], row["adapter"], one["tokens"])
                assert one["logprobs"] == pytest.approx(expected, abs=TOLERANCE), row["adapter"]


def choices(folder: Path, prompts: Sequence[Sequence[int]], adapter: Path) -> int:
    """How many different sets of modules the prompts choose."""
    model = InPeft(folder).model(str(adapter))
    gates = []
    for prompt in prompts:
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt]))
        gates.append(tuple((model.routing().gates > 0).flatten().tolist()))
    return len(set(gates))


def test_routed_plain_and_base_rows_answer_as_in_peft(folder: Path) -> None:
    one, two, plain = folder / "one", folder / "two", folder / "plain"
    reference = InPeft(folder)
    prompts = prompts_of(1, 5, 17, 40, 9, 70)
    assert choices(folder, prompts, one) > 3
    mixed, sampled = rows_of(prompts, one, two, plain, None), rows_of(prompts, one, two)
    [shared] = prompts_of(66)
    behind = [shared + more for more in prompts_of(2, 6, 11, seed=1)]
    assert choices(folder, behind, one) > 1
    again = rows_of(behind, one, plain)
    found = run(
        folder,
        [
            {"do": "answer", "rows": mixed, "tokens": 8},
            {"do": "answer", "rows": again[:1], "tokens": 8},  # fills the cache
            {"do": "answer", "rows": again, "tokens": 8},
            {"do": "answer", "rows": again, "tokens": 8},
            {"do": "cached"},
            {"do": "answer", "rows": sampled, "tokens": 8, "n": 2},
            {"do": "abort", "prompt": prompts[2], "adapter": str(one)},
            {"do": "answer", "rows": mixed[3:4], "tokens": 8},  # the step in which vLLM's worker learns of it
            {"do": "requests_with_gates"},
            {"do": "answer", "rows": rows_of(prompts_of(97), one), "tokens": 1},
            {"do": "beam_search", "prompt": prompts[1], "adapter": str(one)},
            {"do": "answer", "rows": mixed[:4], "tokens": 8},
        ],
        *("--max-loras", "3", IN_ONE_PIECE, "--enable-prefix-caching"),
    )
    reference.check(mixed, found[0])
    reference.check(again[:1], found[1])
    reference.check(again, found[2])
    reference.check(again, found[3])
    assert found[4] > 0  # the plain adapter's keys and values were found, and no routed request had another's
    reference.check_sampled(sampled, found[5], n=2)
    assert found[6] == 1
    assert found[8] == []
    assert "maximum context length is 96 tokens" in found[9]["error"]
    assert "beam search with the routed adapter" in found[10]["error"]
    reference.check(mixed[:4], found[11])
