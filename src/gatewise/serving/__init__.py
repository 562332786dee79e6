"""Fast decoding of adapters that stay unmerged, in batches whose rows belong to different ones; here and in other engines.

products.py the tensors of a request and their products, for any adapter that is A and B; lora.py plain PEFT LoRA: ``fast_lora``.
engines.py what vLLM must be told of adapters; checking.py whether it then answers as PEFT does; vllm_plugin/ what vLLM lacks for
routed adapters; server/ ``gatewise serve``, with either engine; constraints.py what its answers can be kept to.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewise.serving.lora import FastLora, fast_lora

__all__ = ["FastLora", "fast_lora"]


def __getattr__(name: str) -> Any:
    # lora.py imports PEFT, which may be waiting for gatewise.routed, which needs products.py (see internals/registry.py).
    if name not in __all__:
        raise AttributeError(f"module 'gatewise.serving' has no attribute {name!r}")
    from gatewise.serving import lora

    return getattr(lora, name)
