"""What the plug-in for vLLM (gatewise.serving.vllm_plugin) replaces or reads there, private or not, as it was read in vLLM 0.32.

Before the plug-in changes anything it looks all of it up, and changes nothing where something is not as it was.
"""

from gatewise.internals.private_names import PrivateName

_HOOKS = ("serving/vllm_plugin/hooks.py",)
_MANAGER, _WORKER_MANAGER = "vllm.lora.model_manager:LoRAModelManager", "vllm.lora.worker_manager:WorkerLoRAManager"
_MIXIN, _LINEAR = (
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA",
)
_BATCH, _OPS = "vllm.v1.worker.gpu_input_batch:InputBatch", "vllm.lora.ops.torch_ops.lora_ops"
_RUNNER_V2, _BATCH_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner", "vllm.v1.worker.gpu.input_batch:InputBatch"

VLLM_NAMES = (
    # An adapter is loaded, and put into the model
    PrivateName(_WORKER_MANAGER, "__init__", "keeps the settings", ("vllm_config", "device"), _HOOKS),
    PrivateName(_WORKER_MANAGER, "_load_adapter", "reads the routers of an adapter with it", ("lora_request",), _HOOKS),
    PrivateName(_WORKER_MANAGER, "remove_adapter", "forgets what an adapter was", ("adapter_id",), _HOOKS),
    PrivateName(_WORKER_MANAGER, "list_adapters", "knows which adapters are there", (), _HOOKS),
    PrivateName(_WORKER_MANAGER, "_adapter_manager", "finds the modules with LoRA", None, _HOOKS),
    PrivateName(_MANAGER, "activate_adapter", "learns which slot holds another adapter", ("lora_id",), _HOOKS),
    PrivateName(_MANAGER, "remove_adapter", "takes out one that does not fit", ("adapter_id",), _HOOKS),
    PrivateName(_MANAGER, "modules", "finds the modules with LoRA", None, _HOOKS),
    PrivateName(_MANAGER, "packed_modules_mapping", "finds the experts that a module is packed of", None, _HOOKS),
    PrivateName(_MANAGER, "lora_index_to_id", "finds an adapter's slot", None, _HOOKS),
    PrivateName(_MANAGER, "punica_wrapper_mapping", "tells modules whose the tokens of a step are", None, _HOOKS),
    PrivateName(_MANAGER, "max_num_batched_tokens", "has a row for every token", None, _HOOKS),
    PrivateName(_MANAGER, "get_adapter", "finds an adapter by its number", ("adapter_id",), _HOOKS),
    PrivateName("vllm.lora.utils", "parse_fine_tuned_lora_name", "calls a module as vLLM does", ("name", "weights_mapper"), _HOOKS),
    PrivateName("vllm.lora.utils", "get_adapter_absolute_path", "finds an adapter's folder", ("lora_path",), _HOOKS),
    # What a step computes
    PrivateName(
        "vllm.v1.worker.gpu_worker:Worker", "execute_model", "learns which requests have ended", ("scheduler_output",), _HOOKS
    ),
    PrivateName(_MIXIN, "set_active_loras", "learns what a step computes", ("input_batch", "num_scheduled_tokens"), _HOOKS),
    PrivateName(
        _MIXIN,
        "_set_active_loras",
        "begins a step once its adapters are loaded",
        ("prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
        _HOOKS,
    ),
    PrivateName(_BATCH, "req_ids", "the requests of a step, in the order of their tokens", None, _HOOKS),
    PrivateName(_BATCH, "num_reqs", "how many", None, _HOOKS),
    PrivateName(_BATCH, "request_lora_mapping", "their adapters", None, _HOOKS),
    PrivateName(_BATCH, "num_prompt_tokens", "their prompts", None, _HOOKS),
    PrivateName(_BATCH, "num_computed_tokens_cpu", "what of them was computed before", None, _HOOKS),
    # The same in model runner V2
    PrivateName(
        _RUNNER_V2, "prepare_inputs", "learns what a step computes", ("scheduler_output", "batch_req_state", "batch_desc"), _HOOKS
    ),
    PrivateName(_RUNNER_V2, "lora_config", "whether there are adapters", None, _HOOKS),
    PrivateName(_RUNNER_V2, "lora_state", "has the adapters of requests", None, _HOOKS),
    PrivateName(_RUNNER_V2, "req_states", "has their prompts", None, _HOOKS),
    PrivateName("vllm.v1.worker.gpu.lora_utils:LoraState", "lora_ids", "their adapters", None, _HOOKS),
    PrivateName("vllm.v1.worker.gpu.states:RequestState", "prompt_len", "their prompts", None, _HOOKS),
    PrivateName("vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor", "np", "the same, in the memory of the processor", None, _HOOKS),
    PrivateName(_BATCH_V2, "req_ids", "the requests of a step, in the order of their tokens", None, _HOOKS),
    PrivateName(_BATCH_V2, "idx_mapping_np", "where their states are", None, _HOOKS),
    PrivateName(_BATCH_V2, "num_scheduled_tokens", "their tokens", None, _HOOKS),
    PrivateName(_BATCH_V2, "num_computed_tokens_np", "what of them was computed before", None, _HOOKS),
    # While the model runs
    PrivateName(_LINEAR, "_apply_lora_to_output", "puts gates between A and B", ("x", "output"), _HOOKS),
    PrivateName(_LINEAR, "output_slices", "finds the experts that a module is packed of", None, _HOOKS),
    PrivateName(
        _OPS,
        "bgmv_expand",
        "adds nothing to rows without an adapter",
        ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
        _HOOKS,
    ),
    PrivateName(
        _OPS, "bgmv_expand_slice", "the same", ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"), _HOOKS
    ),
    # Requests
    *(
        PrivateName(
            f"vllm.v1.core.{module}",
            "generate_block_hash_extra_keys",
            "keeps keys and values of requests apart",
            ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
            _HOOKS,
        )
        for module in ("kv_cache_utils", "block_pool")
    ),
    PrivateName("vllm.v1.request:Request", "num_prompt_tokens", "knows where a prompt ends", None, _HOOKS),
    PrivateName("vllm.v1.request:Request", "_block_hasher", "finds what the adapters of its engine are", None, _HOOKS),
    PrivateName("vllm.v1.engine.core:EngineCore", "request_block_hasher", "leaves it there", None, _HOOKS),
    PrivateName("vllm.v1.engine.core:EngineCore", "add_lora", "learns what adapters are", ("lora_request",), _HOOKS),
    PrivateName("vllm.v1.engine.core:EngineCore", "remove_lora", "forgets it", ("lora_id",), _HOOKS),
    PrivateName(
        "vllm.v1.engine.input_processor:InputProcessor",
        "process_inputs",
        "refuses requests",
        ("request_id", "prompt", "params"),
        _HOOKS,
    ),
    PrivateName(
        "vllm.v1.engine.core:EngineCore", "preprocess_add_request", "refuses those that came another way", ("request",), _HOOKS
    ),
    PrivateName(
        "vllm.v1.engine.llm_engine:LLMEngine",
        "add_request",
        "loads an adapter before its first request",
        ("request_id", "prompt", "params"),
        _HOOKS,
    ),
    PrivateName("vllm.v1.engine.async_llm:AsyncLLM", "add_request", "the same", ("request_id", "prompt", "params"), _HOOKS),
    PrivateName(
        "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin",
        "beam_search",
        "refuses it",
        ("prompts", "params", "lora_request"),
        _HOOKS,
    ),
    PrivateName(
        "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin",
        "beam_search",
        "the same",
        ("prompt", "request_id", "params", "lora_request"),
        _HOOKS,
    ),
)
