"""Fast decoding of adapters that stay unmerged, in batches whose rows belong to different ones; here and in other engines.

products.py the tensors of a request and their products, for any adapter that is A and B; compiled_step.py the same for one step,
on CPUs; lora.py plain PEFT LoRA: ``fast_lora``.
engines.py what vLLM must be told of adapters; checking.py whether it then answers as PEFT does; vllm_plugin/ what vLLM lacks for
routed adapters; server/ ``gatewise serve``, with either engine; constraints.py what its answers can be kept to.
"""
