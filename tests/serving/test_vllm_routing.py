"""The plug-in for vLLM without vLLM: adapters in their folders, the table of gates, refusals. test_vllm_routed.py has the rest."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from routed_models import routed_config, trained_routers
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, tiny_base
from torch import Tensor, nn

from gatewise.errors import GatewiseError
from gatewise.routed.router import gates_of
from gatewise.serving.engines import CPU_LORA
from gatewise.serving.vllm_plugin import hooks
from gatewise.serving.vllm_plugin.adapter import is_routed, read_routed
from gatewise.serving.vllm_plugin.held import Held, OpenFiles
from gatewise.serving.vllm_plugin.products import Groups, add_lora, forget
from gatewise.serving.vllm_plugin.refusals import FAMILIES, why_not, why_not_request
from gatewise.serving.vllm_plugin.routing import Part, Routing

D = 16  # of the tiny models
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(tiny_base("llama"), routed_config(top_k=2))
    trained_routers(random_adapter(model)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- the folder ----


def test_an_adapter_is_read_as_it_was_saved(folder: Path) -> None:
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    found = read_routed(folder, D)
    assert is_routed(folder)
    assert (found.top_k, found.normalize_gates) == (2, True)
    assert {layer.path: list(layer.experts) for layer in found.layers} == config["experts"]
    for layer in found.layers:
        key = f"base_model.model.{layer.path}.{layer.experts[0]}.lora_router.weight"
        assert torch.equal(layer.router.weight, tensors[key])


def test_what_is_no_routed_adapter(folder: Path, tmp_path: Path) -> None:
    config = folder / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "peft_type": "LORA"}))
    assert not any(map(is_routed, (tmp_path, tmp_path / "nowhere", folder)))
    config.write_text("[]")
    assert not is_routed(folder)


def rewrite(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_damaged_adapters_are_refused(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    order = json.loads((folder / "adapter_config.json").read_text())["experts"]
    with pytest.raises(GatewiseError, match="does not fit a model of hidden size 24, or is damaged"):
        read_routed(folder, 24)
    rewrite(folder, experts=None)
    with pytest.raises(GatewiseError, match="did not write down the order of each layer's experts"):
        read_routed(folder, D)
    for experts, reason in (
        ({layer: names[1:] for layer, names in order.items()}, "damaged"),  # the router's module is another one
        ({layer: [*names, "mlp.more"] for layer, names in order.items()}, "size mismatch"),
        (dict(list(order.items())[:-1]), "has no such layer"),
        ([], "damaged"),
    ):
        rewrite(folder, experts=experts)
        with pytest.raises(GatewiseError, match=reason):
            read_routed(folder, D)
    rewrite(folder, experts=order, top_k=9)
    with pytest.raises(GatewiseError, match="top_k is 9 for 7 experts"):
        read_routed(folder, D)
    rewrite(folder, top_k=2, adapt="after_prompt")
    with pytest.raises(GatewiseError, match="was trained with adapt='after_prompt', which gatewise has no more"):
        read_routed(folder, D)
    rewrite(folder, adapt="always")
    for name in ("weight", "center"):
        broken = {key: value * torch.nan if key.endswith(f"lora_router.{name}") else value for key, value in weights.items()}
        save_file(broken, folder / "adapter_model.safetensors")
        with pytest.raises(GatewiseError, match=r"or is damaged \(the router of \S+ has numbers that are not finite\)"):
            read_routed(folder, D)
    save_file(
        {key: value for key, value in weights.items() if not key.endswith("lora_router.weight")},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(GatewiseError, match="or is damaged"):
        read_routed(folder, D)


def test_a_folder_that_is_gone_is_told_as_such(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_folder", str)
    asked = SimpleNamespace(lora_name="one", lora_int_id=-7, lora_path=str(folder))
    hooks.add_lora_request(lambda *_: None, None, asked)
    folder.rename(tmp_path / "moved")
    with pytest.raises(GatewiseError, match=f"the folder of the adapter one \\({folder}\\) is gone"):
        hooks._loaded(None, None, asked, asked)


# ---- the table ----


class Punica:
    """vLLM's products, row by row: ``adapters`` (n) are the numbers of their slots, -1 for none."""

    def __init__(self, adapters: list[int]) -> None:
        self.adapters = adapters

    def add_shrink(self, y: Tensor, x: Tensor, a: tuple[Tensor, ...], scale: float) -> None:
        for s, factor in enumerate(a):
            for row, adapter in enumerate(self.adapters):
                if adapter >= 0:
                    y[s, row] += scale * factor[adapter, 0] @ x[row]

    def add_expand(self, y: Tensor, x: Tensor, b: tuple[Tensor, ...], slices: tuple[int, ...], add_inputs: bool) -> None:
        assert add_inputs
        start = 0
        for s, factor in enumerate(b):
            for row, adapter in enumerate(self.adapters):
                if adapter >= 0:
                    y[row, start : start + slices[s]] += factor[adapter, 0] @ x[s, row]
            start += slices[s]


class Layer(nn.Module):
    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> Tensor:
        return hidden_states


class Engine(nn.Module):
    """A model with vLLM's names, whose layers do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(), Layer()])


def modules_of_vllm() -> dict[str, list[str | None]]:
    made: dict[str, list[str | None]] = {}
    for layer in range(2):
        at = f"model.layers.{layer}"
        made[f"{at}.self_attn.qkv_proj"] = [f"{at}.self_attn.{name}" for name in NAMES[:3]]
        made[f"{at}.self_attn.o_proj"] = [f"{at}.self_attn.o_proj"]
        made[f"{at}.mlp.gate_up_proj"] = [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]
        made[f"{at}.mlp.down_proj"] = [f"{at}.mlp.down_proj"]
    made["model.other"] = [None, None]
    return made


def test_each_token_has_the_gates_of_its_request(folder: Path) -> None:
    engine, adapter = Engine(), read_routed(folder, D)
    routing = Routing(engine, modules_of_vllm(), 64, torch.device("cpu"))
    placed = routing.place(adapter, lambda path: path)
    torch.manual_seed(1)
    hidden, residual = torch.randn(2, 20, D).unbind()
    parts = [Part("plain", 1, 3, 0, 3), Part("one", 2, 5, 0, 5), Part("base", 0, 2, 0, 2), Part("two", 2, 7, 0, 7)]
    routing.begin(parts, {1: None, 2: placed}.get)
    for layer in engine.model.layers:
        layer(torch.arange(20), hidden, residual=residual)
    ones, zeros, expected = torch.ones(3), torch.zeros(2), {}
    for start, end in ((3, 8), (10, 17)):
        for layer in adapter.layers:
            states = (hidden + residual)[None, start:end]
            p = layer.router(states, torch.ones(1, end - start, dtype=torch.bool))
            for name, gate in zip(layer.experts, gates_of(p, 2, True)[0], strict=True):
                expected[start, f"{layer.path}.{name}"] = gate
    for path, names in modules_of_vllm().items():
        gates = routing.gates(path, 17)
        for s, name in enumerate(names):
            own = [ones[:1] if name is None else expected[at, name].expand(1) for at in (3, 10)]
            if name is None:
                assert gates[s, :3].eq(1).all()
                continue
            wanted = torch.cat([ones, own[0].expand(5), zeros, own[1].expand(7)])
            assert torch.equal(gates[s, :, 0], wanted)

    # In the next step each has a token; what nobody keeps is left out.
    routing.begin([Part("two", 2, 1, 7, 7), Part("one", 2, 1, 5, 5)], {2: placed}.get)
    for path, names in modules_of_vllm().items():
        gates = routing.gates(path, 2)
        wanted = [[expected.get((at, name or ""), 0) for at in (10, 3)] for name in names]
        assert (gates is None) == (not any(map(any, wanted)))
        if gates is not None:
            assert torch.equal(gates[..., 0], torch.tensor(wanted))

    # After a preemption the prompt and what was written are computed once more, maybe from the middle: by the gates of the prompt.
    routing.begin([Part("one", 2, 6, 3, 5)], {2: placed}.get)
    engine.model.layers[0](torch.arange(6), torch.randn(6, D), None)
    name = "model.layers.0.self_attn.o_proj"
    gates = routing.gates(name, 6)
    assert torch.equal(torch.zeros(6) if gates is None else gates[0, :, 0], expected[3, name].expand(6))


def test_blocks_of_the_prefix_cache_belong_to_one_routed_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        return (("lora", "name", str(folder)),), start_mm_idx + 1

    monkeypatch.setattr(hooks, "_folder", lambda path: path)
    hooks._is_routed.cache_clear()
    keys = partial(hooks.generate_block_hash_extra_keys, made)
    request = SimpleNamespace(request_id="r", lora_request=SimpleNamespace(lora_path=str(folder), lora_int_id=7))
    (lora, own), following = keys(request, 0, 4, 1)
    assert (lora, following) == (("lora", "name", str(folder)), 2)
    assert keys(request, 4, 8, 1) == ((lora, own), 2)
    again = SimpleNamespace(request_id="r", lora_request=request.lora_request)  # another one that comes later by the same id
    assert keys(again, 0, 4, 1)[0] not in ((lora,), (lora, own))
    # What lies in the folder by now counts for another number, as which it may be loaded.
    rewrite(folder, peft_type="LORA")
    assert keys(request, 0, 4, 1) == ((lora, own), 2)
    request.lora_request = SimpleNamespace(lora_path=str(folder), lora_int_id=8)
    assert keys(request, 0, 4, 1) == ((lora,), 2)
    request.lora_request = None
    assert keys(request, 4, 8, 1) == ((lora,), 2)
    hooks._is_routed.cache_clear()


def test_products_have_gates_between_a_and_b(folder: Path) -> None:
    torch.manual_seed(2)
    routing = Routing(Engine(), modules_of_vllm(), 64, torch.device("cpu"))
    placed = routing.place(read_routed(folder, D), lambda path: path)
    routing.begin([Part("one", 2, 2, 0, 2), Part("base", 0, 1, 4, 4), Part("plain", 1, 1, 4, 4)], {1: None, 2: placed}.get)
    path, slices = "model.layers.1.self_attn.qkv_proj", (6, 4, 4)
    drawn = torch.rand(3)
    gates = torch.stack([drawn, drawn, torch.zeros(3), torch.ones(3)])
    routing._table[routing.requests["one"], routing._of_module[path]] = drawn
    adapters = [1, 1, 1, 0]  # the base row has another's, as in vLLM on a processor
    a, b = torch.randn(3, 2, 1, 3, D), tuple(torch.randn(2, 1, size, 3) for size in slices)
    module = SimpleNamespace(lora_a_stacked=tuple(a), lora_b_stacked=b, output_slices=slices, punica_wrapper=Punica(adapters))
    x, base = torch.randn(4, D), torch.randn(4, sum(slices))
    wanted = base.clone()
    for row, adapter in enumerate(adapters):
        delta = [gates[row, s] * b[s][adapter, 0] @ a[s][adapter, 0] @ x[row] for s in range(3)]
        wanted[row] += torch.cat(delta)
    found = routing.gates(path, 4)
    torch.testing.assert_close(add_lora(module, x, base.clone(), found), wanted)
    torch.testing.assert_close(add_lora(module, x[None], base.clone()[None], found), wanted[None])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [(7, 7, 0, 9, 9, 0), (9, 7, 0, 7, 9, 9), (0, 0, 0, 0, 0, 0), (9, 9, 9, 9, 9, 9)])
def test_products_by_adapter_are_those_of_every_token(tokens: tuple[int, ...], gated: bool) -> None:
    torch.manual_seed(3)
    held, slices = [None, 9, 7], (6, 4, 4)
    a, b = torch.randn(3, 3, 1, 5, D), tuple(torch.randn(3, 1, size, 5) for size in slices)
    # As in vLLM, zeros fill up to the rank limit: one adapter has three ranks in the first slice, and the other none in the last.
    a[0][1, 0, 3:], a[2][2], b[0][1, ..., 3:], b[2][2] = 0, 0, 0, 0
    module = SimpleNamespace(lora_a_stacked=tuple(a), lora_b_stacked=b, output_slices=slices)
    x, base, gates = torch.randn(6, D), torch.randn(6, sum(slices)), torch.rand(3, 6, 1)
    gates[1] = 0  # a slice that nobody keeps
    gates[2, 4:] = 0  # one that some keep

    def wanted(gates: Tensor) -> Tensor:
        found = base.clone()
        for row, number in enumerate(tokens):
            if number:
                slot = held.index(number)
                found[row] += torch.cat(
                    [(gates[s, row] if gated else 1) * b[s][slot, 0] @ a[s][slot, 0] @ x[row] for s in range(3)]
                )
        return found

    asked = []

    def decided(gates: Tensor) -> Any:
        return (lambda: asked.append(1) or gates) if gated else None

    groups = Groups(tokens, held)
    torch.testing.assert_close(groups.add(module, x, base.clone(), decided(gates)), wanted(gates))
    # The same object is for steps with the same gates: they are not asked for again.
    torch.testing.assert_close(groups.add(module, x[None], base.clone()[None], decided(gates)), wanted(gates)[None])
    assert len(asked) == gated
    for same in (torch.ones(3, 6, 1), gates.flip(0)):
        torch.testing.assert_close(Groups(tokens, held).add(module, x, base.clone(), decided(same)), wanted(same))
    assert torch.equal(Groups(tokens, held).add(module, x, base.clone(), lambda: None), base)  # nobody keeps any
    # A slot gets another adapter.
    b[0][1], a[0][1] = torch.randn(1, 6, 5), torch.randn(1, 5, D)
    for slot in (1, 2):
        forget(module, slot)
    torch.testing.assert_close(Groups(tokens, held).add(module, x, base.clone(), decided(gates)), wanted(gates))
    # In half precision it rounds as vLLM does: once before B, and once behind it.
    half = SimpleNamespace(
        lora_a_stacked=tuple(a.bfloat16()), lora_b_stacked=tuple(one.bfloat16() for one in b), output_slices=slices
    )
    found = Groups(tokens, held).add(half, x.bfloat16(), base.bfloat16(), decided(gates))
    torch.testing.assert_close(found.float(), wanted(gates), atol=0.5, rtol=0.05)


def test_a_step_is_told_whether_its_gates_are_the_last_ones(folder: Path) -> None:
    routing = Routing(Engine(), modules_of_vllm(), 64, torch.device("cpu"))
    placed = {1: None, 2: routing.place(read_routed(folder, D), lambda path: path)}.get
    of_one, of_plain = Part("one", 2, 1, 1, 1), Part("plain", 1, 1, 4, 4)
    assert not routing.begin([Part("one", 2, 1, 0, 1), of_plain], placed)  # it reads its prompt
    path = "model.layers.0.self_attn.o_proj"
    routing._table[routing.requests["one"]] = 0.5
    assert not routing.begin([of_one, of_plain], placed)  # a step like the last, but there the gates were not known at first
    assert routing.gates(path, 2)[0, :, 0].tolist() == [0.5, 1]
    assert routing.begin([of_one, of_plain], placed)
    assert routing.gates(path, 2)[0, :, 0].tolist() == [0.5, 1]
    assert not routing.begin([of_plain, of_one], placed)
    assert routing.gates(path, 2)[0, :, 0].tolist() == [1, 0.5]
    # Another request comes into its row.
    routing.release(["one"])
    assert not routing.begin([of_plain, Part("two", 2, 1, 0, 1)], placed)
    assert not routing.begin([of_plain, Part("two", 2, 1, 1, 1)], placed)
    routing.idle()
    assert not routing.begin([of_plain, Part("two", 2, 1, 2, 1)], placed)
    assert not routing.begin([of_plain], placed)
    assert routing.begin([of_plain], placed)


def test_rows_are_freed_and_the_table_grows(folder: Path) -> None:
    routing = Routing(Engine(), modules_of_vllm(), 64, torch.device("cpu"))
    placed = {1: routing.place(read_routed(folder, D), lambda path: path)}.get
    for step in range(4):  # more than there is room for at first
        routing.begin([Part(f"{step}-{one}", 1, 1, 0, 1) for one in range(12)], placed)
    assert len(routing.requests) == 48
    size = len(routing._table)
    assert torch.equal(routing._table[0], torch.ones_like(routing._table[0]))
    assert torch.equal(routing._table[1], torch.zeros_like(routing._table[1]))
    routing.release([f"{step}-{one}" for step in range(4) for one in range(12)] + ["unknown"])
    assert not routing.requests
    for step in range(20):
        routing.begin([Part(f"{step}-{one}", 1, 1, 0, 1) for one in range(12)], placed)
        routing.release([f"{step}-{one}" for one in range(12)])
    assert len(routing._table) == size
    # A name that comes again is another request.
    routing.begin([Part("again", 1, 1, 0, 1)], placed)
    routing.release(["again"])
    with pytest.raises(GatewiseError, match=r"read in pieces \(3 tokens before and 1 now, of 4\)"):
        routing.begin([Part("again", 1, 1, 3, 4)], placed)
    with pytest.raises(GatewiseError, match=r"read in pieces \(0 tokens before and 3 now, of 4\)"):
        routing.begin([Part("cut", 1, 3, 0, 4)], placed)


def test_experts_that_the_engine_does_not_adapt_are_refused(folder: Path) -> None:
    modules = {path: names for path, names in modules_of_vllm().items() if "down_proj" not in path}
    with pytest.raises(GatewiseError, match=r"adapts no modules model\.layers\.0\.mlp\.down_proj.*--lora-target-modules"):
        Routing(Engine(), modules, 64, torch.device("cpu")).place(read_routed(folder, D), lambda path: path)
    strange = Engine()
    strange.model.layers[0] = nn.Linear(2, 2)
    with pytest.raises(GatewiseError, match=r"model\.layers\.0 \(Linear\) is not given hidden_states"):
        Routing(strange, modules_of_vllm(), 64, torch.device("cpu")).place(read_routed(folder, D), lambda path: path)


# ---- what vLLM computes in a step ----


# ---- refusals ----


def engine_config(**changed: Any) -> Any:
    """vLLM's settings as far as they are looked at; "scheduler.enable_chunked_prefill" and the like are changed."""
    none = SimpleNamespace(name="NONE")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=False, long_prefill_token_threshold=0, max_num_batched_tokens=64, max_num_scheduled_tokens=None,
            scheduler_cls=None,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, tensor_parallel_size=2, data_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, use_ubatching=False,
        ),
        model_config=SimpleNamespace(
            max_model_len=64, runner_type="generate", is_encoder_decoder=False, is_multimodal_model=False,
            using_transformers_backend=lambda: False, hf_text_config=SimpleNamespace(model_type="llama"),
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        lora_config=SimpleNamespace(fully_sharded_loras=False),
        compilation_config=SimpleNamespace(mode=none, cudagraph_mode=none),
        speculative_config=None, kv_transfer_config=None, ec_transfer_config=None,
    )  # fmt: skip
    for name, value in changed.items():
        owner, _, last = name.rpartition("__")
        setattr(getattr(config, f"{owner}_config") if owner else config, last, value)
    return config


class Platform:
    device_name = "abacus"

    def __init__(self, kind: str = "cpu") -> None:
        self.kind = kind

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda_alike(self) -> bool:
        return self.kind == "cuda"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"scheduler__enable_chunked_prefill": True}, "--no-enable-chunked-prefill"),
        ({"scheduler__long_prefill_token_threshold": 8}, "pieces of 8 tokens: leave it out"),
        ({"scheduler__max_num_scheduled_tokens": 32}, "a step takes 32 tokens and a text may have 64"),
        ({"scheduler__max_num_batched_tokens": 48}, "a step takes 48 tokens"),
        ({"scheduler__scheduler_cls": "mine"}, "leave --scheduler-cls out"),
        ({"speculative_config": 1}, "leave --speculative-config out"),
        ({"kv_transfer_config": 1}, "leave --kv-transfer-config"),
        ({"ec_transfer_config": 1}, "leave --kv-transfer-config"),
        ({"cache__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill leaves out most of it"),
        ({"parallel__pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2: leave it out"),
        ({"parallel__data_parallel_size": 2}, "--data-parallel-size is 2"),
        ({"parallel__decode_context_parallel_size": 2}, "--decode-context-parallel-size is 2"),
        ({"parallel__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size is 2"),
        ({"parallel__use_ubatching": True}, "micro-batches cut it"),
        ({"lora__fully_sharded_loras": True}, "--fully-sharded-loras puts on several devices: leave it out"),
        ({"compilation__mode": SimpleNamespace(name="VLLM_COMPILE")}, "start vLLM with --enforce-eager"),
        ({"compilation__cudagraph_mode": SimpleNamespace(name="FULL")}, "start vLLM with --enforce-eager"),
        ({"model__runner_type": "pooling"}, "started for pooling: start it with --runner generate"),
        ({"model__is_encoder_decoder": True}, "that read text alone"),
        ({"model__is_multimodal_model": True}, "that read text alone"),
        ({"model__using_transformers_backend": lambda: True}, "without --model-impl transformers"),
        ({"model__hf_text_config": SimpleNamespace(model_type="gpt2")}, "but not with gpt2: serve this adapter with PEFT"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(changed: dict[str, Any], reason: str) -> None:
    assert why_not(engine_config(), Platform(), False) is None
    found = why_not(engine_config(**changed), Platform(), False)
    assert found is not None
    assert reason in found
    assert re.match(r"[a-z].*: [a-z].*[^.]$", found)  # why, and what to do


def test_where_else_it_is_refused() -> None:
    assert why_not(engine_config(), Platform("cuda"), False) is None
    assert "not tried on abacus" in str(why_not(engine_config(), Platform("tpu"), False))
    assert "VLLM_LORA_ENABLE_DUAL_STREAM" in str(why_not(engine_config(), Platform(), True))
    assert all(
        why_not(engine_config(model__hf_text_config=SimpleNamespace(model_type=one)), Platform(), False) is None for one in FAMILIES
    )


def test_requests_that_cannot_be_routed_are_refused() -> None:
    fine = {"prompt_embeds": None, "resumable": False, "mm_features": None}
    assert why_not_request(SimpleNamespace(**fine)) is None
    for changed in ({"prompt_embeds": 1}, {"resumable": True}, {"mm_features": [1]}):
        assert why_not_request(SimpleNamespace(**{**fine, **changed})) is not None


class RunnerV2:
    """vLLM's model runner V2, as far as the plug-in looks: five requests, of which a step computes three in an order of its own."""

    def __init__(self) -> None:
        self.lora_config = SimpleNamespace()
        self.lora_state = SimpleNamespace(lora_ids=np.array([0, 7, 0, 9, 7], dtype=np.int32))
        lengths = {"prompt_len": [3, 5, 4, 6, 2], "prefill_len": [3, 5, 4, 11, 2]}  # the fourth was preempted
        self.req_states = SimpleNamespace(
            **{name: SimpleNamespace(np=np.array(one, dtype=np.int32)) for name, one in lengths.items()}
        )

    def prepare_inputs(self, scheduler_output: Any) -> Any:
        return SimpleNamespace(
            req_ids=["four", "one", "three"],
            idx_mapping_np=np.array([4, 1, 3]),
            num_scheduled_tokens=np.array([1, 5, 9], dtype=np.int32),
            num_computed_tokens_np=np.array([8, 0, 2], dtype=np.int32),
        )


def test_model_runner_v2_tells_what_a_step_computes() -> None:
    begun: list[Any] = []
    runner: Any = RunnerV2()
    routing = SimpleNamespace(begin=lambda parts, _: begun.append(parts), idle=lambda: begun.append(None))
    manager = SimpleNamespace(device=torch.device("meta"), gatewise_routing=routing)
    runner.lora_manager = SimpleNamespace(_adapter_manager=manager)
    begin = partial(hooks.begin_step, lambda *_: None, runner)
    assert hooks.prepare_inputs(RunnerV2.prepare_inputs, runner, None).req_ids == ["four", "one", "three"]
    begin((7, 7, 9), (7,) * 6 + (9,) * 9, set())
    begin((1, 2), (1, 2), set())  # a dry run prepares no inputs
    assert begun == [[Part("four", 7, 1, 8, 2), Part("one", 7, 5, 0, 5), Part("three", 9, 9, 2, 6)], None]


# ---- what was loaded ----


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are kept open on Linux alone")
def test_an_adapter_is_loaded_in_a_step_as_it_was_unless_it_is_to_be_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "_folder", str)
    monkeypatch.setattr(hooks, "_loaded", lambda theirs, self, request, asked: (Path(request.lora_path) / "adapter_x").read_text())
    worker = SimpleNamespace()
    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "adapter_x").write_text(f"state {number}")
    asked = [
        SimpleNamespace(lora_int_id=7, lora_path=str(tmp_path / path), load_inplace=new)
        for path, new in (("1", 0), ("2", 0), ("2", 1))
    ]
    found: list[str] = []
    assert hooks.load_adapter(None, worker, asked[0]) == "state 1"
    for one in asked[1:]:
        hooks.apply_adapters(lambda self, request: found.append(hooks.load_adapter(None, self, request)), worker, one)
    assert found == ["state 1", "state 2"]
    shutil.rmtree(tmp_path / "2")  # what asks for load_inplace does so in each step, and an error there ends the engine
    hooks.apply_adapters(lambda self, request: found.append(hooks.load_adapter(None, self, request)), worker, asked[2])
    assert found[2:] == ["state 2"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="files are kept open on Linux alone")
def test_kept_files_leave_the_process_some_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_x").touch()
    monkeypatch.setattr("resource.getrlimit", lambda _: (24, 64))
    held = Held()
    for number in range(5):
        held.keep(number, OpenFiles(tmp_path))
    assert list(held) == [2, 3, 4]
    for number in list(held):
        held.let_go(number)


@pytest.mark.parametrize(("value", "first"), [("1", 0.0), ("0", 5.0), (None, 5.0)])
def test_rows_without_an_adapter_have_none_on_the_head(monkeypatch: pytest.MonkeyPatch, value: str | None, first: float) -> None:
    """Their index is -1, which is the last slot's: vLLM's own function is stood in for by what it computes."""
    if value is None:
        monkeypatch.delenv(CPU_LORA, raising=False)
    else:
        monkeypatch.setenv(CPU_LORA, value)
    weights = torch.tensor([[[3.0]], [[5.0]]])

    def theirs(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, add_inputs: bool) -> None:
        assert add_inputs
        output += torch.einsum("bi, boi -> bo", inputs, weights[indices])

    output = torch.zeros(2, 1)
    hooks.bgmv_expand(theirs, torch.ones(2, 1), weights, output, torch.tensor([-1, 0]), add_inputs=True)
    assert output[:, 0].tolist() == [first, 3.0]
