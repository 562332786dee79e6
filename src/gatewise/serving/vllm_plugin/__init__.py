"""Routed adapters (MiLoRA) in vLLM: a general plug-in, which vLLM finds by its entry point. Nothing of vLLM is edited.

adapter.py an adapter as it lies in its folder; routing.py the gates of a worker's requests; refusals.py where that cannot be right;
hooks.py what is put into vLLM. Until a routed adapter is loaded, vLLM does what it does without the plug-in, but on processors:
there rows without an adapter get one in vLLM 0.32 when they share a batch with rows that have one, which is mended, and the rows of
an adapter are multiplied together.
"""


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once."""
    from gatewise.serving.vllm_plugin import hooks

    hooks.install()
