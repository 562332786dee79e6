"""LoRA variants and base models in which ranks cannot be moved: refused before training, in a sentence each.

PEFT's variants are in ``peft.tuners.lora.variants``. DoRA, aLoRA and VeLoRA work; one that is not known here is refused.

Read in PEFT 0.21.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from gatewise.adapters.files import PEFT_PREFIX
from gatewise.errors import GatewiseError
from gatewise.internals.quantised import is_quantised
from gatewise.processes import is_sharded

_WORKING = ("Dora", "ALora", "Velora")  # how the names of their classes begin
_REASONS = {
    "MiCA": "init_lora_weights='mica' never trains B, and a new rank, whose B starts at zero, would do nothing",
    "Kasa": "kasa_config cuts the base weights by the rank of the config, whatever rank a module ends with",
    "Monteclora": "monteclora_config draws its noise for a number of ranks that is fixed when the adapter is made",
    "BdLora": "use_bdlora cuts the factors into blocks, where a rank is no row of A and column of B",
    "QALora": "use_qalora multiplies its factors without calling lora_B, where the gates of the scores are",
    "Arrow": "arrow_config routes between adapters that have finished training",
}


def refuse_what_cannot_work(model: PeftModel, adapter: str) -> None:
    """Looks at every LoRA layer of an adapter, of whatever kind.

    Raises:
        GatewiseError: a variant whose ranks cannot be moved, or a quantised base module that no gradient passes.
    """
    looked_at: set[tuple[type, type]] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if adapter in layer.lora_variant:
            _refuse_variant(type(layer.lora_variant[adapter]).__name__)
        base = layer.get_base_layer()
        kinds = type(base), type(getattr(base, "weight", None))
        linear = adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
        if linear and kinds not in looked_at and is_quantised(base) and not is_sharded(model):
            looked_at.add(kinds)
            if not _passes_gradients(base, layer.in_features, getattr(model.get_base_model(), "dtype", torch.float32)):
                raise GatewiseError(
                    f"{path.removeprefix(PEFT_PREFIX)} is quantised so ({kinds[0].__name__}, {kinds[1].__name__}) that no gradient "
                    "passes to the layers below, which would neither learn nor be scored: take one that can be trained, such as "
                    "weight-only, and a model that has not been evaluated before"
                )


def _refuse_variant(name: str) -> None:
    if name.startswith(_WORKING):
        return
    reason = next((reason for start, reason in _REASONS.items() if name.startswith(start)), f"{name} is not known to gatewise")
    raise GatewiseError(f"the ranks of this LoRA variant cannot be moved or taken away: {reason}; leave it out of the LoraConfig")


def _passes_gradients(base: Any, width: Any, dtype: torch.dtype) -> bool:
    device = next((tensor.device for tensor in [*base.parameters(), *base.buffers()]), torch.device("cpu"))
    if device.type == "meta":  # offloaded: Accelerate brings the weights when the layer runs
        return True
    with torch.enable_grad():
        return bool(base(torch.ones(1, 1, width, dtype=dtype, device=device, requires_grad=True)).requires_grad)
