"""Base class of your own Transformers model around another one: it can do what Transformers says that the other one can."""

from transformers import PreTrainedModel


class ModelAround(PreTrainedModel):
    """Base class of a model that has another one inside, such as an encoder with your own heads.

    Args:
        inner: has chosen its attention and experts already; its configuration is the whole model's.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__(inner.config)
        self._no_split_modules = inner._no_split_modules

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True
