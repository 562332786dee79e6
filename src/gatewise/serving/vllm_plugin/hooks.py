"""What the plug-in puts into vLLM, and where: the only file that imports it.

    front end    a request is refused before it is queued
    engine       keys and values of routed requests are nobody else's
    worker       routers are loaded with their adapter, and an adapter again as it was; a step says which tokens are whose; modules
                 multiply gates between A and B

All of it was read in the versions of ``TESTED``. In others nothing is changed, and vLLM itself refuses the routers of an adapter.
Each function here whose first argument is ``theirs`` stands in for the one of vLLM's of this name, and gets that one to call.
"""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

from gatewise.errors import GatewiseError, reason_of
from gatewise.serving.engines import CPU_LORA, ROUTER
from gatewise.serving.server.vllm_server import client_name
from gatewise.serving.vllm_plugin.adapter import is_routed, read_routed
from gatewise.serving.vllm_plugin.held import Held, OpenFiles
from gatewise.serving.vllm_plugin.products import Groups, add_lora, forget
from gatewise.serving.vllm_plugin.refusals import why_not, why_not_request
from gatewise.serving.vllm_plugin.routing import Part, Placed, Routing

logger = logging.getLogger(__name__)

TESTED = "0.32."
"""How the versions of vLLM begin that ``make test-serve`` was run with."""

# What is put on objects of vLLM.
_CONFIG, _ROUTING, _PLACED, _PARTS, _GATES, _GROUPS, _OWN, _HELD, _IN_STEP = (
    f"gatewise_{name}" for name in ("config", "routing", "placed", "parts", "gates", "groups", "own", "held", "in_step")
)
_numbers = count()  # of this process's requests
_is_installed = False


def install() -> None:
    """Puts the plug-in into this process's vLLM, once. Never raises: vLLM would not start."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    import vllm

    version = str(vllm.__version__)
    try:
        if not version.startswith(TESTED):
            raise GatewiseError(f"it is version {version}, and gatewise was tried with {TESTED}x alone")
        _install_all()
    except Exception as error:
        logger.warning("routed adapters cannot be served by this vLLM: %s", reason_of(error))


def _install_all() -> None:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    _replace(InputProcessor, "process_inputs", process_inputs)
    for mixin in (BeamSearchOfflineMixin, BeamSearchOnlineMixin):
        _replace(mixin, "beam_search", beam_search)
    for module in (kv_cache_utils, block_pool):  # which imports it by name
        _replace(module, "generate_block_hash_extra_keys", generate_block_hash_extra_keys)
    for engine in (AsyncLLM, LLMEngine, EngineCore):
        _replace(engine, "add_lora", add_lora_request)
    _replace(WorkerLoRAManager, "__init__", keep_config)
    _replace(WorkerLoRAManager, "_load_adapter", load_adapter)
    _replace(LRUCacheWorkerLoRAManager, "_apply_adapters", apply_adapters)
    _replace(WorkerLoRAManager, "remove_adapter", remove_adapter)
    _replace(LoRAModelManager, "activate_adapter", activate_adapter)
    _replace(Worker, "execute_model", execute_model)
    _replace(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)
    _replace(SecondModelRunner, "prepare_inputs", prepare_inputs)
    _replace(LoRAModelRunnerMixin, "_set_active_loras", begin_step)
    _replace(BaseLinearLayerWithLoRA, "_apply_lora_to_output", apply_lora_to_output)
    for module in (lora_ops, punica_cpu):  # which imports it by name
        _replace(module, "bgmv_expand", bgmv_expand)


def _replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    theirs = getattr(owner, name)

    @wraps(theirs)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    setattr(owner, name, call)


# ---------------------------------------------------------------- front end and engine


def _asks_routed(lora_request: Any) -> bool:
    """Whether a request's adapter is routed, as it was when its number was first asked for in this process."""
    return lora_request is not None and _is_routed(lora_request.lora_int_id, lora_request.lora_path)


@lru_cache(maxsize=4096)
def _is_routed(number: int, path: str) -> bool:
    return is_routed(_folder(path))


def add_lora_request(theirs: Any, self: Any, lora_request: Any) -> Any:
    _asks_routed(lora_request)  # while its folder is there
    return theirs(self, lora_request)


def _folder(path: str) -> str:
    from vllm.lora.utils import get_adapter_absolute_path

    return str(get_adapter_absolute_path(path))


def _refusal(config: Any) -> str | None:
    from vllm import envs
    from vllm.platforms import current_platform

    return why_not(config, current_platform, bool(envs.VLLM_LORA_ENABLE_DUAL_STREAM))


def _raise(message: str) -> None:
    """One of vLLM's own errors, for which a server answers 400."""
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(message)


def process_inputs(theirs: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = theirs(self, *args, **kwargs)
    if _asks_routed(request.lora_request) and (why := _refusal(self.vllm_config) or why_not_request(request)):
        name = client_name(request.lora_request.lora_name)
        _raise(f"the request for the routed adapter {name} is refused, for routed adapters {why}")
    return request


def beam_search(theirs: Any, *args: Any, **kwargs: Any) -> Any:
    given = signature(theirs).bind(*args, **kwargs).arguments.get("lora_request")
    for one in given if isinstance(given, Sequence) else [given]:
        if one is not None and _asks_routed(one):
            _raise(
                f"beam search with the routed adapter {client_name(one.lora_name)} is refused, for vLLM reads what was written as "
                "a new prompt at every token, by which other modules would be chosen: sample, or write greedily"
            )
    return theirs(*args, **kwargs)


def generate_block_hash_extra_keys(theirs: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """What blocks of the prefix cache have in their key beside their tokens."""
    found, following = theirs(request, *args, **kwargs)
    if not _asks_routed(request.lora_request):
        return found, following
    # Keys and values of a prompt's first tokens depend on the whole prompt, which chooses the modules. Request ids may come again.
    own = request.__dict__.setdefault(_OWN, str(next(_numbers)))
    return (*(found or ()), ("gatewise", own)), following


# ---------------------------------------------------------------- worker


def keep_config(theirs: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    theirs(self, vllm_config, *args, **kwargs)
    setattr(self, _CONFIG, vllm_config)


def apply_adapters(theirs: Any, self: Any, lora_requests: Any) -> None:
    """A step loads the adapters of its requests that were put aside."""
    setattr(self, _IN_STEP, True)
    try:
        theirs(self, lora_requests)
    finally:
        setattr(self, _IN_STEP, False)


def remove_adapter(theirs: Any, self: Any, adapter_id: int) -> Any:
    self.__dict__.get(_HELD, Held()).let_go(adapter_id)
    return theirs(self, adapter_id)


def load_adapter(theirs: Any, self: Any, lora_request: Any) -> Any:
    held, number = self.__dict__.setdefault(_HELD, Held()), lora_request.lora_int_id
    is_kept = self.__dict__.get(_IN_STEP) and number in held
    if not is_kept or lora_request.load_inplace:  # who asks for load_inplace wants what lies in the folder now
        try:
            return _from_its_folder(theirs, self, lora_request, held)
        except Exception:  # in a step an error ends the engine
            if not is_kept:
                raise
    with held[number].as_folder() as folder:
        from_held = copy.copy(lora_request)
        from_held.lora_path = folder
        return _loaded(theirs, self, from_held, asked=lora_request)


def _from_its_folder(theirs: Any, self: Any, lora_request: Any, held: Held) -> Any:
    files = OpenFiles(_folder(lora_request.lora_path))
    try:
        lora = _loaded(theirs, self, lora_request, asked=lora_request)
    except BaseException:
        files.close()
        raise
    if files:
        held.keep(lora_request.lora_int_id, files)
    return lora


def _loaded(theirs: Any, self: Any, lora_request: Any, asked: Any) -> Any:
    """An adapter with its routers.

    Args:
        asked: the request as it came, whose path may be another.
    """
    path = asked.lora_path
    folder = _folder(lora_request.lora_path)
    routed = is_routed(folder)
    if routed != _asks_routed(asked):  # requests and keys of the prefix cache count on what it was
        name = client_name(asked.lora_name)
        if not Path(folder).is_dir():
            raise GatewiseError(f"the folder of the adapter {name} ({path}) is gone: put it back, or ask for it no more")
        raise GatewiseError(
            f"the adapter {name} ({path}) is {'' if routed else 'not '}routed, unlike what was "
            "asked for by its number before: load it under another name"
        )
    if not routed:
        return theirs(self, lora_request)
    config, manager = getattr(self, _CONFIG), self._adapter_manager
    if why := _refusal(config):
        raise GatewiseError(f"the routed adapter {path} cannot be served, for routed adapters {why}")
    adapter = read_routed(folder, config.model_config.get_hidden_size())
    model = manager.model
    before = getattr(model, "lora_skip_prefixes", None)
    model.lora_skip_prefixes = [*(before or []), f"{ROUTER}."]
    try:
        lora = theirs(self, lora_request)
    finally:
        model.lora_skip_prefixes = before
    setattr(lora, _PLACED, _routing_of(manager).place(adapter, partial(_name_of, model)))
    return lora


def _name_of(model: Any, path: str) -> str:
    """What vLLM calls a module of the base model, before it packs some into one."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    name, _ = parse_fine_tuned_lora_name(f"base_model.model.{path}.lora_A.weight", mapper and mapper.get_rename_mapper())
    return str(name)


def _routing_of(manager: Any) -> Routing:
    """The gates of a worker, made when its first routed adapter is loaded."""
    from vllm.distributed import get_tp_group

    found = manager.__dict__.get(_ROUTING)
    if found is None:
        modules = {
            path: _experts_of(path, module, manager) for path, module in manager.modules.items() if hasattr(module, "output_slices")
        }
        found = Routing(manager.model, modules, manager.max_num_batched_tokens, manager.device, get_tp_group().broadcast)
        setattr(manager, _ROUTING, found)
        for path in modules:
            setattr(manager.modules[path], _GATES, (found, path))
    return found


def _experts_of(path: str, module: Any, manager: Any) -> list[str | None]:
    """The experts that the slices of a module with LoRA are."""
    above, _, last = path.rpartition(".")
    names: list[str | None] = [f"{above}.{name}" for name in manager.packed_modules_mapping.get(last) or [last]]
    slices = len(module.output_slices)
    if len(names) == 1:
        return names * slices
    return [*names] if len(names) == slices else [None] * slices


def execute_model(theirs: Any, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    manager = getattr(getattr(self.model_runner, "lora_manager", None), "_adapter_manager", None)
    routing = getattr(manager, _ROUTING, None)
    if routing is not None:
        routing.release(scheduler_output.finished_req_ids)
    return theirs(self, scheduler_output, *args, **kwargs)


def set_active_loras(theirs: Any, self: Any, input_batch: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
    """What a step computes; a dry run calls ``_set_active_loras`` alone."""
    setattr(self, _PARTS, partial(_parts, input_batch, num_scheduled_tokens))
    return theirs(self, input_batch, num_scheduled_tokens, *args, **kwargs)


def _parts(batch: Any, tokens: Any) -> list[Part]:
    return [
        Part(
            request=batch.req_ids[index],
            adapter=int(batch.request_lora_mapping[index]),
            tokens=int(tokens[index]),
            computed=int(batch.num_computed_tokens_cpu[index]),
            prompt=int(batch.num_prompt_tokens[index]),
        )
        for index in range(batch.num_reqs)
    ]


def prepare_inputs(theirs: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The same in model runner V2, which calls ``_set_active_loras`` next."""
    batch = theirs(self, *args, **kwargs)
    if self.lora_config:
        setattr(self, _PARTS, partial(_parts_v2, self, batch))
    return batch


def _parts_v2(runner: Any, batch: Any) -> list[Part]:
    at = batch.idx_mapping_np
    numbers = zip(
        runner.lora_state.lora_ids[at].tolist(),
        batch.num_scheduled_tokens.tolist(),
        # A bound, which is reached where nothing is drafted.
        batch.num_computed_tokens_np.tolist(),
        # Not prefill_len, which counts what a request had written before it was preempted.
        runner.req_states.prompt_len.np[at].tolist(),
        strict=True,
    )
    return [Part(request, *one) for request, one in zip(batch.req_ids, numbers, strict=True)]


def begin_step(theirs: Any, self: Any, prompts: Any, tokens: Any, lora_requests: Any, *args: Any, **kwargs: Any) -> None:
    theirs(self, prompts, tokens, lora_requests, *args, **kwargs)  # which loads them
    parts = self.__dict__.pop(_PARTS, None)
    manager = self.lora_manager._adapter_manager
    routing, same_gates = getattr(manager, _ROUTING, None), True
    if routing is not None and parts is not None:
        same_gates = routing.begin(parts(), partial(_placed, manager))
    elif routing is not None:  # a dry run
        routing.idle()
        same_gates = False
    if manager.device.type == "cpu" and _on_processors():
        _group(manager, tuple(map(int, tokens)), same_gates)


def _on_processors() -> bool:
    return os.environ.get(CPU_LORA, "0") not in ("", "0")


def _placed(manager: Any, adapter: int) -> Placed | None:
    found: Placed | None = getattr(manager.get_adapter(adapter), _PLACED, None)
    return found


def _group(manager: Any, adapters: tuple[int, ...], same_gates: bool) -> None:
    """Tells the modules whose the tokens of a step are; as in the step before where it is like that one."""
    of_step = (adapters, tuple(manager.lora_index_to_id))
    before, groups = manager.__dict__.get(_GROUPS, (None, None))
    if of_step != before or not same_gates:
        groups = Groups(*of_step)
        setattr(manager, _GROUPS, (of_step, groups))
        # The first is the language model's. A part that reads images has other tokens, perhaps as many.
        setattr(next(iter(manager.punica_wrapper_mapping.values())), _GROUPS, groups)


def activate_adapter(theirs: Any, self: Any, lora_id: int) -> bool:
    try:
        activated: bool = theirs(self, lora_id)
    except Exception:
        # It is in a slot, half of it written, and the next request would find it loaded.
        self.remove_adapter(lora_id)
        raise
    if activated:
        self.__dict__.pop(_GROUPS, None)
        for module in self.modules.values():
            forget(module, self.lora_index_to_id.index(lora_id))
    return activated


def apply_lora_to_output(theirs: Any, self: Any, x: Any, output: Any) -> Any:
    routing, path = getattr(self, _GATES, (None, ""))
    groups: Groups | None = getattr(self.punica_wrapper, _GROUPS, None)
    tokens = x.shape[:-1].numel()
    gates_of = partial(routing.gates, path, tokens) if routing is not None and routing.is_at_work else None
    if groups is not None and groups.tokens == tokens:
        return groups.add(self, x, output, gates_of)
    if gates_of is None:
        return theirs(self, x, output)
    gates = gates_of()
    return output if gates is None else add_lora(self, x, output, gates)


def bgmv_expand(theirs: Any, inputs: Any, weights: Any, output: Any, indices: Any, *args: Any, **kwargs: Any) -> None:
    """Of the embedding and the output head, on processors: the index of rows without an adapter is -1, which is the last slot."""
    if _on_processors():
        inputs = inputs * (indices >= 0)[:, None]
    theirs(inputs, weights, output, indices, *args, **kwargs)
