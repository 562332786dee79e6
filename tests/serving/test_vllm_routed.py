"""Routed adapters in the real vLLM, through the plug-in, beside PEFT: `make test-serve`.

The engine runs in a process of the other Python (vllm_driver.py), started once for all tests that its settings suit.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from routed_models import trained_routers
from tiny_models import random_adapter
from tiny_run import write_rows
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_models import PYTHON, RUNNERS, UNEVEN, environment_of, pytestmark, write_adapter, write_base

from gatewise import RoutedLoraConfig
from gatewise.serving.checking import check_in_vllm
from gatewise.serving.engines import CPU_LORA
from gatewise.serving.vllm_plugin.refusals import FAMILIES

__all__ = ["pytestmark"]

DRIVER = Path(__file__).with_name("vllm_driver.py")
TOLERANCE = 1e-4  # nats, in float32
ARGUMENTS = [
    "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--max-model-len", "96", "--block-size", "32",
    "--max-num-seqs", "32",
]  # fmt: skip
IN_ONE_PIECE = "--no-enable-chunked-prefill"


def write_routed(folder: Path, base: Path, seed: int, scale: float = 0.3, **settings: Any) -> Path:
    torch.manual_seed(seed)
    config = RoutedLoraConfig(**{"r": 3, "lora_alpha": 6, "top_k": 2, "task_type": "CAUSAL_LM", **settings})
    model = trained_routers(random_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), scale))
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


def run(
    folder: Path,
    steps: Sequence[Mapping[str, Any]],
    *arguments: str,
    runner: str = "V1",
    version: str = "",
    unset: Sequence[str] = (),
    **environment: str,
) -> list[Any]:
    """What the steps of vllm_driver.py gave. ``version`` is what vLLM says it is."""
    asked, answered = folder / "request.json", folder / "answer.json"
    answered.unlink(missing_ok=True)
    told = {"arguments": ["--model", str(folder / "base"), *ARGUMENTS, *arguments], "steps": steps, "version": version}
    told["ahead"] = runner.endswith("ahead")
    asked.write_text(json.dumps(told), encoding="utf-8")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", CPU_LORA: "1"}
    settings |= environment_of(runner) | environment
    command = [str(PYTHON), str(DRIVER), str(asked), str(answered)]
    for name in unset:
        del settings[name]
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

    @torch.no_grad()
    def prompt_logprobs(self, prompt: Sequence[int], adapter: str | None) -> list[float]:
        ids = torch.tensor([prompt])
        at = self.model(adapter)(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return [float(one) for one in at.gather(-1, ids[:, 1:, None]).flatten()]

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


@pytest.mark.parametrize("runner", RUNNERS)
def test_routed_plain_and_base_rows_answer_as_in_peft(folder: Path, runner: str) -> None:
    one, two, plain = folder / "one", folder / "two", folder / "plain"
    reference = InPeft(folder)
    prompts = prompts_of(1, 5, 17, 40, 9, 70)
    assert choices(folder, prompts, one) > 3
    mixed, sampled = rows_of(prompts, one, two, plain, None), rows_of(prompts, one, two)
    tenant = rows_of(prompts[1:4], one)
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
            # One name and number, another folder; then other files in the same folder.
            {"do": "answer", "rows": [{**row, "name": "tenant"} for row in tenant], "tokens": 8},
            {"do": "unload", "folder": str(one), "name": "tenant"},
            {"do": "answer", "rows": [{**row, "adapter": str(two), "name": "tenant"} for row in tenant], "tokens": 8},
            {"do": "replace", "folder": str(folder / "moved"), "by": str(two)},
            {"do": "answer", "rows": [{**row, "adapter": str(folder / "moved")} for row in tenant], "tokens": 8},
            {"do": "unload", "folder": str(folder / "moved")},
            {"do": "replace", "folder": str(folder / "moved"), "by": str(one)},
            {"do": "answer", "rows": [{**row, "adapter": str(folder / "moved")} for row in tenant], "tokens": 8},
            {"do": "runner"},
            {"do": "prompt_logprobs", "prompt": prompts[3], "adapter": str(one)},
        ],
        *("--max-loras", "3", IN_ONE_PIECE, "--enable-prefix-caching"),
        # Other modules than these have no adapter; but vLLM fails with prompt_logprobs where it gives the last one a LoRA.
        *("--lora-target-modules", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        runner=runner,
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
    others = [{**row, "adapter": str(two)} for row in tenant]
    for expected, answers in ((tenant, found[12]), (others, found[14]), (others, found[16]), (tenant, found[19])):
        reference.check(expected, answers)
    assert found[13] is found[17] is True
    assert found[20] == runner
    assert found[21] == pytest.approx(reference.prompt_logprobs(prompts[3], str(one)), abs=TOLERANCE)


@pytest.mark.parametrize("runner", ["V1 ahead", "V2 ahead"])
def test_preempted_requests_keep_their_gates(folder: Path, runner: str) -> None:
    """There is room for half of the requests, so that others wait, with what they had written, and are read once more."""
    rows = rows_of(prompts_of(*range(24, 32)), folder / "one", folder / "two", folder / "plain")
    steps = [{"do": "answer", "rows": rows, "tokens": 40}, {"do": "preemptions"}]
    for cache in ("--enable-prefix-caching", "--no-enable-prefix-caching"):
        found = run(folder, steps, "--max-loras", "4", IN_ONE_PIECE, "--num-gpu-blocks-override", "20", cache, runner=runner)
        assert found[1] > 3
        InPeft(folder).check(rows, found[0])


def test_files_that_change_under_a_loaded_adapter(folder: Path) -> None:
    """vLLM goes on with what it loaded; so do the keys of its prefix cache. A plain adapter needs another number."""
    one, plain, moved = folder / "one", folder / "plain", folder / "moved"
    [shared] = prompts_of(66)
    behind = [shared + more for more in prompts_of(2, 6, 11, seed=1)]
    steps = [
        {"do": "replace", "folder": str(moved), "by": str(one)},
        {"do": "answer", "rows": rows_of(behind[:1], moved), "tokens": 8},
        {"do": "replace", "folder": str(moved), "by": str(plain)},
        {"do": "answer", "rows": rows_of(behind[1:], moved, None), "tokens": 8},
        {"do": "unload", "folder": str(moved)},
        {"do": "load", "folder": str(moved)},
        {"do": "answer", "rows": [{**row, "name": "again"} for row in rows_of(behind, moved)], "tokens": 8},
    ]
    reference = InPeft(folder)
    found = run(folder, steps, "--max-loras", "3", IN_ONE_PIECE, "--enable-prefix-caching")
    reference.check(rows_of(behind[:1], one), found[1])
    reference.check(rows_of(behind[1:], one, None), found[3])
    assert "is not routed, unlike what was asked for by its number before" in found[5]["error"]
    reference.check(rows_of(behind, plain), found[6])


def test_an_adapter_that_is_removed_while_its_requests_wait(folder: Path) -> None:
    """vLLM keeps one adapter in memory here, and loads the others again in the steps that have requests for them."""
    adapters = {name: Path(shutil.copytree(folder / name, folder / f"gone-{name}")) for name in ("one", "plain")}
    rows = rows_of(prompts_of(5, 9, 12), *adapters.values())
    steps = [
        *({"do": "load", "folder": str(gone)} for gone in adapters.values()),
        *({"do": "replace", "folder": str(gone), "by": None} for gone in adapters.values()),
        {"do": "answer", "rows": rows, "tokens": 6},
        {"do": "unload", "folder": str(adapters["plain"])},
        {"do": "load", "folder": str(adapters["plain"])},
    ]
    found = run(folder, steps, "--max-loras", "1", "--max-cpu-loras", "1", IN_ONE_PIECE, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    reference = InPeft(folder)
    reference.check(rows_of(prompts_of(5, 9, 12), folder / "one", folder / "plain"), found[4])
    assert "No adapter found" in found[6]["error"]  # what nobody has any more is refused where it is asked for


@pytest.mark.parametrize("runner", ["V1 ahead", "V2 ahead"])
def test_rows_come_and_go(folder: Path, runner: str) -> None:
    """Answers end at different tokens, nobody knows at which before, and others begin in their rows."""
    reference = InPeft(folder)
    rows = rows_of(prompts_of(*range(3, 15)), folder / "one", folder / "two", None)
    answers = [reference.answer(row["prompt"], row["adapter"], 12)[0] for row in rows]
    stop = sorted({answer[place] for answer, place in zip(answers, [1, 3, 5, 7] * len(rows), strict=False)})[::3]
    steps = [
        {"do": "answer", "rows": rows, "tokens": 12, "stop": stop},
        {"do": "answer", "rows": rows[:1], "tokens": 2},
        {"do": "answer", "rows": rows[2:3], "tokens": 2},
        {"do": "requests_with_gates"},
    ]
    found = run(folder, steps, "--max-loras", "3", IN_ONE_PIECE, "--max-num-seqs", "5", runner=runner)
    assert len({len(one["tokens"]) for [one] in found[0]}) > 3
    reference.check(rows, found[0])
    assert len(found[3]) <= 1


def test_two_processes_share_a_model(folder: Path) -> None:
    rows = rows_of(prompts_of(1, 5, 17, 40), folder / "one", folder / "two", folder / "plain", None)
    settings = ("--max-loras", "3", IN_ONE_PIECE, "--tensor-parallel-size", "2")
    found = run(folder, [{"do": "answer", "rows": rows, "tokens": 6}], *settings, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    InPeft(folder).check(rows, found[0])


def damaged(folder: Path, of: Path, **settings: Any) -> Path:
    shutil.copytree(of, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


def test_what_is_refused_does_not_stop_the_others(folder: Path) -> None:
    """The engine has a process of its own here, which a fault in a step would end."""
    one, fine = folder / "one", rows_of(prompts_of(6), folder / "plain", None)
    order = json.loads((one / "adapter_config.json").read_text(encoding="utf-8"))["experts"]
    faults = {
        "old": ({"experts": None}, "did not write down the order of each layer's experts"),
        "greedy": ({"top_k": 9}, "top_k is 9 for 7 experts"),
        "reordered": ({"experts": {layer: names[::-1] for layer, names in order.items()}}, "or is damaged"),
        "large": ({"r": 99}, "LoRA rank 99 is greater than max_lora_rank"),
    }
    steps = []
    for name, (settings, _) in faults.items():
        bad = damaged(folder / name, one, **settings)
        steps += [{"do": "load", "folder": str(bad)}, {"do": "answer", "rows": fine, "tokens": 4}]
    # Of a model whose other sizes are the same: vLLM finds out while it writes into a slot, and what it wrote is nobody's.
    config = AutoConfig.from_pretrained(folder / "base", intermediate_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wider")
    wide = write_routed(folder / "wide", folder / "wider", 7)
    steps += [{"do": "load", "folder": str(wide)}] * 2
    steps += [{"do": "answer", "rows": rows_of(prompts_of(6), folder / "two", folder / "plain"), "tokens": 4}]
    found = run(folder, steps, "--max-loras", "2", IN_ONE_PIECE, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    reference = InPeft(folder)
    for (_, reason), refused, answered in zip(faults.values(), found[:8:2], found[1:8:2], strict=True):
        assert reason in refused["error"]
        reference.check(fine, answered)
    for refused in found[-3:-1]:
        assert "The size of tensor" in refused["error"]
    reference.check(rows_of(prompts_of(6), folder / "two", folder / "plain"), found[-1])


@pytest.mark.parametrize(
    ("arguments", "version", "reason"),
    [
        ((), "", "chunked prefill is on: start vLLM with --no-enable-chunked-prefill"),
        ((IN_ONE_PIECE, "--max-num-batched-tokens", "128", "--max-num-scheduled-tokens", "64"), "", "a step takes 64 tokens"),
        ((IN_ONE_PIECE, "--lora-target-modules", "qkv_proj", "o_proj"), "", "vLLM adapts no modules model.layers.0.mlp.gate_proj"),
        ((IN_ONE_PIECE,), "0.99.1", "lora_router"),  # vLLM's own words
    ],
)
def test_settings_that_cannot_be_right(folder: Path, arguments: tuple[str, ...], version: str, reason: str) -> None:
    rows = rows_of(prompts_of(6), None) if "--lora-target-modules" in arguments else rows_of(prompts_of(6), folder / "plain", None)
    steps = [{"do": "load", "folder": str(folder / "one")}, {"do": "answer", "rows": rows, "tokens": 4}]
    if not arguments:  # what is loaded first is refused there
        steps[0] = {"do": "answer", "rows": rows_of(prompts_of(5), folder / "one"), "tokens": 4}
    found = run(folder, steps, "--max-loras", "2", *arguments, version=version)
    assert reason in found[0]["error"]
    InPeft(folder).check(rows, found[1])


def test_base_rows_stay_base_rows_where_that_is_asked_for(folder: Path) -> None:
    """In vLLM 0.32 on a processor they get the adapter of the last slot, where all slots are taken; and so without CPU_LORA."""
    rows = rows_of(prompts_of(5, 9), folder / "plain", None)
    steps = [{"do": "answer", "rows": rows, "tokens": 6}]
    reference = InPeft(folder)
    reference.check(rows, run(folder, steps, "--max-loras", "1")[0])
    [without] = run(folder, steps, "--max-loras", "1", unset=[CPU_LORA])
    reference.check(rows[::2], without[::2])
    with pytest.raises(AssertionError):
        reference.check(rows[1::2], without[1::2])


@pytest.mark.parametrize("kinds", [["lm_head"], ["embed_tokens"]], ids=lambda kinds: kinds[0])
def test_base_rows_have_the_embedding_and_the_head_of_the_base(folder: Path, tmp_path: Path, kinds: list[str]) -> None:
    """They go another way through vLLM than linear layers do. Where all slots are taken, base rows alone are wrong there, too."""
    adapter = write_adapter(tmp_path / "adapter", folder / "base", 5, target_modules=["q_proj", *kinds])
    rows, alone = rows_of(prompts_of(5, 9), adapter, None), rows_of(prompts_of(7), None)
    steps = [{"do": "answer", "rows": some, "tokens": 6} for some in (rows, alone)]
    reference = InPeft(folder)
    for some, found in zip((rows, alone), run(folder, steps, "--max-loras", "1"), strict=True):
        reference.check(some, found)
    without = run(folder, steps, "--max-loras", "1", unset=[CPU_LORA])
    reference.check(rows[::2], without[0][::2])
    with pytest.raises(AssertionError):
        reference.check(rows[1::2], without[0][1::2])


def test_routed_rows_by_vllms_own_products(folder: Path) -> None:
    """As on a GPU; here with a slot to spare."""
    rows = rows_of(prompts_of(1, 5, 17, 40), folder / "one", folder / "two", folder / "plain", None)
    steps = [{"do": "answer", "rows": rows, "tokens": 6}]
    InPeft(folder).check(rows, run(folder, steps, "--max-loras", "4", IN_ONE_PIECE, unset=[CPU_LORA])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_in_peft(tmp_path: Path, family: str) -> None:
    base = write_base(tmp_path / family, family)
    adapters = [write_routed(tmp_path / "routed", base, 1), write_adapter(tmp_path / "plain", base, 2)]
    adapters.append(write_adapter(tmp_path / "uneven", base, 3, **UNEVEN))
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    for found in check_in_vllm(adapters, str(rows), python=str(PYTHON), prompts=3, tokens=6):
        assert found.holds, found
