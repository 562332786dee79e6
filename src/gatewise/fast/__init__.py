"""Fast decoding of adapters that stay unmerged, in batches whose rows belong to different ones.

products.py the tensors of a request and their products, for any adapter that is A and B; lora.py plain PEFT LoRA: ``fast_lora``.
"""

from gatewise.fast.lora import FastLora, fast_lora

__all__ = ["FastLora", "fast_lora"]
