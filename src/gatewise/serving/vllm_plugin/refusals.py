"""Where routed adapters cannot be right in vLLM, or were not tried: what was set, why that does not go, what to do.

A routed adapter chooses its modules by the hidden states of the whole prompt. So whatever has vLLM compute a prompt in pieces, or
leave a part of it out, is refused, and so is what was not tried.
"""

from typing import Any

from gatewise.serving.engines import FAMILIES


def why_not(config: Any, platform: Any, dual_stream: bool) -> str | None:
    """Why an engine cannot serve routed adapters, in the words that follow "routed adapters"; None where it can.

    Args:
        config: vLLM's ``VllmConfig``.
        platform: vLLM's ``current_platform``.
        dual_stream: ``VLLM_LORA_ENABLE_DUAL_STREAM``.
    """
    return next((why for is_so, why in (*_in_pieces(config), *_untried(config, platform, dual_stream)) if is_so), None)


def _in_pieces(config: Any) -> list[tuple[bool, str]]:
    """What has vLLM read prompts in pieces."""
    scheduler, longest = config.scheduler_config, config.model_config.max_model_len
    least = min(one for one in (scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens) if one is not None)
    return [
        (
            scheduler.enable_chunked_prefill,
            "read a prompt in one piece, but chunked prefill is on: start vLLM with --no-enable-chunked-prefill",
        ),
        (
            scheduler.long_prefill_token_threshold,
            "read a prompt in one piece, but --long-prefill-token-threshold has it cut into pieces of "
            f"{scheduler.long_prefill_token_threshold} tokens: leave it out",
        ),
        (
            least < longest,
            f"read a prompt in one piece, but a step takes {least} tokens and a text may have {longest}: raise "
            "--max-num-batched-tokens (and --max-num-scheduled-tokens), or lower --max-model-len",
        ),
    ]


def _untried(config: Any, platform: Any, dual_stream: bool) -> list[tuple[bool, str]]:
    """What goes wrong with any routed adapter, or was not tried."""
    parallel, model, cache = config.parallel_config, config.model_config, config.cache_config
    sizes = {
        "pipeline-parallel-size": parallel.pipeline_parallel_size,
        "data-parallel-size": parallel.data_parallel_size,
        "decode-context-parallel-size": parallel.decode_context_parallel_size,
        "prefill-context-parallel-size": parallel.prefill_context_parallel_size,
    }
    graphs = (config.compilation_config.mode, config.compilation_config.cudagraph_mode)
    family = model.hf_text_config.model_type
    return [
        (
            config.scheduler_config.scheduler_cls is not None,
            "were not tried with another scheduler, which may read a prompt in pieces: leave --scheduler-cls out",
        ),
        (config.speculative_config is not None, "were not tried with speculative decoding: leave --speculative-config out"),
        (
            config.kv_transfer_config is not None or config.ec_transfer_config is not None,
            "need a prompt to be read where it is answered, but keys and values come from another process or a store: leave "
            "--kv-transfer-config and --ec-transfer-config out",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "read all of a prompt in every layer, but --kv-sharing-fast-prefill leaves out most of it: leave that out",
        ),
        *(
            (size > 1, f"were tried on several devices with --tensor-parallel-size alone, but --{name} is {size}: leave it out")
            for name, size in sizes.items()
        ),
        (
            parallel.use_ubatching,
            "read a prompt in one piece, but micro-batches cut it (--enable-dbo or --ubatch-size): leave them out",
        ),
        (
            config.lora_config.fully_sharded_loras,
            "have gates between A and B, which --fully-sharded-loras puts on several devices: leave it out",
        ),
        (dual_stream, "have gates between A and B, which VLLM_LORA_ENABLE_DUAL_STREAM runs apart from them: unset it"),
        (
            not (platform.is_cpu() or platform.is_cuda_alike()),
            f"were not tried on {platform.device_name}: serve them on a processor or a GPU",
        ),
        (
            any(one is not None and one.name != "NONE" for one in graphs),
            "decide while the model runs, which no compiled graph can do: start vLLM with --enforce-eager",
        ),
        (
            model.runner_type != "generate",
            f"write text, but vLLM was started for {model.runner_type}: start it with --runner generate",
        ),
        (
            model.is_encoder_decoder or model.is_multimodal_model or model.using_transformers_backend(),
            "were tried with models of vLLM's own that read text alone: serve such a one, without --model-impl transformers, or "
            "use PEFT",
        ),
        (
            family not in FAMILIES,
            f"were tried with {', '.join(FAMILIES)} in vLLM, but not with {family}: serve this adapter with PEFT",
        ),
    ]


def why_not_request(request: Any) -> str | None:
    """Why a request cannot be routed, in the same words.

    Args:
        request: vLLM's ``EngineCoreRequest``.
    """
    if request.prompt_embeds is not None:
        return "were not tried with prompt embeddings: give the prompt as text or tokens"
    if request.resumable:
        return "choose modules by the whole prompt, but this one is sent in pieces: send it in one"
    if request.mm_features:
        return "were tried with text alone, but this prompt holds images or sounds: give text"
    return None
