"""MiLoRA (Zhang et al., Findings of EMNLP 2024, arXiv 2410.18035) as a PEFT method: the prompt picks a layer's LoRA modules once.

config.py what a user sets; router.py the maths; layer.py a Transformer layer and its LoRA modules; request.py which prompt a
forward belongs to; model.py puts them together and says what was routed where.
"""

from gatewise.internals.registry import add_peft_method
from gatewise.routed.config import RoutedLoraConfig
from gatewise.routed.model import RoutedLoraModel, Routing
from gatewise.routed.router import ACTIVATION_PARAMETERS

__all__ = ["ACTIVATION_PARAMETERS", "RoutedLoraConfig", "RoutedLoraModel", "Routing"]


add_peft_method("ROUTED_LORA", RoutedLoraConfig, RoutedLoraModel, prefix=RoutedLoraModel.prefix)
