"""Routed adapters (MiLoRA) in vLLM: a general plug-in, which vLLM finds by its entry point. Nothing of vLLM is edited.

adapter.py an adapter as it lies in its folder; routing.py the gates of a worker's requests; refusals.py where that cannot be right;
hooks.py what is put into vLLM; products.py LoRA on processors; held.py the files of what was loaded. Until a routed adapter is
loaded, vLLM does what it does without the plug-in, with two exceptions. An adapter that it put aside is loaded again as it was,
whatever lies in its folder then. With ``CPU_LORA`` in the environment, as ``gatewise serve`` has it, the rows of an adapter are
multiplied together on processors, and rows without an adapter that share a batch with others do not get one, as they do in vLLM
0.32.
"""


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once."""
    from gatewise.serving.vllm_plugin import hooks

    hooks.install()
