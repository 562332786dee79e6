"""Does this processor multiply bfloat16 numbers by itself? PyTorch says so in public from 2.13 on, before only in private.

Read in PyTorch 2.8 to 2.13.
"""

import torch

# AMD and Intel: dot products of bfloat16, or whole tiles of them. Without one of these, bfloat16 is emulated.
FEATURES = ("avx512_bf16", "amx_bf16")
_PRIVATE = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def multiplies_bfloat16() -> bool:
    """True if the processor has instructions for products of bfloat16 numbers; False where this PyTorch cannot tell."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(bool(capabilities.get(name)) for name in FEATURES)
    return any(bool(getattr(torch.cpu, name)()) for name in _PRIVATE if hasattr(torch.cpu, name))
