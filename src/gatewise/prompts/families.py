"""The architectures that selective prompts are built and tested for, and where they keep what the prompts need."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gatewise.errors import GatewiseError
from gatewise.internals.layer_stack import models_around


@dataclass(frozen=True)
class Family:
    """Paths in the Transformer under a model's head: its list of layers, and its rotary embedding if it has one.

    Without a rotary embedding positions are added below the first layer, so real tokens keep theirs by themselves. ``bias`` is the
    path in the first layer of the attention that makes relative position biases, which the layers above are handed.
    ``normed``: a layer ends in a norm (post-norm), so what it leaves has about the size of what generators write.
    ``encoder_decoder``: the layers are those of the encoder, which runs by itself; the decoder reads what it makes of the text.
    """

    layers: str
    rotary: str | None = None
    causal: bool = False
    normed: bool = False
    bias: str | None = None
    encoder_decoder: bool = False


_ROTARY_DECODER = Family("layers", "rotary_emb", causal=True)
_T5 = Family("encoder.block", bias="layer.0.SelfAttention", encoder_decoder=True)
_BART = Family("encoder.layers", normed=True, encoder_decoder=True)
_PRE_NORM_BART = Family("encoder.layers", encoder_decoder=True)

FAMILIES = {
    "llama": _ROTARY_DECODER,
    "gemma3_text": _ROTARY_DECODER,
    "gemma3": Family("language_model.layers", "language_model.rotary_emb", causal=True),
    "qwen2": _ROTARY_DECODER,
    "qwen3": _ROTARY_DECODER,
    "mistral": _ROTARY_DECODER,
    "mixtral": _ROTARY_DECODER,
    "phi": _ROTARY_DECODER,
    "phi3": _ROTARY_DECODER,
    "gpt2": Family("h", causal=True),
    "bert": Family("encoder.layer", normed=True),
    "roberta": Family("encoder.layer", normed=True),
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "marian": _BART,
    "mbart": _PRE_NORM_BART,
    "pegasus": _PRE_NORM_BART,
    "m2m_100": _PRE_NORM_BART,
}
"""By ``config.model_type``."""


# Settings of a configuration that change what attends to what, or what is counted, where prompts have no place in the result.
_REFUSED = {
    "add_cross_attention": (True, "cross-attention reads a second text"),
    "use_bidirectional_attention": (True, "its decoder attends in both directions"),
    "is_causal": (False, "its decoder attends in both directions"),
    "output_router_logits": (True, "its load-balancing loss counts the tokens of the attention mask, and no prompts"),
}


class Transformer:
    """The stack of layers of a model.

    Attributes:
        config: of the model.
        model: the Transformer under the head.
        path, layers: path of the list of layers in the whole model, and its modules.
        rotary: the module that makes rotary position embeddings, if there is one.
        biases: the one that makes relative position biases, if there is one.
        around: all Transformers models that hold the layers and make one pass with them, the outermost first. Of an encoder-decoder
            model the encoder alone, for ``generate`` runs it once and then the decoder many times.

    Raises:
        GatewiseError: an architecture that is not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise GatewiseError(f"selective prompts go into Transformers models, not into a {type(model).__name__}")
        config: Any = model.config
        self.config = config
        if config.model_type not in FAMILIES:
            raise GatewiseError(
                f"selective prompts are not built for {config.model_type} models: supported are {', '.join(FAMILIES)}"
            )
        self.family = FAMILIES[config.model_type]
        for name, (value, why) in _REFUSED.items():
            if getattr(config.get_text_config(), name, None) is value:
                raise GatewiseError(
                    f"this {config.model_type} model has {name}={value} ({why}), which selective prompts do not support"
                )
        if not self.family.causal and getattr(config, "is_decoder", False):
            raise GatewiseError(
                f"this {config.model_type} model is configured as a decoder (is_decoder=True): selective prompts support it "
                "as an encoder"
            )
        if self.family.encoder_decoder and getattr(config, "encoder_layerdrop", None):
            raise GatewiseError(
                f"this {config.model_type} model has encoder_layerdrop={config.encoder_layerdrop}, which leaves out layers that "
                "prompts go through: load it with encoder_layerdrop=0.0"
            )
        self.model: nn.Module = model.base_model
        layers = self.model.get_submodule(self.family.layers)
        self.path = next(name for name, module in model.named_modules() if module is layers)
        self.layers: list[nn.Module] = list(layers.children())
        self.rotary = None if self.family.rotary is None else self.model.get_submodule(self.family.rotary)
        self.biases = None if self.family.bias is None else self.layers[0].get_submodule(self.family.bias)
        around = models_around(model, layers)
        self.around = around[-1:] if self.family.encoder_decoder else around
